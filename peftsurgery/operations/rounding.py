"""Rounding to the dtype that is written, and the share of ΔW that survives it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from peftsurgery.quantizers.surviving import Survival


def survival_of(
    exact: Tensor, before: Tensor, written: Tensor, room: tuple[Tensor, Tensor] | None = None
) -> Survival:
    """Sums over the elements of a tile; not finite when one of the three holds NaN or Inf.

    With e = written - exact: <kept, Δ> = ||Δ||² + <e, Δ>, and the error is ||e||². room: two fp32
    tensors of the tile's shape to work in.
    """
    delta, error = room or (torch.empty_like(exact), torch.empty_like(exact))
    torch.sub(exact, before, out=delta)
    error.copy_(written).sub_(exact)
    delta, error = delta.reshape(-1), error.reshape(-1)
    total = float(torch.dot(delta, delta))
    return Survival(total + float(torch.dot(error, delta)), total, float(torch.dot(error, error)))


def generator(seed: int, name: str, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}:{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def stochastic(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbours with probability proportional to nearness: E[result] =
    exact.

    exact: fp32. The neighbour of the nearest value on the other side of `exact` is found by
    stepping its bit pattern, which orders magnitudes in every IEEE-like format.
    """
    near = exact.to(dtype)
    residual = exact - near.float()
    bits = near.view(torch.int8 if dtype.itemsize == 1 else torch.int16).clone()
    outward = (residual > 0) == (near.float() >= 0)
    step = torch.where(outward, 1, -1).to(bits.dtype)
    zero = near.float() == 0
    other = (bits + step).view(dtype)
    smallest = torch.ones((), dtype=bits.dtype).view(dtype).float()
    other_value = torch.where(zero, torch.copysign(smallest, residual), other.float())
    gap = (other_value - near.float()).abs()
    chance = torch.where(gap > 0, residual.abs() / gap, 0.0)
    take = torch.rand(exact.shape, generator=generator) < chance
    take &= torch.isfinite(other_value) & (residual != 0)
    return torch.where(take, other_value, near.float()).to(dtype)
