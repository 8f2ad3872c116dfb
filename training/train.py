"""The training loop, in the order in which it happens."""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from handler.tokenizer import Tokenizer
from model import Network, ServingModel, SpecialTokens
from training import checkpoint
from training.batches import Batch, BatchSampler, TokenPairs, collate
from training.checkpoint import Progress
from training.corpus import lines
from training.recipe import Recipe, TrainingOptions
from training.run import Run, RunError, write_json, write_text
from training.schedule import learning_rate
from training.scoring import perplexity, score_text, token_losses

LOG_EVERY = 20  # updates between two lines of metrics.jsonl
SAVE_SECONDS = 120.0  # most work that a crash can cost


class Interrupted(Exception):
    """Stopped by Ctrl-C or SIGTERM; everything needed to go on is saved."""


def choose_device(options: TrainingOptions) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "training.device: got 'cuda', but torch sees no GPU here; allowed here: 'cpu' or 'auto'"
        )
    if options.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def tokenizers(run: Run) -> tuple[Tokenizer, Tokenizer]:
    """Those of the source and of the target."""
    return Tokenizer(run.tokenizer / "source.model"), Tokenizer(run.tokenizer / "target.model")


def train(recipe: Recipe, run: Run, fresh: bool = False) -> Progress:
    """Train until the recipe's epochs are over or validation stops improving.

    Goes on from the last checkpoint where there is one, and then gives the same weights as a run
    that was never stopped.

    Args:
        fresh: begin anew, whatever is there.

    Raises:
        RunError: nothing prepared; a checkpoint of another recipe or data; a loss that is no
            number.
        Interrupted: by a signal, after saving.
    """
    return Trainer(recipe, run, fresh).train()


class Trainer:
    """A network, its optimiser, its data, and where training stands."""

    def __init__(self, recipe: Recipe, run: Run, fresh: bool) -> None:
        self.recipe, self.run, self.options = recipe, run, recipe.training
        self.digests = checkpoint.prepared(recipe, run)
        self.device = choose_device(self.options)
        self.pairs = TokenPairs.load(run.data / "train.pt")
        self.held_out = TokenPairs.load(run.data / "validation.pt")
        self.sampler = BatchSampler(
            self.pairs, self.options.batch_tokens, self.options.batch_sentences, self.options.seed
        )
        self.check_lengths()
        self.source, self.target = tokenizers(run)
        torch.manual_seed(self.options.seed)
        network = Network(recipe.model, self.source.size, self.target.size)
        self.network = network.to(self.device)
        self.optimizer = make_optimizer(self.options, self.network)
        self.progress = Progress()
        if not fresh and (run.last.exists() or run.best.exists()):
            self.resume()
        else:
            # Scores and model too, or they would pass for those of the new weights.
            for stale in (run.last, run.best, run.metrics, run.summary, run.scores, run.model):
                stale.unlink(missing_ok=True)
            shutil.rmtree(run.tensorboard, ignore_errors=True)

    def check_lengths(self) -> None:
        longest = int(self.held_out.source_lengths().max())
        if longest > self.recipe.export.max_source_length:
            raise RunError(
                f"export.max_source_length: got {self.recipe.export.max_source_length}; allowed: "
                f"at least {longest}, as a validation sentence has so many tokens"
            )

    def resume(self) -> None:
        run = self.run
        # A run killed while it first saved has only the best, which is as good to go on from.
        path = run.last if run.last.exists() else run.best
        stored = checkpoint.load_own(path, self.recipe, self.digests)
        self.progress = checkpoint.restore(stored, self.network, self.optimizer)
        forget_after(run.metrics, self.progress.step)

    def train(self) -> Progress:
        progress = self.progress
        if not progress.finished:
            with Log(self.run, progress) as log, StopSignals() as stop:
                self.since = time.monotonic()
                while not progress.finished:
                    self.epoch(log, stop)
                if progress.step % self.options.validate_every or progress.step == 0:
                    self.validate(log)
                self.save(self.run.last)
        write_json(
            self.run.summary,
            {
                "steps": progress.step,
                "best_step": progress.best_step,
                self.options.select_by: abs(progress.best_score or 0.0),
                "ended": progress.finished,
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "seconds": round(progress.seconds, 1),
            },
        )
        return progress

    def epoch(self, log: "Log", stop: "StopSignals") -> None:
        """The rest of the current epoch, or less where training finishes."""
        progress, options = self.progress, self.options
        batches = self.sampler.batches(progress.epoch)
        with self.bar(len(batches)) as bar:
            for index in batches[progress.batch :]:
                epoch = progress.epoch + progress.batch / len(batches)
                if epoch >= options.epochs:
                    progress.finished = f"{options.epochs:g} epochs are done"
                    return
                rate = learning_rate(options, progress.step, epoch)
                try:
                    log.count(self.update(self.batch(self.pairs, index), rate))
                except torch.OutOfMemoryError as error:
                    raise RunError(
                        f"step {progress.step}: {str(error).splitlines()[0]} Lower "
                        "training.batch_tokens or the sizes of the model"
                    ) from None
                progress.step += 1
                progress.batch += 1
                if progress.step % LOG_EVERY == 0:
                    bar.set_postfix(log.write(progress, rate), refresh=False)
                bar.update()
                if progress.step % options.validate_every == 0:
                    self.validate(log)
                elif stop.asked or time.monotonic() - self.since > SAVE_SECONDS:
                    self.save(self.run.last)
                if stop.asked and not progress.finished:
                    raise Interrupted(f"stopped at step {progress.step}; train again to go on")
                if progress.finished:
                    return
        progress.epoch, progress.batch = progress.epoch + 1, 0

    def bar(self, batches: int) -> Any:
        return tqdm(
            total=batches, initial=self.progress.batch, unit="batch", leave=False,
            desc=f"epoch {self.progress.epoch + 1}/{math.ceil(self.options.epochs)}",
            disable=not sys.stderr.isatty(),
        )

    def batch(self, pairs: TokenPairs, index: torch.Tensor) -> Batch:
        return Batch(*(t.to(self.device) for t in collate(pairs, index, SpecialTokens())))

    def update(self, batch: Batch, rate: float) -> dict[str, float]:
        """One update of the weights; what it cost and gave."""
        self.network.train()
        tokens = int(batch.target_lengths.sum())
        loss = token_losses(self.network, batch, self.options.label_smoothing)
        (loss / (tokens if self.options.loss_per == "token" else batch.source.size(0))).backward()
        # s = ||g||; where s > clip_norm, g <- clip_norm * g / s (1409.3215, section 3.4)
        total = torch.nn.utils.clip_grad_norm_(
            self.network.parameters(), self.options.clip_norm
        )
        loss_sum, norm = float(loss.detach()), float(total)
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            kept = f"{self.run.last} holds the last good state. " if self.run.last.exists() else ""
            raise RunError(
                f"step {self.progress.step}: the loss is {loss_sum} and the gradient's norm "
                f"{norm}. {kept}Lower training.learning_rate or training.clip_norm"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": loss_sum, "tokens": tokens, "norm": norm,
            "source_tokens": int(batch.source_lengths.sum()),
        }

    def validate(self, log: "Log") -> None:
        """Perplexity and BLEU of the held-out text; keep the best weights; decide to go on."""
        progress, options = self.progress, self.options
        figures = {
            "perplexity": perplexity(self.network, self.held_out_batches()),
            "bleu": self.bleu(),
        }
        log.validation(progress, figures)
        score = figures["bleu"] if options.select_by == "bleu" else -figures["perplexity"]
        better = progress.best_score is None or score > progress.best_score
        progress.since_best = 0 if better else progress.since_best + 1
        if better:
            progress.best_score, progress.best_step = score, progress.step
        if progress.since_best >= options.patience and not progress.finished:
            progress.finished = (
                f"no better {options.select_by} in {options.patience} validations since step "
                f"{progress.best_step}"
            )
        if better:
            self.save(self.run.best)
        self.save(self.run.last)
        tqdm.write(
            f"step {progress.step}: validation perplexity {figures['perplexity']:.3f}, "
            f"BLEU {figures['bleu']:.2f}{' (best)' if better else ''}", file=sys.stderr,
        )

    def held_out_batches(self) -> Iterator[Batch]:
        sampler = BatchSampler(self.held_out, self.options.batch_tokens, 1024, seed=0)
        return (self.batch(self.held_out, index) for index in sampler.batches(0))

    def bleu(self) -> float:
        limits = self.recipe.export
        model = ServingModel(self.network, limits.max_source_length, limits.max_target_length)
        source, references = (
            list(lines(self.run.data / f"validation.{side}")) for side in ("source", "target")
        )
        scores, _ = score_text(model, self.source, self.target, source, references, self.device)
        return scores.bleu

    def save(self, path: Path) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.since
        self.since = now
        checkpoint.save(
            path, self.recipe, self.digests, self.progress, self.network, self.optimizer
        )


def make_optimizer(options: TrainingOptions, network: Network) -> torch.optim.Optimizer:
    """Adam (arXiv 1412.6980) with the second decay of 1706.03762, or SGD without momentum."""
    if options.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr=options.learning_rate)
    return torch.optim.Adam(
        network.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-9
    )


class Log:
    """metrics.jsonl and TensorBoard, which show the same figures."""

    def __init__(self, run: Run, progress: Progress) -> None:
        run.root.mkdir(parents=True, exist_ok=True)
        self.file = run.metrics.open("a", encoding="utf-8", buffering=1)  # a crash loses no line
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
        loss, speed = self.sums["loss"] / tokens, tokens / seconds
        self.line(
            progress, "training", loss=loss, learning_rate=rate,
            gradient_norm=self.sums["norm"] / LOG_EVERY, target_tokens_per_second=speed,
            source_tokens_per_second=self.sums["source_tokens"] / seconds,
        )
        self.sums.clear()
        return {"loss": f"{loss:.3f}", "words/s": f"{speed:.0f}"}

    def validation(self, progress: Progress, figures: dict[str, float]) -> None:
        self.line(progress, "validation", **figures)
        self.since = time.monotonic()  # validation is not training time

    def line(self, progress: Progress, kind: str, **figures: float) -> None:
        line = {"step": progress.step, "epoch": progress.epoch + 1, "kind": kind, **figures}
        self.file.write(json.dumps(line) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(f"{kind}/{name}", value, progress.step)
        self.board.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()
        self.board.close()


def forget_after(metrics: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will do again, and a line cut off by a crash."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_text(metrics, "".join(kept))


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a request to stop after the current update; a second one stops
    at once."""

    asked = False

    def __enter__(self) -> "StopSignals":
        kinds = (signal.SIGINT, signal.SIGTERM)
        self.former = {kind: signal.signal(kind, self.ask) for kind in kinds}
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, former in self.former.items():
            signal.signal(number, former)
