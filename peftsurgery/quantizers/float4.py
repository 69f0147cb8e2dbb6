"""What the formats of scaled 4-bit floats share: E2M1 codes, two to the byte, in groups of inputs.

E2M1 is ±{0, ½, 1, 1½, 2, 3, 4, 6}: OCP Microscaling Formats 1.0, 2023.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from peftsurgery.errors import UnsupportedError
from peftsurgery.quantizers import bits
from peftsurgery.quantizers.books import Codebook
from peftsurgery.quantizers.float8 import KEPT
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Format, Packed

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]
ROWS = 64  # worked on at a time, so that they stay in the cache


class Float4(Codebook):
    """E2M1; the fourth bit of a code is the sign."""

    def __init__(self) -> None:
        super().__init__(torch.tensor(MAGNITUDES + tuple(-level for level in MAGNITUDES)))
        self.of_half = torch.zeros(int(2 * LARGEST) + 1, dtype=torch.uint8)  # 2 · magnitude -> code
        for code, level in enumerate(MAGNITUDES):
            self.of_half[int(2 * level)] = code

    def rounded(self, magnitudes: Tensor) -> Tensor:
        """The nearest level of values that are not negative; halfway between two, that of the even
        code (IEEE 754). Steps are ½ below 2, 1 below 4 and 2 above.
        """
        halves = (magnitudes + magnitudes).round_().mul_(0.5)
        twos = magnitudes.mul(0.5).round_().mul_(2.0).clamp_(max=LARGEST)
        found = torch.where(magnitudes < 4, magnitudes.round(), twos)
        return torch.where(magnitudes < 2, halves, found)

    def nearest(self, units: Tensor) -> Tensor:
        """As `rounded`; what is negative keeps its sign when it becomes 0."""
        doubled = self.rounded(units.abs()).mul_(2).int()
        found = self.of_half.index_select(0, doubled.reshape(-1)).reshape(units.shape)
        return found | ((units < 0).to(torch.uint8) << 3)


BOOK = Float4()


class ScaledFloat4(Format, abc.ABC):
    """Parts `weight`, bytes (…, columns / 2), the rows of the matrix in front, and `scale`."""

    group: ClassVar[int]  # columns that share a scale
    high_first: ClassVar[bool] = False  # whether the even column is in the high half of the byte

    @abc.abstractmethod
    def _scales(self, packed: Packed, start: int, stop: int) -> Tensor:
        """The scales of rows start:stop, fp32 (rows, groups)."""

    def _grid(self, scales: Tensor) -> Grid:
        return Grid(BOOK, scales, group=self.group)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        pairs = packed.part_rows("weight", start, stop).view(torch.uint8)
        codes = bits.high_first(pairs) if self.high_first else bits.low_first(pairs)
        return self._grid(self._scales(packed, start, stop)), codes

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        outline = packed.outlines["weight"]
        pairs = bits.pack_high_first(codes) if self.high_first else bits.pack_low_first(codes)
        if outline.dtype == "I8":
            pairs = pairs.view(torch.int8)
        return {"weight": pairs.reshape(outline.shape)}

    def largest(self, matrix: Tensor) -> Tensor:
        """The largest magnitude of every group, (rows, groups)."""
        return matrix.reshape(len(matrix), -1, self.group).abs().amax(2)

    def error(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """The squared error of every group under some scales, rounded to the nearest values."""
        found = torch.empty_like(scales)
        for start in range(0, len(matrix), ROWS):
            unit = scales[start : start + ROWS, :, None]
            part = matrix[start : start + ROWS].reshape(len(unit), -1, self.group).abs()
            level = BOOK.rounded(part / torch.where(unit == 0, torch.inf, unit))
            found[start : start + ROWS] = level.mul_(unit).sub_(part).square_().sum(2)
        return found


def kept_parts(packed: Packed) -> dict[str, Tensor]:
    """The parts that come back as they were."""
    return {role: packed.whole(role) for role in packed.parts if role.startswith(KEPT)}


def layer_of(title: str, name: str, shape: tuple[int, ...], group: int) -> str:
    """The layer whose `.weight` (outputs, inputs) is to be packed in groups of `group` inputs.
    UnsupportedError for another name or shape.
    """
    module = name.removesuffix(".weight")
    if len(shape) != 2 or shape[1] % group or module == name:
        raise UnsupportedError(
            f"{name!r}: {title}: expected the `.weight` of a layer, (outputs, inputs) "
            f"with a multiple of {group} inputs; this is {list(shape)}."
        )
    return module
