"""The live sentences that have equally many hypotheses, and their rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handler.decoding.rows import Rows
from handler.decoding.selection import candidates, likeliest, needed, restrict
from handler.decoding.sentence import NEVER, Sentence


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What every step asks of a model, which a scripted module would answer slowly.

    never: ids that no text has, on the model's device. shortlisted: whether the model has
    `allowed`, which says what each sentence may become.
    """

    bos: int
    eos: int
    size: int
    never: Tensor
    shortlisted: bool

    @classmethod
    def of(cls, model: Any, device: torch.device) -> "Vocabulary":
        never = torch.tensor([model.pad_id, model.unk_id, model.bos_id], device=device)
        shortlisted = bool(getattr(model, "shortlisted", False))
        return cls(model.bos_id, model.eos_id, model.target_vocabulary, never, shortlisted)


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

    def step(self, model: Any, memory: Any, vocabulary: Vocabulary) -> list[list[int]]:
        """One token for every row.

        Args:
            model: a `SequenceModel`; a `FusedModel` where the lane is fused.
            memory: an empty memory of the model's own type.
            vocabulary: of the model.

        Returns:
            For each sentence the parents of its new hypotheses, none where it ended. The state is
            not yet in their order: see `reorder`.
        """
        longest = max(len(one.source) for one in self.sentences)
        last = [
            [h.tokens[-1] if h.tokens else vocabulary.bos for h in one.live]
            for one in self.sentences
        ]
        previous = torch.tensor(last, device=vocabulary.never.device)  # [N, K]
        memory = memory._replace(attended=self.attended.live(longest))
        flat = [t.flatten(0, 1) for t in self.state.live()]  # [N*K, ...]
        if self.fused:
            count = min(needed(self.sentences), vocabulary.size)
            scored = any(one.scored for one in self.sentences)
            values, tokens, normaliser, flat, attention = model.best(
                previous, flat, memory, count, scored
            )
            total = normaliser if scored else None
            chosen = likeliest(values, tokens, total, self.sentences, vocabulary.eos)
        else:
            logits, flat, attention = model.step(previous, flat, memory)
            if vocabulary.shortlisted:
                restrict(logits, model.allowed(memory), self.sentences)
            logits.index_fill_(2, vocabulary.never, NEVER)
            chosen = candidates(logits, self.sentences, vocabulary.eos)
        shape = previous.shape
        self.state.replace([t.view(*shape, *t.shape[1:]) for t in flat])
        return [
            one.take(best, vocabulary.eos, attention[i])
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
        to, origin = torch.tensor(moved, device=self.state.tensors[0].device).unbind(1)
        for t in self.state.tensors:
            flat = t.view(-1, *t.shape[2:])  # [N*K, ...]
            flat.index_copy_(0, to, flat.index_select(0, origin))
