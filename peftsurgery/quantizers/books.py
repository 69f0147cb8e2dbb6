"""What the codes of a packed weight stand for: small tables, and rounding into them."""

from __future__ import annotations

import torch
from torch import Tensor

from peftsurgery.errors import UnsupportedError


class Codebook:
    """table (C,) fp32: the value of every code; NaN and infinity for codes that are never chosen.

    `levels` are the distinct finite values in ascending order; of several codes of one value (+0
    and -0) the first one is chosen.
    """

    def __init__(self, table: Tensor, dtype: torch.dtype = torch.uint8) -> None:
        self.table = table.float()
        self.dtype = dtype  # of the codes
        order = torch.argsort(self.table, stable=True)
        order = order[torch.isfinite(self.table[order])]
        values = self.table[order]
        first = torch.ones(len(values), dtype=torch.bool)
        first[1:] = values[1:] != values[:-1]
        self.levels = values[first]
        self.codes = order[first].to(dtype)  # code of every level
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    @property
    def low(self) -> float:
        """The least value."""
        return float(self.levels[0])

    @property
    def high(self) -> float:
        """The greatest value."""
        return float(self.levels[-1])

    def values(self, codes: Tensor) -> Tensor:
        """The value of every code, fp32."""
        flat = codes.reshape(-1)
        return self.table.index_select(0, flat.int()).reshape(codes.shape)

    def nearest(self, units: Tensor) -> Tensor:
        """The code of the nearest level; halfway between two, of the lower one."""
        return self.codes.index_select(
            0, torch.bucketize(units.contiguous(), self.middles, out_int32=True).reshape(-1)
        ).reshape(units.shape)

    def between(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(lower code, upper code, share): the neighbouring levels and how far from the lower one
        to the upper the value lies, 0 to 1; outside of all levels, the outermost pair.
        """
        units = units.contiguous()
        upper = torch.bucketize(units, self.levels, right=True).clamp_(1, len(self.levels) - 1)
        below, above = self.levels[upper - 1], self.levels[upper]
        share = ((units - below) / (above - below)).clamp_(0, 1)
        return self.codes[upper - 1], self.codes[upper], share


class Integers(Codebook):
    """Whole numbers low … high; code = value + offset."""

    def __init__(self, low: int, high: int, offset: int = 0) -> None:
        dtype = torch.int8 if low + offset < 0 else torch.uint8
        if low + offset < -128 or high + offset > (127 if dtype == torch.int8 else 255):
            raise UnsupportedError(f"codes {low + offset} to {high + offset} do not fit a byte.")
        super().__init__(torch.arange(low, high + 1).float(), dtype)
        self.offset = offset
        self.codes = (torch.arange(low, high + 1) + offset).to(dtype)

    def values(self, codes: Tensor) -> Tensor:
        return codes.float().sub_(self.offset) if self.offset else codes.float()

    def nearest(self, units: Tensor) -> Tensor:
        """Halfway between two, the even one, as torch.round does."""
        return units.round().clamp_(self.low, self.high).add_(self.offset).to(self.dtype)

    def between(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lower = units.floor().clamp_(self.low, self.high - 1)
        share = (units - lower).clamp_(0, 1)
        lower = lower.add_(self.offset)
        return lower.to(self.dtype), (lower + 1).to(self.dtype), share


class Float8(Codebook):
    """The 8-bit floats of torch (OCP Microscaling Formats 1.0, 2023; FNUZ: Noune et al. 2022,
    arXiv:2206.02915); the codes are the bytes.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        every = torch.arange(256, dtype=torch.uint8)
        super().__init__(every.view(dtype).float())
        self.float_dtype = dtype

    def values(self, codes: Tensor) -> Tensor:
        return codes.view(self.float_dtype).float()

    def nearest(self, units: Tensor) -> Tensor:
        """Halfway between two, the even one (IEEE 754); what is too large saturates."""
        held = units.clamp(self.low, self.high)
        return held.to(self.float_dtype).view(torch.uint8)
