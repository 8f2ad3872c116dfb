"""Steps at fixed addresses, recorded and made ahead: what a GPU would record and replay is here
recorded by torch's own tracer and called again."""

import functools
import logging
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import EOS, A, B, C, TableModel, decode, drained
from test_laws import Watched, alone, assert_nothing_is_held, assert_same, run, tasks_of
from test_model import VOCABULARY, build
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from handler.decoding import DecodingOptions, Engine
from handler.decoding.cuda_runner import CudaOptions, CudaRunner
from handler.decoding.graphs import Called, bucket
from handler.decoding.static_lane import Grid, Sizes, StaticLane
from model.quantized import quantized
from model.shortlist import Shortlist

WIDTHS = (1, 2, 3, 5)


class Traced:
    """What a graph is: the operations of one call, at their addresses. Python does not run again,
    and a number that was read on the host would be the same for ever."""

    def __init__(self):
        self.count, self.replayed = 0, 0

    def record(self, function):
        function()
        graph = make_fx(lambda: function())()  # which ends with what it returns, so not partial
        self.count += 1

        def replay():
            self.replayed += 1
            graph()

        return replay


class Static(Watched):
    """An engine whose plain sentences go through static steps."""

    recorder = Called()
    def new_runner(self):
        options = CudaOptions(WIDTHS, tiles=False)
        runner = CudaRunner(
            self.model, self.device, self.clock, self.capacity, options, self.recorder
        )
        return runner


def static(model, rows, recorder=None):
    return type("", (Static,), {"recorder": recorder or Called()})(model, rows)


@pytest.fixture(scope="module", params=["sutskever", "attention", "mixed ensemble"])
def model(request):
    return build(request.param)


# The engine over it


@settings(max_examples=10)
@given(seed=st.integers(0, 9999), rows=st.integers(5, 12), tiles=st.booleans())
def test_sentences_come_out_as_step_by_step(model, seed, rows, tiles):
    """Greedy, beams, sampling, prefixes and all else mixed, at random times; what is committed is
    never taken back. A deadline ends a sentence with what was known by then."""
    tasks = tasks_of(random.Random(seed), 9, model.has_attention)
    reference = functools.cache(lambda i: alone(model, tasks[i], None))
    engine = static(model, rows)
    for lane in engine.runner.static.values() if tiles else ():
        lane.at_once = 1
        lane.use_tiles(True)
    events, _ = run(engine, tasks, random.Random(seed))
    for i, event in events.items():
        if tasks[i].patience is None:
            assert_same(event, reference(i), 1e-4)
        else:
            assert event.error is None
            assert 1 <= len(event.results) <= tasks[i].options.n_best


@pytest.mark.parametrize("beam_size", [1, 3])
def test_what_is_recorded_is_what_is_computed(model, beam_size):
    recorder = Traced()
    options = DecodingOptions(beam_size=beam_size, n_best=beam_size, return_scores=True,
                              max_length=12, length_penalty=0.6, min_length=2)  # fmt: skip
    draw = random.Random(beam_size)
    sources = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, 40))] + [EOS]
               for _ in range(30)]  # fmt: skip
    expected = decode(Engine(model, 20), sources, options)
    found = decode(static(model, 20, recorder), sources, options)
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine, other, 1e-4)
    assert recorder.replayed > recorder.count > 0


@pytest.mark.parametrize("beam_size", [1, 5])
def test_a_shortlist_holds_in_recorded_steps(beam_size):
    torch.manual_seed(beam_size)
    lexicon = torch.randint(4, VOCABULARY, (VOCABULARY, 2))
    few = Shortlist(lexicon, torch.tensor([EOS, 4]), VOCABULARY)
    made = quantized(build("attention").float(), few)
    made.pack(False, False)
    draw = random.Random(beam_size)
    sources = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, 12))] + [EOS]
               for _ in range(12)]  # fmt: skip
    options = DecodingOptions(beam_size=beam_size, max_length=10)
    expected = decode(Engine(made, 10), sources, options)
    found = decode(static(made, 10), sources, options)
    for source, mine, other in zip(sources, found, expected, strict=True):
        assert mine.results[0].tokens == other.results[0].tokens
        assert set(mine.results[0].tokens) <= {4, *lexicon[source].flatten().tolist()}


def test_a_sentence_that_is_not_finite_fails_alone():
    table = TableModel({2: {A: 0.9, B: 0.1}, A: {B: 0.9, EOS: 0.1}, B: {EOS: 1.0}}, poison=C)
    for beam_size in (1, 2):
        events = decode(
            static(table, 6), [[A, EOS], [C, EOS], [B, EOS]], DecodingOptions(beam_size=beam_size)
        )
        assert [event.error is None for event in events] == [True, False, True]
        assert events[0].results[0].tokens == events[2].results[0].tokens == [A, B]


def test_places_are_used_again_and_closed_up():
    """Twelve sentences of which eleven end; a long one that came last takes a low place."""
    model = build("attention")
    engine = static(model, 70)
    short = [engine.admit([5, EOS], DecodingOptions(max_length=2, min_length=2)) for _ in range(69)]
    long = engine.admit([6, EOS], DecodingOptions(max_length=30, min_length=30))
    lane = engine.runner.static[1]
    places = set()
    ended = {}
    while not engine.idle:
        ended |= {event.sentence: event for event in engine.advance()}
        places |= {lane.place[long]} if long in lane.place else set()
    assert max(places) == 69
    assert min(places) < 16
    assert set(ended) == {*short, long}
    (expected,) = decode(Engine(model, 1), [[6, EOS]], DecodingOptions(max_length=30,
                                                                       min_length=30))
    assert ended[long].results[0].tokens == expected.results[0].tokens
    assert_nothing_is_held(engine)


def test_what_is_cancelled_while_steps_are_under_way_is_told_by_nobody():
    engine = static(TableModel({t: {A: 1.0} for t in (2, A)}), 4)
    gone, kept = (engine.admit([9, EOS], DecodingOptions(max_length=9)) for _ in range(2))
    assert engine.advance(4) == []
    engine.cancel(gone)
    late = engine.admit([8, EOS], DecodingOptions(max_length=3))  # at the place of `gone`
    events = drained(engine)
    assert set(events) == {kept, late}
    assert events[late].results[0].tokens == [A] * 3
    assert events[kept].results[0].tokens == [A] * 9


class Rounding:
    """A model whose rows depend on how many are beside them, but not in tiles of one size."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def step(self, previous, state, memory):
        logits, state, paid = self.model.step(previous, state, memory)
        return logits * (1 + 1e-9 * previous.size(0)), state, paid


@pytest.mark.parametrize("tiles", [True, False])
def test_rows_that_depend_on_their_number_are_computed_in_tiles(tiles, monkeypatch, caplog):
    monkeypatch.setattr("handler.decoding.cuda_runner.TILE", 4)
    model = Rounding(TableModel({t: {A: 0.6, B: 0.4} for t in (2, A, B)}))
    model.model.logits = model.model.logits.double()
    clock = lambda: 0.0  # noqa: E731
    with caplog.at_level(logging.INFO):
        runner = CudaRunner(model, torch.device("cpu"), clock, 18, CudaOptions((1, 2), tiles),
                            Called())  # fmt: skip
    assert [lane.tiled for lane in runner.static.values()] == [tiles, tiles]
    assert runner.invariant == tiles
    assert any("may depend" in line for line in caplog.messages) == (not tiles)
    assert runner.static[1].grid.sentences == ([4, 16, 20] if tiles else [1, 16, 20])
    assert runner.static[2].grid.sentences == ([2, 8, 10] if tiles else [1, 8, 10])


def test_a_model_whose_rows_do_not_is_not(caplog):
    model = TableModel({t: {A: 0.6, B: 0.4} for t in (2, A, B)})
    with caplog.at_level(logging.WARNING):
        engine = static(model, 20)
    assert engine.runner.invariant
    assert not any(lane.tiled for lane in engine.runner.static.values())
    assert not caplog.messages


# What a graph can be made of


class Devices(TorchDispatchMode):
    """Refuses what would wait for the device: reading a number, or a size that depends on one."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "unique")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert not any(one in str(function) for one in self.WAITING), function
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("width", [1, 3])
def test_a_step_reads_nothing_on_the_host(model, width):
    engine = static(model, 12)
    lane = engine.runner.static[width]
    with torch.inference_mode(), Devices():
        for count in lane.grid.sentences:
            lane.compute(count, lane.grid.sources[-1])


class Refusing(Called):
    """Cannot record, as where an operation is not allowed in a graph."""

    def __init__(self, times):
        self.times = times

    def record(self, function):
        self.times -= 1
        if self.times < 0:
            return function
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


def test_a_size_that_cannot_be_recorded_is_computed_it_alone(model, caplog):
    with caplog.at_level(logging.WARNING):
        engine = static(model, 8, Refusing(2))
    told = [line for line in caplog.messages if "no graph for" in line]
    assert len(told) == 2
    assert not any("more of it" in line for line in told)
    options = DecodingOptions(max_length=9)
    (found,) = decode(engine, [[5, 6, EOS]], options)
    (expected,) = decode(Engine(model, 1), [[5, 6, EOS]], options)
    assert_same(found, expected, 1e-4)


def test_a_step_that_fails_ends_its_sentences_and_leaves_the_lane_usable(model):
    engine = static(model, 6)
    long = [DecodingOptions(beam_size=k, min_length=20, max_length=20) for k in (1, 2, 3)]
    ids = [engine.admit([5, EOS], options) for options in long]
    engine.advance(4)
    lane = engine.runner.static[2]
    replays = dict(lane.replays)
    lane.replays = dict.fromkeys(replays, lambda: 1 / 0)
    (event,) = engine.advance(4)
    assert (event.sentence, event.error) == (ids[1], "decoding failed: ZeroDivisionError")
    lane.replays = replays
    again = engine.admit([5, EOS], long[1])
    events = drained(engine)
    assert set(events) == {ids[0], ids[2], again}
    (expected,) = decode(Engine(model, 2), [[5, EOS]], long[1])
    assert_same(events[again], expected, 1e-4)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize(("rows", "width", "sentences"), [
    (1, 1, [1]), (64, 1, [1, 16, 64]), (100, 1, [1, 16, 64, 100]), (64, 5, [1, 4, 12]),
    (1024, 1, [1, 16, 64, 128, 256, 512, 1024]),
])  # fmt: skip
def test_few_sizes_are_recorded(rows, width, sentences):
    grid = Grid.of(Sizes(rows // width, 256, 256), width)
    assert grid.sentences == sentences
    assert grid.sources == [32, 128, 256]
    assert Grid.of(Sizes(1, 20, 20), 1).sources == [20]


@given(size=st.integers(1, 30), sizes=st.lists(st.integers(1, 30), min_size=1, unique=True))
def test_a_bucket_is_the_least_that_is_enough(size, sizes):
    sizes.sort()
    found = bucket(size, sizes)
    assert found in sizes
    assert found >= size or found == sizes[-1]
    assert not any(size <= other < found for other in sizes)


def test_memory_of_the_longest_source_leaves_nothing_behind():
    """A place that held a long source is zero behind a shorter one."""
    model = build("attention")
    lane: StaticLane = static(model, 2).runner.static[1]
    with torch.inference_mode():
        for table in lane.attended:
            table.fill_(1)
    state = [t[:1].clone() for t in lane.state]
    attended = [t[:1, :3].clone() for t in lane.attended]
    sentence = Engine(model, 1)
    one = sentence.admit([5, 6, EOS], DecodingOptions())
    with torch.inference_mode():
        lane.add([sentence.scheduler.tickets[one].sentence], state, attended)
    place = lane.place[one]
    for table in lane.attended:
        assert not table[place, 3:].any()
        assert bool(table[place, :3].all())
