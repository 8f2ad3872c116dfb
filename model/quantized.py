"""The served network with int8 weights: the `model.pt` of `export --weights int8`.

It computes with torch's own operators, everywhere, or with the fused ones of `model/native`, where
`pack` is told that they are there; the two differ by the last bits of sigmoid, tanh and exp.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.encoding import ServingEncoder
from model.int8 import Int8Embedding, Int8Projection, rows_for_native
from model.int8_lstm import Int8Cell, Int8Layer
from model.lstm import Cell, LSTMStack
from model.network import positions, reversed_within
from model.projection import Projection
from model.rows import attend
from model.serving import Ensemble, Memory, Readout, ServingBridge, ServingModel
from model.shortlist import Shortlist

FOLDED_BYTES = 1 << 28  # the largest table that a first layer is folded into


class Int8Encoder(nn.Module):
    """See `model.network.Encoder`."""

    def __init__(self, encoder: ServingEncoder, embedding: Int8Embedding) -> None:
        super().__init__()
        self.reverse = encoder.reverse
        self.embedding = embedding
        self.layers, self.after, self.directions = nn.ModuleList(), nn.ModuleList(), 1
        for lstm, after, follows in layers_of(encoder.stack):
            self.directions = 2 if lstm.bidirectional else 1
            first = len(self.layers) == 0
            fold = first and fits(embedding, 4 * lstm.hidden_size)
            self.layers.append(
                nn.ModuleList(
                    Int8Layer(lstm, follows, backwards, fold)
                    for backwards in (False, True)[: self.directions]
                )
            )
            self.after.append(after)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.reverse:
            source = reversed_within(source, lengths)
        x = self.embedding(source)  # [N, S, E]
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, after in zip(self.layers, self.after):
            ys: list[Tensor] = []
            for direction in layer:  # type: ignore[attr-defined]
                y, h, c = direction(x, source, lengths)
                ys.append(y)
                hs.append(h)
                cs.append(c)
            x = after(x, torch.cat(ys, 2))
        return x, torch.cat(hs, 1), torch.cat(cs, 1)

    @torch.jit.export
    def pack(self, native: bool) -> None:
        words = self.embedding.whole()
        for layer in self.layers:
            for direction in layer:  # type: ignore[attr-defined]
                direction.pack(native, words)


def layers_of(stack: LSTMStack) -> list[tuple[nn.LSTM, nn.Module, int]]:
    """Each layer's weights, what follows it, and its number within the weights."""
    _, after = stack.cells()
    calls = [lstm for lstm in stack.calls if isinstance(lstm, nn.LSTM)]
    places = [(lstm, layer) for lstm in calls for layer in range(lstm.num_layers)]
    return [(lstm, each, layer) for (lstm, layer), each in zip(places, after)]


def fits(embedding: Int8Embedding, gates: int) -> bool:
    return embedding.rows.size(0) * gates * 4 <= FOLDED_BYTES


class Int8Bridge(nn.Module):
    """See `model.network.Bridge`."""

    def __init__(self, bridge: ServingBridge) -> None:
        super().__init__()
        self.layers = bridge.layers
        self.h, self.c = None, None
        if isinstance(bridge.h, Projection) and isinstance(bridge.c, Projection):
            self.h = Int8Projection(bridge.h.weight, bridge.h.bias)
            self.c = Int8Projection(bridge.c.weight, bridge.c.bias)

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.h is not None and self.c is not None:
            h, c = self.h(h, True), self.c(c)
        return h.view(h.size(0), self.layers, -1), c.view(c.size(0), self.layers, -1)

    @torch.jit.export
    def pack(self, native: bool) -> None:
        if self.h is not None and self.c is not None:
            self.h.pack(native)
            self.c.pack(native)


class Int8Readout(nn.Module):
    """See `model.serving.Readout`; keys and values are made here too."""

    def __init__(self, readout: Readout) -> None:
        super().__init__()
        self.heads = readout.heads
        self.score = readout.score
        self.key = Int8Projection(readout.key.weight, None)
        self.value = Int8Projection(readout.value.weight, None)
        self.query = Int8Projection(readout.query.weight, None)
        self.readout = Int8Projection(readout.readout.weight, readout.readout.bias)

    def attended(self, y: Tensor) -> list[Tensor]:
        """Encoder outputs [N, S, ...] -> keys and values [N, S, A]."""
        n, s = y.size(0), y.size(1)
        flat = y.flatten(0, 1)
        return [self.key(flat).view(n, s, -1), self.value(flat).view(n, s, -1)]

    def forward(
        self, h: Tensor, hypotheses: int, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        query = self.query(h).view(keys.size(0), hypotheses, -1)  # [N, K, A]
        native = len(self.readout.packed) > 0
        if native and self.score is None:
            context, weights = torch.ops.seq2serve.attend(query, keys, values, mask, self.heads)
        elif native:
            score = self.score
            context, weights = torch.ops.seq2serve.float_attend(
                query, keys, values, mask, torch.empty(0) if score is None else score, self.heads
            )
        else:
            context, weights = attend(query, keys, values, mask, self.heads, self.score)
        flat = context.flatten(0, 1)
        if native:
            return torch.ops.seq2serve.linear(
                h, flat, self.readout.packed, self.readout.size, True
            ), weights
        return self.readout(torch.cat([h, flat], 1), True), weights

    @torch.jit.export
    def pack(self, native: bool) -> None:
        self.key.pack(native)
        self.value.pack(native)
        self.query.pack(native)
        self.readout.pack(native)


def quantized(model: ServingModel | Ensemble, shortlist: Shortlist | None = None) -> nn.Module:
    """The same model with int8 weights. `Ensemble.members` share nothing.

    Raises:
        ValueError: a shortlist for an ensemble, which needs all of its members' probabilities.
    """
    if not isinstance(model, Ensemble):
        return QuantizedModel(model, shortlist)
    if shortlist is not None:
        raise ValueError("shortlist: got one for an ensemble; allowed: null, as the mean of its "
                         "members needs the probabilities of all tokens")
    members: list[Any] = [
        QuantizedModel(member) for member in model.members if isinstance(member, ServingModel)
    ]
    return Ensemble(members, model.card)


class QuantizedModel(nn.Module):
    """`model.serving.ServingModel` with int8 weights, and two methods more, `best` and `allowed`.

    Args:
        shortlist: what `best` chooses from; its candidates are the last tensor of attended memory.
    """

    def __init__(self, model: ServingModel, shortlist: Shortlist | None = None) -> None:
        super().__init__()
        self.format_version = model.format_version
        self.pad_id, self.unk_id = model.pad_id, model.unk_id
        self.bos_id, self.eos_id = model.bos_id, model.eos_id
        self.source_vocabulary = model.source_vocabulary
        self.target_vocabulary = model.target_vocabulary
        self.max_source_length = model.max_source_length
        self.max_target_length = model.max_target_length
        self.has_attention = model.has_attention
        self.card = model.card
        self.fused = False  # whether `best` can be called
        # Whether a row is the same in any company: products of whole numbers are, and the rest is
        # computed as if a row was alone.
        self.invariant = True
        self.shortlisted = shortlist is not None  # whether `allowed` can be
        self.shortlist = shortlist
        self.embedding = Int8Embedding(model.embedding.weight)
        shared = model.encoder.embedding.weight is model.embedding.weight
        source = self.embedding if shared else Int8Embedding(model.encoder.embedding.weight)
        self.encoder = Int8Encoder(model.encoder, source)
        self.bridge = Int8Bridge(model.bridge)
        self.cells, self.after = nn.ModuleList(), model.after
        self.embeds = True  # whether a word's embedding is read beside the table
        for cell in model.cells:
            assert isinstance(cell, Cell)
            weight, bias = cell.gates.weight, cell.gates.bias
            size = weight.size(0) // 4
            input, recurrent = weight[:, :-size], weight[:, -size:]
            first = len(self.cells) == 0 and fits(self.embedding, 4 * size)
            self.cells.append(Int8Cell(input, recurrent, bias, first))
            if first:
                self.embeds = bool(self.after[0].residual)
        self.readout = None
        if model.readout is not None:
            self.readout = Int8Readout(model.readout)
        self.generator = Int8Projection(model.generator.weight, model.generator.bias)
        if model.generator.weight.data_ptr() == model.embedding.weight.data_ptr():
            self.generator.weight, self.generator.scale = self.embedding.rows, self.embedding.scale
        never = [self.pad_id, self.unk_id, self.bos_id]  # no text has them
        self.generator.bias[never] = float("-inf")
        self.rows = torch.empty(0, dtype=torch.int8)  # the generator, channel by channel
        self.eval()

    @torch.jit.export
    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """See `ServingModel.encode`."""
        y, h, c = self.encoder(source, lengths)
        h0, c0 = self.bridge(h, c)
        attended: list[Tensor] = []
        if self.readout is not None:
            if self.encoder.reverse:
                y = reversed_within(y, lengths)
            attended = self.readout.attended(y)
            attended.append(positions(source, lengths))
        if self.shortlist is not None:
            attended.append(self.shortlist(source, lengths))
        return Memory(attended, [h0, c0])

    @torch.jit.export
    def start(self, memory: Memory) -> list[Tensor]:
        """See `ServingModel.start`."""
        h0, c0 = memory.initial[0], memory.initial[1]  # [N, L, H]
        return list(h0.unbind(1)) + list(c0.unbind(1))

    @torch.jit.export
    def allowed(self, memory: Memory) -> Tensor:
        """bool [N, V]: the tokens that sentences may become; empty where there is no shortlist."""
        if self.shortlist is not None:
            return self.shortlist.allowed(memory.attended[-1])
        return torch.empty(0, dtype=torch.bool)

    def features(
        self, previous: Tensor, state: list[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """What the generator reads [N*K, E], the new state, and attention [N, K, S]."""
        n, k = previous.size(0), previous.size(1)
        layers = len(state) // 2
        tokens = previous.flatten()
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        # [N*K, E], where something reads it beside the table.
        x = self.embedding(tokens) if self.embeds else state[0][:, :0]
        for i, (cell, after) in enumerate(zip(self.cells, self.after)):
            h, c = cell(x, tokens, state[i].contiguous(), state[layers + i].contiguous())
            x = after(x, h)
            hs.append(h)
            cs.append(c)
        weights = x.new_empty([n, k, 0])
        if self.readout is not None:
            keys, values, mask = memory.attended[0], memory.attended[1], memory.attended[2]
            x, weights = self.readout(x, k, keys, values, mask)
        return x, hs + cs, weights

    @torch.jit.export
    def step(
        self, previous: Tensor, state: list[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """See `ServingModel.step`; of all tokens, also those that are not `allowed`."""
        x, state, weights = self.features(previous, state, memory)
        return self.generator(x).view(previous.size(0), previous.size(1), -1), state, weights

    @torch.jit.export
    def best(
        self, previous: Tensor, state: list[Tensor], memory: Memory, count: int, normalised: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        """`step` that keeps of each row's logits only what decoding mostly needs. Where there is a
        shortlist, it has no others than those of `allowed` tokens.

        Returns:
            The greatest `count` logits [N, K, count], best first (equals by id; -inf where there
            are fewer; NaN where the row is not finite), their tokens, and where asked for the log
            sum exp of all [N, K] (else empty); then what `step` returns beside its logits.
        """
        n, k = previous.size(0), previous.size(1)
        x, state, weights = self.features(previous, state, memory)
        if self.shortlist is not None:
            values, tokens, normaliser = torch.ops.seq2serve.listed(
                x, self.rows, self.generator.packed, memory.attended[-1], self.shortlist.common,
                count, normalised,
            )
        else:
            values, tokens, normaliser = torch.ops.seq2serve.best(
                x, self.generator.packed, count, normalised
            )
        if normalised:
            normaliser = normaliser.view(n, k)
        return values.view(n, k, -1), tokens.view(n, k, -1), normaliser, state, weights

    @torch.jit.export
    def pack(self, native: bool, onednn: bool, tiles: bool = True) -> None:
        """See `ServingModel.pack`."""
        self.encoder.pack(native)
        self.bridge.pack(native)
        words = self.embedding.whole()
        for cell in self.cells:
            cell.pack(native, words)  # type: ignore[operator]
        if self.readout is not None:
            self.readout.pack(native)
        if native and self.shortlist is not None and self.rows.numel() == 0:
            self.rows = rows_for_native(self.generator.weight)
        self.generator.pack(native, float("-inf"))
        self.fused = native
