"""An LSTM layer with int8 weights: one step of a decoder, and whole sentences of an encoder.

The first layer reads tokens, whose product with its weights is a table of the vocabulary.
"""

import torch
from torch import Tensor, nn

from model.int8 import Int8Projection
from model.lstm import gated, in_order
from model.network import reversed_within


class Int8Cell(nn.Module):
    """One LSTM layer for one step: see `model.lstm.Cell`.

    Where `folded`, the input is a token, and its part of the gates a row of a table.
    """

    def __init__(
        self, input: Tensor, recurrent: Tensor, bias: Tensor | None, folded: bool
    ) -> None:
        super().__init__()
        self.size = recurrent.size(1)
        self.folded = folded
        self.input = Int8Projection(input, bias, self.size) if folded else None
        weight = recurrent if folded else torch.cat([input, recurrent], 1)
        self.gates = Int8Projection(weight, None if folded else bias, self.size)
        self.table = torch.empty(0)

    def forward(
        self, x: Tensor, tokens: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [R, input], tokens int64 [R], h and c [R, H] -> the next h and c [R, H]."""
        if len(self.gates.packed) > 0:
            return torch.ops.seq2serve.cell(x, tokens, self.table, h, c, self.gates.packed)
        if self.folded:
            return gated(self.gates.plain(h) + self.table[tokens], c)
        return gated(self.gates.plain(torch.cat([x, h], 1)), c)

    @torch.jit.export
    def parts(self) -> list[Tensor]:
        """See `QuantizedModel.parts`: the table, empty where not folded, and what `gates` pack."""
        found = [self.table]
        found += self.gates.packed
        return found

    @torch.jit.export
    def pack(self, native: bool, words: Tensor) -> None:
        if self.input is not None and self.table.numel() == 0:
            self.table = self.input.table(words, native)
        self.gates.pack(native)


class Int8Layer(nn.Module):
    """One direction of one encoder layer over whole sentences."""

    def __init__(self, lstm: nn.LSTM, layer: int, backwards: bool, folded: bool) -> None:
        super().__init__()
        suffix = f"_l{layer}{'_reverse' if backwards else ''}"
        w_ih, w_hh, b_ih, b_hh = (
            in_order(getattr(lstm, name + suffix).detach())
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        self.size = lstm.hidden_size
        self.backwards = backwards
        self.folded = folded
        self.input = Int8Projection(w_ih, b_ih + b_hh, self.size)
        self.recurrent = Int8Projection(w_hh, None, self.size)
        self.table = torch.empty(0)

    def forward(
        self, x: Tensor, tokens: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, S, input], tokens int64 [N, S], lengths int64 [N] -> y [N, S, H], zero in the
        padding, and the last h and c [N, H]."""
        n, s = tokens.size(0), tokens.size(1)
        if len(self.recurrent.packed) > 0:
            added = x[:, :, :0] if self.folded else self.input(x.flatten(0, 1)).view(n, s, -1)
            return torch.ops.seq2serve.layer(
                added, tokens, self.table, lengths, self.recurrent.packed, self.size,
                self.backwards,
            )
        added = self.table[tokens] if self.folded else self.input(x.flatten(0, 1)).view(n, s, -1)
        if self.backwards:
            added = reversed_within(added, lengths)
        h = torch.zeros([n, self.size], dtype=x.dtype, device=x.device)
        c = h
        ys: list[Tensor] = []
        for t in range(s):
            live = (lengths > t).unsqueeze(1)
            h_next, c_next = gated(self.recurrent.plain(h) + added[:, t], c)
            ys.append(h_next * live)
            h, c = torch.where(live, h_next, h), torch.where(live, c_next, c)
        y = torch.stack(ys, 1)
        return reversed_within(y, lengths) if self.backwards else y, h, c

    @torch.jit.export
    def pack(self, native: bool, words: Tensor) -> None:
        if not self.folded:
            self.input.pack(native)
        elif self.table.numel() == 0:
            self.table = self.input.table(words, native)
        self.recurrent.pack(native)
