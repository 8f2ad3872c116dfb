"""A sentence that is being decoded, and its hypotheses."""

import itertools
import random
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from handler.decoding.options import DecodingOptions

Reason = Literal["eos", "length", "time"]
NEVER = float("-inf")
NO_TOKEN = "the options allow no token that the model gives"


@dataclass(frozen=True)
class Result:
    """One hypothesis that is answered: target ids without BOS and EOS, why it ended, the sum of
    its log probabilities (EOS included), its score (see `DecodingOptions`), and the attention of
    each target token, [T, S]. The last three are None where they decided nothing and were not
    asked for."""

    tokens: list[int]
    finish_reason: Reason
    log_probability: float | None
    score: float | None
    alignment: list[list[float]] | None = None


@dataclass(frozen=True)
class Event:
    """A sentence ended: with hypotheses, best first, or with an error that is its alone."""

    sentence: int
    results: list[Result]
    error: str | None = None


@dataclass(frozen=True)
class Hypothesis:
    """A live hypothesis: one row of state. Its log probability is NaN where it decides nothing."""

    tokens: list[int]
    log_probability: float


@dataclass
class Sentence:
    """One admitted sentence, with K live hypotheses (one before its first step).

    prefix: target tokens that come first, whatever their probability; one a step.
    deadline: on the engine's clock.
    """

    id: int
    source: list[int]
    options: DecodingOptions
    max_length: int
    prefix: list[int] = field(default_factory=list)
    deadline: float | None = None
    live: list[Hypothesis] = field(default_factory=lambda: [Hypothesis([], 0.0)])
    finished: list[Result] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.options.seed)
        # What the steps so far paid each source token, [K, steps, S]; only where it is read.
        self.attention = torch.zeros(1, 0, len(self.source))

    @property
    def scored(self) -> bool:
        """Whether log probabilities decide anything or were asked for."""
        return self.options.beam_size > 1 or self.options.return_scores

    @property
    def plain(self) -> bool:
        """Whether the greatest logits of each row decide everything, and never all of them."""
        o = self.options
        return not (
            self.prefix or o.sampling or o.no_repeat_ngram_size or o.repetition_penalty != 1.0
        )

    @property
    def short(self) -> bool:
        """Whether the options forbid it to end here."""
        return len(self.live[0].tokens) < self.options.min_length

    @property
    def ended(self) -> bool:
        return not self.live

    @property
    def width(self) -> int:
        """Hypotheses after the next step: 1 as long as the prefix lasts, then K."""
        return 1 if self.forced is not None else self.options.beam_size

    @property
    def forced(self) -> int | None:
        """The token of the prefix that is due."""
        done = len(self.live[0].tokens)
        return self.prefix[done] if done < len(self.prefix) else None

    def event(self) -> Event:
        return Event(self.id, [] if self.error else self.finished, self.error)

    def take(
        self, candidates: list[tuple[float, int, int]], eos: int, attention: Tensor
    ) -> list[int]:
        """Go one token on.

        Args:
            candidates: (log probability of the whole, parent among `live`, token), best first; 2K
                of them, so that K remain however many are finished. None: the model's logits are
                not finite.
            attention: of this step, [K, S]; read only where the options do. Rows behind those of
                the live hypotheses are of none.

        Returns:
            The parent of each new live hypothesis; none when the sentence has ended.
        """
        if not candidates:
            self.live, self.error = [], "the model gave no finite probability"
            return []
        if self.options.reads_attention:
            step = attention[: len(self.live), : len(self.source)].float().cpu()  # [K, S]
            self.attention = torch.cat([self.attention, step.unsqueeze(1)], 1)
        width = self.width
        live: list[Hypothesis] = []
        parents: list[int] = []
        for rank, (log_probability, parent, token) in enumerate(candidates):
            if log_probability == NEVER:
                break
            tokens = self.live[parent].tokens
            if token == eos:
                if rank < width:  # an EOS that a beam of K would not have seen does not count
                    self.finish(tokens, log_probability, "eos", parent)
            elif len(live) < width:
                live.append(Hypothesis([*tokens, token], log_probability))
                parents.append(parent)
        if not live and not self.finished:
            self.error = NO_TOKEN
        if self.options.reads_attention and parents:
            self.attention = self.attention[parents]
        self.live = live
        if live and len(live[0].tokens) >= self.max_length:
            self.end("length")
        elif live and live[0].log_probability <= self.hopeless:
            self.live = []
        return parents if self.live else []

    def end(self, reason: Reason) -> None:
        """Finish every live hypothesis.

        One whose time is over is no whole translation, and ranks behind those that are.
        """
        whole, self.finished = self.finished, [] if reason == "time" else self.finished
        for row, one in enumerate(self.live):
            self.finish(one.tokens, one.log_probability, reason, row)
        if reason == "time":
            self.finished = (whole + self.finished)[: self.options.n_best]
        self.live = []

    def finish(
        self, tokens: list[int], log_probability: float, reason: Reason, row: int
    ) -> None:
        options, known = self.options, self.scored
        score = log_probability / options.length_normaliser(len(tokens) + (reason == "eos"))
        if options.coverage_penalty:
            score += options.coverage_penalty * coverage(self.attention[row])
        alignment = None
        if options.return_alignments:
            alignment = self.attention[row, : len(tokens)].tolist()
        self.finished.append(
            Result(
                tokens, reason, log_probability if known else None, score if known else None,
                alignment,
            )
        )
        self.finished.sort(key=lambda one: 0.0 if one.score is None else -one.score)
        del self.finished[options.n_best :]

    @property
    def hopeless(self) -> float:
        """The log probability at and below which no live hypothesis can enter the n best; -inf
        where any can.

        A log probability only falls, lp only grows and cp is at most 0, so that the best that a
        hypothesis of log probability s <= 0 can reach is s / lp(max_length + 1).
        """
        if len(self.finished) < self.options.n_best or self.finished[-1].score is None:
            return NEVER
        return self.finished[-1].score * self.options.length_normaliser(self.max_length + 1)

    def committed(self) -> list[int]:
        """The longest beginning that whatever comes out best will have: what all live hypotheses
        and the best finished one share. It only grows."""
        candidates = [one.tokens for one in self.live]
        candidates += [one.tokens for one in self.finished[:1]]
        if not candidates:
            return []
        columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*candidates))
        return [column[0] for column in columns]


def coverage(attention: Tensor) -> float:
    """cp of the attention [T, S] of a whole hypothesis (arXiv 1609.08144, eq. 15); the last source
    token, EOS, need not be covered. At least -23 a token: nothing is attended to exactly 0."""
    return float(attention[:, :-1].sum(0).clamp(1e-10, 1.0).log().sum())
