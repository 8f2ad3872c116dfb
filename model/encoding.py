"""The encoder as it is served: the network's own, or, where its weights have been laid out, layers
whose rows do not depend on each other."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from model.lstm import gated, in_order
from model.network import Encoder, reversed_within
from model.projection import Projection


class Layer(nn.Module):
    """One direction of one layer over packed sequences, what nn.LSTM's is. It has no weights until
    it is packed."""

    def __init__(self, lstm: nn.LSTM, backwards: bool) -> None:
        super().__init__()
        self.size = lstm.hidden_size
        self.backwards = backwards
        none, zeros = torch.empty(4 * self.size, 0), torch.zeros(4 * self.size)
        self.input = Projection(none, zeros, self.size)
        self.recurrent = Projection(none, zeros, self.size)

    def forward(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Args:
            x: [rows, input]; sizes: int64 [S], how many of them each step has; see PackedSequence.

        Returns:
            y [rows, H], and the last h and c [N, H].
        """
        added = self.input(x)
        if len(self.recurrent.native) > 0:
            return torch.ops.seq2serve.float_layer(
                added, sizes, self.recurrent.native, self.size, self.backwards
            )
        live: list[int] = sizes.tolist()
        steps = added.split(live)
        h = torch.zeros([live[0], self.size], dtype=x.dtype)
        c = torch.zeros_like(h)
        ys = [h] * len(live)
        for i in range(len(live)):
            t = len(live) - 1 - i if self.backwards else i
            n = live[t]
            h_next, c_next = gated(self.recurrent(h[:n]) + steps[t], c[:n])
            ys[t] = h_next
            h[:n] = h_next
            c[:n] = c_next
        return torch.cat(ys), h, c

    @torch.jit.export
    def pack(
        self, weights: list[Tensor], native: bool, onednn: bool, tiles: bool
    ) -> bool:
        """Args:
            weights: nn.LSTM's of input and state, and its biases; see `Projection.pack` for the
                rest, and for what is returned.
        """
        zeros = torch.zeros_like(weights[3])
        self.input.lay(in_order(weights[0]), in_order(weights[2] + weights[3]))
        self.recurrent.lay(in_order(weights[1]), zeros)
        invariant = self.input.pack(native, onednn, tiles)
        return self.recurrent.pack(native, onednn, tiles) and invariant


class ServingEncoder(nn.Module):
    """See `model.network.Encoder`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.reverse = encoder.reverse
        self.embedding = encoder.embedding
        self.stack = encoder.stack
        # For each call of the stack: its layers, each of them a direction or two; what follows.
        self.calls, self.after = nn.ModuleList(), nn.ModuleList()
        _, after = encoder.stack.cells()
        place = 0
        for lstm in encoder.stack.calls:
            assert isinstance(lstm, nn.LSTM)
            both = (False, True)[: 2 if lstm.bidirectional else 1]
            layers = [nn.ModuleList(Layer(lstm, b) for b in both) for _ in range(lstm.num_layers)]
            self.calls.append(nn.ModuleList(layers))
            self.after.append(nn.ModuleList(list(after)[place : place + lstm.num_layers]))
            place += lstm.num_layers
        self.by_rows = False

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.reverse:
            source = reversed_within(source, lengths)
        x = self.embedding(source)  # [N, S, E]
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        if self.by_rows:
            output, h, c = self.read(packed)
        else:
            output, hs, cs = self.stack(packed, None, None)
            h, c = hs.transpose(0, 1).flatten(1), cs.transpose(0, 1).flatten(1)
        y, _ = pad_packed_sequence(output, batch_first=True, total_length=source.size(1))
        return y, h, c

    def read(self, packed: PackedSequence) -> tuple[PackedSequence, Tensor, Tensor]:
        """Outputs, packed alike, and the last states of all layers [N, L*directions*H]."""
        data, sizes = packed.data, packed.batch_sizes
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for call, follow in zip(self.calls, self.after):
            for layer, after in zip(call, follow):  # type: ignore[call-overload]
                ys: list[Tensor] = []
                for direction in layer:
                    y, h, c = direction(data, sizes)
                    ys.append(y)
                    hs.append(h)
                    cs.append(c)
                data = after(data, torch.cat(ys, 1))
        h, c = torch.cat(hs, 1), torch.cat(cs, 1)
        order = packed.unsorted_indices
        if order is not None:
            h, c = h.index_select(0, order), c.index_select(0, order)
        output = PackedSequence(data, sizes, packed.sorted_indices, packed.unsorted_indices)
        return output, h, c

    @torch.jit.export
    def pack(self, native: bool, onednn: bool, tiles: bool) -> bool:
        """See `Projection.pack`."""
        weight = self.embedding.weight
        if weight.is_cuda or weight.dtype != torch.float32:
            return False
        invariant = True
        for lstm, call in zip(self.stack.calls, self.calls):
            weights: list[Tensor] = lstm._flat_weights  # type: ignore[assignment]
            at = 0
            for layer in call:  # type: ignore[attr-defined]
                for direction in layer:
                    own = weights[at : at + 4]
                    invariant = direction.pack(own, native, onednn, tiles) and invariant
                    at += 4
        self.by_rows = True
        return invariant
