"""Verb `ensemble`: a run made of several trained ones, whose probabilities are averaged.

What it leaves is a trained run to every verb that follows (`evaluate.best_model`):

    data/, tokenizer/     what all members share
    members/1.pt, ...     the best checkpoint of each, in the order in which they were named
    metrics.jsonl         empty: an ensemble is not trained itself
    training.json         written last: without it the run is not complete
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handler.integrity import sha256
from training import checkpoint
from training.recipe import Recipe
from training.run import Run, RunError, write_json, write_text

REPLACED_WHOLE = (".pt", ".tokens")  # large, and never written in place: they may be linked
SUMMED = ("steps", "best_step", "parameters", "seconds")  # of training.json


def ensemble(recipe: Recipe, run: Run, members: Sequence[Run]) -> int:
    """Make `run` an ensemble of `members`, and return how many they are. An ensemble that is
    there already is replaced.

    Members may differ in the sections model and training of their recipes.

    Raises:
        RunError: a folder that holds another run; no members; a member that is not trained, is an
            ensemble, has the weights of another one, or has other data, tokenizers or cleaning.
    """
    if any(path.exists() for path in (*run.checkpoints, run.best)):
        raise RunError(
            f"{run.root}: holds a run that was trained itself; choose another folder with --run"
        )
    if not members:
        raise RunError("members: got none; allowed: one or more folders of trained runs")
    summaries = [member.read_json(member.summary, "train") for member in members]
    weights = check(recipe, members)
    for stale in (run.summary, run.scores, run.model):
        stale.unlink(missing_ok=True)
    first = members[0]
    for given, folder in ((first.data, run.data), (first.tokenizer, run.tokenizer)):
        shutil.rmtree(folder, ignore_errors=True)
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(given, folder, ignore=hidden, copy_function=place)
    folder = run.root / "members"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, member in enumerate(members, 1):
        place(member.best, folder / f"{number}.pt")
    if [sha256(path) for path in run.members] != weights:
        raise RunError(f"{run.root}: a member was trained on meanwhile; wait until it has ended")
    write_text(run.metrics, "")
    write_json(
        run.summary,
        {
            "members": len(members),
            **{key: sum(one[key] for one in summaries) for key in SUMMED},
            "ended": f"an ensemble of {len(members)}, whose figures are summed",
        },
    )
    return len(members)


def check(recipe: Recipe, members: Sequence[Run]) -> list[str]:
    """The digest of each member's checkpoint, once all are known to fit together.

    Raises:
        RunError: see `ensemble`; the message names the run and what differs.
    """
    found: dict[str, Run] = {}
    expected: dict[str, Any] | None = None
    for member in members:
        if member.members:
            raise RunError(
                f"{member.root}: is an ensemble; allowed: runs that were trained, so name its "
                "members instead"
            )
        stored = checkpoint.load(member.best)
        digests = flat(stored["digests"])
        if expected is None:
            expected = digests
        changed = checkpoint.differences(stored["recipe"], recipe, checkpoint.PREPARED)
        changed += [
            f"the digest of {name} is not that of {members[0].root}"
            for name in sorted(expected.keys() | digests.keys())
            if expected.get(name) != digests.get(name)
        ]
        if not changed and checkpoint.prepared(recipe, member) != stored["digests"]:
            changed = ["its data were prepared anew since it was trained"]
        if changed:
            raise RunError(
                f"{member.root}: does not fit into the ensemble: {'; '.join(changed)}; allowed: "
                "runs whose recipes differ from the one given in sections model and training only"
            )
        digest = sha256(member.best)
        if digest in found:
            raise RunError(
                f"{member.root}: has the same weights as {found[digest].root}; allowed: each once"
            )
        found[digest] = member
    return list(found)


def flat(digests: dict[str, Any], *above: str) -> dict[str, str]:
    """Nested mappings as one, whose keys are all those on the way."""
    found: dict[str, str] = {}
    for key, value in digests.items():
        if isinstance(value, dict):
            found |= flat(value, *above, key)
        else:
            found[" ".join((*above, key))] = value
    return found


def place(source: str | Path, target: str | Path) -> None:
    """`source` at `target`, where nothing is: one file with two names where that is safe and the
    file system can, else a copy, which is as new as the run to make."""
    if Path(source).suffix in REPLACED_WHOLE:
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return
    shutil.copy(source, target)
