"""A sentence that is being decoded, and its hypotheses."""

import math
import random
from dataclasses import dataclass, field
from typing import Literal

from handler.decoding.options import DecodingOptions

Reason = Literal["eos", "length"]


@dataclass(frozen=True)
class Result:
    """One finished hypothesis: target ids without BOS and EOS, why it ended, the sum of its log
    probabilities (EOS included), and that sum over lp(L, a), by which results are compared."""

    tokens: list[int]
    finish_reason: Reason
    log_probability: float
    score: float


@dataclass(frozen=True)
class Event:
    """A sentence ended: with hypotheses, best first, or with an error that is its alone."""

    sentence: int
    results: list[Result]
    error: str | None = None


@dataclass(frozen=True)
class Hypothesis:
    """A live hypothesis: one row of state."""

    tokens: list[int]
    log_probability: float


@dataclass
class Sentence:
    """One admitted sentence, with K live hypotheses (one before its first step)."""

    id: int
    source: list[int]
    options: DecodingOptions
    max_length: int
    live: list[Hypothesis] = field(default_factory=lambda: [Hypothesis([], 0.0)])
    finished: list[Result] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.options.seed)

    @property
    def ended(self) -> bool:
        return not self.live

    def event(self) -> Event:
        return Event(self.id, [] if self.error else self.finished, self.error)

    def take(self, candidates: list[tuple[float, int, int]], eos: int) -> list[int]:
        """Go one token on.

        Args:
            candidates: (log probability of the whole, parent among `live`, token), best first; 2K
                of them, so that K remain however many are finished.

        Returns:
            The parent of each new live hypothesis; none when the sentence has ended.
        """
        if math.isnan(candidates[0][0]):
            self.live, self.error = [], "the model gave no finite probability"
            return []
        width = self.options.beam_size
        live: list[Hypothesis] = []
        parents: list[int] = []
        for rank, (log_probability, parent, token) in enumerate(candidates):
            if log_probability == float("-inf"):
                break
            tokens = self.live[parent].tokens
            if token == eos:
                if rank < width:  # an EOS that a beam of K would not have seen does not count
                    self.finish(tokens, log_probability, "eos")
            elif len(live) < width:
                live.append(Hypothesis([*tokens, token], log_probability))
                parents.append(parent)
        if not live and not self.finished:
            self.error = "the model gave no token that the options allow"
        if live and len(live[0].tokens) >= self.max_length:
            for one in live:
                self.finish(one.tokens, one.log_probability, "length")
            live = []
        self.live = live if live and not self.decided(live[0].log_probability) else []
        return parents if self.live else []

    def finish(self, tokens: list[int], log_probability: float, reason: Reason) -> None:
        length = len(tokens) + (reason == "eos")
        score = log_probability / self.options.length_normaliser(length)
        self.finished.append(Result(tokens, reason, log_probability, score))
        self.finished.sort(key=lambda result: -result.score)
        del self.finished[self.options.n_best :]

    def decided(self, best: float) -> bool:
        """Whether no live hypothesis can enter the n best.

        A log probability only falls, and lp only grows, so that the best that a hypothesis of log
        probability s <= 0 can reach is s / lp(max_length + 1): it is never surpassed.
        """
        if len(self.finished) < self.options.n_best:
            return False
        reachable = best / self.options.length_normaliser(self.max_length + 1)
        return self.finished[-1].score >= reachable
