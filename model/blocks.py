"""Products in half precision on a CPU, in shapes that come again.

oneDNN compiles a kernel for every new shape of such a product, which takes some five times as long
as the product, and keeps it, 6 MB of memory. No two batches have as many tokens, so rows are filled
up to whole blocks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 128  # of a block


def blocks(rows: int, dtype: torch.dtype, block: int = ROWS) -> int:
    """`rows` rounded up to whole blocks, where that pays."""
    return rows if dtype.itemsize > 2 else -(-rows // block) * block


def filled(x: Tensor, rows: int) -> Tensor:
    """x [R, ...] with rows of zeros after its own, `rows` in all."""
    if x.size(0) == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - x.size(0), *x.shape[1:])])


class BlockLinear(nn.Linear):
    """`nn.Linear`, in whole blocks of rows where it learns in half precision on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.training and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.learning(x)
        return functional.linear(x, self.weight, self.bias)

    @torch.jit.unused
    def learning(self, x: Tensor) -> Tensor:
        if x.is_cuda or not torch.is_autocast_enabled("cpu"):
            return functional.linear(x, self.weight, self.bias)
        rows = x.numel() // x.size(-1)
        dtype = torch.get_autocast_dtype("cpu")
        flat = filled(x.reshape(rows, -1).to(dtype), blocks(rows, dtype))
        y = functional.linear(flat, self.weight, self.bias)[:rows].to(x.dtype)
        return y.view(*x.shape[:-1], -1)
