"""The network as it is served: encode once, then one step at a time. This is `model.pt`.

Every kind of model, and an ensemble, has this interface, so nothing that decodes knows which one
it holds:

- `encode(source, lengths) -> Memory`
- `start(memory) -> State`
- `step(previous, state, memory) -> (logits, state, attention)`

State is a list of tensors whose dimension 0 counts rows: rows can be selected, reordered and
written by index without knowing the model. It is scripted, never traced.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import rows
from model.encoding import ServingEncoder
from model.network import Attention, Bridge, Network, attend, positions, reversed_within
from model.projection import Projection

FORMAT_VERSION = 4
ATTENDED, INITIAL = 3, 2  # tensors of memory in each half, for one model


class Memory(NamedTuple):
    """What decoding reads and never writes, dimension 0 counting sentences.

    attended: tensors [N, S, ...]; zeros are valid padding of S. Read by every step.
    initial: tensors [N, ...]. Read by `start` only; may be dropped after it.
    """

    attended: list[Tensor]
    initial: list[Tensor]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that decoding needs by name, the same on both sides."""

    pad: int = 0
    unk: int = 1
    bos: int = 2
    eos: int = 3


class ServingBridge(nn.Module):
    """See `model.network.Bridge`."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self.layers = bridge.layers
        self.h, self.c = None, None
        if isinstance(bridge.h, nn.Linear) and isinstance(bridge.c, nn.Linear):
            self.h = Projection(bridge.h.weight, bridge.h.bias)
            self.c = Projection(bridge.c.weight, bridge.c.bias)

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.h is not None and self.c is not None:
            h, c = self.h.beside(h, h[:, :0], True), self.c(c)
        return h.view(h.size(0), self.layers, -1), c.view(c.size(0), self.layers, -1)

    @torch.jit.export
    def pack(self, native: bool, onednn: bool, tiles: bool) -> bool:
        """See `Projection.pack`."""
        if self.h is not None and self.c is not None:
            invariant = self.h.pack(native, onednn, tiles)
            return self.c.pack(native, onednn, tiles) and invariant
        return True


class Readout(nn.Module):
    """`model.network.Attention` for one step, with its weights; the rows of a step are flat."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.score = None if attention.score is None else nn.Parameter(attention.score.detach())
        self.key = Projection(attention.key.weight, None)
        self.value = Projection(attention.value.weight, None)
        self.query = Projection(attention.query.weight * attention.scale, None)
        self.readout = Projection(attention.readout.weight, attention.readout.bias)

    def attended(self, y: Tensor) -> list[Tensor]:
        """Encoder outputs [N, S, ...] -> keys and values [N, S, A]."""
        n, s = y.size(0), y.size(1)
        flat = y.flatten(0, 1)
        return [self.key(flat).view(n, s, -1), self.value(flat).view(n, s, -1)]

    def forward(
        self, h: Tensor, hypotheses: int, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h [N*K, H], K, keys and values [N, S, A], mask bool [N, S] -> features [N*K, E] and
        attention weights [N, K, S]."""
        query = self.query(h).view(keys.size(0), hypotheses, -1)  # [N, K, A]
        if query.is_cuda and self.score is None:  # one kernel: see handler/decoding/kernels.py
            context, weights = torch.ops.seq2serve.attend(query, keys, values, mask, self.heads)
        elif query.is_cuda:
            context, weights = attend(query, keys, values, mask, self.heads, self.score)
        elif len(self.query.native) > 0:
            score = self.score
            context, weights = torch.ops.seq2serve.float_attend(
                query, keys, values, mask, torch.empty(0) if score is None else score, self.heads
            )
        else:
            context, weights = rows.attend(query, keys, values, mask, self.heads, self.score)
        return self.readout.beside(h, context.flatten(0, 1), True), weights

    @torch.jit.export
    def pack(self, native: bool, onednn: bool, tiles: bool) -> bool:
        """See `Projection.pack`."""
        invariant = self.key.pack(native, onednn, tiles)
        invariant = self.value.pack(native, onednn, tiles) and invariant
        invariant = self.query.pack(native, onednn, tiles) and invariant
        return self.readout.pack(native, onednn, tiles) and invariant


class ServingModel(nn.Module):
    """One network in its serving form; weights are shared with `network` where they can be.

    Args:
        network: the trained network; it is put into evaluation mode.
        max_source_length, max_target_length: in tokens, EOS included; what a server may be asked.
        card: the model card, JSON text.
        special: ids of the special tokens.
    """

    def __init__(
        self,
        network: Network,
        max_source_length: int,
        max_target_length: int,
        card: str = "{}",
        special: SpecialTokens = SpecialTokens(),
    ) -> None:
        super().__init__()
        self.format_version = FORMAT_VERSION
        self.pad_id, self.unk_id = special.pad, special.unk
        self.bos_id, self.eos_id = special.bos, special.eos
        self.source_vocabulary = network.encoder.embedding.num_embeddings
        self.target_vocabulary = network.embedding.num_embeddings
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.has_attention = network.attention is not None
        self.card = card
        self.invariant = False  # whether a row is the same, to the bit, in any company
        self.encoder = ServingEncoder(network.encoder)
        self.bridge = ServingBridge(network.bridge)
        self.embedding = network.embedding
        self.cells, self.after = network.decoder.cells()
        self.readout = None if network.attention is None else Readout(network.attention)
        self.generator = Projection(network.generator.weight, network.generator.bias)
        self.eval()

    @torch.jit.export
    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """Read N sentences.

        Args:
            source: int64 [N, S], padded with 0; lengths: int64 [N], each 1..S.
        """
        y, h, c = self.encoder(source, lengths)
        h0, c0 = self.bridge(h, c)
        attended: list[Tensor] = []
        if self.readout is not None:
            if self.encoder.reverse:  # position i of the memory is source token i
                y = reversed_within(y, lengths)
            attended = self.readout.attended(y)
            attended.append(positions(source, lengths))
        return Memory(attended, [h0, c0])

    @torch.jit.export
    def start(self, memory: Memory) -> list[Tensor]:
        """First state of each sentence: h and c of each layer, 2L tensors [N, H]."""
        h0, c0 = memory.initial[0], memory.initial[1]  # [N, L, H]
        return list(h0.unbind(1)) + list(c0.unbind(1))

    @torch.jit.export
    def step(
        self, previous: Tensor, state: list[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Advance every hypothesis by one token.

        Args:
            previous: int64 [N, K], the token chosen last (BOS at first).
            state: 2L tensors [N*K, H]; memory: of the N sentences, shared by their K hypotheses.

        Returns:
            Logits of the next token, float [N, K, V], in float32 also where the weights are in
            half precision; the new state; the attention that made them, float [N, K, S], where S
            is 0 for a model without.
        """
        n, k = previous.size(0), previous.size(1)
        layers = len(state) // 2
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        x = self.embedding(previous.flatten())  # [N*K, E]
        for i, (cell, after) in enumerate(zip(self.cells, self.after)):
            h, c = cell(x, state[i], state[layers + i])
            x = after(x, h)
            hs.append(h)
            cs.append(c)
        weights = x.new_empty([n, k, 0])
        if self.readout is not None:
            keys, values, mask = memory.attended[0], memory.attended[1], memory.attended[2]
            x, weights = self.readout(x, k, keys, values, mask)
        logits = self.generator(x).view(n, k, -1)
        if logits.element_size() < 4:  # log probabilities are summed up in float32
            logits = logits.float()
        return logits, hs + cs, weights

    @torch.jit.export
    def pack(self, native: bool, onednn: bool, tiles: bool = True) -> None:
        """Lay the weights out as the device multiplies them. Not to be saved after it.

        Args:
            native: for the operators of `model/native`.
            onednn: for oneDNN on a CPU, see `Projection`.
            tiles: compute in tiles of a constant number of rows where a row would otherwise depend
                on those beside it.
        """
        invariant = self.encoder.pack(native, onednn, tiles)
        invariant = self.bridge.pack(native, onednn, tiles) and invariant
        for cell in self.cells:
            invariant = cell.pack(native, onednn, tiles) and invariant  # type: ignore[operator]
        if self.readout is not None:
            invariant = self.readout.pack(native, onednn, tiles) and invariant
        self.invariant = self.generator.pack(native, onednn, tiles) and invariant


class Ensemble(nn.Module):
    """Several models of one vocabulary that answer as one: the mean of their probabilities.

    Raises:
        ValueError: no members, or members whose vocabularies differ.
    """

    def __init__(self, members: list[ServingModel], card: str = "{}") -> None:
        super().__init__()
        sizes = {(m.source_vocabulary, m.target_vocabulary) for m in members}
        if len(sizes) != 1:
            raise ValueError(f"an ensemble needs members of one vocabulary, got sizes {sizes}")
        first = members[0]
        self.format_version = FORMAT_VERSION
        self.pad_id, self.unk_id = first.pad_id, first.unk_id
        self.bos_id, self.eos_id = first.bos_id, first.eos_id
        self.source_vocabulary, self.target_vocabulary = sizes.pop()
        self.max_source_length = min(m.max_source_length for m in members)
        self.max_target_length = min(m.max_target_length for m in members)
        self.has_attention = any(m.has_attention for m in members)
        self.card = card
        self.invariant = False  # see `ServingModel`
        self.members = nn.ModuleList(members)  # which mypy takes for plain modules below
        # How many tensors of memory and state belong to each member.
        self.attended = [ATTENDED if m.has_attention else 0 for m in members]
        self.initial = [INITIAL for _ in members]
        self.state = [2 * len(m.cells) for m in members]
        self.eval()

    def memory_of(self, i: int, memory: Memory) -> Memory:
        a, b = sum(self.attended[:i]), sum(self.initial[:i])
        initial = memory.initial[b : b + self.initial[i]]
        return Memory(memory.attended[a : a + self.attended[i]], initial)

    @torch.jit.export
    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """See `ServingModel.encode`."""
        attended: list[Tensor] = []
        initial: list[Tensor] = []
        for member in self.members:
            memory = member.encode(source, lengths)  # type: ignore[operator]
            attended += memory.attended
            initial += memory.initial
        return Memory(attended, initial)

    @torch.jit.export
    def start(self, memory: Memory) -> list[Tensor]:
        """See `ServingModel.start`."""
        state: list[Tensor] = []
        for i, member in enumerate(self.members):
            state += member.start(self.memory_of(i, memory))  # type: ignore[operator]
        return state

    @torch.jit.export
    def step(
        self, previous: Tensor, state: list[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """See `ServingModel.step`; the logits are log((1/M) sum of p_m), already normalised, and
        the attention is the mean of those members that have it."""
        log_probabilities: list[Tensor] = []
        attention: list[Tensor] = []
        after: list[Tensor] = []
        for i, member in enumerate(self.members):
            first = sum(self.state[:i])
            own = state[first : first + self.state[i]]
            logits, own, weights = member.step(previous, own, self.memory_of(i, memory))  # type: ignore[operator]
            log_probabilities.append(torch.log_softmax(logits, 2))
            after += own
            if weights.size(2) > 0:
                attention.append(weights)
        mean = rows.logsumexp(torch.stack(log_probabilities)) - math.log(len(self.members))
        if len(attention) == 0:
            return mean, after, mean[:, :, :0]
        return mean, after, rows.total(torch.stack(attention)) / len(attention)

    @torch.jit.export
    def pack(self, native: bool, onednn: bool, tiles: bool = True) -> None:
        """See `ServingModel.pack`."""
        invariant = True
        for member in self.members:
            member.pack(native, onednn, tiles)  # type: ignore[operator]
            invariant = member.invariant and invariant  # type: ignore[assignment]
        self.invariant = invariant


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    """`model` as TorchScript, ready to be saved as model.pt."""
    return torch.jit.script(model)
