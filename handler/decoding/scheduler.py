"""Which sentence decodes when: turns, rows, deadlines and cancellation. It knows no tensors.

Everything it decides is a `Plan` that a runner carries out, and everything that happened comes back
as a `Report`. `move` is the only place where a sentence's status changes, so that each ends once
and what is counted adds up.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from handler.decoding.sentence import Event, Sentence, unbegun
from handler.decoding.turns import Caller, Queue, Status, Ticket

MANY = 1024  # entries of ended sentences, from which on they are looked for and forgotten
ENCODED_AHEAD = 16  # sentences; encoding one takes nearly as long as encoding several
# Source tokens that are encoded together, in all and for each row: nobody decodes meanwhile, and 64
# sentences of 250 tokens would take as long as 18 rounds of the service on a CPU.
ENCODED_TOKENS, ENCODED_TOKENS_A_ROW = 1024, 16


@dataclass(frozen=True)
class Plan:
    """What a runner is to do before its next step, in this order.

    drop: ids to forget. expire: ids in rows, to be answered with what there is.
    encode: sentences whose source is to be read. enter: ids that are encoded, to be put into rows.
    """

    drop: list[int] = field(default_factory=list)
    expire: list[int] = field(default_factory=list)
    encode: list[Sentence] = field(default_factory=list)
    enter: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What a runner did.

    steps: made. began: ids that have their first token since the last report.
    events: of sentences that ended or failed, which the runner has forgotten.
    """

    steps: int = 0
    began: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


class Scheduler:
    """Sentences that come and go, each with a status that goes forward only.

    Args:
        capacity: rows that sentences may have at once; a wide beam waits until all of its rows are
            free, and nobody overtakes it meanwhile.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tickets: dict[int, Ticket] = {}  # of those that have not ended
        self.queue = Queue()
        self.encoded: deque[Ticket] = deque()  # the next to enter; some may have ended
        self.deadlines: list[tuple[float, int]] = []  # a heap; some may have ended
        self.dropped: list[int] = []  # ids that a runner still has to forget
        self.began: list[int] = []  # ids, see `Engine.began`
        self.count = [0] * len(Status)  # of sentences, by status
        self.rows_in_use = 0  # of those that are running
        self.waiting_of: Counter[str] = Counter()  # not yet running, by caller

    def admit(
        self,
        sentence: Sentence,
        caller: Caller = Caller(),
        bulk: bool = False,
        behind: int = 0,
        deadline: float = math.inf,
    ) -> None:
        """Queue a sentence; see `turns` for who is next."""
        ticket = Ticket(sentence, caller, bulk, behind, deadline)
        self.tickets[sentence.id] = ticket
        self.count[Status.WAITING] += 1
        self.waiting_of[caller.name] += 1
        self.queue.add(ticket)
        if deadline < math.inf:
            heapq.heappush(self.deadlines, (deadline, sentence.id))
            if len(self.deadlines) > 2 * len(self.tickets) + MANY:
                self.deadlines = [one for one in self.deadlines if one[1] in self.tickets]
                heapq.heapify(self.deadlines)

    def cancel(self, sentence: int) -> bool:
        """Forget a sentence, whose rows are free from now on; whether there was one."""
        ticket = self.tickets.get(sentence)
        if ticket is None:
            return False
        if ticket.status is not Status.WAITING:
            self.dropped.append(sentence)
        self.move(ticket, Status.ENDED)
        if self.queue.size > 2 * self.count[Status.WAITING] + MANY:
            self.queue.prune()
        return True

    def move(self, ticket: Ticket, status: Status) -> None:
        """Change a status, and all that is counted by it."""
        before, ticket.status = ticket.status, status
        self.count[before] -= 1
        self.count[status] += 1
        if before <= Status.ENCODED < status:
            name = ticket.caller.name
            self.waiting_of[name] -= 1
            if not self.waiting_of[name]:
                del self.waiting_of[name]
        if status is Status.RUNNING:
            self.rows_in_use += ticket.sentence.rows
        elif before is Status.RUNNING:
            self.rows_in_use -= ticket.sentence.rows
        if status is Status.ENDED:
            del self.tickets[ticket.sentence.id]

    @property
    def idle(self) -> bool:
        return not self.tickets

    @property
    def waiting_count(self) -> int:
        """Sentences that are not in rows yet."""
        return self.count[Status.WAITING] + self.count[Status.ENCODED]

    @property
    def live_count(self) -> int:
        return self.count[Status.RUNNING]

    @property
    def next_deadline(self) -> float:
        """Of those that have not ended."""
        while self.deadlines and self.deadlines[0][1] not in self.tickets:
            heapq.heappop(self.deadlines)
        return self.deadlines[0][0] if self.deadlines else math.inf

    def plan(self, now: float, fresh: bool) -> tuple[Plan, list[Event]]:
        """What to do before the next step, and the events of those whose time was over before they
        were in rows.

        Args:
            now: on the clock of the deadlines.
            fresh: whether a call has just begun. Within one, newcomers are encoded only where they
                are many or the rows would be empty without them: a quarter of a busy server's time
                went into encodings of one or two sentences.
        """
        expire, events = self.expired(now)
        drop, self.dropped = self.dropped, []
        enter = self.entering()
        encode: list[Sentence] = []
        if self.count[Status.WAITING] and not self.encoded and self.worthwhile(fresh):
            encode = self.encoding()
            enter += self.entering()
        return Plan(drop, expire, encode, enter), events

    def expired(self, now: float) -> tuple[list[int], list[Event]]:
        """Those in rows whose time is over; and the events of those that were in none."""
        expire: list[int] = []
        events: list[Event] = []
        while self.next_deadline <= now:
            _, sentence = heapq.heappop(self.deadlines)
            ticket = self.tickets[sentence]
            if ticket.status is Status.RUNNING:
                self.move(ticket, Status.LEAVING)
                expire.append(sentence)
                continue
            if ticket.status is Status.ENCODED:
                self.dropped.append(sentence)
            self.move(ticket, Status.ENDED)
            events.append(unbegun(ticket.sentence))
        return expire, events

    def worthwhile(self, fresh: bool) -> bool:
        """Whether to encode now."""
        free = self.capacity - self.rows_in_use
        many = self.count[Status.WAITING] >= ENCODED_AHEAD or 4 * free >= self.capacity
        return free > 0 and (fresh or many)

    def encoding(self) -> list[Sentence]:
        """The sentences whose turn is next, for all free rows and some ahead."""
        taken: list[Sentence] = []
        tokens = max(ENCODED_TOKENS, ENCODED_TOKENS_A_ROW * self.capacity)
        count = max(ENCODED_AHEAD, self.capacity - self.rows_in_use)
        while len(taken) < count and tokens > 0:
            ticket = self.queue.take()
            if ticket is None:
                break
            self.move(ticket, Status.ENCODED)
            self.encoded.append(ticket)
            taken.append(ticket.sentence)
            tokens -= len(ticket.sentence.source)
        return taken

    def entering(self) -> list[int]:
        """The encoded sentences that fit into free rows, in order."""
        enter: list[int] = []
        while self.encoded:
            first = self.encoded[0]
            if first.status is Status.ENCODED:
                if first.sentence.rows > self.capacity - self.rows_in_use:
                    break
                self.move(first, Status.RUNNING)
                enter.append(first.sentence.id)
            self.encoded.popleft()
        return enter

    def settle(self, report: Report) -> list[Event]:
        """Take note of what a runner did; the events that are news. What a runner tells of a
        sentence that was cancelled meanwhile, is none."""
        for sentence in report.began:
            if sentence in self.tickets:
                self.tickets[sentence].begun = True
                self.began.append(sentence)
        return list(self.news(report.events))

    def news(self, events: Iterable[Event]) -> Iterable[Event]:
        for event in events:
            ticket = self.tickets.get(event.sentence)
            if ticket is not None:
                self.move(ticket, Status.ENDED)
                yield event
