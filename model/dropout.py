"""Dropout, with one mask per element or one per sequence."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def dropped(x: Tensor, p: float) -> Tensor:
    """`functional.dropout` with, on a CPU, four draws of 16 bits from each number of 64: a third of
    its time. p is then rounded to 1 / 65536."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return functional.dropout(x, p)
    else:
        return functional.dropout(x, p) if x.is_cuda else x * mask(x, p)


def mask(x: Tensor, p: float) -> Tensor:
    """Of the shape of x: 0 with probability p, else 1 / (1 - p)."""
    size = x.numel()
    draws = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[:size].view(x.shape) >= round(p * 65536) - 32768
    return kept.to(x.dtype).mul_(1 / (1 - p))


class Dropout(nn.Module):
    """Scaled dropout that can keep its mask over all steps of a sequence.

    Args:
        p: the probability that an element is dropped; the others are divided by 1 - p.
        variational: one mask for all steps of a sequence (Gal and Ghahramani 2016,
            arXiv 1512.05287, section 4); else one for every element.
    """

    def __init__(self, p: float, variational: bool = False) -> None:
        super().__init__()
        self.p = p
        self.variational = variational

    def forward(self, x: Tensor) -> Tensor:
        """x [N, steps, X] -> the same shape."""
        if not self.training or self.p == 0.0:
            return x
        if self.variational:
            return x * dropped(torch.ones_like(x[:, :1]), self.p)
        return dropped(x, self.p)

    def packed(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
        """The same for the data [P, X] of packed sequences."""
        if not self.training or self.p == 0.0:
            return data
        if self.variational:
            first = int(batch_sizes[0])
            mask = dropped(torch.ones_like(data[:first]), self.p)  # [N, X]
            steps = [mask[: int(size)] for size in batch_sizes]
            return data * torch.cat(steps)
        return dropped(data, self.p)


class WordDropout(nn.Module):
    """Drops whole words, each occurrence by itself: all of its embedding at once (Sennrich et al.
    2016, arXiv 1606.02891, section 2.2.2, after Gal and Ghahramani 2016)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x [N, steps, E] -> the same shape."""
        if not self.training or self.p == 0.0:
            return x
        return x * dropped(torch.ones_like(x[:, :, :1]), self.p)
