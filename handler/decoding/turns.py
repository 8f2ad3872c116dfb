"""Whose sentence is next: fair between callers, and between the requests of one caller."""

import heapq
import itertools
import math
from dataclasses import dataclass, field
from enum import IntEnum

from handler.decoding.sentence import Sentence

TURN = 4  # beside others, a request of many sentences gets a quarter of its caller's turns
BULK = 8  # interactive sentences after which bulk has a turn, if any waits


class Status(IntEnum):
    """Of a sentence; it goes forward only, and ends once."""

    WAITING = 0
    ENCODED = 1  # its source has been read, and it waits for rows
    RUNNING = 2
    LEAVING = 3  # its time is over: its rows are free, its answer is on its way
    ENDED = 4


@dataclass(frozen=True)
class Caller:
    """Who asks: the sentences of one name share their turns.

    share: turns beside another caller's, in proportion.
    """

    name: str = ""
    share: float = 1.0


@dataclass(eq=False)
class Ticket:
    """A sentence and what the scheduler knows of it.

    behind: sentences of the same request that are before this one.
    """

    sentence: Sentence
    caller: Caller
    bulk: bool
    behind: int
    deadline: float = math.inf
    status: Status = Status.WAITING
    begun: bool = False  # it has a token


@dataclass
class Line:
    """The waiting sentences of one caller.

    taken: how many have left the line; the k-th sentence of a request counts as coming when
        `TURN` * k further ones have left it, and then it is first come, first served. So no request
        waits for the whole of another, and none is overtaken for ever.
    virtual_start: rows over share that the caller has had. The least is next.
    """

    waiting: list[tuple[int, int, Ticket]] = field(default_factory=list)  # a heap
    taken: int = 0
    virtual_start: float = 0.0


class Turns:
    """Start-time fair queueing (Goyal, Vin and Cheng 1996) between callers, by rows.

    A sentence that was cancelled stays in line and is skipped when its turn comes.
    """

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.virtual_time = 0.0  # `virtual_start` of the caller who was last
        self.number = itertools.count()

    def add(self, ticket: Ticket) -> None:
        line = self.lines.setdefault(ticket.caller.name, Line())
        if not line.waiting:  # who was away has saved up nothing
            line.virtual_start = max(line.virtual_start, self.virtual_time)
        entry = line.taken + TURN * ticket.behind, next(self.number), ticket
        heapq.heappush(line.waiting, entry)

    def prune(self) -> int:
        """Forget the sentences that no longer wait; how many do."""
        for line in self.lines.values():
            line.waiting = [one for one in line.waiting if one[2].status is Status.WAITING]
            heapq.heapify(line.waiting)
        return sum(len(line.waiting) for line in self.lines.values())

    def take(self) -> Ticket | None:
        """The next that still waits."""
        while True:
            lines = [line for line in self.lines.values() if line.waiting]
            if not lines:
                self.lines.clear()  # when nobody waits, nobody is ahead
                return None
            line = min(lines, key=lambda one: one.virtual_start)
            _, _, ticket = heapq.heappop(line.waiting)
            if ticket.status is not Status.WAITING:
                continue
            self.virtual_time = line.virtual_start
            line.taken += 1
            line.virtual_start += ticket.sentence.rows / ticket.caller.share
            return ticket


class Queue:
    """All that wait. Bulk goes when nothing interactive waits, and after every `BULK` interactive
    sentences, so that it never starves."""

    def __init__(self) -> None:
        self.interactive, self.bulk = Turns(), Turns()
        self.overtaken = 0  # interactive sentences since bulk had its turn, waiting or not
        self.size = 0  # entries, those of cancelled sentences included

    def add(self, ticket: Ticket) -> None:
        (self.bulk if ticket.bulk else self.interactive).add(ticket)
        self.size += 1

    def prune(self) -> None:
        """Forget the sentences that no longer wait."""
        self.size = self.interactive.prune() + self.bulk.prune()

    def take(self) -> Ticket | None:
        """The next that still waits; None where nobody does."""
        if self.overtaken < BULK:
            ticket = self.interactive.take()
            if ticket is not None:
                self.overtaken += 1
                return ticket
        self.overtaken = 0
        return self.bulk.take() or self.interactive.take()
