"""Text that shows nothing."""

import unicodedata

# White space, and the byte order mark that joined files leave in the middle.
SPACE = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff"
SIGN = "\u2581"  # SentencePiece's own for a space: in text it is read as one
# What shows nothing though Unicode calls it a letter, a mark or a symbol: fillers, joiners,
# variation selectors, the empty Braille cell; and U+FFFD, which nmt_nfkc removes.
UNSEEN = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\ufffd" + SIGN
) | {*map(chr, range(0xFE00, 0xFE10)), *map(chr, range(0xE0100, 0xE01F0))}


def blank(text: str) -> bool:
    """Whether nothing in `text` can be seen. No normalisation turns other text into nothing."""
    return all(
        c in UNSEEN or unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in text
    )
