"""A stack of LSTM layers, run over whole sequences (training) or one step at a time (decoding)."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from model.dropout import Dropout, dropped
from model.projection import Projection
from model.recurrence import Recurrence
from model.rows import sigmoid


class LSTMStack(nn.Module):
    """L layers of LSTM over packed sequences.

    On a GPU, and when it does not learn, a plain stack is one fused `nn.LSTM` call. Residual
    connections, layer normalisation and masks kept over time act between layers, so a stack that
    has them is L fused calls of one layer each. On a CPU it learns by `Recurrence`.

    Args:
        dropout: between layers.
        variational: see `Dropout`.
        recurrent_dropout: on recurrent weights, one mask an update (DropConnect; Merity et al.
            2017, arXiv 1708.02182, section 2): a mask kept over time that leaves the layer fused.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        layers: int,
        *,
        bidirectional: bool,
        dropout: float,
        variational: bool,
        recurrent_dropout: float,
        residual: bool,
        layer_norm: bool,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.recurrent_dropout = recurrent_dropout
        width = hidden_size * (2 if bidirectional else 1)
        per_call = 1 if residual or layer_norm or variational else layers
        sizes = [input_size] + [width] * (layers // per_call - 1)
        self.calls = nn.ModuleList(
            nn.LSTM(
                size,
                hidden_size,
                per_call,
                batch_first=True,
                dropout=dropout if per_call > 1 else 0.0,
                bidirectional=bidirectional,
            )
            for size in sizes
        )
        self.after = nn.ModuleList(
            AfterLayer(width, residual=residual and size == width, layer_norm=layer_norm)
            for size in sizes
        )
        self.dropout = Dropout(dropout, variational)

    def forward(
        self, packed: PackedSequence, h: Tensor | None, c: Tensor | None
    ) -> tuple[PackedSequence, Tensor, Tensor]:
        """Args:
            packed: inputs of N sequences.
            h, c: first states [L*directions, N, H], or None for zeros.

        Returns:
            The outputs, packed alike, and the last states [L*directions, N, H] twice.
        """
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for i, (lstm, after) in enumerate(zip(self.calls, self.after)):
            data = packed.data if i == 0 else self.dropout.packed(packed.data, packed.batch_sizes)
            packed = repacked(packed, data)
            first: tuple[Tensor, Tensor] | None = None
            if h is not None and c is not None:
                per_call = h.size(0) // len(self.calls)
                rows = slice(i * per_call, (i + 1) * per_call)
                first = (h[rows], c[rows])
            if self.training and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                output, (h_last, c_last) = self.learning(lstm, packed, first)
            else:
                output, (h_last, c_last) = lstm(packed, first)
            packed = repacked(output, after(packed.data, output.data))
            hs.append(h_last)
            cs.append(c_last)
        return packed, torch.cat(hs), torch.cat(cs)

    @torch.jit.unused
    def learning(
        self, lstm: nn.Module, packed: PackedSequence, first: tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        """What `lstm(packed, first)` is, with dropout on the recurrent weights, and fast on a CPU.
        """
        assert isinstance(lstm, nn.LSTM)
        weights = {
            name: dropped(weight, self.recurrent_dropout)
            if self.recurrent_dropout and name.startswith("weight_hh") else weight
            for name, weight in lstm.named_parameters()
        }
        if packed.data.is_cuda:
            if self.recurrent_dropout == 0.0:
                return lstm(packed, first)
            return torch.func.functional_call(lstm, weights, (packed, first))
        if first is None:
            rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
            zeros = packed.data.new_zeros(rows, int(packed.batch_sizes[0]), lstm.hidden_size)
            first = zeros, zeros
        elif packed.sorted_indices is not None:
            first = first[0][:, packed.sorted_indices], first[1][:, packed.sorted_indices]
        sizes, data = packed.batch_sizes.tolist(), packed.data
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer in range(lstm.num_layers):
            outputs = []
            for direction, suffix in enumerate(("", "_reverse")[: 2 if lstm.bidirectional else 1]):
                at = len(hs)
                w_ih, w_hh, b_ih, b_hh = (weights[f"{n}_l{layer}{suffix}"] for n in Cell.SOURCES)
                output, h, c = Recurrence.apply(
                    data, sizes, w_ih, w_hh, b_ih + b_hh, first[0][at], first[1][at], direction == 1
                )
                outputs.append(output)
                hs.append(h)
                cs.append(c)
            data = torch.cat(outputs, 1)
            if layer < lstm.num_layers - 1:
                data = self.dropout.packed(data, packed.batch_sizes)
        h_last, c_last = torch.stack(hs), torch.stack(cs)
        if packed.unsorted_indices is not None:
            h_last, c_last = h_last[:, packed.unsorted_indices], c_last[:, packed.unsorted_indices]
        return repacked(packed, data), (h_last, c_last)

    def cells(self) -> "tuple[nn.ModuleList, nn.ModuleList]":
        """The same layers for decoding one step at a time: cells, and what follows each."""
        cells, after = nn.ModuleList(), nn.ModuleList()
        for lstm, follows in zip(self.calls, self.after):
            assert isinstance(lstm, nn.LSTM)
            for layer in range(lstm.num_layers):
                cells.append(Cell(*(getattr(lstm, f"{name}_l{layer}") for name in Cell.SOURCES)))
                last = layer == lstm.num_layers - 1
                after.append(
                    follows if last else AfterLayer(lstm.hidden_size, residual=False,
                                                    layer_norm=False)
                )
        return cells, after


def repacked(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """The sequences of `packed` with other data."""
    return PackedSequence(
        data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
    )


class AfterLayer(nn.Module):
    """What follows a layer: residual connection (arXiv 1609.08144), then layer normalisation
    (arXiv 1607.06450)."""

    def __init__(self, width: int, *, residual: bool, layer_norm: bool) -> None:
        super().__init__()
        self.residual = residual
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Layer input `x` and layer output `y` [..., H] -> what the next layer reads."""
        if self.residual:
            y = y + x
        return self.norm(y)


class Cell(nn.Module):
    """One LSTM layer for one step, as one matrix product over input and state together.

    `nn.LSTM` called for a single step costs two to five times as much on a CPU. On a GPU a kernel
    costs more than a product of few rows, so there are two products, without a copy of input and
    state side by side, and one kernel for all the rest (handler/decoding/kernels.py).
    """

    SOURCES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def __init__(
        self, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
    ) -> None:
        super().__init__()
        weight = torch.cat([weight_ih, weight_hh], 1)  # [4H, input + H]
        bias = bias_ih + bias_hh
        self.gates = Projection(in_order(weight), in_order(bias), weight_hh.size(1))

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """x [R, input], h and c [R, H] -> the next h and c [R, H]."""
        if x.is_cuda:
            of_input, of_state = self.gates.weight.split([x.size(1), h.size(1)], 1)
            return torch.ops.seq2serve.lstm_pointwise(
                functional.linear(x, of_input), functional.linear(h, of_state), self.gates.bias, c
            )
        if len(self.gates.native) > 0:
            return torch.ops.seq2serve.float_cell(
                x, h.contiguous(), c.contiguous(), self.gates.native
            )
        return gated(self.gates(torch.cat([x, h], 1)), c)

    @torch.jit.export
    def pack(self, native: bool, onednn: bool, tiles: bool) -> bool:
        return self.gates.pack(native, onednn, tiles)


def in_order(gates: Tensor) -> Tensor:
    """nn.LSTM's gates [4H, ...], i f g o, as cells have them: i, f, o, g, the three sigmoids side
    by side."""
    i, f, g, o = gates.chunk(4)
    return torch.cat([i, f, o, g])


def gated(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gates [R, 4H] in the order i, f, o, g and c [R, H] -> the next h and c. Every operation
    rounds an element in the same way wherever it stands."""
    size = c.size(1)
    i, f, o = sigmoid(gates[:, : 3 * size]).chunk(3, 1)
    c = f * c + i * torch.tanh(gates[:, 3 * size :])
    return o * torch.tanh(c), c
