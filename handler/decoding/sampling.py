"""Tokens that are drawn, for all sentences of a lane in one operation.

The numbers of a sentence come from its own seed, one for each token, so that its draws depend on
nothing else.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handler.decoding.rows import sent
from handler.decoding.selection import logsumexp
from handler.decoding.sentence import Sentence

MOST = 1 << 40  # which no vocabulary has; a client may name any number
NUCLEUS = 256  # likeliest tokens that are looked at before the whole vocabulary is sorted


@dataclass
class Draws:
    """What N sentences ask for that may sample.

    samples: bool [N], which of them do. heat: double [N], the temperature. most: int64 [N], top_k,
    0 for all tokens. nucleus: double [N], top_p. luck: double [N, T], a number of 0..1 for each
    token.
    """

    samples: Tensor
    heat: Tensor
    most: Tensor
    nucleus: Tensor
    luck: Tensor

    @classmethod
    def of(cls, sentences: Sequence[Sentence], device: torch.device) -> "Draws":
        options = [s.options for s in sentences]
        longest = max(s.max_length for s in sentences)
        real = sent([[o.temperature, o.top_p] for o in options], device, torch.double)
        return cls(
            sent([o.sampling for o in options], device, torch.bool),
            real[:, 0].clone(),
            sent([min(o.top_k, MOST) for o in options], device),
            real[:, 1].clone(),
            sent([lucky(s, longest) for s in sentences], device, torch.double),
        )

    @classmethod
    def none(cls, count: int, device: torch.device) -> "Draws":
        """Of so many sentences that do not sample."""
        ones = torch.ones(count, dtype=torch.double, device=device)
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        return cls(zeros.bool(), ones, zeros, ones.clone(), ones.new_empty((count, 0)))

    def part(self, rows: Tensor) -> "Draws":
        return Draws(*[table[rows] for table in vars(self).values()])


def lucky(sentence: Sentence, longest: int) -> list[float]:
    """A number for each token; those of a prefix are not drawn."""
    if not sentence.options.sampling:
        return [0.0] * longest
    draw = random.Random(sentence.options.seed)
    given = len(sentence.prefix)
    drawn = [draw.random() for _ in range(sentence.max_length - given)]
    return [0.0] * given + drawn + [0.0] * (longest - sentence.max_length)


def draw(logits: Tensor, draws: Draws, made: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each sentence.

    Args:
        logits: float [N, V]; made: int64 [N], tokens so far.

    Returns:
        The logits of the tokens [N], and the tokens, int64 [N]. A row that has no finite greatest
        logit gives that instead.
    """
    scaled = logits.double() / draws.heat.unsqueeze(1)
    luck = draws.luck.gather(1, made.unsqueeze(1))  # [N, 1]
    narrow = (draws.most > 0) | (draws.nucleus < 1)
    if not bool(narrow.any()):
        tokens = of_all(scaled, luck)
    elif bool(narrow.all()):
        tokens = of_likeliest(scaled, luck, draws)
    else:
        tokens = torch.where(narrow, of_likeliest(scaled, luck, draws), of_all(scaled, luck))
    greatest = logits.amax(1)
    chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return torch.where(greatest.isfinite(), chosen, greatest), tokens


def of_all(scaled: Tensor, luck: Tensor) -> Tensor:
    """The inverse of the distribution function, over the vocabulary in its own order; int64 [N]."""
    shares = torch.softmax(scaled, 1).cumsum(1)  # [N, V]
    place = torch.searchsorted(shares, luck * shares[:, -1:], right=True).squeeze(1)
    return place.clamp(max=scaled.size(1) - 1)


def of_likeliest(scaled: Tensor, luck: Tensor, draws: Draws) -> Tensor:
    """The same over the k likeliest, of them the fewest that reach p (arXiv 1904.09751), likeliest
    first; int64 [N]. Mostly these are few; the whole is sorted only for rows where they are not.
    """
    vocabulary = scaled.size(1)
    most = torch.where(draws.most > 0, draws.most.clamp(max=vocabulary), vocabulary)  # [N]
    total = logsumexp(scaled)
    values, tokens = scaled.topk(min(NUCLEUS, vocabulary), 1)
    place, reached = among(values, most, draws.nucleus, total, luck)
    # Of more than these, the k likeliest have a total of their own.
    enough = (most <= values.size(1)) | ((most == vocabulary) & reached)
    found = tokens.gather(1, place)
    if not bool(enough.all()):
        rows = (~enough).nonzero().squeeze(1)
        values, tokens = scaled[rows].sort(dim=1, descending=True, stable=True)
        place, _ = among(values, most[rows], draws.nucleus[rows], total[rows], luck[rows])
        found[rows] = tokens.gather(1, place)
    return found.squeeze(1)


def among(
    values: Tensor, most: Tensor, nucleus: Tensor, total: Tensor, luck: Tensor
) -> tuple[Tensor, Tensor]:
    """The place that is drawn among values [N, C], best first, int64 [N, 1]; and whether the C
    reach the nucleus, bool [N].

    Args:
        most: k of each; nucleus: p; total: log-sum-exp of the whole row, [N] each; luck: [N, 1].
    """
    count = values.size(1)
    inside = torch.arange(count, device=values.device) < most.unsqueeze(1)  # [N, C]
    values = values.masked_fill(~inside, float("-inf"))
    whole = most <= count
    total = torch.where(whole, logsumexp(values), total)
    shares = (values - total.unsqueeze(1)).exp().cumsum(1)  # [N, C]
    reached = shares[:, -1] >= nucleus
    kept = ((shares < nucleus.unsqueeze(1)) & inside).sum(1, keepdim=True) + 1  # [N, 1]
    kept = kept.minimum(most.clamp(max=count).unsqueeze(1))
    reach = luck * shares.gather(1, kept - 1)
    place = (shares <= reach).sum(1, keepdim=True)
    return place.minimum(kept - 1), reached
