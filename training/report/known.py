"""What a run folder holds, as far as the run has come."""

import json
from functools import cached_property
from typing import Any

import torch

from training.corpus import lines
from training.export import exported
from training.normalization import written
from training.recipe import Recipe
from training.report.analysis import Translation, scored
from training.report.curves import Curves
from training.run import Run, RunError
from training.train import tokenizers


class Known:
    """What a run folder holds of a recipe's run, read once; None where there is nothing yet."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.curves = Curves.read(run.metrics)
        self.prepared: dict[str, Any] = run.read_json(run.report, "prepare")
        self.summary, self.scores = (
            run.read_json(path, verb) if path.exists() else None
            for path, verb in ((run.summary, "train"), (run.scores, "evaluate"))
        )
        self.source, self.target = tokenizers(run)

    @cached_property
    def best_step(self) -> int | None:
        """The step whose weights are kept: the first of the best validations."""
        if self.summary is not None:
            return int(self.summary["best_step"])
        by = self.recipe.training.select_by
        steps, values = self.curves.series("validation", by)
        if not steps:
            return None
        return steps[values.index(max(values) if by == "bleu" else min(values))]

    @cached_property
    def card(self) -> dict[str, Any] | None:
        if not self.run.model.exists():
            return None
        card: dict[str, Any] = json.loads(exported(self.run, torch.device("cpu")).card)
        return card

    def text(self, side: str) -> list[str]:
        return list(lines(self.run.data / f"test.{side}"))

    @cached_property
    def encoded(self) -> list[list[int]]:
        """The ids of the sources of the test set, without EOS."""
        return [self.source.encode(line) for line in self.text("source")]

    @cached_property
    def translations(self) -> list[Translation] | None:
        """The test set as `evaluate` decoded it.

        Raises:
            RunError: not as many lines as the test set has.
        """
        decoded = self.run.root / "test.decoded"
        if self.scores is None or not decoded.exists():
            return None
        source = self.text("source")
        reference = [written(self.target, one) for one in self.text("target")]
        hypotheses = list(lines(decoded))
        if not len(source) == len(reference) == len(hypotheses):
            raise RunError(
                f"{decoded}: got {len(hypotheses)} lines; allowed: {len(source)}, as many as the "
                "test set has; run 'python -m training evaluate' again"
            )
        return scored(source, reference, hypotheses, self.recipe.scoring)
