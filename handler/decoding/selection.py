"""From the logits of rows to the candidates of each sentence."""

import math

import torch
from torch import Tensor

from handler.decoding.sentence import Sentence

NEVER = float("-inf")


def candidates(
    logits: Tensor, sentences: list[Sentence], eos: int
) -> list[list[tuple[float, int, int]]]:
    """The best 2K continuations of each sentence; one in greedy search; one drawn in sampling.

    Args:
        logits: float [N, K, V], where K hypotheses of each sentence are live; changed in place.

    Returns:
        (log probability of the whole, parent in 0..K-1, token), best first, for each sentence. The
        first is NaN where the model's own probabilities are not finite.
    """
    for i, sentence in enumerate(sentences):
        if sentence.options.repetition_penalty != 1.0:
            penalise_repetition(logits[i], sentence)
    # The normaliser once a row, instead of a log-softmax over V.
    normaliser = logits.logsumexp(2, keepdim=True)  # [N, K, 1]
    for i, sentence in enumerate(sentences):
        if sentence.options.min_length or sentence.options.no_repeat_ngram_size:
            forbid(logits[i], sentence, eos)
    counts = [considered(sentence) for sentence in sentences]
    most = max(counts)
    # Two stages: the best of each row, then the best of the sentence among those. NaN is greatest.
    if most == 1:
        values, tokens = logits.max(2, keepdim=True)  # several times as fast as topk
    else:
        values, tokens = logits.topk(min(most, logits.size(2)), 2)  # [N, K, 2K]
    so_far = torch.tensor(
        [[one.log_probability for one in sentence.live] for sentence in sentences],
        device=logits.device, dtype=logits.dtype,
    ).unsqueeze(2)  # [N, K, 1]
    totals = (so_far + values - normaliser).flatten(1)  # [N, K*2K]
    best, place = totals.topk(min(most, totals.size(1)), 1)  # [N, 2K]
    parents = place // values.size(2)
    chosen = tokens.flatten(1).gather(1, place)
    rows = zip(best.tolist(), parents.tolist(), chosen.tolist())
    found = [list(zip(*row))[:count] for row, count in zip(rows, counts)]
    for i, sentence in enumerate(sentences):
        if sentence.options.sampling and not math.isnan(found[i][0][0]):
            found[i] = [drawn(logits[i, 0], float(normaliser[i, 0, 0]), sentence)]
    return found


def considered(sentence: Sentence) -> int:
    """How many continuations a sentence may need: 2K, of which at most K end it, leave K."""
    width = sentence.options.beam_size
    return 1 if width == 1 else 2 * width


def penalise_repetition(logits: Tensor, sentence: Sentence) -> None:
    """arXiv 1909.05858, section 4.1; logits [K, V] of one sentence."""
    penalty = sentence.options.repetition_penalty
    for row, one in zip(logits, sentence.live):
        if one.tokens:
            seen = torch.tensor(sorted(set(one.tokens)), device=logits.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)


def forbid(logits: Tensor, sentence: Sentence, eos: int) -> None:
    """Put what the options rule out at -inf; logits [K, V] of one sentence."""
    options = sentence.options
    length = len(sentence.live[0].tokens)
    if length < options.min_length:
        logits[:, eos] = NEVER
    size = options.no_repeat_ngram_size
    if size and length + 1 >= size:
        for row, one in zip(logits, sentence.live):
            banned = continuations(one.tokens, size)
            if banned:
                row[torch.tensor(sorted(banned), device=logits.device)] = NEVER


def continuations(tokens: list[int], size: int) -> set[int]:
    """Tokens that would complete an n-gram of `size` that `tokens` has already."""
    begun = tokens[len(tokens) - size + 1 :]
    return {
        tokens[i + size - 1]
        for i in range(len(tokens) - size + 1)
        if tokens[i : i + size - 1] == begun
    }


def drawn(logits: Tensor, normaliser: float, sentence: Sentence) -> tuple[float, int, int]:
    """A token drawn from logits [V]; its log probability is the model's own, undrawn."""
    options = sentence.options
    count = min(options.top_k or logits.size(0), logits.size(0))
    values, tokens = logits.topk(count)  # sorted: the draw depends on the row alone
    shares = torch.softmax(values.double() / options.temperature, 0).cumsum(0)  # [count]
    kept = int((shares < options.top_p).sum()) + 1
    bound = float(shares[min(kept, count) - 1])
    place = int((shares <= sentence.draw.random() * bound).sum())
    place = min(place, kept - 1, count - 1)
    whole = sentence.live[0].log_probability + float(values[place]) - normaliser
    return whole, 0, int(tokens[place])
