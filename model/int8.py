"""int8 weights: how they are rounded, laid out and multiplied by.

Weights are int8 with one scale for each output channel. What they are multiplied by is rounded to
8 bits with one scale for each row, so that no row depends on another:

    q(x) = round(127 x / max |x|),   x W^T + b ~ (q(x) . W_q) * (max |x| / 127 * scale) + b

Both W_q and q(x) are integers, whose products are exact in float32 up to 1,040 inputs; more are
added up in pieces. So the two ways in which `Int8Projection` computes agree to the last bit:
torch's own operators, everywhere, and those of `model/native`, where `pack` is told that they are
there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUP, PANEL, DEPTH = 64, 16, 64  # of model/native/kernels.h
EXACT = 1040  # inputs whose products of 127 by 127 add up to less than 2^24
LEAST = 1e-30  # what is smaller counts as zero, as 127 over it need not be finite


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float [out, in] -> int8 [out, in] and the scale of each output [out].

    Raises:
        ValueError: weights that are not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("weights: got NaN or infinity; allowed: finite numbers only")
    scale = weight.abs().amax(1) / 127.0
    inverse = torch.where(scale > LEAST, 1.0 / scale, 0.0)
    return (weight * inverse.unsqueeze(1)).round().to(torch.int8), scale


def activations(x: Tensor, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """x [R, in] -> whole numbers of -127..127 as floats, and the scale of each row [R, 1]."""
    range_ = x.abs().amax(1, keepdim=True)
    inverse = torch.where(range_ > least, 127.0 / range_, 0.0)
    return (x * inverse).round(), range_ / 127.0


def product(q: Tensor, weight: Tensor, exact: int = EXACT) -> Tensor:
    """Whole numbers [R, in] by whole numbers [out, in], rounded once: the same in any order."""
    if q.size(1) <= exact:
        return functional.linear(q, weight)
    whole = torch.zeros([q.size(0), weight.size(0)], dtype=torch.double, device=q.device)
    for some, piece in zip(q.split(exact, 1), weight.split(exact, 1)):
        whole += functional.linear(some, piece)
    return whole.to(q.dtype)


def packed_for_native(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    rest: float,
    group: int = GROUP,
    panel: int = PANEL,
    depth: int = DEPTH,
) -> list[Tensor]:
    """Weights int8 [out, in] as `model/native` reads them: groups of four panels of sixteen output
    channels, four inputs at a time; what 128, the zero of its bytes, would add; scale; bias.
    Outputs that fill the last group have a bias of `rest`."""
    outputs, inputs = weight.size(0), weight.size(1)
    more = -outputs % group
    filled = functional.pad(weight, [0, -inputs % depth, 0, more])
    panels = filled.view(filled.size(0) // group, 4, panel, filled.size(1) // 4, 4)
    return [
        panels.permute(0, 3, 1, 2, 4).contiguous(),
        -128 * filled.to(torch.int32).sum(1).to(torch.int32),
        functional.pad(scale, [0, more]),
        functional.pad(bias, [0, more], value=rest),
    ]


def rows_for_native(weight: Tensor, depth: int = DEPTH) -> Tensor:
    """Weights int8 [out, in] channel by channel, for a product with some of them."""
    return functional.pad(weight, [0, -weight.size(1) % depth]).contiguous()


def by_unit(gates: Tensor, size: int, panel: int = PANEL) -> Tensor:
    """Gates [4H, X], one after the other, in groups of one panel of each: so that a group is all
    that its units need. H is filled up to whole panels."""
    more = -size % panel
    each = functional.pad(gates.view(4, size, -1), [0, 0, 0, more])
    panels = each.view(4, each.size(1) // panel, panel, each.size(2))
    return panels.transpose(0, 1).flatten(0, 2)


class Int8Embedding(nn.Module):
    """An embedding whose rows are int8, with a scale each."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, scale = rounded(weight.detach())
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale)

    rows: Tensor  # [V, E]
    scale: Tensor  # [V]

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., E]."""
        return self.rows[tokens] * self.scale[tokens].unsqueeze(-1)

    @torch.jit.export
    def whole(self) -> Tensor:
        return self.rows * self.scale.unsqueeze(1)


class Int8Projection(nn.Module):
    """y = x W^T + b. `gates`: the outputs are the gates of so many units, for a native layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gates: int = 0) -> None:
        super().__init__()
        self.size = weight.size(0)
        self.gates = gates
        rows, scale = rounded(weight.detach())
        self.register_buffer("weight", rows)
        self.register_buffer("scale", scale)
        self.register_buffer(
            "bias", torch.zeros_like(scale) if bias is None else bias.detach().clone()
        )
        self.packed: list[Tensor] = []

    weight: Tensor  # int8 [out, in]; float once `pack` chose torch's operators; empty once native
    scale: Tensor  # [out]
    bias: Tensor  # [out]
    packed: list[Tensor]  # see `packed_for_native`; empty where torch's operators compute

    def forward(self, x: Tensor, tanh: bool = False) -> Tensor:
        """x [R, in] -> [R, out]; units of gates side by side in whole groups where native."""
        if len(self.packed) > 0:
            size = self.packed[3].size(0) if self.gates > 0 else self.size
            return torch.ops.seq2serve.linear(x, x[:, :0], self.packed, size, tanh)
        y = self.plain(x)
        return torch.tanh(y) if tanh else y

    def plain(self, x: Tensor) -> Tensor:
        q, scale = activations(x)
        return product(q, self.weight.to(q.dtype)) * (scale * self.scale) + self.bias

    @torch.jit.export
    def table(self, words: Tensor, native: bool) -> Tensor:
        """What each of the words [V, in] comes to, [V, out], in place of the weights."""
        weight = self.weight * self.scale.unsqueeze(1)
        self.weight = torch.empty(0, dtype=torch.int8)
        y = functional.linear(words, weight, self.bias)
        return by_unit(y.t(), self.gates).t().contiguous() if native else y

    @torch.jit.export
    def pack(self, native: bool, rest: float = 0.0) -> None:
        if len(self.packed) > 0:
            return
        if not native:
            self.weight = self.weight.to(self.scale.dtype)
            return
        weight, scale, bias = self.weight, self.scale, self.bias
        if self.gates > 0:
            weight = by_unit(weight, self.gates)
            scale = by_unit(scale.unsqueeze(1), self.gates).squeeze(1)
            bias = by_unit(bias.unsqueeze(1), self.gates).squeeze(1)
        self.packed = packed_for_native(weight, scale, bias, rest)
        self.weight = torch.empty(0, dtype=torch.int8)
