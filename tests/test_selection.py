"""What is chosen: from logits, options, prefix and luck to tokens and scores."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import EOS, A, B, C, TableModel, decode, drained

from handler.decoding import DecodingOptions, Engine
from handler.decoding.sampling import NUCLEUS, Draws, of_all, of_likeliest
from handler.decoding.search import Candidates, going_on
from handler.decoding.selection import BLOCKED_FROM, top, without
from handler.decoding.sentence import Sentence

PLAIN = DecodingOptions()
NEVER = float("-inf")


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


LETTERS = {2: {A: 0.9, B: 0.1}, A: {EOS: 1.0}, B: {C: 0.7, A: 0.3}, C: {C: 0.6, EOS: 0.4}}


@pytest.mark.parametrize(
    ("prefix", "tokens", "probability"),
    [
        ([B], [B, C, C, C], 0.1 * 0.7 * 0.6 * 0.6),
        ([B, A], [B, A], 0.1 * 0.3 * 1.0),
        ([B, C, C, C], [B, C, C, C], 0.1 * 0.7 * 0.6 * 0.6),
        ([A, A], [A, A], 0.9 * math.exp(-30.0)),
    ],
)
def test_a_prefix_is_taken_whatever_its_probability_and_counts(prefix, tokens, probability):
    """In the score and in max_length, which is 4; A A has no place in the table."""
    options = DecodingOptions(max_length=4, return_scores=True)
    engine = Engine(TableModel(LETTERS), rows=1)
    sentence = engine.admit([9], options, prefix)
    result = drained(engine)[sentence].results[0]
    assert result.tokens == tokens
    assert result.finish_reason == ("length" if len(tokens) == 4 else "eos")
    assert result.score == pytest.approx(math.log(probability), abs=1e-4)


def prefixed(prefix, table, rows=4, **options):
    engine = Engine(TableModel(table), rows)
    sentence = engine.admit([9], DecodingOptions(**options), prefix)
    return drained(engine)[sentence].results[0].tokens


def test_a_prefix_counts_in_every_rule_and_keeps_none_itself():
    """A is said again and again by the prefix; after it, what was said may not come again."""
    table = {2: {A: 1.0}, A: {A: 0.5, B: 0.3, C: 0.2}, B: {A: 0.6, C: 0.4}, C: {EOS: 1.0}}
    assert prefixed([A, A, A], table, no_repeat_ngram_size=1) == [A, A, A, B, C]
    assert prefixed([A, B], table, no_repeat_ngram_size=2) == [A, B, A, A, C]
    assert prefixed([A], table, repetition_penalty=4.0, max_length=2) == [A, B]
    ending = {2: {A: 1.0}, A: {EOS: 0.9, A: 0.1}}
    assert prefixed([A, A], ending, min_length=3) == [A, A, A]
    assert prefixed([A, A], ending, min_length=2) == [A, A]


@pytest.mark.parametrize("options", [{"max_length": 3}, {"max_length": 3, "beam_size": 2}])
def test_a_prefix_longer_than_the_translation_may_be_is_refused_by_name(options):
    engine = Engine(TableModel(LETTERS), rows=2)
    with pytest.raises(ValueError, match="prefix: got 4 tokens; allowed: at most max_length, 3"):
        engine.admit([9], DecodingOptions(**options), [B, C, C, C])
    with pytest.raises(ValueError, match="prefix: got 21 tokens; allowed: at most max_length, 20"):
        engine.admit([9], PLAIN, [A] * 21)
    assert engine.idle


def test_all_hypotheses_of_a_beam_begin_with_its_prefix():
    engine = Engine(TableModel(LETTERS), rows=3)
    options = DecodingOptions(beam_size=3, max_length=6, n_best=3)
    sentence = engine.admit([9], options, [B, C, C])
    results = drained(engine)[sentence].results
    assert {tuple(one.tokens[:3]) for one in results} == {(B, C, C)}
    assert len({tuple(one.tokens) for one in results}) == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"return_scores": True}, {"beam_size": 2}, {"sampling": True, "seed": 1}],
)
def test_options_that_leave_no_token_are_an_error_of_that_sentence(options):
    model = TableModel({})
    model.logits[:] = NEVER
    model.logits[2, A] = model.logits[A, A] = 0.0
    engine = Engine(model, rows=3)
    bad = engine.admit([9], DecodingOptions(no_repeat_ngram_size=1, max_length=9, **options))
    good = engine.admit([9], DecodingOptions(max_length=2))
    events = drained(engine)
    assert "options allow" in events[bad].error
    assert events[good].results[0].tokens == [A, A]


@pytest.mark.parametrize("beside", [2, 3, 4, 5])
@pytest.mark.parametrize("width", [1, 2])
def test_of_equally_likely_tokens_the_same_is_taken_whoever_is_beside(width, beside):
    """Four tokens have the very same probability."""
    table = {2: dict.fromkeys(range(4, 8), 0.25), **{t: {EOS: 1.0} for t in range(4, 8)}}
    mine = DecodingOptions(beam_size=width, n_best=width)
    (alone,) = decode(Engine(TableModel(table), rows=width), [[9]], mine)
    engine = Engine(TableModel(table), rows=width + beside)
    sentence = engine.admit([9], mine)
    engine.admit([9], DecodingOptions(beam_size=beside))
    together = drained(engine)[sentence]
    assert [r.tokens for r in together.results] == [r.tokens for r in alone.results]


ATTENTION = {2: [0.5, 0.25, 0.25], A: [0.2, 0.3, 0.5], B: [0.9, 0.1, 0.0]}


@pytest.mark.parametrize(
    ("token", "sums"),
    [
        (A, (0.5 + 0.2, 0.25 + 0.3)),  # the step that gives EOS pays too, after A
        (B, (1.0, 0.25 + 0.1)),  # 0.5 + 0.9 is more than 1 and counts as 1
    ],
)
def test_coverage_is_what_all_steps_paid_every_source_token_but_its_end(token, sums):
    """Score = log P + b * cp with b = 2, cp = the sum of log min(sum, 1); P = 1."""
    model = TableModel({2: {token: 1.0}, token: {EOS: 1.0}}, attention=ATTENTION)
    options = DecodingOptions(coverage_penalty=2.0, return_scores=True, return_alignments=True)
    (event,) = decode(Engine(model, rows=1), [[9, 8, EOS]], options)
    (result,) = event.results
    assert result.score == pytest.approx(2 * sum(map(math.log, sums)), abs=1e-4)
    assert result.log_probability == pytest.approx(0.0, abs=1e-4)
    assert list(result.alignment) == [pytest.approx(ATTENTION[2])]


def test_a_score_is_the_sum_of_log_probabilities_where_it_is_asked_for():
    model = TableModel({2: {A: 0.5, B: 0.3, C: 0.2}, A: {A: 0.4, C: 0.6}, B: {C: 0.5, EOS: 0.5},
                        C: {A: 0.1, B: 0.6, EOS: 0.3}})
    table = model.logits.double()
    table[:, :3] = NEVER
    table = table.log_softmax(1)
    for seed, sampling in itertools.product(range(8), (False, True)):
        how = {"sampling": True, "seed": seed, "temperature": 1.5, "top_k": 3} if sampling else {}
        options = [
            DecodingOptions(max_length=6, length_penalty=1.0, return_scores=asked, **how)
            for asked in (True, False)
        ]
        engine = Engine(model, rows=2)
        asked, silent = (engine.admit([9], one) for one in options)
        events = drained(engine)
        (told,), (untold,) = events[asked].results, events[silent].results
        assert (told.tokens, told.finish_reason) == (untold.tokens, untold.finish_reason)
        assert (untold.score, untold.log_probability) == (None, None)
        whole = [2, *told.tokens] + [EOS] * (told.finish_reason == "eos")
        expected = sum(float(table[a, b]) for a, b in itertools.pairwise(whole))
        assert told.log_probability == pytest.approx(expected, abs=1e-4)
        assert told.score == pytest.approx(expected / (len(whole) - 1), abs=1e-4)


VOCABULARIES = [1, 5, 63, 2047, 2048, 2049, 2111, 2112, 4160, 5003, 128 * 64]


@settings(max_examples=60)
@given(n=st.integers(1, 3), k=st.integers(1, 3), vocabulary=st.sampled_from(VOCABULARIES),
       count=st.integers(1, 128), seed=st.integers(0, 9999),
       levels=st.sampled_from([3, 40, 10**6]), nan=st.booleans(),
       never=st.sampled_from([0.0, 0.3, 0.99, 1.0]))
def test_the_greatest_are_those_of_a_plain_search(
    n, k, vocabulary, count, seed, levels, nan, never
):
    """Few levels make many equal values, of which any may be named, but each once."""
    torch.manual_seed(seed)
    logits = torch.randint(-levels, levels, (n, k, vocabulary)) / 7
    logits[torch.rand(logits.shape) < never] = NEVER
    if nan:
        logits[torch.rand(logits.shape) < 1e-3] = float("nan")
    kept = logits.clone()
    values, tokens = top(logits, count)
    expected, _ = logits.topk(min(count, vocabulary), 2)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(values, expected, **same)
    torch.testing.assert_close(logits.gather(2, tokens), expected, **same)
    assert all(len(set(row)) == len(row) for row in tokens.flatten(0, 1).tolist())
    for i, j in itertools.product(range(n), range(k)):
        value, token = top(logits[i : i + 1, j : j + 1], count)
        torch.testing.assert_close(value[0, 0], values[i, j], **same)
        assert torch.equal(token[0, 0], tokens[i, j])
    torch.testing.assert_close(logits, kept, **same)


def sampler(number=0, **options):
    return Sentence(number, [9], DecodingOptions(sampling=True, **options), 20)


def shares_drawn(draw, logits, count, **options):
    """How often each token is drawn over `count` numbers spread evenly over 0..1."""
    luck = (torch.arange(count, dtype=torch.double).unsqueeze(1) + 0.5) / count
    asked = Draws.of([sampler(**options)] * count, torch.device("cpu"))
    scaled = logits.expand(count, -1)
    tokens = of_all(scaled, luck) if draw is of_all else of_likeliest(scaled, luck, asked)
    return tokens.bincount(minlength=logits.numel()) / count


def nucleus(logits, top_k=0, top_p=1.0):
    """The distribution by its definition: of the k likeliest the fewest that reach p."""
    order = logits.argsort(descending=True)[: top_k or None].tolist()
    p = torch.softmax(logits[order], 0).tolist()
    kept = 1
    while sum(p[:kept]) < top_p and kept < len(p):
        kept += 1
    shares = torch.zeros(logits.numel(), dtype=torch.double)
    shares[order[:kept]] = torch.tensor(p[:kept], dtype=torch.double) / sum(p[:kept])
    return shares


@pytest.mark.parametrize("top_k", [NUCLEUS, NUCLEUS + 44, 2 * NUCLEUS])
def test_a_nucleus_is_a_share_of_the_k_likeliest(top_k):
    """Also where k is more than is looked at first, and those reach p of all tokens."""
    torch.manual_seed(1)
    logits = 2 * torch.randn(4 * NUCLEUS, dtype=torch.double)
    options = {"top_k": top_k, "top_p": 0.5}
    drawn = shares_drawn(of_likeliest, logits, 2000, **options).double()
    torch.testing.assert_close(drawn, nucleus(logits, **options), rtol=0, atol=2 / 2000)


@settings(max_examples=25)
@given(seed=st.integers(0, 9999), vocabulary=st.integers(1, 40),
       top_k=st.sampled_from([0, 1, 3, 50]), top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
       never=st.sampled_from([0.0, 0.5]))
def test_tokens_are_drawn_as_often_as_they_are_likely(seed, vocabulary, top_k, top_p, never):
    torch.manual_seed(seed)
    logits = 2 * torch.randn(vocabulary, dtype=torch.double)
    logits[1:][torch.rand(vocabulary - 1) < never] = NEVER
    options = {"top_k": top_k, "top_p": top_p}
    drawn = shares_drawn(of_likeliest, logits, 400, **options)
    torch.testing.assert_close(drawn.double(), nucleus(logits, **options), rtol=0, atol=2 / 400)
    drawn = shares_drawn(of_all, logits, 400)
    torch.testing.assert_close(drawn.double(), logits.softmax(0), rtol=0, atol=2 / 400)


def test_a_nucleus_may_need_more_tokens_than_are_looked_at_first():
    """All of 3 * NUCLEUS tokens are nearly equally likely: nine in ten of them reach 0.9."""
    logits = torch.linspace(0, 1e-3, 3 * NUCLEUS, dtype=torch.double)
    count = 12 * NUCLEUS
    drawn = shares_drawn(of_likeliest, logits, count, top_p=0.9).double()
    torch.testing.assert_close(drawn, nucleus(logits, top_p=0.9), rtol=0, atol=1.5 / count)
    assert int((drawn > 0).sum()) == pytest.approx(0.9 * 3 * NUCLEUS, abs=2)


@pytest.mark.parametrize("luck", [0.0, 0.25, 0.5, 0.75, 1 - 2.0**-53])
@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.999999}, {"top_k": 5}])
def test_no_luck_draws_what_is_forbidden(luck, options):
    logits = torch.full((1, 30), NEVER, dtype=torch.double)
    logits[0, [7, 11, 20]] = torch.tensor([0.3, -0.2, -40.0], dtype=torch.double)
    number = torch.tensor([[luck]], dtype=torch.double)
    asked = Draws.of([sampler(**options)], torch.device("cpu"))
    for token in (of_all(logits, number), of_likeliest(logits, number, asked)):
        assert int(token) in (7, 11, 20)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {A: 0.5, B: 0.3, C: 0.2}),
        ({"temperature": 0.5}, {A: 0.25 / 0.38, B: 0.09 / 0.38, C: 0.04 / 0.38}),
        ({"top_k": 2}, {A: 0.625, B: 0.375}),
        ({"top_p": 0.45}, {A: 1.0}),
        ({"top_p": 0.6}, {A: 0.625, B: 0.375}),
        ({"top_p": 0.6, "top_k": 1}, {A: 1.0}),
        ({"temperature": 0.05}, {A: 1.0}),
    ],
)
def test_drawing_follows_the_probabilities_and_their_limits(options, expected):
    """Chi square of 1500 draws, one for each seed, is below 20: p < 1e-4 with 2 degrees."""
    model = TableModel({2: {A: 0.5, B: 0.3, C: 0.2}})
    engine = Engine(model, rows=300)
    ids = [
        engine.admit([9], DecodingOptions(sampling=True, seed=seed, max_length=1, **options))
        for seed in range(1500)
    ]
    events = drained(engine)
    drawn = Counter(events[i].results[0].tokens[0] for i in ids)
    assert set(drawn) == set(expected)
    assert sum((drawn[t] - 1500 * p) ** 2 / (1500 * p) for t, p in expected.items()) < 20


@pytest.mark.parametrize("top_k", [2**63, 2**64, 10**400])
def test_as_many_tokens_as_a_client_likes_are_all(top_k):
    model = TableModel({2: {A: 0.5, B: 0.3, C: 0.2}})
    options = [DecodingOptions(sampling=True, seed=3, max_length=1, top_k=k) for k in (top_k, 0)]
    (asked,), (all_of_them,) = (decode(Engine(model, 1), [[9]], one) for one in options)
    assert asked.error is None
    assert asked.results[0].tokens == all_of_them.results[0].tokens


KINDS_OF_SEARCH = [
    {}, {"return_scores": True}, {"beam_size": 2}, {"beam_size": 5, "length_penalty": 1.0},
    {"min_length": 3}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1},
    {"sampling": True}, {"sampling": True, "temperature": 0.7, "return_scores": True},
    {"sampling": True, "top_k": 5}, {"sampling": True, "top_p": 0.9, "min_length": 2},
    {"sampling": True, "top_k": 300, "top_p": 0.7},
]


class Given(TableModel):
    """Logits [V] for each first token of a source, whatever was said."""

    def __init__(self, logits):
        super().__init__({})
        self.logits, self.target_vocabulary = logits, logits.size(1)

    def step(self, previous, state, memory):
        logits = self.logits[state[0].long().view(previous.shape)]  # [N, K, V]
        return logits, state, torch.ones(*previous.shape, memory.attended[0].size(1))


@settings(max_examples=25)
@given(seed=st.integers(0, 9999), vocabulary=st.sampled_from([12, 600, BLOCKED_FROM + 100]),
       chosen=st.lists(st.sampled_from(KINDS_OF_SEARCH), min_size=1, max_size=5),
       prefixed=st.integers(0, 5), poisoned=st.integers(0, 5))
def test_what_one_is_offered_depends_on_nobody_beside(seed, vocabulary, chosen, prefixed, poisoned):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(chosen), vocabulary, generator=generator)
    if poisoned < len(chosen):
        logits[poisoned, 9] = float("nan")

    def offered(engine, places):
        ids = []
        for i in places:
            seeded = {"seed": seed + i} if "sampling" in chosen[i] else {}
            options = DecodingOptions(**{"max_length": 3, **chosen[i], **seeded})
            ids.append(engine.admit([i], options, [7] if i == prefixed else []))
        events = drained(engine)
        return [events[one] for one in ids]

    together = offered(Engine(Given(logits), 25), range(len(chosen)))
    for i, mine in enumerate(together):
        (alone,) = offered(Engine(Given(logits), 25), [i])
        assert mine.error == alone.error
        assert (mine.error is None) == (i != poisoned)
        assert [r.tokens for r in mine.results] == [r.tokens for r in alone.results]
        for one, other in zip(mine.results, alone.results, strict=True):
            assert one.score == pytest.approx(other.score)


def test_what_fills_up_a_short_list_is_no_end_and_no_token():
    """A model of few candidates fills them up with EOS of -inf."""
    fill = -math.inf
    values = torch.tensor([[[3.0, 2.0, fill, fill]], [[3.0, 2.0, fill, fill]]])
    tokens = torch.tensor([[[EOS, A, EOS, EOS]], [[A, EOS, EOS, EOS]]])
    left, named = without(EOS, torch.tensor([True, False]), values, tokens)
    assert named.tolist() == [[[A, EOS, EOS]], [[A, EOS, EOS]]]
    assert left.tolist() == [[[2.0, fill, fill]], [[3.0, 2.0, fill]]]
    found = Candidates(values.squeeze(1), torch.zeros(2, 4).long(), tokens.squeeze(1),
                       tokens.squeeze(1) == EOS)  # fmt: skip
    scores, _, going = going_on(found, 2)
    assert scores.tolist() == [[2.0, fill], [3.0, fill]]
    assert [row[0] for row in going.tolist()] == [A, A]


def test_a_token_is_left_out_only_where_it_must_be():
    values = torch.tensor([[[3.0, 2.0, 1.0]], [[3.0, 2.0, 1.0]], [[3.0, 2.0, 1.0]]])
    tokens = torch.tensor([[[EOS, A, B]], [[EOS, A, B]], [[A, B, C]]])
    left, named = without(EOS, torch.tensor([True, False, True]), values, tokens)
    assert named.tolist() == [[[A, B]], [[EOS, A]], [[A, B]]]
    assert left.tolist() == [[[2.0, 1.0]], [[3.0, 2.0]], [[3.0, 2.0]]]


def test_the_same_seed_draws_the_same_in_any_company():
    model = TableModel({t: dict.fromkeys(range(4, 12), 0.125) for t in range(2, 12)})
    mine = DecodingOptions(sampling=True, seed=77, max_length=12)
    (alone,) = decode(Engine(model, rows=1), [[9]], mine)
    draw = random.Random(1)
    for _ in range(10):
        engine = Engine(model, rows=12)
        others = [{}, {"sampling": True}, {"sampling": True, "top_k": 2}, {"beam_size": 3}]
        for _ in range(draw.randint(0, 6)):
            engine.admit([8], DecodingOptions(**draw.choice(others)))
        engine.advance(draw.randint(0, 5))
        sentence = engine.admit([9], mine)
        assert drained(engine)[sentence].results == alone.results
    assert len(set(alone.results[0].tokens)) > 3
