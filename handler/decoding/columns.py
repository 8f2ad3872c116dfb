"""What a lane knows of its sentences: one column each, row i of all of them sentence i's.

Python touches a sentence when it comes, when it is streamed and when it ends; at every step in
between only arrays are read and written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from handler.decoding.constraints import CONSTRAINTS, NEVER
from handler.decoding.rows import Moves, filled, joined, padded, put, sent
from handler.decoding.sampling import Draws
from handler.decoding.sentence import Sentence

LEAST_ROOM = 16  # target tokens


class Fact(IntEnum):
    """Columns of `Columns.facts`.

    The length normaliser is lp(L) = ((SHIFT + L) / SCALE) ^ PENALTY.
    """

    BEGAN = 0  # the lane's clock when the sentence came
    MAY_END = 1  # the clock from which on it may end
    N_BEST = 2  # hypotheses that are answered
    SOURCE = 3  # source tokens
    SHIFT = 4
    SCALE = 5
    PENALTY = 6
    COVERAGE = 7  # the coverage penalty
    MAX_NORMALISER = 8  # lp of the longest hypothesis
    HOPELESS = 9  # the log probability at and below which none can come among the best any more


@dataclass
class Columns:
    """N sentences of K hypotheses each.

    facts: double [N, F], a column for each `Fact`.
    previous: int64 [N, K], the last token. scores: [N, K], log probabilities, best first, and -inf
        where there is no hypothesis; the last logits where nobody asked for more.
    parents: int64 [N, K], in 0..K-1: the place that each hypothesis had before the last step,
        which its rows of state still have.
    tokens: int64 [N, K, T], but for those of the lane's last steps.
    asked: double [N, P] for each of `CONSTRAINTS`; 0 is nothing.
    finished: of hypotheses that ended, where K is above 1; attention: where any sentence reads it;
        draws: where tokens of any are drawn.
    """

    facts: Tensor
    previous: Tensor
    scores: Tensor
    parents: Tensor
    tokens: Tensor
    asked: list[Tensor]
    finished: "Finished | None"
    attention: "Attention | None"
    draws: Draws | None

    def fact(self, which: Fact) -> Tensor:
        """One of `facts`, [N]."""
        return self.facts[:, int(which)]


@dataclass
class Finished:
    """The best hypotheses that ended, at most K of a sentence, best first.

    scores: double [N, K], -inf where there is none. sums: [N, K], log probabilities.
    made: int64 [N, K], tokens without EOS. tokens: int64 [N, K, T].
    origins: int64 [N, K, T], see `Attention`; T is 0 where attention is not read.
    """

    scores: Tensor
    sums: Tensor
    made: Tensor
    tokens: Tensor
    origins: Tensor


@dataclass
class Attention:
    """What the steps paid the source tokens.

    paid: half [N, T, K, S], of step t by place k; where that is in a hypothesis, is in `origins`,
        int64 [N, K, T], so that nothing of the large table is ever moved from place to place. It is
        told and decides nothing, so half precision is enough.
    covered: float [N, K, S], the sum over the tokens of each hypothesis.
    """

    paid: Tensor
    origins: Tensor
    covered: Tensor


def new_columns(
    sentences: Sequence[Sentence], clock: int, width: int, dtype: torch.dtype,
    device: torch.device, *, bos: int, attends: bool, samples: bool,
) -> Columns:  # fmt: skip
    """Columns of sentences that have no token yet: one hypothesis, and places for the others."""
    n = len(sentences)
    none = torch.empty((n, width, 0), dtype=torch.long, device=device)
    finished = attention = None
    if width > 1:
        never = torch.full((n, width), NEVER, dtype=torch.double, device=device)
        made = torch.zeros((n, width), dtype=torch.long, device=device)
        finished = Finished(never, never.to(dtype, copy=True), made, none, none)
    if attends:
        attention = unpaid(none, max(len(s.source) for s in sentences))
    return Columns(
        facts=facts_of(sentences, clock, device),
        previous=torch.full((n, width), bos, device=device),
        scores=reset_scores(torch.empty((n, width), dtype=dtype, device=device), None),
        parents=torch.arange(width, device=device).repeat(n, 1),
        tokens=none,
        asked=asked_by(sentences, device),
        finished=finished,
        attention=attention,
        draws=Draws.of(sentences, device) if samples else None,
    )


def unpaid(origins: Tensor, source: int) -> Attention:
    """Before any step; `origins` [N, K, T], sources of so many tokens."""
    n, width, room = origins.shape
    paid = torch.zeros((n, room, width, source), dtype=torch.half, device=origins.device)
    return Attention(paid, origins, paid.new_zeros((n, width, source), dtype=torch.float))


def overwrite(
    columns: Columns, places: list[int], at: int | Tensor, sentences: Sequence[Sentence],
    clock: int, bos: int,
) -> Columns:  # fmt: skip
    """With sentences that have no token yet at `places`, whose memory is written; `at` names the
    same places."""
    device, width = columns.facts.device, columns.previous.size(1)
    columns.facts[at] = facts_of(sentences, clock, device)
    filled(columns.previous, at, bos)
    reset_scores(columns.scores, at)
    if columns.finished is not None:
        columns.parents[at] = torch.arange(width, device=device)
        filled(columns.finished.scores, at, NEVER)
    attention, draws = columns.attention, columns.draws
    if attention is not None:
        longest = max(len(s.source) for s in sentences)
        attention = wide_enough(attention, longest)
        filled(attention.covered, at, 0)
    if draws is not None:
        draws = mapped(lambda table, new: put(table, places, new), draws,
                       Draws.of(sentences, device))  # fmt: skip
    asked = [
        put(table, places, new) for table, new in zip(columns.asked, asked_by(sentences, device))
    ]
    return dataclasses.replace(columns, asked=asked, attention=attention, draws=draws)


def reset_scores(scores: Tensor, at: int | Tensor | None) -> Tensor:
    """`scores` [N, K], in rows `at` those of sentences that begin, None for all: the other
    hypotheses are not there yet."""
    if at is None:
        scores.zero_()[:, 1:].fill_(NEVER)
        return scores
    filled(scores, at, NEVER)
    filled(scores[:, 0], at, 0.0)
    return scores


def equipped(columns: Columns, attends: bool, samples: bool) -> Columns:
    """With tables for attention that is read, and for tokens that are drawn, where there are none
    yet; of the sentences that are there none asks for them."""
    n, device = len(columns.tokens), columns.facts.device
    if samples and columns.draws is None:
        columns = dataclasses.replace(columns, draws=Draws.none(n, device))
    if attends and columns.attention is None:
        attention = unpaid(torch.zeros_like(columns.tokens), 0)
        finished = columns.finished
        if finished is not None:
            finished = dataclasses.replace(finished, origins=torch.zeros_like(finished.tokens))
        columns = dataclasses.replace(columns, attention=attention, finished=finished)
    return columns


def stripped(columns: Columns, attends: bool, samples: bool) -> Columns:
    """Without such tables, where nobody asks for them any more."""
    if not samples:
        columns = dataclasses.replace(columns, draws=None)
    if not attends and columns.attention is not None:
        finished = columns.finished
        if finished is not None:
            finished = dataclasses.replace(finished, origins=finished.origins[:, :, :0])
        columns = dataclasses.replace(columns, attention=None, finished=finished)
    return columns


def wide_enough(attention: Attention, source: int) -> Attention:
    """With room for so many source tokens."""
    if source <= attention.covered.size(2):
        return attention
    return dataclasses.replace(
        attention,
        paid=padded(attention.paid, [*attention.paid.shape[:3], source]),
        covered=padded(attention.covered, [*attention.covered.shape[:2], source]),
    )


def score_type(state: list[Tensor]) -> torch.dtype:
    """Of log probabilities: the model's own, but no less than single precision."""
    return torch.double if state[0].dtype is torch.double else torch.float


def facts_of(sentences: Sequence[Sentence], clock: int, device: torch.device) -> Tensor:
    return sent(fact_rows(sentences, clock), device, torch.double)


def fact_rows(sentences: Sequence[Sentence], clock: int) -> list[list[float]]:
    """The `Fact`s of sentences that begin at a clock."""
    rows = []
    for s in sentences:
        o = s.options
        shift, scale = (5.0, 6.0) if o.length_penalty_form == "gnmt" else (0.0, 1.0)
        longest = o.length_normaliser(s.max_length + 1) if o.beam_size > 1 else 1.0
        rows.append([
            clock, clock + o.min_length, o.n_best, len(s.source), shift, scale, o.length_penalty,
            o.coverage_penalty, longest, NEVER,
        ])  # fmt: skip
    return rows


def asked_by(sentences: Sequence[Sentence], device: torch.device) -> list[Tensor]:
    return [ragged([way.asked(s) for s in sentences], device) for way in CONSTRAINTS]


def ragged(rows: list[list[float]], device: torch.device) -> Tensor:
    """double [N, P], rows filled up with 0."""
    longest = max(map(len, rows))
    if not longest:
        return torch.empty((len(rows), 0), dtype=torch.double, device=device)
    rows = [[*row, *[0.0] * (longest - len(row))] for row in rows]
    return sent(rows, device, torch.double)


def appended(columns: Columns, added: Columns) -> Columns:
    """The rows of both, as new tensors; neither is changed."""
    return mapped(joined, columns, added)


def compacted(columns: Columns, moves: Moves) -> Columns:
    """What is left after the moves; the memory of `columns` is written."""
    return mapped(lambda table, _: moves.close(table), columns, columns)


def fitted(columns: Columns, steps: int) -> Columns:
    """With room for so many target tokens, and not for many more."""
    room = columns.tokens.size(2)
    if steps <= room <= 4 * max(steps, LEAST_ROOM):
        return columns
    room = max(2 * steps, LEAST_ROOM)

    def fit(table: Tensor, dim: int) -> Tensor:
        table = table.narrow(dim, 0, min(room, table.size(dim)))
        return padded(table, [*table.shape[:dim], room, *table.shape[dim + 1 :]]).contiguous()

    attention, finished = columns.attention, columns.finished
    if finished is not None:
        origins = finished.origins if attention is None else fit(finished.origins, 2)
        finished = dataclasses.replace(finished, tokens=fit(finished.tokens, 2), origins=origins)
    if attention is not None:
        attention = dataclasses.replace(
            attention, paid=fit(attention.paid, 1), origins=fit(attention.origins, 2)
        )
    return dataclasses.replace(
        columns, tokens=fit(columns.tokens, 2), finished=finished, attention=attention
    )


def mapped(change: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Any:
    """`change` of every pair of tables of two Columns, whose tables correspond."""
    if first is None:
        return None
    if isinstance(first, Tensor):
        return change(first, second)
    if isinstance(first, list):
        return [mapped(change, a, b) for a, b in zip(first, second, strict=True)]
    return type(first)(
        *[mapped(change, a, b) for a, b in zip(vars(first).values(), vars(second).values())]
    )
