"""Several steps of a lane without a look in between: multi-step scheduling.

While no hypothesis ends, a look decides nothing: each sentence goes on with its best tokens that
are not EOS, which tensors can tell one another. What Python does around a step takes a third of
the time of a step of few rows, and on a GPU a look waits for the device. So some steps are made in
a row, each fed with what the one before chose, and sentences are told afterwards, step by step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from handler.decoding.selection import best_of, considered, log_probabilities, raised
from handler.decoding.sentence import NEVER, Sentence

Best = Callable[
    [Tensor, list[Tensor]], tuple[Tensor, Tensor, Tensor | None, list[Tensor], Tensor]
]


class Scores(NamedTuple):
    """Log probabilities of the live hypotheses [N, K], and which sentences they are known of: see
    `selection.log_probabilities`."""

    so_far: Tensor
    known: Tensor | None


@dataclass(frozen=True)
class Search:
    """What N sentences of K hypotheses each are looking for in several steps.

    count: candidates of each sentence, 2K; 1 where K is 1.
    scores: before the first step, where anything is scored.
    hopeless: `Sentence.hopeless` of each [N]; None where it is -inf for all.
    attended: whether any of them reads the attention.
    blind: what was chosen is not looked at until all steps are made.
    """

    eos: int
    count: int
    scores: Scores | None
    hopeless: Tensor | None
    attended: bool
    blind: bool

    @classmethod
    def of(
        cls, sentences: list[Sentence], eos: int, blind: bool, device: torch.device
    ) -> "Search":
        scored = any(one.scored for one in sentences)
        limits = [one.hopeless for one in sentences]
        return cls(
            eos,
            considered(sentences[0]),
            Scores(*log_probabilities(sentences, device)) if scored else None,
            torch.tensor(limits, device=device) if max(limits) > NEVER else None,
            any(one.options.reads_attention for one in sentences),
            blind,
        )

    def over(self, values: Tensor, ends: Tensor) -> bool:
        """Whether a sentence ends, from the log probabilities of the hypotheses that would go on
        [N, K], and whether the best candidates [N, K] are EOS. Where it says so too early a step
        is made alone; what is true is decided by the sentences."""
        if self.blind:
            return False
        hopeless = self.hopeless is not None and bool((values[:, 0] <= self.hopeless).any())
        return hopeless or bool(ends.any())


class Choices(NamedTuple):
    """The candidates of T steps, [T, N, count] each, as of `best_of`; and where it is kept their
    attention [N, K, S]."""

    values: Tensor
    parents: Tensor | None
    tokens: Tensor
    attention: list[Tensor]


def multistep(
    best: Best,
    previous: Tensor,
    state: list[Tensor],
    search: Search,
    steps: int,
    in_time: Callable[[], bool],
) -> tuple[Choices, list[Tensor]]:
    """Up to `steps` steps; fewer where a sentence ends or time does.

    Args:
        best: from the previous tokens and the state: the greatest logits of each row [N, K, C],
            best first, their tokens, the normalisers [N, K] where anything is scored, the next
            state, and the attention [N, K, S]. What it returns lasts until its next call.
        previous: [N, K]; state: [N*K, ...].

    Returns:
        What each step chose, and the state after the last [N*K, ...], its rows not yet in the
        order of the hypotheses that they led to.
    """
    n, k = previous.shape
    first = torch.arange(0, n * k, k, device=previous.device).unsqueeze(1)  # row of each sentence
    scores = search.scores
    chosen: list[tuple[Tensor, Tensor | None, Tensor]] = []
    attended: list[Tensor] = []
    while True:
        values, tokens, normaliser, state, attention = best(previous, state)
        offsets = None
        if scores is not None and normaliser is not None:
            offsets = raised(scores.so_far, normaliser, scores.known)
        values, parents, tokens = best_of(values, tokens, offsets, search.count)
        if k == 1:  # may be what `best` returned
            values, tokens = values.clone(), tokens.clone()
        chosen.append((values, parents, tokens))
        if search.attended:
            attended.append(attention.clone())
        if len(chosen) == steps:
            break
        ends = tokens == search.eos
        if parents is not None and (search.blind or bool(ends.any())):
            _, going = ends.sort(dim=1, stable=True)  # the others, best first
            values, tokens, parents = (t.gather(1, going) for t in (values, tokens, parents))
        previous, values = tokens[:, :k], values[:, :k]
        if search.over(values, ends[:, :k]) or not in_time():
            break
        if scores is not None:
            scores = Scores(values, scores.known)
        if parents is not None:
            origin = (first + parents[:, :k]).flatten()
            state = [t.index_select(0, origin) for t in state]
    values_, parents_, tokens_ = zip(*chosen)
    whole = None if parents_[0] is None else torch.stack(parents_)
    return Choices(torch.stack(values_), whole, torch.stack(tokens_), attended), state
