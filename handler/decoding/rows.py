"""A table of rows that stays dense while rows come and go."""

import torch
from torch import Tensor


class Rows:
    """Several tensors that share dimension 0, of which rows 0..count are live.

    A row that leaves is overwritten by the last one, so nothing else moves. Where `padded`,
    dimension 1 is a length that differs between rows; shorter rows are padded with zeros.
    """

    def __init__(self, padded: bool = False) -> None:
        self.padded = padded
        self.count = 0
        self.tensors: list[Tensor] = []

    def append(self, new: int, rows: list[Tensor]) -> None:
        """Add `new` rows at the end; each tensor [new, ...]."""
        if not self.tensors:
            self.tensors = [t.new_empty((0, *t.shape[1:])) for t in rows]
        for i, added in enumerate(rows):
            if not self.padded and self.tensors[i].size(0) == self.count:
                # A step has just made these: there is no room to keep for others.
                self.tensors[i] = torch.cat([self.tensors[i], added])
                continue
            table = self.fitting(self.tensors[i], self.count + new, added)
            place = table[self.count : self.count + new]
            if self.padded:
                place.zero_()
                place[:, : added.size(1)] = added
            else:
                place.copy_(added)
            self.tensors[i] = table
        self.count += new

    def fitting(self, table: Tensor, rows: int, added: Tensor) -> Tensor:
        """`table` itself, or a larger copy, with room for `rows` rows as long as `added`'s."""
        shape = list(table.shape)
        if rows > shape[0]:
            shape[0] = max(rows, 2 * self.count)
        if self.padded and added.size(1) > shape[1]:
            shape[1] = added.size(1)
        if shape == list(table.shape):
            return table
        larger = table.new_zeros(shape)
        live = table[: self.count]
        if self.padded:
            larger[: self.count, : live.size(1)] = live
        else:
            larger[: self.count] = live
        return larger

    def replace(self, tensors: list[Tensor]) -> None:
        """Put new values [count, ...] in the place of all live rows."""
        self.tensors = tensors

    def live(self, length: int | None = None) -> list[Tensor]:
        """Views of the live rows, cut to `length` in dimension 1 where given."""
        if length is None:
            return [t[: self.count] for t in self.tensors]
        return [t[: self.count, :length] for t in self.tensors]

    def remove(self, row: int) -> None:
        """Take one row out; the last one moves into its place."""
        last = self.count - 1
        if row != last:
            for t in self.tensors:
                t[row] = t[last]
        self.cut(last)

    def cut(self, count: int) -> None:
        """Keep the first `count` rows; a table is at most four times as large as it need be."""
        self.count = count
        if count == 0:
            self.tensors = []  # a sentence of unusual length does not set the size for ever
        elif self.padded and self.tensors and 4 * count < self.tensors[0].size(0):
            self.tensors = [t[: 2 * count].clone() for t in self.tensors]


