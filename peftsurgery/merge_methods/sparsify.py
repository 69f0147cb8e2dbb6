"""Which elements of a change stay: by magnitude, at random, or both.

A sparsifier is prepared once per source (thresholds need the whole weight) and then changes tiles
in place. Random numbers come from a counter-based generator (Philox4x32, Salmon et al. 2011) at the
element's own position, keyed by seed, weight and adapter: tiles may have any size and come in any
order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .base import Chosen, Stack
from .selection import chosen

Sparsifier: TypeAlias = Callable[[Tensor, int], Tensor]  # (tile, first row) -> tile
Prepare: TypeAlias = Callable[[Stack, int, Chosen], Sparsifier]
LANES = 8  # 32-bit numbers in one step of the generator's counter


def keep_all(stack: Stack, source: int, options: Chosen) -> Sparsifier:
    """x_i' = x_i."""
    return lambda tile, row: tile


def trim(stack: Stack, source: int, options: Chosen) -> Sparsifier:
    """x_i' = x_i where |x_i| >= τ, else 0; τ the ⌊density·N⌋-th largest magnitude of the weight.

    Elements as large as τ all stay, so that the result does not depend on their order.
    """
    density = options.number("density")
    if density == 1:
        return keep_all(stack, source, options)
    keep = max(1, int(density * stack.numel))
    (threshold,) = stack.largest(source, [keep])
    return _band(threshold, float("inf"))


def outliers(stack: Stack, source: int, options: Chosen) -> Sparsifier:
    """Of the N magnitudes the largest ⌊gamma·N⌋ go, the next ⌊density·N⌋ stay, the rest goes.

    With density + gamma > 1 fewer of the largest go, as in mergekit (sparsify.py); equal ones at
    either border stay.
    """
    density, gamma = options.number("density"), options.number("gamma")
    keep = max(1, int(density * stack.numel))
    top = min(int(gamma * stack.numel), stack.numel - keep)
    high, low = stack.largest(source, [top + 1, top + keep])
    return _band(low, high)


def drop(stack: Stack, source: int, options: Chosen) -> Sparsifier:
    """x_i' = m_i x_i / density, m_i ~ Bernoulli(density); without `rescale` not divided."""
    density = options.number("density")
    key = _key(stack, source)
    columns = stack.shape[1]
    factor = 1 / density if options.flag("rescale") else 1.0
    if density == 1:
        return keep_all(stack, source, options)

    def apply(tile: Tensor, row: int) -> Tensor:
        numbers = uniform(key, row * columns, tile.numel()).reshape(tile.shape)
        return tile.mul_(chosen(torch.lt, numbers, density, numbers)).mul_(factor)

    return apply


def drop_by_rank(stack: Stack, source: int, options: Chosen) -> Sparsifier:
    """x_i' = m_i x_i / p_i, m_i ~ Bernoulli(p_i), where the keep probability of the element with
    rank r (0 the smallest magnitude of its row, n elements) is

        p = density - epsilon + 2 epsilon r / (n - 1)

    DELLA's MagPrune (Deep et al. 2024, arXiv 2406.11617), rows and formula as in mergekit
    (sparsify.py). Without `rescale` not divided by p. density 1 keeps everything.
    """
    density, epsilon = options.number("density"), options.number("epsilon")
    if density == 1:
        return keep_all(stack, source, options)
    if not (density - epsilon > 0 and density + epsilon <= 1):
        raise UsageError(
            f"density {density:g} with epsilon {epsilon:g}: keep probabilities run from "
            f"{density - epsilon:g} to {density + epsilon:g} and must stay above 0 and at most 1. "
            "Lower epsilon."
        )
    key = _key(stack, source)
    columns = stack.shape[1]
    steps = torch.linspace(-epsilon, epsilon, columns) if columns > 1 else torch.zeros(1)
    chances = density + steps

    def apply(tile: Tensor, row: int) -> Tensor:
        chance = torch.empty_like(tile).scatter_(1, _order(tile), chances.expand_as(tile))
        numbers = uniform(key, row * columns, tile.numel()).reshape(tile.shape)
        tile.mul_(torch.lt(numbers, chance, out=numbers))
        return tile.div_(chance) if options.flag("rescale") else tile

    return apply


def _band(low: float, high: float) -> Sparsifier:
    """Keeps low <= |x| <= high; what is outside becomes zero."""
    below = float(torch.nextafter(torch.tensor(low), torch.tensor(0.0)))

    def apply(tile: Tensor, row: int) -> Tensor:
        if high != float("inf"):
            tile = tile.mul_(chosen(torch.le, tile.abs(), high))
        if low == 0:
            return tile
        return torch.nn.functional.hardshrink(tile, below)  # |x| > below, that is |x| >= low

    return apply


def _order(tile: Tensor) -> Tensor:
    """Columns of every row by magnitude, equal ones by place: one sort of 64-bit keys, magnitude
    above and column below, takes a fraction of the time of a stable sort with indices.
    """
    magnitudes = tile.abs().numpy().view(np.uint32).astype(np.int64)
    keys = (magnitudes << 32) | np.arange(tile.shape[1])
    keys.sort(axis=1)
    return torch.from_numpy(keys & 0xFFFFFFFF)


def _key(stack: Stack, source: int) -> int:
    label = f"{stack.seed}:{stack.name}:{stack.indices[source]}".encode()
    return int.from_bytes(hashlib.sha256(label).digest()[:16], "little")


def uniform(key: int, first: int, count: int) -> Tensor:
    """Numbers first … first+count-1 of the stream `key`, uniform in [0, 1), fp32."""
    steps, skip = divmod(first, LANES)
    bits = np.random.Philox(key=key).advance(steps)
    numbers = np.random.Generator(bits).random(skip + count, dtype=np.float32)
    return torch.from_numpy(numbers)[skip:]
