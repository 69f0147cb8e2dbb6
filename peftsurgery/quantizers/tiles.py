"""Scales that a whole tile of a matrix shares: the shapes in which files store them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.quantizers.grids import PIECE, Grid, magnitudes

USUAL = 128  # the height and width of tiles where neither a config nor the shapes tell them


@dataclass(frozen=True)
class Tiles:
    """`stack` matrices (rows, columns), one below the other, each cut into tiles of its own; the
    tiles at the right and lower edge may be smaller.

    What every tile has is a matrix (stack · down, across).
    """

    stack: int
    rows: int
    columns: int
    height: int
    width: int

    @property
    def down(self) -> int:
        """Tiles below each other in one matrix of the stack."""
        return -(-self.rows // self.height)

    @property
    def across(self) -> int:
        """Tiles beside each other."""
        return -(-self.columns // self.width)

    def place(self, start: int, stop: int) -> Tensor:
        """The row of tiles that each of the rows start:stop lies in."""
        row = torch.arange(start, stop)
        tile = torch.div(row % self.rows, self.height, rounding_mode="floor")
        return torch.div(row, self.rows, rounding_mode="floor") * self.down + tile

    def spread(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Values of the tiles for every row of start:stop; (rows or 1, across)."""
        if values.shape[0] == 1:
            return values
        if self.height == 1:
            return values[start:stop]
        return values.index_select(0, self.place(start, stop))

    def largest(self, matrix: Tensor) -> Tensor:
        """The largest magnitude in every tile."""
        lacking = -self.columns % self.width
        wide = torch.nn.functional.pad(matrix, (0, lacking)) if lacking else matrix
        by_row = magnitudes(wide, self.width)
        if self.height == 1:
            return by_row
        found = by_row.new_zeros(self.stack * self.down, self.across)
        place = self.place(0, matrix.shape[0])[:, None].expand(-1, self.across)
        return found.scatter_reduce_(0, place, by_row, "amax")

    def error(self, matrix: Tensor, grid: Grid, only: Tensor | None = None) -> Tensor:
        """The squared error of every tile when a matrix is rounded to the nearest values; 0 of
        those that `only` (a truth value for each) leaves out with their whole row of tiles.
        """
        place = self.place(0, len(matrix))
        rows = torch.arange(len(matrix))
        if only is not None:
            rows = only.any(1).index_select(0, place).nonzero()[:, 0]
        found = matrix.new_zeros(self.stack * self.down, self.across)
        for some in rows.split(max(1, PIECE // self.columns)):
            part, near = matrix.index_select(0, some), grid.picked(some)
            error = near.errors(part, part).square_()
            found.index_add_(0, place.index_select(0, some), near.grouped(error))
        return found


def tiled(
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    *,
    stacked: bool = False,
    block: tuple[int, int] | None = None,
) -> Tiles | None:
    """The tiles of a weight whose scales have a shape; None where the two do not go together.

    Weight (o, …): [] or [1], one scale; [o], [o, 1] and [o, 1, …], one for each row; for two
    dimensions also [a, b] and [o, b, 1]. A stack (E, o, i) has [E, a, b] or [E]. Tiles are as
    high and as wide as `block` says when that gives a and b, else o / a and i / b when these are
    whole numbers, else 128.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    if math.prod(scales) == 1:
        if stacked:
            rows, columns = shape[0] * shape[1], shape[2]
        return Tiles(1, rows, columns, rows, columns)
    if stacked:
        stack, rows, columns = shape
        if scales == (stack,):
            scales = (stack, 1, 1)
        if len(scales) != 3 or scales[0] != stack:
            return None
        counts = scales[1:]
    else:
        stack = 1
        if len(scales) == 3 and scales[2] == 1 and len(shape) == 2:
            scales = scales[:2]
        if scales == (rows,) or (scales[:1] == (rows,) and math.prod(scales) == rows):
            scales = (rows, 1)
        if len(scales) != 2 or (len(shape) != 2 and scales != (rows, 1)):
            return None
        counts = scales
    hints = block or (0, 0)
    height = _side(rows, counts[0], hints[0])
    width = _side(columns, counts[1], hints[1])
    if not height or not width:
        return None
    return Tiles(stack, rows, columns, height, width)


def _side(size: int, count: int, hint: int) -> int:
    """The length of the pieces when `size` is cut into `count`; 0 when that cannot be."""
    if count <= 0 or size <= 0:
        return 0
    if hint > 0 and -(-size // hint) == count:
        return hint
    if size % count == 0:
        return size // count
    return USUAL if -(-size // USUAL) == count else 0
