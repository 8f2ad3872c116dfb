"""y = x W^T + b, each row the same to the last bit whatever rows are beside it.

A library's product rounds as its blocks happen to fall, and they fall by how many rows there are.
So a projection of float32 weights on a CPU, once `pack` has laid it out, is one of

- an operator of `model/native`, where there is one: it adds up in the order of the inputs;
- oneDNN's product of packed weights, which keeps to one order as long as there are no more than
  `deepest` inputs; more are multiplied in pieces;
- torch's own, or oneDNN's where `pack` finds that it does not keep to one order on this processor,
  on tiles of a constant number of rows.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.int8 import by_unit

GROUP = 64  # of model/native/float32.h


def panels(weight: Tensor, bias: Tensor, group: int = GROUP) -> list[Tensor]:
    """Weights [out, in] as `model/native` reads them, [groups, in, 64], and the bias."""
    more = -weight.size(0) % group
    filled = functional.pad(weight, [0, 0, 0, more])
    groups = filled.view(filled.size(0) // group, group, filled.size(1))
    return [groups.transpose(1, 2).contiguous(), functional.pad(bias, [0, more])]


class Projection(nn.Module):
    """See above. `gates`: the outputs are the gates of so many units of a native layer."""

    # oneDNN's hint, in rows: packed for one row, larger batches would be slower; not reversely.
    packed_for: Final[int] = 64
    deepest: Final[int] = 1024
    rows_of_tile: Final[int] = 16

    def __init__(self, weight: Tensor, bias: Tensor | None, gates: int = 0) -> None:
        super().__init__()
        self.outputs = weight.size(0)
        self.gates = gates
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.native: list[Tensor] = []
        self.blocked: list[Tensor] = []
        self.tile = 0  # rows; 0: all at once
        self.laid_out, self.invariant = False, False

    weight: Tensor  # [out, in]; empty once laid out otherwise
    bias: Tensor | None  # [out]
    native: list[Tensor]  # see `panels`; empty where torch's operators compute
    blocked: list[Tensor]  # oneDNN's layout, in pieces of the inputs

    def forward(self, x: Tensor) -> Tensor:
        """x [R, in] -> [R, out]; units of gates in whole groups where native."""
        if len(self.native) > 0:
            return self.beside(x, x[:, :0], False)
        return self.plain(x)

    def beside(self, x: Tensor, more: Tensor, tanh: bool) -> Tensor:
        """x and more, side by side, [R, in] -> [R, out], or its tanh."""
        if len(self.native) > 0:
            size = self.native[1].size(0) if self.gates > 0 else self.outputs
            return torch.ops.seq2serve.float_linear(x, more, self.native, size, tanh)
        y = self.plain(torch.cat([x, more], 1))
        return torch.tanh(y) if tanh else y

    def plain(self, x: Tensor) -> Tensor:
        if self.tile == 0:
            return self.product(x)
        rows = x.size(0)
        filled = functional.pad(x, [0, 0, 0, -rows % self.tile])
        tiles = [self.product(some) for some in filled.split(self.tile)]
        return torch.cat(tiles)[:rows] if len(tiles) > 0 else self.product(x)

    def product(self, x: Tensor) -> Tensor:
        if len(self.blocked) == 0:
            return functional.linear(x, self.weight, self.bias)
        scalars = torch.jit.annotate(list[int | float | complex | None], [])
        bias = self.bias
        y = torch.empty(0)
        for i, piece in enumerate(self.blocked):
            some = x[:, i * self.deepest : (i + 1) * self.deepest]
            part = torch.ops.mkldnn._linear_pointwise(some, piece, bias, "none", scalars, "")
            y = part if i == 0 else y + part
            bias = None
        return y

    @torch.jit.export
    def lay(self, weight: Tensor, bias: Tensor) -> None:
        """Take other weights, before they are laid out."""
        if not self.laid_out:
            self.weight, self.bias = weight.detach(), bias.detach()

    @torch.jit.export
    def pack(self, native: bool, onednn: bool, tiles: bool) -> bool:
        """Lay the weights out. Not to be saved after it.

        Args:
            native, onednn: what there is. tiles: whether rows may be computed in tiles.

        Returns:
            Whether a row is the same in any company. False on a GPU and for other formats than
            float32, which stay as they are.
        """
        if self.laid_out or self.weight.is_cuda or self.weight.dtype != torch.float32:
            return self.invariant
        self.laid_out = True
        if native:
            weight, bias = self.weight, self.bias
            if bias is None:
                bias = torch.zeros([self.outputs])
            if self.gates > 0:
                weight = by_unit(weight, self.gates)
                bias = by_unit(bias.unsqueeze(1), self.gates).squeeze(1)
            self.native = panels(weight, bias)
            self.weight = torch.empty(0)
            self.invariant = True
            return True
        inputs = self.weight.size(1)
        if onednn:
            for some in self.weight.split(self.deepest, 1):
                piece = some.contiguous()
                packed = torch.ops.mkldnn._reorder_linear_weight(piece, self.packed_for)
                self.blocked.append(packed)
            self.weight = torch.empty(0)
        self.invariant = self.steady(inputs)
        if tiles and not self.invariant:
            self.tile = self.rows_of_tile
            self.invariant = self.steady(inputs)
            if not self.invariant:
                self.tile = 0
        return self.invariant

    def steady(self, inputs: int) -> bool:
        """Whether a row comes out the same beside others as alone, at several numbers of rows."""
        most = 48
        x = torch.sin(torch.arange(most * inputs).view(most, inputs) * 0.7)
        together = self.plain(x)
        for rows in [1, 2, 3, 5, 8, 17, 33]:
            for first in [0, most - rows]:
                some = self.plain(x[first : first + rows])
                if not torch.equal(some, together[first : first + rows]):
                    return False
        return True
