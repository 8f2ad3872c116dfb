"""Tables of rows that stay dense while rows come and go.

Row i of every table of a lane belongs to its sentence i. Who comes takes the place of one who has
left, or goes behind the last; places that stay empty are closed up by the last rows, so that little
moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def sent(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """A tensor of Python's numbers on a device, which is not waited for."""
    made = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return made
    return made.pin_memory().to(device, non_blocking=True)


def filled(table: Tensor, at: int | Tensor, value: float) -> None:
    """Write one number into rows `at`, int64 [M]; a device is not waited for, as it is where a
    number is assigned to rows by their indices."""
    if isinstance(at, int):
        table[at].fill_(value)
    else:
        table.index_fill_(0, at, value)


class Moves(NamedTuple):
    """How rows close up: row origin[i] takes the place target[i], and `kept` are left."""

    kept: int
    origin: list[int]
    target: list[int]

    @classmethod
    def without(cls, empty: list[int], count: int) -> "Moves":
        """So that the places `empty`, of `count`, are gone."""
        kept, gone = count - len(empty), set(empty)
        origin = [row for row in range(kept, count) if row not in gone]
        return cls(kept, origin, [row for row in empty if row < kept])

    def close(self, table: Tensor) -> Tensor:
        """`table` [count, ...] after the moves; its memory is written."""
        if self.origin:
            target, origin = (sent(each, table.device) for each in (self.target, self.origin))
            table.index_copy_(0, target, table.index_select(0, origin))
        return table[: self.kept]


def joined(table: Tensor, added: Tensor) -> Tensor:
    """Rows of both, [n + m, ...]; where a further dimension of one is shorter, zeros fill it up."""
    if table.shape[1:] != added.shape[1:]:
        shape = [max(a, b) for a, b in zip(table.shape[1:], added.shape[1:])]
        table, added = (padded(t, [t.size(0), *shape]) for t in (table, added))
    return torch.cat([table, added])


def put(table: Tensor, places: list[int], rows: Tensor) -> Tensor:
    """`table` with `rows` at `places`; its memory is written, and so are zeros where a further
    dimension of the rows is shorter."""
    if table.shape[1:] != rows.shape[1:]:
        shape = [max(a, b) for a, b in zip(table.shape[1:], rows.shape[1:])]
        table, rows = (padded(t, [t.size(0), *shape]) for t in (table, rows))
    if rows.numel():
        table.index_copy_(0, sent(places, table.device), rows)
    return table


def padded(table: Tensor, shape: list[int]) -> Tensor:
    """`table`, filled up to `shape` with zeros."""
    if list(table.shape) == shape:
        return table
    larger = table.new_zeros(shape)
    larger[tuple(slice(size) for size in table.shape)] = table
    return larger


@dataclass(frozen=True)
class Reserve:
    """Large tables [N, S, ...] that share N and S, with room to grow, so that who comes costs no
    copy of the others. Zeros fill up S, which is that of the longest source until the lane is
    empty. A table has room for at most four times as many rows as it need have.

    count: rows that are used.
    """

    tables: list[Tensor]
    count: int = 0

    @classmethod
    def like(cls, given: list[Tensor]) -> "Reserve":
        return cls([t.new_empty([0, 0, *t.shape[2:]]) for t in given])

    def put(self, places: list[int], given: list[Tensor]) -> "Reserve":
        """With rows [m, S, ...] at `places`, which nobody has or which are behind the last. The
        one before is as good as it was."""
        if not given:
            return self
        count, length = max(self.count, max(places) + 1), given[0].size(1)
        larger = [self.fitting(t, count, length) for t in self.tables]
        at: slice | Tensor
        if places == list(range(places[0], places[0] + len(places))):
            at = slice(places[0], places[0] + len(places))
        else:
            at = sent(places, given[0].device)
        for table, rows in zip(larger, given):
            if table.size(1) == length:
                table[at] = rows
            else:
                table[at, :length] = rows
                table[at, length:] = 0
        return Reserve(larger, count)

    def fitting(self, table: Tensor, rows: int, length: int) -> Tensor:
        """`table`, or a larger copy with room for so many rows of that length."""
        if rows <= table.size(0) and length <= table.size(1):
            return table
        capacity = table.size(0) if rows <= table.size(0) else max(rows, 2 * self.count)
        live = table[: self.count]
        return padded(live, [capacity, max(length, table.size(1)), *table.shape[2:]])

    def close(self, moves: Moves) -> "Reserve":
        """With the rows that are left; the memory of this one is written."""
        for table in self.tables:
            moves.close(table[: self.count])
        tables = self.tables
        if tables and 4 * moves.kept < tables[0].size(0):
            # A crowd does not set the size for ever.
            tables = [t[: 2 * moves.kept].clone() for t in tables]
        return Reserve(tables, moves.kept)

    def live(self, length: int) -> list[Tensor]:
        """Views [N, length, ...] of the live rows."""
        return [t[: self.count, :length] for t in self.tables]
