"""The live sentences that have equally many hypotheses, and their rows."""

from typing import Any

import torch
from torch import Tensor

from handler.decoding.rows import Rows
from handler.decoding.selection import candidates, likeliest, needed
from handler.decoding.sentence import NEVER, Sentence


class Lane:
    """N sentences of K hypotheses each, kept dense; one step of the model advances them all.

    State is kept as [N, K, ...], so that a sentence comes and goes with all its rows.

    Args:
        fused: the model chooses the best tokens of each row itself (`best`), which only `plain`
            sentences can do with.
    """

    def __init__(self, width: int, fused: bool = False) -> None:
        self.width = width
        self.fused = fused
        self.sentences: list[Sentence] = []
        self.state = Rows()
        self.attended = Rows(padded=True)

    def add(self, sentences: list[Sentence], state: list[Tensor], attended: list[Tensor]) -> None:
        """Take in sentences: state [new, K, ...], attended memory [new, S, ...].

        On failure nothing is taken in.
        """
        before = len(self.sentences)
        try:
            self.state.append(len(sentences), state)
            self.attended.append(len(sentences), attended)
        except RuntimeError:
            self.state.cut(before)
            self.attended.cut(before)
            raise
        self.sentences += sentences

    def remove(self, i: int) -> None:
        """Take one sentence out; the last one moves into its place."""
        self.state.remove(i)
        self.attended.remove(i)
        last = self.sentences.pop()
        if i < len(self.sentences):
            self.sentences[i] = last

    def step(self, model: Any, memory: Any, never: Tensor) -> list[list[int]]:
        """One token for every row.

        Args:
            model: a `SequenceModel`; a `FusedModel` where the lane is fused.
            memory: an empty memory of the model's own type.
            never: ids that no text has.

        Returns:
            For each sentence the parents of its new hypotheses, none where it ended. The state is
            not yet in their order: see `reorder`.
        """
        longest = max(len(one.source) for one in self.sentences)
        last = [
            [h.tokens[-1] if h.tokens else model.bos_id for h in one.live]
            for one in self.sentences
        ]
        previous = torch.tensor(last, device=never.device)  # [N, K]
        memory = memory._replace(attended=self.attended.live(longest))
        flat = [t.flatten(0, 1) for t in self.state.live()]  # [N*K, ...]
        if self.fused:
            count = min(needed(self.sentences), model.target_vocabulary)
            scored = any(one.scored for one in self.sentences)
            values, tokens, normaliser, flat, attention = model.best(
                previous, flat, memory, count, scored
            )
            total = normaliser if scored else None
            chosen = likeliest(values, tokens, total, self.sentences, model.eos_id)
        else:
            logits, flat, attention = model.step(previous, flat, memory)
            logits.index_fill_(2, never, NEVER)
            chosen = candidates(logits, self.sentences, model.eos_id)
        shape = previous.shape
        self.state.replace([t.view(*shape, *t.shape[1:]) for t in flat])
        return [
            one.take(best, model.eos_id, attention[i])
            for i, (one, best) in enumerate(zip(self.sentences, chosen))
        ]

    def reorder(self, parents: list[list[int]]) -> None:
        """Put each sentence's rows into the order of its hypotheses; rows that stay where they
        are, are not touched."""
        k = self.width
        moved = [
            (i * k + place, i * k + parent)
            for i, one in enumerate(parents)
            for place, parent in enumerate(one)
            if place != parent
        ]
        if not moved:
            return
        for t in self.state.tensors:
            to, origin = torch.tensor(moved, device=t.device).unbind(1)
            flat = t.view(-1, *t.shape[2:])  # [N*K, ...]
            flat.index_copy_(0, to, flat.index_select(0, origin))
