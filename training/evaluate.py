"""Verb `evaluate`: the best weights of a run against its validation and test text."""

from dataclasses import asdict

from model import Network, ServingModel, SpecialTokens
from training import checkpoint
from training.batches import Batch, BatchSampler, TokenPairs, collate
from training.corpus import lines
from training.recipe import Recipe
from training.run import Run, RunError, write_json, write_text
from training.scoring import Scores, perplexity, score_text
from training.train import choose_device, tokenizers


def best_network(recipe: Recipe, run: Run) -> tuple[Network, dict[str, object]]:
    """The network with the best weights of a run, on the CPU, and where they come from.

    Raises:
        RunError: no whole checkpoint, or one of another recipe or of other data.
    """
    stored = checkpoint.load_own(run.best, recipe, checkpoint.prepared(recipe, run))
    source, target = tokenizers(run)
    network = Network(recipe.model, source.size, target.size)
    network.load_state_dict(stored["network"])
    return network.eval(), {"step": stored["progress"]["step"], "digests": stored["digests"]}


def evaluate(recipe: Recipe, run: Run) -> dict[str, Scores]:
    """Score validation and test text; writes scores.json and what was decoded beside it."""
    run.demand(run.summary, "train")
    network, origin = best_network(recipe, run)
    device = choose_device(recipe.training)
    limits = recipe.export
    network = network.to(device)
    model = ServingModel(network, limits.max_source_length, limits.max_target_length)
    source, target = tokenizers(run)
    scores = {}
    for name in ("validation", "test"):
        text, references = (
            list(lines(run.data / f"{name}.{side}")) for side in ("source", "target")
        )
        try:
            scores[name], decoded = score_text(
                model, source, target, text, references, device, show=True
            )
        except ValueError as error:
            raise RunError(f"{run.data / name}.source: {error}") from None
        write_text(run.root / f"{name}.decoded", "".join(line + "\n" for line in decoded))
    pairs = TokenPairs.load(run.data / "validation.pt")
    sampler = BatchSampler(pairs, recipe.training.batch_tokens, 1024, seed=0)
    batches = (collate(pairs, index, SpecialTokens()) for index in sampler.batches(0))
    held_out = (Batch(*(t.to(device) for t in batch)) for batch in batches)
    write_json(
        run.scores,
        {
            "step": origin["step"],
            "validation_perplexity": perplexity(network, held_out),
            **{name: asdict(one) for name, one in scores.items()},
        },
    )
    return scores
