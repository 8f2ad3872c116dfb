"""A model whose step probabilities are a table, so that expected output is computed by hand."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from handler.decoding import DecodingOptions, Engine, Event, decode_in_order

EOS = 3
A, B, C, D = 4, 5, 6, 7  # first ids that are not special


class TableMemory(NamedTuple):
    attended: list[Tensor]
    initial: list[Tensor]


class TableModel:
    """p(next | previous) from a table: {previous: {next: probability}}.

    A source whose first token is `poison` gives NaN for its own row only. `attention` is what the
    step after `previous` pays each source token: {previous: [share of each]}; where it is silent,
    all goes to the first.
    """

    pad_id, unk_id, bos_id, eos_id = 0, 1, 2, 3
    source_vocabulary = target_vocabulary = 12
    max_source_length, max_target_length = 8, 20
    card = "{}"

    def __init__(
        self,
        table: dict[int, dict[int, float]],
        poison: int = -1,
        attention: dict[int, list[float]] | None = None,
    ) -> None:
        self.logits = torch.full((12, 12), -30.0)
        for previous, nexts in table.items():
            for token, probability in nexts.items():
                self.logits[previous, token] = torch.tensor(probability).log()
        self.poison = poison
        self.has_attention = attention is not None
        self.attention = attention or {}
        self.rows_computed = 0
        self.rows_of: Counter[int] = Counter()  # the same by the first token of the source

    def encode(self, source: Tensor, lengths: Tensor) -> TableMemory:
        return TableMemory([source.unsqueeze(2).float()], [source[:, :1].float()])

    def start(self, memory: TableMemory) -> list[Tensor]:
        return [memory.initial[0]]

    def step(
        self, previous: Tensor, state: list[Tensor], memory: TableMemory
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        self.rows_computed += previous.numel()
        self.rows_of.update(int(first) for first in state[0].flatten().tolist())
        assert state[0].size(0) == previous.numel()
        assert memory.attended[0].size(0) == previous.size(0)
        logits = self.logits[previous]  # [N, K, V]
        poisoned = state[0].view(*previous.shape, 1) == self.poison
        weights = torch.zeros(*previous.shape, memory.attended[0].size(1))  # [N, K, S]
        weights[..., 0] = 1.0
        for token, shares in self.attention.items():
            weights[previous == token] = torch.tensor(shares)
        return logits.masked_fill(poisoned, float("nan")), state, weights


def decode(
    engine: Engine, sources: list[list[int]], options: DecodingOptions = DecodingOptions()
) -> list[Event]:
    return list(decode_in_order(engine, sources, options))


def drained(engine: Engine) -> dict[int, Event]:
    """What ends until nothing is left, by sentence, in the order in which it ends."""
    ended: dict[int, Event] = {}
    while not engine.idle:
        ended |= {event.sentence: event for event in engine.advance()}
    return ended
