"""Two checkpoints of one model side by side: every tensor of TUNED with its counterpart in BASE.

Tensors meet under their home names, so the two may differ in vocabulary, sharding, fused
projections, number type and in how they store experts or a tied head. Nothing is read before it is
asked for, and then row tile by row tile.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.codec import BaseWeights
from peftsurgery.codec.bases import Stored
from peftsurgery.codec.experts import HALVES
from peftsurgery.linalg.krylov import whole
from peftsurgery.operations.apply import plain_dtype

TILE = 1 << 18  # elements of a row tile: it stays in the cache until it has been multiplied
LEAST_ROWS = 64  # of a tile, up to four times that size: thinner products are slow
STACK = re.compile(r"(?P<experts>.+\.experts)\.(?P<leaf>gate_up_proj|down_proj)")
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Difference:
    """TUNED - BASE of one home tensor, in fp32, as row tiles. `linalg.randomized.RowTiles`."""

    name: str  # home tensor, `component:path.parameter`
    tuned: Stored
    base: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        return self.base.shape

    @property
    def grown(self) -> bool:
        """Whether the two are of different shapes, so that there is no difference to speak of."""
        one, other = self.tuned.shape, self.base.shape
        return _sizes(one) != _sizes(other) or one[:1] != other[:1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, everything behind them)."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Number type of TUNED's tensor; of a packed weight, and of 8-bit floats, the one it is
        computed in.
        """
        kind = FLOATS[plain_dtype(self.tuned.tensor)]
        return torch.bfloat16 if kind.itemsize == 1 else kind

    def tiles(self, into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, TUNED - BASE of some rows (rows, columns) in fp32); see `RowTiles.tiles`.

        All tiles of one reading take the same memory: fresh pages cost more than the arithmetic.
        """
        room: list[Tensor] = []
        for start, tuned, base in self._pairs():
            room = room or [torch.empty(tuned.shape) for _ in range(2)]
            one, other = (r[: tuned.shape[0]] for r in room)
            if into is not None:
                one = into[start : start + tuned.shape[0]]
            if torch.float64 in (tuned.dtype, base.dtype):
                yield start, one.copy_(tuned.double() - base.double())
                continue
            one.copy_(tuned)
            if base.dtype != torch.float32:  # one cast at a time is ten times faster than in sub_
                base = other.copy_(base)
            yield start, one.sub_(base)

    def same(self) -> bool:
        """Whether nothing was tuned: equal values, NaN at the same places included, or, where BASE
        has the wider number type, BASE rounded to that of TUNED."""
        kinds = FLOATS[self.tuned.tensor.dtype], FLOATS[self.base.tensor.dtype]
        wide = torch.finfo(kinds[1]).bits > torch.finfo(kinds[0]).bits
        for _, tuned, base in self._pairs():
            other = base.to(kinds[0]).to(tuned.dtype) if wide else base
            if not (_alike(tuned[:1], other[:1]) and _alike(tuned, other)):  # a row tells of most
                return False
        return True

    def nonfinite(self) -> tuple[int, int]:
        """How many values of (TUNED, BASE) are NaN or Inf."""
        found = [0, 0]
        for _, *sides in self._pairs():
            for index, side in enumerate(sides):
                found[index] += int((~torch.isfinite(side)).sum())
        return found[0], found[1]

    def dense(self) -> Tensor:
        """All of TUNED - BASE, fp32, in the base's shape."""
        return whole(self).reshape(self.shape)

    def _pairs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        rows, columns = self.matrix_shape
        columns = max(columns, 1)
        step = max(1, TILE // columns, min(LEAST_ROWS, 4 * TILE // columns))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield (
                start,
                _wide(home_rows(self.tuned, start, stop)),
                _wide(home_rows(self.base, start, stop)),
            )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal values, and NaN at the same places."""
    if torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


@dataclass(frozen=True)
class Stack:
    """Differences of parts that a layout stores as one weight, on top of each other; a part that
    does not differ, or that only one side has, is zero rows."""

    parts: tuple[Difference | int, ...]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows of all parts, columns)."""
        columns = next(p.matrix_shape[1] for p in self.parts if isinstance(p, Difference))
        return sum(self.heights), columns

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows of each part."""
        return tuple(p if isinstance(p, int) else p.matrix_shape[0] for p in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        first = next(p for p in self.parts if isinstance(p, Difference))
        return (sum(self.heights), *first.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Number type of TUNED, that of the first part."""
        return next(p for p in self.parts if isinstance(p, Difference)).dtype

    def tiles(self, into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """See `Difference.tiles`."""
        row, columns = 0, self.matrix_shape[1]
        for part, height in zip(self.parts, self.heights, strict=True):
            room = None if into is None else into[row : row + height]
            if isinstance(part, int):
                yield row, torch.zeros(part, columns) if room is None else room.zero_()
            else:
                for start, tile in part.tiles(room):
                    yield row + start, tile
            row += height

    def dense(self) -> Tensor:
        """All of it, fp32."""
        return whole(self).reshape(self.shape)


def _wide(rows: Tensor) -> Tensor:
    """8-bit floats as fp32: torch compares none of them."""
    return rows.float() if rows.dtype.itemsize == 1 else rows


def home_rows(stored: Stored, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a home tensor as a matrix, in its stored number type."""
    operator = stored.site.operator
    if not stored.shape:
        return stored.tensor.torch().reshape(1, 1)
    if operator == "transpose":
        return stored.tensor.torch().T[start:stop].reshape(stop - start, -1)
    first = stored.rows[0]
    rows = stored.tensor.flattened(stored.lead)
    if operator != "swap_halves":
        return rows.rows(first + start, first + stop).torch().reshape(stop - start, -1)
    count = stored.shape[0]
    half = count // 2
    turn = count - half  # home rows below it are the lower half of the file
    pieces = [
        rows.rows(low + shift, high + shift)
        for low, high, shift in (
            (start, min(stop, turn), half),
            (max(start, turn), stop, half - count),
        )
        if low < high
    ]
    return torch.cat([p.torch().reshape(p.shape[0], -1) for p in pieces])


def _sizes(shape: Sequence[int]) -> list[int]:
    """Dimensions but for ones: a 1x1 convolution is a linear layer."""
    return [n for n in shape if n != 1]


def paired(tuned: BaseWeights, base: BaseWeights) -> Iterator[tuple[str, Stored, Stored | None]]:
    """(home tensor, TUNED's, BASE's or None) of every home tensor of TUNED; stacked experts one by
    one."""
    for name, stored in tuned.stored.items():
        singles = _experts(name, stored)
        for home in singles or (name,):
            module, _, parameter = home.rpartition(".")
            mine = tuned.find(module, parameter) if singles else stored
            if mine is not None:
                yield home, mine, base.find(module, parameter)


def _experts(name: str, stored: Stored) -> list[str]:
    """The single experts of a stack (E, rows, columns), by the names they have on their own."""
    match = STACK.fullmatch(name)
    if match is None or len(stored.tensor.shape) != 3:
        return []
    leaves = HALVES if match["leaf"] == "gate_up_proj" else ("down_proj",)
    count = stored.tensor.shape[0]
    return [f"{match['experts']}.{e}.{leaf}.weight" for e in range(count) for leaf in leaves]
