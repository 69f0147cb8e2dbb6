"""What the codes of a packed weight stand for: small tables, and rounding into them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from peftsurgery.errors import UnsupportedError

BUCKETS = 1 << 11  # of a lookup; finer ones where thresholds lie closer
FINEST = 1 << 15
FINE = 1 << 13  # buckets of the quick lookup: as many as stay in the fastest cache
WHOLE = float(1 << 23)  # added to less than itself, it leaves a whole number in the lowest bits


class Steps:
    """How many of some ascending thresholds lie below a value (`inclusive`: or at it).

    A value's bucket, an even division of their range, tells all but one of them: no bucket holds
    two, and values and thresholds are put into buckets by the same monotone arithmetic, so the
    answer is exact. Several times as fast as a binary search, which is taken where thresholds lie
    too close.
    """

    def __init__(self, thresholds: Tensor, *, inclusive: bool = False) -> None:
        self.thresholds, self.inclusive = thresholds, inclusive
        self.count = 0
        if len(thresholds) < 2:
            return
        self.start = float(thresholds[0])
        buckets = BUCKETS
        while buckets <= FINEST:
            self.count = buckets
            self.per = (buckets - 1) / (float(thresholds[-1]) - self.start)
            places = self._buckets(thresholds)
            if len(places.unique()) == len(places):
                self.below = torch.bucketize(torch.arange(buckets), places.long()).to(torch.uint8)
                self.edges = torch.full((buckets,), torch.inf)
                self.edges[places.long()] = thresholds
                return
            buckets *= 4
        self.count = 0

    def _buckets(self, values: Tensor) -> Tensor:
        places = (values - self.start).mul_(self.per)
        return places.clamp_(0, self.count - 1).to(torch.int32)

    def of(self, values: Tensor) -> Tensor:
        """The number of thresholds below every value, (…) int32 or uint8."""
        if not self.count:
            return torch.bucketize(
                values.contiguous(), self.thresholds, out_int32=True, right=self.inclusive
            )
        flat = values.reshape(-1)
        places = self._buckets(flat)
        edges = self.edges.index_select(0, places)
        above = flat >= edges if self.inclusive else flat > edges
        return self.below.index_select(0, places).add_(above).reshape(values.shape)


class Codebook:
    """table (C,) fp32: the value of every code; NaN and infinity for codes that are never chosen.

    `levels` are the distinct finite values in ascending order; of several codes of one value (+0
    and -0) the first one is chosen.
    """

    unambiguous = False  # whether no two codes stand for one value

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
        self.unambiguous = len(self.levels) == len(values)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2
        self._ranked = self.dtype == torch.uint8 and bool(
            (self.codes == torch.arange(len(self.codes))).all()
        )

    @cached_property
    def _nearest(self) -> Steps:
        return Steps(self.middles)

    @cached_property
    def _reached(self) -> Steps:
        return Steps(self.levels, inclusive=True)

    @property
    def low(self) -> float:
        """The least value."""
        return float(self.levels[0])

    @property
    def high(self) -> float:
        """The greatest value."""
        return float(self.levels[-1])

    @property
    def reach(self) -> tuple[float, float]:
        """The range in which rounding cuts nothing off: half of the outermost step beyond them."""
        levels = self.levels
        low, high = levels[1] - levels[0], levels[-1] - levels[-2]
        return float(levels[0] - low / 2), float(levels[-1] + high / 2)

    def values(self, codes: Tensor) -> Tensor:
        """The value of every code, fp32."""
        flat = codes.reshape(-1)
        return self.table.index_select(0, flat.int()).reshape(codes.shape)

    @cached_property
    def _pairs(self) -> Tensor:
        """Two values, side by side, for every byte of two 4-bit codes."""
        byte = torch.arange(256)
        both = torch.stack((self.table[byte >> 4], self.table[byte & 15]), 1)
        return both.view(torch.int64)[:, 0]

    def values_of_pairs(self, pairs: Tensor) -> Tensor:
        """`values` of two 4-bit codes of every byte, the high half first: (n,) -> (2n,)."""
        return self._pairs.index_select(0, pairs.int()).view(torch.float32)

    def nearest(self, units: Tensor) -> Tensor:
        """The code of the nearest level; halfway between two, of the lower one."""
        ranks = self._nearest.of(units)
        if self._ranked:
            return ranks.to(torch.uint8)
        return self.codes.index_select(0, ranks.reshape(-1).int()).reshape(units.shape)

    @cached_property
    def _fine(self) -> tuple[float, int, Tensor, Tensor]:
        """(buckets per unit, bucket of 0, code, value) of `FINE` even buckets over the levels."""
        per = (FINE - 2) / max(self.high - self.low, 1e-30)
        zero = round(-self.low * per)
        codes = self.nearest((torch.arange(FINE) - zero) / per)
        return per, zero, codes, self.values(codes)

    def near(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, values): of the nearest level, or of its neighbour where the value lies halfway
        to within 1/8192 of the range; half the cost of `nearest` and `values`. For roundings that
        see to their errors. `units` is overwritten.
        """
        per, zero, codes, values = self._fine
        places = units.mul_(per).add_(WHOLE + zero).clamp_(WHOLE, WHOLE + FINE - 1)
        flat = places.view(torch.int32).bitwise_and_(FINE - 1).reshape(-1)
        chosen, found = codes.index_select(0, flat), values.index_select(0, flat)
        return chosen.reshape(units.shape), found.reshape(units.shape)

    def between(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(lower code, upper code, share): the neighbouring levels and how far from the lower one
        to the upper the value lies, 0 to 1; outside of all levels, the outermost pair.
        """
        upper = self._reached.of(units).reshape(-1).int().clamp_(1, len(self.levels) - 1)
        lower = upper - 1
        below, above, low, high = (
            table.index_select(0, places).reshape(units.shape)
            for table in (self.levels, self.codes)
            for places in (lower, upper)
        )
        share = (units - below).div_(above.sub_(below)).clamp_(0, 1)
        return low, high, share


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

    def near(self, units: Tensor) -> tuple[Tensor, Tensor]:
        found = units.round_().clamp_(self.low, self.high)
        return (found + self.offset).to(self.dtype), found

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

    def nearest(self, units: Tensor) -> Tensor:
        """Halfway between two, the even one (IEEE 754); what is too large saturates."""
        held = units.clamp(self.low, self.high)
        return held.to(self.float_dtype).view(torch.uint8)

    def near(self, units: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.nearest(units)
        return codes, self.values(codes)
