"""The training loop, in the order in which it happens."""

import math
import shutil
import sys
import time
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from handler.tokenizer import Tokenizer
from model import Network, ServingModel
from training import checkpoint
from training.batches import Batch, BatchSampler
from training.checkpoint import Progress
from training.corpus import sentences
from training.distributed import Processes, processes
from training.learner import Learner, NotFinite
from training.loading import Loader
from training.log import LOG_EVERY, Log, forget_after
from training.recipe import Recipe, TrainingOptions
from training.run import Run, RunError, write_json
from training.schedule import learning_rate
from training.scoring import perplexity, score_text
from training.signals import StopSignals
from training.tokens import TokenPairs

SAVE_SECONDS = 120.0  # most work that a crash can cost
STOPPED = 130  # exit code, as of a shell whose command was stopped by Ctrl-C
NAMED_PAIRS = 8  # of a batch that failed
OUT_OF_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")  # CUDA, CPU, cuBLAS


class Interrupted(Exception):
    """Stopped by Ctrl-C or SIGTERM; everything needed to go on is saved."""


def choose_device(options: TrainingOptions, local: int = 0) -> torch.device:
    """Where to compute; `local` is the number of the GPU."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "training.device: got 'cuda', but torch sees no GPU here; allowed here: 'cpu' or 'auto'"
        )
    if options.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local)


def tokenizers(run: Run) -> tuple[Tokenizer, Tokenizer]:
    """Those of the source and of the target."""
    return Tokenizer(run.tokenizer / "source.model"), Tokenizer(run.tokenizer / "target.model")


def train(
    recipe: Recipe, run: Run, fresh: bool = False, accept_changes: bool = False, wandb: bool = False
) -> Progress:
    """Train until the recipe's epochs are over or validation stops improving.

    Goes on from the last checkpoint where there is one, and then gives the same weights as a run
    that was never stopped. Under torchrun, all processes train one network; this returns in the
    first alone, and the others exit.

    Args:
        fresh: begin anew, whatever is there.
        accept_changes: go on under another `training` section than the run began with.
        wandb: show figures in Weights & Biases too.

    Raises:
        RunError: nothing prepared; a checkpoint of another recipe or data; a loss that is no
            number; too little memory or disk.
        Interrupted: by a signal, after saving.
    """
    if run.members:
        raise RunError(
            f"{run.root}: is an ensemble; train its members, or choose another folder with --run"
        )
    gpu = choose_device(recipe.training).type == "cuda"
    with processes(gpu) as all_processes:
        try:
            progress = Trainer(recipe, run, fresh, accept_changes, wandb, all_processes).train()
        except Interrupted:
            if all_processes.first:
                raise
            sys.exit(STOPPED)
    if not all_processes.first:
        sys.exit()
    return progress


class Trainer:
    """A network that learns, its data, and where training stands."""

    def __init__(
        self, recipe: Recipe, run: Run, fresh: bool, accept_changes: bool = False,
        wandb: bool = False, all_processes: Processes = Processes(),
    ) -> None:  # fmt: skip
        self.recipe, self.run, self.options = recipe, run, recipe.training
        self.processes, self.wandb = all_processes, wandb
        self.digests = checkpoint.prepared(recipe, run)
        self.device = choose_device(self.options, all_processes.local)
        self.source, self.target = tokenizers(run)
        self.pairs, self.held_out = (
            Loader(
                TokenPairs.load(run.data / f"{name}.tokens"), (self.source, self.target),
                self.device, sampling, self.options.seed,
            )
            for name, sampling in (
                ("train", self.options.subword_sampling), ("validation", 0.0)
            )
        )  # fmt: skip
        self.sampler = BatchSampler(
            self.pairs.pairs, self.options.batch_tokens, self.options.batch_sentences,
            self.options.seed,
        )  # fmt: skip
        self.check_lengths()
        torch.manual_seed(self.options.seed)
        self.network = Network(recipe.model, self.source.size, self.target.size).to(self.device)
        self.learner = Learner(self.network, self.options, all_processes)
        self.progress = Progress()
        self.since = time.monotonic()
        if not fresh and any(path.exists() for path in (*run.checkpoints, run.best)):
            self.resume(accept_changes)
        elif all_processes.first:
            # Scores and model too, or they would pass for those of the new weights.
            for stale in (*run.checkpoints, run.best, run.metrics, run.wandb, run.summary,
                          run.scores, run.model):  # fmt: skip
                stale.unlink(missing_ok=True)
            shutil.rmtree(run.tensorboard, ignore_errors=True)
        if all_processes.total(self.progress.step)[0] != all_processes.count * self.progress.step:
            raise RunError(
                f"{run.root}: the processes go on from different steps; allowed: one folder that "
                "all machines share"
            )
        for left in run.checkpoints[0].parent.glob(".*.tmp") if all_processes.first else ():
            left.unlink(missing_ok=True)  # by a process that was killed while it saved

    def check_lengths(self) -> None:
        longest = int(self.held_out.pairs.source_lengths().max())
        if longest > self.recipe.export.max_source_length:
            raise RunError(
                f"export.max_source_length: got {self.recipe.export.max_source_length}; allowed: "
                f"at least {longest}, as a validation sentence has so many tokens"
            )

    def resume(self, accept_changes: bool) -> None:
        stored, said = checkpoint.newest(self.recipe, self.run, self.digests, accept_changes)
        self.progress = checkpoint.restore(stored, self.learner)
        if self.processes.first:
            for line in said:
                print(f"train: {line}", file=sys.stderr)
            forget_after(self.run.metrics, self.progress.step)
            if accept_changes and not self.progress.finished:
                checkpoint.adopt(self.recipe, self.run)

    def train(self) -> Progress:
        progress = self.progress
        if not progress.finished:
            with Log(self.run, progress, self.processes.first, self.wandb) as log, \
                    StopSignals() as stop:  # fmt: skip
                self.since = time.monotonic()
                while not progress.finished:
                    self.epoch(log, stop)
                if progress.step % self.options.validate_every or progress.step == 0:
                    self.validate(log)
                self.save()
        if self.processes.first:
            write_json(
                self.run.summary,
                {
                    "steps": progress.step,
                    "best_step": progress.best_step,
                    self.options.select_by: abs(progress.best_score or 0.0),
                    "ended": progress.finished,
                    "parameters": sum(p.numel() for p in self.network.parameters()),
                    "precision": str(self.learner.precision).removeprefix("torch."),
                    "seconds": round(progress.seconds, 1),
                },
            )
        return progress

    def epoch(self, log: Log, stop: StopSignals) -> None:
        """The rest of the current epoch, or less where training finishes."""
        progress, options = self.progress, self.options
        batches = self.sampler.batches(progress.epoch)
        step_size = options.accumulate * self.processes.count
        starts = range(progress.batch, len(batches), step_size)
        groups = [list(enumerate(batches[i : i + step_size], i)) for i in starts]
        mine = [group[self.processes.rank :: self.processes.count] for group in groups]
        updates = self.pairs.updates(mine, progress.epoch)
        with self.bar(len(batches)) as bar, closing(updates):
            for group, own, loaded in zip(groups, mine, updates):
                epoch = progress.epoch + progress.batch / len(batches)
                if epoch >= options.epochs:
                    progress.finished = f"{options.epochs:g} epochs are done"
                    return
                rate = learning_rate(options, progress.step, epoch, progress.disappointments)
                log.count(self.update(loaded, rate, own))
                progress.step += 1
                progress.batch += len(group)
                if progress.step % LOG_EVERY == 0:
                    bar.set_postfix(log.write(progress, rate), refresh=False)
                bar.update(len(group))
                asked = self.processes.total(float(stop.asked))[0] > 0
                if progress.step % options.validate_every == 0:
                    self.validate(log)
                elif asked or time.monotonic() - self.since > SAVE_SECONDS:
                    self.save()
                if asked and not progress.finished:
                    raise Interrupted(f"stopped at step {progress.step}; train again to go on")
                if progress.finished:
                    return
        progress.epoch, progress.batch = progress.epoch + 1, 0

    def bar(self, batches: int) -> Any:
        return tqdm(
            total=batches, initial=self.progress.batch, unit="batch", leave=False,
            desc=f"epoch {self.progress.epoch + 1}/{math.ceil(self.options.epochs)}",
            disable=not (self.processes.first and sys.stderr.isatty()),
        )  # fmt: skip

    def update(
        self, batches: list[Batch], rate: float, own: list[tuple[int, Tensor]]
    ) -> dict[str, float]:
        """One update of the weights; what it cost and gave.

        Args:
            own: number in the epoch and pairs of each batch, to name those that fail.
        """
        step = self.progress.step
        try:
            return self.learner.update(batches, step, rate)
        except NotFinite as error:
            at = self.run.checkpoints[0]
            kept = f"{at} holds the last good state. " if at.exists() else ""
            raise RunError(
                f"step {step}: {error}, in {named(self.progress.epoch, own)}. {kept}"
                "Lower training.learning_rate or training.clip_norm, or look at these pairs"
            ) from None
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            text = str(error).splitlines()[0] if str(error) else "out of memory"
            if isinstance(error, RuntimeError) and not any(one in text for one in OUT_OF_MEMORY):
                raise
            raise RunError(
                f"step {step}: {text.rstrip('.')}. Lower training.batch_tokens "
                "(training.accumulate makes up for it) or the sizes of the model"
            ) from None

    def validate(self, log: Log) -> None:
        """Perplexity and BLEU of the held-out text; keep the best weights; decide to go on."""
        if self.processes.first:
            with self.learner.averaged():
                figures = {
                    "perplexity": perplexity(
                        self.network, self.held_out.every(self.options.batch_tokens)
                    ),
                    "bleu": self.bleu(),
                }
            log.validation(self.progress, figures)
            self.judge(figures)
        vars(self.progress).update(self.processes.shared(vars(self.progress)))

    def judge(self, figures: dict[str, float]) -> None:
        progress, options = self.progress, self.options
        score = figures["bleu"] if options.select_by == "bleu" else -figures["perplexity"]
        better = progress.best_score is None or score > progress.best_score
        progress.since_best = 0 if better else progress.since_best + 1
        if better:
            progress.best_score, progress.best_step = score, progress.step
        else:
            progress.disappointments += 1
        if progress.since_best >= options.patience and not progress.finished:
            progress.finished = (
                f"no better {options.select_by} in {options.patience} validations since step "
                f"{progress.best_step}"
            )
        if better:
            self.save(best=True)
        self.save()
        tqdm.write(
            f"step {progress.step}: validation perplexity {figures['perplexity']:.3f}, "
            f"BLEU {figures['bleu']:.2f}{' (best)' if better else ''}", file=sys.stderr,
        )  # fmt: skip

    def bleu(self) -> float:
        limits = self.recipe.export
        model = ServingModel(self.network, limits.max_source_length, limits.max_target_length)
        source, references = sentences(self.run.data, "validation")
        scores, _ = score_text(
            model, self.source, self.target, source, references, self.device, self.recipe.scoring
        )
        return scores.bleu

    def save(self, best: bool = False) -> None:
        if not self.processes.first:
            self.since = time.monotonic()
            return
        now = time.monotonic()
        self.progress.seconds += now - self.since
        self.since = now
        content = checkpoint.content(self.recipe, self.digests, self.progress, self.learner)
        if best:
            checkpoint.write(self.run.best, content)
        else:
            checkpoint.rotate(self.run, content)


def named(epoch: int, batches: list[tuple[int, Tensor]]) -> str:
    """Words for batches of an epoch and the pairs in them."""
    told = []
    for number, pairs in batches:
        some = ", ".join(str(i) for i in pairs[:NAMED_PAIRS].tolist())
        more = f" and {len(pairs) - NAMED_PAIRS} more" if len(pairs) > NAMED_PAIRS else ""
        told.append(f"batch {number} (pairs {some}{more} of those kept for training)")
    return f"epoch {epoch + 1}, " + ", ".join(told)
