"""Checkpoints: whole or not at all, and never for another recipe or other data."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import assert_equal, files_of_at_most

from model import ModelOptions, Network
from training import checkpoint
from training.checkpoint import Progress
from training.learner import Learner
from training.recipe import (
    DataOptions,
    ExportOptions,
    FilesOptions,
    Recipe,
    ShortlistOptions,
    TrainingOptions,
)
from training.run import Run, RunError, write_atomically, write_text

FILES = FilesOptions(source="a", target="b")
MODEL = ModelOptions(
    embedding_size=16, encoder_hidden_size=16, decoder_hidden_size=16, attention_size=16
)
RECIPE = Recipe(
    name="x", data=DataOptions(folder="here", train=FILES), model=MODEL,
    training=TrainingOptions(average=0.9),
)  # fmt: skip
DIGESTS = {"text": {"train": {"a": "1", "b": "2"}}, "tokenizer": {"source.model": "3"}}


def made(seed: int, recipe: Recipe = RECIPE) -> Learner:
    """A network and its optimiser after one update."""
    torch.manual_seed(seed)
    learner = Learner(Network(recipe.model, 99, 99), recipe.training)
    for parameter in learner.parameters:
        parameter.grad = torch.randn_like(parameter)
    learner.optimizer.step()
    return learner


def content(seed: int, recipe: Recipe = RECIPE, **progress: Any) -> dict[str, Any]:
    return checkpoint.content(recipe, DIGESTS, Progress(**progress), made(seed))


def save(path: Path, seed: int = 1, **progress: Any) -> None:
    checkpoint.write(path, content(seed, **progress))


def state(learner: Learner) -> list[Any]:
    return [
        dict(learner.network.state_dict()), learner.average, learner.optimizer.state_dict()
    ]  # fmt: skip


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.pt"
    learner, other = made(1), made(2)
    progress = Progress(step=7, epoch=1, batch=3, best_score=-2.5, best_step=5, sums={"loss": 1.5})
    checkpoint.write(path, checkpoint.content(RECIPE, DIGESTS, progress, learner))
    assert str(state(other)) != str(state(learner))
    assert checkpoint.restore(checkpoint.load(path), other) == progress
    assert_equal(state(other), state(learner))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        checkpoint.rotate(run, content(step, step=step))
    assert [checkpoint.load(p)["progress"]["step"] for p in run.checkpoints] == [3, 2]
    assert sorted(run.best.parent.iterdir()) == sorted(run.checkpoints)


def test_a_full_disk_does_not_rotate(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2):
        checkpoint.rotate(run, content(step, step=step))
    with (
        files_of_at_most(9999),
        pytest.raises((RunError, OSError), match=r"last\.pt: cannot be written: .*: make space"),
    ):
        checkpoint.rotate(run, content(3, step=3))
    assert [checkpoint.load(p)["progress"]["step"] for p in run.checkpoints] == [2, 1]
    assert sorted(run.best.parent.iterdir()) == sorted(run.checkpoints)


def test_the_newest_is_the_first_that_is_whole(tmp_path: Path) -> None:
    run = Run(tmp_path)
    save(run.best, step=1)
    for step in (2, 3):
        checkpoint.rotate(run, content(step, step=step))
    last, previous = run.checkpoints

    def newest() -> tuple[int, list[str]]:
        held, said = checkpoint.newest(RECIPE, run, DIGESTS, False)
        return held["progress"]["step"], said

    assert newest() == (3, [])
    last.write_bytes(b"")
    step, said = newest()
    assert step == 2
    assert said[0].startswith(f"{last}: not a whole checkpoint")
    assert said[1:] == [f"going on from {previous}, step 2"]
    last.unlink()
    assert newest() == (2, [f"going on from {previous}, step 2"])
    previous.write_bytes(b"")
    step, said = newest()
    assert (step, said[1:]) == (1, [f"going on from {run.best}, step 1"])
    run.best.write_bytes(b"")
    with pytest.raises(RunError) as caught:
        newest()
    assert all(f"{path}: not a whole" in str(caught.value) for path in (previous, run.best))


def test_a_whole_one_of_another_recipe_is_not_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    save(run.best)
    checkpoint.rotate(run, content(1, changed("model", {"dropout": 0.5})))
    with pytest.raises(RunError, match=r"last\.pt was trained otherwise: model\.dropout"):
        checkpoint.newest(RECIPE, run, DIGESTS, True)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"device": "cpu"}, {"finished": "yes", "best_score": -2.0, "since_best": 1}),
        ({"epochs": 99.0}, {"finished": "", "best_score": -2.0, "since_best": 1}),
        ({"select_by": "bleu"}, {"finished": "", "best_score": None, "since_best": 0}),
        ({"optimizer": "sgd"}, {"finished": "", "best_score": -2.0, "since_best": 1}),
        ({"average": 0.0}, {"finished": "", "best_score": -2.0, "since_best": 1}),
    ],
)
def test_what_other_options_leave_of_a_state(
    change: dict[str, Any], kept: dict[str, Any]
) -> None:
    held = content(1, step=4, best_score=-2.0, since_best=1, finished="yes")
    other = made(2, changed("training", change))
    progress = dataclasses.asdict(checkpoint.restore(held, other))
    assert {name: progress[name] for name in kept} == kept
    assert progress["step"] == 4
    assert_equal(dict(other.network.state_dict()), held["network"])
    same = "optimizer" not in change
    assert (str(other.optimizer.state_dict()) == str(held["optimizer"])) == same
    assert_equal(other.average, [] if "average" in change else held["average"])


def test_an_average_begins_with_the_weights_where_there_was_none() -> None:
    held = checkpoint.content(
        none := changed("training", {"average": 0.0}), DIGESTS, Progress(), made(1, none)
    )
    other = made(2)
    checkpoint.restore(held, other)
    assert_equal(other.average, [p.detach() for p in other.parameters])
    assert all(a.data_ptr() != p.data_ptr() for a, p in zip(other.average, other.parameters))


def test_the_weights_of_a_checkpoint_are_their_average() -> None:
    held = content(1)
    network = made(2).network
    checkpoint.weights(held, network)
    assert_equal([p.detach() for p in network.parameters()], held["average"])
    checkpoint.weights({**held, "average": []}, network)
    assert_equal(dict(network.state_dict()), held["network"])


def test_a_write_that_fails_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "former")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, write)
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save(path, step=1)
    former = path.read_bytes()
    with files_of_at_most(9999), pytest.raises((RunError, OSError)) as caught:
        save(path, 2, step=2)
    assert "last.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == former
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("spoilt", ["half", "empty", "text", "other"])
def test_a_spoilt_checkpoint_is_named_and_kept(tmp_path: Path, spoilt: str) -> None:
    path = tmp_path / "last.pt"
    save(path)
    whole = path.read_bytes()
    if spoilt == "other":
        torch.save({"network": {}}, path)
    else:
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"hi\n"}[spoilt])
    left = path.read_bytes()
    with pytest.raises(RunError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a whole checkpoint (")
    assert message.endswith("restore it from a copy, or train with --fresh")
    assert "\n" not in message
    assert path.read_bytes() == left


def test_a_missing_checkpoint_names_the_verb(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"last\.pt: no checkpoint; run 'python -m training train'"):
        checkpoint.load(tmp_path / "last.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"network": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(RunError, match="not a whole checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"embedding_size": 8}, "model.embedding_size: 16 -> 8"),
        ("training", {"seed": 2}, "training.seed: 1 -> 2"),
        ("cleaning", {"max_tokens": 7}, "cleaning.max_tokens: 100 -> 7"),
        ("tokenizer", {"algorithm": "bpe"}, "tokenizer.algorithm: 'unigram' -> 'bpe'"),
        ("data", {"held_out": 7}, "data.held_out: 1000 -> 7"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(
    tmp_path: Path, section: str, change: dict[str, Any], message: str
) -> None:
    save(tmp_path / "last.pt")
    with pytest.raises(RunError) as caught:
        checkpoint.load_own(tmp_path / "last.pt", changed(section, change), DIGESTS)
    assert f"last.pt was trained otherwise: {message}. Change that back, " in str(caught.value)
    assert "--run" in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_other_data_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "last.pt")
    with pytest.raises(RunError, match="the prepared data"):
        checkpoint.load_own(tmp_path / "last.pt", RECIPE, {**DIGESTS, "text": {}})


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("export", {"max_target_length": 9, "version": "2.0"}),
        ("data", {"folder": "elsewhere"}),
        ("training", {"device": "cpu"}),
    ],
)
def test_what_makes_no_other_weights_may_change(
    tmp_path: Path, section: str, change: dict[str, Any]
) -> None:
    save(tmp_path / "last.pt", step=3)
    recipe = dataclasses.replace(changed(section, change), name="renamed")
    stored = checkpoint.load_own(tmp_path / "last.pt", recipe, DIGESTS)
    assert stored["progress"]["step"] == 3


def test_weights_from_before_the_target_had_a_normalisation_of_its_own_are_the_recipe_s(
    tmp_path: Path,
) -> None:
    stored = content(1)
    del stored["recipe"]["tokenizer"]["target_normalization"]  # then it was that of the source
    checkpoint.write(tmp_path / "last.pt", stored)
    checkpoint.load_own(tmp_path / "last.pt", RECIPE, DIGESTS)
    other = changed("tokenizer", {"target_normalization": "nfkc"})
    with pytest.raises(RunError, match="target_normalization: None -> 'nfkc'"):
        checkpoint.load_own(tmp_path / "last.pt", other, DIGESTS)


def test_a_key_that_an_older_recipe_lacks_is_what_was_done_before_there_was_one() -> None:
    """Of a section, and of a mapping in one. `before` says where the default is something else."""
    recipe = dataclasses.replace(RECIPE, export=ExportOptions("1.0", "int8", ShortlistOptions()))
    then = recipe.as_dict()
    del then["training"]["r_drop"], then["cleaning"]["max_tokens"], then["scoring"]
    del then["data"]["train"]["source_column"], then["export"]["shortlist"]["frequent"]
    sections = (*checkpoint.DECISIVE, "scoring", "export")
    assert checkpoint.differences(then, recipe, sections) == []
    for section, change, told in (
        ("training", {"r_drop": 1.0}, ["training.r_drop: 0.0 -> 1.0"]),
        ("scoring", {"beam_size": 1}, ["scoring.beam_size: 5 -> 1"]),
    ):
        other = dataclasses.replace(
            recipe, **{section: dataclasses.replace(getattr(recipe, section), **change)}
        )
        assert checkpoint.differences(then, other, sections) == told


@dataclasses.dataclass(frozen=True)
class Grown:
    seed: int = 1
    added: str = "new"
    replaced: str = dataclasses.field(default="new", metadata={"before": "old"})
    split: int = dataclasses.field(default=0, metadata={"before": lambda then: then["seed"] - 1})


def test_a_default_that_is_not_what_was_done_before_counts() -> None:
    assert checkpoint.unlike("x", {"seed": 1}, Grown()) == {"replaced": ("old", "new")}
    assert checkpoint.unlike("x", {"seed": 1}, Grown(replaced="old")) == {}
    assert checkpoint.unlike("x", {"seed": 2, "added": "a", "replaced": "new"}, Grown()) == {
        "seed": (2, 1), "added": ("a", "new"), "split": (1, 0),
    }  # fmt: skip


def test_a_state_is_restored_from_a_recipe_that_lacks_a_key() -> None:
    held = content(1, step=4, best_score=-2.0, since_best=1, finished="yes")
    for key in ("subword_sampling", "optimizer"):
        del held["recipe"]["training"][key]
    other = made(2)
    assert checkpoint.restore(held, other).finished == "yes"
    assert str(other.optimizer.state_dict()) == str(held["optimizer"])


def changed(section: str, change: dict[str, Any]) -> Recipe:
    """The recipe with one section changed."""
    options = dataclasses.replace(getattr(RECIPE, section), **change)
    return dataclasses.replace(RECIPE, **{section: options})
