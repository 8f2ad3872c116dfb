"""What a score of a whole test set hides: where translations are good and where they are not."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import sacrebleu
import torch
from torch import Tensor
from tqdm import tqdm

from handler.tokenizer import Tokenizer
from training.recipe import ScoringOptions
from training.tokens import TokenPairs

# Bounds of compare-mt (arXiv 1903.07926), 1 to 4 occurrences in fewer buckets.
FREQUENCIES = (0, 1, 2, 5, 10, 100, 1000)
FEWEST = 20  # sentences a bucket: BLEU of fewer says little
RESAMPLES = 1000
MOST_PAIRS = 1_000_000  # of training text that words are counted in: a minute's work
Words = Callable[[str], str]  # text to its words, a space between each two


@dataclass(frozen=True)
class Translation:
    """One line of a test set, with its sentence-level scores, both in 0..100.

    n_grams: what BLEU is computed from: matches of 1 to 4 words, their totals, lengths of
        hypothesis and reference. Those of a set are the sums of those of its sentences.
    """

    index: int  # in the test set, from 0
    source: str
    reference: str
    hypothesis: str
    bleu: float
    chrf: float
    n_grams: tuple[int, ...]

    @property
    def exact(self) -> bool:
        return self.hypothesis == self.reference


@dataclass(frozen=True)
class LengthBucket:
    """BLEU of the sentences whose sources have `shortest` to `longest` tokens, and the bounds of
    its 95 % interval."""

    shortest: int
    longest: int
    sentences: int
    bleu: float
    low: float
    high: float

    @property
    def name(self) -> str:
        return interval(self.shortest, self.longest)


@dataclass(frozen=True)
class FrequencyBucket:
    """How often words seen `least` to `most` times in training stand in the references, in the
    hypotheses, and in both. No `most`: any number of times."""

    least: int
    most: int | None
    references: int
    hypotheses: int
    matches: int

    @property
    def name(self) -> str:
        return f"≥ {self.least:,}" if self.most is None else interval(self.least, self.most)

    @property
    def f1(self) -> float:
        """2PR / (P + R) = 2 * matches / (words of hypotheses + words of references), in 0..1."""
        return 2 * self.matches / max(self.hypotheses + self.references, 1)


def interval(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def words_of(options: ScoringOptions) -> Words:
    """What cuts text into the words that BLEU counts."""
    cut = sacrebleu.BLEU(tokenize=options.tokenize, force=True).tokenizer
    return lambda text: str(cut(text.lower() if options.lowercase else text))


def scored(
    sources: Sequence[str], references: Sequence[str], hypotheses: Sequence[str],
    options: ScoringOptions = ScoringOptions(),
) -> list[Translation]:
    """Each line with its sentence BLEU (effective order, exponential smoothing) and its chrF."""
    bleu = sacrebleu.BLEU(
        tokenize=options.tokenize, lowercase=options.lowercase, force=True, effective_order=True
    )
    chrf = sacrebleu.CHRF(lowercase=options.lowercase)
    found = []
    for i, (source, reference, hypothesis) in enumerate(zip(sources, references, hypotheses)):
        one = bleu.sentence_score(hypothesis, [reference])
        found.append(
            Translation(
                i, source, reference, hypothesis, one.score,
                chrf.sentence_score(hypothesis, [reference]).score,
                (*one.counts, *one.totals, one.sys_len, one.ref_len),
            )
        )
    return found


def corpus_bleu(n_grams: Sequence[int]) -> float:
    """BLEU of a set, from the sums of its sentences' n-grams; as sacreBLEU gives by default."""
    order = (len(n_grams) - 2) // 2
    matches, totals = list(n_grams[:order]), list(n_grams[order : 2 * order])
    score = sacrebleu.BLEU.compute_bleu(
        matches, totals, int(n_grams[-2]), int(n_grams[-1]), smooth_method="exp"
    )
    return float(score.score)


def bleu_interval(n_grams: Tensor, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of BLEU by bootstrap resampling of sentences (Koehn 2004, "Statistical
    significance tests for machine translation evaluation").

    Args:
        n_grams: int64 [N, 10], those of each sentence.
    """
    draw, n = torch.Generator().manual_seed(0), n_grams.size(0)
    scores = []
    for _ in range(resamples):
        times = torch.bincount(torch.randint(n, (n,), generator=draw), minlength=n)
        scores.append(corpus_bleu((times @ n_grams).tolist()))
    scores.sort()
    cut = resamples // 40
    return scores[cut], scores[-1 - cut]


def length_bounds(lengths: Iterable[int], most: int) -> list[tuple[int, int]]:
    """At most `most` intervals of length with about equally many sentences, shortest first.

    All sentences of one length are in one bucket; so is every length from the shortest to the
    longest that occurs.
    """
    counts = Counter(lengths)
    distinct = sorted(counts)
    until = list(accumulate(counts[length] for length in distinct))
    ends = set()
    for i in range(1, most + 1):
        wanted = until[-1] * i / most
        ends.add(min(range(len(distinct)), key=lambda j: abs(until[j] - wanted)))
    bounds, first = [], distinct[0]
    for end in sorted(ends):
        bounds.append((first, distinct[end]))
        first = distinct[end] + 1
    return bounds


def by_length(
    translations: Sequence[Translation], lengths: Sequence[int], most: int = 6
) -> list[LengthBucket]:
    """BLEU by the length of the source.

    Args:
        lengths: of the source of each translation.
        most: buckets; there are fewer where each would have less than `FEWEST` sentences.
    """
    buckets = []
    for low, high in length_bounds(lengths, max(1, min(most, len(lengths) // FEWEST))):
        inside = [one for one, n in zip(translations, lengths) if low <= n <= high]
        n_grams = torch.tensor([one.n_grams for one in inside])
        bounds = bleu_interval(n_grams)
        bleu = corpus_bleu(n_grams.sum(0).tolist())
        buckets.append(LengthBucket(low, high, len(inside), bleu, *bounds))
    return buckets


def seen_words(
    pairs: TokenPairs, target: Tokenizer, words: Words, most: int = MOST_PAIRS
) -> tuple[Counter[str], int]:
    """How often each target word stands in the training text, and of how many pairs one was read:
    1, or more where there are more than `most`, evenly spaced."""
    every = -(-len(pairs) // most)
    seen: Counter[str] = Counter()
    for i in tqdm(range(0, len(pairs), every), desc="counting words", disable=None, leave=False):
        seen.update(words(target.decode(pairs.target(i))).split())
    return seen, every


def by_frequency(
    translations: Sequence[Translation], seen: Counter[str], words: Words,
    least: Sequence[int] = FREQUENCIES,
) -> list[FrequencyBucket]:
    """Word accuracy by how often a word was seen in training (arXiv 1903.07926, section 2.2): of
    each sentence, a word is matched as often as it stands on both sides. Buckets without words are
    left out.

    Args:
        seen: how often each target word stands in the training text.
        least: the lower bound of each bucket, rising from 0.
    """  # fmt: skip
    sums = [[0, 0, 0] for _ in least]

    def count(found: Counter[str], column: int) -> None:
        for word, times in found.items():
            bucket = sum(bound <= seen[word] for bound in least) - 1
            sums[bucket][column] += times

    for one in translations:
        reference, hypothesis = (
            Counter(words(text).split()) for text in (one.reference, one.hypothesis)
        )
        count(reference, 0)
        count(hypothesis, 1)
        count(reference & hypothesis, 2)
    ends: list[int | None] = [*(bound - 1 for bound in least[1:]), None]
    return [
        FrequencyBucket(low, high, *row)
        for low, high, row in zip(least, ends, sums)
        if row[0] or row[1]
    ]


@dataclass(frozen=True)
class Examples:
    """No translation is in two of the lists, and none among the worst is exact."""

    best: list[Translation]
    worst: list[Translation]
    drawn: list[Translation]


def examples(
    translations: Sequence[Translation], most: int = 10, drawn: int = 5, seed: int = 0
) -> Examples:
    """The best and the worst by sentence chrF (BLEU of one sentence is mostly smoothing), and some
    drawn from the others. Of equally good ones the longest come first."""
    order = sorted(
        translations, key=lambda one: (-one.chrf, -one.bleu, -len(one.reference), one.index)
    )
    best = order[: min(most, (len(order) + 1) // 2)]
    wrong = [one for one in order[len(best) :] if not one.exact]
    worst = sorted(wrong, key=lambda one: (one.chrf, -len(one.reference), one.index))[:most]
    taken = {one.index for one in [*best, *worst]}
    others = [one for one in translations if one.index not in taken]
    draw = random.Random(seed)
    return Examples(best, worst, draw.sample(others, min(drawn, len(others))))
