"""What a file is that does not hold UTF-8 text, and how to convert it."""

import codecs
import json
import os
import re
import shlex
from pathlib import Path

SAMPLE = 8192  # bytes looked at

# What files begin with, what that is called, and how to make text of it; {} is the file.
BINARY = (
    (b"\x1f\x8b", "gzip", "gzip -dk {}"),
    (b"BZh", "bzip2", "bzip2 -dk {}"),
    (b"\xfd7zXZ\0", "xz", "xz -dk {}"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dk {}"),
    (b"PK\x03\x04", "zip, or an office document", "unzip {}, or save it as plain text"),
    (b"PAR1", "Parquet", "see 'Your text' in docs/training.md"),
    (b"%PDF", "PDF", "pdftotext {}"),
)
MARKUP = re.compile(r"<(tmx|xliff)\b")
WESTERN = re.compile("cp125[0247]|iso8859|latin|mac|cp437|cp85|hp_roman")


def foreign(path: Path, head: bytes) -> str | None:
    """What is wrong with a file that begins with `head`, and what to do; None if nothing is."""
    for start, name, how in BINARY:
        if head.startswith(start) and not plain(head):
            return told(name, how.format(shlex.quote(str(path))))
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = head.decode("utf-16" if wide else "utf-8", errors="ignore").lstrip("\ufeff \r\n")
    if text.startswith("<") and (found := MARKUP.search(text)):
        return told(found[1].upper(), "see 'Your text' in docs/training.md")
    if path.suffix in (".json", ".jsonl", ".ndjson") and is_json(text.split("\n")[0]):
        return told("JSON", "see 'Your text' in docs/training.md")
    return None


def told(name: str, how: str) -> str:
    return f"is {name}; allowed: UTF-8 text, one sentence a line; to convert it: {how}"


def is_json(line: str) -> bool:
    """Whether a line begins as those of JSON files do; it may be cut off."""
    try:
        return isinstance(json.loads(line), (dict, list))
    except ValueError:
        return line.rstrip() in ("{", "[", "[{") or re.match(r'[\[{]\s*"', line) is not None


def encoding(sample: bytes) -> str | None:
    """The likeliest encoding of bytes from the middle of a file, as iconv calls it."""
    from charset_normalizer import from_bytes  # of files that are no UTF-8 alone

    best = from_bytes(sample).best()
    if best is None:
        return None
    name = re.sub(r"utf_(16|32)_(.e)", r"utf_\1\2", best.encoding)
    return name.upper().replace("_", "-")


def wide(head: bytes, line: bytes) -> str | None:
    """UTF-16 or UTF-32, if a file with NULs is that, rather than text with NULs.

    Args:
        head: what the file begins with.
        line: its first line that has a NUL.
    """
    sample = head if b"\0" in head else line[:SAMPLE]
    if head.startswith(codecs.BOM_UTF8) or (utf8(sample) and sample.count(0) * 4 < len(sample)):
        return None
    name = encoding(sample)
    return name if name is not None and name.startswith(("UTF-16", "UTF-32")) else None


def conversion(path: Path, name: str) -> str:
    """How to make UTF-8 of a file in the encoding `name`."""
    file = shlex.quote(str(path))
    return f"iconv -f {name} -t UTF-8 {file} > {shlex.quote(f'{path}.utf8')}"


def not_utf8(path: Path, offset: int) -> str:
    """What to do about a file that has a byte at `offset` which is not UTF-8."""
    start = max(0, offset - SAMPLE // 2) // 4 * 4
    with open(path, "rb") as file:
        file.seek(start, os.SEEK_SET)
        sample = file.read(SAMPLE)
    before = sample[: offset - start]
    if not before.isascii() and utf8(before):
        return "the text before it is: mend that line, or leave it out"
    name = encoding(sample)
    if name is None:
        return "convert the file"
    if WESTERN.match(name.lower().replace("-", "_")):
        return (
            "it may be Latin-1, which CP1252 contains, or Central European, CP1250: "
            f"{conversion(path, 'CP1252')}"
        )
    return f"it looks like {name}: {conversion(path, name)}"


def plain(head: bytes) -> bool:
    return utf8(head) and b"\0" not in head


def utf8(sample: bytes) -> bool:
    """Whether `sample` is UTF-8, but for characters that are cut off at its ends."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample.lstrip(bytes(range(0x80, 0xC0))))
    except UnicodeDecodeError:
        return False
    return True
