"""Verb `distill`: training text whose targets are what a run translates it to, for a student that
is smaller or reads faster (sequence-level knowledge distillation: Kim and Rush 2016, arXiv
1606.07947, sections 3.2 and 3.3).

Leaves a whole data folder, and a recipe that trains a student on it:

    distilled.json                    which weights and options it is made by
    train.source, train.target        the pairs that the run was trained on, in their order
    {validation,test}.{source,target}
    recipe.yaml                       the run's, reading this folder; the student's sizes go in here

While it works, .train.target.partial has the windows that are done, whole ones only.
"""

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sacrebleu
import torch
import yaml
from tqdm import tqdm

from handler.decoding import DecodingOptions, Engine, SequenceModel, decode_in_order
from handler.decoding.model import packed
from handler.tokenizer import Tokenizer
from training.corpus import Pair, lines
from training.evaluate import Origin, best_model
from training.prepare import GIVEN
from training.recipe import Recipe, ScoringOptions
from training.run import (
    LOCK,
    Run,
    RunError,
    whole_json,
    write_atomically,
    write_bytes,
    write_json,
    write_text,
)
from training.tokens import TokenPairs
from training.train import choose_device, tokenizers

WINDOW = 4096  # pairs that are sorted by length; a crash costs the work on less than this
SENTENCES = {"cpu": 64, "cuda": 512}  # decoded together
SCORED = 10_000  # most pairs, evenly spaced, that the summary's BLEU is of


@dataclass(frozen=True)
class DistillOptions:
    """How targets are chosen.

    beam_size: 1 is greedy; more is beam search with the recipe's scoring.length_penalty.
    interpolate: of the beam take the hypothesis that is most like the reference, by sentence BLEU
        (section 3.3), instead of the likeliest.
    """

    beam_size: int = field(default=5, metadata={"minimum": 1, "maximum": 64})
    interpolate: bool = False

    def __post_init__(self) -> None:
        if self.interpolate and self.beam_size == 1:
            raise ValueError(
                "interpolate: got true with beam_size 1; allowed: with beam_size 2 or more"
            )


@dataclass(frozen=True)
class Summary:
    """What came out. translated and seconds: of this call; bleu: mean sentence BLEU of targets
    against references, 0..100."""

    folder: Path
    pairs: int
    translated: int
    seconds: float
    bleu: float

    def __str__(self) -> str:
        rate = self.translated / self.seconds if self.seconds else 0.0
        return (
            f"{self.folder}: {self.pairs:,} pairs, {self.translated:,} translated now in "
            f"{self.seconds:.0f} s ({rate:.0f} a second); sentence BLEU {self.bleu:.2f} against "
            "the references"
        )


def distill(
    recipe: Recipe, run: Run, folder: Path, options: DistillOptions = DistillOptions()
) -> Summary:
    """Translate the training text of `run`; see the top of this file.

    Goes on where an earlier call was stopped, and then writes what one call would have. What is
    written as source is the text that the tokenizer normalised, as the run itself read it.

    Raises:
        RunError: nothing trained yet; a folder that holds something else, or was begun with other
            weights or options; a sentence that could not be decoded.
    """
    run.demand(run.summary, "train")
    pairs = TokenPairs.load(run.data / "train.tokens")
    device = choose_device(recipe.training)
    model, origin = best_model(reading(recipe, pairs), run, device)
    claim(folder / "distilled.json", made_by(recipe, origin, options))
    source, target = tokenizers(run)
    references = texts(pairs.target, target)
    finished = folder / "train.target"
    translated, since = 0, time.monotonic()
    if not finished.exists():
        partial = folder / ".train.target.partial"
        done = whole_windows(partial)
        translated = len(pairs) - done
        windows = decoded(packed(model, device), device, pairs, done, recipe.scoring, options)
        for window in windows:
            append(partial, [
                chosen([target.decode(ids) for ids in found], references(i), recipe.scoring)
                for i, found in window
            ])  # fmt: skip
        sources = texts(pairs.source, source)
        write_lines(folder / "train.source", map(sources, range(len(pairs))))
        copy_given(run.data, folder)
        write_text(folder / "recipe.yaml", student(recipe, "distilled"))
        os.replace(partial, finished)
    seconds = time.monotonic() - since
    return Summary(folder, len(pairs), translated, seconds, likeness(finished, references, recipe))


def reading(recipe: Recipe, pairs: TokenPairs) -> Recipe:
    """`recipe` with a model that can be asked for every source of `pairs`."""
    longest = max(recipe.export.max_source_length, int(pairs.source_lengths().max()))
    export = dataclasses.replace(recipe.export, max_source_length=longest)
    return dataclasses.replace(recipe, export=export)


def made_by(recipe: Recipe, origin: Origin, options: DistillOptions) -> dict[str, Any]:
    """All that the targets depend on. A checkpoint names its data and tokenizers itself."""
    made = {
        "weights": [one.sha256 for one in origin.members],
        "max_target_length": recipe.export.max_target_length,
        **dataclasses.asdict(options),
    }
    if options.beam_size > 1:
        made["length_penalty"] = recipe.scoring.length_penalty
    if options.interpolate:
        made |= {"tokenize": recipe.scoring.tokenize, "lowercase": recipe.scoring.lowercase}
    return made


def claim(former: Path, made: dict[str, Any]) -> None:
    """Make the folder of `former` the one that is `made` so, which that file says, unless it is
    already.

    Raises:
        RunError: a folder that holds something else, or was begun otherwise.
    """
    folder = former.parent
    if former.exists():
        begun = whole_json(former, "restore it from a copy, or take another folder")
        changed = [
            f"{key}: begun with {begun.get(key)!r}, got {made.get(key)!r}"
            for key in begun.keys() | made.keys()
            if begun.get(key) != made.get(key)
        ]
        if changed:
            raise RunError(
                f"{folder}: {'; '.join(sorted(changed))}; allowed: the same as it was begun with, "
                "or another folder with --out"
            )
    elif folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise RunError(f"{folder}: holds other files; allowed: a new folder or an empty one")
    else:
        write_json(former, made)


def decoded(
    model: SequenceModel,
    device: torch.device,
    pairs: TokenPairs,
    done: int,
    scoring: ScoringOptions,
    options: DistillOptions,
) -> Iterator[list[tuple[int, list[list[int]]]]]:
    """The pairs after the first `done` in windows, each pair with the token ids of its hypotheses,
    best first: all of the beam where one is to be chosen of them."""
    beam = options.beam_size
    how = DecodingOptions(
        beam_size=beam,
        n_best=beam if options.interpolate else 1,
        length_penalty=scoring.length_penalty if beam > 1 else 0.0,
    )
    lengths = pairs.source_lengths()
    shown = tqdm(total=len(lengths), initial=done, unit="sentence", disable=None, leave=False)
    with shown:
        for first in range(done, len(lengths), WINDOW):
            # Like lengths beside each other, and the shortest last: then few rows wait for others.
            order = (lengths[first : first + WINDOW].argsort(descending=True, stable=True) + first)
            ids = [pairs.source(i) for i in order.tolist()]
            # A new engine, so that no window depends on where an earlier call was stopped.
            engine = Engine(model, SENTENCES[device.type] * beam, device)
            found: dict[int, list[list[int]]] = {}
            for i, event in zip(order.tolist(), decode_in_order(engine, ids, how)):
                if event.error is not None:
                    raise RunError(f"pair {i + 1} of the training text: {event.error}")
                found[i] = [one.tokens for one in event.results]
                shown.update()
            yield sorted(found.items())


def chosen(hypotheses: list[str], reference: str, scoring: ScoringOptions) -> str:
    """The hypothesis that is most like the reference, the first of equals."""
    if len(hypotheses) == 1:
        return hypotheses[0]
    bleu = sentence_bleu(scoring)
    return max(hypotheses, key=lambda text: bleu(text, reference))


@cache
def sentence_bleu(scoring: ScoringOptions) -> Callable[[str, str], float]:
    """Of a hypothesis and its reference, 0..100; smoothed, of as many n-grams as there are."""
    bleu = sacrebleu.BLEU(
        tokenize=scoring.tokenize, lowercase=scoring.lowercase, force=True, effective_order=True
    )
    return lambda text, reference: float(bleu.sentence_score(text, [reference]).score)


def texts(ids: Callable[[int], list[int]], tokenizer: Tokenizer) -> Callable[[int], str]:
    """The text of sequence i."""
    return lambda i: tokenizer.decode(ids(i))


def whole_windows(partial: Path) -> int:
    """How many lines of whole windows there are; cuts off what follows them."""
    if not partial.exists():
        return 0
    count = size = end = 0
    with partial.open("rb+") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            if number % WINDOW == 0 and line.endswith(b"\n"):
                count, size = number, end
        file.truncate(size)
    return count


def append(partial: Path, texts: Iterable[str]) -> None:
    with partial.open("ab") as file:
        file.writelines(map(line_of, texts))
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, texts: Iterable[str]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(map(line_of, texts))

    write_atomically(path, write)


def copy_given(data: Path, folder: Path) -> None:
    """The text of the sets that are not trained on."""
    for name in (f"{name}.{side}" for name in GIVEN for side in Pair._fields):
        write_bytes(folder / name, (data / name).read_bytes())


def line_of(text: str) -> bytes:
    """A model with byte pieces can say a line break, too."""
    return text.replace("\n", " ").encode() + b"\n"


def student(recipe: Recipe, kind: str) -> str:
    """`recipe` for the text beside it, as YAML; its name ends in `kind`."""
    described = recipe.as_dict()
    described["name"] += f"-{kind}"
    described["data"] = {
        name: {side: f"{name}.{side}" for side in Pair._fields} for name in ("train", *GIVEN)
    }
    return yaml.safe_dump(described, sort_keys=False, allow_unicode=True)


def likeness(finished: Path, references: Callable[[int], str], recipe: Recipe) -> float:
    """Mean sentence BLEU of some of the targets against the references."""
    bleu = sentence_bleu(recipe.scoring)
    count = sum(1 for _ in lines(finished))
    every = -(-count // SCORED)
    some = itertools.islice(enumerate(lines(finished)), None, None, every)
    return statistics.fmean(bleu(text, references(i)) for i, text in some)
