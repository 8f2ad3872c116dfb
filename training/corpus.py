"""Parallel text: reading it strictly, dropping what would hurt training, holding sentences out.

Text is UTF-8. Only "\\n" and "\\r\\n" end a line: whatever else Unicode calls a line break
(U+0085, U+2028, form feed) is part of its sentence, or the two sides would lose step. White space
at the ends of a line is no part of its sentence.
"""

import hashlib
import heapq
import itertools
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from handler.blank import SPACE, blank
from training import formats
from training.recipe import CleaningOptions, FilesOptions

EMPTY = "empty"
NUL = "NUL character"
HELD_OUT = "source held out"
DUPLICATE = "duplicate"
TOO_LONG = "too long"
LENGTH_RATIO = "length ratio"
REASONS = (EMPTY, NUL, HELD_OUT, DUPLICATE, TOO_LONG, LENGTH_RATIO)

# A piece is of at most 16 characters, goes over no space, and a digit is a piece of its own.
PIECE = re.compile("[0-9]|[^ 0-9]{1,16}")


class CorpusError(ValueError):
    """The text cannot be used; the message names the file, the place and what is allowed."""


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


@dataclass
class Report:
    """What became of the training text, in pairs: read = kept + all held_out + all dropped."""

    read: int = 0
    kept: int = 0
    held_out: dict[str, int] = field(default_factory=dict)  # by set
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> str:
        """A small table, then the warnings, for people."""
        rows = [("pairs read", self.read)]
        rows += [(f"held out for {name}", count) for name, count in self.held_out.items()]
        rows += [(f"dropped: {reason}", count) for reason, count in self.dropped.items() if count]
        rows += [("kept for training", self.kept)]
        width = max(len(label) for label, _ in rows)
        table = [f"{label:<{width}}  {count:>12,}" for label, count in rows]
        return "\n".join(table + [f"warning: {warning}" for warning in self.warnings])


def lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without a byte order mark at its start and without line ends.

    Raises:
        CorpusError: a file that is missing, unreadable, empty, not UTF-8 or no plain text. What it
            is instead is named as far as it can be told, with the way to convert it.
    """
    start = 0  # of the line, in the file
    checked = False  # whether NULs come from an encoding
    try:
        with open(path, "rb") as file:
            head = file.peek(formats.SAMPLE)[: formats.SAMPLE]
            if problem := formats.foreign(path, head):
                raise CorpusError(f"{path}: {problem}")
            for number, line in enumerate(file, 1):
                if b"\0" in line and not checked:
                    checked = True
                    if name := formats.wide(head, line):
                        raise CorpusError(
                            f"{path}: is {name}; allowed: UTF-8; to convert it: "
                            f"{formats.conversion(path, name)}"
                        )
                try:
                    text = line.rstrip(b"\r\n").decode()
                except UnicodeDecodeError as error:
                    offset = start + error.start
                    raise CorpusError(
                        f"{path}: line {number}: byte 0x{line[error.start]:02x} at offset "
                        f"{offset} of the file is not UTF-8; allowed: UTF-8 text; "
                        f"{formats.not_utf8(path, offset)}"
                    ) from None
                if number == 1 and line.count(b"\r") > 1 and not line.endswith(b"\n"):
                    raise CorpusError(
                        f"{path}: its lines end with CR alone; allowed: LF or CR LF; to convert "
                        f"it: tr '\\r' '\\n' < {path} > {path}.lf"
                    )
                start += len(line)
                yield text.removeprefix("\ufeff") if number == 1 else text
    except FileNotFoundError:
        raise CorpusError(f"{path}: no such file") from None
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None
    if start == 0:
        raise CorpusError(f"{path}: is empty; allowed: one sentence a line")


def read(files: FilesOptions, folder: Path) -> Iterator[Pair]:
    """The pairs of two files of equal line counts, or of one TSV, in their order, without white
    space at the ends of a sentence.

    A wholly empty line of a TSV is a pair of empty sentences.

    Raises:
        CorpusError: see `lines`; line counts that differ; a TSV line with too few columns.
    """
    if files.tsv is not None:
        wanted = max(files.source_column, files.target_column)
        for number, line in enumerate(lines(folder / files.tsv), 1):
            columns = line.split("\t") if line else [""] * wanted
            if len(columns) < wanted:
                raise CorpusError(
                    f"{folder / files.tsv}: line {number}: got {len(columns)} columns separated "
                    f"by tabs; allowed: {wanted} or more, as source_column is "
                    f"{files.source_column} and target_column {files.target_column}"
                )
            sides = columns[files.source_column - 1], columns[files.target_column - 1]
            yield Pair(*(text.strip(SPACE) for text in sides))
        return
    both = [lines(path_of(files, folder, side)) for side in Pair._fields]
    for number, (source, target) in enumerate(itertools.zip_longest(*both), 1):
        if source is None or target is None:
            last = number + sum(1 for side in both for _ in side)
            counts = (number - 1, last) if source is None else (last, number - 1)
            raise CorpusError(
                " and ".join(
                    f"{path_of(files, folder, side)} ({count} lines)"
                    for side, count in zip(Pair._fields, counts)
                )
                + " differ in length; allowed: line n of one translates line n of the other"
            )
        yield Pair(source.strip(SPACE), target.strip(SPACE))


def sentences(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """The sources and the targets of a set, "validation" or "test", that `prepare` left.

    Raises:
        CorpusError: see `lines`.
    """
    source, target = (list(lines(folder / f"{name}.{side}")) for side in Pair._fields)
    return source, target


def path_of(files: FilesOptions, folder: Path, side: str) -> Path:
    """The file that holds `side`, "source" or "target"."""
    return folder / str(files.tsv or (files.source if side == "source" else files.target))


def digest(*texts: str) -> int:
    """128 bits that stand for lines of text."""
    content = "\n".join(texts).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "big")


def key(sentence: str) -> int:
    """What two sentences share that are the same to a reader: NFKC, white space folded."""
    return digest(" ".join(unicodedata.normalize("NFKC", sentence).split()))


class Seen:
    """A set of lines of text, by 64 bits of their digest: 12 to 24 bytes each.

    A Python set of integers takes some 80. Of n lines, one passes for another with a chance of
    n^2 / 2^65: one in two million for 4.5 million lines.
    """

    def __init__(self) -> None:
        self.slots = array("Q", bytes(8 << 10))  # open addressing: 0 is free
        self.count = 0

    def add(self, digest: int) -> bool:
        """Whether `digest`, of any size, was not there yet."""
        if 3 * self.count >= 2 * len(self.slots):
            former = self.slots
            self.slots = array("Q", bytes(16 * len(former)))
            for one in filter(None, former):
                self.slots[self.place(one)] = one
        digest = digest & 0xFFFF_FFFF_FFFF_FFFF or 1
        place = self.place(digest)
        if self.slots[place]:
            return False
        self.slots[place] = digest
        self.count += 1
        return True

    def place(self, digest: int) -> int:
        """The slot that holds `digest`, or the free one that it belongs in."""
        slots, last = self.slots, len(self.slots) - 1
        place = digest & last
        while slots[place] not in (0, digest):
            place = (place + 1) & last
        return place


def choose_held_out(
    pairs: Iterable[Pair], sets: Sequence[str], count: int, options: CleaningOptions
) -> dict[int, str]:
    """Picks `count` distinct source sentences for each of `sets`, of pairs that are no `junk`;
    where there are no more than two sets would take, a tenth of them for each.

    The choice depends on the sentences alone, not on their order or on a seed, and what the
    first set gets does not depend on whether there is a second.

    Returns:
        Which set each chosen sentence belongs to, by `key`.

    Raises:
        CorpusError: too few distinct sentences to leave one for training.
    """
    most = 2 * count
    chosen: set[int] = set()
    heap: list[int] = []  # the smallest keys so far, negated: the largest of them comes first
    for pair in pairs:
        if junk(pair, options):
            continue
        k = key(pair.source)
        if k in chosen:
            continue
        if len(heap) <= most:
            heapq.heappush(heap, -k)
            chosen.add(k)
        elif k < -heap[0]:
            chosen.remove(-heapq.heapreplace(heap, -k))
            chosen.add(k)
    if len(heap) <= most:
        count = max(1, len(heap) // 10)
    wanted = count * len(sets)
    if len(heap) <= wanted:
        raise CorpusError(
            f"data.train: has {len(heap)} distinct source sentences; allowed: at least "
            f"{wanted + 1}, as {' and '.join(sets)} get one each; or files for them"
        )
    return {k: sets[i // count] for i, k in enumerate(sorted(chosen)[:wanted])}


def clean(
    pairs: Iterable[Pair], options: CleaningOptions, held_out: Mapping[int, str], report: Report
) -> Iterator[tuple[str, int, Pair]]:
    """Drops and holds out what can be decided before there are tokens; counts it in `report`,
    whose `held_out` has every set of `held_out` already.

    Yields:
        The set of a pair ("train", or its set in `held_out`), its source's `key`, the pair. A
        held out sentence comes once, with its first translation, and never in "train".
    """
    done: set[int] = set()  # sources held out
    pairs_seen, sources_seen = Seen(), Seen()  # of the training set
    otherwise = 0
    for pair in pairs:
        report.read += 1
        reason = junk(pair, options)
        if reason is not None:
            report.dropped[reason] += 1
            continue
        k = key(pair.source)
        name = held_out.get(k)
        if name is not None:
            if k in done:
                report.dropped[HELD_OUT] += 1
                continue
            done.add(k)
            report.held_out[name] += 1
            yield name, k, pair
            continue
        new = pairs_seen.add(digest(*pair))
        if not new and options.drop_duplicates:
            report.dropped[DUPLICATE] += 1
            continue
        if new and not sources_seen.add(digest(pair.source)):
            otherwise += 1
        yield "train", k, pair
    if otherwise:
        report.warnings.append(
            f"data.train: {otherwise} pairs translate a source that came before otherwise; they "
            "are kept"
        )


def junk(pair: Pair, options: CleaningOptions) -> str | None:
    """Why a pair is dropped before there are tokens, or None."""
    if blank(pair.source) or blank(pair.target):
        return EMPTY
    if "\0" in pair.source or "\0" in pair.target:
        return NUL
    return TOO_LONG if any(too_long(text, options.max_tokens) for text in pair) else None


def too_long(text: str, most: int) -> bool:
    """Whether any tokenizer must cut `text` into more than `most` tokens."""
    if len(text) <= most or fewest_tokens(text) <= most:  # nearly always, and found out quickly
        return False
    # Normalisation may make it shorter.
    seen = (c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] != "C")
    return fewest_tokens("".join(seen)) > most


def fewest_tokens(text: str) -> int:
    return len(PIECE.findall(text))


def misfit(source: int, target: int, options: CleaningOptions) -> str | None:
    """Why a pair of so many tokens (EOS not counted, each at least 1) is dropped, or None."""
    shorter, longer = sorted((source, target))
    if longer > options.max_tokens:
        return TOO_LONG
    return LENGTH_RATIO if longer > options.max_length_ratio * shorter else None
