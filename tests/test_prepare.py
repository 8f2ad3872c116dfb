"""The verb prepare on small text of its own: what it leaves, what it refuses, that it repeats."""

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

import training.prepare
import training.tokens
from handler.tokenizer import Tokenizer
from model import ModelOptions
from training.corpus import CorpusError, lines
from training.prepare import prepare
from training.recipe import (
    CleaningOptions,
    DataOptions,
    FilesOptions,
    Recipe,
    TokenizerOptions,
)
from training.tokens import TokenPairs

LEFT = [
    "report.json", "test.source", "test.target", "train.tokens", "validation.source",
    "validation.target", "validation.tokens",
]  # fmt: skip
TRAIN = FilesOptions(source="train.a", target="train.b")
GIVEN = {
    "validation": FilesOptions(source="validation.a", target="validation.b"),
    "test": FilesOptions(tsv="test.tsv"),
}


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    words = ["cat", "dog", "sun", "sea", "red", "old", "new", "sees", "eats", "likes"]
    pairs = []
    for _ in range(count):
        source = [rng.choice(words) for _ in range(rng.randint(3, 6))]
        pairs.append((" ".join(source), " ".join(word[::-1] for word in source)))
    return pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text of all three sets; no sentence is in two of them."""
    folder = tmp_path / "text"
    folder.mkdir()
    pairs = [(f"{s} {i}", f"{i} {t}") for i, (s, t) in enumerate(sentences(220, 1))]
    for name, part in (("train", pairs[:200]), ("validation", pairs[200:210])):
        for side, column in (("a", 0), ("b", 1)):
            text = "".join(f"{pair[column]}\n" for pair in part)
            (folder / f"{name}.{side}").write_text(text, encoding="utf-8")
    rows = "".join(f"{s}\t{t}\n" for s, t in pairs[210:])
    (folder / "test.tsv").write_text(rows, encoding="utf-8")
    return folder


def recipe_for(folder: Path, given: bool = True, **data: object) -> Recipe:
    options = DataOptions(
        folder=str(folder), **{"train": TRAIN, **(GIVEN if given else {}), **data}
    )  # type: ignore[arg-type]
    tokenizer = TokenizerOptions(source_vocabulary=288, target_vocabulary=288)
    return Recipe(name="small", data=options, model=ModelOptions(), tokenizer=tokenizer)


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "data" / "report.json").read_text(encoding="utf-8"))


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def append(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        with open(folder / name.replace("_", "."), "a", encoding="utf-8", newline="") as file:
            file.write(text)


def test_given_sets_are_left_as_they_are(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = prepare(recipe_for(folder), run)
    assert sorted(os.listdir(run / "data")) == LEFT
    assert (report.read, report.kept, report.held_out, report.warnings) == (200, 200, {}, [])
    for side in ("a", "b"):
        name = {"a": "source", "b": "target"}[side]
        given = (folder / f"validation.{side}").read_bytes()
        assert (run / "data" / f"validation.{name}").read_bytes() == given
    source, target = (Tokenizer(run / "tokenizer" / f"{s}.model") for s in ("source", "target"))
    pairs = TokenPairs.load(run / "data" / "train.tokens")
    assert len(pairs) == 200
    first = pairs.source_tokens[: pairs.source_offsets[1]].tolist()
    text = next(lines(folder / "train.a"))
    assert first == [*source.encode(text), Tokenizer.EOS]
    last = pairs.target_tokens[pairs.target_offsets[-2] :].tolist()
    assert target.decode(last) == list(lines(folder / "train.b"))[-1]
    assert len(TokenPairs.load(run / "data" / "validation.tokens")) == 10


def test_the_report_names_what_was_read_and_made(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare(recipe_for(folder), run)
    summary = summary_of(run)
    text = (folder / "test.tsv").read_bytes()
    assert summary["sha256"]["text"]["test"] == {"test.tsv": hashlib.sha256(text).hexdigest()}
    model = (run / "tokenizer" / "source.model").read_bytes()
    assert summary["sha256"]["tokenizer"]["source.model"] == hashlib.sha256(model).hexdigest()
    assert summary["training_pairs"]["kept"] == 200
    assert summary["recipe"]["tokenizer"]["source_vocabulary"] == 288
    assert str(tmp_path) not in json.dumps(summary)


def test_the_size_of_the_parts_that_are_held_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(recipe_for(folder), tmp_path / "a")
    for module in (training.prepare, training.tokens):
        monkeypatch.setattr(module, "CHUNK", 7)
    prepare(recipe_for(folder), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_preparing_twice_gives_the_same_bytes(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(folder, given=False, held_out=20)
    prepare(recipe, tmp_path / "a")
    first = contents(tmp_path / "a")
    prepare(recipe, tmp_path / "a")
    prepare(recipe, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == first
    assert capfd.readouterr() == ("", "")


def test_byte_order_marks_and_crlf_change_nothing(folder: Path, tmp_path: Path) -> None:
    prepare(recipe_for(folder), tmp_path / "a")
    for path in folder.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    prepare(recipe_for(folder), tmp_path / "b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert [name for name in a if a[name] != b[name]] == ["data/report.json"]


def test_missing_sets_are_held_out(folder: Path, tmp_path: Path) -> None:
    append(folder, train_a="cat 1\nCAT 2\n" * 3, train_b="tac 1\n2 TAC\nother 1\nother 2\nx\ny\n")
    run = tmp_path / "run"
    report = prepare(recipe_for(folder, given=False, held_out=20), run)
    assert report.held_out == {"test": 20, "validation": 20}
    assert report.read == 206 == report.kept + 40 + sum(report.dropped.values())
    tokenizer = Tokenizer(run / "tokenizer" / "source.model")
    pairs = TokenPairs.load(run / "data" / "train.tokens")
    offsets = pairs.source_offsets.tolist()
    train = {
        tokenizer.decode(pairs.source_tokens[a:b].tolist()) for a, b in itertools.pairwise(offsets)
    }
    held = [list(lines(run / "data" / f"{name}.source")) for name in ("validation", "test")]
    assert [len(set(texts)) for texts in held] == [20, 20]
    assert not set(held[0]) & set(held[1])
    assert not train & {*held[0], *held[1]}


def test_shared_sentences_are_counted(folder: Path, tmp_path: Path) -> None:
    shared = "".join(f"{text}\n" for text in list(lines(folder / "train.a"))[:3])
    append(folder, validation_a=shared, validation_b="x\ny\nz\n")
    report = prepare(recipe_for(folder), tmp_path / "run")
    assert report.warnings == [
        "data.validation: 3 of 13 source sentences occur in data.train too, so scores on it "
        "flatter the model"
    ]
    assert summary_of(tmp_path / "run")["training_pairs"]["warnings"] == report.warnings


def test_repeated_and_contradictory_lines_are_counted(folder: Path, tmp_path: Path) -> None:
    first = next(lines(folder / "train.a"))
    same = next(lines(folder / "train.b"))
    append(folder, train_a=f"{first}\n" * 5, train_b=f"{same}\nan other\na new\n{same}\nan other\n")
    report = prepare(recipe_for(folder), tmp_path / "run")
    assert (report.read, report.kept, report.dropped["duplicate"]) == (205, 202, 3)
    assert report.warnings == [
        "data.train: 2 pairs translate a source that came before otherwise; they are kept"
    ]
    assert summary_of(tmp_path / "run")["training_pairs"]["warnings"] == report.warnings


def test_noise_is_dropped_by_length_ratio_and_counted(folder: Path, tmp_path: Path) -> None:
    noise = [(f"{i} sun", "nus " * 30 + str(i)) for i in range(43)]
    noise += [("sea " * 30 + str(i), f"{i} aes") for i in range(43)]  # 86 of 286: 30 %
    append(folder, **{
        f"train_{side}": "".join(f"{pair[column]}\n" for pair in noise)
        for side, column in (("a", 0), ("b", 1))
    })  # fmt: skip
    report = prepare(recipe_for(folder), tmp_path / "run")
    assert (report.read, report.kept) == (286, 200)
    assert {reason: n for reason, n in report.dropped.items() if n} == {"length ratio": 86}
    assert len(TokenPairs.load(tmp_path / "run" / "data" / "train.tokens")) == 200
    assert "dropped: length ratio" in report.table()


SCRIPTS = {  # letters, and what is between words
    "Hebrew": ("אבגדהוזחטיכלמנסעפצקרשת", " "),
    "Arabic": ("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", " "),
    "Thai": ("กขคงจชซดตถทนบปผพฟมยรลวสหอ", ""),
    "Japanese": ("日月火水木金土山川田人口車門雨東京大小中", ""),
    "Korean": ("가나다라마바사아자차카타파하", " "),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_script_comes_back_from_its_tokens(tmp_path: Path, script: str) -> None:
    letters, space = SCRIPTS[script]
    rng = random.Random(1)
    words = ["".join(rng.choices(letters, k=rng.randint(2, 4))) for _ in range(40)]
    text = [space.join(rng.choices(words, k=rng.randint(3, 8))) for _ in range(400)]
    # What right-to-left text has: a mark of direction, Latin and digits in between.
    text[0] = f"{words[0]}\u200f (abc 12){space}{words[1]}"
    rows = "".join(f"{i} {line}\tline {i}\n" for i, line in enumerate(text))
    (tmp_path / "all.tsv").write_text(rows, encoding="utf-8")
    recipe = recipe_for(tmp_path, given=False, train=FilesOptions(tsv="all.tsv"), held_out=20)
    tokenizer = TokenizerOptions(source_vocabulary=320, target_vocabulary=275)
    recipe = dataclasses.replace(
        recipe, tokenizer=tokenizer, cleaning=CleaningOptions(max_length_ratio=100)
    )
    report = prepare(recipe, tmp_path / "run")
    assert (report.read, report.kept) == (400, 360)
    source = Tokenizer(tmp_path / "run" / "tokenizer" / "source.model")
    pairs = TokenPairs.load(tmp_path / "run" / "data" / "train.tokens")
    again = [
        source.decode(pairs.source_tokens[a:b].tolist())
        for a, b in itertools.pairwise(pairs.source_offsets.tolist())
    ]
    held = [
        line
        for name in ("validation", "test")
        for line in lines(tmp_path / "run" / "data" / f"{name}.source")
    ]
    whole = [f"{i} {line}".replace("\u200f", "") for i, line in enumerate(text)]
    assert sorted(again + [line.replace("\u200f", "") for line in held]) == sorted(whole)
    assert len(pairs.source_tokens) < sum(map(len, again))  # pieces, not characters or bytes


TARGETS = {  # what nmt_nfkc makes of texts that readers get
    "（茶）、奶，是吗？": "(茶)、奶,是吗?",
    "می‌بینم کتاب‌ها": "می بینم کتاب ها",
    "12 m² ½杯 ™": "12 m2 1⁄2杯 TM",
    "茶 ㅋㅋ ㅠㅠ": "茶 ᄏᄏ ᅲᅲ",
    "茶 👨‍👩‍👧 ❤️‍🔥": "茶 👨‍👩‍👧 ❤️‍🔥",
    "น้ำดำ": "น้ําดํา",
    unicodedata.normalize("NFD", "řezba žlutý"): "řezba žlutý",
    "a  b\tc": "a b c",
}


def of_targets(folder: Path, **tokenizer: object) -> Recipe:
    """A recipe whose 10 references and 90 other targets are `TARGETS` with a number."""
    texts = list(TARGETS)
    rows = "".join(f"line {i} of all\t{texts[i % len(texts)]} {i}\n" for i in range(100))
    (folder / "all.tsv").write_text(rows, encoding="utf-8")
    recipe = recipe_for(folder, given=False, train=FilesOptions(tsv="all.tsv"), held_out=10)
    options = TokenizerOptions(
        algorithm="bpe", source_vocabulary=280, target_vocabulary=340, **tokenizer
    )  # type: ignore[arg-type]
    return dataclasses.replace(
        recipe, tokenizer=options, cleaning=CleaningOptions(max_length_ratio=100)
    )


@pytest.mark.parametrize("joint", [False, True])
def test_targets_are_written_as_they_stand(tmp_path: Path, joint: bool) -> None:
    recipe = of_targets(tmp_path)
    if joint:
        both = dataclasses.replace(recipe.tokenizer, joint=True, source_vocabulary=340)
        recipe = dataclasses.replace(recipe, tokenizer=both)
    report = prepare(recipe, tmp_path / "run")
    assert report.warnings == []
    target = Tokenizer(tmp_path / "run" / "tokenizer" / "target.model")
    references = list(lines(tmp_path / "run" / "data" / "test.target"))
    assert [target.decode(target.encode(one)) for one in references] == references
    counted = summary_of(tmp_path / "run")["targets"]
    assert {name: (one["targets"], one["changed"]) for name, one in counted.items()} == {
        "train": (80, 0), "validation": (10, 0), "test": (10, 0),
    }  # fmt: skip


def test_what_normalisation_changes_in_targets_is_counted_and_shown(tmp_path: Path) -> None:
    recipe = of_targets(tmp_path, target_normalization="nmt_nfkc")
    report = prepare(recipe, tmp_path / "run")
    counted = summary_of(tmp_path / "run")["targets"]
    target = Tokenizer(tmp_path / "run" / "tokenizer" / "target.model")
    for name in ("validation", "test"):
        references = list(lines(tmp_path / "run" / "data" / f"{name}.target"))
        can = sum(target.decode(target.encode(one)) == one for one in references)
        assert (counted[name]["targets"], counted[name]["changed"]) == (10, 10 - can)
    train = {key: one for key, one in counted["train"].items() if key in ("targets", "changed")}
    assert train == {"targets": 80, "changed": 69}
    assert 0 < counted["train"]["composed"] < 20
    assert counted["train"]["characters"]["\u200c"] > 5
    told = {one.split(":")[0]: one for one in report.warnings}
    assert set(told) == {"data.train", "data.validation", "data.test"}
    first, *examples = told["data.train"].split("\n  ")
    assert "69 of 80 targets cannot be written as they stand" in first
    assert "tokenizer.target_normalization: nmt_nfkc" in first
    assert "U+200C ZERO WIDTH NON-JOINER (" in first
    assert len(examples) == 6
    before, after = counted["train"]["examples"][0]
    assert after == TARGETS[before.rpartition(" ")[0]] + before[before.rindex(" ") :]
    assert "of 10 references cannot be written" in told["data.test"]


def test_characters_that_are_no_pieces_cannot_be_written_without_bytes(tmp_path: Path) -> None:
    recipe = of_targets(tmp_path)
    rows = (tmp_path / "all.tsv").read_text(encoding="utf-8")
    (tmp_path / "all.tsv").write_text(rows + "one\tseldom ☃\n", encoding="utf-8")
    options = dataclasses.replace(
        recipe.tokenizer, byte_fallback=False, character_coverage=0.98, source_vocabulary=20,
        target_vocabulary=60,
    )  # fmt: skip
    prepare(dataclasses.replace(recipe, tokenizer=options), tmp_path / "run")
    counted = summary_of(tmp_path / "run")["targets"]
    assert sum(one["characters"].get("☃", 0) for one in counted.values()) == 1


def picture(length: int) -> str:
    return base64.b64encode(random.Random(3).randbytes(length)).decode()[:length]


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_line_that_is_dropped_for_its_length_changes_no_tokenizer(
    folder: Path, tmp_path: Path, algorithm: str, side: str
) -> None:
    options = TokenizerOptions(algorithm=algorithm, source_vocabulary=288, target_vocabulary=288)  # type: ignore[arg-type]
    recipe = dataclasses.replace(recipe_for(folder), tokenizer=options)
    prepare(recipe, tmp_path / "without")
    texts = {f"train_{one}": "picture\n" for one in "ab"}
    texts[f"train_{side}"] = f"{picture(150_000)}\n"
    append(folder, **texts)
    report = prepare(recipe, tmp_path / "with")
    assert (report.read, report.kept, report.dropped["too long"]) == (201, 200, 1)
    changed = {
        name for name, content in contents(tmp_path / "with").items()
        if contents(tmp_path / "without")[name] != content
    }  # fmt: skip
    assert changed == {"data/report.json"}


def test_a_line_that_breaks_the_tokenizers_training_is_named(folder: Path, tmp_path: Path) -> None:
    text = "the cat sat on the mat\nthe dog sat on the cat\n" * 300
    for side, line in (("a", picture(150_000)), ("b", "picture")):
        (folder / f"train.{side}").write_text(f"{text}{line}\n", encoding="utf-8")
    cleaning = CleaningOptions(max_tokens=10**6, drop_duplicates=False)
    recipe = dataclasses.replace(
        recipe_for(folder), cleaning=cleaning, tokenizer=TokenizerOptions(source_vocabulary=340)
    )
    told = r"isfinite.*; its longest line is .*train\.a: line 601, of 150,000 characters: leave"
    with pytest.raises(CorpusError, match=told):
        prepare(recipe, tmp_path / "run")


def test_held_out_sentences_are_ones_that_can_be_decoded(folder: Path, tmp_path: Path) -> None:
    """A line that no model reads is not chosen, whatever its digest."""
    append(folder, train_a="".join(f"{i} {picture(2000)}\n" for i in range(50)),
           train_b="".join(f"picture {i}\n" for i in range(50)))
    report = prepare(recipe_for(folder, given=False, held_out=20), tmp_path / "run")
    assert report.dropped["too long"] == 50
    assert max(map(len, lines(tmp_path / "run" / "data" / "test.source"))) < 100


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize(
    ("joint", "asked"), [(False, (5000, 288)), (False, (288, 5000)), (True, (5000, 5000))]
)
def test_a_vocabulary_too_large_is_lowered_and_told(
    folder: Path, tmp_path: Path, algorithm: str, joint: bool, asked: tuple[int, int]
) -> None:
    options = TokenizerOptions(
        algorithm=algorithm,  # type: ignore[arg-type]
        joint=joint, source_vocabulary=asked[0], target_vocabulary=asked[1],
    )  # fmt: skip
    recipe = dataclasses.replace(recipe_for(folder), tokenizer=options)
    report = prepare(recipe, tmp_path / "run")
    sizes = [
        Tokenizer(tmp_path / "run" / "tokenizer" / f"{side}.model").size
        for side in ("source", "target")
    ]
    assert report.warnings == [
        f"tokenizer.{side}_vocabulary: 5000 pieces asked for; the training text has no more than "
        f"{size}"
        for side, size, wanted in zip(("source", "target"), sizes, asked)
        if wanted == 5000
    ]
    assert all(size == wanted or 256 < size < 5000 for size, wanted in zip(sizes, asked))
    assert not joint or sizes[0] == sizes[1]


def test_small_text_needs_one_try(folder: Path, tmp_path: Path) -> None:
    """With the sizes that a recipe has where it names none."""
    recipe = recipe_for(folder, given=False)
    recipe = dataclasses.replace(recipe, tokenizer=TokenizerOptions())
    report = prepare(recipe, tmp_path / "run")
    assert report.held_out == {"test": 20, "validation": 20}
    assert report.kept == 160
    assert [warning.split(":")[0] for warning in report.warnings] == [
        "data.held_out", "tokenizer.source_vocabulary", "tokenizer.target_vocabulary"
    ]  # fmt: skip
    assert "1000 asked for" in report.warnings[0]
    assert "20 are held out for test and validation" in report.warnings[0]


def test_only_training_text_is_cleaned(folder: Path, tmp_path: Path) -> None:
    bad = {
        "a": "sun sun sun sun sun sun sun sun sun\nold\n\n",
        "b": "nus\n" + "dlo " * 60 + "\nx\n",
    }
    append(folder, train_a=bad["a"], train_b=bad["b"])
    append(folder, validation_a=bad["a"][:-1], validation_b=bad["b"][:-2])
    recipe = dataclasses.replace(recipe_for(folder), cleaning=CleaningOptions(max_tokens=50))
    report = prepare(recipe, tmp_path / "run")
    assert (report.read, report.kept) == (203, 200)
    assert {k: n for k, n in report.dropped.items() if n} == {
        "empty": 1, "too long": 1, "length ratio": 1,
    }  # fmt: skip
    assert len(TokenPairs.load(tmp_path / "run" / "data" / "validation.tokens")) == 12


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.a", b"ok\n\xff\n", "train.a: line 2: byte 0xff at offset 3 "),
        ("train.b", b"", "train.b: is empty"),
        ("train.a", b"one line\n", r"train.a \(1 lines\) and .*train.b \(200 lines\)"),
        ("validation.b", b"", "validation.b: is empty"),
        ("validation.a", b"x\n" * 9 + b" \n", "validation.a: line 10: the source is empty"),
        ("test.tsv", b"a\tb\na\n", "test.tsv: line 2: got 1 columns"),
        ("test.tsv", b"a\tb\na\t\n", "test.tsv: line 2: the target is empty"),
        ("test.tsv", b"a\tb\na\tb\0b\n", "test.tsv: line 2: has a NUL character"),
        ("train.a", b" \n" * 200, "no pair is left to train on\npairs read +200\ndropped: empty"),
    ],
)
def test_bad_text_is_named_and_leaves_nothing_half_done(
    folder: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    run = tmp_path / "run"
    prepare(recipe_for(folder), run)
    (folder / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        prepare(recipe_for(folder), run)
    assert sorted(os.listdir(run / "data")) == LEFT[1:]


def test_a_corpus_of_one_line_is_too_small(folder: Path, tmp_path: Path) -> None:
    (folder / "train.a").write_text("one\n", encoding="utf-8")
    (folder / "train.b").write_text("eins\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"train: has 1 distinct source .* at least 3, as test"):
        prepare(recipe_for(folder, given=False), tmp_path / "run")


def test_nothing_left_by_length_is_an_error(folder: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe_for(folder), cleaning=CleaningOptions(max_tokens=1))
    with pytest.raises(CorpusError, match=r"no pair is left .*\n.*\ndropped: too long +200"):
        prepare(recipe, tmp_path / "run")


def test_an_interrupted_run_is_not_complete(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    prepare(recipe_for(folder), run)
    whole = contents(run)
    for function in ("split", "train_tokenizers", "fit", "summarise"):
        with monkeypatch.context() as patched:
            patched.setattr(training.prepare, function, interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(recipe_for(folder), run)
        assert sorted(os.listdir(run / "data")) == LEFT[1:]
    (run / "data" / ".partial" / "generated").mkdir(parents=True)  # what a killed run leaves
    prepare(recipe_for(folder), run)
    assert contents(run) == whole


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_dates_need_no_text(tmp_path: Path) -> None:
    data = DataOptions(generator="dates", held_out=10_000)
    tokenizer = TokenizerOptions(source_vocabulary=500, target_vocabulary=272)
    recipe = Recipe(name="dates", data=data, model=ModelOptions(), tokenizer=tokenizer)
    report = prepare(recipe, tmp_path / "run")
    assert report.kept == report.read > 10_000
    assert len(list(lines(tmp_path / "run" / "data" / "test.source"))) == 10_000
    assert set(summary_of(tmp_path / "run")["sha256"]["text"]["train"]) == {
        "train.source", "train.target",
    }  # fmt: skip
    recipe = dataclasses.replace(recipe, data=DataOptions(generator="dates", held_out=10_001))
    with pytest.raises(CorpusError, match=r"data\.held_out must be 1 to 10000, not 10001"):
        prepare(recipe, tmp_path / "run")
