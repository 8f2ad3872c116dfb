"""What may go wrong while training: no work is lost, and the message says what to do."""

import signal
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import (
    StraightRuns,
    Tiny,
    assert_same_run,
    at_step,
    board,
    files_of_at_most,
    in_process,
    signal_at,
    verb,
)

import training.learner
from training import checkpoint
from training.evaluate import evaluate
from training.export import export
from training.loss import batch_loss
from training.prepare import prepare
from training.recipe import load
from training.run import RunError
from training.signals import Interrupted
from training.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")

KILL = f"os.kill(os.getpid(), {int(signal.SIGKILL)})"


def before_replacing(number: int) -> str:
    """A hook that kills the process when, for this time (from 0), a checkpoint is whole on disk
    and about to take its place."""
    return f"""
import os
replace, done = os.replace, []
def hooked(source, destination):
    if str(destination).endswith(".pt"):
        if len(done) == {number}:
            {KILL}
        done.append(destination)
    replace(source, destination)
os.replace = hooked
"""


WHILE_WRITING = f"""
import os, torch
save = torch.save
def hooked(held, path):
    save(held, path)
    if held["progress"]["step"] == 30:
        os.truncate(path, os.path.getsize(path) // 2)
        {KILL}
torch.save = hooked
"""


@pytest.mark.parametrize(
    ("hook", "left"),
    [
        (at_step(3, KILL), {}),
        (at_step(24, KILL), {"best": 15, "last": 15}),
        (before_replacing(0), {}),
        (before_replacing(1), {"best": 15}),
        (WHILE_WRITING, {"best": 15, "last": 15}),
        (before_replacing(3), {"best": 30, "last": 15}),
        (before_replacing(4), {"best": 30, "previous": 15}),
    ],
    ids=["at once", "in an update", "best whole", "last whole", "half", "rotating", "rotated"],
)
def test_a_killed_run_is_the_same_run(
    straight: StraightRuns, tiny: Tiny, hook: str, left: dict[str, int]
) -> None:
    done = in_process(tiny, hook)
    assert done.returncode == -signal.SIGKILL
    folder = tiny.run.best.parent
    whole = {path.stem: path for path in folder.glob("[a-z]*.pt")} if folder.exists() else {}
    assert {n: checkpoint.load(p)["progress"]["step"] for n, p in whole.items()} == left
    with tiny.run.metrics.open("a") as file:
        file.write('{"step": 40, "los')  # a line cut off
    time.sleep(1.1)  # TensorBoard orders its files by the second in which they were begun
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)
    assert board(tiny.run).keys() == board(straight["attention"].run).keys()


# A full disk


def test_a_disk_that_is_full_when_a_checkpoint_is_saved(
    straight: StraightRuns, tiny: Tiny
) -> None:
    done = in_process(
        tiny, at_step(24, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, -1))")
    )
    assert done.returncode == 1
    last = tiny.run.checkpoints[0]
    [said] = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert f"{tiny.run.best}: cannot be written: " in said
    assert "make space" in said
    assert checkpoint.load(last)["progress"]["step"] == 15
    assert not list(last.parent.glob(".*"))
    tiny.train()
    assert_same_run(tiny.run, straight["attention"].run)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_when_a_line_is_logged(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = straight["attention"]
    signal_at(monkeypatch, lambda step: step == 17)
    with pytest.raises(Interrupted):
        tiny.train()
    with (
        files_of_at_most(tiny.run.metrics.stat().st_size + 20),
        pytest.raises(RunError, match=r"metrics\.jsonl.*cannot be written.*make space"),
    ):
        tiny.train()
    tiny.train()
    assert_same_run(tiny.run, expected.run)


# Spoilt checkpoints


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_bytes(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 4000] = bytes(4000)
    path.write_bytes(whole)


def one_bit(path: Path) -> None:
    """Of the largest tensor: the file keeps its form."""
    with zipfile.ZipFile(path) as file:
        record = max(file.infolist(), key=lambda one: one.file_size)
    assert "/data/" in record.filename
    whole = bytearray(path.read_bytes())
    name, padding = struct.unpack_from("<HH", whole, record.header_offset + 26)
    whole[record.header_offset + 30 + name + padding + record.file_size // 2] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("spoil", [half, other_bytes, one_bit])
@pytest.mark.parametrize(
    ("spoilt", "goes_on"), [(["last"], ("previous", 24)), (["last", "previous"], ("best", 15))]
)
def test_a_spoilt_checkpoint_loses_little_and_is_named(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], spoilt: list[str],
    goes_on: tuple[str, int],
) -> None:  # fmt: skip
    expected = straight["attention"]
    with monkeypatch.context() as patched:
        signal_at(patched, lambda step: step in (24, 27))
        for _ in range(2):
            with pytest.raises(Interrupted):
                tiny.train()
    paths = [tiny.run.best.with_name(f"{name}.pt") for name in spoilt]
    for path in paths:
        spoil(path)
    code, error = verb(monkeypatch, capsys, tiny, "train")
    assert code == 0
    lines = error.splitlines()
    for path, line in zip(paths, lines):
        assert line.startswith(f"train: {path}: not a whole checkpoint (")
    name, step = goes_on
    path = tiny.run.best.with_name(f"{name}.pt")
    assert lines[len(paths)] == f"train: going on from {path}, step {step}"
    assert_same_run(tiny.run, expected.run)


@pytest.mark.parametrize("spoil", [half, one_bit])
def test_where_all_checkpoints_are_spoilt_nothing_is_touched(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None],
) -> None:  # fmt: skip
    tiny = straight["attention"].copy(tiny.file.parent / "spoilt")
    paths = (*tiny.run.checkpoints, tiny.run.best)
    for path in paths:
        spoil(path)
    former = tiny.files()
    code, error = verb(monkeypatch, capsys, tiny, "train")
    assert code == 1
    for path in paths:
        assert f"{path}: not a whole checkpoint (" in error
    assert "train with --fresh" in error
    assert error.count("\n") == 1
    assert tiny.files() == former


def test_spoilt_weights_are_neither_scored_nor_exported(
    straight: StraightRuns, tiny: Tiny
) -> None:
    tiny = straight["attention"].copy(tiny.file.parent / "spoilt")
    one_bit(tiny.run.best)
    for call in (evaluate, export):
        with pytest.raises(RunError, match=r"best\.pt: not a whole checkpoint \(.*/data/\d+ does"):
            call(load(tiny.file), tiny.run)


# Loss and memory


def failing_at(call: int, failure: Callable[[], Any]) -> Callable[..., Any]:
    """`batch_loss`, but for one call (from 0), where the loss is what `failure` gives."""
    calls = []

    def loss(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        given, surprise = batch_loss(*arguments)
        return (given * failure() if len(calls) == call + 1 else given), surprise

    return loss


@pytest.mark.parametrize(("kind", "step", "first"), [("attention", 26, 6), ("everything", 12, 4)])
def test_a_loss_that_is_no_number_stops(
    straight: StraightRuns, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kind: str, step: int,
    first: int,
) -> None:  # fmt: skip
    expected = straight[kind]
    trainer = tiny.of_kind(kind).trainer()
    pairs = trainer.sampler.batches(1)[first].tolist()
    each = 2 if kind == "everything" else 1
    with monkeypatch.context() as patched:
        loss = failing_at(step * each, lambda: float("nan"))
        patched.setattr(training.learner, "batch_loss", loss)
        with pytest.raises(RunError) as caught:
            tiny.train()
    texts = [trainer.source.decode(trainer.pairs.pairs.source(i)) for i in pairs]
    assert set(texts) <= set((tiny.file.parent / "train.src").read_text().splitlines())
    told = ", ".join(f"{i + 1} {text!r}" for i, text in zip(pairs[:3], texts))
    rest = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    last = tiny.run.checkpoints[0]
    assert str(caught.value) == (
        f"step {step}: the loss is nan and the gradient's norm nan, in epoch 2, "
        f"batch {first + 1} (pairs {told}{rest}); pairs are counted from 1 among those kept for "
        f"training, as the lines that distill writes. {last} holds the last good state. Lower "
        "training.learning_rate or training.clip_norm and go on with --accept-changes, or look at "
        "these pairs"
    )
    assert checkpoint.load(last)["progress"]["step"] < step
    tiny.train()
    assert_same_run(tiny.run, expected.run)


def test_a_loss_that_is_no_number_at_once_promises_no_checkpoint(tiny: Tiny) -> None:
    trainer = tiny.trainer()
    with torch.no_grad():
        trainer.network.generator.bias.fill_(float("inf"))
    with pytest.raises(RunError, match=r"step 0: the loss is nan") as caught:
        trainer.train()
    assert "last.pt" not in str(caught.value)


def no_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")


def no_memory() -> None:
    torch.empty(2**50)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (no_memory_on_a_gpu, r"CUDA out of memory\. Tried to allocate 9 GiB\. Lower"),
        (no_memory, r"can't allocate memory: you tried to allocate \d+ bytes\. .*\. Lower"),
    ],
)
def test_too_little_memory_is_explained(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    failure: Callable[[], None], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(training.learner, "batch_loss", failing_at(3, failure))
    code, error = verb(monkeypatch, capsys, tiny, "train")
    assert code == 1
    assert error.count("\n") == 1
    assert error.startswith("train: step 3: ")
    with pytest.raises(RunError, match=rf"{said} training\.batch_tokens"):
        raise RunError(error)


def test_a_checkpoint_that_memory_is_too_little_for_is_not_called_spoilt(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is the one before taken in its place, which costs the work since."""
    with monkeypatch.context() as patched:
        signal_at(patched, lambda step: step == 18)
        with pytest.raises(Interrupted):
            tiny.train()
    before = tiny.files()
    monkeypatch.setattr(torch, "load", lambda *_, **__: no_memory())
    code, error = verb(monkeypatch, capsys, tiny, "train")
    assert code == 1
    assert error.startswith(f"train: reading {tiny.run.checkpoints[0]}: ")
    assert "allocate memory" in error
    assert "take a machine with more memory" in error
    assert "whole" not in error
    assert tiny.files() == before


def test_other_errors_are_not_taken_for_too_little_memory(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failure() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(training.learner, "batch_loss", failing_at(0, failure))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tiny.train()


def test_a_gpu_where_there_is_none(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiny.trainer().device == torch.device("cpu")
    tiny.change("epochs: 2", "epochs: 2\n  device: cuda")
    former = tiny.files()
    code, error = verb(monkeypatch, capsys, tiny, "train")
    assert (code, error) == (
        1,
        "train: training.device: got 'cuda', but torch sees no GPU here; allowed here: 'cpu' or "
        "'auto'\n",
    )
    assert tiny.files() == former


# Data that do not belong together


def test_text_prepared_otherwise_is_refused(tiny: Tiny) -> None:
    tiny.change("source_vocabulary: 300", "source_vocabulary: 301")
    with pytest.raises(RunError, match=r"source_vocabulary: 300 -> 301.*training prepare' again"):
        tiny.train()


def test_weights_of_other_data_are_refused(straight: StraightRuns, tiny: Tiny) -> None:
    tiny = straight["attention"].copy(tiny.file.parent / "other")
    for side in ("src", "tgt"):
        with (tiny.file.parent / f"train.{side}").open("a") as file:
            file.write("g\n")
    recipe = load(tiny.file)
    prepare(recipe, tiny.run.root)
    for call in (train, evaluate, export):
        with pytest.raises(RunError, match=r"pt was trained otherwise: the prepared data"):
            call(recipe, tiny.run)
    with pytest.raises(RunError, match=r"pt was trained otherwise: the prepared data"):
        train(recipe, tiny.run, accept_changes=True)


def test_a_validation_sentence_that_the_model_may_not_read(tiny: Tiny) -> None:
    tiny.change("max_source_length: 32", "max_source_length: 4")
    with pytest.raises(RunError, match=r"export\.max_source_length: got 4; allowed: at least \d+"):
        Trainer(load(tiny.file), tiny.run, fresh=True)
