"""The engine, by hand-computed cases with table models: who begins when, what it becomes, and
when it ends. Its laws are in test_laws.py."""

import math

import pytest
from table_model import EOS, A, B, C, D, TableModel, decode, drained

from handler.decoding import DecodingOptions, Engine, SourceLengthError, decode_in_order
from handler.decoding.lane import Lane
from handler.decoding.offline import in_order
from handler.decoding.scheduler import ENCODED_AHEAD

PLAIN = DecodingOptions()
ENDLESS = {2: {A: 1.0}, A: {A: 1.0}}


def test_greedy_follows_the_table():
    model = TableModel({2: {A: 0.6, B: 0.4}, A: {C: 0.9, EOS: 0.1}, C: {EOS: 0.8, A: 0.2}})
    (event,) = decode(Engine(model, rows=4), [[9, EOS]])
    assert (event.results[0].tokens, event.results[0].finish_reason) == ([A, C], "eos")
    assert model.rows_computed == 3  # A, C, EOS


def test_padding_beginning_and_unknown_are_never_chosen():
    model = TableModel({2: {0: 0.5, 1: 0.3, 2: 0.15, A: 0.05}, A: {EOS: 1.0}})
    (event,) = decode(Engine(model, rows=1), [[9, EOS]])
    assert event.results[0].tokens == [A]


@pytest.mark.parametrize(
    ("asked", "source", "tokens"),
    [(1, 2, 1), (7, 2, 7), (None, 2, 16), (None, 6, 20), (99, 2, 20)],
)
def test_max_length_ends_a_model_that_never_stops(asked, source, tokens):
    """Default 3 * source + 10; the model's own limit is 20."""
    model = TableModel(ENDLESS)
    (event,) = decode(Engine(model, rows=1), [[9] * source], DecodingOptions(max_length=asked))
    assert (len(event.results[0].tokens), event.results[0].finish_reason) == (tokens, "length")
    assert model.rows_computed == tokens


def test_no_row_is_computed_after_its_sentence_ended():
    """Sources 1..3 end after as many tokens; the rows computed are exactly the tokens."""
    model = TableModel(ENDLESS)
    engine = Engine(model, rows=3)
    for length in (1, 2, 3):
        engine.admit([9], DecodingOptions(max_length=length))
    for _ in range(5):
        engine.advance()
    assert model.rows_computed == 1 + 2 + 3
    assert engine.idle


def test_sentences_wait_in_order_for_free_rows():
    model = TableModel(ENDLESS)
    engine = Engine(model, rows=2)
    ids = [engine.admit([9], DecodingOptions(max_length=length)) for length in (3, 1, 1, 1)]
    ended = []
    while not engine.idle:
        assert engine.rows_in_use <= 2
        ended += [event.sentence for event in engine.advance()]
    assert ended == [ids[1], ids[2], ids[0], ids[3]]


def test_a_sentence_with_numeric_trouble_fails_alone():
    model = TableModel({2: {A: 1.0}, A: {EOS: 1.0}}, poison=8)
    good, bad, also_good = decode(Engine(model, rows=3), [[9, EOS], [8, EOS], [7, EOS]])
    assert good.results[0].tokens == also_good.results[0].tokens == [A]
    assert not bad.results
    assert "finite" in bad.error


def test_a_failing_model_ends_its_sentences_and_leaves_the_engine_usable(monkeypatch):
    model = TableModel({2: {A: 1.0}, A: {EOS: 1.0}})
    engine = Engine(model, rows=2)
    for method in ("step", "encode"):
        with monkeypatch.context() as patch:

            def broken(*_):
                raise RuntimeError("out of memory")

            patch.setattr(model, method, broken)
            ids = [engine.admit([9], PLAIN) for _ in range(2)]
            events = engine.advance()
            assert [e.sentence for e in events] == ids
            assert all("RuntimeError" in e.error for e in events)
            assert engine.idle
    assert decode(engine, [[9, EOS]])[0].results[0].tokens == [A]


def test_a_beam_that_finds_no_room_loses_nobody_elses_answer(monkeypatch):
    model = TableModel({2: {A: 0.6, B: 0.4}, A: {A: 1.0}, B: {A: 1.0}})
    engine = Engine(model, rows=4)
    add = Lane.add

    def full(lane, *arguments):
        if lane.kind.width == 3:
            raise RuntimeError("out of memory")
        add(lane, *arguments)

    monkeypatch.setattr(Lane, "add", full)
    wide = engine.admit([9, EOS], DecodingOptions(beam_size=3, max_length=5))
    short = engine.admit([9, EOS], DecodingOptions(max_length=1))
    events = {event.sentence: event for event in engine.advance()}
    assert events[short].results[0].tokens == [A]
    assert "RuntimeError" in events[wide].error
    assert engine.idle
    assert engine.rows_in_use == 0


@pytest.mark.parametrize("source", [[], [9] * 9])
def test_sources_out_of_the_limit_are_refused(source):
    with pytest.raises(SourceLengthError, match="from 1 to 8"):
        Engine(TableModel({}), rows=1).admit(source, PLAIN)


def test_cancelled_sentences_free_their_rows_wherever_they_are():
    model = TableModel(ENDLESS)
    engine = Engine(model, rows=2)
    four = DecodingOptions(max_length=4)
    live, other, waiting, last = (engine.admit([9], four) for _ in range(4))
    engine.advance()
    engine.cancel(live)
    engine.cancel(waiting)
    engine.cancel(live)
    engine.cancel(12345)
    assert engine.rows_in_use == 1
    ended = []
    while not engine.idle:
        ended += [e.sentence for e in engine.advance()]
    assert ended == [other, last]


def test_a_beam_wider_than_the_table_is_refused():
    with pytest.raises(ValueError, match="at most 3"):
        Engine(TableModel({}), rows=3).admit([9], DecodingOptions(beam_size=4))


def test_decoding_in_order_reads_ahead_a_bounded_way():
    model = TableModel(ENDLESS)
    read = []

    def feed():
        for i in range(100):
            read.append(i)
            yield [9, EOS]

    out = decode_in_order(Engine(model, rows=2), feed(), DecodingOptions(max_length=2), ahead=3)
    for done, _ in enumerate(out, 1):
        assert len(read) <= done + 2 * 3 * 2
    assert done == 100


def test_items_of_several_sentences_come_with_all_their_events_in_order():
    """Though the longest go in first."""
    engine = Engine(TableModel(ENDLESS), rows=2)
    admitted = []

    def admit(lengths):
        admitted.append(sum(lengths))
        return [engine.admit([9], DecodingOptions(max_length=n)) for n in lengths]

    items = [(3, 1), (), (2,), (1, 1, 1, 2)]
    out = list(in_order(engine, items, admit, length=sum))
    assert admitted == [5, 4, 2, 0]
    assert [item for item, _ in out] == items
    assert [
        tuple(len(event.results[0].tokens) for event in events) for _, events in out
    ] == items


def made(engine, sentence):
    """Tokens that a live sentence has."""
    lane = engine.runner.lane_of[sentence]
    return lane.clock - lane.began[sentence]


def test_a_beam_that_narrows_goes_one_token_a_step():
    """After C ends and A and B have one continuation each, two of three hypotheses are left,
    beside another beam."""
    model = TableModel({})
    model.logits[:] = float("-inf")
    for last, token in ((2, A), (2, B), (2, C), (A, D), (B, D), (C, EOS), (D, D)):
        model.logits[last, token] = -1.0 if token == C else 0.0
    narrowing = DecodingOptions(beam_size=3, max_length=9)
    engine = Engine(model, rows=5)
    engine.admit([8], DecodingOptions(beam_size=2, max_length=9))
    watched = engine.admit([9], narrowing)
    for steps in range(1, 5):
        engine.advance()
        assert made(engine, watched) == steps


def test_what_all_hypotheses_share_is_committed():
    """A C and A D share A."""
    model = TableModel({2: {A: 1.0}, A: {C: 0.5, D: 0.5}, C: {A: 1.0}, D: {A: 1.0}})
    engine = Engine(model, rows=2)
    one = engine.admit([9], DecodingOptions(beam_size=2, max_length=4))
    waiting = engine.admit([9], DecodingOptions(beam_size=2))
    assert (engine.begun(one), engine.committed(one)) == (False, [])
    engine.advance(2)
    assert (engine.begun(one), engine.committed(one)) == (True, [A])
    assert (engine.begun(waiting), engine.committed(waiting)) == (False, [])


def test_a_finished_hypothesis_that_is_best_holds_back_what_the_live_ones_share():
    model = TableModel({2: {EOS: 0.4, A: 0.6}, A: {A: 1.0}})
    model.logits[2, EOS + 2 :] = float("-inf")
    engine = Engine(model, rows=3)
    greedy = engine.admit([9], DecodingOptions(max_length=4))
    beam = engine.admit([9], DecodingOptions(beam_size=2, max_length=4))
    engine.advance(2)
    assert engine.committed(greedy) == [A, A]
    assert engine.committed(beam) == []


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def timed(model, rows):
    clock = Clock()
    return Engine(model, rows, clock=clock), clock


def told(event):
    return [(one.tokens, one.finish_reason) for one in event.results]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"return_scores": True}, {"length_penalty": 1.0}, {"beam_size": 2, "n_best": 2},
        {"beam_size": 2, "length_penalty": 0.6}, {"sampling": True},
        {"length_penalty": 1.0, "length_penalty_form": "gnmt"},
        {"coverage_penalty": 0.5, "return_alignments": True},
    ],
)
def test_who_waits_until_the_deadline_is_answered_with_nothing(options):
    model = TableModel(ENDLESS, attention={})
    engine, clock = timed(model, rows=2)
    live = engine.admit([9], DecodingOptions(beam_size=2, max_length=3))
    waiting = engine.admit([8, EOS], DecodingOptions(**options), deadline=1.0)
    engine.advance()
    clock.now = 1.5
    ended = drained(engine)
    (nothing,) = ended[waiting].results
    assert (nothing.tokens, nothing.finish_reason) == ([], "time")
    if options in ({}, {"sampling": True}):
        assert (nothing.log_probability, nothing.score) == (None, None)  # nobody asked
    assert ended[live].results[0].finish_reason == "length"
    assert model.rows_of[8] == 0


@pytest.mark.parametrize(("now", "ended"), [(2.999, False), (3.0, True), (3.001, True)])
def test_a_deadline_has_come_when_the_clock_shows_it(now, ended):
    engine, clock = timed(TableModel(ENDLESS), rows=1)
    sentence = engine.admit([9], PLAIN, deadline=3.0)
    engine.advance(2)
    clock.now = now
    events = engine.advance()
    assert [event.sentence for event in events] == [sentence] * ended
    assert [told(event) for event in events] == [[([A, A], "time")]] * ended


def test_a_deadline_is_looked_at_before_every_step_not_every_call():
    engine, clock = timed(TableModel(ENDLESS), rows=2)
    step = engine.model.step

    def slow(*arguments):
        clock.now += 1.0
        return step(*arguments)

    engine.model.step = slow
    hasty = engine.admit([9], PLAIN, deadline=3.0)
    patient = engine.admit([9], DecodingOptions(max_length=7))
    events = {event.sentence: told(event) for event in engine.advance(10)}
    assert events == {hasty: [([A] * 3, "time")], patient: [([A] * 7, "length")]}


HASTY = {2: {A: 0.5, B: 0.4, EOS: 0.1}, A: {A: 1.0}, B: {B: 1.0}}


@pytest.mark.parametrize(
    ("n_best", "results"),
    [
        (1, [([], "eos")]),
        (2, [([], "eos"), ([A, A], "time")]),
        (3, [([], "eos"), ([A, A], "time"), ([B, B], "time")]),
    ],
)
def test_when_time_is_over_whole_hypotheses_rank_before_unfinished_ones(n_best, results):
    """Though 0.1 is less than 0.5 and 0.4; among the unfinished, the likelier is first."""
    engine, clock = timed(TableModel(HASTY), rows=4)
    options = DecodingOptions(beam_size=3, n_best=n_best, max_length=9)
    hasty = engine.admit([9], options, deadline=1.0)
    engine.advance(2)
    clock.now = 1.0
    (event,) = engine.advance()
    assert (event.sentence, told(event)) == (hasty, results)
    for result, probability in zip(event.results, (0.1, 0.5, 0.4)):
        assert result.score == pytest.approx(math.log(probability), abs=1e-4)
    assert engine.idle


def test_whose_time_is_over_makes_room_and_disturbs_nobody():
    model = TableModel(ENDLESS)
    engine, clock = timed(model, rows=3)
    hasty = engine.admit([8], DecodingOptions(beam_size=2), deadline=1.0)
    other = engine.admit([9], DecodingOptions(max_length=5))
    late = engine.admit([10], DecodingOptions(beam_size=2, max_length=2))
    past = engine.admit([11], PLAIN, deadline=-1.0)
    engine.advance(2)
    clock.now = 5.0
    rows = model.rows_of[8]
    (event,) = engine.advance()
    assert event.sentence == hasty
    assert engine.begun(late)
    ended = drained(engine)
    assert told(ended[other]) == [([A] * 5, "length")]
    assert model.rows_of[8] == rows
    assert past not in ended


def order_of_beginning(engine):
    """Ids in the order in which they get their first token."""
    seen = []
    while not engine.idle:
        engine.advance()
        begun = [i for i in engine.scheduler.tickets if engine.begun(i) and i not in seen]
        seen += begun
    return seen


TWO = DecodingOptions(max_length=2)  # long enough to be seen


def test_one_sentence_is_not_held_up_by_a_hundred_of_another_client():
    """Only by those that are in service or encoded already."""
    engine = Engine(TableModel(ENDLESS), rows=2)
    many = [engine.admit([9], TWO, behind=k) for k in range(100)]
    engine.advance(6)
    one = engine.admit([9], TWO)
    order = order_of_beginning(engine)
    assert order.index(one) <= 2 + ENCODED_AHEAD
    assert [i for i in order if i != one] == many[len(many) - len(order) + 1 :]


def test_equal_turns_are_served_as_they_came():
    engine = Engine(TableModel(ENDLESS), rows=1)
    first, second = ([engine.admit([9], TWO, behind=k) for k in range(3)] for _ in range(2))
    turns = [one for pair in zip(first, second) for one in pair]
    assert order_of_beginning(engine) == turns


@pytest.mark.parametrize("backlog", [1, 40])
def test_a_client_is_not_held_up_for_ever_by_others_that_come(backlog):
    """As many others wait all the time; each row could serve them all in their turn."""
    engine = Engine(TableModel(ENDLESS), rows=1)
    once = DecodingOptions(max_length=1)
    mine = [engine.admit([9], once, behind=k) for k in range(2)]
    for _ in range(backlog):
        engine.admit([9], once)
    ended = []
    for _ in range(5 * (backlog + ENCODED_AHEAD)):
        engine.admit([9], once)
        ended += [event.sentence for event in engine.advance()]
    assert set(mine) <= set(ended)


@pytest.mark.parametrize("behind", [0, 3])
def test_a_wide_beam_at_the_head_is_not_starved_by_narrow_ones(behind):
    """First come, first served: what came after it waits, though it would fit."""
    engine = Engine(TableModel({2: {A: 1.0}, A: {A: 0.9, B: 0.1}, B: {A: 1.0}}), rows=4)
    narrow = engine.admit([9], DecodingOptions(max_length=3))
    wide = engine.admit([9], DecodingOptions(beam_size=4, max_length=3), behind=behind)
    later = engine.admit([9], DecodingOptions(max_length=1), behind=behind)
    ended = []
    while not engine.idle:
        assert engine.rows_in_use <= 4
        ended += [event.sentence for event in engine.advance()]
    assert ended == [narrow, wide, later]


def test_who_is_cancelled_at_the_head_holds_nobody_up():
    engine = Engine(TableModel(ENDLESS), rows=2)
    engine.admit([9], TWO)
    wide = engine.admit([9], DecodingOptions(beam_size=2))
    mine = [engine.admit([9], TWO, behind=k) for k in range(5)]
    engine.advance()
    assert not engine.begun(mine[0])
    for gone in (wide, *mine[:4]):
        engine.cancel(gone)
    assert engine.waiting_count == 1
    engine.advance()
    assert engine.begun(mine[4])
    other = engine.admit([9], TWO)
    assert other in drained(engine)
