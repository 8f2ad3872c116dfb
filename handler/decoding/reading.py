"""Reads what a lane has of sentences, for whoever asked: answers, and what is committed."""

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from handler.decoding.columns import Columns, Fact
from handler.decoding.constraints import NEVER
from handler.decoding.search import coverage
from handler.decoding.sentence import (
    NO_TOKEN,
    NOT_FINITE,
    Alignment,
    Event,
    Reason,
    Result,
    Sentence,
)


def answers(
    columns: Columns, sentences: Sequence[Sentence], places: list[int], made: list[int],
    eos: int, late: bool,
) -> list[Event]:  # fmt: skip
    """The events of sentences, whatever they have.

    Args:
        sentences, places, made: who is read, where in `columns`, and how many tokens it has.
        late: their time is over: a hypothesis that has not ended is no whole translation, and
            ranks behind those that are.
    """
    read = Read(columns, sentences, places, made, eos)
    return [read.event(i, late) for i in range(len(places))]


class Read:
    """The rows of M sentences, brought to the host."""

    def __init__(
        self, columns: Columns, sentences: Sequence[Sentence], places: list[int],
        made: list[int], eos: int,
    ) -> None:  # fmt: skip
        self.columns, self.sentences, self.places = columns, sentences, places
        self.made, self.eos = made, eos
        # These alone may be there already, in this order.
        everybody = places == [*range(columns.scores.size(0))]
        self.at = slice(None) if everybody else places
        self.sums: list[list[float]] = columns.scores[self.at].tolist()
        self.tokens: list[list[list[int]]] = columns.tokens[self.at, :, : max(made)].tolist()
        self.covered: list[list[float]] | None = None
        if columns.attention is not None and any(one.scored for one in sentences):
            self.covered = self.coverage()
        self.finished: list[list[Any]] | None = None
        if columns.finished is not None:
            of_all = list(vars(columns.finished).values())[:4]
            self.finished = [table[self.at].tolist() for table in of_all]

    def coverage(self) -> list[list[float]]:
        """What coverage adds to the scores of the live hypotheses."""
        columns, facts = self.columns, self.columns.facts[self.at]
        assert columns.attention is not None
        read = coverage(columns.attention.covered[self.at], facts[:, int(Fact.SOURCE)])
        added: list[list[float]] = (facts[:, int(Fact.COVERAGE)].unsqueeze(1) * read).tolist()
        return added

    def score(self, i: int, k: int) -> float:
        """Of live hypothesis k."""
        score = self.sums[i][k] / self.sentences[i].options.length_normaliser(self.made[i])
        return score if self.covered is None else score + self.covered[i][k]

    def event(self, i: int, late: bool) -> Event:
        sentence, best = self.sentences[i], self.sums[i][0]
        if math.isnan(best) or best == math.inf:
            return Event(sentence.id, [], NOT_FINITE)
        results = self.alone(i, late) if len(self.sums[i]) == 1 else self.ranked(i, late)
        if not results:
            return Event(sentence.id, [], NO_TOKEN)
        return Event(sentence.id, results[: sentence.options.n_best])

    def alone(self, i: int, late: bool) -> list[Result]:
        """The one hypothesis of a sentence."""
        made = self.made[i]
        if self.sums[i][0] == NEVER:
            return []
        if made and self.tokens[i][0][made - 1] == self.eos:
            return [self.live(i, 0, made - 1, "eos")]
        return [self.live(i, 0, made, "time" if late else "length")]

    def ranked(self, i: int, late: bool) -> list[Result]:
        """The hypotheses of a beam: those that ended, and where the others are answered, those."""
        ended = self.ended(i)
        if not late and self.made[i] < self.sentences[i].max_length:
            return ended
        live = [
            self.live(i, k, self.made[i], "time" if late else "length")
            for k, one in enumerate(self.sums[i])
            if one > NEVER
        ]
        if late:
            return ended + sorted(live, key=by_score)
        return sorted(ended + live, key=by_score)

    def live(self, i: int, k: int, length: int, reason: Reason) -> Result:
        """Hypothesis k, of which `length` tokens are told."""
        attention, place = self.columns.attention, self.places[i]
        origins = None if attention is None else attention.origins[place, k]
        tokens, total = self.tokens[i][k][:length], self.sums[i][k]
        return self.result(i, tokens, reason, total, self.score(i, k), origins)

    def ended(self, i: int) -> list[Result]:
        """The finished hypotheses that are among the best."""
        if self.finished is None or self.columns.finished is None:
            return []
        scores, sums, made, tokens = (table[i] for table in self.finished)
        origins = self.columns.finished.origins[self.places[i]]
        return [
            self.result(i, tokens[k][: made[k]], "eos", sums[k], scores[k], origins[k])
            for k in range(self.sentences[i].options.n_best)
            if scores[k] > NEVER
        ]

    def result(
        self, i: int, tokens: list[int], reason: Reason, total: float, score: float,
        origins: Tensor | None,
    ) -> Result:  # fmt: skip
        sentence, attention, alignment = self.sentences[i], self.columns.attention, None
        if sentence.options.return_alignments and attention is not None and origins is not None:
            steps = torch.arange(len(tokens), device=origins.device)
            length = len(sentence.source)
            paid = attention.paid[self.places[i], steps, origins[: len(tokens)], :length]
            alignment = Alignment(length, raw(paid))
        known = sentence.scored
        return Result(tokens, reason, total if known else None, score if known else None, alignment)


def raw(table: Tensor) -> bytes:
    """The numbers of a table, row by row."""
    table = table.cpu().contiguous()
    return ctypes.string_at(table.data_ptr(), table.nbytes)


def by_score(result: Result) -> float:
    return 0.0 if result.score is None else -result.score


def committed(columns: Columns, place: int, made: int) -> list[int]:
    """What all live hypotheses of a sentence that has `made` tokens, and its best finished one
    share."""
    live = [
        tokens
        for tokens, total in zip(
            columns.tokens[place, :, :made].tolist(), columns.scores[place].tolist()
        )
        if total > NEVER
    ]
    if columns.finished is not None and float(columns.finished.scores[place, 0]) > NEVER:
        done = int(columns.finished.made[place, 0])
        live.append(columns.finished.tokens[place, 0, :done].tolist())
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*live))
    return [column[0] for column in shared]
