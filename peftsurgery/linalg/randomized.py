"""Leading singular triplets of a matrix that is only ever seen in row tiles.

Halko, Martinsson, Tropp 2011, arXiv 0909.4061 (randomized range finder with power iterations),
with the right basis kept and the passes stopped by what they still gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from .rank_rules import RankRule
from .svd import core_svd, dense_svd

OVERSAMPLING = 16  # columns of the sketch beyond the rank, at least
FIRST_SKETCH = 32  # rank tried first when a rule does not name one
DENSE_SHARE = 0.6  # of the shorter side: a wider sketch costs more than the dense SVD
DENSE_SIDE = 96  # and below this side too
GAIN = 2.5e-2  # of the remaining energy; a pass that gains less is the last one
ROUNDING = 1e-6  # of the whole energy: what fp32 sums cannot tell
MOST_PASSES = 6


class RowTiles(Protocol):
    """A matrix (o, n) that can be read as often as needed, a few rows at a time."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(o, n)."""
        ...

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows (rows, n) in fp32), in order, without gaps."""
        ...


@dataclass(frozen=True)
class DenseTiles:
    """A dense matrix as `RowTiles`."""

    matrix: Tensor  # (o, n)
    step: int = 512

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(o, n)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """See `RowTiles.tiles`."""
        for start in range(0, self.matrix.shape[0], self.step):
            yield start, self.matrix[start : start + self.step].float()


@dataclass(frozen=True)
class Truncated:
    """U diag(S) Vh, the best found approximation of M, with exact sums of squares.

    U (o, k), S (k,) descending, Vh (k, n) in fp32. `total` is ||M||_F², `kept` is Σ S², and since
    U diag(S) = M Vhᵀ the squared error ||M - U S Vh||_F² is their difference.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    total: float
    kept: float

    @property
    def energy(self) -> float:
        """Σ S² / ||M||_F²; 1 for a zero matrix."""
        return min(self.kept / self.total, 1.0) if self.total > 0 else 1.0

    @property
    def error(self) -> float:
        """||M - U S Vh||_F / ||M||_F."""
        return math.sqrt(max(1 - self.energy, 0.0))


def randomized_svd(
    source: RowTiles, rule: RankRule | str | int, *, seed: int = 0, dense: bool | None = None
) -> Truncated:
    """The smallest rank that meets `rule`, and the triplets of that rank.

        X ← orth(Mᵀ Ψ),  X ← orth(Mᵀ M X) until ||M X||_F² stops growing,  M X = U S Wᵀ,  Vh = (X
                         W)ᵀ

    M is read row tile by row tile, once per product with Mᵀ M; besides one tile there are only
    X (n, q) and M X (o, q) with q = rank + oversampling. ||M||_F² is summed on the way, so the
    energy kept is exact and not an estimate. A rule about energy starts with a narrow sketch and
    widens it, the basis found so far being kept. Rules about the whole spectrum (cumulative,
    noise), ranks near the shorter side and small matrices take the dense SVD (`dense` True forces
    it, False forbids it), which holds M once in fp32.

    UsageError when M holds NaN or Inf.
    """
    rule = RankRule.parse(rule)
    rows, columns = source.matrix_shape
    shorter = min(rows, columns)
    whole_spectrum = not rule.criteria and rule.cap is None
    whole_spectrum |= any(name in ("cumulative", "noise") for name, _ in rule.criteria)
    goal = rule.fixed or max(FIRST_SKETCH, rule.floor)
    if rule.fixed is None and rule.cap is not None:
        # below the cap, a sketch as wide as the cap answers every rule at once
        goal = rule.cap if rule.cap <= 4 * FIRST_SKETCH or not rule.criteria else goal
        goal = min(goal, rule.cap)
    basis: Tensor | None = None
    generator = torch.Generator().manual_seed(seed)
    while True:
        width = goal + max(OVERSAMPLING, goal // 4)
        small = shorter <= DENSE_SIDE or width > DENSE_SHARE * shorter or whole_spectrum
        if dense or (dense is None and small):
            return _dense(source, rule)
        width = min(width, shorter)
        basis, total = _basis(source, width, goal, basis, generator)
        u, s, vh = core_svd(_product(source, basis), basis.T)
        kept = s.double().square()
        wanted = _choose(rule, kept, total, shorter)
        final = width == shorter or (rule.cap is not None and goal >= rule.cap)
        if wanted <= goal or final:
            k = min(wanted, s.numel())
            return Truncated(u[:, :k], s[:k], vh[:k], total, float(kept[:k].sum()))
        goal = min(max(2 * goal, min(wanted, 4 * goal)), rule.cap or shorter)


def _choose(rule: RankRule, kept: Tensor, total: float, length: int) -> int:
    """The rank a rule asks for; what lies outside the sketch counts as spread evenly, which is the
    most it can cost."""
    rest = length - kept.numel()
    missing = max(total - float(kept.sum()), 0.0)
    spread = [] if rest == 0 else [torch.full((rest,), missing / rest, dtype=kept.dtype)]
    return rule.choose(torch.cat([kept, *spread]).sqrt())


def _dense(source: RowTiles, rule: RankRule) -> Truncated:
    matrix = torch.empty(source.matrix_shape)
    for start, tile in source.tiles():
        matrix[start : start + tile.shape[0]] = tile
    _finite(matrix)
    u, s, vh = dense_svd(matrix)
    squares = s.double().square()
    total = square(matrix)
    k = rule.choose(s, source.matrix_shape)
    kept = total if k == s.numel() else float(squares[:k].sum())
    return Truncated(u[:, :k], s[:k], vh[:k], total, kept)


def _basis(
    source: RowTiles, width: int, goal: int, known: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, float]:
    """X (n, width) with orthonormal columns that hold the leading right singular vectors, and
    ||M||²."""
    columns = source.matrix_shape[1]
    fresh = width if known is None else width - known.shape[1]
    sketch = torch.zeros(columns, fresh)
    total = 0.0
    for start, tile in source.tiles():
        part = square(tile)
        if not math.isfinite(part):
            _finite(tile, start)
        total += part
        random = torch.randn(tile.shape[0], fresh, generator=generator)
        sketch.addmm_(tile.T, random)
    size = math.sqrt(total) or 1.0
    sketch /= torch.linalg.vector_norm(sketch, dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    if total == 0:
        sketch = torch.randn(columns, fresh, generator=generator)
    basis = torch.linalg.qr(sketch if known is None else torch.cat([known, sketch], 1)).Q
    before = 0.0
    for _ in range(MOST_PASSES if total > 0 else 0):
        image = torch.zeros(columns, width)
        for _, tile in source.tiles():
            image.addmm_(tile.T, (tile @ basis).div_(size))
        image /= size
        # Xᵀ Mᵀ M X / ||M||²: its eigenvalues are the shares of energy of the Ritz vectors
        shares, turn = torch.linalg.eigh((basis.T @ image).double())
        image = image @ turn.flip(1).float()
        norms = torch.linalg.vector_norm(image, dim=0)
        image /= norms.clamp_min(torch.finfo(torch.float32).tiny)
        lost = norms <= torch.finfo(torch.float32).tiny
        if bool(lost.any()):
            image[:, lost] = torch.randn(columns, int(lost.sum()), generator=generator)
        basis = torch.linalg.qr(image).Q
        found = float(shares.flip(0)[:goal].sum())
        if found - before <= max(GAIN * (1 - found), ROUNDING):
            break
        before = found
    return basis, total


def square(tile: Tensor) -> float:
    """||tile||_F² to about 1e-7: norms of rows in fp32, where their squares are in its range,
    summed in fp64."""
    norms = torch.linalg.vector_norm(tile.flatten(1), dim=1)
    if not 1e-12 < float(norms.max()) < 1e18:
        norms = torch.linalg.vector_norm(tile.flatten(1), dim=1, dtype=torch.float64)
    return float(norms.double().square().sum())


def _product(source: RowTiles, basis: Tensor) -> Tensor:
    """M X (o, q)."""
    product = torch.empty(source.matrix_shape[0], basis.shape[1])
    for start, tile in source.tiles():
        torch.mm(tile, basis, out=product[start : start + tile.shape[0]])
    return product


def _finite(tile: Tensor, start: int = 0) -> None:
    bad = (~torch.isfinite(tile)).any(1).nonzero().flatten()
    count = int((~torch.isfinite(tile)).sum())
    if count:
        raise UsageError(
            f"{count} values are NaN or Inf, first in row {start + int(bad[0])}; no SVD is defined."
        )
