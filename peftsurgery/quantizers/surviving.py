"""The share of a change that is still there after rounding, and the directions it looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = 64  # input directions of a change whose factors are not at hand
SAFE = 1e-6  # of the largest: directions below are noise of the factors
ENOUGH = 0.98  # nearest rounding, which adds the least noise, is taken where it keeps so much
MIN_SURVIVAL = 0.9  # of a merge into packed weights, unless the user says otherwise


@dataclass
class Survival:
    """Sums over elements: Δ = exact - base, kept = written - base."""

    kept: float = 0.0  # <kept, Δ>
    total: float = 0.0  # ||Δ||²
    error: float = 0.0  # ||kept - Δ||²

    @property
    def share(self) -> float:
        """<kept, Δ> / ||Δ||²: 1 when everything was written, 0 when rounding swallowed it."""
        return self.kept / self.total if self.total > 0 else 1.0

    def add(self, other: Survival) -> None:
        """Accumulate another sum."""
        self.kept += other.kept
        self.total += other.total
        self.error += other.error

    def scale(self, factor: float) -> None:
        """The sums over `factor` times as many elements of the same kind."""
        self.kept *= factor
        self.total *= factor
        self.error *= factor


def survival(wanted: Tensor, change: Tensor, before: Tensor, written: Tensor) -> Survival:
    """kept = <written - before, Δ>, error = ‖written - wanted‖²; `before` is what the packed base
    stands for, whatever Δ was added to.
    """
    delta = change.reshape(-1)
    kept = float(torch.dot((written - before).reshape(-1), delta))
    error = (written - wanted).reshape(-1)
    return Survival(kept, float(torch.dot(delta, delta)), float(torch.dot(error, error)))


def directions(change: Tensor, seed: int, count: int = DIRECTIONS) -> Tensor:
    """Orthonormal input directions (columns, r) that hold most of a change (rows, columns): the
    range of Δᵀ Δ Ω, Ω Gaussian (Halko et al. 2011, arXiv:0909.4061).
    """
    count = min(count, *change.shape)
    random = torch.Generator().manual_seed(seed)
    probe = torch.randn(change.shape[1], count, generator=random)
    found = change.T @ (change @ probe)
    if not bool(found.any()):
        return found[:, :0]
    left, sizes, _ = torch.linalg.svd(found.double(), full_matrices=False)
    return left[:, sizes > SAFE * sizes[0]].float().contiguous()


def row_space(rows: Tensor) -> Tensor | None:
    """An orthonormal basis (columns, r) of the space of rows (n, columns): the down factors of
    LoRAs. None when they are too many for their directions to tell anything.
    """
    if len(rows) > min(DIRECTIONS * 4, rows.shape[1] // 2):
        return None
    wide = rows.double()
    squares, turn = torch.linalg.eigh(wide @ wide.T)  # a tenth of the time of an SVD
    kept = squares > SAFE**2 * squares[-1]
    return (wide.T @ (turn[:, kept] / squares[kept].sqrt())).float()
