"""Tokenizers: any text survives, nothing hostile hurts, learning is deterministic and explains
what it refuses."""

import base64
import itertools
import random
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import training.tokenizer
from handler.blank import SIGN, SPACE, blank
from handler.tokenizer import Tokenizer
from training.corpus import CorpusError, too_long
from training.normalization import AS_IT_STANDS, Normalization
from training.recipe import TokenizerOptions
from training.tokenizer import Unlearnable, encoder, learn, spread, train_tokenizers

TEXT = ["the cat sat on the mat", "the dog sat on the cat", "abc 123 가나다", "été, naïve"] * 3
SIZE = 286
RULES = {
    "nmt_nfkc": Normalization(), "nfkc": Normalization("nfkc"),
    "identity": Normalization("identity"), "as it stands": AS_IT_STANDS,
}  # fmt: skip
MODELS = {
    name: learn(TokenizerOptions(), SIZE, TEXT, "source_vocabulary", rule)
    for name, rule in RULES.items()
}
TOKENIZERS = {name: Tokenizer(model) for name, model in MODELS.items()}
USUAL, AS_IT = TOKENIZERS["nmt_nfkc"], TOKENIZERS["as it stands"]
LONG = {  # with pieces as long as there can be, wherever there can be
    name: Tokenizer(learn(
        TokenizerOptions(algorithm="bpe"), 300, ["a" * 64, "ba" * 32, "２" * 32, "ｶﾞ" * 16,
        "e\u0301" * 16, "\u1100\u1161" * 16, "a\u200bb" * 16], "source_vocabulary", rule
    ))
    for name, rule in RULES.items()
}  # fmt: skip


def kept(text: str) -> str:
    """What is kept of a text; U+2581 is SentencePiece's own sign for a space."""
    return "" if blank(text) else text.strip(SPACE).replace(SIGN, " ").lstrip(" ")


def folded(text: str) -> str:
    return re.sub(" +", " ", kept(text)).strip(" ")


def test_special_ids_are_fixed_and_never_come_from_text() -> None:
    assert USUAL.pieces([0, 1, 2, 3]) == ["<pad>", "<unk>", "<s>", "</s>"]
    assert USUAL.size == SIZE
    ids = USUAL.encode("<pad> <unk> <s> </s> <0x41>")
    assert min(ids) > 3
    assert USUAL.decode(ids) == "<pad> <unk> <s> </s> <0x41>"


def test_pieces_join_to_the_text() -> None:
    ids = USUAL.encode("the cat 😀")
    pieces = USUAL.pieces(ids)
    assert "".join(pieces[:-4]) == "▁the▁cat▁"
    assert pieces[-4:] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


@pytest.mark.parametrize(
    "text",
    [
        "a\0b",
        "a 😀 b",
        "👩‍👩‍👧‍👦",
        "\U0010ffff",
        "x\x80\x9cx",
        "x" * 10_000,
        "the cat " * 1249 + "the cat",
        "😀" * 10_000,
    ],
)
def test_unusual_text_survives(text: str) -> None:
    assert USUAL.decode(USUAL.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "\t\n\r", "\x01\x1f\x7f", "\0", "\x80\x9c", "\x1a", "\x0c", "\x85", "\u200b\ufeff",
     "\u200e\u200f", "\u2028", "▁", "\u00ad", "\u180e", "\u3164", "\u2800", "\ufe0f\u034f"],
)  # fmt: skip
@pytest.mark.parametrize("name", RULES)
def test_text_of_nothing_visible_has_no_tokens(name: str, text: str) -> None:
    assert blank(text)
    assert TOKENIZERS[name].encode(text) == []


def test_text_with_something_visible_always_has_tokens() -> None:
    silent = [c for c in map(chr, range(0x3100)) if not USUAL.encode(c)]
    silent += [c for c in map(chr, range(0xE000, 0x10000)) if not USUAL.encode(c)]
    assert len(silent) > 50
    assert [c for c in silent if not blank(c)] == []


@pytest.mark.parametrize(("text", "place"), [("\ud800", 0), ("ab\udfffc", 2), ("\ude00\ud83d", 0)])
def test_lone_surrogates_are_refused_with_their_place(text: str, place: int) -> None:
    with pytest.raises(ValueError, match=f"character {place} is a lone surrogate, U\\+D[89A-F]"):
        USUAL.encode(text)


@given(st.text())
def test_byte_fallback_keeps_every_character(text: str) -> None:
    tokenizer = TOKENIZERS["identity"]
    assert tokenizer.decode(tokenizer.encode(text)) == folded(text)


@given(st.text() | st.text("a \t\ufeff\u3000▁（½\u200c\u0e33e\u0301"))
def test_a_target_is_written_as_it_stands(text: str) -> None:
    tokenizer = TOKENIZERS["as it stands"]
    assert tokenizer.decode(tokenizer.encode(text)) == kept(text)
    if not blank(text):
        assert tokenizer.normalised(text) == kept(text)


@given(st.text())
def test_what_is_decoded_is_the_normalised_text(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        if ids := tokenizer.encode(text):
            assert tokenizer.decode(ids) == tokenizer.normalised(text)


@given(st.text())
def test_normalised_text_comes_back(text: str) -> None:
    # Characters that this Python does not know, it cannot normalise.
    text = "".join(c for c in text if unicodedata.category(c) != "Cn")
    text = unicodedata.normalize("NFKC", text)
    tokenizer = TOKENIZERS["nfkc"]
    assert tokenizer.decode(tokenizer.encode(text)) == folded(text)


@given(st.lists(st.integers(0, SIZE - 1)))
def test_any_ids_decode_to_unicode(ids: list[int]) -> None:
    USUAL.decode(ids).encode()
    assert len(USUAL.pieces(ids)) == len(ids)


def test_decoding_skips_special_ids_and_mends_broken_bytes() -> None:
    ids = USUAL.encode("the cat")
    assert USUAL.decode([2, *ids[:1], 0, *ids[1:], 3, 0, 0]) == "the cat"
    broken = USUAL.encode("😀")[:-1]
    assert set(USUAL.decode(broken).strip()) == {"\ufffd"}


BYTE_IDS = {int(p[3:-1], 16): i for i, p in enumerate(USUAL.pieces(range(SIZE))) if "<0x" in p}
# Whole characters, and all ways to be none: cut, overlong, surrogates, beyond Unicode.
CHARACTERS = [
    *(c.encode() for c in "aé가😀\u0301\U0010ffff\0 \u2581"), b"\xc0\x80", b"\xe0\x80\x80",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff", b"\x80", b"\xf0\x9f",
]  # fmt: skip
some_ids = st.lists(st.integers(4, SIZE - 1), max_size=3) | st.sampled_from(CHARACTERS).map(
    lambda given: [BYTE_IDS[byte] for byte in given]
)


def test_every_byte_has_a_piece() -> None:
    assert sorted(BYTE_IDS) == list(range(256))


@settings(max_examples=250)
@pytest.mark.parametrize("tokenizer", [USUAL, AS_IT], ids=["nmt_nfkc", "as it stands"])
@given(ids=st.lists(some_ids, max_size=6).map(lambda parts: [i for part in parts for i in part]))
def test_settled_ids_have_a_text_that_no_further_id_changes(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    text, before = tokenizer.decode(ids), 0
    assert not text.startswith(" ")
    for n in range(len(ids) + 1):
        settled = tokenizer.settled(ids[:n])
        assert n - 3 <= settled <= n
        assert settled >= before
        assert text.startswith(tokenizer.decode(ids[:settled]))
        before = settled


def test_bytes_settle_when_their_character_is_whole() -> None:
    ids = USUAL.encode("the ö😀")
    first = len(ids) - 6
    counts = [USUAL.settled(ids[:n]) for n in range(len(ids) + 1)]
    assert counts == [*range(first + 1), first, *[first + 2] * 4, first + 6]
    assert USUAL.settled([*ids[:first], *USUAL.encode("a")]) == first + len(USUAL.encode("a"))


@pytest.mark.parametrize("wrong", [-1, SIZE, 10**9, 10**30])
def test_ids_outside_the_vocabulary_are_named(wrong: int) -> None:
    for use in (USUAL.decode, USUAL.pieces):
        with pytest.raises(ValueError, match=f"got {wrong}; allowed: 0 to {SIZE - 1}"):
            use([5, wrong])


def test_models_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.model: cannot be read: No such file"):
        Tokenizer(tmp_path / "no.model")
    (tmp_path / "empty.model").touch()
    with pytest.raises(ValueError, match=r"empty\.model: is empty"):
        Tokenizer(tmp_path / "empty.model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(MODELS["nfkc"][:1000])


@given(st.binary(max_size=50))
def test_any_bytes_are_a_model_or_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="the tokenizer: "):
        Tokenizer(content)


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("joint", [False, True])
def test_learning_twice_gives_the_same_bytes_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], algorithm: str, joint: bool
) -> None:
    options = TokenizerOptions(
        algorithm=algorithm,
        joint=joint,
        source_vocabulary=SIZE,
        target_vocabulary=SIZE,  # type: ignore[arg-type]
        target_normalization="nmt_nfkc",
    )
    for folder in ("a", "b"):
        reverse = (line[::-1] for line in TEXT)
        train_tokenizers(options, iter(TEXT), reverse, len(TEXT), tmp_path / folder)
    a, b = (
        [(tmp_path / f / f"{s}.model").read_bytes() for s in ("source", "target")] for f in "ab"
    )
    assert a == b
    assert (a[0] == a[1]) == joint
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["source.model", "target.model"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_a_joint_vocabulary_has_the_normalisation_of_each_side(
    tmp_path: Path, algorithm: str
) -> None:
    text = [*TEXT, "（茶）  m² น้ำ"]
    size = 297
    options = TokenizerOptions(
        algorithm=algorithm, joint=True, source_vocabulary=size, target_vocabulary=size  # type: ignore[arg-type]
    )
    train_tokenizers(options, iter(text), iter(text), len(text), tmp_path)
    source, target = (Tokenizer(tmp_path / f"{side}.model") for side in ("source", "target"))
    assert source.pieces(range(size)) == target.pieces(range(size))
    assert source.normalised(text[-1]) == "(茶) m2 น้ํา"
    assert source.decode(source.encode(text[-1])) == source.normalised(text[-1])
    assert target.decode(target.encode(text[-1])) == text[-1]
    assert min(target.encode(text[-1])) > 3 + 256  # its characters are pieces, not bytes


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_text_that_is_normalised_before_gives_the_same_pieces(
    algorithm: str, rule: Normalization
) -> None:
    text = [*TEXT, "（tea）  m² น้ำ", "a\u200bb c"]
    options = TokenizerOptions(algorithm=algorithm)  # type: ignore[arg-type]
    direct = learn(options, 292, text, "source_vocabulary", rule)
    before = learn(options, 292, map(rule, text), "source_vocabulary", AS_IT_STANDS)
    one, other = Tokenizer(direct), Tokenizer(rule.put_into(before))
    assert one.pieces(range(292)) == other.pieces(range(292))
    for line in text:
        assert one.encode(line) == other.encode(line)


@given(st.text("ab1２ \u200bｶﾞ가e\u0301\u1100\u1161", max_size=60), st.integers(1, 8))
def test_what_is_dropped_as_too_long_has_more_tokens(text: str, most: int) -> None:
    for tokenizer in LONG.values():
        if too_long(text, most):
            assert len(tokenizer.encode(text)) > most


def test_digits_are_single_pieces_and_long_lines_are_read() -> None:
    text = ["2021 2021 2022"] * 5 + ["가" * 3000 + "나"]
    tokenizer = Tokenizer(learn(TokenizerOptions(), 267, text, "source_vocabulary"))
    assert tokenizer.pieces(tokenizer.encode("2021 나")) == ["▁", *"2021", "▁", "나"]


@given(st.integers(0, 300), st.integers(1, 40))
def test_too_much_text_is_sampled_evenly(count: int, most: int) -> None:
    sampled = [int(line) for line in spread(map(str, range(count)), count, most)]
    assert len(sampled) == min(count, most)
    assert sampled == sorted(set(sampled))
    steps = {b - a for a, b in itertools.pairwise(sampled)}
    assert steps <= {max(count // most, 1), -(-count // most)}


@pytest.mark.parametrize(
    ("joint", "most", "learnt"),
    [
        (False, 8, ["abcd", "wxyz"]),
        (False, 2, ["ac", "wy"]),
        (False, 1, ["a", "w"]),
        (True, 8, ["abcdwxyz"]),
        (True, 4, ["acwy"]),
    ],
)
def test_each_vocabulary_is_learnt_from_so_many_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joint: bool, most: int, learnt: list[str]
) -> None:
    given: list[str] = []

    def recorded(
        options: TokenizerOptions, size: int, lines: Iterable[str], option: str, rule: object
    ) -> bytes:
        given.append("".join(lines))
        return MODELS["nmt_nfkc"]

    monkeypatch.setattr(training.tokenizer, "learn", recorded)
    options = TokenizerOptions(
        joint=joint, training_sentences=most, target_normalization="nmt_nfkc"
    )
    train_tokenizers(options, "abcd", "wxyz", 4, tmp_path)
    assert given == learnt
    assert (tmp_path / "target.model").read_bytes() == MODELS["nmt_nfkc"]


def test_many_lines_are_encoded_as_each_is(tmp_path: Path) -> None:
    texts = [*TEXT, "", " ", "😀 a\0b", "\u2028", "x" * 5000, "שלום עולם", "\U0010ffff"]
    for name, model in MODELS.items():
        (tmp_path / name).write_bytes(model)
        encode = encoder(tmp_path / name)
        assert encode(texts) == [TOKENIZERS[name].encode(text) for text in texts]
        assert encode([]) == []


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("text", [["a"], TEXT, ["一二三四", "東京 タワー"]])
def test_sizes_that_the_text_allows(
    algorithm: str, byte_fallback: bool, text: Sequence[str]
) -> None:
    """The smallest is named; of more pieces than there are, all are taken."""
    options = TokenizerOptions(algorithm=algorithm, byte_fallback=byte_fallback)  # type: ignore[arg-type]
    largest = Tokenizer(learn(options, 90000, text, "target_vocabulary")).size
    with pytest.raises(
        CorpusError, match=r"tokenizer\.source_vocabulary: got 5; .*allowed: at least \d+$"
    ) as low:
        learn(options, 5, text, "source_vocabulary")
    smallest = int(str(low.value).split()[-1])
    assert smallest <= largest
    for size in {smallest, largest}:
        assert Tokenizer(learn(options, size, text, "source_vocabulary")).size == size


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CorpusError("a: line 7: is bad")])
def test_what_stops_the_reading_of_lines_is_told_as_it_is(error: BaseException) -> None:
    def stopping() -> Iterator[str]:
        yield from TEXT
        raise error

    with pytest.raises(type(error)) as told:
        learn(TokenizerOptions(), SIZE, stopping(), "source_vocabulary")
    assert told.value is error


@pytest.mark.parametrize("text", [[], [""], [" ", "\u2028"]])
def test_no_text_is_an_error(text: list[str]) -> None:
    with pytest.raises(CorpusError, match="no line to learn from"):
        learn(TokenizerOptions(), SIZE, text, "source_vocabulary")


def test_a_failure_that_no_size_explains_is_one_of_its_own() -> None:
    draw = random.Random(3)
    picture = base64.b64encode(draw.randbytes(112_500)).decode()  # one word of 150,000 characters
    with pytest.raises(Unlearnable, match=r"cannot learn from the training text: .*isfinite"):
        learn(TokenizerOptions(), 340, [*TEXT[:2] * 300, picture], "source_vocabulary")


def test_the_handler_needs_nothing_but_sentencepiece() -> None:
    source = Path(sys.modules["handler.tokenizer"].__file__ or "").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (model|training|torch)\b", source, re.MULTILINE)
