"""What is decoded and what comes of it: the values that scheduler, runner and callers exchange."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from handler.decoding.options import DecodingOptions

LEAST_PAID = 1e-10  # attention of a source token counts as at least that, in coverage
Reason = Literal["eos", "length", "time"]
NO_TOKEN = "the options allow no token that the model gives"
NOT_FINITE = "the model gave no finite probability"


@dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence to decode.

    source: ids of the source tokens, EOS included.
    max_length: most target tokens, EOS not counted.
    prefix: ids that the translation begins with, whatever their probability.
    """

    id: int
    source: Sequence[int]
    options: DecodingOptions
    max_length: int
    prefix: Sequence[int] = ()

    @property
    def rows(self) -> int:
        """Hypotheses, each a row of the runner's tables."""
        return self.options.beam_size

    @property
    def scored(self) -> bool:
        """Whether log probabilities decide anything or were asked for."""
        return self.options.beam_size > 1 or self.options.return_scores


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


def failed(sentence: int, error: Exception) -> Event:
    return Event(sentence, [], f"decoding failed: {type(error).__name__}")


def unbegun(sentence: Sentence) -> Event:
    """Time was over before the first token: one hypothesis of no tokens."""
    options = sentence.options
    # Nothing was paid to any source token but EOS.
    score = options.coverage_penalty * math.log(LEAST_PAID) * (len(sentence.source) - 1)
    known = sentence.scored
    alignment: list[list[float]] | None = [] if options.return_alignments else None
    result = Result([], "time", 0.0 if known else None, score if known else None, alignment)
    return Event(sentence.id, [result])

