"""A run is of its recipe and its text, by content: whatever names and times say, verbs make again
what is quick, and refuse what would give up weights or pass one run off as another's."""

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, StraightRuns, Tiny, command, environment, verb

from training import checkpoint
from training.__main__ import main
from training.archive import archived
from training.ensemble import ensemble
from training.recipe import load
from training.run import Run, RunError, only_writer
from training.stages import STAGES, StageOptions, build

MODEL = "embedding_size: 16"
FURTHER = "training:\n"  # of the recipe: where keys of the section begin


@pytest.fixture(scope="module")
def built(prepared: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run that is built up to its archive."""
    tiny = prepared.copy(tmp_path_factory.mktemp("built") / "tiny")
    build(load(tiny.file), tiny.run, "archive", StageOptions(store=store_of(tiny)))
    return tiny


@pytest.fixture
def own(built: Tiny, tmp_path: Path) -> Tiny:
    return built.copy(tmp_path / "own")


def store_of(tiny: Tiny) -> Path:
    return tiny.file.parent / "store"


def rebuilt(tiny: Tiny, capsys: pytest.CaptureFixture[str], **options: bool) -> dict[str, str]:
    """The stages that `build` does, and why."""
    capsys.readouterr()
    build(load(tiny.file), tiny.run, "archive", StageOptions(store=store_of(tiny), **options))
    told = capsys.readouterr().err.splitlines()
    return {
        stage: why
        for stage, colon, why in (line.partition(": ") for line in told)
        if stage in STAGES
    }


def lengthen(tiny: Tiny) -> None:
    for side in ("src", "tgt"):
        with (tiny.file.parent / f"train.{side}").open("a") as file:
            file.write("abcdcba\n" * 6)


def left(tiny: Tiny) -> dict[Path, tuple[bytes, int]]:
    files = [*tiny.run.root.rglob("*"), *store_of(tiny).rglob("*")]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files if p.is_file()}


def test_all_is_done_once_whatever_times_say(
    own: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    before = left(own)
    assert store_of(own) / "seq2seq.mar" in before
    for path in own.file.parent.iterdir():  # all of it newer than the run
        os.utime(path)
    assert rebuilt(own, capsys) == {}
    assert left(own) == before


@pytest.mark.parametrize(
    ("before", "after", "stages", "why"),
    [
        ("name: tiny", "name: renamed", ("export", "archive"), "name: 'tiny' -> 'renamed'"),
        ("export: {", "export: {version: '2.0', ", ("export", "archive"), "'1.0' -> '2.0'"),
        ("model:\n", "scoring: {beam_size: 2}\nmodel:\n", STAGES[2:], "beam_size: 5 -> 2"),
        ("max_target_length: 32", "max_target_length: 31", STAGES[2:], "length: 32 -> 31"),
    ],
)
def test_what_is_quick_is_made_again(
    own: Tiny, capsys: pytest.CaptureFixture[str], before: str, after: str,
    stages: tuple[str, ...], why: str,
) -> None:  # fmt: skip
    weights = own.run.best.read_bytes()
    own.change(before, after)
    done = rebuilt(own, capsys)
    assert (tuple(done), own.run.best.read_bytes()) == (stages, weights)
    assert why in done[stages[0]]
    assert rebuilt(own, capsys) == {}


@pytest.mark.parametrize(
    ("spoilt", "stages"),
    [
        ("data/train.tokens", ("prepare",)),
        ("tokenizer/source.model", ("prepare",)),
        ("data/report.json", ("prepare",)),
        ("scores.json", STAGES[2:]),
        ("model.pt", STAGES[3:]),
        ("archive/seq2seq.mar", ("archive",)),
        ("archive/seq2seq.mar.sha256", ("archive",)),
    ],
)
def test_what_is_spoilt_or_gone_is_made_again(
    own: Tiny, capsys: pytest.CaptureFixture[str], spoilt: str, stages: tuple[str, ...]
) -> None:
    path, before = own.run.root / spoilt, left(own)
    for content in (b"not what it was", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        done = rebuilt(own, capsys)
        assert set(done) <= set(stages)
        assert stages[0] in done
    after = left(own)
    assert after.keys() == before.keys()
    for one in after:
        # TorchScript numbers its classes by process.
        if spoilt != "model.pt" or one.name.split(".")[0] not in ("model", "seq2seq"):
            assert after[one][0] == before[one][0], one


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (MODEL, "embedding_size: 24", "model.embedding_size: 16 -> 24"),
        (FURTHER, f"{FURTHER}  seed: 7\n", "training.seed: 1 -> 7"),
        ("source_vocabulary: 300", "source_vocabulary: 299", "tokenizer.source_vocabulary: 300 ->"),
        ("model:\n", "cleaning: {max_tokens: 9}\nmodel:\n", "cleaning.max_tokens: 100 -> 9"),
        ("tiny", "tiny", "train.src: the text of data.train has changed"),
    ],
)
def test_weights_of_another_recipe_or_text_are_refused_and_nothing_is_touched(
    own: Tiny, capsys: pytest.CaptureFixture[str], before: str, after: str, why: str
) -> None:
    own.change(before, after)
    if before == after:
        lengthen(own)
    held = left(own)
    with pytest.raises(RunError) as caught:
        rebuilt(own, capsys)
    assert why in str(caught.value)
    assert "--run" in str(caught.value)
    assert "FRESH=1" in str(caught.value)
    assert left(own) == held
    own.run.report.unlink()  # as where `prepare` was stopped: the weights tell as much
    with pytest.raises(RunError) as caught:
        rebuilt(own, capsys)
    assert why in str(caught.value)
    assert own.run.best in left(own)


def test_fresh_gives_them_up(own: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    weights = own.run.best.read_bytes()
    lengthen(own)
    assert tuple(rebuilt(own, capsys, fresh=True)) == STAGES
    assert own.run.best.read_bytes() != weights
    assert rebuilt(own, capsys) == {}


def test_text_that_nothing_was_learnt_from_is_prepared_again(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    lengthen(tiny)
    code, said = verb(capsys=capsys, monkeypatch=pytest.MonkeyPatch(), tiny=tiny, name="prepare")
    assert (code, said) == (0, "")
    report = json.loads(tiny.run.report.read_text())
    assert checkpoint.prepared_otherwise(report, load(tiny.file)) == []


def test_what_is_prepared_is_kept_unless_it_is_asked_for(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.run.report.stat().st_mtime_ns
    assert verb(monkeypatch, capsys, tiny, "prepare") == (0, "")
    assert tiny.run.report.stat().st_mtime_ns == before
    assert verb(monkeypatch, capsys, tiny, "prepare", "--fresh") == (0, "")
    assert tiny.run.report.stat().st_mtime_ns > before


@pytest.mark.parametrize("name", [*STAGES, "translate", "report", "distill", "build"])
def test_every_verb_compares_the_text(
    own: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    lengthen(own)
    held = left(own)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    more = ("--store", str(store_of(own))) if name in ("archive", "build") else ()
    code, said = verb(monkeypatch, capsys, own, name, *more)
    assert code == 1
    assert "the text of data.train has changed" in said
    assert left(own) == held


def test_text_that_is_not_there_is_not_compared(
    own: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is copied to a machine without its text."""
    for path in own.file.parent.glob("*.src"):
        path.unlink()
    assert rebuilt(own, capsys) == {}


def test_an_archive_of_one_recipe_is_not_made_of_what_another_exported(
    own: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.change("export: {", "export: {version: '2.0', ")
    code, said = verb(monkeypatch, capsys, own, "archive", "--store", str(store_of(own)))
    assert code == 1
    assert "export.version: '1.0' -> '2.0'" in said
    assert verb(monkeypatch, capsys, own, "export")[0] == 0
    code, said = verb(monkeypatch, capsys, own, "archive", "--store", str(store_of(own)))
    assert (code, said) == (0, "")


def test_a_model_of_other_scores_is_not_exported(
    own: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.change("model:\n", "scoring: {length_penalty: 0.5}\nmodel:\n")
    code, said = verb(monkeypatch, capsys, own, "export")
    assert code == 1
    assert "scoring.length_penalty: 1.0 -> 0.5" in said
    assert "'python -m training evaluate' again" in said


def test_the_store_has_the_archive_that_was_asked_for_last(
    own: Tiny, built: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    own.change("name: tiny", "name: other")
    store = store_of(own)
    for tiny in (own, built, own):
        build(load(tiny.file), tiny.run, "archive", StageOptions(store=store))
        told = capsys.readouterr().out.splitlines()[-1]
        assert told == f"{store}/seq2seq.mar: is {load(tiny.file).name} 1.0, {tiny.run.root}"
        assert archived(load(tiny.file), tiny.run, store / "seq2seq.mar")


def test_an_ensemble_is_built_like_a_run(
    straight: StraightRuns, own: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [straight[kind].run for kind in ("attention", "everything")]
    both = Tiny(own.file, Run(tmp_path / "both"))
    ensemble(load(both.file), both.run, members)
    assert tuple(rebuilt(both, capsys)) == STAGES[2:]
    assert rebuilt(both, capsys) == {}
    lengthen(both)
    with pytest.raises(RunError, match=r"ensemble of runs that were trained otherwise: .*src"):
        rebuilt(both, capsys, fresh=True)


def test_only_train_may_be_several_processes(
    own: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="processes: got 2; allowed: 1; torchrun starts the verb"):
        rebuilt(own, capsys)


@pytest.mark.parametrize("name", ['"beta"', "modèle", "a.b-c_1"])
def test_the_folder_of_a_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = tmp_path / "with space.yaml"
    file.write_text(f"name : {name}\ndata: {{generator: dates}}\nmodel: {{}}\n", "utf-8-sig")
    monkeypatch.setattr(sys, "argv", ["x", "folder", str(file)])
    assert main() == 0
    assert capsys.readouterr().out == f"runs/{name.strip(chr(34))}\n"


# One lock


@pytest.mark.parametrize("name", [*STAGES, "ensemble", "diversify", "build"])
def test_a_verb_that_writes_waits_for_another_and_is_refused(
    own: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    at_once = functools.partial(only_writer, patience=0)
    for module in ("stages", "train", "__main__"):
        monkeypatch.setattr(f"training.{module}.only_writer", at_once)
    held = left(own)
    more = ("--members", "x") if name == "ensemble" else ()
    with only_writer(own.run.root, "train"):
        code, said = verb(monkeypatch, capsys, own, name, *more)
    assert code == 1
    assert f"{own.run.root}: 'train', process {os.getpid()} of " in said
    assert " works there; wait until that has ended" in said
    assert left(own) == held


def test_two_builds_at_once_make_one_run(tiny: Tiny) -> None:
    arguments = command(tiny, "build", "--store", str(store_of(tiny)))
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "training", *arguments], cwd=ROOT, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=300) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    recipe = load(tiny.file)
    checkpoint.load_own(tiny.run.best, recipe, checkpoint.prepared(recipe, tiny.run))
    assert archived(recipe, tiny.run, store_of(tiny) / "seq2seq.mar")
    assert not list(tiny.file.parent.rglob(".*"))


def test_a_folder_that_cannot_be_written_can_be_read(
    own: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run on a read-only volume, whose archive goes elsewhere."""

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbidden)
        with only_writer(own.run.root, "archive", 0):
            pass
