"""One LSTM layer over packed sequences, for training on a CPU.

`nn.LSTM` adds the gradient of the recurrent weights up step by step, a pass over all of them at
every step, and computes nothing ahead. Here every product that does not wait for the recurrence is
one product over all steps: W_ih x before it, and dW_ih, dW_hh and dx after it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.blocks import blocks, filled

aten = torch.ops.aten
STEP_ROWS = 16  # of a block of one step's rows


class Recurrence(Function):
    """i, f, o = sigmoid(.), g = tanh(.); c_t = f c_{t-1} + i g; h_t = o tanh(c_t), the gates being
    W_ih x_t + W_hh h_{t-1} + b (Hochreiter and Schmidhuber 1997, with the forget gate).

    Products are in the dtype of autocast where it is on; states, gates and sums in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        batch_sizes: list[int],
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor,
        h0: Tensor,
        c0: Tensor,
        backwards: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Args:
            x: data [P, X] of N packed sequences; batch_sizes: how many of them reach each step.
            weight_ih [4H, X], weight_hh [4H, H], bias [4H]: rows in torch's order i, f, g, o.
            h0, c0: [N, H], in the order of the packed sequences.
            backwards: read each sequence from its end.

        Returns:
            h of all steps [P, H]; the last h and c of each sequence [N, H].
        """
        half = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if half else x.dtype
        size, rows = weight_hh.size(1), x.size(0)
        total = blocks(rows, dtype)  # P, rounded up
        read = filled(x.to(dtype), total)
        w_ih, w_hh = gated(weight_ih).to(dtype), gated(weight_hh).to(dtype)
        ahead = torch.addmm(gated(bias).to(dtype), read, w_ih.t())  # [P, 4H]
        # i, f, o, g, in the same memory where dtypes allow
        gates = ahead if dtype == x.dtype else torch.empty(rows, 4 * size, dtype=x.dtype)
        h_before = torch.zeros(total, size, dtype=dtype)
        c_before, squashed, output = (torch.empty(rows, size, dtype=x.dtype) for _ in range(3))
        sequences = h0.size(0)
        h = torch.zeros(blocks(sequences, dtype, STEP_ROWS), size, dtype=dtype)
        h[:sequences] = h0
        c = c0.clone()
        steps = spans(batch_sizes, backwards)
        for first, last in steps:
            step = slice(first, last)
            n = last - first
            now = gates[step]
            h_before[step], c_before[step] = h[:n], c[:n]
            if gates is ahead:
                now.addmm_(h[:n], w_hh.t())
            else:
                recurrent = torch.mm(h[: blocks(n, dtype, STEP_ROWS)], w_hh.t())[:n]
                torch.add(ahead[step], recurrent, out=now)
            now[:, : 3 * size].sigmoid_()
            now[:, 3 * size :].tanh_()
            i, f, o, g = now.chunk(4, 1)
            c[:n].mul_(f).addcmul_(i, g)
            torch.tanh(c[:n], out=squashed[step])
            torch.mul(o, squashed[step], out=output[step])
            h[:n] = output[step]
        ctx.save_for_backward(read, w_ih, w_hh, gates, squashed, h_before, c_before)
        ctx.steps = steps
        return output, h[:sequences].to(x.dtype, copy=True), c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Any, ...]:
        read, w_ih, w_hh, gates, squashed, h_before, c_before = ctx.saved_tensors
        i, f, o, g = gates.chunk(4, 1)
        # What dc and dh are multiplied by on their way to each gate, for all steps at once.
        slopes = torch.empty(gates.size(0), 4, w_hh.size(1), dtype=gates.dtype)
        aten.sigmoid_backward(g, i, grad_input=slopes[:, 0])  # g i (1 - i)
        aten.sigmoid_backward(c_before, f, grad_input=slopes[:, 1])
        aten.sigmoid_backward(squashed, o, grad_input=slopes[:, 2])
        aten.tanh_backward(i, g, grad_input=slopes[:, 3])  # i (1 - g^2)
        through = aten.tanh_backward(o, squashed)  # [P, H]: from dh to dc
        dtype, rows, total = read.dtype, gates.size(0), read.size(0)
        d_gates = slopes
        if dtype != gates.dtype:
            d_gates = torch.zeros(total + STEP_ROWS, 4, w_hh.size(1), dtype=dtype)
        d_h, d_c = d_h.clone(), d_c.clone()
        for first, last in reversed(ctx.steps):
            step = slice(first, last)
            dh, dc = d_h[: last - first], d_c[: last - first]
            dh += d_output[step]
            dc.addcmul_(dh, through[step])
            slope, out = slopes[step], d_gates[step]
            torch.mul(slope[:, :2], dc.unsqueeze(1), out=out[:, :2])
            torch.mul(slope[:, 2], dh, out=out[:, 2])
            torch.mul(slope[:, 3], dc, out=out[:, 3])
            dc *= f[step]
            # Rows of other steps fill the block up; what they give is left.
            block = d_gates[first : first + blocks(last - first, dtype, STEP_ROWS)]
            dh.copy_(torch.mm(block.flatten(1), w_hh)[: last - first])
        flat = d_gates[:total].flatten(1)  # [P, 4H]
        out_dtype = gates.dtype
        return (
            torch.mm(flat, w_ih)[:rows].to(out_dtype),
            None,
            gated(torch.mm(flat.t(), read).to(out_dtype)),
            gated(torch.mm(flat.t(), h_before).to(out_dtype)),
            gated(flat.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(out_dtype)),
            d_h,
            d_c,
            None,
        )


def gated(x: Tensor) -> Tensor:
    """Rows [4H, ...] from torch's order of gates i, f, g, o to i, f, o, g, or back: the three
    sigmoids then lie side by side."""
    i, f, third, fourth = x.chunk(4)
    return torch.cat([i, f, fourth, third])


def spans(batch_sizes: list[int], backwards: bool) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each step of packed data, in the order of reading."""
    ends = [sum(batch_sizes[: t + 1]) for t in range(len(batch_sizes))]
    steps = [(end - size, end) for size, end in zip(batch_sizes, ends)]
    return steps[::-1] if backwards else steps
