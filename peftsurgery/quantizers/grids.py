"""The values a packed weight can take, given its scales; rounding means to choose among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from peftsurgery.quantizers.books import Codebook


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

    def _beside(self, weight: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Weights (rows, n), the columns from `start` on, and what is constant over their groups,
        in shapes that go together: whole groups side by side, else the values spread.
        """
        stop = start + weight.shape[1]
        whole = self.group > 1 and start % self.group == 0 and stop % self.group == 0
        if whole and self.order is None and values.shape[1] > 1 and stop > start:
            cut = values[:, start // self.group : stop // self.group, None]
            return weight.view(len(weight), cut.shape[1], self.group), cut
        return weight, self.spread(values, start, stop)

    def values(self, codes: Tensor, start: int = 0) -> Tensor:
        """fp32 weights of codes (rows, n), the columns from `start` on."""
        return self.placed(self.book.values(codes), start)

    def placed(self, found: Tensor, start: int = 0) -> Tensor:
        """Values of the book (rows, n), overwritten by those of the weight."""
        if self.zero is not None:
            part, zero = self._beside(found, self.zero, start)
            part -= zero
        part, scale = self._beside(found, self.scale, start)
        part *= scale
        if self.factor != 1:
            found *= self.factor
        if self.shift is not None:
            part, shift = self._beside(found, self.shift, start)
            part += shift
        return found

    def units(self, weight: Tensor, start: int = 0) -> Tensor:
        """(w - shift) / scale + zero of weights (rows, n); 0 + zero where the scale is 0."""
        return self._units(weight, start, torch.empty_like(weight))

    def _units(self, weight: Tensor, start: int, out: Tensor) -> Tensor:
        """`units`, written to `out`, which may be the weight."""
        if self.shift is not None:
            part, shift = self._beside(weight, self.shift, start)
            torch.sub(part, shift, out=part if out is weight else out.view(part.shape))
            weight = out
        part, divisor = self._beside(weight, self._divisor, start)
        torch.div(part, divisor, out=part if out is weight else out.view(part.shape))
        if self.zero is not None:
            part, zero = self._beside(out, self.zero, start)
            part += zero
        return out

    @cached_property
    def _divisor(self) -> Tensor:
        """What is divided by: factor · scale, infinity where the scale is 0."""
        scale = self.scale * self.factor if self.factor != 1 else self.scale
        return torch.where(scale == 0, torch.inf, scale)

    def near(self, weight: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Codes and their values, of the nearest as `Codebook.near` knows them; the weight is
        overwritten.
        """
        codes, found = self.book.near(self._units(weight, start, weight))
        return codes, self.placed(found, start)

    def nearest(self, weight: Tensor, start: int = 0) -> Tensor:
        """Codes of the nearest values."""
        return self.book.nearest(self.units(weight, start))

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
    wide = weight.reshape(rows, -1, group)
    return wide.amin(2), wide.amax(2)  # several times as fast as aminmax


# (weight, grid, codes it had) -> codes
Rounding = Callable[[Tensor, Grid, "Tensor | None"], Tensor]


def nearest(weight: Tensor, grid: Grid, previous: Tensor | None = None) -> Tensor:
    """The nearest code of every weight; where the code it had stands for the same value, that
    one, so that what did not change keeps its bytes.
    """
    found = grid.nearest(weight)
    if previous is None or (grid.book.unambiguous and bool((grid.scale != 0).all())):
        return found
    return keep_equal(found, previous, grid)


def keep_equal(found: Tensor, previous: Tensor, grid: Grid) -> Tensor:
    """Codes with those of `previous` where both stand for the same value (±0, a scale of 0)."""
    same = grid.book.values(found) == grid.book.values(previous)
    if not bool(grid.scale.all()):
        same |= grid.spread(grid.scale == 0, 0, found.shape[1])
    return torch.where(same, previous, found)
