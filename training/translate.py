"""Verb `translate`: standard input to standard output, with the engine that serves."""

import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

from handler.decoding import DecodingOptions
from handler.decoding.model import load
from training.recipe import Recipe
from training.run import Run
from training.scoring import translations
from training.train import choose_device, tokenizers


def translate(recipe: Recipe, run: Run, lines: TextIO, out: TextIO) -> int:
    """Translate `lines` to `out` in order, in bounded memory; the number of lines.

    Raises:
        ValueError: a line that cannot be translated, by number; lines before it are written.
    """
    run.demand(run.model, "export")
    device = choose_device(recipe.training)
    model = load(str(run.model), device)
    source, target = tokenizers(run)
    bar = tqdm(unit="line", disable=not sys.stderr.isatty() or out.isatty())
    count = 0
    with bar:
        texts = without_ends(lines)
        for text in translations(model, source, target, texts, DecodingOptions(), device):
            out.write(text.replace("\n", " ") + "\n")
            count += 1
            bar.update()
    return count


def without_ends(lines: TextIO) -> Iterator[str]:
    for line in lines:
        yield line.removesuffix("\n").removesuffix("\r")
