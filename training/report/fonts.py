"""Fonts for tokens of any script: which of this machine's fonts have the characters of a figure.

matplotlib draws a box for a character that none of its fonts has, so labels are checked first.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

LONGEST = 18  # characters of a label
OWN = "DejaVu Sans"  # comes with matplotlib: Latin, Cyrillic, Greek, Hebrew, Arabic and more


@dataclass(frozen=True)
class Fonts:
    """Families to draw with, in order of preference, and characters that none of them has."""

    families: list[str]
    missing: frozenset[str]


def characters(path: str) -> frozenset[int]:
    """The code points that a font file draws; none of one that matplotlib cannot draw with."""
    try:
        font = FT2Font(path)
    except (RuntimeError, OSError):  # a damaged file, or one of bitmaps
        return frozenset()
    return frozenset(font.get_charmap())


def plain(path: str) -> bool:
    """Whether a font is neither bold nor slanted, by the name that its file has."""
    name = Path(path).stem.lower()
    return not any(style in name for style in ("bold", "italic", "oblique", "black", "mono"))


@cache
def installed() -> dict[str, frozenset[int]]:
    """The files of all fonts of this machine, plain ones first, and what each draws."""
    paths = sorted(font_manager.findSystemFonts(), key=lambda path: (not plain(path), path))
    return {path: characters(path) for path in paths}


def fonts_for(texts: Iterable[str]) -> Fonts:
    """As few fonts as have all characters of `texts`, matplotlib's own first."""
    own = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    wanted = {ord(character) for text in texts for character in text} - characters(own)
    families = [OWN]
    while wanted:
        path, found = max(
            ((path, wanted & known) for path, known in installed().items()),
            key=lambda one: len(one[1]), default=("", set()),
        )
        if not found:
            break
        font_manager.fontManager.addfont(path)
        families.append(FT2Font(path).family_name)
        wanted -= found
    return Fonts(families, frozenset(map(chr, wanted)))


def labels(tokens: list[str], missing: frozenset[str]) -> list[str]:
    """The tokens as a figure can show them: by number, from 1, where a glyph is missing, and cut
    where they are long."""
    return [
        f"#{number}" if missing & set(token)
        else token if len(token) <= LONGEST
        else token[: LONGEST - 1] + "…"
        for number, token in enumerate(tokens, 1)
    ]  # fmt: skip


def right_to_left(tokens: list[str]) -> bool:
    """Whether most letters of a sentence are of scripts that run from right to left."""
    kinds = [unicodedata.bidirectional(character) for token in tokens for character in token]
    return sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L")
