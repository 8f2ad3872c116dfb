"""The lines of any file through a server: requests are filled, and a line that cannot be translated
costs itself alone."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from server.errors import ReplyError, ServerError

LONGEST = 262_144  # bytes of a line: what a server takes at most (max_request_size)
# Of a request: enough to fill a server's batch, and little enough to be answered long before the
# time-out.
LINES = 64
BYTES = 65_536
# What a server answers because of the texts of a request: they are tried apart then. Any other
# error would meet every request.
OF_THE_TEXT = ((400, None), (413, None), (500, "DecodingFailed"), (500, "InternalError"))

Ask = Callable[[Sequence[bytes]], Sequence[bytes]]


@dataclass(frozen=True)
class Line:
    """A line of a file, counted from 1, in UTF-8; `problem` says why it has no translation."""

    number: int
    text: bytes = b""
    problem: str | None = None


def read(stream: BinaryIO) -> Iterator[Line]:
    """The lines of `stream`; only LF and CR LF end one. Of one that is longer than a server takes
    nothing is kept.

    Raises:
        ServerError: the stream is UTF-16, of which no line could be read.
    """
    number = 0
    while piece := stream.readline(LONGEST + 2):
        number += 1
        if number == 1:
            if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ServerError(
                    "standard input is UTF-16: convert it first, as by iconv -f UTF-16 -t UTF-8"
                )
            piece = piece.removeprefix(codecs.BOM_UTF8)
        size, last = len(piece), piece
        while not last.endswith(b"\n") and (last := stream.readline(LONGEST)):
            size, piece = size + len(last), b""
        text = piece.removesuffix(b"\n").removesuffix(b"\r")
        if size > LONGEST:
            yield Line(number, problem=f"{size} bytes; allowed: at most {LONGEST}")
        else:
            yield checked(Line(number, text))


def checked(line: Line) -> Line:
    """`line`, with its problem if it is no UTF-8."""
    try:
        line.text.decode()
    except UnicodeDecodeError as error:
        problem = (
            f"byte 0x{line.text[error.start]:02x} at offset {error.start} of the line is not "
            "UTF-8; allowed: UTF-8 text"
        )
        return replace(line, text=b"", problem=problem)
    return line


def translated(lines: Iterable[Line], ask: Ask) -> Iterator[Line]:
    """Each of `lines` with its translation in the place of its text, or with its problem, in order.

    Args:
        ask: translates the texts of a request.

    Raises:
        ServerError: what would meet any other request too.
    """
    for group in filled(lines):
        sound = [line for line in group if line.problem is None]
        found = iter(answered(sound, ask) if sound else ())
        yield from (next(found) if line.problem is None else line for line in group)


def filled(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Groups of lines that a request can have."""
    group: list[Line] = []
    size = 0
    for line in lines:
        more = len(line.text) + 1
        if group and (len(group) == LINES or size + more > BYTES):
            yield group
            group, size = [], 0
        group.append(line)
        size += more
    if group:
        yield group


def answered(lines: list[Line], ask: Ask) -> list[Line]:
    """The translations of lines that are sent together; in halves where they are refused."""
    try:
        found = ask([line.text for line in lines])
    except ReplyError as error:
        if not {(error.status, None), (error.status, error.type)} & set(OF_THE_TEXT):
            raise
        if len(lines) == 1:
            return [replace(lines[0], text=b"", problem=str(error))]
        half = len(lines) // 2
        return answered(lines[:half], ask) + answered(lines[half:], ask)
    return [replace(line, text=text) for line, text in zip(lines, found)]
