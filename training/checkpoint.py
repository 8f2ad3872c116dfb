"""Everything that a run needs to go on exactly where it stopped."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.recipe import Recipe
from training.run import RunError, write_atomically

# Sections whose change makes other weights.
DECISIVE = ("data", "cleaning", "tokenizer", "model", "training")


@dataclass
class Progress:
    """Where training is: `batch` of `epoch` comes next, `step` updates are done."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_score: float | None = None  # of `select_by`, higher is better
    best_step: int = 0
    since_best: int = 0  # validations without improvement
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
        if {"recipe", "progress", "network", "optimizer"} <= set(content):
            return content
        problem = "it lacks parts"
    except FileNotFoundError:
        raise RunError(f"{path}: no checkpoint; run 'python -m training train' first") from None
    except Exception as error:  # a cut-off zip fails in many ways, all meaning the same
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise RunError(
        f"{path}: not a whole checkpoint ({problem}); restore it from a copy, or train with --fresh"
    )


def differences(stored: dict[str, Any], recipe: Recipe, digests: dict[str, Any]) -> list[str]:
    """What in recipe and data differs from a checkpoint in a way that makes other weights."""
    now = recipe.as_dict()
    found = []
    for section in DECISIVE:
        then = stored["recipe"].get(section) or {}
        for key, value in now[section].items():
            if (section, key) != ("data", "folder") and then.get(key) != value:
                found.append(f"{section}.{key}: {then.get(key)!r} -> {value!r}")
    if stored["digests"] != digests:
        found.append("the prepared data (its digests differ)")
    return found


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
