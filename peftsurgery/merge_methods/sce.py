"""SCE: select, calculate, erase (Wan et al. 2024, FuseChat, arXiv 2408.07990)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .base import SCALE, Chosen, Elementwise, Option, Stack, TileFunction
from .selection import largest

FLOOR = 1e-6  # least divisor, as mergekit's (sce.py)
Parts: TypeAlias = Callable[[int, int], list[Tensor]]  # rows start:stop of every source


def sce(stack: Stack, options: Chosen) -> TileFunction:
    """With y_i = w_i ΔW_i, per weight:

        select     elements whose variance over the adapters is among the ⌊density·N₊⌋ largest of
                   the N₊ that are not zero (all with density 1, or with one adapter)
        calculate  c_i = mean(y_i²) / Σ_j mean(y_j²) over the selected elements
        erase      per element, the y_i whose sign is not that of Σ y_j

        ΔW = λ Σ c_i y_i / Σ c_i over what is left

    mergekit (sce.py) has this without weights w_i. Equal variances at the border all stay.
    """
    density, scale = options.number("density"), options.number("scale")

    def parts(start: int, stop: int) -> list[Tensor]:
        return [stack.read(i, start, stop).mul_(w) for i, w in enumerate(stack.weights)]

    lowest = _lowest_variance(stack, parts, density)

    def selected(start: int, stop: int) -> list[Tensor]:
        found = parts(start, stop)
        if lowest is None:
            return found
        kept = _variance(found) >= lowest
        return [part.mul_(kept) for part in found]

    energies = torch.zeros(stack.count, dtype=torch.float64)
    for start, stop in stack.spans():
        for i, part in enumerate(selected(start, stop)):
            energies[i] += part.double().square().sum()
    size = float(energies.sum())
    shares = (energies / size if size > 0 else torch.full_like(energies, 1 / stack.count)).tolist()

    def tile(start: int, stop: int) -> Tensor:
        found = selected(start, stop)
        votes = torch.stack(found).sum(0)
        positive = votes >= 0
        result, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
        for part, share in zip(found, shares, strict=True):
            agrees = (part != 0) & ((part > 0) == positive)
            result += share * (part * agrees)
            divisor.add_(agrees, alpha=share)
        return result.div_(divisor.clamp_min(FLOOR)).mul_(scale)

    return tile


def _variance(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).var(0, unbiased=False)


def _lowest_variance(stack: Stack, parts: Parts, density: float) -> float | None:
    """The least variance that is selected; None when everything is."""
    if density == 1 or stack.count < 2:
        return None
    changing = sum(int((_variance(parts(a, b)) != 0).sum()) for a, b in stack.spans())
    keep = int(density * changing)
    if keep == 0:
        return float("inf")
    return largest(lambda: (_variance(parts(a, b)) for a, b in stack.spans()), [keep])[0]


SCE = Elementwise(
    "sce",
    (Option("density", "share of the elements that are selected", 1.0, 0, 1, above=True), SCALE),
    run=sce,
)
