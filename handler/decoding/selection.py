"""From the logits of rows to the candidates of each sentence."""

import itertools
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
    short = any_short(sentences, tokens.device)
    if short is not None:
        values, tokens = without(eos, short, values, tokens)
    return ranked(
        lambda rows, count: (values[rows, :, :count], tokens[rows, :, :count]),
        normaliser,
        sentences,
    )


def any_short(sentences: list[Sentence], device: torch.device) -> Tensor | None:
    """bool [N, 1, 1]: which sentences must not end here; None where all may."""
    short = [one.short for one in sentences]
    return torch.tensor(short, device=device).view(-1, 1, 1) if any(short) else None


def without(token: int, where: Tensor, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Values and tokens [N, K, C], best first, with `token` at -inf and last in rows `where`."""
    allowed = values.masked_fill((tokens == token) & where, NEVER)
    values, order = torch.sort(allowed, stable=True, dim=2, descending=True)
    return values, tokens.gather(2, order)


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
    offsets = None
    if normaliser is not None:
        so_far, known = log_probabilities(sentences, normaliser.device)
        offsets = raised(so_far, normaliser, known)
    # Apart by how many are considered: among equals, top-k's choice depends on k.
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(sentences):
        groups.setdefault(considered(one), []).append(i)
    best: list[list[Candidate]] = [[] for _ in sentences]
    for count, members in groups.items():
        rows: slice | list[int] = members if len(groups) > 1 else slice(None)  # without copies
        values, tokens = top_of(rows, count)
        values, parents, tokens = best_of(
            values, tokens, None if offsets is None else offsets[rows], count
        )
        found = listed(
            [sentences[i] for i in members],
            values.tolist(), None if parents is None else parents.tolist(), tokens.tolist(),
        )  # fmt: skip
        for i, of_one in zip(members, found):
            best[i] = of_one
    return best


def log_probabilities(
    sentences: list[Sentence], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Of the live hypotheses, double [N, K]; and which sentences they are known of, bool [N, 1, 1],
    or None for all of them."""
    so_far = torch.tensor(
        [[h.log_probability if one.scored else 0.0 for h in one.live] for one in sentences],
        device=device, dtype=torch.double,
    )  # fmt: skip
    scored = [one.scored for one in sentences]
    if all(scored):
        return so_far, None
    return so_far, torch.tensor(scored, device=device).view(-1, 1, 1)


def raised(so_far: Tensor, normaliser: Tensor, known: Tensor | None) -> Tensor:
    """What makes logits the log probability of the whole [N, K, 1]; 0 where it is not `known`."""
    offsets = (so_far.to(normaliser.dtype) - normaliser).unsqueeze(2)
    return offsets if known is None else torch.where(known, offsets, 0.0)


def best_of(
    values: Tensor, tokens: Tensor, offsets: Tensor | None, count: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """For each sentence the best `count` of values [N, K, C] + offsets [N, K, 1], their rows (None
    where K is 1) and their tokens, [N, count] each; values are best first, and NaN is greatest."""
    k, choices = values.size(1), values.size(2)
    if offsets is not None:
        values = values + offsets
    values, tokens = values.flatten(1), tokens.flatten(1)  # [N, K*C]
    if k == 1:
        return values, None, tokens
    # The best of each row first, then the best of the sentence among those.
    values, place = values.topk(min(count, values.size(1)), 1)  # [N, count]
    return values, place.div(choices, rounding_mode="floor"), tokens.gather(1, place)


def listed(
    sentences: list[Sentence],
    values: list[list[float]],
    parents: list[list[int]] | None,
    tokens: list[list[int]],
) -> list[list[Candidate]]:
    """The candidates of each sentence, see `candidates`, from what `best_of` gives."""
    found: list[list[Candidate]] = []
    rows = itertools.repeat(itertools.repeat(0)) if parents is None else parents
    for one, *each in zip(sentences, values, rows, tokens):
        of_one = list(zip(*each))
        value = of_one[0][0]
        if math.isnan(value) or value == math.inf:
            of_one = []
        elif not one.scored and value != NEVER:
            of_one = [(math.nan, 0, of_one[0][2])]
        found.append(of_one)
    return found


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
