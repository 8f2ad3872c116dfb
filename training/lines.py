"""Lines of text through the engine that serves: in order, in bounded memory, whatever their number.

What is told of a line is what the server would answer for it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from handler.answer import Narrator, Part, prefixed
from handler.blank import blank
from handler.clauses import Reader
from handler.decoding import Engine, SequenceModel
from handler.decoding.model import packed
from handler.decoding.offline import in_order
from handler.extras import MissingPackage
from handler.request import RequestOptions
from handler.sentences import Segment, Splitter, source_language
from handler.tokenizer import Tokenizer

ROWS = 64  # hypotheses decoded together offline


class LineError(ValueError):
    """A line that cannot be translated; the message names its number."""


def translations(
    model: SequenceModel,
    source: Tokenizer,
    target: Tokenizer,
    lines: Iterable[str],
    options: RequestOptions,
    device: torch.device,
    rows: int = ROWS,
) -> Iterator[list[dict[str, Any]]]:
    """The n best translations of each line, in order, as the server tells them; a blank line stays
    blank.

    Raises:
        LineError: a line that cannot be translated, after all before it.
    """
    for told in each(model, source, target, lines, options, device, rows):
        if isinstance(told, LineError):
            raise told
        yield told


def each(
    model: SequenceModel,
    source: Tokenizer,
    target: Tokenizer,
    lines: Iterable[str | LineError],
    options: RequestOptions,
    device: torch.device,
    rows: int = ROWS,
) -> Iterator[list[dict[str, Any]] | LineError]:
    """See `translations`; but a line that cannot be translated, or of which that is known already,
    costs itself alone, and has its error in its place.

    Raises:
        ValueError: options that no line can be translated with.
    """
    engine = Engine(packed(model, device), max(rows, options.beam_size), device)
    engine.check([model.eos_id], options)
    narrator = Narrator(source, target, {})
    splitter = Splitter(source_language(model.card))
    reader = Reader(source, model.max_source_length - 1)
    prefix = target.encode(options.prefix or "")

    def parts() -> Iterator[Part | LineError]:
        for number, line in enumerate(lines, 1):
            try:
                yield line if isinstance(line, LineError) else part_of(line, number)
            except LineError as error:
                yield error

    def part_of(line: str, number: int) -> Part:
        """A line in sentences that can be decoded; none of one that shows nothing."""
        line = "" if blank(line) else line
        segments: list[Segment] = []
        sources: list[list[int]] = []
        for piece, ids in pieces_of(line, number):
            segments.append(piece)
            if not piece.text:
                continue
            if len(ids) > reader.limit:
                raise LineError(
                    f"line {number}: {len(ids)} tokens; the model reads at most {reader.limit}: "
                    "split the line into sentences"
                )
            sources.append([*ids, model.eos_id] if ids else [])
            try:
                if ids:
                    engine.check(sources[-1], options, len(prefix))
            except ValueError as error:
                raise LineError(f"line {number}: {error}") from None
        return Part(segments, [None] * len(sources), sources)

    def pieces_of(line: str, number: int) -> Iterator[tuple[Segment, list[int]]]:
        """A line in segments with their tokens."""
        if not options.split:
            yield Segment(line.strip(), ""), source.encode(line.strip())
            return
        try:
            sentences = splitter.split(line)
        except MissingPackage as error:
            raise LineError(f"line {number}: splitting it into sentences {error}") from None
        for sentence in sentences:
            for piece, ids in reader.read(sentence):
                yield piece, source.encode(piece.text) if ids is None else ids

    def admit(part: Part | LineError) -> list[int]:
        if isinstance(part, LineError):
            return []
        for i, (ids, begun) in enumerate(prefixed(part.sources, prefix)):
            if ids:
                part.sentences[i] = engine.admit(ids, options, begun)
        return [one for one in part.sentences if one is not None]

    def length(part: Part | LineError) -> int:
        return 0 if isinstance(part, LineError) else sum(map(len, part.sources))

    for number, (part, events) in enumerate(in_order(engine, parts(), admit, length), 1):
        failed = next((one.error for one in events if one.error is not None), None)
        if isinstance(part, LineError):
            yield part
        elif failed is not None:
            yield LineError(f"line {number}: {failed}")
        else:
            yield narrator.translations(part, {one.sentence: one for one in events}, options)
