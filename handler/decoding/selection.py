"""From the logits of rows to the candidates of each sentence."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from handler.decoding.sentence import NEVER, Sentence

BLOCK = 64  # logits that the first stage of top-k looks at together
BLOCKED_FROM = 2048  # vocabulary from which two stages are faster than one
NUCLEUS = 256  # most likely tokens that top-p looks at before it sorts the whole vocabulary
SCRATCH = 1 << 18  # floats that stay in a processor's cache

Candidate = tuple[float, int, int]


def candidates(logits: Tensor, sentences: list[Sentence], eos: int) -> list[list[Candidate]]:
    """The best 2K continuations of each sentence; one in greedy search; one drawn in sampling; the
    one that a prefix demands.

    Args:
        logits: float [N, K, V], where K hypotheses of each sentence are live; changed in place.

    Returns:
        (log probability of the whole, parent in 0..K-1, token), best first, for each sentence;
        none where the model's own logits are not finite. The log probability is NaN where it
        decides nothing and was not asked for, and -inf where the options forbid every token.
    """
    for i, sentence in enumerate(sentences):
        if sentence.options.repetition_penalty != 1.0:
            penalise_repetition(logits[i], sentence)
    # The normaliser once a row, and only where somebody needs it, instead of a log-softmax over V.
    normaliser = normalisers(logits) if any(one.scored for one in sentences) else None  # [N, K]
    for i, sentence in enumerate(sentences):
        if sentence.options.min_length or sentence.options.no_repeat_ngram_size:
            forbid(logits[i], sentence, eos)
    best = ranked(lambda rows, count: top(logits[rows], count), normaliser, sentences)
    replaced = forced(sentences) | drawn(logits, sentences, best)
    for i, token in replaced.items():
        if best[i] and best[i][0][0] != NEVER:
            whole = math.nan
            if sentences[i].scored and normaliser is not None:
                so_far = sentences[i].live[0].log_probability
                whole = so_far + float(logits[i, 0, token]) - float(normaliser[i, 0])
            best[i] = [(whole, 0, token)]
    return best


def needed(sentences: list[Sentence]) -> int:
    """How many of each row's greatest logits `likeliest` has to have: one more where EOS may be
    among them and must not."""
    return max(considered(one) + one.short for one in sentences)


def likeliest(
    values: Tensor,
    tokens: Tensor,
    normaliser: Tensor | None,
    sentences: list[Sentence],
    eos: int,
) -> list[list[Candidate]]:
    """`candidates` of sentences that are `plain`, from the greatest logits of each row [N, K, C],
    best first, their tokens, and the normaliser of all [N, K], where any sentence needs it."""
    short = [one.short for one in sentences]
    if any(short):
        forbidden = (tokens == eos) & torch.tensor(short, device=tokens.device).view(-1, 1, 1)
        allowed = values.masked_fill(forbidden, NEVER)
        values, order = torch.sort(allowed, stable=True, dim=2, descending=True)
        tokens = tokens.gather(2, order)
    return ranked(
        lambda rows, count: (values[rows, :, :count], tokens[rows, :, :count]),
        normaliser,
        sentences,
    )


def ranked(
    top_of: Callable[[slice | list[int], int], tuple[Tensor, Tensor]],
    normaliser: Tensor | None,
    sentences: list[Sentence],
) -> list[list[Candidate]]:
    """The best continuations of each sentence, from the best of each of its rows.

    Args:
        top_of: the greatest `count` logits of some sentences [n, K, count], and their tokens.
        normaliser: of each row [N, K], where any sentence needs it.
    """
    scored = [one.scored for one in sentences]
    offsets = None
    if normaliser is not None:
        so_far = torch.tensor(
            [[h.log_probability if one.scored else 0.0 for h in one.live] for one in sentences],
            device=normaliser.device, dtype=normaliser.dtype,
        )  # [N, K]
        offsets = (so_far - normaliser).unsqueeze(2)  # [N, K, 1]
        if not all(scored):
            known = torch.tensor(scored, device=normaliser.device).view(-1, 1, 1)
            offsets = torch.where(known, offsets, 0.0)
    # Apart by how many are considered: among equals, top-k's choice depends on k.
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(sentences):
        groups.setdefault(considered(one), []).append(i)
    best: list[list[Candidate]] = [[] for _ in sentences]
    for count, members in groups.items():
        rows: slice | list[int] = members if len(groups) > 1 else slice(None)  # without copies
        values, tokens = top_of(rows, count)
        found = best_of(values, tokens, None if offsets is None else offsets[rows], count)
        for i, of_one in zip(members, found):
            value = of_one[0][0]
            if math.isnan(value) or value == math.inf:
                continue
            if not scored[i] and value != NEVER:
                of_one = [(math.nan, 0, of_one[0][2])]
            best[i] = of_one
    return best


def best_of(
    values: Tensor, tokens: Tensor, offsets: Tensor | None, count: int
) -> list[list[Candidate]]:
    """For each sentence the best `count` of values [N, K, C] + offsets [N, K, 1]; values are best
    first, and NaN is greatest."""
    k, choices = values.size(1), values.size(2)
    if offsets is not None:
        values = values + offsets
    values, tokens = values.flatten(1), tokens.flatten(1)  # [N, K*C]
    if k == 1:
        places = [list(range(choices))] * values.size(0)
    else:
        # The best of each row first, then the best of the sentence among those.
        values, place = values.topk(min(count, values.size(1)), 1)  # [N, count]
        tokens, places = tokens.gather(1, place), place.tolist()
    return [
        [(value, where // choices, token) for value, where, token in zip(*each)]
        for each in zip(values.tolist(), places, tokens.tolist())
    ]


def normalisers(logits: Tensor) -> Tensor:
    """log sum exp of each row of [N, K, V], a few rows at a time: a temporary as large as all the
    logits would be memory fresh from the system at every step, which costs five times as much."""
    rows = max(1, SCRATCH // (logits.size(1) * logits.size(2)))
    return torch.cat([some.logsumexp(2) for some in logits.split(rows)])  # [N, K]


def considered(sentence: Sentence) -> int:
    """How many continuations a sentence may need: 2K, of which at most K end it, leave K."""
    width = sentence.width
    return 1 if width == 1 else 2 * width


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest `count` of [N, K, V], and where they are: [N, K, min(count, V)] each, sorted.

    In two stages: a value among the greatest is in one of the `count` blocks that have the
    greatest maxima. Which way is taken depends on V and `count`, never on the rows beside one.
    """
    n, k, vocabulary = logits.shape
    count = min(count, vocabulary)
    blocks = vocabulary // BLOCK
    if count == 1:
        values, tokens = logits.max(2, keepdim=True)
        return values, tokens
    if vocabulary < BLOCKED_FROM or count > blocks:
        values, tokens = logits.topk(count, 2)
        return values, tokens
    whole = logits[:, :, : blocks * BLOCK].unflatten(2, (blocks, BLOCK))
    _, block = whole.amax(3).topk(count, 2)  # [N, K, count]
    found = whole.gather(2, block.unsqueeze(3).expand(n, k, count, BLOCK)).flatten(2)
    tokens = (block.unsqueeze(3) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(2)
    if blocks * BLOCK < vocabulary:  # what is left over is one more block
        rest = torch.arange(blocks * BLOCK, vocabulary, device=logits.device)
        found = torch.cat([found, logits[:, :, blocks * BLOCK :]], 2)
        tokens = torch.cat([tokens, rest.expand(n, k, -1)], 2)
    values, place = found.topk(count, 2)
    return values, tokens.gather(2, place)


def restrict(logits: Tensor, allowed: Tensor, sentences: list[Sentence]) -> None:
    """Put tokens that are not allowed at -inf, but for the one that a prefix demands.

    logits: float [N, K, V]; allowed: bool [N, V]; both are changed in place.
    """
    for i, token in forced(sentences).items():
        allowed[i, token] = True
    logits.masked_fill_(~allowed.unsqueeze(1), NEVER)


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
    if sentence.forced is not None:
        return
    if sentence.short:
        logits[:, eos] = NEVER
    size = sentence.options.no_repeat_ngram_size
    if size and len(sentence.live[0].tokens) + 1 >= size:
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


def forced(sentences: list[Sentence]) -> dict[int, int]:
    """The token that the prefix of sentence i demands, by i."""
    due = ((i, one.forced) for i, one in enumerate(sentences) if one.prefix)
    return {i: token for i, token in due if token is not None}


def drawn(
    logits: Tensor, sentences: list[Sentence], best: list[list[Candidate]]
) -> dict[int, int]:
    """A token drawn for sentence i, by i, where it samples and has finite logits [N, 1, V].

    One number is drawn for each token of a sentence, so that its draws depend on nothing else.
    """
    asking = [
        i for i, one in enumerate(sentences)
        if one.options.sampling and one.forced is None and best[i] and best[i][0][0] != NEVER
    ]
    # Apart, so that how a sentence is drawn does not depend on what others ask for.
    narrow = [i for i in asking if sentences[i].options.top_k or sentences[i].options.top_p < 1]
    wide = [i for i in asking if i not in narrow]
    return {
        i: token
        for group, draw in ((wide, draw_from_all), (narrow, draw_from_likeliest))
        if group
        for i, token in zip(group, draw(*tempered(logits, sentences, group)))
    }


def tempered(
    logits: Tensor, sentences: list[Sentence], group: list[int]
) -> tuple[Tensor, Tensor, list[Sentence]]:
    """For M sentences: logits over temperature [M, V], a number of 0..1 for each [M, 1]; double."""
    chosen = [sentences[i] for i in group]
    heat = [one.options.temperature for one in chosen]
    luck = [one.draw.random() for one in chosen]
    temperature, number = torch.tensor([heat, luck], device=logits.device, dtype=torch.double)
    return logits[group, 0].double() / temperature.unsqueeze(1), number.unsqueeze(1), chosen


def draw_from_all(scaled: Tensor, luck: Tensor, sentences: list[Sentence]) -> list[int]:
    """Inverse of the distribution function, over the vocabulary in its own order."""
    shares = torch.softmax(scaled, 1).cumsum(1)  # [M, V]
    place = torch.searchsorted(shares, luck * shares[:, -1:], right=True).squeeze(1)
    return [min(token, scaled.size(1) - 1) for token in place.tolist()]


def draw_from_likeliest(scaled: Tensor, luck: Tensor, sentences: list[Sentence]) -> list[int]:
    """The same over the k likeliest, of them the fewest that reach p, likeliest first."""
    vocabulary = scaled.size(1)
    chosen: list[int] = []
    for row, one, share in zip(scaled, sentences, luck.squeeze(1).tolist()):
        most, p = min(one.options.top_k or vocabulary, vocabulary), one.options.top_p
        # Without a k the nucleus is mostly small; the whole is only sorted where it is not.
        for count in (most if one.options.top_k else min(NUCLEUS, most), most):
            values, tokens = row.topk(count)
            total = (values if count == most else row).logsumexp(0)
            shares = (values - total).exp().cumsum(0)  # [count]
            if float(shares[-1]) >= p:
                break
        kept = min(int((shares < p).sum()) + 1, count)
        place = int((shares <= share * float(shares[kept - 1])).sum())
        chosen.append(int(tokens[min(place, kept - 1)]))
    return chosen
