"""One step of `search.py` without a question to the host: all branches are computed for every
sentence, and one that has ended keeps its values.

It is the operator `seq2serve::advance`; on a GPU it is one kernel, see search.cu.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from handler.decoding.columns import Columns, Fact, Finished, mapped
from handler.decoding.constraints import NEVER
from handler.decoding.search import Offer, candidates, finished_of, going_on, of_parents
from handler.decoding.selection import without_taken


@dataclass
class Board:
    """Columns of places that sentences may have, with a clock for each place: BEGAN is 0.

    made: int64 [N], tokens. longest: int64 [N], the most there may be.
    over: bool [N], of sentences that have ended and of places that nobody has.
    """

    columns: Columns
    made: Tensor
    longest: Tensor
    over: Tensor

    def part(self, count: int) -> "Board":
        """Views of the first places."""
        board: Board = mapped(lambda table, _: table[:count], self, self)
        return board

    @classmethod
    def of(cls, tables: list[Tensor]) -> "Board":
        """Of `tables`, in their order."""
        facts, longest, made, over, previous, scores, parents, said = tables[:8]
        finished = None
        if len(tables) > 8:
            finished = Finished(tables[8], tables[9], tables[10], tables[11], said[:, :, :0])
        columns = Columns(facts, previous, scores, parents, said, [], finished, None, None)
        return cls(columns, made, longest, over)

    def tables(self) -> list[Tensor]:
        """In the order that `advance` takes them."""
        c = self.columns
        found = [
            c.facts, self.longest, self.made, self.over, c.previous, c.scores, c.parents, c.tokens,
        ]  # fmt: skip
        if c.finished is not None:
            f = c.finished
            found += [f.scores, f.sums, f.made, f.tokens]
        return found


SCHEMA = (
    "(Tensor values, Tensor tokens, Tensor normaliser, int eos, Tensor(a!)[] board) -> ()"
)


def advance(
    values: Tensor, tokens: Tensor, normaliser: Tensor, eos: int, board: list[Tensor]
) -> None:
    """One token for every sentence whose place is not `over`.

    Args:
        values: the greatest logits of each row [N*K, C], best first; tokens: int64 [N*K, C]; where
            C is 2 for K = 1 and 2K + 1 else, so that EOS can be left out where it must not come.
        normaliser: log sum exp of all logits, [N*K].
        board: `Board.tables`, which are written.
    """
    facts, longest, made, over, previous, scores, _parents, said = board[:8]
    n, k = previous.shape
    short = facts[:, int(Fact.MAY_END)] > made
    offer = Offer(*without_eos(values, tokens, short, eos, k), normaliser.view(n, k), values[:0])
    if k == 1:
        ended = one(offer, made, previous, scores, said, over, eos)
    else:
        ended = many(offer, board, eos)
    made.add_((~over).long())
    over.logical_or_(ended | (made >= longest))


def without_eos(
    values: Tensor, tokens: Tensor, short: Tensor, eos: int, k: int
) -> tuple[Tensor, Tensor]:
    """[N, K, C - 1]: without EOS in sentences that are `short`, else without the last."""
    values, tokens = (t.view(-1, k, t.size(1)) for t in (values, tokens))
    taken = (tokens == eos) & short.view(-1, 1, 1)
    return without_taken(taken, values, tokens)


def one(
    offer: Offer, made: Tensor, previous: Tensor, scores: Tensor, said: Tensor, over: Tensor,
    eos: int,
) -> Tensor:  # fmt: skip
    """Which sentences of one hypothesis have ended with the token that they took, bool [N]."""
    assert offer.normaliser is not None
    token, value = offer.tokens.squeeze(2), offer.values.squeeze(2)  # [N, 1]
    total = scores - offer.normaliser + value
    stays = over.unsqueeze(1)
    last = said.size(2) - 1
    said.scatter_(2, made.clamp(max=last).view(-1, 1, 1), token.unsqueeze(2))
    previous.copy_(torch.where(stays, previous, token))
    scores.copy_(torch.where(stays, scores, total))
    return ((token == eos) | ~total.isfinite()).squeeze(1)


def many(offer: Offer, board: list[Tensor], eos: int) -> Tensor:
    """Which beams have ended, bool [N]: none of their hypotheses can come among the best."""
    facts, _longest, made, over, previous, scores, parents, said, *rest = board
    finished = Finished(rest[0], rest[1], rest[2], rest[3], said[:, :, :0])
    columns = Columns(facts, previous, scores, parents, said, [], finished, None, None)
    k = previous.size(1)
    found = candidates(columns, offer, eos, full=False, stable=True)
    stays = over.unsqueeze(1)
    values = found.values[:, :k]
    ends = found.ends[:, :k] & (values > NEVER) & ~stays
    sums = values.masked_fill(~ends, NEVER).to(finished.sums.dtype)
    after, hopeless = finished_of(columns, sums, found.parents[:, :k], made)
    for table, new in zip(rest, vars(after).values()):
        table.copy_(new)
    facts[:, int(Fact.HOPELESS)].copy_(hopeless)
    totals, origin, token = going_on(found, k)
    origin = torch.where(stays, torch.arange(k, device=origin.device), origin)
    moved = of_parents(said, origin)
    place = made.clamp(max=said.size(2) - 1).view(-1, 1, 1).expand(-1, k, 1)
    kept = moved.gather(2, place)
    moved.scatter_(2, place, torch.where(stays.unsqueeze(2), kept, token.unsqueeze(2)))
    said.copy_(moved)
    previous.copy_(torch.where(stays, previous, token))
    scores.copy_(torch.where(stays, scores, totals))
    parents.copy_(origin)
    best = scores[:, 0]
    return ~((best > facts[:, int(Fact.HOPELESS)]) & (best < float("inf")))
