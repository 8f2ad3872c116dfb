"""Token files: what is written is read, in any number of parts, and what is damaged is named."""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import training.tokens
from model import SpecialTokens
from training.corpus import CorpusError
from training.tokens import HEADER, MAGIC, TokenPairs

SPECIAL = SpecialTokens()
THREE = [([5, 6], [7]), ([8], [9, 10, 11]), ([], [])]
FIELDS = ("source_tokens", "source_offsets", "target_tokens", "target_offsets")

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
pair_lists = st.lists(st.tuples(ids, ids), max_size=20)


def test_sources_end_with_eos_and_targets_are_bare() -> None:
    pairs = TokenPairs.of(THREE, SPECIAL)
    assert pairs.source_tokens.tolist() == [5, 6, 3, 8, 3, 3]
    assert pairs.source_offsets.tolist() == [0, 3, 5, 6]
    assert pairs.target_tokens.tolist() == [7, 9, 10, 11]
    assert pairs.target_offsets.tolist() == [0, 1, 4, 4]
    assert len(pairs) == 3
    assert pairs.source_lengths().tolist() == [3, 2, 1]
    assert pairs.target_lengths().tolist() == [2, 4, 1]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@given(pair_lists, st.integers(1, 7))
def test_what_is_written_is_loaded(
    scratch: Path, content: list[tuple[list[int], list[int]]], chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training.tokens, "CHUNK", chunk)
        path = scratch / "train.tokens"
        assert TokenPairs.write(path, iter(content), SPECIAL) == len(content)
    again, pairs = TokenPairs.load(path), TokenPairs.of(content, SPECIAL)
    assert len(again) == len(content)
    for name in FIELDS:
        assert torch.equal(getattr(again, name), getattr(pairs, name)), name
        assert getattr(again, name).dtype == getattr(pairs, name).dtype


def test_writing_that_fails_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "train.tokens"
    TokenPairs.write(path, THREE, SPECIAL)
    former = path.read_bytes()

    def failing() -> Iterator[tuple[list[int], list[int]]]:
        yield from THREE
        raise CorpusError("line 4: is bad")

    with pytest.raises(CorpusError, match="line 4: is bad"):
        TokenPairs.write(path, failing(), SPECIAL)
    assert os.listdir(tmp_path) == ["train.tokens"]
    assert path.read_bytes() == former


def test_a_loaded_file_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "train.tokens"
    TokenPairs.write(path, THREE, SPECIAL)
    pairs = TokenPairs.load(path)
    TokenPairs.write(path, THREE[:1], SPECIAL)
    assert pairs.source_tokens.tolist() == [5, 6, 3, 8, 3, 3]
    assert TokenPairs.load(path).source_tokens.tolist() == [5, 6, 3]
    assert os.listdir(tmp_path) == ["train.tokens"]


def test_files_that_hold_no_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.tokens"
    with pytest.raises(CorpusError, match=r"train\.tokens: no such token file; run prepare first$"):
        TokenPairs.load(path)
    for raw in (b"", b"text", b"PK\x03\x04" * 100):
        path.write_bytes(raw)
        with pytest.raises(CorpusError, match=r"train\.tokens: not a token file; run prepare"):
            TokenPairs.load(path)
    with pytest.raises(CorpusError, match="cannot be read: Is a directory"):
        TokenPairs.load(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.tokens"
    TokenPairs.write(path, THREE, SPECIAL)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        problem = (
            "not a token file" if size < 8 * HEADER
            else f"cut off or damaged: got {size} bytes; allowed: {len(whole)}, as it tells itself"
        )  # fmt: skip
        with pytest.raises(CorpusError, match=problem):
            TokenPairs.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorpusError, match="cut off or damaged"):
        TokenPairs.load(path)


@pytest.mark.parametrize(
    ("source_offsets", "target_offsets", "wrong"),
    [
        ([0, 2, 1, 3], [0, 1, 1, 4], "source offsets do not fit its 3 source tokens"),
        ([1, 2, 3, 3], [0, 1, 1, 4], "source offsets do not fit its 3 source tokens"),
        ([0, 1, 2, 2], [0, 1, 1, 4], "source offsets do not fit its 3 source tokens"),
        ([0, 1, 2, 3], [0, 1, 1, 5], "target offsets do not fit its 4 target tokens"),
        ([0, 1, 1, 4], [0, 1, 2, 3], "source offsets do not fit its 3 source tokens"),  # swapped
    ],
)
def test_offsets_that_do_not_fit_are_named(
    tmp_path: Path, source_offsets: list[int], target_offsets: list[int], wrong: str
) -> None:
    path = tmp_path / "train.tokens"
    header = array("q", [MAGIC, 3, 3, 4])
    offsets = array("q", source_offsets + target_offsets)
    path.write_bytes(bytes(header) + bytes(offsets) + bytes(array("i", [5] * 7)))
    with pytest.raises(CorpusError, match=rf"train\.tokens: the {wrong}; run prepare again$"):
        TokenPairs.load(path)


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 9), max_size=12))
def test_any_numbers_are_pairs_or_refused(scratch: Path, numbers: list[int]) -> None:
    path = scratch / "any.tokens"
    path.write_bytes(bytes(array("q", [MAGIC, *numbers])))
    try:
        pairs = TokenPairs.load(path)
    except CorpusError:
        return
    assert len(pairs.source_lengths()) == len(pairs.target_lengths()) == len(pairs)
    assert int(pairs.source_lengths().sum()) == len(pairs.source_tokens)
