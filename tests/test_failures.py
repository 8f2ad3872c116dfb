"""Failures are told exactly once: every tensor operation of a runner raises in turn, while
sentences of all options come, stream, are cancelled and run out of time. Who was worked on fails,
each once; nobody else notices, and nothing is held afterwards."""

import dataclasses
import functools
import itertools
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import EOS, TableMemory
from test_laws import (
    MIXED,
    Task,
    Watched,
    assert_nothing_is_held,
    assert_rows_add_up,
    assert_same,
    tasks_of,
)
from test_model import VOCABULARY, build
from test_native_lane import Asking, Leaping
from test_static_lane import static
from torch.utils._python_dispatch import TorchDispatchMode

import handler.decoding
from handler.decoding import DecodingOptions, Event, columns, sampling, scheduler, selection
from handler.decoding.model import packed
from handler.decoding.scheduler import Status
from handler.decoding.sentence import NO_TOKEN, NOT_FINITE
from model.quantized import quantized
from model.shortlist import Shortlist

CPU = torch.device("cpu")
HERE = str(Path(handler.decoding.__file__).parent)
LOG = logging.getLogger("handler.decoding")
KINDS = (RuntimeError, torch.OutOfMemoryError, IndexError, ValueError)
SEEDS = (11, 13)  # of schedules that together take every way
NEVER_ENDS = 2000  # turns


class HashModel:
    """Logits from a table by what a row has read and said, all of it: rows and memories that are
    mixed up give other answers. Sums are of whole numbers and halves, so that they are exact.

    A source that begins with POISON gives NaN from the third step on, for its own rows.
    """

    pad_id, unk_id, bos_id, eos_id = 0, 1, 2, 3
    source_vocabulary = target_vocabulary = 42
    max_source_length, max_target_length = 12, 20
    has_attention = True
    PRIME, POISON = 97, 20

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(self.PRIME, self.target_vocabulary, generator=generator)
        self.logits[:, EOS] += 2.5

    def digest(self, source: torch.Tensor) -> torch.Tensor:
        """[N], of sources [N, S] that zeros fill up."""
        return (source * torch.arange(3, 3 + source.size(1))).sum(1) % self.PRIME

    def encode(self, source: torch.Tensor, lengths: torch.Tensor) -> TableMemory:
        said = torch.zeros_like(lengths)
        first = [self.digest(source), source[:, 0], said, said]
        return TableMemory([source.unsqueeze(2)], [torch.stack(first, 1)])

    def start(self, memory: TableMemory) -> list[torch.Tensor]:
        return [memory.initial[0]]

    def step(
        self, previous: torch.Tensor, state: list[torch.Tensor], memory: TableMemory
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        own, first, said, made = state[0].view(*previous.shape, 4).unbind(2)  # [N, K] each
        source = memory.attended[0].squeeze(2)  # [N, S]
        said = (31 * said + 17 * previous + 1) % self.PRIME
        logits = self.logits[(own + 5 * self.digest(source).unsqueeze(1) + said) % self.PRIME]
        poisoned = (first == self.POISON) & (made > 1)
        logits = logits.masked_fill(poisoned.unsqueeze(2), float("nan"))
        place = said % (source > 0).sum(1, keepdim=True)
        paid = torch.zeros(*previous.shape, source.size(1)).scatter_(2, place.unsqueeze(2), 0.5)
        paid[:, :, 0] += 0.5
        return logits, [torch.stack([own, first, said, made + 1], 2).flatten(0, 1)], paid


class Made(NamedTuple):
    """One way to decode.

    model: from the native operators' library. exact: whether an answer is the same to the bit in
    all company. engine: of a model and rows, with a clock that counts steps. ahead: whether steps
    are made before those before them are read, so that who is out of time has what was read.
    """

    name: str
    model: Callable[[Path | None], Any]
    exact: bool
    engine: Callable[[Any, int], Watched] = Watched
    ahead: bool = False


def listed() -> Shortlist:
    """Each token's four candidates, and two common ones."""
    torch.manual_seed(3)
    lexicon = torch.randint(0, VOCABULARY, (VOCABULARY, 4))
    return Shortlist(lexicon, torch.tensor([3, 5]), VOCABULARY)


def native(*shortlist: Shortlist) -> Callable[[Path | None], Any]:
    def model(library: Path | None) -> Any:
        if not library:
            pytest.skip("no native operators on this machine")
        return packed(quantized(build("attention").float(), *shortlist), CPU)

    return model


def float32(native: bool) -> Callable[[Path | None], Any]:
    def model(library: Path | None) -> Any:
        if native and not library:
            pytest.skip("no native operators on this machine")
        made = build("attention").float()
        made.pack(native, torch.backends.mkldnn.is_available())
        assert made.invariant
        return made

    return model


# A further runner is one more line: its model, and how its engine is made.
MADE = [
    Made("table", lambda _: HashModel(), True),
    Made("float32", float32(native=False), True),
    Made("native float32", float32(native=True), True),
    Made("int8", native(), True, Leaping),
    Made("int8 with a shortlist, step by step", native(listed()), True, Asking),
    Made("static", lambda _: build("attention").float(), False, static, True),
]


class Case:
    """A way to decode, and its answers to sentences that are alone."""

    def __init__(self, made: Made, library: Path | None) -> None:
        self.name, self.exact, self.ahead = made.name, made.exact, made.ahead
        self.model = made.model(library)
        self.engine = functools.partial(made.engine, self.model)

    def alone(self, task: Task, steps: int | None) -> Event:
        """In an engine of its own, for so many steps at most."""
        engine = self.engine(task.options.beam_size)
        sentence = engine.enter(task, None if steps is None else 1 + steps)
        return ended(engine)[sentence]

    def assert_answer(self, got: Event, expected: Event, timed: bool = False) -> None:
        """timed: it had a deadline."""
        if self.ahead and timed:
            assert got.error is None
            assert got.results
        elif self.exact or expected.error:
            assert (got.results, got.error) == (expected.results, expected.error)
        else:
            assert_same(got, expected, 1e-4)


def ended(engine: Watched) -> dict[int, Event]:
    """What ends until nothing is left, by sentence."""
    events: list[Event] = []
    for _ in range(NEVER_ENDS):
        events += engine.advance()
        if engine.idle:
            break
    assert_nothing_is_held(engine)
    found = {event.sentence: event for event in events}
    assert len(found) == len(events)
    return found


@pytest.fixture(scope="module", params=MADE, ids=lambda made: made.name)
def case(request, native_library):
    return Case(request.param, native_library)


@pytest.fixture(autouse=True, scope="module")
def small_sizes():
    """So that few sentences take every way. And a log with tracebacks would hold all tensors, and
    threads that share a core with others wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        LOG.setLevel(logging.CRITICAL + 1)
        patch.setattr(columns, "LEAST_ROOM", 2)
        patch.setattr(sampling, "NUCLEUS", 4)
        patch.setattr(scheduler, "ENCODED_AHEAD", 3)
        for name, size in (("BLOCK", 4), ("BLOCKED_FROM", 16), ("SCRATCH", 64)):
            patch.setattr(selection, name, size)
        yield
    torch.set_num_threads(threads)
    LOG.setLevel(logging.NOTSET)


# Operations that raise


class Raised(NamedTuple):
    """An operation that raised: its error, its call path, and the groups of sentences one of which
    it was working on; none where it only read for a caller."""

    error: Exception
    path: tuple[tuple[str, int], ...]
    groups: list[set[int]]


class Fault(NamedTuple):
    """late: it is raised when the work of the operation has been done."""

    kind: type[Exception]
    late: bool = False


# Which fault an operation has, by the number of the engine's call, its own within that, and itself.
Decide = Callable[[int, int, Any], Fault | None]


class Watch(TorchDispatchMode):
    """Counts the tensor operations of an engine, and lets some raise.

    Args:
        only: the call whose operations are counted; None: all.
    """

    def __init__(self, engine: Watched, decide: Decide, only: int | None = None) -> None:
        super().__init__()
        self.engine, self.decide, self.only = engine, decide, only
        self.calls = 0
        self.operations = 0  # of this call
        self.raised: list[Raised] = []
        self.plan: Any = None  # that is carried out
        self.running = False
        self.entered: dict[int, int] = {}  # the step in which a sentence got rows
        self.batches: dict[int, int] = {}  # of those that were encoded before
        apply, run = engine.runner.apply, engine.runner.run

        def applied(plan):
            self.plan = plan
            self.entered |= dict.fromkeys(plan.enter, engine.steps + 1)
            self.batches = {one: id(batch) for one, (batch, _) in engine.runner.encoded.items()}
            try:
                return apply(plan)
            finally:
                self.plan = None

        def ran(*arguments):
            self.running = True
            try:
                return run(*arguments)
            finally:
                self.running = False

        engine.runner.apply, engine.runner.run = applied, ran

    def call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Something of the engine."""
        self.calls, self.operations = self.calls + 1, 0
        if self.only not in (None, self.calls):
            return work(*arguments)
        tolist = torch.Tensor.tolist  # which is not dispatched
        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(torch.Tensor, "tolist", lambda t: self.counted(tolist, t))
            return work(*arguments)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.counted(func, *args, **(kwargs or {}))

    def counted(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        fault = self.decide(self.calls, self.operations, work)
        self.operations += 1
        if fault is None:
            return work(*arguments, **named)
        if fault.late:
            work(*arguments, **named)
        error = fault.kind("out of order")
        self.raised.append(Raised(error, path(), self.groups()))
        raise error

    def groups(self) -> list[set[int]]:
        """Of whom one is being worked on; see `Raised`."""
        runner = self.engine.runner
        if self.running:
            return [members for lane, members in self.lanes() if self.under_way(lane)]
        if self.plan is None:
            return []
        groups = [set(self.plan.expire) & members for _, members in self.lanes()]
        groups.append({one.id for one in self.plan.encode})
        entering: dict[Any, set[int]] = {}
        tickets = self.engine.scheduler.tickets
        for one in self.plan.enter:
            kind = runner.kind_of(tickets[one].sentence)
            entering.setdefault((self.batches.get(one), kind), set()).add(one)
        return [group for group in (*groups, *entering.values()) if group]

    def lanes(self) -> list[tuple[Any, set[int]]]:
        """And who is in each."""
        found: dict[int, tuple[Any, set[int]]] = {}
        for one, lane in self.engine.runner.lane_of.items():
            found.setdefault(id(lane), (lane, set()))[1].add(one)
        return list(found.values())

    def under_way(self, lane: Any) -> bool:
        """Whether a function that has been called, holds the lane."""
        frames = itertools.islice(stack(), 12)
        return any(value is lane for frame in frames for value in frame.f_locals.values())


def stack():
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(HERE):
            yield frame
        frame = frame.f_back


def path() -> tuple[tuple[str, int], ...]:
    """Lines of the decoder that have been called, the innermost first: it is the call site."""
    return tuple((Path(f.f_code.co_filename).name, f.f_lineno) for f in stack())


# Schedules


class Turn(NamedTuple):
    """What happens before the engine advances, to tasks by number; and how far it does."""

    enter: list[int]
    cancel: list[int]
    steps: int


class Schedule(NamedTuple):
    """streams: tasks whose committed tokens are read after each turn."""

    rows: int
    tasks: list[Task]
    turns: list[Turn]
    streams: set[int]


def schedule_of(seed: int, count: int = 12) -> Schedule:
    draw = random.Random(seed)
    tasks = tasks_of(draw, count, True)
    todo, turns = list(range(count)), []
    while len(turns) < 400:
        enter = [todo.pop(0) for _ in range(min(draw.randint(0, 4), len(todo)))]
        here = range(count - len(todo))
        cancel = [draw.choice(here)] if here and draw.random() < 0.15 else []
        turns.append(Turn(enter, cancel, draw.randint(1, 4)))
    streams = {i for i in range(count) if draw.random() < 0.3}
    return Schedule(draw.randint(5, 9), tasks, turns, streams)


class Played(NamedTuple):
    """What came of a schedule.

    events: by task. had: by task, the steps until its deadline. ended: by turn, which tasks ended
    in it. groups: of the operations that raised, the tasks of each of their groups.
    """

    events: dict[int, Event]
    had: dict[int, int | None]
    ended: list[set[int]]
    raised: list[Raised]
    groups: list[list[set[int]]]


def told(kind: type[Exception]) -> str:
    return f"decoding failed: {kind.__name__}"


TOLD = {told(kind) for kind in KINDS}


class Play:
    """A schedule under way. After each turn all that has happened is held to the laws."""

    def __init__(
        self, case: Case, schedule: Schedule, decide: Decide, only: int | None = None
    ) -> None:
        self.schedule = schedule
        self.engine = case.engine(schedule.rows)
        self.watch = Watch(self.engine, decide, only)
        self.number: dict[int, int] = {}  # of a sentence, its task's
        self.sentence: dict[int, int] = {}
        self.due: dict[int, int | None] = {}
        self.committed: dict[int, list[int]] = {}
        self.events: dict[int, Event] = {}
        self.cancelled: set[int] = set()
        self.ended: list[set[int]] = []

    def run(self) -> Played:
        for turn in self.schedule.turns:
            self.enter(turn.enter)
            for one in turn.cancel:
                self.watch.call(self.engine.cancel, self.sentence[one])
                if one not in self.events:
                    self.cancelled.add(one)
            self.advance(turn.steps)
            for one in sorted(self.schedule.streams & self.sentence.keys()):
                self.stream(one)
            self.assert_runner_knows_the_same()
            if self.engine.idle and len(self.sentence) == len(self.schedule.tasks):
                break
        assert_nothing_is_held(self.engine)
        assert not self.engine.runner.fresh
        assert not self.engine.scheduler.dropped
        assert self.events.keys() == set(self.number.values()) - self.cancelled
        had = {
            i: None if due is None else max(0, due - self.watch.entered.get(self.sentence[i], due))
            for i, due in self.due.items()
        }
        groups = [
            [{self.number[one] for one in group} for group in raised.groups]
            for raised in self.watch.raised
        ]
        return Played(self.events, had, self.ended, self.watch.raised, groups)

    def enter(self, tasks: list[int]) -> None:
        for i in tasks:
            patience = self.schedule.tasks[i].patience
            self.due[i] = None if patience is None else self.engine.steps + 1 + patience
            self.sentence[i] = self.engine.enter(self.schedule.tasks[i], self.due[i])
            self.number[self.sentence[i]] = i

    def advance(self, steps: int) -> None:
        """It never raises; those that fail are some that an operation was working on."""
        before = len(self.watch.raised)
        events = self.watch.call(self.engine.advance, steps)
        raised = self.watch.raised[before:]
        failed = {event.sentence for event in events if event.error in TOLD}
        assert {event.error for event in events} & TOLD <= {told(type(r.error)) for r in raised}
        assert failed <= set().union(*(group for one in raised for group in one.groups)), raised
        self.ended.append(set())
        for event in events:
            i = self.number[event.sentence]
            assert i not in self.events
            assert i not in self.cancelled
            self.events[i] = event
            self.ended[-1].add(i)
            if event.error is None:
                begun = self.committed.get(i, [])
                assert event.results[0].tokens[: len(begun)] == begun

    def stream(self, i: int) -> None:
        """A failure here is the caller's; it changes nothing."""
        one, before = self.sentence[i], len(self.watch.raised)
        if one not in self.engine.scheduler.tickets:
            return
        try:
            committed = self.watch.call(self.engine.committed, one)
        except KINDS as error:
            if error not in [raised.error for raised in self.watch.raised[before:]]:
                raise
            return
        begun, self.committed[i] = self.committed.get(i, []), committed
        assert committed[: len(begun)] == begun

    def assert_runner_knows_the_same(self) -> None:
        """As the scheduler, but for those that it has just been told to forget."""
        assert_rows_add_up(self.engine)
        runner, of = self.engine.runner, {status: set() for status in Status}
        for one, ticket in self.engine.scheduler.tickets.items():
            of[ticket.status].add(one)
        assert runner.lane_of.keys() == of[Status.RUNNING]
        assert runner.encoded.keys() == of[Status.ENCODED]
        assert set().union(*(lane.place for lane in runner.lanes.values())) == of[Status.RUNNING]
        assert not of[Status.LEAVING]


class Operation(NamedTuple):
    """The `place`-th of the engine's `call`-th call, and what of the decoder has been called."""

    schedule: int
    call: int
    place: int
    path: tuple[tuple[str, int], ...]

    @property
    def site(self) -> tuple[str, int]:
        return self.path[0]


class Undisturbed:
    """A schedule in which nothing fails, what it comes to, and all its operations."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.schedule = case, schedule_of(seed)
        self.operations: list[Operation] = []
        self.alone = functools.cache(lambda i, steps: case.alone(self.schedule.tasks[i], steps))

        def noted(call: int, place: int, work: Any) -> None:
            self.operations.append(Operation(seed, call, place, path()))

        self.played = Play(case, self.schedule, noted).run()
        self.assert_others_are_the_same(self.played)

    def assert_others_are_the_same(self, played: Played) -> None:
        """All that have not failed: each is what it is alone, which does not depend on when it
        began nor who was there; had it a deadline, with as many steps as it had."""
        for i, event in played.events.items():
            if event.error not in TOLD:
                timed = self.schedule.tasks[i].patience is not None
                self.case.assert_answer(event, self.alone(i, played.had[i]), timed)

    def assert_told_once(self, operation: Operation, fault: Fault) -> None:
        """Where one operation raises, one group fails, the whole of it; or where answers of a lane
        are read, those who had ended; or nobody, where it could be done without."""

        def decide(call: int, place: int, work: Any) -> Fault | None:
            return fault if (call, place) == (operation.call, operation.place) else None

        played = Play(self.case, self.schedule, decide, operation.call).run()
        ((_, path, _),), (groups,) = played.raised, played.groups
        assert path == operation.path
        failed = {i for i, event in played.events.items() if event.error == told(fault.kind)}
        if failed and failed not in groups:
            (turn,) = (turn for turn, ended in enumerate(played.ended) if failed & ended)
            assert failed <= self.played.ended[turn], (operation, failed, groups)
        self.assert_others_are_the_same(played)


def chosen(operations: list[Operation], draw: random.Random, every_path: bool) -> list[Operation]:
    """One operation of each call site, or even of each way that leads there."""
    found: dict[Any, list[Operation]] = {}
    for one in operations:
        found.setdefault(one.path if every_path else one.site, []).append(one)
    return [draw.choice(some) for some in found.values()]


TENSORS_IN = {"columns.py", "constraints.py", "lane.py", "model.py", "reading.py", "rows.py",
              "runner.py", "sampling.py", "search.py", "selection.py"}  # fmt: skip


def test_each_operation_that_raises_is_told_once(case, capsys):
    """Each call site of two rich schedules; with the table each call path. The other occurrences
    are for those that hypothesis makes up."""
    draw = random.Random(case.name)
    undisturbed = {seed: Undisturbed(case, seed) for seed in SEEDS}
    operations = [one for each in undisturbed.values() for one in each.operations]
    sites = {one.site for one in operations}
    assert {name for name, _ in sites} >= TENSORS_IN
    assert ("native_lane.py" in {name for name, _ in sites}) == case.name.startswith("int8")
    failed = set()
    some = chosen(operations, draw, every_path=case.name == "table")
    for number, one in enumerate(some):
        fault = Fault(KINDS[number % len(KINDS)], late=draw.random() < 0.25)
        undisturbed[one.schedule].assert_told_once(one, fault)
        failed.add(one.site)
    assert failed == sites
    with capsys.disabled():
        print(f"\n{case.name}: {len(sites)} call sites failed, in {len(some)} of "
              f"{len(operations)} operations")  # fmt: skip


class Trouble:
    """Operations raise at random, mostly some one after the other."""

    def __init__(self, seed: int, rate: float, burst: int) -> None:
        self.draw, self.rate, self.burst = random.Random(seed), rate, burst
        self.left = 0

    def __call__(self, call: int, place: int, work: Any) -> Fault | None:
        if not self.left and self.draw.random() < self.rate:
            self.left = self.draw.randint(1, self.burst)
        if not self.left:
            return None
        self.left -= 1
        return Fault(self.draw.choice(KINDS), self.draw.random() < 0.25)


@settings(max_examples=12)
@given(seed=st.integers(0, 9999), rate=st.sampled_from([1e-4, 1e-3, 1e-2]),
       burst=st.sampled_from([1, 3, 30]))
def test_whatever_raises_is_told_once(case, seed, rate, burst):
    schedule = schedule_of(seed)
    played = Play(case, schedule, Trouble(seed, rate, burst)).run()
    for i, event in played.events.items():
        if case.exact and event.error not in TOLD:
            timed = schedule.tasks[i].patience is not None
            case.assert_answer(event, case.alone(schedule.tasks[i], played.had[i]), timed)


# The inputs that were asked for


def task(source: list[int], options: DecodingOptions, patience: int | None = None) -> Task:
    return Task(source, options, [], 0, patience)


def lasting(length: int, width: int = 1) -> Task:
    """Of so many steps, whatever the model says."""
    return task(
        [9, length + 3, EOS], DecodingOptions(beam_size=width, min_length=length, max_length=length)
    )


@pytest.fixture
def table():
    return Case(MADE[0], None)


@pytest.mark.parametrize(
    ("function", "operator", "failed"),
    [
        ("encode_batch", "", {12}),
        ("add", "", {12}),
        ("offer", "", {*range(1, 9)}),
        ("step", "index_select", {9, 10, 11, 12}),
        ("close", "clone", {7, 8}),
    ],
    ids=["at encode", "at admission", "in a step", "at reorder", "at shrinking"],
)
@pytest.mark.parametrize("late", [False, True])
def test_an_allocation_that_fails(table, function, operator, failed, late):
    """Nine of one hypothesis, of 1 to 9 steps; three beams; and a fourth that comes after a step,
    when one has ended. Their table shrinks when two of nine are left."""
    tasks = [lasting(length) for length in range(1, 10)] + [lasting(12, 3)] * 4
    raised = []

    def decide(call, place, work):
        names = (frame.f_code.co_name for frame in stack())
        within = [name for name in names if not name.startswith("<")]
        there = operator in str(work) and function in within[: 1 if operator else None]
        if raised or call == 1 or not there:
            return None
        raised.append(work)
        return Fault(torch.OutOfMemoryError, late)

    turns = [Turn([*range(12)], [], 1), *[Turn([12] * (i == 0), [], 4) for i in range(9)]]
    schedule = Schedule(21, tasks, turns, set())
    played = Play(table, schedule, decide).run()
    assert {i for i, event in played.events.items() if event.error} == failed
    assert {played.events[i].error for i in failed} == {told(torch.OutOfMemoryError)}
    for i in played.events.keys() - failed:
        table.assert_answer(played.events[i], table.alone(tasks[i], None))


def test_a_failure_is_logged_once(table, caplog):
    caplog.set_level(logging.ERROR, LOG.name)
    schedule = Schedule(3, [lasting(4)] * 3, [Turn([0, 1, 2], [], 4)] * 3, set())
    Play(table, schedule, lambda *at: Fault(RuntimeError) if at[:2] == (1, 100) else None).run()
    (record,) = caplog.records
    assert record.getMessage() == "decoding failed for 3 sentences"
    assert record.exc_info[0] is RuntimeError


WAYS = [
    *MIXED,
    DecodingOptions(beam_size=3, return_alignments=True, coverage_penalty=0.3),
    DecodingOptions(return_alignments=True, return_scores=True, max_length=9),
]


@pytest.mark.parametrize("options", WAYS)
def test_a_sentence_whose_logits_are_nan_fails_alone(table, options):
    """From the third step on."""
    longer = dataclasses.replace(options, min_length=5)
    tasks = [task([first, 9, EOS], longer) for first in (7, HashModel.POISON, 8)]
    good, bad, also_good = answered(table, 3 * options.beam_size, tasks)
    assert (bad.results, bad.error) == ([], NOT_FINITE)
    table.assert_answer(good, table.alone(tasks[0], None))
    table.assert_answer(also_good, table.alone(tasks[2], None))


def answered(case: Case, rows: int, tasks: list[Task]) -> list[Event]:
    engine = case.engine(rows)
    ids = [engine.enter(one, one.patience) for one in tasks]
    events = ended(engine)
    assert events.keys() == set(ids)
    return [events[one] for one in ids]


def assert_all_as_alone(case: Case, rows: int, tasks: list[Task], times: int = 1) -> None:
    alone = [case.alone(one, one.patience) for one in tasks]
    for i, event in enumerate(answered(case, rows, tasks * times)):
        case.assert_answer(event, alone[i % len(tasks)])


NARROW = [one for one in MIXED if one.beam_size == 1]


@pytest.mark.parametrize(
    ("rows", "tasks", "times"),
    [
        (1, [task([5, 6, EOS], one) for one in NARROW], 2),
        (5, [task([7, 9, EOS], one) for one in MIXED], 2),
        (9, [task([EOS], one) for one in MIXED], 2),
        (64, [task([word, EOS], DecodingOptions(max_length=4)) for word in range(4, 20)], 64),
        (50, [task([word, EOS], DecodingOptions(beam_size=2)) for word in range(4, 20)], 8),
    ],
    ids=["one row", "a beam as wide as the rows", "sources of one token", "1,024 texts of a word",
         "texts of a word with a beam"],
)
def test_small_and_many(case, rows, tasks, times):
    assert_all_as_alone(case, rows, tasks, times)


@pytest.mark.parametrize("options", [
    DecodingOptions(), DecodingOptions(beam_size=2, n_best=2), DecodingOptions(beam_size=5),
    DecodingOptions(beam_size=8, n_best=8, length_penalty=1.0),
    DecodingOptions(sampling=True, seed=1), DecodingOptions(sampling=True, seed=1, top_k=9),
    DecodingOptions(sampling=True, seed=1, top_p=0.5),
    DecodingOptions(no_repeat_ngram_size=1, min_length=3, max_length=6),
    DecodingOptions(beam_size=3, no_repeat_ngram_size=2), DecodingOptions(repetition_penalty=2.0),
])  # fmt: skip
def test_a_vocabulary_of_five(options):
    """One word and the end; what forbids both leaves no token, which is told."""
    class Small(HashModel):
        target_vocabulary = 5

    case = Case(Made("small", lambda _: Small(), True), None)
    for rows in (options.beam_size, 3 * options.beam_size):
        assert_all_as_alone(case, rows, [task([word, EOS], options) for word in range(4, 12)])
    impossible = options.no_repeat_ngram_size and options.min_length > 1
    for one in answered(case, 24, [task([4, EOS], options)]):
        assert one.error == (NO_TOKEN if impossible else None)
        assert {token for result in one.results for token in result.tokens} <= {4}


def test_a_hundred_cancellations_in_one_round(case):
    """Of 150 sentences, some in rows, some encoded and most waiting; the others do not notice."""
    tasks = [task([word, 9, EOS], MIXED[word % len(MIXED)]) for word in range(4, 19)] * 10
    gone = [i for i in range(150) if i % 3]
    turns = [Turn([*range(150)], [], 2), Turn([], gone, 2), *[Turn([], [], 16)] * NEVER_ENDS]
    played = Play(case, Schedule(20, tasks, turns, set()), lambda *_: None).run()
    assert 50 <= len(played.events) < 60  # some ended before
    alone = [case.alone(one, None) for one in tasks[:15]]
    for i, event in played.events.items():
        case.assert_answer(event, alone[i % 15])


def test_deadlines_that_end_within_several_steps(case):
    """All within one call of the engine, each after the steps that were left."""
    longer = [dataclasses.replace(one, min_length=9, max_length=20) for one in MIXED]
    tasks = [task([4 + i, 9, EOS], longer[i % len(MIXED)], i % 8) for i in range(16)]
    turns = [Turn([*range(16)], [], 16), *[Turn([], [], 16)] * 9]
    played = Play(case, Schedule(50, tasks, turns, set()), lambda *_: None).run()
    assert played.ended[0] == set(range(16))
    for i, event in played.events.items():
        late = {len(one.tokens) for one in event.results if one.finish_reason == "time"}
        assert late == {i % 8} or case.ahead
        case.assert_answer(event, case.alone(tasks[i], i % 8), timed=True)
