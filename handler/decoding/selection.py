"""The greatest of many logits, and what makes log probabilities of them."""

import torch
from torch import Tensor

BLOCK = 64  # logits that the first stage of top-k looks at together
BLOCKED_FROM = 2048  # vocabulary from which two stages are faster than one
SCRATCH = 1 << 18  # floats that stay in a processor's cache
PIECE = 1 << 14  # logits, less than what torch's threads share
LAST = 0x7FFFFFFF  # of int32


def normalisers(logits: Tensor) -> Tensor:
    """log sum exp of each row of [N, K, V], a few rows at a time: a temporary as large as all the
    logits would be memory fresh from the system at every step, which costs five times as much."""
    rows = max(1, SCRATCH // (logits.size(1) * logits.size(2)))
    if logits.size(0) <= rows:
        return logsumexp(logits)
    return torch.cat([logsumexp(some) for some in logits.split(rows)])  # [N, K]


def logsumexp(x: Tensor) -> Tensor:
    """log sum exp of each row of [..., V]. A long row goes in pieces: torch shares the sum of a
    single one among its threads, which then go in another order."""
    if x.size(-1) <= PIECE or x.is_cuda:
        return x.logsumexp(-1)
    return torch.stack([piece.logsumexp(-1) for piece in x.split(PIECE, -1)], -1).logsumexp(-1)


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


def without(token: int, where: Tensor, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Values and tokens [N, K, C], best first, less one: `token` in sentences `where`, bool [N],
    else the last; C - 1 each, or of one alone the value -inf."""
    taken = (tokens == token) & where.view(-1, 1, 1)
    if not bool(taken.any()):
        return values[:, :, :-1], tokens[:, :, :-1]
    return without_taken(taken, values, tokens)


def without_taken(taken: Tensor, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K, C - 1]: without the first that is `taken`, bool [N, K, C], else without the last. A
    model with few candidates fills them up with EOS of logit -inf, so that there may be more."""
    gone = taken.cumsum(2).clamp(max=1)[:, :, :-1]
    place = torch.arange(tokens.size(2) - 1, device=tokens.device) + gone
    return values.gather(2, place), tokens.gather(2, place)


def greatest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest `count` of float32 [N, K, V], best first, equals by id, and their ids.

    In half precision equal logits are common, and which of them torch's top-k takes depends on how
    many it is asked for, so on the sentences beside. In two stages: of the `count` first blocks in
    the order of their maxima, those that are equal by place, each has one before any element of the
    other blocks.
    """
    n, k, vocabulary = logits.shape
    blocks = vocabulary // BLOCK
    ids = torch.arange(vocabulary, device=logits.device)
    if blocks <= count:
        return in_order(logits, ids.expand(n, k, -1), count)
    whole = logits[:, :, : blocks * BLOCK].unflatten(2, (blocks, BLOCK))
    _, block = in_order(whole.amax(3), ids[:blocks].expand(n, k, -1), count)  # [N, K, count]
    found = whole.gather(2, block.unsqueeze(3).expand(n, k, count, BLOCK)).flatten(2)
    tokens = (block.unsqueeze(3) * BLOCK + ids[:BLOCK]).flatten(2)
    rest = ids[blocks * BLOCK :]
    found = torch.cat([found, logits[:, :, blocks * BLOCK :]], 2)
    return in_order(found, torch.cat([tokens, rest.expand(n, k, -1)], 2), count)


def in_order(values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of values [..., C] with their ids: the greatest first, NaN before all,
    equals by id. A float's bits, those behind a negative sign turned over, are ordered as whole
    numbers."""
    bits = values.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & LAST)).masked_fill(values.isnan(), LAST)
    _, place = ((ordered.long() << 32) - ids).topk(count, -1)
    return values.gather(-1, place), ids.gather(-1, place)
