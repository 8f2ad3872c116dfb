"""Checkpoints: whole or not at all, and never for another recipe or other data."""

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model import ModelOptions
from training import checkpoint
from training.checkpoint import Progress
from training.recipe import DataOptions, FilesOptions, Recipe
from training.run import RunError, write_atomically, write_text

FILES = FilesOptions(source="a", target="b")
RECIPE = Recipe(
    name="x", data=DataOptions(folder="here", train=FILES), model=ModelOptions(dropout=0.1)
)
DIGESTS = {"text": {"train": {"a": "1", "b": "2"}}, "tokenizer": {"source.model": "3"}}


def made(seed: int, width: int = 300) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and its optimiser after one update."""
    torch.manual_seed(seed)
    network = nn.Linear(width, width)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(2, width)).sum().backward()
    optimizer.step()
    return network, optimizer


def save(path: Path, seed: int = 1, **progress: Any) -> None:
    checkpoint.save(path, RECIPE, DIGESTS, Progress(**progress), *made(seed))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does to a file that is being written."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.pt"
    network, optimizer = made(1)
    progress = Progress(step=7, epoch=1, batch=3, best_score=-2.5, best_step=5, sums={"loss": 1.5})
    torch.manual_seed(5)
    checkpoint.save(path, RECIPE, DIGESTS, progress, network, optimizer)
    drawn = torch.rand(3)
    other, its = made(2)
    assert checkpoint.restore(checkpoint.load(path), other, its) == progress
    assert torch.equal(torch.rand(3), drawn)
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert str(its.state_dict()) == str(optimizer.state_dict())


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
    with files_of_at_most(100_000), pytest.raises((RunError, OSError)) as caught:
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
        ("model", {"embedding_size": 8}, "model.embedding_size: 256 -> 8"),
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


def changed(section: str, change: dict[str, Any]) -> Recipe:
    """The recipe with one section changed."""
    options = dataclasses.replace(getattr(RECIPE, section), **change)
    return dataclasses.replace(RECIPE, **{section: options})
