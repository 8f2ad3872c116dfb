"""A lane's steps: several in one call are what one by one gives, to the last bit; and what a lane
does with sentences that come, go and end."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import EOS, A, B, TableModel, decode, drained
from test_laws import assert_same
from test_model import VOCABULARY, build

from handler.decoding import DecodingOptions, Engine
from model.quantized import quantized


class Counted:
    """A model that counts the rows of its steps."""

    def __init__(self, model):
        self.model, self.rows = model, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def step(self, previous, *others):
        self.rows += previous.numel()
        return self.model.step(previous, *others)

    def best(self, previous, *others):
        self.rows += previous.numel()
        return self.model.best(previous, *others)


@pytest.fixture(scope="module", params=["sutskever", "attention", "int8", "mixed ensemble"])
def model(request, native_library):
    if request.param != "int8":
        return build(request.param)
    made = quantized(build("attention").float())
    made.pack(bool(native_library), False)
    assert made.fused == bool(native_library)
    return made


@st.composite
def tasks(draw):
    """Sentences of one lane, which differ in all else that several steps allow."""
    beam = draw(st.integers(1, 4))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shortest = draw(st.sampled_from([0, 0, 3, 6]))
        found.append((
            draw(st.lists(st.integers(4, VOCABULARY - 1), max_size=9)),
            DecodingOptions(
                beam_size=beam, n_best=draw(st.integers(1, beam)), min_length=shortest,
                max_length=shortest + draw(st.integers(1, 12)),
                length_penalty=draw(st.sampled_from([0.0, 0.6, 1.0])),
                return_scores=draw(st.booleans()),
            ),
            draw(st.booleans()),
        ))  # fmt: skip
    return found


def engine_of(model, given):
    engine = Engine(model, 16)
    for source, options, attends in given:
        if attends and model.has_attention:
            options = DecodingOptions(
                **{**vars(options), "return_alignments": True, "coverage_penalty": 0.3}
            )
        engine.admit([*source, EOS], options)
    return engine


def hurried(engine, seed):
    """What ends, with a number of steps in each call that is drawn."""
    draw, ended = random.Random(seed), {}
    while not engine.idle:
        ended |= {event.sentence: event for event in engine.advance(draw.choice([2, 5, 40]))}
    return ended


@settings(max_examples=40)
@given(given=tasks(), seed=st.integers(0, 999))
def test_many_steps_in_a_call_are_those_one_by_one(model, given, seed):
    """And no row is computed behind the end of a sentence."""
    one, many = Counted(model), Counted(model)
    expected = drained(engine_of(one, given))
    assert hurried(engine_of(many, given), seed) == expected
    assert many.rows == one.rows


def test_an_end_that_does_not_count_stops_nothing():
    """EOS is the third of the candidates of a beam of 2, so it ends nothing, and none goes on from
    it: the beam is A A A, A A B all the way."""
    table = {t: {A: 0.5, B: 0.3, EOS: 0.2} for t in (2, A, B)}
    calls = []

    class Looked(TableModel):
        def step(self, previous, *others):
            calls.append(previous.tolist())
            return super().step(previous, *others)

    engine = Engine(Looked(table), 2)
    engine.admit([9], DecodingOptions(beam_size=2, n_best=2, max_length=4))
    engine.advance()
    [event] = engine.advance(50)
    assert calls == [[[2, 2]], [[A, B]], [[A, B]], [[A, B]]]
    assert [r.tokens for r in event.results] == [[A, A, A, A], [A, A, A, B]]
    assert [r.log_probability for r in event.results] == pytest.approx(
        [4 * math.log(0.5), 3 * math.log(0.5) + math.log(0.3)], abs=1e-4
    )


@pytest.mark.parametrize(("until", "steps"), [(0.0, 1), (2.5, 3), (math.inf, 7)])
def test_steps_end_with_the_time(until, steps):
    model = TableModel({t: {A: 1.0} for t in (2, A)})
    engine = Engine(model, 1, clock=lambda: float(model.rows_computed))
    engine.admit([9], DecodingOptions(max_length=20))
    engine.advance(7, until)
    assert engine.steps == model.rows_computed == steps


def test_a_deadline_ends_them_too():
    model = TableModel({t: {A: 1.0} for t in (2, A)})
    engine = Engine(model, 1, clock=lambda: float(model.rows_computed))
    engine.admit([9], DecodingOptions(max_length=20), deadline=5.0)
    [event] = engine.advance(100)
    assert (event.results[0].tokens, event.results[0].finish_reason) == ([A] * 5, "time")


def test_lanes_go_equally_far():
    table = {t: {A: 0.6, B: 0.4} for t in (2, A, B)}
    engine = Engine(TableModel(table), 3)
    engine.admit([9], DecodingOptions(max_length=20))
    engine.admit([9], DecodingOptions(beam_size=2, max_length=20))
    for done in itertools.accumulate((1, 4, 2)):
        engine.advance({1: 1, 5: 4, 7: 2}[done])
        assert {lane.clock for lane in engine.runner.lanes.values()} == {done}


def test_scores_are_summed_in_the_models_own_precision():
    """In double, where the model is; a sum in single would differ in the eighth digit."""
    model = build("attention")
    for many in (1, 50):
        engine = Engine(model, 3)
        engine.admit([5, 6, EOS], DecodingOptions(beam_size=3, max_length=15, min_length=15))
        while not (events := engine.advance(many)):
            pass
        total = events[0].results[0].log_probability
        assert total != float(torch.tensor(total, dtype=torch.float32))


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_in_a_long_queue_each_gets_its_own_translation(model, beam_size):
    """Sentences of three kinds come and go in crowds, into places that others have left."""
    draw = random.Random(beam_size)
    sources = [[5, 6, EOS], [9] * 7 + [EOS], [4, 11, 8, 7, EOS]]
    options = [
        DecodingOptions(beam_size=beam_size, max_length=most, return_scores=True)
        for most in (3, 8, 12)
    ]
    engine, asked, expected = Engine(model, 8 * beam_size), {}, {}
    for i, j in itertools.product(range(3), range(3)):
        (expected[i, j],) = decode(Engine(model, beam_size), [sources[i]], options[j])
    for _ in range(150):
        i, j = draw.randrange(3), draw.randrange(3)
        asked[engine.admit(sources[i], options[j])] = (i, j)
    ended = {}
    while not engine.idle:
        ended |= {event.sentence: event for event in engine.advance(16)}
    for one, kind in asked.items():
        assert_same(ended[one], expected[kind], 1e-4)


def test_who_reads_attention_may_sit_beside_longer_sources_that_do_not():
    model = build("attention")
    reading = DecodingOptions(return_alignments=True, max_length=6, min_length=6)
    beside = DecodingOptions(max_length=9, min_length=9)
    (expected,) = decode(Engine(model, 1), [[5, 6, EOS]], reading)
    engine = Engine(model, 4)
    engine.admit([7] * 9 + [EOS], beside)
    engine.advance(2)
    first = engine.admit([5, 6, EOS], reading)
    engine.advance(1)
    engine.admit([8] * 12 + [EOS], beside)
    second = engine.admit([5, 6, EOS], reading)
    events = drained(engine)
    for one in (first, second):
        assert_same(events[one], expected, 1e-8)
