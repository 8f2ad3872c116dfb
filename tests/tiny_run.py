"""A run that is trained in a second: a few strings of letters, translated by reading them
backwards."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import checkpoint
from training.recipe import load
from training.run import Run
from training.train import Trainer, train

ROOT = Path(__file__).resolve().parent.parent
LETTERS = str.maketrans("0123456789", "abcdefghij")  # digits are never joined into longer pieces
RECIPE = """\
name: tiny
data:
  train: {source: train.src, target: train.tgt}
  validation: {source: validation.src, target: validation.tgt}
  test: {source: test.src, target: test.tgt}
tokenizer: {algorithm: bpe, source_vocabulary: 300, target_vocabulary: 300}
export: {max_source_length: 32, max_target_length: 32}
"""
ATTENTION = """\
model:
  embedding_size: 16
  encoder_hidden_size: 12
  decoder_hidden_size: 20
  attention_size: 16
  dropout: 0.2
training:
  epochs: 2
  batch_tokens: 80
  learning_rate: 0.01
  schedule: linear
  warmup_steps: 5
  label_smoothing: 0.1
  validate_every: 15
"""
KINDS = {
    "attention": ATTENTION,
    "sutskever": """\
model:
  kind: sutskever
  bidirectional: false
  embedding_size: 16
  encoder_layers: 2
  encoder_hidden_size: 16
  decoder_layers: 2
  decoder_hidden_size: 16
  reverse_source: true
  dropout: 0.2
  initialisation: uniform
training:
  epochs: 1.75
  batch_tokens: 80
  optimizer: sgd
  learning_rate: 0.7
  schedule: halving
  halve_after_epoch: 0.5
  halve_every_epochs: 0.25
  clip_norm: 5
  loss_per: sentence
  validate_every: 15
""",
    "everything": ATTENTION.replace("validate_every: 15", "validate_every: 9") + """\
  subword_sampling: 0.3
  r_drop: 1.0
  average: 0.9
  accumulate: 2
""",
}  # fmt: skip
SPEEDS = ("target_tokens_per_second", "source_tokens_per_second")


@dataclass(frozen=True)
class Tiny:
    """A recipe, and a run of it that is prepared."""

    file: Path
    run: Run

    def train(self, *, fresh: bool = False, accept_changes: bool = False) -> checkpoint.Progress:
        return train(load(self.file), self.run, fresh, accept_changes)

    def trainer(self, *, fresh: bool = True) -> Trainer:
        return Trainer(load(self.file), self.run, fresh)

    def change(self, before: str, after: str) -> None:
        text = self.file.read_text()
        assert before in text
        self.file.write_text(text.replace(before, after))

    def files(self) -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in self.run.root.rglob("*") if p.is_file()}

    def copy(self, folder: Path) -> "Tiny":
        shutil.copytree(self.file.parent, folder)
        return Tiny(folder / self.file.name, Run(folder / "run"))

    def of_kind(self, kind: str) -> "Tiny":
        self.file.write_text(RECIPE + KINDS[kind])
        return self


class StraightRuns(dict[str, Tiny]):
    """A run of each kind that was never stopped, trained when it is first asked for."""

    def __init__(self, prepared: Tiny, folder: Path) -> None:
        super().__init__()
        self.prepared, self.folder = prepared, folder

    def __missing__(self, kind: str) -> Tiny:
        self[kind] = self.prepared.copy(self.folder / kind).of_kind(kind)
        self[kind].train()
        return self[kind]


def command(tiny: Tiny, verb: str = "train", *more: str) -> list[str]:
    """Arguments of `python -m training`."""
    return [verb, str(tiny.file), "--run", str(tiny.run.root), *more]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}


def in_process(
    tiny: Tiny, hook: str = "", *more: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`python -m training train` in a process of its own, after the lines of `hook`."""
    program = f"import sys\n{hook}\nfrom training.__main__ import main\nsys.exit(main())\n"
    return subprocess.run(
        [sys.executable, "-c", program, *command(tiny, "train", *more)],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300, check=False,
        **options,
    )  # fmt: skip


def at_step(step: int, what: str) -> str:
    """A hook that does `what` during the update before `step`."""
    return f"""
import os
import resource
from training.train import Trainer
update = Trainer.update
def hooked(self, *arguments):
    if self.progress.step + 1 == {step}:
        {what}
    return update(self, *arguments)
Trainer.update = hooked
"""


def verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, name: str,
    *more: str,
) -> tuple[int, str]:  # fmt: skip
    """Exit code and standard error of a verb."""
    from training import __main__ as command_line

    monkeypatch.setattr(sys, "argv", ["x", *command(tiny, name, *more)])
    capsys.readouterr()
    code = command_line.main()
    return code, capsys.readouterr().err


def signal_at(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[int], bool]) -> None:
    """Ctrl-C during the updates before these steps."""
    update = Trainer.update

    def interrupted(self: Trainer, *arguments: Any) -> dict[str, float]:
        if wanted(self.progress.step + 1):
            signal.raise_signal(signal.SIGINT)
        return update(self, *arguments)

    monkeypatch.setattr(Trainer, "update", interrupted)


def figures(run: Run) -> list[dict[str, Any]]:
    """What metrics.jsonl says, speeds left out."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]


def board(run: Run) -> dict[tuple[str, int], float]:
    """What TensorBoard shows."""
    shown = EventAccumulator(str(run.tensorboard))
    shown.Reload()
    return {
        (name, event.step): event.value
        for name in shown.Tags()["scalars"]
        for event in shown.Scalars(name)
    }


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit by bit, in whatever nesting."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b)):
            assert_equal(one, other, f"{where}.{i}")
    else:
        assert a == b, where


def contents(path: Path) -> dict[str, Any]:
    """A checkpoint, but for what may differ between equal runs: time and place."""
    held = checkpoint.load(path)
    del held["progress"]["seconds"]
    held["progress"]["sums"].pop("seconds", None)
    del held["recipe"]["data"]["folder"]
    return held


def assert_same_run(a: Run, b: Run) -> None:
    for one, other in ((a.checkpoints[0], b.checkpoints[0]), (a.best, b.best)):
        assert_equal(contents(one), contents(other))
    assert figures(a) == figures(b)
    summaries = [json.loads(run.summary.read_text()) for run in (a, b)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]
    for run in (a, b):
        assert not list(run.root.rglob(".*.tmp"))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does to a file that is being written."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
