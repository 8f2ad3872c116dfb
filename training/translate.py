"""Verb `translate`: standard input to standard output, with the engine that serves."""

import codecs
import json
import sys
from collections.abc import Iterable, Iterator
from typing import BinaryIO, TextIO

from tqdm import tqdm

from handler.fields import FieldError, read
from handler.request import RequestOptions
from training.checkpoint import DECISIVE
from training.export import demand_own, exported
from training.lines import LineError, each
from training.recipe import Recipe
from training.run import Run
from training.train import choose_device, tokenizers


def options_of(text: str) -> RequestOptions:
    """The options of a request of the REST API, from JSON.

    Raises:
        ValueError: not a JSON object of options; the message names the one that is wrong.
    """
    try:
        options = read(RequestOptions, json.loads(text))
    except FieldError as error:
        raise ValueError(f"--options: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--options: not JSON: {error}") from None
    if options.stream:
        raise ValueError("--options: stream: got true; allowed here: false")
    return options


def translate(
    recipe: Recipe,
    run: Run,
    lines: BinaryIO,
    out: TextIO,
    options: RequestOptions = RequestOptions(),
    as_json: bool = False,
) -> int:
    """Translate `lines` to `out` in order, in bounded memory.

    A line that cannot be translated is told on standard error, by its number, and has an empty line
    in its place.

    Args:
        as_json: write all that the server would tell of a line, a JSON list of its n best; else
            the text of the best.

    Returns:
        How many lines could not be translated.

    Raises:
        ValueError: a model of another recipe or text.
    """
    device = choose_device(recipe.training)
    model = exported(run, device)
    demand_own(model, recipe, run, DECISIVE)
    source, target = tokenizers(run)
    bar = tqdm(unit="line", disable=not sys.stderr.isatty() or out.isatty())
    failed = 0
    with bar:
        for told in each(model, source, target, texts(lines), options, device):
            if isinstance(told, LineError):
                failed += 1
                bar.write(f"translate: {told}", file=sys.stderr)
                told = []
            best = told[0]["text"].replace("\n", " ") if told else ""
            out.write((json.dumps(told, ensure_ascii=False) if as_json else best) + "\n")
            bar.update()
    if failed:
        print(
            f"translate: {failed} lines could not be translated: an empty "
            f"{'list' if as_json else 'line'} is in the place of each",
            file=sys.stderr,
        )
    return failed


def texts(lines: Iterable[bytes]) -> Iterator[str | LineError]:
    """The text of UTF-8 lines, without line ends and without a byte order mark at the start.

    Raises:
        ValueError: the first line is UTF-16.
    """
    for number, line in enumerate(lines, 1):
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError("standard input is UTF-16: convert it by iconv -f UTF-16 -t UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            yield LineError(
                f"line {number}: byte 0x{line[error.start]:02x} at offset {error.start} of the "
                "line is not UTF-8; allowed: UTF-8 text"
            )
