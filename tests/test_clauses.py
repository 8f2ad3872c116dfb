"""Sentences that are too long, in pieces: cases a person can check, laws for any text, bounds."""

import itertools
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handler.clauses import PIECE, Reader
from handler.sentences import Segment, Splitter


class Words:
    """A tokenizer whose tokens are words, as `str.split` has them, or the characters of a text."""

    def __init__(self, characters=False):
        self.characters = characters
        self.encoded = []  # lengths in characters

    def encode(self, text):
        self.encoded.append(len(text))
        return list(text if self.characters else text.split())


CUT = [
    (  # at clause marks, near the middle
        6, "one two; three four five - six seven, eight nine",
        ["one two; three four five -", "six seven, eight nine"],
    ),
    (4, "one, two, three four, five", ["one, two,", "three four, five"]),
    (3, "one two three four five", ["one two three", "four five"]),
    # Full stops of somebody who writes no capitals, but not those of abbreviations.
    (4, "i saw him. then he ran away", ["i saw him.", "then he ran away"]),
    (4, "he met dr. no and then him", ["he met dr. no", "and then him"]),
    (5, "2:30 a.b well-known so, a b c d", ["2:30 a.b well-known so,", "a b c d"]),
    # A mark at the edge is worse than a space near the middle.
    (5, "well; one two three four five six", ["well; one two", "three four five six"]),
    (3, "one, two three (four: five) six", ["one, two", "three (four:", "five) six"]),
    # No place to cut, or too few of them.
    (1, "indivisible", ["indivisible"]),
]


@pytest.mark.parametrize(("limit", "text", "pieces"), CUT)
def test_cut(limit, text, pieces):
    got = [piece for piece, _ in Reader(Words(), limit).read(Segment(text, "\n"))]
    assert [piece.text for piece in got] == pieces
    assert [piece.gap for piece in got] == [" "] * (len(pieces) - 1) + ["\n"]


def test_chinese_is_cut_without_spaces():
    text = "他说今天很冷，不想出门；我们就在家里喝茶，看书"
    got = [piece for piece, _ in Reader(Words(characters=True), 14).read(Segment(text, ""))]
    assert got == [Segment("他说今天很冷，不想出门；", ""), Segment("我们就在家里喝茶，看书", "")]


def test_a_chat_without_capitals_or_full_stops_is_read():
    """659 characters, as a report had it."""
    text = ("ok so i went there and it was closed, then we walked for an hour - no bus at all " * 9)
    text = text[:659].strip()
    (sentence,) = Splitter("en").split(text)
    pieces = list(Reader(Words(), 40).read(sentence))
    assert len(pieces) > 1
    assert all(len(ids) <= 40 for _, ids in pieces)
    assert all(piece.text.endswith((",", "-")) for piece, _ in pieces[:-1])


parts = st.sampled_from([
    "a", "word", "dr", "1", ".", ",", ";", ":", "-", "—", "!", "?", "…", "。", "，", "、", "؟", "،",
    ")", '"', "»", " ", "  ", "\t", "\x1c", "\u3000", "\u0301", "é", "你", "\ud800",
])  # fmt: skip
sentences = st.lists(parts, min_size=1, max_size=80).map("".join).map(str.strip).filter(bool)


@given(sentences, st.sampled_from(["", " ", "\n"]), st.integers(1, 6), st.booleans())
@example("。a", "", 1, True)
@example(")，、", " ", 1, True)
def test_pieces_are_the_text_and_fit_where_they_can_be_cut(text, gap, limit, characters):
    source = Words(characters)
    got = list(Reader(source, limit).read(Segment(text, gap)))
    assert "".join(piece.text + piece.gap for piece, _ in got) == text + gap
    for piece, ids in got:
        assert piece.text == piece.text.strip() != ""
        assert ids == source.encode(piece.text)
        if len(ids) > limit:
            assert not re.search(r"\S\s+\S", piece.text)
            assert len(list(Reader(source, limit).read(piece))) == 1


@given(sentences, st.sampled_from(["", " ", "\n"]))
def test_what_fits_is_one_piece(text, gap):
    source = Words()
    whole = Segment(text, gap)
    if len(text) <= 80 * PIECE:
        assert list(Reader(source, 80).read(whole)) == [(whole, source.encode(text))]
        assert source.encoded == [len(text)] * 2


HOSTILE = [
    ".", ". ", ", ", "a ", "a. ", "a.", "mr. ", "。", "- ", '"', "  a", "a;b", "()", '. "', "a,",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE)
def test_little_is_done_between_two_pieces(pattern):
    """However long the text: what is encoded at once has a bounded length, but where nothing can
    be cut: a long text is then left to whoever reads it, and a shorter one refused."""
    text = ("a" + pattern * 200_000)[:200_000].strip() + "a"
    source, limit = Words(characters=True), 100
    began = time.perf_counter()
    got = list(Reader(source, limit).read(Segment(text, "")))
    assert time.perf_counter() - began < 30  # quadratic time would be hours
    assert "".join(piece.text + piece.gap for piece, _ in got) == text
    if all(ids is not None and len(ids) <= limit for _, ids in got):
        assert max(source.encoded) <= 2 * limit * PIECE
        assert sum(source.encoded) <= 12 * len(text)
    else:
        assert any(ids is None or len(ids) > limit for _, ids in got)
        assert not re.search(r"\s", text) or '"' in pattern


def test_pieces_come_one_by_one():
    source = Words()
    pieces = Reader(source, 10).read(Segment("a b, " * 100_000 + "c", ""))
    list(itertools.islice(pieces, 5))
    assert sum(source.encoded) < 10_000
