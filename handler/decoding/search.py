"""How a step's logits become hypotheses: greedy search and sampling, and beam search.

Both are functions of columns to columns, for all sentences of a lane at once.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from handler.decoding.columns import Attention, Columns, Fact, Finished
from handler.decoding.constraints import NEVER
from handler.decoding.rows import padded
from handler.decoding.sentence import LEAST_PAID


class Offer(NamedTuple):
    """What a step offers to N sentences of K hypotheses.

    values: logits [N, K, C], best first; tokens: int64 [N, K, C]. C is 1 where K is 1, else 2K.
    normaliser: [N, K], log sum exp of all logits; None where nothing is scored.
    paid: attention [N, K, S].
    """

    values: Tensor
    tokens: Tensor
    normaliser: Tensor | None
    paid: Tensor


class Candidates(NamedTuple):
    """The best 2K continuations of each sentence, best first, NaN before all, [N, 2K] each: log
    probabilities, places of their parents, tokens; and where the token is EOS."""

    values: Tensor
    parents: Tensor
    tokens: Tensor
    ends: Tensor


def single(columns: Columns, offer: Offer) -> tuple[Tensor, Tensor]:
    """One hypothesis a sentence goes on with the one token that is offered: scores and tokens,
    [N, 1] each."""
    # Contiguous, as native operators read them.
    values, tokens = offer.values.squeeze(2), offer.tokens.squeeze(2).contiguous()
    if offer.normaliser is not None:
        values = columns.scores - offer.normaliser + values
    return values, tokens


def candidates(
    columns: Columns, offer: Offer, eos: int, full: bool, stable: bool = False
) -> Candidates:
    """Of a beam: the best of each of its rows first, then the best of the sentence among those.

    Args:
        full: whether all K hypotheses of all sentences are there.
        stable: of equals the earlier hypothesis, then the earlier choice comes first; else any, and
            twice as fast.
    """
    width, choices = offer.values.shape[1:]
    assert offer.normaliser is not None
    offset = columns.scores - offer.normaliser
    if not full:  # what is not there stays so, whatever the model makes of its row
        offset = offset.masked_fill(columns.scores == NEVER, NEVER)
    values = offer.values + offset.unsqueeze(2)
    if stable:
        values, place = values.flatten(1).sort(dim=1, descending=True, stable=True)
        values, place = values[:, : 2 * width], place[:, : 2 * width]
    else:
        values, place = values.flatten(1).topk(2 * width, 1)
    tokens = offer.tokens.flatten(1).gather(1, place)
    parents = place.div(choices, rounding_mode="floor")
    return Candidates(values, parents, tokens, tokens == eos)


def going_on(found: Candidates, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K best that do not end: values, parents and tokens [N, K]. At most K of 2K end, so that K
    remain; an EOS of -inf fills up what is not there. A sentence whose best continuation is not
    finite has no second one."""
    ends = found.ends & (found.values > NEVER)
    _, others = ends.to(torch.uint8).sort(dim=1, stable=True)  # those, best first
    others = others[:, :width]
    values, parents, tokens = (t.gather(1, others) for t in found[:3])
    best = found.values[:, :1]
    first = torch.where(best < float("inf"), values[:, :1], best)
    return torch.cat([first, values[:, 1:]], 1), parents, tokens


def finishing(columns: Columns, found: Candidates, made: Tensor, width: int) -> Columns:
    """With the hypotheses that end now: those among the first K; an EOS that a beam of K would not
    have seen does not count. Only the K best finished ones of a sentence are kept.

    Args:
        columns: whose `tokens` are up to date.
        made: int64 [N], tokens that the hypotheses have.
    """
    values, parents, ends = found.values[:, :width], found.parents[:, :width], found.ends
    sums = values.masked_fill(~(ends[:, :width] & (values > NEVER)), NEVER)
    rows = (sums > NEVER).any(1).nonzero().squeeze(1)  # mostly a few sentences
    if rows.size(0) == 0:
        return columns
    some, finished = parts(columns, rows), columns.finished
    assert finished is not None
    after, hopeless = finished_of(some, sums[rows], parents[rows], made[rows])
    finished = Finished(
        *[
            old.index_copy(0, rows, new)
            for old, new in zip(vars(finished).values(), vars(after).values())
        ]
    )
    facts = columns.facts.clone()
    facts[rows, int(Fact.HOPELESS)] = hopeless
    return dataclasses.replace(columns, finished=finished, facts=facts)


def parts(columns: Columns, rows: Tensor) -> Columns:
    """The parts of some sentences that `finished_of` reads."""
    finished, attention = columns.finished, columns.attention
    assert finished is not None
    if attention is not None:
        attention = dataclasses.replace(
            attention, covered=attention.covered[rows], origins=attention.origins[rows]
        )
    return dataclasses.replace(
        columns, facts=columns.facts[rows], tokens=columns.tokens[rows],
        finished=Finished(*[table[rows] for table in vars(finished).values()]),
        attention=attention,
    )  # fmt: skip


def finished_of(
    columns: Columns, sums: Tensor, parents: Tensor, made: Tensor
) -> tuple[Finished, Tensor]:
    """What is finished after hypotheses of log probabilities `sums` [N, K], -inf where there is
    none, ended, which had said what their `parents` have; and what is hopeless then, [N]."""
    finished, attention = columns.finished, columns.attention
    assert finished is not None
    n, k = sums.shape
    scores = scored(columns.facts, sums, made + 1)
    origins = torch.cat([finished.origins, finished.origins], 1)
    if attention is not None:
        read = coverage(attention.covered, columns.fact(Fact.SOURCE)).gather(1, parents)
        scores = scores + columns.fact(Fact.COVERAGE).unsqueeze(1) * read
        origins = torch.cat([finished.origins, of_parents(attention.origins, parents)], 1)
    scores = torch.cat([finished.scores, scores], 1)  # [N, 2K], of equals the earlier first
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    scores, order = scores[:, :k], order[:, :k]
    tokens = torch.cat([finished.tokens, of_parents(columns.tokens, parents)], 1)
    lengths = torch.cat([finished.made, made.unsqueeze(1).expand(n, k)], 1)
    after = Finished(
        scores,
        torch.cat([finished.sums, sums], 1).gather(1, order),
        lengths.gather(1, order),
        of_parents(tokens, order),
        of_parents(origins, order),
    )
    last = columns.fact(Fact.N_BEST).long().unsqueeze(1) - 1
    worst = scores.gather(1, last).squeeze(1)  # of the n best
    # A log probability only falls, lp only grows and cp is at most 0, so that the best score that
    # a hypothesis of log probability s <= 0 can reach is s / lp(max_length + 1).
    return after, worst * columns.fact(Fact.MAX_NORMALISER)


def of_parents(table: Tensor, parents: Tensor) -> Tensor:
    """[N, K, T]: rows of [N, J, T] by places [N, K] of 0..J-1."""
    return table.gather(1, parents.unsqueeze(2).expand(-1, -1, table.size(2)))


class Said(NamedTuple):
    """What a step chose, [N, K] each: tokens, and the places of their parents where K is above 1.
    """

    tokens: Tensor
    parents: Tensor | None


def written(columns: Columns, log: list[Said], made: Tensor) -> Columns:
    """With the tokens of some steps, which follow the `made` [N] that were written."""
    tokens, origins = columns.tokens, None
    n, k, room = tokens.shape
    chosen, places = [log[-1].tokens], []
    if k > 1:
        # From the last step back: whose tokens led to the hypotheses that there are now.
        place = log[-1].parents
        assert place is not None
        places = [place]
        for one in reversed(log[:-1]):
            assert one.parents is not None
            chosen.append(one.tokens.gather(1, place))
            place = one.parents.gather(1, place)
            places.append(place)
        rows = (place + torch.arange(0, n * k, k, device=place.device).unsqueeze(1)).flatten()
        tokens = tokens.view(n * k, room).index_select(0, rows).view(n, k, room)
        if columns.attention is not None:
            origins = columns.attention.origins.view(n * k, room).index_select(0, rows)
            origins = origins.view(n, k, room)
    else:
        chosen += [one.tokens for one in reversed(log[:-1])]
    steps = torch.arange(len(log), device=made.device)
    at = (made.unsqueeze(1) + steps).unsqueeze(1).expand(n, k, len(log))
    tokens = tokens.scatter_(2, at, torch.stack(chosen[::-1], 2))
    columns = dataclasses.replace(columns, tokens=tokens)
    if origins is not None and columns.attention is not None:
        origins = origins.scatter_(2, at, torch.stack(places[::-1], 2))
        attention = dataclasses.replace(columns.attention, origins=origins)
        columns = dataclasses.replace(columns, attention=attention)
    return columns


def paying(attention: Attention, paid: Tensor, made: Tensor) -> Attention:
    """With the attention of a step [N, K, S], before its hypotheses are chosen."""
    paid, width = paid.to(attention.covered.dtype), attention.covered.size(2)
    if paid.size(2) < width:
        paid = padded(paid, [*paid.shape[:2], width])
    of_step = torch.arange(paid.size(0), device=paid.device), made
    attention.paid[of_step] = paid.to(attention.paid.dtype)
    return dataclasses.replace(attention, covered=attention.covered + paid)


def scored(facts: Tensor, sums: Tensor, length: Tensor) -> Tensor:
    """Scores without coverage of log probabilities [N, K], for lengths [N] with EOS; double."""
    base = (facts[:, int(Fact.SHIFT)] + length.clamp(min=1)) / facts[:, int(Fact.SCALE)]
    return sums.double() / (base ** facts[:, int(Fact.PENALTY)]).unsqueeze(1)


def coverage(covered: Tensor, source: Tensor) -> Tensor:
    """cp of what was paid [N, K, S] to sources of length [N] (arXiv 1609.08144, eq. 15); the last
    source token, EOS, need not be covered. At least -23 a token; double [N, K]."""
    place = torch.arange(covered.size(2), device=covered.device)
    counted = (place < (source - 1).unsqueeze(1)).unsqueeze(1)  # [N, 1, S]
    paid = covered.clamp(LEAST_PAID, 1.0).log().masked_fill(~counted, 0.0).double()
    return paid.cumsum(2)[:, :, -1:].sum(2)  # in one order, however long the longest source is
