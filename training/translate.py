"""Verb `translate`: standard input to standard output, with the engine that serves."""

import sys
from collections.abc import Iterable, Iterator
from typing import BinaryIO, TextIO

from tqdm import tqdm

from handler.decoding import DecodingOptions
from training.export import exported
from training.recipe import Recipe
from training.run import Run
from training.scoring import translations
from training.train import choose_device, tokenizers


def translate(recipe: Recipe, run: Run, lines: BinaryIO, out: TextIO) -> int:
    """Translate `lines` to `out` in order, in bounded memory; the number of lines.

    Raises:
        ValueError: a line that cannot be translated, by number; lines before it are written.
    """
    device = choose_device(recipe.training)
    model = exported(run, device)
    source, target = tokenizers(run)
    bar = tqdm(unit="line", disable=not sys.stderr.isatty() or out.isatty())
    count = 0
    with bar:
        given = texts(lines)
        for text in translations(model, source, target, given, DecodingOptions(), device):
            out.write(text.replace("\n", " ") + "\n")
            count += 1
            bar.update()
    return count


def texts(lines: Iterable[bytes]) -> Iterator[str]:
    """The text of UTF-8 lines, without line ends."""
    for number, line in enumerate(lines, 1):
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number}: byte 0x{line[error.start]:02x} at offset {error.start} of the "
                "line is not UTF-8; allowed: UTF-8 text"
            ) from None
