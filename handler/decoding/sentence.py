"""What is decoded and what comes of it: the values that scheduler, runner and callers exchange."""

import math
import struct
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True, slots=True)
class Alignment:
    """The shares of attention that each target token pays to S source tokens, [T, S], in half
    precision: two bytes each, where lists of numbers take 32.

    shares: row by row, in the machine's order of bytes.
    """

    source: int
    shares: bytes

    def __len__(self) -> int:
        return len(self.shares) // (2 * self.source)

    def __getitem__(self, token: int) -> tuple[float, ...]:
        if not 0 <= token < len(self):
            raise IndexError(token)
        width = 2 * self.source
        return struct.unpack_from(f"{self.source}e", self.shares, token * width)

    def __iter__(self) -> Iterator[tuple[float, ...]]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, slots=True)
class Result:
    """One hypothesis that is answered: target ids without BOS and EOS, why it ended, the sum of
    its log probabilities (EOS included), its score (see `DecodingOptions`), and the attention of
    each target token. The last three are None where they decided nothing and were not asked
    for."""

    tokens: list[int]
    finish_reason: Reason
    log_probability: float | None
    score: float | None
    alignment: Alignment | None = None


@dataclass(frozen=True, slots=True)
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
    alignment = Alignment(len(sentence.source), b"") if options.return_alignments else None
    result = Result([], "time", 0.0 if known else None, score if known else None, alignment)
    return Event(sentence.id, [result])

