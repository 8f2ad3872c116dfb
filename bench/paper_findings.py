"""The numbers of `bench.paper` beside those of the paper, and whether its findings hold in them.

Nothing is trained or decoded here. Every verdict is computed: a difference counts where it is
larger than what the seed alone changes, that is where it leaves the range of the reversed models.
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.corpus import lines, sentences
from training.recipe import ScoringOptions
from training.scoring import decoded_scores

BEAMS = (1, 2, 12)
REVERSED = tuple(f"reversed_{seed}" for seed in range(1, 6))
FORWARD, ONE_LAYER, FOUR_LAYERS = "forward", "layers_1", "layers_4"
PAIR, ENSEMBLE = "ensemble_2", "ensemble_5"
BUCKETS = 6  # of sentences by length
GAIN = 0.1  # BLEU that a beam of 12 must give before a share of it means anything
POINTS = 1.0  # of BLEU that long sentences may lose and still count as translated equally well

# BLEU of table 1 on newstest2014, English to French; perplexity of section 3.3.
ROWS = (
    ("forward source, 2 layers", (FORWARD,), 12, "26.17 (4 layers)", "5.8"),
    ("reversed source, 2 layers", REVERSED, 1, "", ""),
    ("reversed source, 2 layers", REVERSED, 2, "", ""),
    ("reversed source, 2 layers", REVERSED, 12, "30.59 (4 layers)", "4.7"),
    ("reversed source, 1 layer", (ONE_LAYER,), 12, "", ""),
    ("reversed source, 4 layers", (FOUR_LAYERS,), 12, "", ""),
    ("ensemble of 2 reversed", (PAIR,), 12, "33.27", ""),
    ("ensemble of 5 reversed", (ENSEMBLE,), 1, "33.00", ""),
    ("ensemble of 5 reversed", (ENSEMBLE,), 2, "34.50", ""),
    ("ensemble of 5 reversed", (ENSEMBLE,), 12, "34.81", ""),
)


@dataclass(frozen=True)
class Measured:
    """What is measured of each system so far, by its name: the content of its paper.json."""

    runs: Path
    systems: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, runs: Path) -> "Measured":
        names = (*REVERSED, FORWARD, ONE_LAYER, FOUR_LAYERS, PAIR, ENSEMBLE)
        paths = {name: runs / name / "paper.json" for name in names}
        return cls(
            runs,
            {name: json.loads(path.read_text("utf-8")) for name, path in paths.items()
             if path.exists()},
        )  # fmt: skip

    def perplexity(self, names: Sequence[str], part: str = "test") -> list[float]:
        """Of the systems of `names` that have it; `part` is test or validation."""
        found = (self.systems.get(name, {}).get("perplexity", {}).get(part) for name in names)
        return [one for one in found if one is not None]

    def bleu(self, names: Sequence[str], beam: int, part: str = "test") -> list[float]:
        found = (
            self.systems.get(name, {}).get("bleu", {}).get(str(beam), {}).get(part)
            for name in names
        )
        return [one for one in found if one is not None]

    def decoded(self, name: str, beam: int) -> list[str] | None:
        """The test text as `name` decodes it."""
        if not self.bleu([name], beam):
            return None
        return list(lines(self.runs / name / decoded_file("test", beam)))


def decoded_file(part: str, beam: int) -> str:
    return f"{part}.beam{beam}.decoded"


def report(runs: Path, options: ScoringOptions) -> str:
    """Markdown: the table, BLEU by length, and a sentence for each finding.

    Args:
        options: of the recipe, to score parts of the test text as the whole was.
    """
    measured = Measured.read(runs)
    by_length = lengths(measured, options)
    findings = [
        reversal_perplexity(measured), reversal_bleu(measured), depth(measured),
        beams(measured, "one model", REVERSED), beams(measured, "the ensemble of 5", (ENSEMBLE,)),
        ensemble(measured), long_sentences(measured, by_length),
    ]  # fmt: skip
    parts = [table(measured), length_table(by_length), "\n".join(f"- {one}" for one in findings)]
    return "\n\n".join(part for part in parts if part)


def table(measured: Measured) -> str:
    rows = [
        "| | beam | test BLEU | validation BLEU | test perplexity | validation perplexity "
        "| the paper: BLEU | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, systems, beam, bleu, perplexity in ROWS:
        once = beam == max(BEAMS)  # the perplexity is that of every beam
        cells = [
            name, str(beam),
            *(told(measured.bleu(systems, beam, part)) for part in ("test", "validation")),
            *(told(measured.perplexity(systems, part)) if once else ""
              for part in ("test", "validation")),
            bleu, perplexity,
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def told(values: Sequence[float]) -> str:
    """The mean, with the range of several."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)"


def verdict(clear: bool, better: bool) -> str:
    if clear:
        return "Holds"
    return "Holds in direction, but within what a seed changes" if better else "Does not hold"


def pending(finding: str) -> str:
    return f"{finding}: not measured yet."


def reversal_perplexity(measured: Measured) -> str:
    """Section 3.3: reading the source backwards takes perplexity from 5.8 to 4.7."""
    finding = "Reversing the source lowers perplexity"
    forward, seeds = measured.perplexity([FORWARD]), measured.perplexity(REVERSED)
    if not forward or not seeds:
        return pending(finding)
    mean = statistics.fmean(seeds)
    holds = verdict(max(seeds) < forward[0], mean < forward[0])
    return (
        f"{finding}: from {forward[0]:.2f} to {mean:.2f} on test text, {change(forward[0], mean)} "
        f"(paper: from 5.8 to 4.7, {change(5.8, 4.7)}). {holds}."
    )


def reversal_bleu(measured: Measured) -> str:
    """Section 3.3 and table 1: and BLEU from 25.9 to 30.6."""
    finding = "Reversing the source raises BLEU"
    forward, seeds = measured.bleu([FORWARD], 12), measured.bleu(REVERSED, 12)
    if not forward or not seeds:
        return pending(finding)
    mean = statistics.fmean(seeds)
    holds = verdict(min(seeds) > forward[0], mean > forward[0])
    return (
        f"{finding}: from {forward[0]:.2f} to {mean:.2f} with a beam of 12 (paper: from 26.17 to "
        f"30.59). {holds}."
    )


def depth(measured: Measured) -> str:
    """Section 3.4: each additional layer reduced perplexity by nearly 10 %."""
    finding = "Each further layer lowers perplexity"
    one, two, four = (
        measured.perplexity(names) for names in ((ONE_LAYER,), REVERSED, (FOUR_LAYERS,))
    )
    if not one or not two or not four:
        return pending(finding)
    mean = statistics.fmean(two)
    first, second = 1 - mean / one[0], 1 - (four[0] / mean) ** 0.5
    holds = verdict(max(two) < one[0] and four[0] < min(two), first > 0 and second > 0)
    alone = verdict(max(two) < one[0], first > 0)
    return (
        f"{finding}: the second by {first:.1%} ({one[0]:.2f} to {mean:.2f}), the third and fourth "
        f"by {second:.1%} each (to {four[0]:.2f}; below zero, they raise it) (paper: nearly 10 % a "
        f"layer). {holds}; of the second layer alone: {lowered(alone)}."
    )


def lowered(text: str) -> str:
    return text[0].lower() + text[1:]


def beams(measured: Measured, of: str, names: Sequence[str]) -> str:
    """Section 3.2: a beam of 1 does well, and a beam of 2 has most of what a beam search gives."""
    finding = f"A beam of 2 gives {of} most of what a beam of 12 gives"
    found = [measured.bleu(names, beam) for beam in BEAMS]
    if not all(found):
        return pending(finding)
    one, two, twelve = map(statistics.fmean, found)
    gain = twelve - one
    share = f", {(two - one) / gain:.0%} of the gain" if gain > GAIN else ", no gain of 12"
    holds = verdict(GAIN < gain <= 2 * (two - one), False)
    return (
        f"{finding}: {one:.2f}, {two:.2f} and {twelve:.2f} with beams of 1, 2 and 12{share} "
        f"(paper, ensemble of 5: 33.00, 34.50 and 34.81, {1.50 / 1.81:.0%}). {holds}."
    )


def ensemble(measured: Measured) -> str:
    """Table 1: 30.59 of one reversed model, 34.81 of five."""
    finding = "An ensemble of 5 is better than one model"
    five, seeds = measured.bleu([ENSEMBLE], 12), measured.bleu(REVERSED, 12)
    if not five or not seeds:
        return pending(finding)
    mean = statistics.fmean(seeds)
    holds = verdict(five[0] > max(seeds), five[0] > mean)
    return (
        f"{finding}: {five[0]:.2f} against {mean:.2f}, {five[0] - mean:+.2f} BLEU, with a beam of "
        f"12 (paper: 34.81 against 30.59, +4.22). {holds}."
    )


def change(before: float, after: float) -> str:
    return f"{after / before - 1:+.0%}"


@dataclass(frozen=True)
class Bucket:
    """Sentences of `first` to `last` source words; BLEU by name, missing where none is decoded."""

    first: int
    last: int
    sentences: int
    bleu: dict[str, float]

    @property
    def words(self) -> str:
        return f"{self.first} to {self.last}" if self.first < self.last else str(self.first)


SHOWN = {"ensemble of 5": (ENSEMBLE,), "one reversed model": REVERSED, "forward source": (FORWARD,)}


def lengths(measured: Measured, options: ScoringOptions) -> list[Bucket]:
    """BLEU of the test set, beam 12, by length of the source (section 3.8, figure 3)."""
    decoded = {
        shown: [text for name in names if (text := measured.decoded(name, 12)) is not None]
        for shown, names in SHOWN.items()
    }
    if not any(decoded.values()):
        return []
    data = next(path for name in (*REVERSED, FORWARD)
                if (path := measured.runs / name / "data").exists())  # fmt: skip
    source, references = sentences(data, "test")
    words = [len(line.split()) for line in source]
    found = []
    for first, last in bounds(words, BUCKETS):
        chosen = [i for i, count in enumerate(words) if first <= count <= last]
        wanted = [references[i] for i in chosen]
        bleu = {
            shown: statistics.fmean(
                decoded_scores([text[i] for i in chosen], wanted, options).bleu for text in texts
            )
            for shown, texts in decoded.items() if texts
        }  # fmt: skip
        found.append(Bucket(first, last, len(chosen), bleu))
    return found


def bounds(words: Sequence[int], count: int) -> list[tuple[int, int]]:
    """The shortest and longest of at most `count` groups of lengths, of about equally many
    sentences each; all sentences of one length are in one group."""
    found: list[tuple[int, int]] = []
    left, inside, first = len(words), 0, min(words)
    for length, number in sorted(Counter(words).items()):
        inside += number
        if inside >= left / (count - len(found)):
            found.append((first, length))
            left, inside, first = left - inside, 0, length + 1
    return found


def length_table(buckets: Sequence[Bucket]) -> str:
    if not buckets:
        return ""
    shown = [name for name in SHOWN if name in buckets[0].bleu]
    rows = [
        "BLEU by length of the source, beam 12:\n",
        f"| source words | sentences | {' | '.join(shown)} |",
        "|" + "---|" * (2 + len(shown)),
    ]
    rows += [
        f"| {one.words} | {one.sentences} | {' | '.join(f'{one.bleu[n]:.2f}' for n in shown)} |"
        for one in buckets
    ]
    return "\n".join(rows)


def long_sentences(measured: Measured, buckets: Sequence[Bucket]) -> str:
    """Section 3.8: no degradation on sentences of less than 35 words."""
    finding = "Long sentences are translated as well as others"
    whole = measured.bleu([ENSEMBLE], 12)
    if not whole or not buckets:
        return pending(finding)
    longest = buckets[-1]
    bleu = longest.bleu["ensemble of 5"]
    holds = verdict(bleu >= whole[0] - POINTS, False)
    return (
        f"{finding}: BLEU {bleu:.2f} on those of {longest.words} words, {whole[0]:.2f} on all, "
        f"of the ensemble with a beam of 12; at most {POINTS:g} point less counts as well (paper: "
        f"no degradation below 35 words). {holds}."
    )
