"""Everything that a run needs to go on exactly where it stopped."""

import os
import zipfile
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from handler.integrity import sha256
from training.learner import Learner
from training.memory import ELSEWHERE, TooLittleMemory, enough_memory
from training.recipe import Recipe
from training.run import Run, RunError, write_atomically

PREPARED = ("data", "cleaning", "tokenizer")  # sections that decide what `prepare` writes
DECISIVE = (*PREPARED, "model", "training")  # sections that decide the weights
# Where a run is, and on what, may change: a run can be copied to another machine and go on.
MOVABLE = (("data", "folder"), ("training", "device"))


class ChangedError(RunError):
    """Weights of another recipe, or of other data."""


@dataclass
class Progress:
    """Where training is: `batch` of `epoch` comes next, `step` updates are done."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_score: float | None = None  # of `select_by`, higher is better
    best_step: int = 0
    since_best: int = 0  # validations without improvement
    disappointments: int = 0  # all of them so far
    sums: dict[str, float] = field(default_factory=dict)  # of figures not yet logged
    seconds: float = 0.0  # of training, over all parts of an interrupted run
    finished: str = ""  # why training ended


def content(
    recipe: Recipe, digests: dict[str, Any], progress: Progress, learner: Learner
) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        digests: of the prepared data, so that weights never meet another corpus or tokenizer.
    """
    return {
        "recipe": recipe.as_dict(),
        "digests": digests,
        "progress": asdict(progress),
        "network": learner.network.state_dict(),
        "average": learner.average,  # of the network's parameters, in their order; or empty
        "optimizer": learner.optimizer.state_dict(),
        # What the recipe does not say of an update; older checkpoints lack both.
        "processes": learner.processes.count,
        "precision": learner.precision_name,
    }


def write(path: Path, held: dict[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all."""
    write_atomically(path, lambda temporary: torch.save(held, temporary))


def rotate(run: Run, held: dict[str, Any]) -> None:
    """Writes the last checkpoint and keeps the one before it: a file may be spoilt after it was
    written, too."""
    last, previous = run.checkpoints

    def write_beside(temporary: Path) -> None:
        torch.save(held, temporary)
        if last.exists():
            os.replace(last, previous)

    write_atomically(last, write_beside)


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        RunError: a file that is cut off, was damaged after it was written, or is no checkpoint; too
            little memory for it.
    """
    try:
        with zipfile.ZipFile(path) as records:  # their checksums, which torch.load never looks at
            if (spoilt := records.testzip()) is not None:
                raise zipfile.BadZipFile(f"{spoilt} does not match its checksum")
        with enough_memory(f"reading {path}", f"Its weights do not fit: {ELSEWHERE}"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if {"recipe", "digests", "progress", "network", "average", "optimizer"} <= set(content):
            return content
        problem = "it lacks parts"
    except TooLittleMemory:
        raise
    except FileNotFoundError:
        raise RunError(f"{path}: no checkpoint; run 'python -m training train' first") from None
    except Exception as error:  # a cut-off zip fails in many ways, all meaning the same
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise RunError(
        f"{path}: not a whole checkpoint ({problem}); restore it from a copy, or train with --fresh"
    )


def prepared(recipe: Recipe, run: Run) -> dict[str, Any]:
    """The digests of what `prepare` left, which is still what is there.

    Raises:
        RunError: nothing there, made by another recipe, or changed since.
    """
    report = run.read_json(run.report, "prepare")
    changed = prepared_otherwise(report, recipe)
    if changed:
        raise RunError(
            f"{run.data} was prepared otherwise: {'; '.join(changed)}. Change that back, or run "
            "'python -m training prepare' again"
        )
    if spoilt := not_as_prepared(report, run):
        raise RunError(
            f"{spoilt}: not what 'prepare' wrote; run 'python -m training prepare' again"
        )
    return dict(report["sha256"])


def prepared_otherwise(report: dict[str, Any], recipe: Recipe) -> list[str]:
    """What of the recipe and of its text is not as `prepare` read it, whose report this is."""
    changed = differences(report["recipe"], recipe, PREPARED)
    return changed + changed_text(report["sha256"]["text"], recipe)


def not_as_prepared(report: dict[str, Any], run: Run) -> Path | None:
    """The first file that `prepare` wrote and that has changed since."""
    for part, folder in (("tokenizer", run.tokenizer), ("data", run.data)):
        for name, digest in report["sha256"][part].items():
            if not (folder / name).exists() or sha256(folder / name) != digest:
                return folder / name
    return None


def changed_text(then: dict[str, dict[str, str]], recipe: Recipe) -> list[str]:
    """The files of text that have changed.

    What is not there is not compared: a run may be copied to where its text is not.

    Args:
        then: their digests, by set and name, as report.json has them.
    """
    return [
        f"{path}: the text of data.{name} has changed"
        for name, file, path in recipe.data.texts()
        if (digest := then.get(name, {}).get(file)) and path.exists() and sha256(path) != digest
    ]


def load_own(
    path: Path, recipe: Recipe, digests: dict[str, Any], sections: tuple[str, ...] = DECISIVE
) -> dict[str, Any]:
    """See `load`.

    Args:
        sections: of the recipe, which must be those that the weights were trained by.

    Raises:
        RunError: also for weights of another recipe or of other data.
    """
    stored = load(path)
    changed = differences(stored["recipe"], recipe, sections)
    if stored["digests"] != digests:
        changed.append("the prepared data (its digests differ)")
    if changed:
        raise ChangedError(
            f"{path} was trained otherwise: {'; '.join(changed)}. Change that back, choose another "
            "folder with --run, or train anew with --fresh (make: FRESH=1); train "
            "--accept-changes goes on where only the section training differs"
        )
    return stored


def newest(
    recipe: Recipe, run: Run, digests: dict[str, Any], accept_changes: bool
) -> tuple[dict[str, Any], list[str]]:
    """The newest checkpoint of `run` that is whole, and what to tell of the choice.

    Raises:
        RunError: none is whole, or it is of another recipe or of other data; too little memory.
    """
    sections = (*PREPARED, "model") if accept_changes else DECISIVE
    said: list[str] = []
    # A run killed while it first saved has only the best, which is as good to go on from.
    paths = [path for path in (*run.checkpoints, run.best) if path.exists()]
    for path in paths:
        try:
            stored = load_own(path, recipe, digests, sections)
        except (ChangedError, TooLittleMemory):
            raise
        except RunError as error:
            said.append(str(error))
            continue
        if said or path != run.checkpoints[0]:
            said.append(f"going on from {path}, step {stored['progress']['step']}")
        if accept_changes:
            changed = differences(stored["recipe"], recipe, ("training",))
            said += [f"changed: {change}" for change in changed]
        return stored, said
    raise RunError("; ".join(said))


def differences(then: dict[str, Any], recipe: Recipe, sections: tuple[str, ...]) -> list[str]:
    """What of `sections` differs from a recipe stored as a mapping."""
    return [
        f"{section}.{key}: {former!r} -> {value!r}"
        for section in sections
        for key, (former, value) in unlike(
            section, then.get(section, {}), getattr(recipe, section)
        ).items()
    ]


def unlike(section: str, then: dict[str, Any], options: Any) -> dict[str, tuple[Any, Any]]:
    """The values of a section of a stored recipe that are others now: before, and now."""
    now, held = asdict(options), completed(then, options)
    return {
        key: (held[key], now[key])
        for key in now
        if (section, key) not in MOVABLE and held[key] != now[key]
    }


def completed(then: dict[str, Any], options: Any) -> dict[str, Any]:
    """Stored options with a value for each that they lack, as they are older than it: what the
    program did before there was the option. That is its default, or `before` in its metadata, which
    may be a function of the stored options.

    Args:
        options: the same ones of today, which tell what there is.
    """
    held = {}
    for one in fields(options):
        default = one.default_factory() if callable(one.default_factory) else one.default
        before = one.metadata.get("before", default)
        former = then.get(one.name, before(then) if callable(before) else before)
        now = getattr(options, one.name)
        if isinstance(former, dict) and is_dataclass(now):
            former = completed(former, now)
        held[one.name] = former
    return held


def restore(held: dict[str, Any], learner: Learner) -> Progress:
    """Put a checkpoint's state into `learner`, as far as it means the same under its options."""
    changed = unlike("training", held["recipe"]["training"], learner.options)
    learner.network.load_state_dict(held["network"])
    if "optimizer" not in changed:
        learner.optimizer.load_state_dict(held["optimizer"])
    if learner.average and held["average"]:
        torch._foreach_copy_(learner.average, held["average"])
    elif learner.average:
        learner.average = [p.detach().clone() for p in learner.parameters]
    progress = Progress(**held["progress"])
    if changed:
        progress.finished = ""  # under other options there may be more to do
    if "select_by" in changed:
        progress.best_score, progress.since_best = None, 0
    return progress


def adopt(recipe: Recipe, run: Run) -> None:
    """Let the best weights so far be those of `recipe`, whose training section was changed since:
    they may stay the best, and what was made of them is out of date."""
    for stale in (run.summary, run.scores, run.model):
        stale.unlink(missing_ok=True)
    try:
        best = load(run.best)
    except RunError:
        return  # none yet; or spoilt, which whoever needs it will say
    if best["recipe"] != recipe.as_dict():
        write(run.best, {**best, "recipe": recipe.as_dict()})


def weights(held: dict[str, Any], network: torch.nn.Module) -> None:
    """Put the weights that a checkpoint was judged by into `network`: their average, where the
    recipe wants one."""
    network.load_state_dict(held["network"])
    with torch.no_grad():
        for parameter, average in zip(network.parameters(), held["average"]):
            parameter.copy_(average)
