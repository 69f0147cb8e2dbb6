"""Exact order statistics of magnitudes that are only ever seen tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

SLACK = 0.004  # of the elements, on either side of a bracket: tiles differ
CROWDED = 1 / 16  # of the elements: a bracket that holds more is given up


def largest(
    read: Callable[[], Iterable[Tensor]],
    ranks: Sequence[int],
    *,
    sample: Callable[[], Iterable[Tensor]] | None = None,
    count: int = 0,
) -> list[float]:
    """The k-th largest value for every k of `ranks` (1 is the largest), exactly.

    read: gives the tiles, fp32 >= 0 and finite, as often as asked. Bit patterns of such numbers are
    ordered as the numbers: one reading counts their upper 16 bits, a second one the lower 16 bits
    of those that share the upper bits of an answer.

    sample: some of the tiles, which have `count` values together. They bracket the answers, and one
    reading then counts what is above a bracket and keeps what is within; where the sample has
    misled, the two readings follow.
    """
    if sample is not None:
        found = _bracketed(read, ranks, sample, count)
        if found is not None:
            return found
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


def _bracketed(
    read: Callable[[], Iterable[Tensor]],
    ranks: Sequence[int],
    sample: Callable[[], Iterable[Tensor]],
    count: int,
) -> list[float] | None:
    """The answers by one reading; None when one is outside its bracket, or a bracket holds much."""
    seen = np.sort(np.concatenate([tile.numpy().ravel() for tile in sample()]))[::-1]
    brackets = [_bracket(seen, rank / count) for rank in ranks]
    above = [0] * len(ranks)
    within: list[list[np.ndarray]] = [[] for _ in ranks]
    held = 0
    for tile in read():
        values = tile.numpy().ravel()
        for index, (low, high) in enumerate(brackets):
            inside = values >= low
            larger = values > high
            above[index] += int(np.count_nonzero(larger))
            inside ^= larger
            within[index].append(values[inside])
            held += within[index][-1].size
        if held > CROWDED * count:
            return None
    found: list[float] = []
    for rank, larger, parts in zip(ranks, above, within, strict=True):
        values = np.concatenate(parts)
        place = rank - larger - 1
        if not 0 <= place < values.size:
            return None
        found.append(float(-np.partition(-values, place)[place]))
    return found


def _bracket(seen: np.ndarray, share: float) -> tuple[float, float]:
    """Values between which the quantile lies in all likelihood; seen: descending."""
    spread = 4 * math.sqrt(seen.size * share * (1 - min(share, 1.0))) + SLACK * seen.size
    first, last = math.floor(share * seen.size - spread), math.ceil(share * seen.size + spread)
    high = float(seen[first]) if first >= 0 else math.inf
    return (float(seen[last]) if last < seen.size else 0.0), high


def chosen(
    compare: Callable[..., Tensor], tile: Tensor, value: float, out: Tensor | None = None
) -> Tensor:
    """1 where compare(tile, value) holds and 0 elsewhere, in fp32: torch compares and multiplies
    floats ten times as fast as it selects by a mask.
    """
    return compare(tile, value, out=torch.empty_like(tile) if out is None else out)


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
