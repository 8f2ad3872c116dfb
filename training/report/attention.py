"""The attention that a model pays while it translates a few lines of its test set."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from handler.decoding import DecodingOptions, Engine, decode_in_order
from handler.decoding.model import packed
from handler.tokenizer import Tokenizer
from training.evaluate import best_model
from training.recipe import Recipe
from training.run import Run
from training.train import choose_device, tokenizers

LEGIBLE = range(4, 25)  # source tokens of a heat map that is worth looking at, EOS counted


@dataclass(frozen=True)
class Alignment:
    """Pieces of both sides, and the attention of each target token over the source tokens, rows
    that sum to 1; EOS is a token of the source and not of the target."""

    index: int  # in the test set, from 0
    source: list[str]
    target: list[str]
    translation: str
    weights: list[list[float]]


def chosen(lengths: Sequence[int], most: int, seed: int = 0) -> list[int]:
    """Which lines to show, the shortest first: drawn from those of legible length, or else the
    shortest."""
    legible = [i for i, length in enumerate(lengths) if length in LEGIBLE]
    if not legible:
        return sorted(range(len(lengths)), key=lambda i: (lengths[i], i))[:most]
    drawn = random.Random(seed).sample(legible, min(most, len(legible)))
    return sorted(drawn, key=lambda i: (lengths[i], i))


def alignments(
    recipe: Recipe, run: Run, sources: Sequence[list[int]], most: int
) -> tuple[int, list[Alignment]]:
    """Of some lines, decoded as `evaluate` does; and the step of the weights.

    Args:
        sources: the ids of each line of the test set, without EOS.

    Raises:
        RunError: no whole checkpoint, or one of another recipe or of other data.
    """
    device, limits = choose_device(recipe.training), recipe.export
    model, origin = best_model(recipe, run, device)
    if not model.has_attention:
        return origin.step, []
    source, target = tokenizers(run)
    lines = chosen([len(ids) + 1 for ids in sources], most)
    lines = [i for i in lines if sources[i] and len(sources[i]) < limits.max_source_length]
    given = [[*sources[i], Tokenizer.EOS] for i in lines]
    beam, penalty = recipe.scoring.beam_size, recipe.scoring.length_penalty
    options = DecodingOptions(
        beam_size=beam, length_penalty=penalty if beam > 1 else 0.0, return_alignments=True
    )
    engine = Engine(packed(model, device), beam * max(len(given), 1), device)
    found = []
    for i, ids, event in zip(lines, given, decode_in_order(engine, given, options)):
        for result in event.results:
            if result.alignment:  # nothing to show of an empty translation
                tokens = result.tokens
                found.append(Alignment(
                    i, source.pieces(ids), target.pieces(tokens), target.decode(tokens),
                    [list(row) for row in result.alignment],
                ))  # fmt: skip
    return origin.step, found
