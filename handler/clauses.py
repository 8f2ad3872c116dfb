"""Sentences that are too long for a model, in pieces: at clause marks, at commas, between words."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from handler.sentences import CLOSING, Segment, is_shortened, word_before
from handler.tokenizer import Tokenizer

# End a clause before white space: chat, where nobody writes capitals, has full stops here too.
CLAUSE = ".!?‽…;:—–-۔।॥።፧"
COMMA = ","
# End one whatever follows.
COMPACT = "。！？｡；：؛؟。។៕"
COMPACT_COMMA = "，、､،፣"
BREAK = re.compile(
    rf"(?P<marks>[{re.escape(CLAUSE + COMMA + COMPACT + COMPACT_COMMA)}]+)"
    rf"(?P<closing>[{re.escape(CLOSING)}]*)(?P<gap>\s*)|(?P<space>\s+)"
)
KINDS = CLAUSES, COMMAS, WORDS = range(3)  # of places, the best first
MARGIN = 0.25  # a piece has this part of the whole at least, where that can be
PIECE = 16  # characters of a token at most, unless a tokenizer was trained otherwise

Place = tuple[int, int]  # where the text before it ends, and where the text after it begins


@dataclass(frozen=True)
class Reader:
    """Reads what fits into a model.

    limit: tokens that the model reads at most, without EOS.
    """

    source: Tokenizer
    limit: int

    def read(self, sentence: Segment) -> Iterator[tuple[Segment, list[int] | None]]:
        """A sentence in pieces that fit, each with its tokens, in order; one piece if it fits.

        A piece in which there is no place to cut may have more tokens than `limit`; a long one is
        not tokenized. Time is linear in the length, and between two pieces bounded by `limit`.

        Laws: "".join(p.text + p.gap) over the pieces is sentence.text + sentence.gap; no piece is
        empty, none begins or ends with white space if the sentence does not.
        """
        longest, text, start = self.limit * PIECE, sentence.text, 0
        while len(text) - start > longest:
            place = far_place(text, start, longest)
            if place is None:
                yield Segment(text[start:], sentence.gap), None
                return
            yield from self.halves(Segment(text[start : place[0]], text[slice(*place)]))
            start = place[1]
        yield from self.halves(Segment(text[start:], sentence.gap))

    def halves(self, whole: Segment) -> Iterator[tuple[Segment, list[int]]]:
        """As `read`; what does not fit is cut near its middle, again and again."""
        places: list[list[Place]] | None = None
        text = whole.text
        spans = [(0, len(text), len(text) + len(whole.gap))]  # to do, the first one last
        while spans:
            start, end, following = spans.pop()
            ids = self.source.encode(text[start:end])
            if len(ids) > self.limit:
                places = places or places_of(text, 0, len(text))
                place = best_place(places, start, end)
                if place is not None:
                    spans += [(place[1], end, following), (start, *place)]
                    continue
            gap = whole.gap if end == len(text) else text[end:following]
            yield Segment(text[start:end], gap), ids


def places_of(text: str, start: int, end: int) -> list[list[Place]]:
    """Where the text from `start` to `end` can be cut: of each kind, in order."""
    places: list[list[Place]] = [[] for _ in KINDS]
    for found in BREAK.finditer(text, start, end):
        kind = kind_of(found)
        if kind is not None and found.end() < end:
            places[kind].append((found.start("gap" if found["marks"] else "space"), found.end()))
    return places


def far_place(text: str, start: int, length: int) -> Place | None:
    """Where to cut text off that is longer than `length`: at the best place in the second half of
    that, or else in the two lengths around it; None if there is none."""
    for low, high in ((length // 2, length), (1, 2 * length)):
        for kind in places_of(text, start + low, min(start + high, len(text))):
            if kind:
                return kind[-1]
    return None


def kind_of(found: re.Match[str]) -> int | None:
    """What a match of `BREAK` is; None where it is no place to cut."""
    marks, text = found["marks"], found.string
    before = text[max(found.start() - 1, 0) : found.start()]
    if marks is None:
        return None if before.isspace() else WORDS
    last = marks[-1]
    if last in COMPACT:
        return CLAUSES
    if last in COMPACT_COMMA:
        return COMMAS
    if not found["gap"]:
        return None
    if last == ",":
        return COMMAS
    hyphen = marks == "-" and not before.isspace()
    if hyphen or (marks == "." and is_shortened(word_before(text, found.start()))):
        return WORDS
    return CLAUSES


def best_place(places: list[list[Place]], start: int, end: int) -> Place | None:
    """Where to cut the text from `start` to `end`: the place nearest to its middle, of the best
    kind that is not near its edges, or else of the best kind that there is."""
    margin, middle = max(1, int((end - start) * MARGIN)), (start + end) // 2
    for low, high in ((start + margin, end - margin), (start + 1, end - 1)):
        for kind in places:
            i = bisect_left(kind, (middle, 0))
            near = [one for one in kind[max(i - 1, 0) : i + 1] if low <= one[0] and one[1] <= high]
            if near:
                return min(near, key=lambda one: abs(one[0] - middle))
    return None
