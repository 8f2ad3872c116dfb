"""The training loop, in the order in which it happens."""

import math
import shutil
import sys
import time
from contextlib import closing, nullcontext
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
from training.memory import SMALLER_BATCHES, SMALLER_MODEL, enough_memory
from training.recipe import Recipe, TrainingOptions
from training.run import Run, RunError, only_writer, write_json
from training.schedule import learning_rate
from training.scoring import perplexity, score_text
from training.signals import Interrupted, StopSignals
from training.tokens import TokenPairs

SAVE_SECONDS = 120.0  # most work that a crash can cost
STOPPED = 130  # exit code, as of a shell whose command was stopped by Ctrl-C
NAMED_BATCHES = 2  # of an update that failed
NAMED_PAIRS = 3  # of each of these
SHOWN = 80  # characters of a source


def choose_device(options: TrainingOptions, local: int = 0) -> torch.device:
    """Where to compute; `local` is the number of the GPU."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "training.device: got 'cuda', but torch sees no GPU here; allowed here: 'cpu' or 'auto'"
        )
    if options.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local)


def check_lengths(recipe: Recipe, run: Run, source: Tokenizer) -> None:
    """Whether the model may read what it is to be scored on.

    Raises:
        RunError: a sentence of validation or test has too many tokens.
    """
    longest, where = 0, ""
    for name in ("validation", "test"):
        texts, _ = sentences(run.data, name)
        for number, text in enumerate(texts, 1):
            length = len(source.encode(text)) + 1
            if length > longest:
                longest, where = length, f"line {number} of {run.data / name}.source"
    if longest > recipe.export.max_source_length:
        raise RunError(
            f"export.max_source_length: got {recipe.export.max_source_length}; allowed: at least "
            f"{longest}, as {where} has so many tokens with EOS; or split that line in the text "
            "and prepare again"
        )


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
        accept_changes: go on under another `training` section than the run began with, and with
            another number of processes.
        wandb: show figures in Weights & Biases too.

    Raises:
        RunError: nothing prepared; a checkpoint of another recipe, data or number of processes; a
            sentence to be scored that is too long; another process that trains there; a loss that
            is no number; too little memory or disk.
        Interrupted: by a signal, after saving.
    """
    if run.members:
        raise RunError(
            f"{run.root}: is an ensemble; train its members, or choose another folder with --run"
        )
    run.demand(run.report, "prepare")
    gpu = choose_device(recipe.training).type == "cuda"
    with (
        processes(gpu) as all_processes,
        only_writer(run.root, "train") if all_processes.first else nullcontext(),
    ):
        code = None
        try:
            progress = Trainer(recipe, run, fresh, accept_changes, wandb, all_processes).train()
        except Interrupted:
            if all_processes.first:
                raise
            code = STOPPED  # used after this clause: its exception holds what holds the group
    if not all_processes.first:
        sys.exit(code)
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
        check_lengths(recipe, run, self.source)
        torch.manual_seed(self.options.seed)
        with enough_memory("making the network", SMALLER_MODEL):
            network = Network(recipe.model, self.source.size, self.target.size)
            self.network = network.to(self.device)
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

    def resume(self, accept_changes: bool) -> None:
        stored, said = checkpoint.newest(self.recipe, self.run, self.digests, accept_changes)
        said += self.elsewhere(stored, accept_changes)
        with enough_memory("restoring the checkpoint", SMALLER_MODEL):
            self.progress = checkpoint.restore(stored, self.learner)
        if self.processes.first:
            for line in said:
                print(f"train: {line}", file=sys.stderr)
            forget_after(self.run.metrics, self.progress.step)
            if accept_changes and not self.progress.finished:
                checkpoint.adopt(self.recipe, self.run)

    def elsewhere(self, stored: dict[str, Any], accept_changes: bool) -> list[str]:
        """What to tell of a checkpoint that other processes made, or in another precision.

        Raises:
            RunError: another number of processes, whose updates are of another size, unless that is
                accepted or nothing is left to learn.
        """
        said = []
        now, then = self.processes.count, stored.get("processes", self.processes.count)
        size = then * stored["recipe"]["training"].get("accumulate", 1)
        if now != then and accept_changes:
            said.append(
                f"changed: processes: {then} -> {now}; batches an update: {size} -> "
                f"{now * self.options.accumulate}"
            )
        elif now != then and not stored["progress"]["finished"]:
            raise RunError(
                f"{self.run.root}: processes: got {now}; allowed: {then}, as the run was trained "
                f"by so many: an update would be of {now * self.options.accumulate} batches "
                f"instead of {size}. Start {then}, or train with --accept-changes; --set "
                f"training.accumulate={max(1, round(size / now))} with it keeps an update's size"
            )
        precision = stored.get("precision", self.learner.precision_name)
        if precision != self.learner.precision_name:
            said.append(f"changed: precision: {precision} -> {self.learner.precision_name}")
        return said

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
                    "precision": self.learner.precision_name,
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
            for group in groups:
                epoch = progress.epoch + progress.batch / len(batches)
                if epoch >= options.epochs:
                    progress.finished = f"{options.epochs:g} epochs are done"
                    return
                rate = learning_rate(options, progress.step, epoch, progress.disappointments)
                with enough_memory(f"step {progress.step}", SMALLER_BATCHES):
                    log.count(self.update(next(updates), rate, group))
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
                    raise Interrupted(f"stopped at step {progress.step}; the same command goes on")
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
        self, batches: list[Batch], rate: float, group: list[tuple[int, Tensor]]
    ) -> dict[str, float]:
        """One update of the weights; what it cost and gave.

        Args:
            batches: those of this process.
            group: number in the epoch and pairs of each batch of all processes, to name those that
                fail.
        """
        step = self.progress.step
        try:
            return self.learner.update(batches, step, rate)
        except NotFinite as error:
            at = self.run.checkpoints[0]
            kept = f"{at} holds the last good state. " if at.exists() else ""
            # A process without a batch has a number that is beyond the group.
            wrong = [group[i] for i in error.batches if i < len(group)] or group
            raise RunError(
                f"step {step}: {error}, in {self.named(wrong)}. {kept}Lower training.learning_rate "
                "or training.clip_norm and go on with --accept-changes, or look at these pairs"
            ) from None

    def named(self, batches: list[tuple[int, Tensor]]) -> str:
        """Words for batches of the epoch and the sources in them."""
        told = []
        for number, pairs in batches[:NAMED_BATCHES]:
            some = ", ".join(f"{i + 1} {self.shown(i)!r}" for i in pairs[:NAMED_PAIRS].tolist())
            told.append(f"batch {number + 1} (pairs {some}{more(len(pairs) - NAMED_PAIRS)})")
        return (
            f"epoch {self.progress.epoch + 1}, {', '.join(told)}"
            f"{more(len(batches) - NAMED_BATCHES)}; pairs are counted from 1 among those kept for "
            "training, as the lines that distill writes"
        )

    def shown(self, i: int) -> str:
        """The source of a pair, cut to what a message bears."""
        text = self.source.decode(self.pairs.pairs.source(i))
        return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"

    def validate(self, log: Log) -> None:
        """Perplexity and BLEU of the held-out text; keep the best weights; decide to go on."""
        if self.processes.first:
            where = f"validation at step {self.progress.step}"
            with enough_memory(where, SMALLER_BATCHES), self.learner.averaged():
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


def more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
