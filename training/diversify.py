"""Verb `diversify`: the training text, and beside it what teachers of both directions make of it,
for one student that is better than any of them (data diversification: Nguyen et al. 2020, arXiv
1911.01986, algorithm 1, one round).

Forward teachers translate the sources, backward ones the targets. The student learns each pair as
it is, with every forward teacher's target, and with every backward teacher's source; no other text
is needed. What the folder holds, in the order in which it is made:

    diversified.json                  which options it is made by
    forward-1/, backward-1/, ...      the teachers: ordinary runs of the recipe, of seeds in turn
    original/                         the text that they learn from, one sentence a line
    forward-1.text/, ...              what they make of it: see `distill`
    {train,validation,test}.{source,target}
    recipe.yaml                       the recipe for the student, reading this folder

What is finished is kept, so the same command goes on where it was stopped.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.corpus import Pair
from training.distill import (
    DistillOptions,
    claim,
    copy_given,
    distill,
    student,
    texts,
    write_lines,
)
from training.distributed import process_count
from training.prepare import prepare
from training.recipe import DataOptions, FilesOptions, Recipe
from training.run import Run, RunError, write_atomically, write_text
from training.tokens import TokenPairs
from training.train import tokenizers, train

UPDATES = 2.0  # of the student, in those of a teacher: it has several times the text to learn


@dataclass(frozen=True)
class DiversifyOptions:
    """forward, backward: teachers of each direction. beam_size: of theirs; 1 is greedy."""

    forward: int = field(default=2, metadata={"minimum": 1, "maximum": 16})
    backward: int = field(default=1, metadata={"minimum": 0, "maximum": 16})
    beam_size: int = field(default=5, metadata={"minimum": 1, "maximum": 64})


def diversify(recipe: Recipe, folder: Path, options: DiversifyOptions = DiversifyOptions()) -> int:
    """See the top of this file; how many texts stand beside each other, 1 + all teachers.

    Raises:
        RunError: a folder that holds something else, or was begun with other options; more than
            one process; and what `prepare`, `train` and `distill` raise.
        Interrupted: by a signal, after saving; the same call goes on.
    """
    if process_count() > 1:  # the others would end with the first teacher
        raise RunError(f"processes: got {process_count()}; allowed: 1, so without torchrun")
    claim(folder / "diversified.json", dataclasses.asdict(options))
    first = Run(folder / "forward-1")
    original = folder / "original"
    ready(recipe, first)
    write_original(first, original)
    sides: dict[str, list[Path]] = {side: [original / f"train.{side}"] for side in Pair._fields}
    directions = (
        ("forward", options.forward, recipe, ("source", "target")),
        ("backward", options.backward, backwards(recipe, original), ("target", "source")),
    )
    for direction, count, of_all, (read, said) in directions:
        for number in range(count):
            name = f"{direction}-{number + 1}"
            one = learning(of_all, seed=of_all.training.seed + number)
            text = folder / f"{name}.text"
            taught(name, one, Run(folder / name), text, DistillOptions(options.beam_size))
            sides[read].append(text / "train.source")
            sides[said].append(text / "train.target")
    for side, parts in sides.items():
        join(parts, folder / f"train.{side}")
    copy_given(first.data, folder)
    epochs = round(recipe.training.epochs * UPDATES / len(sides["source"]), 2)
    write_text(folder / "recipe.yaml", student(learning(recipe, epochs=epochs), "diversified"))
    return len(sides["source"])


def learning(recipe: Recipe, **changes: Any) -> Recipe:
    """`recipe` with other values in its section training."""
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))


def taught(name: str, recipe: Recipe, run: Run, text: Path, options: DistillOptions) -> None:
    """A teacher from its text to its translations of it."""
    print(f"{name}: learns", file=sys.stderr, flush=True)
    ready(recipe, run)
    train(recipe, run)
    print(f"{name}: {distill(recipe, run, text, options)}", file=sys.stderr, flush=True)


def ready(recipe: Recipe, run: Run) -> None:
    if not run.report.exists():
        prepare(recipe, run.root)


def write_original(run: Run, folder: Path) -> None:
    """The pairs that `run` is trained on, as its tokenizers normalised them, and its other sets."""
    finished = folder / "train.target"
    if finished.exists():
        return
    pairs = TokenPairs.load(run.data / "train.tokens")
    copy_given(run.data, folder)
    for side, ids, tokenizer in zip(Pair._fields, (pairs.source, pairs.target), tokenizers(run)):
        write_lines(folder / f"train.{side}", map(texts(ids, tokenizer), range(len(pairs))))


def backwards(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` for the other direction. It reads `folder`, the text that the forward teachers learn
    from, as by itself it might learn what they hold out."""
    train, validation, test = (
        FilesOptions(source=f"{name}.target", target=f"{name}.source")
        for name in ("train", "validation", "test")
    )
    data = DataOptions(
        folder=str(folder.absolute()), train=train, validation=validation, test=test
    )
    vocabularies = dataclasses.replace(
        recipe.tokenizer,
        source_vocabulary=recipe.tokenizer.target_vocabulary,
        target_vocabulary=recipe.tokenizer.source_vocabulary,
    )
    return dataclasses.replace(
        recipe, name=f"{recipe.name}-backward", data=data, tokenizer=vocabularies
    )


def join(parts: Sequence[Path], whole: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for part in parts:
                with part.open("rb") as one:
                    shutil.copyfileobj(one, file)

    write_atomically(whole, write)
