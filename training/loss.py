"""The loss of a batch, without its logits in memory.

Logits [tokens, V] are the largest tensor of training by far. The loss and its gradient are made
together, chunk by chunk, in the same memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model import Network
from model.blocks import ROWS, blocks, filled
from training.batches import Batch

# Logits at a time, in float32: 8 MB stay in a CPU's cache, 256 MB keep a GPU busy.
CHUNK_LOGITS = {"cpu": 2_000_000, "cuda": 64_000_000}


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of logits made at a time: whole blocks, and not so few that the passes over the
    gradient of the generator, one a chunk, are what takes the time."""
    return max(ROWS, CHUNK_LOGITS[device] // vocabulary // ROWS * ROWS)


class GeneratorLoss(Function):
    """Sum over tokens of the loss of softmax(features W^T + b).

    Cross-entropy with label smoothing s (Szegedy et al. 2016, arXiv 1512.00567, section 7):
        L = -(1 - s) log p(y) - (s / V) sum_v log p(v)
    where `pairs`, token t of the first half and of the second half being the same under two
    dropout masks, plus R-Drop (Wu et al. 2021, arXiv 2106.14448, equation 3):
        (r / 2) (KL(p1 || p2) + KL(p2 || p1)) = (r / 2) sum_v (p1 - p2) (log p1 - log p2)
    a pair.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        smoothing: float,
        consistency: float,
        pairs: bool,
    ) -> tuple[Tensor, Tensor]:
        """Args:
            features: [tokens, E]; weight: [V, E]; bias: [V]; targets: int64 [tokens].
            consistency: r of R-Drop; only where pairs, features then being [2, tokens / 2, E] flat.

        Returns:
            The loss; the sum of -log p(y) alone, which has no gradient.
        """
        device = features.device.type
        half = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if half else features.dtype
        read, w, b = features.to(dtype), weight.to(dtype), bias.to(dtype)
        copies = 2 if pairs else 1
        count = features.size(0) // copies
        loss = torch.zeros((), dtype=torch.float64, device=features.device)
        surprise = torch.zeros_like(loss)
        wanted = any(ctx.needs_input_grad)
        d_features, d_weight, d_bias = (
            torch.zeros_like(one if wanted else one[:0]) for one in (features, weight, bias)
        )
        size = max(1, chunk_rows(w.size(0), device) // copies)
        sums = torch.promote_types(features.dtype, torch.float32)
        for first in range(0, count, size):
            rows = [slice(first + i * count, min(first + size, count) + i * count)
                    for i in range(copies)]  # fmt: skip
            x = torch.cat([read[one] for one in rows]) if pairs else read[rows[0]]
            y = torch.cat([targets[one] for one in rows]).unsqueeze(1)
            whole = blocks(x.size(0), dtype) if device == "cpu" else x.size(0)
            x = filled(x, whole)
            z = torch.addmm(b, x, w.t())[: y.size(0)].to(sums)  # [rows, V]
            z -= z.amax(1, keepdim=True)
            picked = z.gather(1, y)
            if smoothing:
                loss -= smoothing / z.size(1) * z.sum()
            apart: Tensor | None = None
            if pairs:
                one, other = z.chunk(2)
                # log p1 - log p2 but for a constant a row, which changes neither value nor gradient
                apart = one - other
            p = z.exp_()
            whole_mass = p.sum(1, keepdim=True)
            p /= whole_mass
            log_mass = whole_mass.log_()
            picked -= log_mass  # log p(y)
            surprise -= picked.sum()
            loss -= (1 - smoothing) * picked.sum()
            loss += smoothing * log_mass.sum()
            if apart is not None:
                p1, p2 = p.chunk(2)
                gap = p1 - p2
                loss += consistency / 2 * (gap * apart).sum()
            if not wanted:
                continue
            if apart is not None:
                # d/dz1 = p1 (apart - p1 . apart) + (p1 - p2), and so for z2, with -apart
                add1 = p1 * (apart - (p1 * apart).sum(1, keepdim=True)) + gap
                add2 = p2 * ((p2 * apart).sum(1, keepdim=True) - apart) - gap
            if smoothing:
                p -= smoothing / p.size(1)  # now the gradient of the logits
            p.scatter_add_(1, y, torch.full_like(picked, smoothing - 1))
            if apart is not None:
                p1 += consistency / 2 * add1
                p2 += consistency / 2 * add2
            d_logits = filled(p.to(dtype), whole)
            d_x = torch.mm(d_logits, w)[: y.size(0)]
            for which, part in zip(rows, d_x.chunk(copies)):
                d_features[which] = part
            if d_weight.dtype == dtype:
                d_weight.addmm_(d_logits.t(), x)
            else:
                d_weight += torch.mm(d_logits.t(), x)
            d_bias += p.sum(0)
        ctx.save_for_backward(d_features, d_weight, d_bias)
        surprise = surprise.to(sums)
        ctx.mark_non_differentiable(surprise)
        return loss.to(sums), surprise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        gradients = [one * d_loss.to(one.dtype) for one in ctx.saved_tensors]
        return (*gradients, None, None, None, None)


def batch_loss(
    network: Network, batch: Batch, smoothing: float = 0.0, consistency: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of a batch summed over its target tokens, and the sum of -log P(y_j | x, y_<j).

    Args:
        smoothing: of labels; consistency: of R-Drop, 0 being none. With it the batch is run twice,
            under two dropout masks, and loss and sum are of both: twice as many tokens.
    """
    pairs = consistency > 0.0
    if pairs:
        batch = Batch(*(torch.cat([one, one]) for one in batch))
    features = network.features(
        batch.source, batch.source_lengths, batch.target_in, batch.target_lengths
    )  # [N, T, feature size]
    real = batch.target_out != 0  # [N, T]: the generator is not applied to padding
    weight: Tensor = network.generator.weight
    bias: Tensor = network.generator.bias
    if not torch.is_grad_enabled():  # of which a Function is not told
        weight, bias = weight.detach(), bias.detach()
    loss, surprise = GeneratorLoss.apply(
        features[real], weight, bias, batch.target_out[real], smoothing, consistency, pairs
    )
    return loss, surprise
