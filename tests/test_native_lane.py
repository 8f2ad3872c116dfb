"""Searches in C++: one step is that of plain torch, and a lane whose steps are native as a whole,
several in a call, gives to the bit what the torch runner gives, asking the same operators for each
step."""

import functools
import math
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_model import EOS, drained
from test_advance import INFINITY, NAN, Game, games
from test_laws import Watched, alone, assert_nothing_is_held, run, tasks_of
from test_model import VOCABULARY, build

from handler.decoding import DecodingOptions, Engine
from handler.decoding.model import packed
from handler.decoding.native_lane import NativeLane, Network
from model.native.build import COMMON, SOURCES
from model.quantized import quantized
from model.shortlist import Shortlist

ops = torch.ops.seq2serve
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("native_search")


@pytest.fixture(scope="module")
def native_search(native_library):
    if native_library is None:
        pytest.skip("no native operators on this machine")


# One step of a search


def searched(values, tokens, normaliser, eos, board):
    """`advance` by the native operator."""
    n, k = board[4].shape
    ended = ops.search(
        values.view(n, k, -1), tokens.view(n, k, -1), normaliser.view(n, k), eos, board, n
    )
    assert ended == board[3].nonzero().flatten().tolist()


@games
@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_a_search_is_that_of_plain_torch(k, n, room, vocabulary, equal, odd, seed):
    """Of a vocabulary smaller than what is looked at, plain torch leaves one token out for all."""
    vocabulary = max(vocabulary, 2 * k + 1)
    game = Game(k, n, room, seed, equal=equal, odd=odd)
    for _ in range(8):
        for i in range(n):
            if game.plain[3][i] and int(game.draw(3, 1)):
                game.begin(i, int(game.draw(room, 1)) * int(game.draw(2, 1)))
        game.step(vocabulary, searched)


@pytest.mark.parametrize(("k", "room"), [(64, 150), (17, 300), (1, 3000)])
def test_wide_beams_and_long_sentences(k, room):
    game = Game(k, 1, room, seed=k)
    game.begin(0, room - 4)
    game.plain[1][:] = game.board[1][:] = room
    for _ in range(4):
        game.step(3 * k + 5, searched)


def test_sentences_that_are_not_finite_end():
    for k in (1, 3):
        for what, bad in [(NAN, 1), (INFINITY, 1), (-INFINITY, 12)]:
            game = Game(k, 2, 9, seed=5)
            game.begin(0)
            game.begin(1)
            values = torch.randn(2 * k, 2 * k + 1 if k > 1 else 2).sort(1, descending=True).values
            values[:k, :bad] = what
            tokens = torch.arange(4, 5 + 2 * k).repeat(2 * k, 1)[:, : values.size(1)]
            game.board[1][:] = 9
            searched(values, tokens, torch.zeros(2 * k), EOS, game.board)
            assert game.board[3].tolist() == [True, False]


def test_tables_that_do_not_fit_are_refused():
    game = Game(3, 2, 9, seed=5)
    values, tokens, normaliser = (t.view(2, 3, -1) for t in game.offered(9))
    board = [*game.board[:5], game.board[5].double(), *game.board[6:]]
    with pytest.raises(RuntimeError, match="got a table of"):
        ops.search(values, tokens, normaliser, EOS, board, 2)
    with pytest.raises(RuntimeError, match="3 sentences"):
        ops.search(values, tokens, normaliser, EOS, game.board, 3)
    with pytest.raises(RuntimeError, match="place 2"):
        ops.read(game.board, [2], 4)
    with pytest.raises(RuntimeError, match="0 to 5 of 2"):
        ops.move(game.board, [0], [5], 1)
    with pytest.raises(RuntimeError, match="parent 3"):
        ops.reorder([torch.zeros(6, 2)], torch.full((2, 3), 3))


def test_searches_stay_within_their_tables(tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, without torch."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    program = tmp_path / "check"
    sanitized = [*COMMON, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(Path(__file__).with_name("search_check.cpp")), str(SOURCES / "search.cpp")]
    subprocess.run([compiler, *sanitized, *sources, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Whole steps


class Leaping(Watched):
    """Lets a lane make as many steps at once as there are until a deadline, which are as many
    ticks of its clock."""

    network = True  # else the model is asked for each step

    def new_runner(self):
        runner = super().new_runner()
        if not self.network:
            runner.network = None
        go = runner.go

        def counted(lane, *arguments):
            before = lane.clock
            events = go(lane, *arguments)
            self.within += max(0, lane.clock - before - 1)
            return events

        def at_once(steps, until):
            return int(max(1, min(steps, until - (self.steps + 1 + self.within))))

        runner.go, runner.at_once = counted, at_once
        return runner


class Asking(Leaping):
    network = False


class ByTorch(Watched):
    """Searches with torch's operators, and asks the model for each step."""

    def new_runner(self):
        runner = super().new_runner()
        runner.native, runner.network = False, None
        return runner


def few():
    torch.manual_seed(3)
    return Shortlist(torch.randint(0, VOCABULARY, (VOCABULARY, 4)), torch.tensor([3, 5]),
                     VOCABULARY)  # fmt: skip


MODELS = {
    "sutskever": lambda: quantized(build("sutskever").float()),
    "attention": lambda: quantized(build("attention").float()),
    "residual": lambda: quantized(build("dot attention of 4 heads").float()),
    "listed": lambda: quantized(build("attention").float(), few()),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, native_search):
    made = packed(MODELS[request.param](), CPU)
    assert Network.of(made) is not None
    return made


@settings(max_examples=6)
@given(seed=st.integers(0, 9999), rows=st.integers(5, 12))
def test_sentences_come_out_as_by_torch(model, seed, rows):
    """To the bit, whatever arrives, is cancelled or runs out of time when; also where the model is
    asked for each step, as one is that cannot make them natively as a whole."""
    tasks = tasks_of(random.Random(seed), 9, model.has_attention)
    expected = {}
    for kind in (ByTorch, Leaping, Asking):
        engine = kind(model, rows)
        events, had = run(engine, tasks, random.Random(seed + 1))
        for i, event in events.items():
            if kind is ByTorch:
                expected[i, had[i]] = event
            known = expected.get((i, had[i])) or by_torch(model, tasks[i], had[i])
            assert (event.results, event.error) == (known.results, known.error)


def by_torch(model, task, steps):
    engine = ByTorch(model, task.options.beam_size)
    sentence = engine.enter(task, None if steps is None else 1 + steps)
    return drained(engine)[sentence]


@pytest.mark.parametrize("options", [
    DecodingOptions(beam_size=2, n_best=2, length_penalty=0.6, length_penalty_form="gnmt"),
    DecodingOptions(beam_size=5, n_best=3, length_penalty=1.0, min_length=4),
    DecodingOptions(beam_size=8, n_best=8, max_length=5), DecodingOptions(return_scores=True),
    DecodingOptions(min_length=6, max_length=6), DecodingOptions(),
])  # fmt: skip
def test_many_sentences_at_once(model, options):
    """Forty in thirty rows, each as alone; whatever the threads, the scores are the same bits."""
    draw = random.Random(7)
    sources = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, 11))] + [EOS]
               for _ in range(40)]  # fmt: skip
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            engine = Engine(model, 30)
            ids = [engine.admit(source, options) for source in sources]
            ended = drained(engine)
            found.append([ended[one].results for one in ids])
            assert_nothing_is_held(engine)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    for source, mine in zip(sources, found[0], strict=True):
        engine = ByTorch(model, options.beam_size)
        sentence = engine.admit(source, options)
        assert drained(engine)[sentence].results == mine


def test_a_call_of_many_steps_ends_with_the_time(model):
    """On the clock of the process, which the operator reads; it makes one step at least."""
    engine = Engine(model, 1)
    engine.admit([5, EOS], DecodingOptions(min_length=50, max_length=50))
    engine.advance(40, time.monotonic() - 1)
    assert engine.steps == 1
    engine.advance(40, time.monotonic() + 3600)
    assert engine.steps == 41
    (lane,) = engine.runner.lanes.values()
    assert isinstance(lane, NativeLane)
    assert lane.clock == 41


def test_a_lane_alone_makes_its_steps_in_one_call(model, monkeypatch):
    """Python sees that a sentence has ended and no step before; beside another lane each of them
    makes one step at a time."""
    calls = []
    go_on = NativeLane.go_on

    def counted(lane, steps, until):
        before = lane.clock
        ids = go_on(lane, steps, until)
        calls.append((steps, lane.clock - before, len(ids)))
        return ids

    monkeypatch.setattr(NativeLane, "go_on", counted)
    engine = Engine(model, 4)
    for length in (5, 9):
        engine.admit([5, 6, EOS], DecodingOptions(min_length=length, max_length=length))
    engine.advance(40)
    assert calls == [(40, 5, 1), (35, 4, 1)]
    calls.clear()
    engine.admit([5, EOS], DecodingOptions(min_length=3, max_length=3))
    engine.admit([5, EOS], DecodingOptions(beam_size=2, max_length=3, min_length=3))
    engine.advance(3)
    assert {steps for steps, _, _ in calls} == {1}


def test_a_model_without_parts_is_asked_for_each_step():
    """As one is that was exported before there were any, or has layers that are not all native."""
    norm = packed(quantized(build("attention with every option").float()), CPU)
    additive = packed(quantized(build("additive attention of 2 heads").float()), CPU)
    for model in (norm, additive, object()):
        assert Network.of(model) is None
    task = tasks_of(random.Random(3), 1, False)[0]._replace(patience=None, prefix=[])
    task = task._replace(options=DecodingOptions(beam_size=3, n_best=3, max_length=9))
    for model in (norm, additive):
        mine, other = alone(model, task, None), by_torch(model, task, None)
        assert [one.tokens for one in mine.results] == [one.tokens for one in other.results]


@pytest.mark.parametrize(("change", "told"), [
    (lambda parts, numbers: (parts[:-1], numbers), "too few parts"),
    (lambda parts, numbers: ([*parts, parts[0]], numbers), "more parts than a network has"),
    (lambda parts, numbers: (parts, [3, *numbers[1:]]), "state of 2 tables for 3 layers"),
    (lambda parts, numbers: (parts, numbers[:-1]), "too few numbers"),
    (lambda parts, numbers: (parts, [*numbers[:-2], 1000, 0]), "vocabulary of 1000"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(change, told):
    model = packed(MODELS["attention"](), CPU)
    engine = Engine(model, 1)
    engine.runner.network = Network(*change(*model.parts()))
    engine.admit([5, EOS], DecodingOptions())
    engine.scheduler.plan(0.0, fresh=True)
    with torch.inference_mode():
        lane_of = functools.partial(NativeLane, model, engine.runner.vocabulary)
        memory, state = engine.runner.read([[5, EOS]])
        kind = engine.runner.kind_of(engine.scheduler.tickets[0].sentence)
        empty = memory._replace(attended=[], initial=[])
        lane = lane_of(kind, empty, engine.runner.network)
        lane.add([engine.scheduler.tickets[0].sentence], state, memory.attended)
        with pytest.raises(RuntimeError, match=told):
            lane.go_on(1, math.inf)


def test_tables_shrink_behind_a_crowd_and_grow_for_it(model):
    """Room for at most four times who is there, once the vacant places were closed up."""
    engine = Engine(model, 64)
    options = [DecodingOptions(min_length=one, max_length=one) for one in (3, 30)]
    for i in range(64):
        engine.admit([5, EOS], options[i == 40])
    while len(engine.runner.lane_of) != 1:
        engine.advance(1)
    engine.advance(2)
    (lane,) = engine.runner.lanes.values()
    assert lane.board.made.size(0) <= 4
    assert all(t.untyped_storage().nbytes() <= 4 * t.nbytes for t in lane.state)
    ((event),) = drained(engine).values()
    assert len(event.results[0].tokens) == 30
