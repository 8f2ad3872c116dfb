"""Verb `evaluate`: the best weights of a run against its validation and test text."""

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from handler.decoding import SequenceModel
from handler.fields import read
from handler.integrity import sha256
from model import Ensemble, ModelOptions, Network, ServingModel
from training import checkpoint
from training.batches import Batch
from training.corpus import sentences
from training.lines import LineError
from training.loading import Loader
from training.memory import ELSEWHERE, enough_memory
from training.normalization import written
from training.recipe import Recipe
from training.run import Run, RunError, write_json, write_text
from training.scoring import Scores, score_text
from training.tokens import TokenPairs
from training.train import check_lengths, choose_device, tokenizers


@dataclass(frozen=True)
class Member:
    """One checkpoint that a model is made of.

    step: of its best weights; sha256: of its file; recipe: that it was trained by.
    """

    step: int
    sha256: str
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from.

    digests: of the prepared data.
    members: those of an ensemble; else one.
    """

    digests: dict[str, Any]
    members: list[Member]

    @property
    def step(self) -> int:
        """Updates that made the weights, of all members together."""
        return sum(one.step for one in self.members)


def best_model(
    recipe: Recipe, run: Run, device: torch.device = torch.device("cpu")
) -> tuple[ServingModel | Ensemble, Origin]:
    """The best weights of a run in their serving form, and where they come from: an ensemble
    where the run has members.

    Raises:
        RunError: no whole checkpoint, or one of another recipe or of other data; too little memory.
            Members of an ensemble may differ in the sections model and training.
    """
    digests = checkpoint.prepared(recipe, run)
    sections = checkpoint.PREPARED if run.members else checkpoint.DECISIVE
    source, target = tokenizers(run)
    limits = recipe.export
    models, members = [], []
    for path in run.members or [run.best]:
        stored = checkpoint.load_own(path, recipe, digests, sections)
        options = read(ModelOptions, stored["recipe"]["model"], f"{path}: model")
        with enough_memory(str(path), f"Its network does not fit: {ELSEWHERE}"):
            network = Network(options, source.size, target.size)
            checkpoint.weights(stored, network)
            network.to(device)
        models.append(
            ServingModel(network, limits.max_source_length, limits.max_target_length)
        )
        members.append(Member(stored["progress"]["step"], sha256(path), stored["recipe"]))
    model = Ensemble(models) if run.members else models[0]
    return model, Origin(digests, members)


def evaluate(recipe: Recipe, run: Run) -> dict[str, Scores]:
    """Score validation and test text; writes scores.json and what was decoded beside it.

    Raises:
        RunError: nothing trained yet; a sentence that is too long; too little memory.
    """
    run.demand(run.summary, "train")
    device = choose_device(recipe.training)
    model, origin = best_model(recipe, run, device)
    source, target = tokenizers(run)
    check_lengths(recipe, run, source)
    scores = {}
    for name in ("validation", "test"):
        text, references = sentences(run.data, name)
        if changed := sum(written(target, one) != one for one in references):
            print(
                f"evaluate: {changed} of {len(references)} references of {name} are scored as the "
                "target's tokenizer normalises them, as translations are; prepare tells of it",
                file=sys.stderr,
            )
        try:
            with enough_memory(f"decoding {name}", f"Lower scoring.beam_size, or {ELSEWHERE}"):
                scores[name], decoded = score_text(
                    model, source, target, text, references, device, recipe.scoring,
                    recipe.scoring.beam_size, show=True,
                )
        except LineError as error:
            raise RunError(f"{run.data / name}.source: {error}") from None
        write_text(run.root / f"{name}.decoded", "".join(line + "\n" for line in decoded))
    pairs = TokenPairs.load(run.data / "validation.tokens")
    held_out = Loader(pairs, (source, target), device).every(recipe.training.batch_tokens)
    advice = f"Its batches are of training.batch_tokens, as in training: {ELSEWHERE}"
    with enough_memory("perplexity of validation", advice):
        validation_perplexity = perplexity(model, held_out)
    write_json(
        run.scores,
        {
            "step": origin.step,
            "made_by": made_by(recipe, origin),
            "validation_perplexity": validation_perplexity,
            **{name: asdict(one) for name, one in scores.items()},
        },
    )
    return scores


def made_by(recipe: Recipe, origin: Origin) -> dict[str, Any]:
    """All that scores depend on; a checkpoint names its data and tokenizers itself."""
    return {
        "weights": [one.sha256 for one in origin.members],
        "max_target_length": recipe.export.max_target_length,
        "scoring": asdict(recipe.scoring),
    }


def scored_otherwise(scores: dict[str, Any], recipe: Recipe, origin: Origin) -> list[str]:
    """What of `made_by` is not as it was when `scores` were made; nothing where they do not tell
    it, as those of the first versions."""
    then, now = scores.get("made_by"), made_by(recipe, origin)
    if then is None:
        return []
    changed = [] if then["weights"] == now["weights"] else ["the weights are others now"]
    if then["max_target_length"] != now["max_target_length"]:
        changed.append(
            f"export.max_target_length: {then['max_target_length']} -> {now['max_target_length']}"
        )
    return changed + checkpoint.differences(then, recipe, ("scoring",))


@torch.inference_mode()
def perplexity(model: SequenceModel, batches: Iterable[Batch]) -> float:
    """exp of the mean of -log P(y_j | x, y_<j) over the target tokens, EOS counted, as the steps
    of decoding give it: of an ensemble, P is the mean of its members' probabilities."""
    loss, tokens = 0.0, 0
    for batch in batches:
        memory = model.encode(batch.source, batch.source_lengths)
        state = model.start(memory)
        for previous, wanted in zip(batch.target_in.unbind(1), batch.target_out.unbind(1)):
            logits, state, _ = model.step(previous.unsqueeze(1), state, memory)  # [N, 1, V]
            logs = torch.log_softmax(logits[:, 0], 1).gather(1, wanted.unsqueeze(1))  # [N, 1]
            loss -= float(logs[wanted != model.pad_id].sum())
        tokens += int(batch.target_lengths.sum())
    return math.exp(min(loss / max(tokens, 1), 700.0))
