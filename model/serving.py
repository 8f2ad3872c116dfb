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

from model.lstm import Projection
from model.network import Attention, Network, attend, positions, reversed_within

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


class Readout(nn.Module):
    """`model.network.Attention` for one step, with its weights; the rows of a step are flat."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.score = None if attention.score is None else nn.Parameter(attention.score.detach())
        self.query = Projection(attention.query.weight * attention.scale, None)
        self.readout = Projection(attention.readout.weight, attention.readout.bias)

    def forward(
        self, h: Tensor, hypotheses: int, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h [N*K, H], K, keys and values [N, S, A], mask bool [N, S] -> features [N*K, E] and
        attention weights [N, K, S]."""
        query = self.query(h).view(keys.size(0), hypotheses, -1)  # [N, K, A]
        if query.is_cuda and self.score is None:  # one kernel: see handler/decoding/kernels.py
            context, weights = torch.ops.seq2serve.attend(query, keys, values, mask, self.heads)
        else:
            context, weights = attend(query, keys, values, mask, self.heads, self.score)
        features = torch.tanh(self.readout(torch.cat([h, context.flatten(0, 1)], 1)))
        return features, weights

    @torch.jit.export
    def pack(self) -> None:
        self.query.pack()
        self.readout.pack()


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
        self.encoder = network.encoder
        self.bridge = network.bridge
        self.embedding = network.embedding
        self.cells, self.after = network.decoder.cells()
        self.key, self.value, self.readout = None, None, None
        if network.attention is not None:
            self.key, self.value = network.attention.key, network.attention.value
            self.readout = Readout(network.attention)
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
        if self.key is not None and self.value is not None:
            if self.encoder.reverse:  # position i of the memory is source token i
                y = reversed_within(y, lengths)
            attended = [self.key(y), self.value(y), positions(source, lengths)]
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
    def pack(self, native: bool, onednn: bool) -> None:
        """Lay the weights of `step` out as the device multiplies them. Not to be saved after it.

        Args:
            native: for the operators of `model/native`, which only int8 weights have.
            onednn: for oneDNN on a CPU, see `Projection`.
        """
        if not onednn:
            return
        for cell in self.cells:
            cell.pack()  # type: ignore[operator]
        if self.readout is not None:
            self.readout.pack()
        self.generator.pack()


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
        mean = torch.logsumexp(torch.stack(log_probabilities), 0) - math.log(len(self.members))
        if len(attention) == 0:
            return mean, after, mean[:, :, :0]
        return mean, after, torch.stack(attention).mean(0)

    @torch.jit.export
    def pack(self, native: bool, onednn: bool) -> None:
        """See `ServingModel.pack`."""
        for member in self.members:
            member.pack(native, onednn)  # type: ignore[operator]


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    """`model` as TorchScript, ready to be saved as model.pt."""
    return torch.jit.script(model)
