"""Which target pieces a source piece may become, learnt from token pairs.

IBM Model 1 (Brown et al. 1993, The Mathematics of Statistical Machine Translation, section 4.1):
t(f | e) by EM, where each target piece f of a pair comes from one of its source pieces e. EOS,
which ends every source, is the empty cept: what comes from no word comes from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import SpecialTokens
from model.shortlist import Shortlist
from training.recipe import ShortlistOptions
from training.tokens import TokenPairs

CO_OCCURRENCES = 1 << 26  # pairs of pieces that are learnt from, 20 bytes each
ITERATIONS = 5
CHUNK = 5_000  # sentence pairs looked at together


@dataclass(frozen=True, eq=False)
class Lexicon:
    """t(f | e) of the pieces that occur together, in the order of e, then f.

    source, target: int64 [M]; probability: float64 [M].
    """

    source: Tensor
    target: Tensor
    probability: Tensor


def shortlist(
    pairs: TokenPairs,
    same: Tensor,
    vocabulary: int,
    options: ShortlistOptions,
    special: SpecialTokens = SpecialTokens(),
) -> Shortlist:
    """The most frequent target pieces, and for each source piece those that it becomes most often.

    Args:
        same: int64 [V source]: the target piece that reads like each source piece, which it may
            always become (a name, a digit, a byte); 0 where there is none.
        vocabulary: of the target.
    """
    counts = torch.bincount(pairs.target_tokens, minlength=vocabulary)
    counts[[special.pad, special.unk, special.bos]] = -1
    counts[special.eos] = len(pairs)  # that many sentences end
    common = counts.argsort(descending=True, stable=True)[: options.frequent]
    common = torch.cat([common, torch.tensor([special.eos])]).unique()
    lexicon = learn(pairs)
    known = torch.isin(lexicon.target, common) | (lexicon.target == same[lexicon.source])
    known |= torch.isin(lexicon.target, (counts < 0).nonzero().flatten())
    source, target = lexicon.source[~known], lexicon.target[~known]
    order = lexicon.probability[~known].argsort(descending=True, stable=True)
    order = order[source[order].argsort(stable=True)]  # by source piece, likeliest first
    source, target = source[order], target[order]
    each = torch.bincount(source, minlength=len(same))
    rank = torch.arange(len(source)) - (each.cumsum(0) - each)[source]
    likely = rank < options.candidates
    table = torch.zeros(len(same), 1 + options.candidates, dtype=torch.int64)
    table[:, 0] = same
    table[source[likely], 1 + rank[likely]] = target[likely]
    return Shortlist(table, common, vocabulary)


def learn(pairs: TokenPairs, most: int = CO_OCCURRENCES, iterations: int = ITERATIONS) -> Lexicon:
    """The lexicon of `pairs`, or of a part of them, evenly spaced, with at most `most` pairs of
    pieces. Equal pairs give equal bits."""
    chosen = sample(pairs, most)
    width = int(pairs.target_tokens.max()) + 1 if len(pairs.target_tokens) else 1
    table = torch.empty(0, dtype=torch.int64)  # e * width + f, sorted
    for keys, _ in grids(pairs, chosen, width):
        table = torch.cat([table, keys.unique()]).unique()
    places = [torch.searchsorted(table, keys).int() for keys, _ in grids(pairs, chosen, width)]
    source = table // width
    probability = torch.ones(len(table), dtype=torch.double)
    for _ in range(iterations):
        counts = torch.zeros_like(probability)
        for place, (_, counted) in zip(places, grids(pairs, chosen, width)):
            share = probability[place]  # of each e in f
            rows = torch.repeat_interleave(torch.arange(len(counted)), counted)
            whole = torch.zeros(len(counted), dtype=torch.double).index_add_(0, rows, share)
            counts.index_add_(0, place, share / whole[rows])
        total = torch.zeros(int(source[-1]) + 1 if len(source) else 0, dtype=torch.double)
        probability = counts / total.index_add_(0, source, counts)[source]
    return Lexicon(source, table % width, probability)


def sample(pairs: TokenPairs, most: int) -> Tensor:
    """Numbers of evenly spaced pairs whose grids have at most `most` cells together."""
    cells = pairs.source_lengths() * (pairs.target_lengths() - 1)
    total = int(cells.sum())
    chosen = torch.arange(0, len(pairs), max(1, -(-total // most)))
    return chosen[cells[chosen].cumsum(0) <= most]


def grids(pairs: TokenPairs, chosen: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of some sentence pairs at a time: e * width + f of every source piece e beside every target
    piece f, target piece by target piece; and how many source pieces are beside each of these."""
    for some in chosen.split(CHUNK):
        lengths = pairs.target_lengths()[some] - 1
        beside = torch.repeat_interleave(some, lengths)  # the pair of each target piece
        target = pairs.target_tokens[runs(pairs.target_offsets[some], lengths)].long()
        counted = pairs.source_lengths()[beside]
        source = pairs.source_tokens[runs(pairs.source_offsets[beside], counted)].long()
        yield source * width + torch.repeat_interleave(target, counted), counted


def runs(firsts: Tensor, lengths: Tensor) -> Tensor:
    """first, first + 1, ... of each run of so many numbers, one run behind the other."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(firsts - before, lengths) + torch.arange(int(lengths.sum()))
