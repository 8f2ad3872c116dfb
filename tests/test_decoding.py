"""The engine: hand-computed cases with table models, and its laws on real ones."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import A, B, C, TableModel
from test_model import KINDS, VOCABULARY, serving

from handler.decoding import DecodingOptions, Engine, SourceLengthError, decode_in_order
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
    (event,) = decode(Engine(model, rows=1), [[9] * source], DecodingOptions(asked))
    assert (len(event.results[0].tokens), event.results[0].finish_reason) == (tokens, "length")
    assert model.rows_computed == tokens


def test_no_row_is_computed_after_its_sentence_ended():
    """Sources 1..3 end after as many tokens; the rows computed are exactly the tokens."""
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
    engine = Engine(model, rows=3)
    for length in (1, 2, 3):
        engine.admit([9], DecodingOptions(length))
    for _ in range(5):
        engine.advance()
    assert model.rows_computed == 1 + 2 + 3
    assert engine.idle


def test_sentences_wait_in_order_for_free_rows():
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
    engine = Engine(model, rows=2)
    ids = [engine.admit([9], DecodingOptions(length)) for length in (3, 1, 1, 1)]
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


@pytest.mark.parametrize("source", [[], [9] * 9])
def test_sources_out_of_the_limit_are_refused(source):
    with pytest.raises(SourceLengthError, match="from 1 to 8"):
        Engine(TableModel({}), rows=1).admit(source, PLAIN)


def test_cancelled_sentences_free_their_rows_wherever_they_are():
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
    engine = Engine(model, rows=2)
    live, other, waiting, last = (engine.admit([9], DecodingOptions(4)) for _ in range(4))
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
    return [decode(Engine(model, rows=1), [s], o)[0].results for s, o in zip(sources, options)]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 9999), rows=st.integers(1, 6))
def test_output_depends_on_nothing_but_the_sentence(forms, seed, rows):
    """Law 1 and 2: whatever arrives or is cancelled when, in whatever form of the model."""
    sources = sources_of(seed, 8)
    options = [DecodingOptions(1 + (seed + i) % 17) for i in range(8)]
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
                got[numbers[event.sentence]] = event.results
        assert got == {i: expected[i] for i in range(8) if i not in cancelled}


def test_decoding_in_order_reads_ahead_a_bounded_way():
    model = TableModel({2: {A: 1.0}, A: {A: 1.0}})
    read = []

    def feed():
        for i in range(100):
            read.append(i)
            yield [9, EOS]

    out = decode_in_order(Engine(model, rows=2), feed(), DecodingOptions(2), ahead=3)
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
