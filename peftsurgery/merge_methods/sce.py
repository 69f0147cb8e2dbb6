"""SCE: select, calculate, erase (Wan et al. 2024, FuseChat, arXiv 2408.07990)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from ..linalg.krylov import square
from .base import SCALE, Chosen, Elementwise, Option, Stack, TileFunction
from .selection import chosen, largest

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
        kept = chosen(torch.ge, _variance(found), lowest)
        return [part.mul_(kept) for part in found]

    energies = torch.zeros(stack.count, dtype=torch.float64)
    for start, stop in stack.spans():
        for i, part in enumerate(selected(start, stop)):
            energies[i] += square(part)
    size = float(energies.sum())
    shares = (energies / size if size > 0 else torch.full_like(energies, 1 / stack.count)).tolist()

    def tile(start: int, stop: int) -> Tensor:
        found = selected(start, stop)
        votes = found[0].clone()
        for part in found[1:]:
            votes += part
        side = chosen(torch.ge, votes, 0.0).mul_(2).sub_(1)  # elected sign
        result, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
        for part, share in zip(found, shares, strict=True):
            agrees = torch.sign(part).mul_(side).clamp_min_(0)
            divisor.add_(agrees, alpha=share)
            result.add_(agrees.mul_(part), alpha=share)
        return result.div_(divisor.clamp_min(FLOOR)).mul_(scale)

    return tile


def _variance(parts: list[Tensor]) -> Tensor:
    mean = parts[0].clone()
    for part in parts[1:]:
        mean += part
    mean /= len(parts)
    total = torch.zeros_like(mean)
    for part in parts:
        gap = part - mean
        total.addcmul_(gap, gap)
    return total.div_(len(parts))


def _lowest_variance(stack: Stack, parts: Parts, density: float) -> float | None:
    """The least variance that is selected; None when everything is."""
    if density == 1 or stack.count < 2:
        return None

    def read(spans: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        return (_variance(parts(start, stop)) for start, stop in spans)

    changing = sum(int(tile.sign_().sum(dtype=torch.float64)) for tile in read(stack.spans()))
    keep = int(density * changing)
    if keep == 0:
        return float("inf")
    some = stack.sampled()
    sample = None if some is None else lambda: read(some)
    return largest(lambda: read(stack.spans()), [keep], sample=sample, count=stack.numel)[0]


SCE = Elementwise(
    "sce",
    (Option("density", "share of the elements that are selected", 1.0, 0, 1, above=True), SCALE),
    run=sce,
)
