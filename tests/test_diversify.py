"""The verb diversify: the training text beside what teachers of both directions make of it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_verb
from test_distill import learnt, lines_of
from test_ensemble import text, trained

import training.diversify
from handler.fields import FieldError, read
from training.diversify import DiversifyOptions, diversify
from training.recipe import load
from training.run import Run, RunError
from training.signals import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = [f"{name}.{side}" for name in ("train", "validation", "test") for side in
        ("source", "target")]  # fmt: skip


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("diversify"))


@pytest.fixture(scope="module")
def straight(recipe_file: Path) -> Path:
    """What one call leaves that nothing stops."""
    torch.set_num_threads(1)
    folder = recipe_file.parent / "straight"
    assert diversify(load(recipe_file), folder, DiversifyOptions(2, 1, 2)) == 4
    return folder


def test_each_teacher_adds_the_text_once_on_the_side_that_it_says(straight: Path) -> None:
    original = learnt(Run(straight / "forward-1"))
    sources, targets = (lines_of(straight / f"train.{side}") for side in ("source", "target"))
    n = len(original)
    assert len(sources) == len(targets) == 4 * n
    parts = [list(zip(sources, targets))[k * n : (k + 1) * n] for k in range(4)]
    assert parts[0] == original
    for part, name in zip(parts[1:3], ("forward-1", "forward-2")):
        said = lines_of(straight / f"{name}.text" / "train.target")
        assert part == list(zip([source for source, _ in original], said))
    said = lines_of(straight / "backward-1.text" / "train.target")
    assert parts[3] == list(zip(said, [target for _, target in original]))
    assert parts[1] != parts[2]  # teachers of other seeds
    assert len(set(said)) > n / 10  # a model that says something


def test_the_backward_teacher_learns_the_same_pairs_the_other_way(straight: Path) -> None:
    forward, backward = learnt(Run(straight / "forward-1")), learnt(Run(straight / "backward-1"))
    assert backward == [(target, source) for source, target in forward]
    for side, other in (("source", "target"), ("target", "source")):
        for name in ("validation", "test"):
            swapped = straight / "backward-1" / "data" / f"{name}.{side}"
            assert lines_of(swapped) == lines_of(straight / f"{name}.{other}")


def test_a_student_learns_from_the_folder_alone_wherever_it_is(
    straight: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in (*SETS, "recipe.yaml"):
        (moved / name).write_bytes((straight / name).read_bytes())
    recipe = load(moved / "recipe.yaml")
    assert recipe.name == "tiny-diversified"
    assert recipe.training.epochs == 2.0  # twice the updates of 4 epochs of a quarter of it
    student = trained(moved / "recipe.yaml", tmp_path / "student")
    given = set(zip(*(lines_of(moved / f"train.{side}") for side in ("source", "target"))))
    assert set(learnt(student)) <= given
    assert len(learnt(student)) > len(learnt(Run(straight / "forward-1")))


def test_no_teacher_learns_what_is_held_out(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["data.validation=null", "data.test=null", "data.held_out=20"]
    diversify(load(recipe_file, changes=changes), tmp_path / "out", DiversifyOptions(1, 1, 1))
    held_out = {
        pair
        for name in ("validation", "test")
        for pair in zip(*(lines_of(tmp_path / "out" / f"{name}.{side}")
                          for side in ("source", "target")))
    }  # fmt: skip
    assert len(held_out) >= 40
    backward = learnt(Run(tmp_path / "out" / "backward-1"))
    assert not held_out & {(source, target) for target, source in backward}
    assert not held_out & set(learnt(Run(tmp_path / "out" / "forward-1")))


def test_what_was_stopped_anywhere_goes_on_and_gives_the_same(
    recipe_file: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each step of each teacher, one after the other."""
    steps = [0]
    for name in ("train", "distill", "join"):
        genuine = getattr(training.diversify, name)

        def stopping(*arguments: object, genuine: object = genuine) -> object:
            steps[0] += 1
            if steps[0] in stops:
                stops.remove(steps[0])
                raise Interrupted("stopped at step 1; the same command goes on")
            return genuine(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(training.diversify, name, stopping)
    stops = {1, 2, 4, 6, 8}
    recipe, out = load(recipe_file), tmp_path / "out"
    for _ in range(5):
        steps[0] = 0
        with pytest.raises(Interrupted):
            diversify(recipe, out, DiversifyOptions(2, 1, 2))
        assert not (out / "recipe.yaml").exists()
    diversify(recipe, out, DiversifyOptions(2, 1, 2))
    for name in (*SETS, "recipe.yaml"):
        made, expected = (
            (folder / name).read_text().replace(str(folder), "") for folder in (out, straight)
        )
        assert made == expected, name


def test_other_options_or_another_folder_are_refused(
    recipe_file: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(recipe_file)
    with pytest.raises(RunError, match="straight: backward: begun with 1, got 2; allowed: the sam"):
        diversify(recipe, straight, DiversifyOptions(2, 2, 2))
    (tmp_path / "train.source").write_text("mine\n")
    with pytest.raises(RunError, match="holds other files; allowed: a new folder or an empty one"):
        diversify(recipe, tmp_path)
    with pytest.raises(RunError, match=r"batch_tokens"):  # of the recipe that the teachers had
        diversify(load(recipe_file, changes=["training.batch_tokens=90"]), straight,
                  DiversifyOptions(2, 1, 2))
    with pytest.raises(FieldError, match="forward: got 0; allowed: "):
        read(DiversifyOptions, {"forward": 0})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="processes: got 2; allowed: 1"):
        diversify(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(recipe_file: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_verb("diversify", recipe_file, "--run", out, "--forward", 1, "--backward", 0,
                    "--beam-size", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'recipe.yaml'}: the text 2 times, for a student\n"
    made = json.loads((out / "diversified.json").read_text())
    assert made == {"forward": 1, "backward": 0, "beam_size": 2}
    half = len(lines_of(straight / "train.source")) // 2
    for side in ("source", "target"):  # of one teacher what of several the first is
        assert lines_of(out / f"train.{side}") == lines_of(straight / f"train.{side}")[:half]
