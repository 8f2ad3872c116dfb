"""The engine: hand-computed cases with table models, and its laws on real ones."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import A, B, C, TableModel
from test_model import KINDS, VOCABULARY, serving

from handler.decoding import DecodingOptions, Engine, SourceLengthError, decode_in_order
from handler.decoding.lane import Lane
from handler.decoding.model import load
from handler.decoding.rows import Rows
from model import Ensemble
from model.serving import scripted

EOS = 3
PLAIN = DecodingOptions()


def decode(engine, sources, options=PLAIN):
    return list(decode_in_order(engine, sources, options))


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
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
    (event,) = decode(Engine(model, rows=1), [[9] * source], DecodingOptions(max_length=asked))
    assert (len(event.results[0].tokens), event.results[0].finish_reason) == (tokens, "length")
    assert model.rows_computed == tokens


def test_no_row_is_computed_after_its_sentence_ended():
    """Sources 1..3 end after as many tokens; the rows computed are exactly the tokens."""
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
    engine = Engine(model, rows=3)
    for length in (1, 2, 3):
        engine.admit([9], DecodingOptions(max_length=length))
    for _ in range(5):
        engine.advance()
    assert model.rows_computed == 1 + 2 + 3
    assert engine.idle


def test_sentences_wait_in_order_for_free_rows():
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
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
    """The last sentence ends in the very step in which the first one cannot be widened."""
    model = TableModel({2: {A: 0.6, B: 0.4}, A: {A: 1.0}, B: {A: 1.0}})
    engine = Engine(model, rows=4)
    add = Lane.add

    def full(lane, *arguments):
        if lane.width == 3:
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
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
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


@pytest.fixture(scope="module", params=[*KINDS, "ensemble"])
def forms(request, tmp_path_factory):
    """One model as eager, scripted and loaded from model.pt."""
    if request.param == "ensemble":
        eager = Ensemble([serving("attention", 1)[1], serving("sutskever", 2)[1]])
    else:
        eager = serving(request.param, 1)[1]
    path = tmp_path_factory.mktemp("model") / "model.pt"
    scripted(eager).save(str(path))
    return eager, scripted(eager), load(str(path), torch.device("cpu"))


def sources_of(seed: int, n: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, 11))] + [EOS]
        for _ in range(n)
    ]


def one_at_a_time(model, sources, options):
    """The reference: each sentence alone in a fresh engine."""
    return [
        told(decode(Engine(model, rows=o.beam_size), [s], o)[0]) for s, o in zip(sources, options)
    ]


def told(event):
    """What a client sees; sums of floats differ in their last digits between batch sizes."""
    return [
        (r.tokens, r.finish_reason, pytest.approx(r.score, abs=1e-3)) for r in event.results
    ]


MIXED = [
    DecodingOptions(max_length=9),
    DecodingOptions(beam_size=3, n_best=2, max_length=12, length_penalty=1.0),
    DecodingOptions(beam_size=5, max_length=7, length_penalty=0.6, length_penalty_form="gnmt"),
    DecodingOptions(sampling=True, seed=7, temperature=0.7, top_k=5, max_length=11),
    DecodingOptions(beam_size=2, n_best=2, no_repeat_ngram_size=2, max_length=14),
    DecodingOptions(sampling=True, seed=8, top_p=0.8, min_length=3, max_length=9),
    DecodingOptions(beam_size=4, repetition_penalty=1.5, min_length=2, max_length=8),
    DecodingOptions(max_length=17, no_repeat_ngram_size=1),
]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 9999), rows=st.integers(5, 12))
def test_output_depends_on_nothing_but_the_sentence(forms, seed, rows):
    """Law 1 and 2: whatever arrives or is cancelled when, in whatever form of the model."""
    sources = sources_of(seed, 8)
    options = [MIXED[(seed + i) % 8] for i in range(8)]
    expected = one_at_a_time(forms[0], sources, options)
    draw = random.Random(seed)
    for model in forms:
        engine = Engine(model, rows)
        numbers, got, cancelled = {}, {}, set()
        todo = list(range(8))
        while todo or not engine.idle:
            for _ in range(draw.randint(0, 3)):
                if todo:
                    i = todo.pop(0)
                    numbers[engine.admit(sources[i], options[i])] = i
            if numbers and draw.random() < 0.2:
                victim = draw.choice(sorted(numbers))
                if numbers[victim] not in got:
                    engine.cancel(victim)
                    cancelled.add(numbers[victim])
            for event in engine.advance(draw.randint(1, 4)):
                assert numbers[event.sentence] not in cancelled
                got[numbers[event.sentence]] = [
                    (r.tokens, r.finish_reason, r.score) for r in event.results
                ]
            assert engine.rows_in_use <= rows
        assert got == {i: expected[i] for i in range(8) if i not in cancelled}


def every_sequence(model, longest):
    """All target sequences of up to `longest` tokens with their log probabilities, by brute
    force: (tokens, reason, log probability)."""
    probabilities = model.logits.double().log_softmax(1)
    usable = [t for t in range(4, 12) if probabilities[:, t].max() > -20]
    found = []

    def grow(tokens, so_far):
        last = tokens[-1] if tokens else 2
        if len(tokens) == longest:
            found.append((tokens, "length", so_far))
            return
        found.append((tokens, "eos", so_far + float(probabilities[last, EOS])))
        for token in usable:
            grow([*tokens, token], so_far + float(probabilities[last, token]))

    grow([], 0.0)
    return found


def random_table(seed):
    draw = random.Random(seed)
    return TableModel(
        {
            last: {t: draw.random() ** 3 + 1e-3 for t in (A, B, C, EOS)}
            for last in (2, A, B, C)
        }
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), power=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
       form=st.sampled_from(["power", "gnmt"]), n_best=st.integers(1, 4))
def test_a_beam_as_wide_as_the_space_finds_what_brute_force_finds(seed, power, form, n_best):
    model = random_table(seed)
    options = DecodingOptions(
        beam_size=27, n_best=n_best, max_length=3, length_penalty=power, length_penalty_form=form
    )
    ranked = sorted(
        every_sequence(model, 3),
        key=lambda s: -s[2] / options.length_normaliser(len(s[0]) + (s[1] == "eos")),
    )
    (event,) = decode(Engine(model, rows=27), [[9, EOS]], options)
    assert [(r.tokens, r.finish_reason) for r in event.results] == [s[:2] for s in ranked[:n_best]]
    for result, (_, _, log_probability) in zip(event.results, ranked):
        assert result.log_probability == pytest.approx(log_probability, abs=1e-4)


GARDEN_PATH = {  # greedy takes A, after which nothing is likely; B is better on the whole
    2: {A: 0.6, B: 0.4},
    A: {A: 0.4, B: 0.3, EOS: 0.3},
    B: {EOS: 1.0},
}


def test_a_beam_escapes_the_garden_path():
    """p(B EOS) = 0.4; then A B EOS, 0.6 * 0.3 = 0.18; A EOS has as much, outside the beam."""
    engine = Engine(TableModel(GARDEN_PATH), rows=4)
    ((greedy,),) = (e.results for e in decode(engine, [[9, EOS]], DecodingOptions(max_length=6)))
    assert greedy.tokens[0] == A
    options = DecodingOptions(beam_size=2, n_best=2, max_length=6)
    (event,) = decode(engine, [[9, EOS]], options)
    assert [r.tokens for r in event.results] == [[B], [A, B]]
    assert event.results[0].score == pytest.approx(math.log(0.4), abs=1e-4)


def test_greedy_search_ends_where_the_end_is_likeliest():
    """Whatever a length penalty would make of going on."""
    model = TableModel({2: {A: 1.0}, A: {EOS: 0.6, B: 0.4}, B: {B: 1.0}})
    one = DecodingOptions(length_penalty=2.0, max_length=9)
    (event,) = decode(Engine(model, rows=1), [[9, EOS]], one)
    assert event.results[0].tokens == [A]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options",
    [DecodingOptions(), DecodingOptions(beam_size=3), DecodingOptions(sampling=True, seed=1)],
)
def test_any_search_reports_what_is_not_finite(value, options):
    model = TableModel({2: {A: 0.6, B: 0.4}, A: {A: 1.0}, B: {B: 1.0}})
    model.logits[B, 9] = model.logits[A, 9] = value
    (event,) = decode(Engine(model, rows=3), [[9, EOS]], options)
    assert not event.results
    assert "finite" in event.error


def test_a_beam_stops_as_soon_as_nothing_can_win():
    """After two steps B EOS has 0.4 and the live A ... at most 0.6 * 0.4: it stops there."""
    model = TableModel(GARDEN_PATH)
    decode(Engine(model, rows=2), [[9, EOS]], DecodingOptions(beam_size=2, max_length=20))
    assert model.rows_computed == 1 + 2  # the first step once, not once a hypothesis


def test_length_penalty_prefers_the_longer():
    """A EOS: 0.5 * 0.4 = 0.2; B C EOS: 0.5 * 0.36. Sums prefer the first, means the second."""
    others = range(7, 12)
    table = {
        2: {A: 0.5, B: 0.5},
        A: {EOS: 0.4, **dict.fromkeys(others, 0.12)},
        B: {C: 0.36, **dict.fromkeys(others, 0.128)},
        C: {EOS: 1.0},
        **{other: dict.fromkeys(others, 0.2) for other in others},
    }
    model = TableModel(table)

    def best(**options):
        one = DecodingOptions(beam_size=4, max_length=5, **options)
        return decode(Engine(model, rows=4), [[9, EOS]], one)[0].results[0]

    assert best().tokens == [A]
    assert best(length_penalty=1.0).tokens == [B, C]
    assert best(length_penalty=1.0).score == pytest.approx(math.log(0.5 * 0.36) / 3, abs=1e-3)


def test_minimum_length_holds_back_the_end():
    model = TableModel({2: {EOS: 0.9, A: 0.1}, A: {EOS: 0.9, A: 0.1}})
    for width in (1, 3):
        one = DecodingOptions(beam_size=width, min_length=2, max_length=4)
        (event,) = decode(Engine(model, rows=3), [[9, EOS]], one)
        assert event.results[0].tokens == [A, A]


def test_no_ngram_is_repeated():
    model = TableModel({2: {A: 1.0}, A: {B: 0.7, A: 0.2, C: 0.1}, B: {A: 0.9, C: 0.1},
                        C: {EOS: 1.0}})
    one = DecodingOptions(no_repeat_ngram_size=2, max_length=10)
    (event,) = decode(Engine(model, rows=1), [[9, EOS]], one)
    assert event.results[0].tokens == [A, B, A, A, C]  # not A B a second time, nor A A


def test_repetition_penalty_turns_away_from_what_was_said():
    """Logits log 0.6 and log 0.4: twice log 0.6 is below log 0.4."""
    model = TableModel({2: {A: 1.0}, A: {A: 0.6, B: 0.4}, B: {EOS: 1.0}})
    plain, penalised = (
        decode(Engine(model, rows=1), [[9, EOS]], DecodingOptions(repetition_penalty=p,
                                                                  max_length=3))[0].results[0]
        for p in (1.0, 2.0)
    )
    assert plain.tokens == [A, A, A]
    assert penalised.tokens == [A, B]


def test_options_that_leave_no_token_are_an_error_of_that_sentence():
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
    model.logits[:] = float("-inf")
    model.logits[2, A] = model.logits[A, A] = 0.0
    engine = Engine(model, rows=2)
    bad = engine.admit([9, EOS], DecodingOptions(no_repeat_ngram_size=1, max_length=9))
    good = engine.admit([9, EOS], DecodingOptions(max_length=2))
    events = {}
    while not engine.idle:
        events |= {event.sentence: event for event in engine.advance()}
    assert "options allow" in events[bad].error
    assert events[good].results[0].tokens == [A, A]


def test_drawing_follows_the_probabilities_and_their_limits():
    model = TableModel({2: {A: 0.5, B: 0.3, C: 0.2}, A: {EOS: 1.0}, B: {EOS: 1.0}, C: {EOS: 1.0}})

    def drawn(count=400, **options):
        engine = Engine(model, rows=50)
        ids = [
            engine.admit([9, EOS], DecodingOptions(sampling=True, seed=seed, **options))
            for seed in range(count)
        ]
        events = {}
        while not engine.idle:
            events |= {event.sentence: event for event in engine.advance()}
        tokens = [events[i].results[0].tokens[0] for i in ids]
        return {t: tokens.count(t) / count for t in sorted(set(tokens))}

    shares = drawn()
    assert shares[A] == pytest.approx(0.5, abs=0.1)
    assert shares[C] == pytest.approx(0.2, abs=0.08)
    assert set(drawn(top_k=2)) == {A, B}
    assert set(drawn(top_p=0.45)) == {A}
    assert set(drawn(top_p=0.6)) == {A, B}
    assert drawn(temperature=0.05)[A] > 0.99
    assert drawn() == shares


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_best": 2}, "n_best"),
        ({"min_length": 3, "max_length": 2}, "min_length"),
        ({"sampling": True, "beam_size": 2}, "sampling"),
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 1}, "seed"),
    ],
)
def test_contradictory_options_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        DecodingOptions(**options)


def test_a_beam_wider_than_the_table_is_refused():
    with pytest.raises(ValueError, match="at most 3"):
        Engine(TableModel({}), rows=3).admit([9], DecodingOptions(beam_size=4))


def test_a_wide_beam_is_not_starved_by_narrow_ones():
    """First come, first served: what came after it waits, though it would fit."""
    model = TableModel({2: {A: 1.0}, A: {A: 0.9, B: 0.1}, B: {A: 1.0}})
    engine = Engine(model, rows=4)
    narrow = engine.admit([9], DecodingOptions(max_length=3))
    wide = engine.admit([9], DecodingOptions(beam_size=4, max_length=3))
    later = engine.admit([9], DecodingOptions(max_length=1))
    ended = []
    while not engine.idle:
        assert engine.rows_in_use <= 4
        ended += [event.sentence for event in engine.advance()]
    assert ended == [narrow, wide, later]


def test_decoding_in_order_reads_ahead_a_bounded_way():
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
    read = []

    def feed():
        for i in range(100):
            read.append(i)
            yield [9, EOS]

    out = decode_in_order(Engine(model, rows=2), feed(), DecodingOptions(max_length=2), ahead=3)
    for done, _ in enumerate(out, 1):
        assert len(read) <= done + 3 * 2
    assert done == 100


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), max_size=6), st.randoms())
def test_rows_behave_like_a_list(appends, draw):
    """The table against a plain list in which the last item moves into a hole."""
    table, plain, number = Rows(padded=True), [], 0
    for count, length in appends:
        new = torch.zeros(count, length)
        for i in range(count):
            number += 1
            new[i] = number
            plain.append([float(number)] * length)
        table.append(count, [new])
        while plain and draw.random() < 0.4:
            row = draw.randrange(len(plain))
            last = plain.pop()
            if row < len(plain):
                plain[row] = last
            table.remove(row)
        assert table.count == len(plain)
        for row, values in enumerate(plain):
            stored = table.live()[0][row].tolist()
            assert stored == values + [0.0] * (len(stored) - len(values))
