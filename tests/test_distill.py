"""The verb distill: a data folder whose targets are a run's own translations."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
import torch
from conftest import ROOT, run_verb
from test_ensemble import ids_of, text, trained

import training.distill
from handler.request import RequestOptions
from training import __main__ as command_line
from training.distill import DistillOptions, append, chosen, distill
from training.ensemble import ensemble
from training.evaluate import best_model
from training.lines import translations
from training.recipe import ScoringOptions, load
from training.run import LOCK, Run, RunError
from training.tokens import TokenPairs
from training.train import tokenizers

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NAMES = {
    "distilled.json", "recipe.yaml", "train.source", "train.target", "validation.source",
    "validation.target", "test.source", "test.target",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many windows, in a small corpus."""
    monkeypatch.setattr(training.distill, "WINDOW", 50)
    monkeypatch.setattr(training.distill, "SENTENCES", {"cpu": 8})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, `tiny.yaml` and a trained run of it, `run`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher")
    trained(text(folder), folder / "run")
    return folder


def made(teacher: Path, out: Path, *changes: str, **options: object) -> Path:
    recipe = load(teacher / "tiny.yaml", changes=changes)
    distill(recipe, Run(teacher / "run"), out, DistillOptions(**options))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(teacher: Path, sources: list[str], **options: object) -> list[list[str]]:
    """The n best of each source, by the verb translate's own way through the engine."""
    run = Run(teacher / "run")
    model, _ = best_model(load(teacher / "tiny.yaml"), run)
    asked = RequestOptions(split=False, **options)
    return [
        [one["text"] for one in found]
        for found in translations(model, *tokenizers(run), sources, asked, CPU)
    ]


def learnt(run: Run) -> list[tuple[str, str]]:
    """The text of the pairs that `run` was trained on."""
    pairs = TokenPairs.load(run.data / "train.tokens")
    source, target = tokenizers(run)
    ids = [ids_of(pairs, i) for i in range(len(pairs))]
    return [(source.decode(one), target.decode(other)) for one, other in ids]


def references(teacher: Path) -> tuple[list[str], list[str]]:
    """The same of the teacher, side by side."""
    sources, targets = zip(*learnt(Run(teacher / "run")))
    return list(sources), list(targets)


def lines_of(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


def test_targets_are_the_greedy_translations_of_the_sources(teacher: Path, tmp_path: Path) -> None:
    out = made(teacher, tmp_path / "out", beam_size=1)
    assert files(out).keys() == NAMES
    sources = lines_of(out / "train.source")
    given = (teacher / "train.src").read_text().splitlines()
    assert sources == list(dict.fromkeys(given))  # cleaning drops pairs that came before
    targets = lines_of(out / "train.target")
    assert targets == [one[0] for one in told(teacher, sources)]
    assert len(set(targets)) > len(targets) / 2
    for name in ("validation.source", "test.target"):
        assert (out / name).read_bytes() == (teacher / "run" / "data" / name).read_bytes()


def test_targets_are_the_best_of_the_recipes_beam(teacher: Path, tmp_path: Path) -> None:
    out = made(teacher, tmp_path / "out", "scoring.length_penalty=0.5", beam_size=3)
    expected = told(teacher, lines_of(out / "train.source"), beam_size=3, length_penalty=0.5)
    assert lines_of(out / "train.target") == [one[0] for one in expected]


def test_interpolation_takes_of_the_beam_what_is_most_like_the_reference(
    teacher: Path, tmp_path: Path
) -> None:
    out = made(teacher, tmp_path / "out", beam_size=4, interpolate=True)
    sources, right = references(teacher)
    found = told(teacher, sources, beam_size=4, n_best=4, length_penalty=1.0)

    def likeness(text: str, reference: str) -> float:
        return sacrebleu.sentence_bleu(text, [reference], tokenize="char").score

    expected = [
        max(texts, key=lambda text: likeness(text, reference))
        for texts, reference in zip(found, right)
    ]
    assert lines_of(out / "train.target") == expected
    assert expected != [texts[0] for texts in found]


def test_the_most_similar_hypothesis_is_chosen_by_hand() -> None:
    reference = "a b c d e"
    # 5, 4 and 3 words of the reference in a row, and none.
    beam = ["v w x y z", "a b c x y", "a b c d x", "a x b y c"]
    assert chosen(beam, reference, ScoringOptions()) == "a b c d x"
    assert chosen([*beam, reference], reference, ScoringOptions()) == reference
    equals = ["x y z", "z y x"]  # the likelier comes first
    assert chosen(equals, reference, ScoringOptions()) == equals[0]
    shouted = ["A B C D E", "a b x y z"]
    assert chosen(shouted, reference, ScoringOptions()) == shouted[1]
    assert chosen(shouted, reference, ScoringOptions(lowercase=True)) == shouted[0]


def test_a_line_break_that_a_model_says_makes_no_line(tmp_path: Path) -> None:
    append(tmp_path / "text", ["1\n2", "", "\u2028"])
    append(tmp_path / "text", ["3"])
    assert (tmp_path / "text").read_bytes() == "1 2\n\n\u2028\n3\n".encode()


def test_the_summary_counts_and_scores(teacher: Path, tmp_path: Path) -> None:
    recipe, run = load(teacher / "tiny.yaml"), Run(teacher / "run")
    first = distill(recipe, run, tmp_path, DistillOptions(beam_size=1))
    _, right = references(teacher)
    scores = [
        sacrebleu.sentence_bleu(text, [reference], tokenize="char").score
        for text, reference in zip(lines_of(tmp_path / "train.target"), right)
    ]
    assert first.bleu == pytest.approx(sum(scores) / len(scores))
    assert len(set(scores)) > 10
    assert first.pairs == first.translated == len(right)
    former = files(tmp_path)
    again = distill(recipe, run, tmp_path, DistillOptions(beam_size=1))
    assert (again.pairs, again.translated, again.bleu) == (len(right), 0, first.bleu)
    assert files(tmp_path) == former


PROGRAM = """
import os, signal, sys
import training.distill as verb
from training.__main__ import main
verb.WINDOW, verb.SENTENCES = 50, {"cpu": 8}
write = verb.append
count = 0
def dying(partial, texts):
    global count
    count += 1
    if count == 3:  # half a window, and half a line, are on disk
        with partial.open("ab") as file:
            file.writelines([b"123\\n"] * 20 + [b"45"])
        os.kill(os.getpid(), signal.SIGKILL)
    write(partial, texts)
verb.append = dying
sys.exit(main())
"""


def test_what_was_killed_goes_on_and_gives_the_same(teacher: Path, tmp_path: Path) -> None:
    straight = made(teacher, tmp_path / "straight", beam_size=2)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, "distill", str(teacher / "tiny.yaml"),
               "--run", str(teacher / "run"), "--out", str(out), "--beam-size", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    assert files(out).keys() == {LOCK, "distilled.json", ".train.target.partial"}
    (out / LOCK).unlink()  # it is nobody's, and the verb, which is not called below, would take it
    assert files(out)[".train.target.partial"].endswith(b"123\n45")
    summary = distill(
        load(teacher / "tiny.yaml"), Run(teacher / "run"), out, DistillOptions(beam_size=2)
    )
    assert summary.translated == summary.pairs - 100
    assert files(out) == files(straight)


def test_a_crash_after_the_last_window_costs_no_more_than_it(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = made(teacher, tmp_path / "straight", beam_size=1)

    def full(path: Path, texts: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(training.distill, "write_lines", full)
    with pytest.raises(OSError, match="No space left"):
        made(teacher, tmp_path / "out", beam_size=1)
    monkeypatch.undo()
    monkeypatch.setattr(training.distill, "WINDOW", 50)
    monkeypatch.setattr(training.distill, "SENTENCES", {"cpu": 8})
    assert not (tmp_path / "out" / "train.target").exists()
    made(teacher, tmp_path / "out", beam_size=1)
    assert files(tmp_path / "out") == files(straight)


def test_other_weights_or_options_do_not_go_on(teacher: Path, tmp_path: Path) -> None:
    out = made(teacher, tmp_path / "out", beam_size=2)
    former = files(out)
    with pytest.raises(RunError, match="out: beam_size: begun with 2, got 3; allowed: the same"):
        made(teacher, out, beam_size=3)
    with pytest.raises(RunError, match="interpolate: begun with False, got True; lowercase"):
        made(teacher, out, beam_size=2, interpolate=True)
    with pytest.raises(RunError, match=r"length_penalty: begun with 1\.0, got 0\.0"):
        made(teacher, out, "scoring.length_penalty=0", beam_size=2)
    other = trained(
        teacher / "tiny.yaml", tmp_path / "other", "training.seed=2", "training.epochs=0.1"
    )
    recipe = load(teacher / "tiny.yaml", changes=["training.seed=2", "training.epochs=0.1"])
    with pytest.raises(RunError, match=r"out: weights: begun with \['\w{64}'\], got \['\w{64}'\]"):
        distill(recipe, other, out, DistillOptions(beam_size=2))
    assert files(out) == former
    (out / "distilled.json").write_text("{")
    with pytest.raises(RunError, match=r"out/distilled\.json: not whole \(.*\); restore it"):
        made(teacher, out, beam_size=2)


def test_a_folder_with_other_files_is_left_alone(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "train.source").write_text("mine\n")
    with pytest.raises(RunError, match="holds other files; allowed: a new folder or an empty one"):
        made(teacher, tmp_path)
    assert files(tmp_path) == {"train.source": b"mine\n"}
    with pytest.raises(RunError, match=r"training\.json: not there yet; run 'python -m training t"):
        distill(load(teacher / "tiny.yaml"), Run(tmp_path / "none"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_longer_than_the_model_may_be_asked_are_translated(
    teacher: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(teacher / "run", run.root)
    recipe = load(teacher / "tiny.yaml", changes=["export.max_source_length=5"])
    distill(recipe, run, tmp_path / "out", DistillOptions(beam_size=1))
    assert len(lines_of(tmp_path / "out" / "train.target")) == len(references(teacher)[0])


def test_an_ensemble_teaches_a_student_from_the_command_line(
    teacher: Path, tmp_path: Path
) -> None:
    recipe_file, both, out = teacher / "tiny.yaml", tmp_path / "both", tmp_path / "out"
    other = trained(recipe_file, tmp_path / "other", "training.seed=2")
    recipe = load(recipe_file)
    ensemble(recipe, Run(both), [Run(teacher / "run"), other])
    done = run_verb("distill", recipe_file, "--run", both, "--out", out, "--beam-size", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: {len(references(teacher)[0])} pairs, ")
    assert len(json.loads((out / "distilled.json").read_text())["weights"]) == 2
    model, _ = best_model(recipe, Run(both))
    sources = lines_of(out / "train.source")
    asked = RequestOptions(split=False)
    expected = translations(model, *tokenizers(Run(both)), sources, asked, CPU)
    assert lines_of(out / "train.target") == [one[0]["text"] for one in expected]
    # The folder is all that the student needs, wherever it is.
    moved = tmp_path / "moved"
    out.rename(moved)
    student = trained(moved / "recipe.yaml", tmp_path / "student", "training.epochs=0.1")
    assert load(moved / "recipe.yaml").name == "tiny-distilled"
    assert {target for _, target in learnt(student)} <= set(lines_of(moved / "train.target"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--beam-size", "65"], "distill: beam_size: got 65; allowed: "),
        (["--beam-size", "1", "--interpolate"], "distill: interpolate: got true with beam_size 1"),
    ],
)
def test_options_out_of_range_are_refused(
    teacher: Path, tmp_path: Path, given: list[str], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = ["distill", teacher / "tiny.yaml", "--run", teacher / "run", "--out", out, *given]
    monkeypatch.setattr(sys, "argv", ["training", *map(str, command)])
    assert command_line.main() == 1
    told, error = capsys.readouterr()
    assert told == ""
    assert error.startswith(said)
    assert error.count("\n") == 1
    assert not out.exists()
