"""The values a packed weight can take, given its scales; rounding means to choose among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from peftsurgery.quantizers.books import Codebook

PIECE = 1 << 18  # weights that are worked on together: what is made of them stays in the cache


def pieces(rows: int, columns: int, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """Rows [start, stop), about `size` weights at a time."""
    step = max(1, size // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@dataclass(frozen=True)
class Grid:
    """w[r, c] = factor · scale · (book[code] - zero) + shift, the last three constant over a group.

    scale, zero and shift: fp32 (rows or 1, groups). Column c lies in group c // group, or in
    `order[c]` where that is given (GPTQ's act-order); group 0 is the whole row.
    """

    book: Codebook
    scale: Tensor
    zero: Tensor | None = None
    shift: Tensor | None = None
    group: int = 0
    order: Tensor | None = None
    factor: float = 1.0  # on all values, multiplied last: it decides the rounding of the product

    def spread(self, values: Tensor, start: int, stop: int) -> Tensor:
        """A per-group tensor over columns start:stop; (rows or 1, stop - start) or (rows, 1)."""
        if values.shape[1] == 1:
            return values
        if self.order is not None:
            return values.index_select(1, self.order[start:stop])
        if self.group <= 1:
            return values[:, start:stop]
        first, last = start // self.group, -(-stop // self.group)
        if last == first + 1:
            return values[:, first:last]
        wide = values[:, first:last].repeat_interleave(self.group, 1)
        return wide[:, start - first * self.group : stop - first * self.group]

    def _beside(
        self, weight: Tensor, values: Tensor, start: int, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Weights (rows, n), the rows from `first` and the columns from `start` on, and what is
        constant over their groups, in shapes that go together: whole groups side by side, else the
        values spread.
        """
        stop, rows = start + weight.shape[1], weight.shape[0]
        if values.shape[0] > rows:
            values = values[first : first + rows]
        whole = self.group > 1 and start % self.group == 0 and stop % self.group == 0
        if whole and self.order is None and values.shape[1] > 1 and stop > start:
            cut = values[:, start // self.group : stop // self.group, None]
            return weight.view(rows, cut.shape[1], self.group), cut
        return weight, self.spread(values, start, stop)

    def values(self, codes: Tensor, start: int = 0, out: Tensor | None = None) -> Tensor:
        """fp32 weights of codes (rows, n), the columns from `start` on; out: contiguous memory."""
        return self.placed(self.book.values(codes, out), start)

    def placed(self, found: Tensor, start: int = 0, first: int = 0) -> Tensor:
        """Values of the book (rows, n), overwritten by those of the weight; rows from `first` on
        where there are more.
        """
        if self.zero is not None:
            part, zero = self._beside(found, self.zero, start, first)
            part -= zero
        part, scale = self._beside(found, self.scale, start, first)
        part *= scale
        if self.factor != 1:
            found *= self.factor
        if self.shift is not None:
            part, shift = self._beside(found, self.shift, start, first)
            part += shift
        return found

    def units(self, weight: Tensor, start: int = 0) -> Tensor:
        """(w - shift) / scale + zero of weights (rows, n); 0 + zero where the scale is 0."""
        found = torch.empty(weight.shape)
        if self.shift is not None:
            part, shift = self._beside(weight, self.shift, start)
            weight = torch.sub(part, shift, out=found.view(part.shape)).view(weight.shape)
        part, divisor = self._beside(weight, self._divisor, start)
        torch.div(part, divisor, out=found.view(part.shape))
        if self.zero is not None:
            part, zero = self._beside(found, self.zero, start)
            part += zero
        return found

    @cached_property
    def _divisor(self) -> Tensor:
        """What is divided by: factor · scale, infinity where the scale is 0."""
        scale = self.scale * self.factor if self.factor != 1 else self.scale
        return torch.where(scale == 0, torch.inf, scale)

    @cached_property
    def _multiplier(self) -> Tensor:
        """What `errors` multiplies by instead: the book's `per` over that."""
        return self.book.per / self._divisor

    def errors(
        self,
        given: Tensor,
        moved: Tensor,
        codes: Tensor | None = None,
        start: int = 0,
        first: int = 0,
    ) -> Tensor:
        """given - q of weights (rows, n), the rows from `first` and the columns from `start` on: q
        the values nearest to `moved` as `Codebook.near` knows them, whose codes go to `codes`.
        """
        if self.shift is not None:
            part, shift = self._beside(moved, self.shift, start, first)
            moved = torch.sub(part, shift).view(moved.shape)
        part, factor = self._beside(moved, self._multiplier, start, first)
        scaled = torch.mul(part, factor).view(moved.shape)
        if self.zero is not None:
            part, zero = self._beside(scaled, self.zero, start, first)
            part.add_(zero, alpha=self.book.per)
        found = self.book.near(scaled, codes)
        return torch.sub(given, self.placed(found, start, first), out=found)

    def nearest(self, weight: Tensor, start: int = 0) -> Tensor:
        """Codes of the nearest values."""
        if weight.numel() <= PIECE:
            return self.book.nearest(self.units(weight, start))
        codes = torch.empty(weight.shape, dtype=self.book.dtype)
        for first, last in pieces(*weight.shape):
            codes[first:last] = self.rows(first, last).nearest(weight[first:last], start)
        return codes

    def outside(self, weight: Tensor) -> float:
        """The share of weights (rows, columns) beyond the outermost values by more than half of
        the outermost step.
        """
        units = self.units(weight)
        low, high = self.book.reach
        return float(((units < low) | (units > high)).float().mean())

    def rows(self, start: int, stop: int) -> Grid:
        """The grid of some of the rows."""
        return self._cut(slice(start, stop))

    def every(self, step: int) -> Grid:
        """The grid of one in `step` rows."""
        return self._cut(slice(None, None, step))

    def picked(self, rows: Tensor) -> Grid:
        """The grid of rows with some indices."""
        return self._cut(rows)

    def _cut(self, rows: slice | Tensor) -> Grid:
        def cut(values: Tensor | None) -> Tensor | None:
            return values if values is None or values.shape[0] == 1 else values[rows]

        scale = cut(self.scale)
        assert scale is not None
        return replace(self, scale=scale, zero=cut(self.zero), shift=cut(self.shift))

    def grouped(self, per_weight: Tensor) -> Tensor:
        """Sums over the groups, (rows, groups), of something known for every weight."""
        rows, columns = per_weight.shape
        count = self.scale.shape[1]
        if self.order is not None:
            return per_weight.new_zeros(rows, count).index_add_(1, self.order, per_weight)
        if count == 1:
            return per_weight.sum(1, keepdim=True)
        if self.group <= 1:
            return per_weight
        lacking = -columns % self.group
        if lacking:
            per_weight = torch.nn.functional.pad(per_weight, (0, lacking))
        return per_weight.reshape(rows, count, self.group).sum(2)


def extremes(
    weight: Tensor, group: int, order: Tensor | None = None, count: int = 0
) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of every group, (rows, groups), of weights (rows, columns);
    groups as in Grid, `count` of them where their `order` is given. 0 for a group of no column.
    """
    rows, columns = weight.shape
    if order is not None:
        index = order.long().expand(rows, -1)
        empty = weight.new_zeros(rows, count)
        return (
            empty.scatter_reduce(1, index, weight, "amin", include_self=False),
            empty.scatter_reduce(1, index, weight, "amax", include_self=False),
        )
    group = group or columns
    lacking = -columns % group
    if lacking:  # the last value once more changes neither
        weight = torch.cat((weight, weight[:, -1:].expand(rows, lacking)), 1)
    found = weight.new_empty(2, rows, weight.shape[1] // group)
    for start, stop in pieces(*weight.shape):
        wide = weight[start:stop].reshape(stop - start, -1, group)
        torch.amin(wide, 2, out=found[0, start:stop])  # several times as fast as aminmax
        torch.amax(wide, 2, out=found[1, start:stop])
    return found[0], found[1]


def magnitudes(weight: Tensor, group: int) -> Tensor:
    """The largest magnitude of every group, (rows, groups), without a copy as abs makes."""
    least, greatest = extremes(weight, group)
    return torch.maximum(least.neg_(), greatest)


# (weight, grid, codes it had) -> codes
Rounding = Callable[[Tensor, Grid, "Tensor | None"], Tensor]


def nearest(weight: Tensor, grid: Grid, previous: Tensor | None = None) -> Tensor:
    """The nearest code of every weight; where the code it had stands for the same value, that
    one, so that what did not change keeps its bytes.
    """
    found = grid.nearest(weight)
    if previous is None or (grid.book.unambiguous and bool((grid.scale != 0).all())):
        return found
    for start, stop in pieces(*weight.shape):
        rows = slice(start, stop)
        found[rows] = keep_equal(found[rows], previous[rows], grid.rows(start, stop))
    return found


def keep_equal(found: Tensor, previous: Tensor, grid: Grid) -> Tensor:
    """Codes with those of `previous` where both stand for the same value (±0, a scale of 0)."""
    found = _taken(found, previous, grid.book.alike(found, previous))
    if not bool(grid.scale.all()):
        found = torch.where(grid.spread(grid.scale == 0, 0, found.shape[1]), previous, found)
    return found


def _taken(codes: Tensor, others: Tensor, where: Tensor) -> Tensor:
    """`others` where that is 1, else the codes; several times as fast as torch.where."""
    return (others - codes).mul_(where).add_(codes)
