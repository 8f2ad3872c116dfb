"""The network as it is served: encode once, then one step at a time. This is `model.pt`.

Every kind of model, and an ensemble, has this interface, so nothing that decodes knows which one
it holds:

- `encode(source, lengths) -> Memory`
- `start(memory) -> State`
- `step(previous, state, memory) -> (logits, state)`

State is a list of tensors whose dimension 0 counts rows: rows can be selected, reordered and
written by index without knowing the model. It is scripted, never traced.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.network import Network, positions

FORMAT_VERSION = 1
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
        self.attention = network.attention
        self.generator = network.generator
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
        if self.attention is not None:
            attended = [self.attention.key(y), self.attention.value(y), positions(source, lengths)]
        return Memory(attended, [h0, c0])

    @torch.jit.export
    def start(self, memory: Memory) -> list[Tensor]:
        """First state of each sentence: h and c of each layer, 2L tensors [N, H]."""
        h0, c0 = memory.initial[0], memory.initial[1]  # [N, L, H]
        return list(h0.unbind(1)) + list(c0.unbind(1))

    @torch.jit.export
    def step(
        self, previous: Tensor, state: list[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor]]:
        """Advance every hypothesis by one token.

        Args:
            previous: int64 [N, K], the token chosen last (BOS at first).
            state: 2L tensors [N*K, H]; memory: of the N sentences, shared by their K hypotheses.

        Returns:
            Logits of the next token, float [N, K, V], and the new state.
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
        if self.attention is not None:
            keys, values, mask = memory.attended[0], memory.attended[1], memory.attended[2]
            x = self.attention(x.view(n, k, -1), keys, values, mask).flatten(0, 1)
        return self.generator(x).view(n, k, -1), hs + cs


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
        self.has_attention = all(m.has_attention for m in members)
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
    ) -> tuple[Tensor, list[Tensor]]:
        """See `ServingModel.step`; the logits are log((1/M) sum of p_m), already normalised."""
        log_probabilities: list[Tensor] = []
        after: list[Tensor] = []
        for i, member in enumerate(self.members):
            first = sum(self.state[:i])
            own = state[first : first + self.state[i]]
            logits, own = member.step(previous, own, self.memory_of(i, memory))  # type: ignore[operator]
            log_probabilities.append(torch.log_softmax(logits, 2))
            after += own
        mean = torch.logsumexp(torch.stack(log_probabilities), 0) - math.log(len(self.members))
        return mean, after


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    """`model` as TorchScript, ready to be saved as model.pt."""
    return torch.jit.script(model)
