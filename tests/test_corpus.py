"""Reading and cleaning parallel text: every bad file is named, every pair is accounted for."""

import base64
import bz2
import gzip
import lzma
import random
import shutil
import subprocess
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.corpus import (
    CorpusError,
    Pair,
    Report,
    Seen,
    choose_held_out,
    clean,
    junk,
    key,
    lines,
    misfit,
    read,
)
from training.recipe import CleaningOptions, FilesOptions

BOTH = FilesOptions(source="a", target="b")
ANY = CleaningOptions()
TSV = FilesOptions(tsv="t", source_column=3, target_column=1)


def written(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\n\n", ["", ""]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"one\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
        (
            "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\rh\n".encode(),
            ["a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\rh"],
        ),
        (b" a\0b \n", [" a\0b "]),
    ],
)
def test_only_newlines_end_lines(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    assert list(lines(written(tmp_path, a=content) / "a")) == expected


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"one\ntw\xff\n", "line 2: byte 0xff at offset 6 "),
        (b"\xef\xbb\xbf\x80", "line 1: byte 0x80 at offset 3 "),
        (b"\n\n\xed\xa0\x80\n", "line 3: byte 0xed at offset 2 "),  # a surrogate
    ],
)
def test_invalid_utf8_is_located(tmp_path: Path, content: bytes, place: str) -> None:
    path = written(tmp_path, a=content) / "a"
    with pytest.raises(CorpusError) as error:
        list(lines(path))
    assert str(error.value).startswith(f"{path}: {place}of the file is not UTF-8")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nothing: no such file$"):
        list(lines(tmp_path / "nothing"))
    with pytest.raises(CorpusError, match=r"cannot be read: Is a directory$"):
        list(lines(tmp_path))
    with pytest.raises(CorpusError, match=r"a: is empty; allowed: one sentence a line$"):
        list(lines(written(tmp_path, a=b"") / "a"))


ENGLISH = "the cat sat on the mat\na dog sees 12 birds\n" * 40


@pytest.mark.parametrize(
    ("encoding", "text", "named"),
    [
        ("utf-16", ENGLISH, "UTF-16"),
        ("utf-16-le", ENGLISH, "UTF-16LE"),
        ("utf-16-be", ENGLISH, "UTF-16BE"),
        ("utf-16-le", "今日はいい天気ですね。\n" * 40, "UTF-16LE"),
        ("utf-32", ENGLISH, "UTF-32"),
        ("utf-32-be", ENGLISH, "UTF-32BE"),
        ("latin-1", "un café à l'été\nnaïve façade\n" * 40, "CP1252"),
        ("latin-1", ENGLISH * 500 + "café\n" + ENGLISH * 500, "CP1252"),
        ("gb18030", "我看见四十五个人，是吗？\n今天天气很好\n" * 40, "GB18030"),
        ("shift_jis", "今日はいい天気ですね。\n明日も晴れるでしょう\n" * 40, "CP932"),
        ("koi8-r", "Сегодня хорошая погода\nзавтра тоже\n" * 40, "KOI8-R"),
    ],
)
def test_other_encodings_are_named_with_the_way_to_convert_them(
    tmp_path: Path, encoding: str, text: str, named: str
) -> None:
    path = written(tmp_path, a=text.encode(encoding)) / "a"
    with pytest.raises(CorpusError) as error:
        list(lines(path))
    command = f"iconv -f {named} -t UTF-8 {path} > {path}.utf8"
    assert str(error.value).endswith(command)
    if shutil.which("iconv"):
        subprocess.run(command, shell=True, check=True)
        assert "\n".join(lines(tmp_path / "a.utf8")) + "\n" == text


def test_one_line_in_another_encoding_is_not_the_file_s(tmp_path: Path) -> None:
    content = "un café\n".encode() * 40 + "un café\n".encode("latin-1")
    with pytest.raises(CorpusError, match=r"line 41: byte 0xe9 .*: mend that line, or leave"):
        list(lines(written(tmp_path, a=content) / "a"))


def test_lines_that_end_with_cr_alone_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"a: its lines end with CR alone; .* tr '.r' '.n' < "):
        list(lines(written(tmp_path, a=b"one\rtwo\rthree\r") / "a"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.gz", gzip.compress(b"one\ntwo\n"), "is gzip; .* gzip -dk "),
        ("a.xz", lzma.compress(b"one\n"), "is xz; .* xz -dk "),
        ("a.bz2", bz2.compress(b"one\n"), "is bzip2; .* bzip2 -dk "),
        ("a.zip", b"PK\x03\x04\x14\0\0\0", "is zip, or an office document; "),
        ("a.parquet", b"PAR1\x15\x04\0", "is Parquet; .*training.md"),
        ("a.tmx", b'<?xml version="1.0"?>\n<tmx version="1.4">\n', "is TMX; .*training.md"),
        ("a.xlf", '\ufeff<?xml version="1.0"?><xliff>'.encode(), "is XLIFF; .*training.md"),
        ("a.tmx", '<?xml version="1.0"?>\n<tmx>\n'.encode("utf-16"), "is TMX; .*training.md"),
        ("a.jsonl", b'{"source": "one", "target": "eins"}\n', "is JSON; .*training.md"),
        ("a.json", b"[\n  {", "is JSON; .*training.md"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=rf"{name}: {told}"):
        list(lines(tmp_path / name))


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "PAR1", "BZh", "PK\x03\x04", "<seg>", "a <tmx> is", "%PDF"]
)
def test_text_that_begins_like_another_format_is_text(tmp_path: Path, text: str) -> None:
    assert list(lines(written(tmp_path, a=f"{text}\n".encode()) / "a")) == [text]


def test_white_space_and_byte_order_marks_at_the_ends_are_no_part_of_a_sentence(
    tmp_path: Path,
) -> None:
    folder = written(tmp_path, a="\ufeffone \n two\t\n\ufeffthree".encode(), b=b"1\n2\x0c\n3\r\n")
    assert list(read(BOTH, folder)) == [("one", "1"), ("two", "2"), ("three", "3")]


def test_pairs_of_two_files(tmp_path: Path) -> None:
    folder = written(tmp_path, a=b"one\r\n\r\nthree", b=b"eins\n\ndrei\n")
    assert list(read(BOTH, folder)) == [("one", "eins"), ("", ""), ("three", "drei")]


@pytest.mark.parametrize(("a", "b"), [(3, 1), (1, 3), (2, 1), (1, 2)])
def test_differing_line_counts_name_both_files(tmp_path: Path, a: int, b: int) -> None:
    folder = written(tmp_path, a=b"x\n" * a, b=b"y\n" * b)
    with pytest.raises(CorpusError) as error:
        list(read(BOTH, folder))
    assert f"{folder / 'a'} ({a} lines) and {folder / 'b'} ({b} lines) differ" in str(error.value)


def test_pairs_of_a_tsv(tmp_path: Path) -> None:
    folder = written(tmp_path, t="1\t\u2028\t3\r\n\n4\t5\t6\t7\n".encode())
    assert list(read(TSV, folder)) == [("3", "1"), ("", ""), ("6", "4")]
    written(folder, t=b"1\t2\t3\n1\t2\n")
    with pytest.raises(CorpusError, match=r"t: line 2: got 2 columns .* allowed: 3 or more"):
        list(read(TSV, folder))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@given(st.binary(), st.binary())
def test_arbitrary_bytes_are_pairs_or_a_corpus_error(scratch: Path, a: bytes, b: bytes) -> None:
    written(scratch, a=a, b=b, t=a + b)
    for files in (BOTH, TSV):
        try:
            pairs = list(read(files, scratch))
        except CorpusError:
            continue
        assert pairs
        assert not any("\n" in text for pair in pairs for text in pair)


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), min_size=1
    )
)
def test_lines_written_are_lines_read(scratch: Path, texts: list[str]) -> None:
    content = "\ufeff" + "".join(f"{text}\n" for text in texts)
    assert list(lines(written(scratch, a=content.encode()) / "a")) == texts


def cleaned(
    pairs: Sequence[tuple[str, str]], held_out: dict[int, str] | None = None, **options: bool
) -> tuple[list[tuple[str, str, str]], Report]:
    held_out = held_out or {}
    report = Report(held_out=dict.fromkeys(held_out.values(), 0))
    out = clean((Pair(*p) for p in pairs), CleaningOptions(**options), held_out, report)  # type: ignore[arg-type]
    return [(name, *pair) for name, _, pair in out], report


def test_empty_sides_and_duplicates_are_dropped() -> None:
    pairs = [("a", "b"), ("", "b"), ("a", " \u200b"), ("a", "b"), ("a", "c")]
    kept, report = cleaned(pairs)
    assert kept == [("train", "a", "b"), ("train", "a", "c")]
    assert report.read == 5
    assert (report.dropped["empty"], report.dropped["duplicate"]) == (2, 1)
    kept, _ = cleaned(pairs, drop_duplicates=False)
    assert len(kept) == 3


def test_pairs_with_a_nul_are_dropped_and_counted() -> None:
    kept, report = cleaned([("a", "b"), ("a\0", "c"), ("d", "\0e"), ("\0", "f")])
    assert kept == [("train", "a", "b")]
    assert (report.dropped["NUL character"], report.dropped["empty"]) == (2, 1)


PICTURE = base64.b64encode(random.Random(3).randbytes(1200)).decode()


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        (PICTURE, True),  # half of its characters need a token, as digits and what is between
        ("word " * 101, True),
        ("word " * 100, False),
        ("1" * 101, True),
        ("字" * 1600, False),
        ("字" * 1601, True),
        (unicodedata.normalize("NFD", "각" * 1600), False),
        (unicodedata.normalize("NFD", "각" * 1601), True),
        ("\u200b" * 2000 + "a", False),
    ],
)
def test_what_is_too_long_for_any_tokenizer_is_dropped_before_there_is_one(
    text: str, dropped: bool
) -> None:
    for pair in ((text, "b"), ("b", text)):
        kept, report = cleaned([pair])
        assert report.dropped["too long"] == int(dropped)
        assert len(kept) == int(not dropped)
        assert (junk(Pair(*pair), ANY) is not None) == dropped


def test_sources_translated_otherwise_are_kept_and_counted() -> None:
    pairs = [("a", "x"), ("b", "x"), ("a", "y"), ("a", "x"), ("a", "z"), ("c", "y"), ("a", "y")]
    # Those that give y and z for a.
    told = "data.train: 2 pairs translate a source that came before otherwise; they are kept"
    for drop_duplicates, count in ((True, 5), (False, 7)):
        kept, report = cleaned(pairs, drop_duplicates=drop_duplicates)
        assert len(kept) == count
        assert report.warnings == [told]
    assert cleaned([("a", "x"), ("a", "x"), ("b", "x")])[1].warnings == []


def test_a_held_out_sentence_comes_once_and_never_in_training() -> None:
    pairs = [("a", "1"), ("b", "1"), ("a ", "2"), ("ａ", "3"), ("c", "1")]
    kept, report = cleaned(pairs, {key("a"): "test", key("c"): "validation"})
    assert kept == [("test", "a", "1"), ("train", "b", "1"), ("validation", "c", "1")]
    assert report.held_out == {"test": 1, "validation": 1}
    assert report.dropped["source held out"] == 2


@given(
    st.lists(st.tuples(st.text("ab ", max_size=3), st.text("xy", max_size=2)), max_size=60),
    st.integers(1, 4),
    st.sampled_from([["test"], ["validation"], ["test", "validation"]]),
)
def test_held_out_sentences_are_disjoint(
    pairs: list[tuple[str, str]], count: int, sets: list[str]
) -> None:
    distinct = {key(s) for s, t in pairs if s.strip() and t.strip()}
    if len(distinct) <= len(sets):
        needed = rf"has {len(distinct)} distinct source .* at least {len(sets) + 1}, as "
        with pytest.raises(CorpusError, match=needed):
            choose_held_out((Pair(*p) for p in pairs), sets, count, ANY)
        return
    asked, count = count, count if len(distinct) > 2 * count else max(1, len(distinct) // 10)
    held_out = choose_held_out((Pair(*p) for p in pairs), sets, asked, ANY)
    assert held_out == choose_held_out((Pair(*p) for p in reversed(pairs)), sets, asked, ANY)
    first = choose_held_out((Pair(*p) for p in pairs), sets[:1], asked, ANY)
    assert first == {k: name for k, name in held_out.items() if name == sets[0]}
    kept, report = cleaned(pairs, held_out)
    sources = {name: [key(s) for n, s, _ in kept if n == name] for name in [*sets, "train"]}
    for name in sets:
        assert len(sources[name]) == len(set(sources[name])) == count == report.held_out[name]
    assert sum(len(set(keys)) for keys in sources.values()) == len(distinct)
    dropped = sum(report.dropped.values()) + sum(report.held_out.values())
    assert report.read == len(pairs) == dropped + len(sources["train"])


@given(st.lists(st.integers(0, 2**128 - 1) | st.integers(0, 50)))
def test_what_was_seen_is_a_set(digests: list[int]) -> None:
    seen, expected = Seen(), set()
    for digest in digests:
        digest = digest & (2**64 - 1) or 1
        assert seen.add(digest) == (digest not in expected)
        expected.add(digest)
    assert seen.count == len(expected)


def test_what_was_seen_grows_in_few_bytes() -> None:
    seen, step = Seen(), 0x9E37_79B9_7F4A_7C15  # odd: its multiples are distinct and well spread
    assert all(seen.add(i * step) for i in range(1, 50_001))
    assert not any(seen.add(i * step) for i in range(1, 50_001))
    assert 12 <= seen.slots.itemsize * len(seen.slots) / seen.count <= 24
    clustered = Seen()
    assert all(clustered.add(i) for i in range(1, 2000))
    assert not any(clustered.add(i) for i in range(1, 2000))


def test_lengths_that_do_not_fit_have_a_reason() -> None:
    options = CleaningOptions(max_tokens=8, max_length_ratio=4.0)
    assert misfit(8, 2, options) is None
    assert misfit(2, 9, options) == "too long"
    assert misfit(1, 5, options) == "length ratio"


def test_the_report_is_a_table() -> None:
    report = Report(read=12345, kept=12000, held_out={"test": 300}, warnings=["mind the gap"])
    report.dropped["empty"] = 45
    assert report.table().splitlines() == [
        "pairs read               12,345",
        "held out for test           300",
        "dropped: empty               45",
        "kept for training        12,000",
        "warning: mind the gap",
    ]
    assert report.as_dict()["dropped"]["duplicate"] == 0
