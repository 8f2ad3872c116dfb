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
            table[self.target] = table[self.origin]
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
    if table.shape[1:] == rows.shape[1:]:
        if rows.numel():
            table[places] = rows
        return table
    shape = [max(a, b) for a, b in zip(table.shape[1:], rows.shape[1:])]
    table = padded(table, [table.size(0), *shape])
    table[places] = padded(rows, [rows.size(0), *shape])
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
    copy of the others. Zeros fill up S. A table is at most four times as large as it need be.

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
        count, length = max(self.count, places[-1] + 1), given[0].size(1)
        larger = [self.fitting(t, count, length) for t in self.tables]
        at: slice | list[int] = places
        if places[-1] - places[0] + 1 == len(places):
            at = slice(places[0], places[-1] + 1)
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
            # A sentence of unusual length does not set the size for ever, nor does a crowd.
            tables = [t[: 2 * moves.kept].clone() for t in tables]
        return Reserve(tables, moves.kept)

    def live(self, length: int) -> list[Tensor]:
        """Views [N, length, ...] of the live rows."""
        return [t[: self.count, :length] for t in self.tables]
