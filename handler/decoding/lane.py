"""The live sentences that have equally many hypotheses, and their rows; and those on their way
into a lane."""

import functools
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handler.decoding.multistep import Search, multistep
from handler.decoding.rows import Rows
from handler.decoding.selection import (
    Candidate,
    any_short,
    candidates,
    likeliest,
    listed,
    needed,
    normalisers,
    restrict,
    top,
    without,
)
from handler.decoding.sentence import NEVER, Sentence

Made = tuple[list[list[Candidate]], Tensor]  # candidates of each sentence; attention [N, K, S]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What every step asks of a model, which a scripted module would answer slowly.

    never: ids that no text has, on the model's device. shortlisted: whether the model has
    `allowed`, which says what each sentence may become. unseen: steps that are made before what
    they chose is read, where reading waits for a device; 0 where it costs nothing.
    """

    bos: int
    eos: int
    size: int
    never: Tensor
    shortlisted: bool
    unseen: int

    @classmethod
    def of(cls, model: Any, device: torch.device) -> "Vocabulary":
        never = torch.tensor([model.pad_id, model.unk_id, model.bos_id], device=device)
        shortlisted = bool(getattr(model, "shortlisted", False))
        unseen = int(getattr(model, "unseen", 0))
        return cls(model.bos_id, model.eos_id, model.target_vocabulary, never, shortlisted, unseen)


@dataclass
class Encoded:
    """Sentences that were encoded together and enter as rows become free."""

    sentences: list[Sentence]
    state: list[Tensor]  # [N, 1, ...]
    attended: list[Tensor]  # [N, S, ...]
    entered: int = 0  # of `sentences`, or cancelled

    @property
    def done(self) -> bool:
        return self.entered == len(self.sentences)

    def next(self, alive: Container[int], free: int) -> list[int]:
        """Places of the sentences that fit into `free` rows, which have then entered."""
        places: list[int] = []
        for one in self.sentences[self.entered :]:
            if one.id in alive:
                if one.options.beam_size > free:
                    break
                free -= one.options.beam_size
                places.append(self.entered)
            self.entered += 1
        return places


@dataclass(frozen=True)
class Move:
    """A sentence on its way to a lane of another width, with its rows."""

    sentence: Sentence
    state: list[Tensor]  # [1, K, ...]
    attended: list[Tensor]  # [1, S, ...]


class Lane:
    """N sentences of K hypotheses each, kept dense; one step of the model advances them all.

    State is kept as [N, K, ...], so that a sentence comes and goes with all its rows.

    Args:
        model: a `SequenceModel`; a `FusedModel` where the lane is fused.
        width: K.
        fused: the model chooses the best tokens of each row itself (`best`), which only `plain`
            sentences can do with.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, width: int, fused: bool) -> None:
        self.model = model
        self.vocabulary = vocabulary
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

    def step(
        self, memory: Any, steps: int, in_time: Callable[[], bool]
    ) -> tuple[list[list[int]], int]:
        """One token for every row, or up to `steps` where no sentence ends before.

        Args:
            memory: an empty memory of the model's own type.
            in_time: whether there is time for another step.

        Returns:
            For each sentence the parents of its new hypotheses, none where it ended; and how many
            steps were made. The state is not yet in their order: see `reorder`.
        """
        longest = max(len(one.source) for one in self.sentences)
        last = [
            [h.tokens[-1] if h.tokens else self.vocabulary.bos for h in one.live]
            for one in self.sentences
        ]
        previous = torch.tensor(last, device=self.vocabulary.never.device)  # [N, K]
        memory = memory._replace(attended=self.attended.live(longest))
        state = [t.flatten(0, 1) for t in self.state.live()]  # [N*K, ...]
        steps = min(steps, self.steady())
        if steps > 1:
            made, state = self.several(previous, state, memory, steps, in_time)
        else:
            made, state = self.single(previous, state, memory)
        self.state.replace([t.view(*previous.shape, *t.shape[1:]) for t in state])
        parents: list[list[int]] = [[] for _ in self.sentences]
        for chosen, attention in made:
            for i, one in enumerate(self.sentences):
                if not one.ended:
                    parents[i] = one.take(chosen[i], self.vocabulary.eos, attention[i])
        return parents, len(made)

    def single(
        self, previous: Tensor, state: list[Tensor], memory: Any
    ) -> tuple[list[Made], list[Tensor]]:
        """One step, whatever the sentences ask for."""
        if self.fused:
            count = min(needed(self.sentences), self.vocabulary.size)
            scored = any(one.scored for one in self.sentences)
            values, tokens, total, state, attention = self.model.best(
                previous, state, memory, count, scored
            )
            chosen = likeliest(
                values, tokens, total if scored else None, self.sentences, self.vocabulary.eos
            )
        else:
            logits, state, attention = self.logits(previous, state, memory)
            chosen = candidates(logits, self.sentences, self.vocabulary.eos)
        return [(chosen, attention)], state

    def logits(
        self, previous: Tensor, state: list[Tensor], memory: Any
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """A step of the model, with what no sentence may become at -inf."""
        logits, state, attention = self.model.step(previous, state, memory)
        if self.vocabulary.shortlisted:
            restrict(logits, self.model.allowed(memory), self.sentences)
        logits.index_fill_(2, self.vocabulary.never, NEVER)
        return logits, state, attention

    def steady(self) -> int:
        """For how many steps all sentences are `plain` and stay in this lane unless they end, and
        none of them becomes one that may end; 1 where it is not so."""
        fewest = sys.maxsize
        for one in self.sentences:
            if not one.plain or one.width != self.width:
                return 1
            made = len(one.live[0].tokens)
            fewest = min(fewest, (one.options.min_length if one.short else one.max_length) - made)
        return fewest

    def several(
        self,
        previous: Tensor,
        state: list[Tensor],
        memory: Any,
        steps: int,
        in_time: Callable[[], bool],
    ) -> tuple[list[Made], list[Tensor]]:
        """Up to `steps` steps, for as many as the lane is `steady`."""
        device, blind = previous.device, self.vocabulary.unseen > 0
        search = Search.of(self.sentences, self.vocabulary.eos, blind, device)
        best = functools.partial(self.best, memory, search, any_short(self.sentences, device))
        if blind:
            steps = min(steps, self.vocabulary.unseen)
        made, state = multistep(best, previous, state, search, steps, in_time)
        values, tokens = made.values.tolist(), made.tokens.tolist()
        parents = [None] * len(values) if made.parents is None else made.parents.tolist()
        attention = made.attention or [previous] * len(values)  # which nobody reads
        chosen = [listed(self.sentences, *one) for one in zip(values, parents, tokens)]
        return list(zip(chosen, attention)), state

    def best(
        self,
        memory: Any,
        search: Search,
        short: Tensor | None,
        previous: Tensor,
        state: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor], Tensor]:
        """See `multistep`; `short` sentences [N, 1, 1] must not end."""
        eos, count, scored = self.vocabulary.eos, search.count, search.scores is not None
        if self.fused:
            more = count if short is None else count + 1
            values, tokens, total, state, attention = self.model.best(
                previous, state, memory, min(more, self.vocabulary.size), scored
            )
            if short is not None:
                values, tokens = without(eos, short, values, tokens)
                values, tokens = values[:, :, :count], tokens[:, :, :count]
            return values, tokens, total if scored else None, state, attention
        logits, state, attention = self.logits(previous, state, memory)
        normaliser = normalisers(logits) if scored else None
        if short is not None:
            logits[:, :, eos].masked_fill_(short.squeeze(2), NEVER)
        values, tokens = top(logits, count)
        return values, tokens, normaliser, state, attention

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
