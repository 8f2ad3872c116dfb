"""Shortlists: the lexicon by hand and against Model 1 as it is written down; candidates by hand;
the native operator against all logits; and what options may still say that is on no list."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import Toy
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import EOS, drained
from test_laws import MIXED
from test_model import VOCABULARY, build

from handler.decoding import DecodingOptions, Engine, native
from handler.decoding.model import load
from handler.tokenizer import Tokenizer
from model import SpecialTokens
from model.int8 import Int8Projection, rows_for_native
from model.quantized import quantized
from model.serving import scripted
from model.shortlist import Shortlist
from training.export import export
from training.lexicon import learn, sample, shortlist
from training.recipe import RecipeError, ShortlistOptions
from training.recipe import load as recipe_of
from training.run import Run
from training.tokens import TokenPairs

CPU = torch.device("cpu")
SPECIAL = SpecialTokens()
THE, HOUSE, BOOK, ONE = 4, 5, 6, 7  # of the source
DAS, HAUS, BUCH, EIN = 4, 5, 6, 7  # of the target
BOOKS = TokenPairs.of(
    [([THE, HOUSE], [DAS, HAUS]), ([THE, BOOK], [DAS, BUCH]), ([ONE, BOOK], [EIN, BUCH])], SPECIAL
)


def model_1(pairs: TokenPairs, iterations: int) -> dict[tuple[int, int], float]:
    """t(f | e) as Brown et al. 1993 write it down, word by word."""
    t: dict[tuple[int, int], float] = defaultdict(lambda: 1.0)
    for _ in range(iterations):
        count: dict[tuple[int, int], float] = defaultdict(float)
        total: dict[int, float] = defaultdict(float)
        for i in range(len(pairs)):
            for f in pairs.target(i):
                whole = sum(t[e, f] for e in pairs.source(i))
                for e in pairs.source(i):
                    count[e, f] += t[e, f] / whole
                    total[e] += t[e, f] / whole
        t = defaultdict(float, {(e, f): c / total[e] for (e, f), c in count.items()})
    return dict(t)


def learnt(pairs: TokenPairs, iterations: int) -> dict[tuple[int, int], float]:
    one = learn(pairs, iterations=iterations)
    pieces = zip(one.source.tolist(), one.target.tolist())
    return dict(zip(pieces, one.probability.tolist(), strict=True))


def test_a_first_iteration_by_hand() -> None:
    """Every word comes from each of its three source pieces alike, EOS among them: of "the", which
    is beside das twice, Haus and Buch, half is das."""
    found = learnt(BOOKS, 1)
    assert found[THE, DAS] == pytest.approx(0.5)
    assert found[THE, HAUS] == found[THE, BUCH] == pytest.approx(0.25)
    assert found[EOS, BUCH] == pytest.approx(1 / 3)


def test_the_words_find_each_other() -> None:
    found = learnt(BOOKS, 20)
    for e, f in ((THE, DAS), (HOUSE, HAUS), (BOOK, BUCH), (ONE, EIN)):
        assert max((p, g) for (source, g), p in found.items() if source == e)[1] == f


IDS = st.lists(st.integers(4, 9), max_size=5)


@settings(max_examples=60)
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=9), st.integers(1, 4))
def test_the_lexicon_is_that_of_model_1(pairs, iterations) -> None:
    tokens = TokenPairs.of(pairs, SPECIAL)
    assert learnt(tokens, iterations) == pytest.approx(model_1(tokens, iterations))


@settings(max_examples=40)
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=20), st.integers(1, 60))
def test_a_sample_stays_within_its_bound(pairs, most) -> None:
    tokens = TokenPairs.of(pairs, SPECIAL)
    cells = tokens.source_lengths() * (tokens.target_lengths() - 1)
    chosen = sample(tokens, most)
    assert int(cells[chosen].sum()) <= most
    if int(cells.sum()) <= most:
        assert len(chosen) == len(tokens)


def test_candidates_are_the_likeliest_and_what_reads_alike() -> None:
    same = torch.tensor([0, 0, 0, EOS, 0, 0, 0, 9])  # ONE reads like target piece 9
    one = shortlist(BOOKS, same, 10, ShortlistOptions(frequent=1, candidates=1))
    assert one.common.tolist() == [EOS]  # three sentences end; das and Buch are there twice
    assert one.lexicon[THE].tolist() == [0, DAS]
    assert one.lexicon[ONE].tolist() == [9, EIN]
    more = shortlist(BOOKS, same, 10, ShortlistOptions(frequent=3, candidates=1))
    assert more.common.tolist() == [EOS, DAS, BUCH]
    assert more.lexicon[HOUSE].tolist() == [0, HAUS]  # common ones are not told again


TABLE = torch.tensor([[0, 0]] * 4 + [[5, 7], [7, 4], [9, 0], [11, 8]])


def test_candidates_by_hand() -> None:
    one = Shortlist(TABLE, torch.tensor([3, 4]), 12)
    source = torch.tensor([[4, 5, 3], [6, 3, 0]])
    found = one(source, torch.tensor([3, 2]))
    assert found.tolist() == [[[5, 7], [0, 0], [0, 0]], [[9, 0], [0, 0], [0, 0]]]
    allowed = one.allowed(found)
    assert [row.nonzero().flatten().tolist() for row in allowed] == [[3, 4, 5, 7], [3, 4, 9]]


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(3, 7), min_size=1, max_size=6), min_size=1, max_size=5))
def test_candidates_depend_on_the_sentence_alone_and_lie_in_its_rows(sources) -> None:
    """Attended memory is cut to the longest sentence that is left, and filled with zeros."""
    one = Shortlist(TABLE, torch.tensor([3, 4]), 12)
    lengths = torch.tensor([len(source) for source in sources])
    padded = torch.zeros(len(sources), 7, dtype=torch.long)
    for row, source in zip(padded, sources):
        row[: len(source)] = torch.tensor(source)
    for found, source in zip(one(padded, lengths), sources):
        alone = one(torch.tensor([source]), torch.tensor([len(source)]))[0]
        assert torch.equal(found[: len(source)], alone)
        assert found[len(source) :].eq(0).all()
        ids = [i for i in alone.flatten().tolist() if i]
        expected = {i for piece in source for i in TABLE[piece].tolist()} - {0, 3, 4}
        assert ids == sorted(expected)


@pytest.mark.parametrize(
    ("lexicon", "common", "message"),
    [
        ([[12]], [3], "ids from 0 to 11"), ([[-1]], [3], "ids from 0 to 11"),
        ([[4]], [], "at least one"), ([[4]], [0, 3], "got 0 among the common ids"),
    ],
)  # fmt: skip
def test_ids_that_are_no_tokens_are_refused(lexicon, common, message) -> None:
    with pytest.raises(ValueError, match=message):
        Shortlist(torch.tensor(lexicon), torch.tensor(common, dtype=torch.long), 12)


def projected(inputs: int, outputs: int) -> tuple[Int8Projection, torch.Tensor]:
    generator = Int8Projection(torch.randn(outputs, inputs), torch.randn(outputs))
    rows = rows_for_native(generator.weight)
    generator.pack(True, float("-inf"))
    return generator, rows


@pytest.mark.parametrize("threads", [1, 3])
@settings(max_examples=25)
@given(seed=st.integers(0, 999), n=st.integers(1, 6), k=st.integers(1, 7),
       inputs=st.integers(1, 150), outputs=st.integers(12, 300), count=st.integers(1, 3))
def test_listed_logits_are_those_of_all_logits(
    native_library, threads, seed, n, k, inputs, outputs, count
) -> None:
    """To the last bit, with every kind of kernels, whatever sentences and threads there are."""
    if native_library is None:
        pytest.skip("no native operators on this machine")
    torch.manual_seed(seed)
    generator, rows = projected(inputs, outputs)
    one = Shortlist(torch.randint(0, outputs, (outputs, 3)), torch.tensor([3, 5, 9]), outputs)
    candidates = one(torch.randint(0, outputs, (n, 8)), torch.randint(1, 9, (n,)))
    x = torch.randn(n * k, inputs)
    logits = generator(x).masked_fill(~one.allowed(candidates).repeat_interleave(k, 0), -torch.inf)
    expected = logits.topk(count, 1)  # three at least are common
    fastest, before = native.enabled(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("avx2", "avx512", "amx"):
            if torch.ops.seq2serve.use(name) != name:
                continue
            values, tokens, total = torch.ops.seq2serve.listed(
                x, rows, generator.packed, candidates, one.common, count, True
            )
            assert torch.equal(values, expected.values)
            assert torch.equal(tokens, expected.indices)
            torch.testing.assert_close(total, logits.logsumexp(1), rtol=0, atol=1e-5)
    finally:
        torch.ops.seq2serve.use(fastest)
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused_before_memory_is_touched(kernels: str) -> None:
    generator, rows = projected(40, 70)
    x, common = torch.randn(4, 40), torch.tensor([3], dtype=torch.int32)
    listed = torch.ops.seq2serve.listed
    for candidates, message in (
        (torch.tensor([[[70]]]), "a candidate is no channel of 70"),
        (torch.tensor([[[-1]]]), "a candidate is no channel of 70"),
        (torch.ones(3, 1, 1), "got candidates .3, 1, 1. for 4 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            listed(x, rows, generator.packed, candidates.int(), common, 2, True)
    fine = torch.tensor([[[5]]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="common names no channel"):
        listed(x, rows, generator.packed, fine, common + 70, 2, True)
    with pytest.raises(RuntimeError, match=r"got rows .* groups of depth 64"):
        listed(x, rows[:, :40].contiguous(), generator.packed, fine, common, 2, True)


def test_a_row_that_is_not_finite_spoils_itself_alone(kernels: str) -> None:
    generator, rows = projected(40, 70)
    x = torch.randn(6, 40)
    one = Shortlist(torch.randint(1, 70, (70, 3)), torch.tensor([3]), 70)
    candidates = one(torch.randint(0, 70, (2, 4)), torch.tensor([4, 4]))
    given = (rows, generator.packed, candidates, one.common, 1, True)
    clean, _, _ = torch.ops.seq2serve.listed(x, *given)
    x[2, 7] = float("nan")
    values, _, _ = torch.ops.seq2serve.listed(x, *given)
    assert values[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(values[others], clean[others])


@pytest.fixture(scope="module")
def listing(tmp_path_factory, native_library):
    """A model with a shortlist: with torch's operators, and with native ones where there are."""
    torch.manual_seed(5)
    lexicon = torch.randint(4, VOCABULARY, (VOCABULARY, 2))
    made = quantized(
        build("attention").float(), Shortlist(lexicon, torch.tensor([EOS, 4]), VOCABULARY)
    )
    path = tmp_path_factory.mktemp("listing") / "model.pt"
    scripted(made).save(str(path))
    made.pack(False, False)
    return [made, load(str(path), CPU)]


@settings(max_examples=15)
@given(seed=st.integers(0, 999), options=st.sampled_from(MIXED))
def test_translations_are_made_of_candidates_but_for_what_a_prefix_says(
    listing, seed, options
) -> None:
    torch.manual_seed(seed)
    source = [*torch.randint(4, VOCABULARY, (5,)).tolist(), EOS]
    for model in listing:
        memory = model.encode(torch.tensor([source]), torch.tensor([len(source)]))
        allowed = model.allowed(memory)[0]
        outside = (~allowed[4:]).nonzero().flatten()[:2] + 4
        prefix = outside.tolist()
        engine = Engine(model, rows=options.beam_size)
        sentence = engine.admit(source, options, prefix)
        for result in drained(engine)[sentence].results:
            assert result.tokens[: len(prefix)] == prefix[: len(result.tokens)]
            assert allowed[result.tokens[len(prefix) :]].all()


def test_native_and_torch_agree(listing) -> None:
    torch.manual_seed(1)
    for _ in range(10):
        source = [*torch.randint(4, VOCABULARY, (6,)).tolist(), EOS]
        results = []
        for model in listing:
            engine = Engine(model, rows=4)
            options = DecodingOptions(beam_size=4, max_length=8, return_scores=True)
            number = engine.admit(source, options)
            results.append(drained(engine)[number].results[0])
        assert results[0].tokens == results[1].tokens
        assert results[0].log_probability == pytest.approx(results[1].log_probability, abs=2e-2)


def test_an_ensemble_has_none() -> None:
    with pytest.raises(ValueError, match="got one for an ensemble; allowed: null"):
        quantized(build("ensemble"), Shortlist(TABLE, torch.tensor([3]), VOCABULARY))


def test_a_run_is_exported_with_a_shortlist_and_translates_as_before(
    toy: Toy, tmp_path: Path
) -> None:
    """Every digit becomes a digit: the lexicon has all that the toy language needs."""
    asked = dataclasses.replace(
        toy.recipe.export, weights="int8", shortlist=ShortlistOptions(frequent=20, candidates=5)
    )
    recipe = dataclasses.replace(toy.recipe, export=asked)
    run = Run(tmp_path / "run")
    run.root.mkdir()
    for kept in toy.run.root.iterdir():
        if kept != toy.run.model:
            (run.root / kept.name).symlink_to(kept)
    model = load(str(export(recipe, run)), CPU)
    assert json.loads(model.card)["shortlist"] == {"frequent": 20, "candidates": 5}
    source = Tokenizer(run.tokenizer / "source.model")
    whole = load(str(toy.run.model), CPU)
    lines = (run.data / "test.source").read_text().splitlines()[:60]
    answers = []
    for one in (whole, model):
        engine = Engine(one, rows=1)
        answers.append([])
        for line in lines:
            number = engine.admit([*source.encode(line), EOS], DecodingOptions())
            answers[-1].append(drained(engine)[number].results[0].tokens)
    assert sum(a == b for a, b in zip(*answers)) >= 0.9 * len(lines)


def test_a_shortlist_of_full_precision_is_refused(toy: Toy) -> None:
    with pytest.raises(RecipeError, match="shortlist: got one with weights 'float32'; allowed: nu"):
        recipe_of(toy.recipe_file, None, ["export.shortlist={frequent: 5, candidates: 5}"])
    with pytest.raises(RecipeError, match="frequent: got 0; allowed: an integer from 1 to 65536"):
        recipe_of(
            toy.recipe_file, None,
            ["export.weights=int8", "export.shortlist={frequent: 0, candidates: 5}"],
        )  # fmt: skip
