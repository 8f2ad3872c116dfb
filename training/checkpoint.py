"""Everything that a run needs to go on exactly where it stopped."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.recipe import Recipe
from training.run import Run, RunError, write_atomically

PREPARED = ("data", "cleaning", "tokenizer")  # sections that decide what `prepare` writes
DECISIVE = (*PREPARED, "model", "training")  # sections that decide the weights
# Where a run is, and on what, may change: a run can be copied to another machine and go on.
MOVABLE = (("data", "folder"), ("training", "device"))


@dataclass
class Progress:
    """Where training is: `batch` of `epoch` comes next, `step` updates are done."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_score: float | None = None  # of `select_by`, higher is better
    best_step: int = 0
    since_best: int = 0  # validations without improvement
    sums: dict[str, float] = field(default_factory=dict)  # of figures not yet logged
    seconds: float = 0.0  # of training, over all parts of an interrupted run
    finished: str = ""  # why training ended


def save(
    path: Path,
    recipe: Recipe,
    digests: dict[str, Any],
    progress: Progress,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint atomically.

    Args:
        digests: of the prepared data, so that weights never meet another corpus or tokenizer.
    """
    content = {
        "recipe": recipe.as_dict(),
        "digests": digests,
        "progress": asdict(progress),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        RunError: a file that is cut off or no checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if {"recipe", "digests", "progress", "network", "optimizer"} <= set(content):
            return content
        problem = "it lacks parts"
    except FileNotFoundError:
        raise RunError(f"{path}: no checkpoint; run 'python -m training train' first") from None
    except Exception as error:  # a cut-off zip fails in many ways, all meaning the same
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise RunError(
        f"{path}: not a whole checkpoint ({problem}); restore it from a copy, or train with --fresh"
    )


def prepared(recipe: Recipe, run: Run) -> dict[str, Any]:
    """The digests of what `prepare` left.

    Raises:
        RunError: nothing there, or made by another recipe.
    """
    report = run.read_json(run.report, "prepare")
    changed = differences(report["recipe"], recipe, PREPARED)
    if changed:
        raise RunError(
            f"{run.data} was prepared otherwise: {'; '.join(changed)}. Change that back, or run "
            "'python -m training prepare' again"
        )
    return dict(report["sha256"])


def load_own(path: Path, recipe: Recipe, digests: dict[str, Any]) -> dict[str, Any]:
    """See `load`.

    Raises:
        RunError: also for weights of another recipe or of other data.
    """
    stored = load(path)
    changed = differences(stored["recipe"], recipe, DECISIVE)
    if stored["digests"] != digests:
        changed.append("the prepared data (its digests differ)")
    if changed:
        raise RunError(
            f"{path} was trained otherwise: {'; '.join(changed)}. Change that back, choose another "
            "folder with --run, or train anew with --fresh (make: FRESH=1)"
        )
    return stored


def differences(then: dict[str, Any], recipe: Recipe, sections: tuple[str, ...]) -> list[str]:
    """What of `sections` differs from a recipe stored as a mapping."""
    now = recipe.as_dict()
    return [
        f"{section}.{key}: {then[section].get(key)!r} -> {value!r}"
        for section in sections
        for key, value in now[section].items()
        if (section, key) not in MOVABLE and then[section].get(key) != value
    ]


def restore(
    content: dict[str, Any], network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Put a checkpoint's state into `network`, `optimizer` and the random generators."""
    network.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["cpu_rng"])
    if content["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(content["cuda_rng"])
    return Progress(**content["progress"])
