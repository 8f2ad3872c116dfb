"""Operations of torch in forms that give a row the same bits whatever rows are beside it, however
many they are, and however far the longest source among them reaches.

Torch's own sums and products go in an order that depends on shapes, and an element may be computed
sixteen at a time or alone, which are not the same functions. These forms have inner dimensions of a
constant size, or sums in one order. `model/native` has faster ones.
"""

import torch
from torch import Tensor
from torch.nn import functional

SCRATCH = 1 << 18  # floats that stay in a processor's cache
TILE = 32  # source tokens whose values are added up at once


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) by way of tanh, which is one function for all elements."""
    return torch.tanh(x * 0.5).mul_(0.5).add_(0.5)


def total(parts: Tensor) -> Tensor:
    """The sum over dimension 0, from the first to the last."""
    whole = parts[0]
    for i in range(1, parts.size(0)):
        whole = whole + parts[i]
    return whole


def logsumexp(parts: Tensor) -> Tensor:
    """log sum exp over dimension 0; -inf where all are."""
    most = parts.amax(0)
    most = torch.where(most == float("-inf"), torch.zeros_like(most), most)
    return total((parts - most).exp()).log() + most


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int, score: Tensor | None,
    scratch: int = SCRATCH, tile: int = TILE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `model.network.attend` is."""
    n, k, s, width = query.size(0), query.size(1), keys.size(1), keys.size(2)
    some = max(1, scratch // max(1, k * s * width))  # sentences at once
    if n <= some:
        return attended(query, keys, values, mask, heads, score, tile)
    contexts: list[Tensor] = []
    weights: list[Tensor] = []
    for first in range(0, n, some):
        one, of_it = attended(
            query[first : first + some], keys[first : first + some], values[first : first + some],
            mask[first : first + some], heads, score, tile,
        )  # fmt: skip
        contexts.append(one)
        weights.append(of_it)
    return torch.cat(contexts), torch.cat(weights)


def attended(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int, score: Tensor | None,
    tile: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, k, s, width = query.size(0), query.size(1), keys.size(1), keys.size(2)
    query = query.view(n, k, 1, heads, -1)
    keys = keys.view(n, 1, s, heads, -1)
    # [N, K, S, heads, A / heads]
    terms = query * keys if score is None else torch.tanh(query + keys) * score
    scores = terms.sum(4).masked_fill(~mask.view(n, 1, s, 1), float("-inf"))
    shares = (scores - scores.amax(2, keepdim=True)).exp()
    shares = shares / shares.cumsum(2)[:, :, -1:]
    mixed = (shares.unsqueeze(4) * values.view(n, 1, s, heads, -1)).flatten(3)  # [N, K, S, A]
    tiles = functional.pad(mixed, [0, 0, 0, -s % tile]).view(n, k, -1, tile, width).sum(3)
    context = total(tiles.transpose(0, 2)).transpose(0, 1)
    return context, total(shares.permute(3, 0, 1, 2)) / heads
