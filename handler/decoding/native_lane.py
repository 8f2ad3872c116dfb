"""A lane whose tables the native operators write in place: the search of a step, and whole steps of
an int8 model, several in one call.

Rows are dense as in `Lane`, whose sentences it keeps account of in the same way; what is known of
them is a `Board`, as on a GPU, with room for more places than are taken.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from handler.decoding import columns as column_sizes
from handler.decoding.columns import Columns, fact_rows, mapped
from handler.decoding.kinds import Kind, Vocabulary
from handler.decoding.lane import Lane
from handler.decoding.reading import answers, committed
from handler.decoding.rows import Moves, Reserve, padded
from handler.decoding.sentence import Event, Sentence
from handler.decoding.static_lane import Sizes, board_of
from handler.decoding.static_search import Board

CPU = torch.device("cpu")
SPARE = 4  # times as large as need be, tables are made smaller
ops = torch.ops.seq2serve


class Network(NamedTuple):
    """What `seq2serve::decode` makes steps of: `QuantizedModel.parts`."""

    parts: list[Tensor]
    numbers: list[int]

    @classmethod
    def of(cls, model: Any) -> "Network | None":
        """None of a model whose steps are not all native, or that was exported before there were
        any: then it is asked for each step."""
        told = getattr(model, "parts", None)
        parts, numbers = ([], []) if told is None else told()
        return cls(parts, numbers) if parts else None


class NativeLane(Lane):
    """N sentences of K hypotheses each, plain ones that read no attention, of a `FusedModel` in
    single precision.

    Args:
        network: where steps are native as a whole.
    """

    board: Board
    tables: list[Tensor]  # of `board`

    def __init__(
        self, model: Any, vocabulary: Vocabulary, kind: Kind, empty: Any, network: Network | None
    ) -> None:
        super().__init__(model, vocabulary, kind, empty)
        self.network = network
        self.spare: list[Tensor] = []  # as `state`, for the next steps
        self.short_until = 0  # the clock from which on nobody has a minimum length to come to

    @property
    def columns(self) -> Columns:  # type: ignore[override]
        return self.board.columns

    def add(
        self, sentences: Sequence[Sentence], state: list[Tensor], attended: list[Tensor]
    ) -> None:
        width, count, many = self.kind.width, len(self.sentences), len(sentences)
        reused = min(many, len(self.vacant))
        total = count + many - reused
        places = [*self.vacant[:reused], *range(count, total)]
        longest = [one.max_length for one in sentences]
        board = self.board_for(total, max(longest)) if count else fresh(total, width, longest)
        tables = board.tables()
        reserve = self.attended if count else Reserve.like(attended)
        rows = self.state if count else [t[:0] for t in state]
        if total > count:
            rows = [padded(table, [total * width, *table.shape[1:]]) for table in rows]
        reserve = reserve.put(places, attended)
        facts = [fact for row in fact_rows(sentences, 0) for fact in row]
        ops.begin(tables, rows, places, facts, longest, self.vocabulary.bos, state)
        self.board, self.tables, self.attended, self.state = board, tables, reserve, rows
        self.short_until = max(
            [self.short_until, *[self.clock + one.options.min_length for one in sentences]]
        )
        self.seat(sentences, places)

    def board_for(self, places: int, longest: int) -> Board:
        """With room for so many places, and for so many tokens."""
        have, room = self.columns.tokens.size(0), self.columns.tokens.size(2)
        if places <= have and longest <= room:
            return self.board
        places = have if places <= have else max(places, 2 * len(self.sentences))
        room = max(room, longest)

        def larger(table: Tensor, _: Tensor) -> Tensor:
            shape = [places, *table.shape[1:]]
            return padded(table, [*shape[:2], room] if table.dim() == 3 else shape)

        return Board.of([larger(t, t) for t in self.tables])

    def close_up(self) -> None:
        self.vacant.sort()
        width = self.kind.width
        moves = Moves.without(self.vacant, len(self.sentences))
        board, state = self.board, [t[: moves.kept * width] for t in self.state]
        if moves.origin:
            ops.move(self.tables, moves.origin, moves.target, 1)
            ops.move(self.state, moves.origin, moves.target, width)
        attended = self.attended.close(moves)
        if SPARE * moves.kept < board.made.size(0):  # a crowd does not set the size for ever
            kept = 2 * moves.kept
            board = mapped(lambda table, _: table[:kept].clone(), board, board)
            state = [t.clone() for t in state]
        self.board, self.tables = board, board.tables()
        self.attended, self.state = attended, state
        self.reseat(moves)

    def refresh(self) -> None:
        count, columns = len(self.sentences), self.columns
        self.memory = self.empty._replace(attended=self.attended.live(max(self.sources)))
        self.previous, self.parents = columns.previous[:count], columns.parents[:count]
        if self.network is not None:
            self.spare = [torch.empty_like(t) for t in self.state]
        self.stale = False

    def go_on(self, steps: int, until: float) -> list[int]:
        if self.vacant:
            self.close_up()
        if self.stale:
            self.refresh()
        made, places = self.made_steps(steps, until)
        self.clock += made
        return [self.sentences[place].id for place in places]

    def made_steps(self, steps: int, until: float) -> tuple[int, list[int]]:
        """How many steps were made, and the places of who ended with the last."""
        eos, count, scored = self.vocabulary.eos, len(self.sentences), self.scored > 0
        if self.network is None:
            return 1, self.one_step(count, scored)
        made, places = ops.decode(
            self.tables, self.state, self.spare, self.memory.attended, *self.network, eos, count,
            scored, steps, until,
        )  # fmt: skip
        if made % 2:
            self.state, self.spare = self.spare, self.state
        return made, places

    def one_step(self, count: int, scored: bool) -> list[int]:
        """A step of a model that is asked for it."""
        state, width = self.state, self.kind.width
        if width > 1:
            state = ops.reorder(state, self.parents)
        choices = (2 * width if width > 1 else 1) + (self.clock < self.short_until)
        values, tokens, normaliser, self.state, _ = self.model.best(
            self.previous, state, self.memory, min(choices, self.vocabulary.size), scored
        )
        if not scored:
            normaliser = values[:0]
        places: list[int] = ops.search(
            values, tokens, normaliser, self.vocabulary.eos, self.tables, count
        )
        return places

    def answers(self, ids: Sequence[int], late: bool = False) -> list[Event]:
        places = [self.place[one] for one in ids]
        made = [self.clock - self.began[one] for one in ids]
        sentences = [self.sentences[place] for place in places]
        found = Board.of(ops.read(self.tables, places, max(made))).columns
        return answers(found, sentences, [*range(len(ids))], made, self.vocabulary.eos, late)

    def committed(self, sentence: int) -> list[int]:
        made = self.clock - self.began[sentence]
        found = Board.of(ops.read(self.tables, [self.place[sentence]], made)).columns
        return committed(found, 0, made)


def fresh(places: int, width: int, longest: list[int]) -> Board:
    """A board on which nobody is yet."""
    room = max(column_sizes.LEAST_ROOM, *longest)
    return board_of(Sizes(places, 0, room - 1), width, 0, torch.float, CPU)
