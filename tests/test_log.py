"""What training tells: the same figures in every place."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import SPEEDS, StraightRuns, Tiny, board, figures, in_process, signal_at, verb

from training.checkpoint import Progress
from training.log import LOG_EVERY, Log, forget_after
from training.recipe import load
from training.run import Run
from training.signals import Interrupted
from training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def told(run: Run) -> dict[tuple[str, int], float]:
    """The figures of metrics.jsonl by name and step."""
    return {
        (f"{line['kind']}/{name}", line["step"]): value
        for line in map(json.loads, run.metrics.read_text().splitlines())
        for name, value in line.items()
        if name not in ("step", "epoch", "kind")
    }


def test_metrics_and_tensorboard_show_the_same(straight: StraightRuns) -> None:
    run = straight["attention"].run
    expected = told(run)
    assert {name for name, _ in expected} == {
        "training/loss", "training/objective", "training/learning_rate", "training/gradient_norm",
        *(f"training/{name}" for name in SPEEDS), "validation/perplexity", "validation/bleu",
    }  # fmt: skip
    shown = board(run)
    assert shown.keys() == expected.keys()
    for key, value in expected.items():
        assert shown[key] == pytest.approx(value, rel=1e-6)


def test_figures_are_of_all_updates_since_the_last_line(tiny: Tiny) -> None:
    progress = Progress(step=LOG_EVERY)
    with Log(tiny.run, progress) as log:
        for n in range(LOG_EVERY):
            log.count({"loss": 2.0 * n, "surprise": 1.0 * n, "tokens": 10.0,
                       "source_tokens": 30.0, "norm": 5.0})  # fmt: skip
        log.write(progress, 0.5)
        assert progress.sums == {}
    mean = (LOG_EVERY - 1) / 2
    assert figures(tiny.run) == [
        {"step": LOG_EVERY, "epoch": 1, "kind": "training", "loss": mean / 10,
         "objective": 2 * mean / 10, "learning_rate": 0.5, "gradient_norm": 5.0}
    ]  # fmt: skip
    speeds = json.loads(tiny.run.metrics.read_text())
    assert speeds[SPEEDS[1]] == pytest.approx(3 * speeds[SPEEDS[0]])


def test_a_process_that_is_not_the_first_writes_nothing(tiny: Tiny) -> None:
    former = tiny.files()
    with Log(tiny.run, Progress(), speaks=False, wandb=True) as log:
        log.count({"loss": 1.0, "surprise": 1.0, "tokens": 1.0, "source_tokens": 1.0, "norm": 1.0})
        log.write(Progress(step=LOG_EVERY), 0.5)
        log.validation(Progress(step=LOG_EVERY), {"perplexity": 2.0})
    assert tiny.files() == former


def test_lines_that_are_done_again_and_half_lines_are_dropped(tiny: Tiny) -> None:
    lines = [f'{{"step": {n}}}\n' for n in (20, 40, 60)]
    tiny.run.metrics.write_text("".join(lines) + '{"step": 80, "lo')
    forget_after(tiny.run.metrics, 40)
    assert tiny.run.metrics.read_text() == "".join(lines[:2])


def test_lines_without_figures_are_dropped(tiny: Tiny) -> None:
    tiny.run.metrics.write_bytes(b'5\n[5]\nnull\n{"step": "5"}\n\xff\n{"step": 20}\n')
    forget_after(tiny.run.metrics, 40)
    assert tiny.run.metrics.read_text() == '{"step": 20}\n'


# Weights & Biases


class FakeWandb(SimpleNamespace):
    """A module `wandb` that notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[dict[str, Any]] = []
        self.logged: dict[tuple[str, int], float] = {}
        self.finished = 0

    def init(self, **how: Any) -> "FakeWandb":
        self.begun.append(how)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged |= {(name, step): value for name, value in values.items()}

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def test_wandb_is_told_the_same(
    tiny: Tiny, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(tiny.file)
    with monkeypatch.context() as patched:
        signal_at(patched, lambda step: step == 24)
        with pytest.raises(Interrupted):
            train(recipe, tiny.run, wandb=True)
    assert wandb.finished == 1
    train(recipe, tiny.run, wandb=True)
    assert wandb.finished == 2
    first, second = wandb.begun
    assert first == second  # it goes on with the same run
    assert first["project"] == "seq2serve"
    assert first["resume"] == "allow"
    assert wandb.logged == told(tiny.run)


def test_without_wandb_nobody_asks_for_it(tiny: Tiny, wandb: FakeWandb) -> None:
    tiny.train()
    assert not wandb.begun


def test_wandb_that_is_not_installed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import fails
    former = tiny.files()
    code, error = verb(monkeypatch, capsys, tiny, "train", "--wandb")
    assert code == 1
    assert error == "train: --wandb: wandb is not installed; 'pip install wandb' does it\n"
    assert tiny.files() == former


def test_nothing_is_drawn_where_nobody_looks(tiny: Tiny) -> None:
    done = in_process(tiny)
    assert done.returncode == 0
    assert all(line.startswith("step ") for line in done.stderr.splitlines())
    assert done.stdout == "finished at step 40: 2 epochs are done; best at step 40\n"
