"""The stages of a run, prepare to archive, and the verb `build`: those of them that are not done
yet, or were done for another recipe or text than is given now.

What is there is compared by content, never by time, as every stage leaves what it was made by:
report.json the recipe and the digests of text, tokenizers and tokens; a checkpoint its recipe and
those digests; scores.json the digests of the weights and how they were scored; model.pt a card with
all of it; the archive the digests of its files. What is quick is made again. Weights are not: those
of another recipe or text are an error that names the difference, unless `fresh` is given.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from training import checkpoint
from training.archive import NAME, archive, archived, deliver
from training.distributed import process_count
from training.evaluate import best_model, evaluate, scored_otherwise
from training.export import export, outdated
from training.prepare import prepare
from training.recipe import Recipe
from training.run import Run, RunError, only_writer
from training.train import train

STAGES = ("prepare", "train", "evaluate", "export", "archive")
NEW = "not done yet"


@dataclass(frozen=True)
class StageOptions:
    """fresh, accept_changes, wandb: see `training.train.train`.

    store: folder for the archive.
    """

    fresh: bool = False
    accept_changes: bool = False
    wandb: bool = False
    store: Path = Path("model-store")


def build(recipe: Recipe, run: Run, until: str, options: StageOptions = StageOptions()) -> None:
    """Do what is missing of the stages up to `until`; see the top of this file. The run keeps its
    archive, and `options.store` gets a copy, which is the one that is served.

    Raises:
        RunError: weights of another recipe or text; another process that writes in the folder; more
            than one process of its own; and what the stages raise.
        Interrupted: by a signal while it trains, after saving; the same call goes on.
    """
    if (count := process_count()) > 1:  # one that does not train would have to wait for the others
        raise RunError(f"processes: got {count}; allowed: 1; torchrun starts the verb train alone")
    own = replace(options, store=run.root / "archive")
    for stage in STAGES[: STAGES.index(until) + 1]:
        with writing(stage, run):
            if reasons := missing(stage, recipe, run, own):
                print(f"{stage}: {'; '.join(reasons)}", file=sys.stderr, flush=True)
                perform(stage, recipe, run, own)
    if until != "archive":
        print(f"{run.root}: done up to {until}")
        return
    new = deliver(own.store / f"{NAME}.mar", options.store)
    was = "is" if new else "is still"
    print(f"{options.store / NAME}.mar: {was} {recipe.name} {recipe.export.version}, {run.root}")


@contextmanager
def writing(stage: str, run: Run) -> Iterator[None]:
    """Keep other processes from writing in the folder of `run`."""
    if stage == "prepare":
        run.root.mkdir(parents=True, exist_ok=True)
    # `train` has the lock itself, as it may be several processes; where there is no folder, the
    # stage says what has to come first.
    if stage == "train" or not run.root.exists():
        yield
    else:
        with only_writer(run.root, stage):
            yield


def perform(stage: str, recipe: Recipe, run: Run, options: StageOptions) -> None:
    """Do one stage and print what came of it."""
    if stage == "prepare":
        print(prepare(recipe, run.root).table())
    elif stage == "train":
        progress = train(recipe, run, options.fresh, options.accept_changes, options.wandb)
        print(f"finished at step {progress.step}: {progress.finished}; best at step "
              f"{progress.best_step}")  # fmt: skip
    elif stage == "evaluate":
        for name, scores in evaluate(recipe, run).items():
            print(f"{name}: {scores}")
    elif stage == "export":
        path = export(recipe, run)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    else:
        path = archive(recipe, run, options.store)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def missing(stage: str, recipe: Recipe, run: Run, options: StageOptions) -> list[str]:
    """Why a stage has to be done, those before it being done; nothing where it is done already.

    Raises:
        RunError: weights of another recipe or text, which have to be given up first.
    """
    if stage == "prepare":
        return unprepared(recipe, run, options.fresh)
    if stage == "train":
        return untrained(recipe, run, options)
    if stage == "evaluate":
        return unscored(recipe, run)
    if stage == "export":
        return outdated(recipe, run) if run.model.exists() else [NEW]
    built = options.store / f"{NAME}.mar"
    if not built.exists():
        return [NEW]
    return [] if archived(recipe, run, built) else ["what is in the archive has changed"]


def unprepared(recipe: Recipe, run: Run, fresh: bool) -> list[str]:
    """See `missing`. Text is prepared anew only where no weights are lost by it."""
    changed, spoilt = [], [NEW]
    weights = [path for path in (run.best, *run.checkpoints, *run.members) if path.exists()]
    try:
        report = run.read_json(run.report, "prepare")
    except RunError as error:  # none, or not a whole one
        spoilt = [str(error)] if run.report.exists() else [NEW]
        if weights and not fresh:  # they tell as much
            held = checkpoint.load(weights[0])
            told = {"recipe": held["recipe"], "sha256": held["digests"]}
            changed = checkpoint.prepared_otherwise(told, recipe)
    else:
        changed = checkpoint.prepared_otherwise(report, recipe)
        one = checkpoint.not_as_prepared(report, run)
        spoilt = [f"{one} is not what was written"] if one is not None else []
    if changed and run.members:
        raise RunError(
            f"{run.root} is an ensemble of runs that were trained otherwise: {'; '.join(changed)}. "
            "Change that back, or choose another folder with --run (make: RUN=)"
        )
    if changed and weights and not fresh:
        raise RunError(
            f"{run.root} was trained otherwise: {'; '.join(changed)}. Change that back, choose "
            "another folder with --run (make: RUN=), or begin anew with --fresh (make: FRESH=1)"
        )
    return changed + spoilt


def untrained(recipe: Recipe, run: Run, options: StageOptions) -> list[str]:
    """See `missing`."""
    if options.fresh or options.accept_changes:
        return ["--fresh" if options.fresh else "--accept-changes"]
    if not run.summary.exists():
        return ["not finished yet" if run.best.exists() else NEW]
    best_model(recipe, run)  # raises where they are of another recipe
    return []


def unscored(recipe: Recipe, run: Run) -> list[str]:
    """See `missing`."""
    if not run.scores.exists():
        return [NEW]
    try:
        scores = run.read_json(run.scores, "evaluate")
    except RunError as error:
        return [str(error)]
    if "made_by" not in scores:  # an older run
        return ["how it was scored is not told"]
    return scored_otherwise(scores, recipe, best_model(recipe, run)[1])
