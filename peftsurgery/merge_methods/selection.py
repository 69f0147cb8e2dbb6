"""Exact order statistics of magnitudes that are only ever seen tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def largest(read: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> list[float]:
    """The k-th largest value for every k of `ranks` (1 is the largest), exactly.

    read: gives the tiles, fp32 >= 0 and finite, as often as asked. Bit patterns of such numbers are
    ordered as the numbers: one reading counts their upper 16 bits, a second one the lower 16 bits
    of those that share the upper bits of an answer.
    """
    counts = torch.zeros(1 << 15, dtype=torch.int64)
    for tile in read():
        counts += torch.bincount(_bits(tile) >> 16, minlength=1 << 15)
    found = [_from_top(counts, rank) for rank in ranks]
    fine = {bucket: torch.zeros(1 << 16, dtype=torch.int64) for bucket, _ in found}
    for tile in read():
        bits = _bits(tile)
        for bucket, lower in fine.items():
            within = bits[(bits >> 16) == bucket] & 0xFFFF
            lower += torch.bincount(within, minlength=1 << 16)
    return [_value(bucket, _from_top(fine[bucket], rank)[0]) for bucket, rank in found]


def _bits(tile: Tensor) -> Tensor:
    return (tile.reshape(-1) + 0.0).view(torch.int32)  # + 0: no negative zero


def _from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the rank-th element counted from the largest, and its rank in there."""
    above = counts.flip(0).cumsum(0)
    place = int((above < rank).sum())
    before = int(above[place - 1]) if place else 0
    return counts.numel() - 1 - place, rank - before


def _value(upper: int, lower: int) -> float:
    return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))
