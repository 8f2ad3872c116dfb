"""What training tells while it runs."""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from training.checkpoint import Progress
from training.run import Run, RunError, write_bytes, write_text

LOG_EVERY = 20  # updates between two lines of metrics.jsonl


class Log:
    """metrics.jsonl, TensorBoard and, where it is asked for, Weights & Biases: the same figures.

    Args:
        speaks: false in all processes but one: they count and write nothing.
        wandb: `wandb` must be installed and logged in, or WANDB_MODE be offline.
    """

    def __init__(
        self, run: Run, progress: Progress, speaks: bool = True, wandb: bool = False
    ) -> None:
        self.run, self.speaks, self.wandb = run, speaks, None
        if speaks:
            self.wandb = weights_and_biases(run) if wandb else None
            # Line by line, so that a crash loses none.
            self.file = run.metrics.open("a", encoding="utf-8", buffering=1)
            self.board = SummaryWriter(str(run.tensorboard), purge_step=progress.step + 1)
        self.sums = progress.sums  # saved with it, so that a resumed run logs the same figures
        self.since = time.monotonic()

    def count(self, figures: dict[str, float]) -> None:
        now = time.monotonic()
        for name, value in {**figures, "seconds": now - self.since}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.since = now

    def write(self, progress: Progress, rate: float) -> dict[str, str]:
        """Figures since the last call; those worth showing on the progress bar."""
        seconds, tokens = self.sums["seconds"], self.sums["tokens"]
        loss, speed = self.sums["surprise"] / tokens, tokens / seconds
        self.line(
            progress, "training", loss=loss, objective=self.sums["loss"] / tokens,
            learning_rate=rate,
            gradient_norm=self.sums["norm"] / LOG_EVERY, target_tokens_per_second=speed,
            source_tokens_per_second=self.sums["source_tokens"] / seconds,
        )
        self.sums.clear()
        return {"loss": f"{loss:.3f}", "words/s": f"{speed:.0f}"}

    def validation(self, progress: Progress, figures: dict[str, float]) -> None:
        self.line(progress, "validation", **figures)
        self.since = time.monotonic()  # validation is not training time

    def line(self, progress: Progress, kind: str, **figures: float) -> None:
        if not self.speaks:
            return
        line = {"step": progress.step, "epoch": progress.epoch + 1, "kind": kind, **figures}
        with self.writing():
            self.file.write(json.dumps(line) + "\n")
            for name, value in figures.items():
                self.board.add_scalar(f"{kind}/{name}", value, progress.step)
            self.board.flush()
        if self.wandb is not None:
            told = {f"{kind}/{name}": value for name, value in figures.items()}
            self.wandb.log(told, step=progress.step)

    @contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.run.metrics}, {self.run.tensorboard}: cannot be written: {error}; make "
                "space, then train again to go on from the last checkpoint"
            ) from None

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.speaks:
            # What stops training says why; that nothing can be written any more, it knows.
            with self.writing() if error is None else suppress(OSError), closing(self.board):
                self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def weights_and_biases(run: Run) -> Any:
    """A run of Weights & Biases that goes on with this one's."""
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise RunError("--wandb: wandb is not installed; 'pip install wandb' does it") from None
    if not run.wandb.exists():
        write_text(run.wandb, f"{run.root.name}-{secrets.token_hex(4)}")
    name = run.wandb.read_text(encoding="utf-8")
    return wandb.init(project="seq2serve", id=name, resume="allow", dir=str(run.root))


def forget_after(metrics: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will do again, and what is no line of figures, such
    as one cut off by a crash."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_bytes(metrics, b"".join(kept))
