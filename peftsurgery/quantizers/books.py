"""What the codes of a packed weight stand for: small tables, and rounding into them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from peftsurgery.errors import UnsupportedError

BUCKETS = 1 << 11  # of a lookup; finer ones where thresholds lie closer
FINEST = 1 << 15
FINE = 1 << 13  # buckets of the quick lookup: as many as stay in the fastest cache
LITTLE = 2.0**-100  # in place of 0 where bits of a value hold something else: no denormal
NEAREST_PIXEL, BORDER = 1, 1  # of torch.grid_sampler: how to look up, and what lies outside


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


def wide(values: Tensor, out: Tensor | None = None) -> Tensor:
    """Values in fp32 memory of their own, or in `out`."""
    return (torch.empty(values.shape) if out is None else out).copy_(values)


class Codebook:
    """table (C,) fp32: the value of every code; NaN and infinity for codes that are never chosen.

    `levels` are the distinct finite values in ascending order; of several codes of one value (+0
    and -0) the first one is chosen.
    """

    unambiguous = False  # whether no two codes stand for one value
    per = 1.0  # `near` takes values times this

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
        self.per = 1 / max(-self.low, self.high, 1e-30)

    @cached_property
    def _nearest(self) -> Steps:
        return Steps(self.middles)

    @cached_property
    def _twins(self) -> list[list[int]]:
        """The codes of every finite value that has more than one."""
        same: dict[float, list[int]] = {}
        for code, value in enumerate(self.table.tolist()):
            same.setdefault(value + 0.0, []).append(code)  # -0.0 + 0.0 is 0.0
        return [codes for value, codes in same.items() if len(codes) > 1 and math.isfinite(value)]

    def alike(self, codes: Tensor, others: Tensor) -> Tensor:
        """Whether two codes stand for one value, of those values that have several codes."""
        found = torch.zeros(codes.shape, dtype=torch.bool)
        for some in self._twins:
            found |= _among(codes, some) & _among(others, some)
        return found

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

    def values(self, codes: Tensor, out: Tensor | None = None) -> Tensor:
        """The value of every code, fp32; out: contiguous memory for them."""
        flat = codes.reshape(-1).int()
        if out is None:
            return self.table.index_select(0, flat).reshape(codes.shape)
        torch.index_select(self.table, 0, flat, out=out.view(-1))
        return out

    @cached_property
    def _pairs(self) -> Tensor:
        """Two values, side by side, for every byte of two 4-bit codes."""
        byte = torch.arange(256)
        both = torch.stack((self.table[byte >> 4], self.table[byte & 15]), 1)
        return both.view(torch.int64)[:, 0]

    def values_of_pairs(self, pairs: Tensor, out: Tensor | None = None) -> Tensor:
        """`values` of two 4-bit codes of every byte, the high half first: (n,) -> (2n,)."""
        if out is None:
            out = torch.empty(2 * len(pairs))
        torch.index_select(self._pairs, 0, pairs.int(), out=out.view(-1).view(torch.int64))
        return out

    def nearest(self, units: Tensor) -> Tensor:
        """The code of the nearest level; halfway between two, of the lower one."""
        ranks = self._nearest.of(units)
        if self._ranked:
            return ranks.to(torch.uint8)
        return self.codes.index_select(0, ranks.reshape(-1).int()).reshape(units.shape)

    @cached_property
    def _fine(self) -> Tensor:
        """Of `FINE` even buckets over -m to m, m the largest magnitude, the value of the level
        nearest to the middle of each, with the code of that level in its lowest 8 bits.
        """
        middles = torch.linspace(-1, 1, FINE) / self.per
        codes = self.nearest(middles)
        values = self.table.index_select(0, codes.int())
        bits = torch.where(values == 0, LITTLE, values).view(torch.int32) & ~255
        return (bits | codes.view(torch.uint8).int()).view(torch.float32).view(1, 1, 1, FINE)

    def near(self, scaled: Tensor, codes: Tensor | None = None) -> Tensor:
        """Values, and into `codes` the codes, of units · `per`: of the nearest level, or of its
        neighbour where the value lies halfway to within 1/8192 of the range; the values to within
        2^-15 of themselves, since one look-up gives both. For roundings that see to their errors.

        The look-up is a sample, the nearest pixel, of a picture one pixel high: of all that torch
        has the only one that scales, cuts off, rounds and looks up in one pass over memory.
        """
        places = scaled.view(1, *scaled.shape, 1).expand(1, *scaled.shape, 2)
        found = torch.grid_sampler(self._fine, places, NEAREST_PIXEL, BORDER, True)[0, 0]
        if codes is not None:
            codes.copy_(found.view(torch.int32))  # of which the lowest eight bits fit
        return found

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


def _among(codes: Tensor, some: Sequence[int]) -> Tensor:
    """Whether every code is one of a few; several times as fast as `==` with a number."""
    held = (codes ^ some[0]).logical_not()
    for code in some[1:]:
        held |= (codes ^ code).logical_not()
    return held


class Integers(Codebook):
    """Whole numbers low … high; code = value + offset."""

    def __init__(self, low: int, high: int, offset: int = 0) -> None:
        dtype = torch.int8 if low + offset < 0 else torch.uint8
        if low + offset < -128 or high + offset > (127 if dtype == torch.int8 else 255):
            raise UnsupportedError(f"codes {low + offset} to {high + offset} do not fit a byte.")
        super().__init__(torch.arange(low, high + 1).float(), dtype)
        self.offset, self.per = offset, 1.0
        self.codes = (torch.arange(low, high + 1) + offset).to(dtype)

    def values(self, codes: Tensor, out: Tensor | None = None) -> Tensor:
        found = wide(codes, out)
        return found.sub_(self.offset) if self.offset else found

    def nearest(self, units: Tensor) -> Tensor:
        """Halfway between two, the even one, as torch.round does."""
        return units.round().clamp_(self.low, self.high).add_(self.offset).to(self.dtype)

    def near(self, scaled: Tensor, codes: Tensor | None = None) -> Tensor:
        found = scaled.round_().clamp_(self.low, self.high)
        if codes is not None:
            codes.copy_(found + self.offset if self.offset else found)
        return found

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
        self.float_dtype, self.per = dtype, 1.0
        above = self.levels[self.levels > 0]
        self.least_step = float(above[0])
        self.step_of_one = float(above[above > 1][0]) - 1  # 2^-m

    def values(self, codes: Tensor, out: Tensor | None = None) -> Tensor:
        """By the bits of float16: E5M2 has the first eight of them, and those of E4M3 are E4M3's
        behind one of the exponent more, which makes it 2^8 times too small; its NaN is none there.
        """
        if self.float_dtype == torch.float8_e5m2:
            bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(8)
            return wide(bits.view(torch.float16), out)
        other = self.float_dtype != torch.float8_e4m3fn or codes.numel() == 0
        if other or int((codes & 127).amax()) == 127:
            return super().values(codes, out)
        bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
        return wide(bits.bitwise_and_(~(1 << 14)).view(torch.float16), out).mul_(256)

    def nearest(self, units: Tensor) -> Tensor:
        """Halfway between two, the even one (IEEE 754); what is too large saturates."""
        held = units.clamp(self.low, self.high)
        return held.to(self.float_dtype).view(torch.uint8)

    def near(self, scaled: Tensor, codes: Tensor | None = None) -> Tensor:
        """As `nearest`, but for the sign of 0: the steps of fp32 numbers between 2^23 and 2^24
        steps s of this grid are s, so 1.5 · 2^23 of them are added and taken off.
        """
        found = scaled.clamp_(self.low, self.high)
        many = self._step(found).mul_(1.5 * (1 << 23))
        found.add_(many).sub_(many)
        if codes is not None:
            codes.copy_(found.to(self.float_dtype).view(torch.uint8))
        return found

    def _step(self, values: Tensor) -> Tensor:
        """The step of the grid from each value away from 0: with m bits of mantissa, 2^-m of the
        power of two of the value, and the least step there is around 0.
        """
        powers = values.view(torch.int32).bitwise_and(0xFF << 23).view(torch.float32)
        return powers.mul_(self.step_of_one).clamp_(min=self.least_step)

    def between(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without a search: whole steps are counted, downwards."""
        held = units.clamp(self.low, self.high)
        step = self._step(held)
        lower = torch.div(held, step).floor_().mul_(step).add_(0.0)  # some have no -0
        lower.clamp_(max=float(self.levels[-2]))
        upper = lower + step
        low, high = (v.to(self.float_dtype).view(torch.uint8) for v in (lower, upper))
        return low, high, held.sub_(lower).div_(step)
