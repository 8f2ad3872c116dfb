"""The verb prepare: from the text a recipe names to tokenizers and token files.

Leaves in the run folder:

    tokenizer/source.model, target.model
    data/{validation,test}.{source,target}   text, one sentence a line: what evaluation reads
    data/{train,validation}.tokens           what training reads (`TokenPairs`)
    data/report.json                         written last: without it the step is not complete
"""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TypeVar

from tqdm import tqdm

from handler.blank import blank
from handler.integrity import sha256
from handler.tokenizer import Tokenizer
from model import SpecialTokens
from training.corpus import (
    CorpusError,
    Pair,
    Report,
    choose_held_out,
    clean,
    junk,
    key,
    lines,
    misfit,
    path_of,
    read,
)
from training.dates import DatesOptions, write_corpus
from training.normalization import Changes, changes, of_target
from training.recipe import CleaningOptions, DataOptions, FilesOptions, Recipe
from training.run import write_json
from training.tokenizer import Unlearnable, encoder, smaller, train_tokenizers
from training.tokens import CHUNK, IdPair, TokenPairs

GIVEN = ("test", "validation")  # sets that are read as they are, or else held out
MODELS = ("source.model", "target.model")
TOKENS = ("train.tokens", "validation.tokens")

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Text:
    """The files of one set, and the folder that their names are relative to."""

    files: FilesOptions
    folder: Path

    def pairs(self, doing: str) -> Iterator[Pair]:
        return shown(read(self.files, self.folder), doing)


def prepare(recipe: Recipe, run: Path) -> Report:
    """Reads, cleans, learns the tokenizers, writes tokens; see the top of this file.

    Equal text and recipe give equal bytes. Whatever an earlier call left is replaced. Text and
    tokens pass through; what is held of a pair in memory is some tens of bytes.

    Raises:
        CorpusError: text that cannot be used.
    """
    data = run / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "report.json").unlink(missing_ok=True)
    work = data / ".partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        texts = find(recipe.data, work)
        report, leaks = split(recipe, texts, work)
        try:
            train_tokenizers(
                recipe.tokenizer,
                shown(lines(work / "train.source"), "learning from the source"),
                shown(lines(work / "train.target"), "learning from the target"),
                report.read - sum(report.held_out.values()) - sum(report.dropped.values()),
                run / "tokenizer",
            )
        except Unlearnable as error:
            raise CorpusError(f"{error}; {longest(texts['train'], recipe.cleaning)}") from None
        changed = changes_of(recipe, work, run / "tokenizer" / "target.model")
        rule = of_target(recipe.tokenizer).rule
        report.warnings += [one.warning(name, rule) for name, one in changed.items() if one.changed]
        models, special = run / "tokenizer", SpecialTokens()
        report.warnings += smaller(recipe.tokenizer, models)
        fitting = fit(tokens(work, "train", models), recipe.cleaning, report)
        if TokenPairs.write(work / "train.tokens", fitting, special) == 0:
            raise CorpusError(f"data.train: no pair is left to train on\n{report.table()}")
        held_out = tokens(work, "validation", models)
        TokenPairs.write(work / "validation.tokens", held_out, special)
        report.warnings += leaks
        summary = summarise(recipe, texts, run, work, report)
        summary["targets"] = {name: one.as_dict() for name, one in changed.items()}
        write_json(work / "report.json", summary)
        names = [f"{name}.{side}" for name in GIVEN for side in Pair._fields]
        for name in [*names, *TOKENS, "report.json"]:
            os.replace(work / name, data / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def find(data: DataOptions, work: Path) -> dict[str, Text]:
    """The text of each set that has its own; a generated corpus is written first."""
    texts: dict[str, Text] = {}
    if data.generator is not None:
        folder = work / "generated"
        try:
            options = DatesOptions(held_out=data.held_out)
        except ValueError as error:
            raise CorpusError(f"data.{error}") from None
        write_corpus(folder, options)
        for name in ("train", *GIVEN):
            texts[name] = Text(FilesOptions(f"{name}.source", f"{name}.target"), folder)
    for name in ("train", *GIVEN):
        files = getattr(data, name)
        if files is not None:
            texts[name] = Text(files, Path(data.folder or "."))
    return texts


def split(recipe: Recipe, texts: dict[str, Text], work: Path) -> tuple[Report, list[str]]:
    """Writes the text of all three sets into `work`, one sentence a line.

    Returns:
        Counts, `kept` still being 0; a warning for each set that shares sources with training.
    """
    given = {name: copy(name, texts[name], work) for name in GIVEN if name in texts}
    missing = [name for name in GIVEN if name not in texts]
    report = Report(held_out=dict.fromkeys(missing, 0))
    held_out: dict[int, str] = {}
    if missing:
        pairs = texts["train"].pairs("choosing sentences to hold out")
        held_out = choose_held_out(pairs, missing, recipe.data.held_out, recipe.cleaning)
        count = len(held_out) // len(missing)
        if count < recipe.data.held_out:
            report.warnings.append(
                f"data.held_out: {recipe.data.held_out} asked for; the text has too few sentences, "
                f"so {count} are held out for {' and '.join(missing)}"
            )
    watched = set().union(*given.values())
    leaked: set[int] = set()
    with ExitStack() as stack:
        files = {name: writers(stack, work, name) for name in ("train", *missing)}
        pairs = texts["train"].pairs("cleaning")
        for name, k, pair in clean(pairs, recipe.cleaning, held_out, report):
            write(files[name], pair)
            if name == "train" and k in watched:
                leaked.add(k)
    if (work / "train.source").stat().st_size == 0:
        raise CorpusError(f"data.train: no pair is left to train on\n{report.table()}")
    counts = {name: sum(k in leaked for k in keys) for name, keys in given.items()}
    return report, [
        f"data.{name}: {count} of {len(given[name])} source sentences occur in data.train too, "
        "so scores on it flatter the model"
        for name, count in counts.items()
        if count
    ]


def copy(name: str, text: Text, work: Path) -> list[int]:
    """Writes a given set into `work` as it is, and returns the `key` of each source."""
    keys: list[int] = []
    with ExitStack() as stack:
        files = writers(stack, work, name)
        for number, pair in enumerate(text.pairs(f"reading {name}"), 1):
            for side, sentence in zip(Pair._fields, pair):
                if blank(sentence):
                    raise CorpusError(
                        f"{path_of(text.files, text.folder, side)}: line {number}: the {side} is "
                        f"empty; allowed in {name}: text on both sides, as every pair is scored"
                    )
                if "\0" in sentence:
                    raise CorpusError(
                        f"{path_of(text.files, text.folder, side)}: line {number}: has a NUL "
                        f"character; allowed in {name}: none; tr -d '\\0' takes them out"
                    )
            write(files, pair)
            keys.append(key(pair.source))
    return keys


def writers(stack: ExitStack, folder: Path, name: str) -> list[IO[str]]:
    """Opens the two text files of a set."""
    return [
        stack.enter_context(open(folder / f"{name}.{side}", "w", encoding="utf-8", newline="\n"))
        for side in Pair._fields
    ]


def write(files: list[IO[str]], pair: Pair) -> None:
    for file, text in zip(files, pair):
        file.write(f"{text}\n")


def longest(text: Text, options: CleaningOptions) -> str:
    """Where the longest line of the training text is, of those that are learnt from."""
    length, number, side = max(
        (len(sentence), -number, side)
        for number, pair in enumerate(text.pairs("looking for the longest line"), 1)
        if junk(pair, options) is None
        for side, sentence in zip(Pair._fields, pair)
    )
    return (
        f"its longest line is {path_of(text.files, text.folder, side)}: line {-number}, of "
        f"{length:,} characters: leave it out, or lower cleaning.max_tokens, which drops such lines"
    )


def changes_of(recipe: Recipe, work: Path, model: Path) -> dict[str, Changes]:
    """What becomes of the targets of each set that `split` wrote."""
    target, fallback = Tokenizer(model), recipe.tokenizer.byte_fallback
    return {
        name: changes(
            target, shown(lines(work / f"{name}.target"), f"checking targets of {name}"), fallback
        )
        for name in ("train", *GIVEN)
    }


def tokens(folder: Path, name: str, models: Path) -> Iterator[IdPair]:
    """The ids of both sides of each pair of a set that `split` wrote."""
    encode = [encoder(models / model) for model in MODELS]
    files = FilesOptions(f"{name}.source", f"{name}.target")
    pairs = shown(read(files, folder), f"encoding {name}")
    while chunk := list(itertools.islice(pairs, CHUNK)):
        source, target = (one(list(texts)) for one, texts in zip(encode, zip(*chunk)))
        yield from zip(source, target)


def fit(pairs: Iterable[IdPair], options: CleaningOptions, report: Report) -> Iterator[IdPair]:
    """The pairs that are within the limits on length; counts both kinds in `report`."""
    for source, target in pairs:
        reason = misfit(len(source), len(target), options)
        if reason is not None:
            report.dropped[reason] += 1
            continue
        report.kept += 1
        yield source, target


def shown(items: Iterable[Item], doing: str) -> Iterator[Item]:
    """The same items, with progress shown where people watch."""
    return iter(tqdm(items, desc=doing, unit=" lines", unit_scale=True, disable=None, leave=False))


def summarise(
    recipe: Recipe, texts: dict[str, Text], run: Path, work: Path, report: Report
) -> dict[str, Any]:
    """What report.json holds. Nothing in it depends on where the folders are."""
    sections = {
        name: dataclasses.asdict(getattr(recipe, name))
        for name in ("data", "cleaning", "tokenizer")
    }
    del sections["data"]["folder"]
    return {
        "recipe": sections,
        "training_pairs": report.as_dict(),
        "sha256": {
            "text": {
                name: {path: sha256(text.folder / path) for path in text.files.paths()}
                for name, text in texts.items()
            },
            "tokenizer": {name: sha256(run / "tokenizer" / name) for name in MODELS},
            "data": {name: sha256(work / name) for name in TOKENS},
        },
    }
