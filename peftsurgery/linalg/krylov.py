"""A block Krylov space of MᵀM for a matrix that is only ever seen in row tiles, and how far the
best approximation in it can be from the best one there is.

    K_j = span(X, MᵀM X, …, (MᵀM)^j X),   X = Mᵀ Ψ,   Ψ (o, q) Gaussian

Musco, Musco 2015, arXiv 1504.05477 (randomized block Krylov iteration: an error of 1 + ε times the
optimum in O(log n / √ε) steps, whatever the spectrum); Halko, Martinsson, Tropp 2011, arXiv
0909.4061 (oversampling; one pass over M for each product with MᵀM).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .products import orthonormal, outside_of, polished
from .rough import roughly_leading

LOST = 1e-6  # of a column: what is smaller is rounding of fp32 products
SQUARABLE = (1e-9, 1e15)  # between these norms of M the squares in MᵀM are within fp32


class RowTiles(Protocol):
    """A matrix (o, n) that can be read as often as needed, a few rows at a time."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(o, n)."""
        ...

    def tiles(self, into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows (rows, n) in fp32), in order, without gaps; the next tile may take the
        memory of the one before. into (o, n), fp32: each tile is the rows of it where it belongs.
        """
        ...


def fresh_memory(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Memory by way of numpy, which asks for large pages: they take a third of the time to come."""
    return torch.from_numpy(np.empty((*shape, dtype.itemsize), np.uint8)).view(dtype).squeeze(-1)


def whole(source: RowTiles) -> Tensor:
    """All rows of a matrix (o, n), fp32."""
    matrix = fresh_memory(source.matrix_shape, torch.float32)
    for _ in source.tiles(matrix):
        pass
    return matrix


class KrylovSpace:
    """Orthonormal columns X (n, d) that span the space so far, and M X (o, d), kept.

    Making it reads M once, and so does each `step`. Sums of squares are in fp64, products in fp32.
    rough: begin with what products in bfloat16 take for that many leading directions; `near` tells
    whether the rounding has left them what they are. They are `width` columns where it has not.
    UsageError when M holds NaN or Inf.
    """

    def __init__(
        self, source: RowTiles, width: int, generator: torch.Generator, *, rough: int = 0
    ) -> None:
        self.source = source
        self.total = 0.0  # ||M||_F²
        self._generator = generator
        columns = source.matrix_shape[1]
        found = self._roughly(rough, width) if rough else (self._sketched(width), False)
        basis, self.near = found
        if not self.near:
            basis = torch.cat([basis, self._fresh(width - basis.shape[1], [basis])], 1)
        self._bases = [basis]
        self.random = basis.shape[1]  # random columns that the space grew from
        self._images: list[Tensor] = []
        self._gram = torch.zeros(0, 0, dtype=torch.float64)  # G = (M X)ᵀ (M X)
        self._outside = torch.zeros(columns, 0)  # N (n, c), orthogonal to X
        self._coupling = torch.zeros(0, 0, dtype=torch.float64)  # C (c, d): MᵀM X = X G + N C
        self._metric = torch.zeros(0, 0, dtype=torch.float64)  # NᵀN
        self.values = torch.zeros(0, dtype=torch.float64)
        self._turn = self._gram
        # since the last step, by rank
        self._residuals: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        root = math.sqrt(self.total)
        self._unit = root if root and not SQUARABLE[0] < root < SQUARABLE[1] else 1.0

    @property
    def dimension(self) -> int:
        """d, of the columns with a product."""
        return self._gram.shape[0]

    @property
    def exhausted(self) -> bool:
        """Whether MᵀM maps the space into itself: further steps find nothing."""
        if self.dimension >= self.source.matrix_shape[1]:
            return True
        return not bool((self._metric.diagonal() > LOST**2).any())

    def step(self) -> None:
        """Multiply the newest block with M and MᵀM; Ritz values and vectors of MᵀM in the space."""
        rows, columns = self.source.matrix_shape
        basis, unit = self._bases[-1], self._unit
        image = torch.empty(rows, basis.shape[1])
        back = torch.zeros(basis.shape[1], columns)  # rows: twice as fast as columns
        for start, tile in self.source.tiles():
            some = torch.mm(tile, basis, out=image[start : start + tile.shape[0]])
            back.addmm_((some if unit == 1 else some / unit).T, tile, alpha=1 / unit)
        self._images.append(image)
        self._extend_gram(image)
        self.values, turn = torch.linalg.eigh(self._gram)
        self.values, self._turn = self.values.flip(0).clamp_min(0), turn.flip(1)
        self._add_outside(back.T.contiguous())
        self._residuals.clear()

    def grow(self, extra: int = 0) -> None:
        """Take all of MᵀM X in, with `extra` fresh Gaussian columns beside it."""
        columns = self.source.matrix_shape[1]
        block = orthonormal(self._outside, LOST, columns - self.dimension)
        if block.shape[1]:
            block = polished(outside_of(block, self._bases))
        self._outside = torch.zeros(columns, 0)
        self._coupling = self._coupling[:0]
        extra = min(extra, columns - self.dimension - block.shape[1])
        if extra > 0:
            block = torch.cat([block, self._fresh(extra, [*self._bases, block])], 1)
            self.random += extra
            self.near = False
        self._bases.append(block)

    def grow_narrow(self, rank: int, width: int) -> None:
        """Take in the `width` directions of MᵀM X in which the leading Ritz vectors' residuals
        R = N C Z are longest, the leading left singular vectors of R; the others stay outside.
        """
        turn, squares, vectors = self._residual(rank)
        width = min(width, int((squares > LOST**2 * squares[-1]).sum()))
        longest = turn @ vectors[:, -width:] / squares[-width:].sqrt()
        block = polished(outside_of(self._outside @ longest.float(), self._bases))
        self._outside.addmm_(block, block.T @ self._outside, alpha=-1)
        self._bases.append(block)

    def excess(self, rank: int, without: int = 0) -> float:
        """A bound on Σ_{i<=k} σ_i² - Σ_{i<=k} θ_i: what the best approximation of rank k in the
        space lacks, in energy.

        With Z the k leading Ritz vectors, MᵀM Z - Z Θ = R is known, and in an orthonormal basis
        that begins with Z

            MᵀM = [Θ, Rᵀ; R, C] <= [Θ, Rᵀ; R, θ_k I],

        so the k largest eigenvalues of the right-hand side, a 2k x 2k problem, are above those of
        MᵀM (Weyl's monotonicity; Parlett 1998, "The Symmetric Eigenvalue Problem", 10.3 and 11.5).
        This holds where no direction outside Z carries more than θ_k (C <= θ_k I), which the random
        start makes true after a step or two but for a probability that falls with each column
        beyond k (Halko et al. 2011, section 10.2).

        without: that many of the longest directions of R are counted as nothing, which is about
        what is left when `grow_narrow` has taken them in.
        """
        k = min(rank, self.dimension)
        _, squares, vectors = self._residual(k)
        lengths = squares.clamp_min(0).sqrt()
        lengths[k - without :] = 0
        root = (vectors * lengths) @ vectors.T
        theta = torch.diag(self.values[:k])
        outside = self.values[k - 1] * torch.eye(k, dtype=torch.float64)
        above = torch.cat([torch.cat([theta, root], 1), torch.cat([root, outside], 1)])
        gained = torch.linalg.eigvalsh(above)[k:].sum() - self.values[:k].sum()
        return max(float(gained), 0.0)

    def residual(self, rank: int) -> float:
        """||MᵀM Z - Z Θ||_F of the leading Ritz vectors."""
        return math.sqrt(float(self._residual(rank)[1].clamp_min(0).sum()))

    def _residual(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """C Z, and eigenvalues, ascending, and eigenvectors of RᵀR."""
        if rank not in self._residuals:
            turn = self._coupling @ self._turn[:, :rank]
            squares, vectors = torch.linalg.eigh(turn.T @ self._metric @ turn)
            self._residuals[rank] = turn, squares, vectors
        return self._residuals[rank]

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """(M Z (o, k), Z (n, k)) of the leading Ritz vectors Z."""
        turn = self._turn[:, :rank].float()
        return _combined(self._images, turn), _combined(self._bases, turn)

    def _extend_gram(self, image: Tensor) -> None:
        newest = image.double()
        parts = [before.double().T @ newest for before in self._images[:-1]]
        own = newest.T @ newest
        if not parts:
            self._gram = own
            return
        side = torch.cat(parts)
        top = torch.cat([self._gram, side], 1)
        self._gram = torch.cat([top, torch.cat([side.T, own], 1)])

    def _add_outside(self, back: Tensor) -> None:
        """What of `back` = MᵀM X of the newest block lies outside the space, beside what did."""
        # each column on its own: the rounding of a long one is longer than what a short one finds
        tiny = torch.finfo(torch.float32).tiny
        lengths = torch.linalg.vector_norm(back, dim=0).clamp_min(tiny)
        fresh = outside_of(back, self._bases) / lengths
        self._outside = torch.cat([self._outside, fresh], 1)
        wide = self._outside.double()
        self._metric = wide.T @ wide
        before, newest = self._coupling.shape[0], lengths.numel()
        coupling = torch.zeros(before + newest, self.dimension, dtype=torch.float64)
        coupling[:before, : self._coupling.shape[1]] = self._coupling
        coupling[before:, -newest:] = torch.diag(lengths.double() * self._unit**2)
        self._coupling = coupling

    def _first_reading(self) -> Iterator[tuple[int, Tensor]]:
        """The tiles; adds their squares."""
        for start, tile in self.source.tiles():
            part = square(tile)
            if not math.isfinite(part):
                require_finite(tile, start)
            self.total += part
            yield start, tile

    def _sketched(self, width: int) -> Tensor:
        """An orthonormal basis of the columns of Mᵀ Ψ, fewer where M has a smaller rank."""
        sketch = torch.zeros(width, self.source.matrix_shape[1])
        for _, tile in self._first_reading():
            random = torch.randn(width, tile.shape[0], generator=self._generator)
            sketch.addmm_(random, tile)
        return polished(orthonormal(sketch.T.contiguous(), 0.0, min(sketch.shape)))

    def _roughly(self, rank: int, width: int) -> tuple[Tensor, bool]:
        """`roughly_leading` of M, in a unit in which squares are within range."""
        narrow = fresh_memory(self.source.matrix_shape, torch.bfloat16)
        for start, tile in self._first_reading():
            narrow[start : start + tile.shape[0]] = tile
        norm, unit = math.sqrt(self.total), 1.0
        if not SQUARABLE[0] < norm < SQUARABLE[1]:
            unit = 2.0 ** min(max(math.frexp(norm)[1], -120), 120)
            narrow /= unit
        return roughly_leading(narrow, norm / unit, rank, width, self._generator)

    def _fresh(self, count: int, known: list[Tensor]) -> Tensor:
        columns = self.source.matrix_shape[1]
        random = torch.randn(columns, count, generator=self._generator)
        if count == 0:
            return random
        for _ in range(2):
            random = orthonormal(outside_of(random, known), 0.0, count)
        return random


def _combined(blocks: list[Tensor], turn: Tensor) -> Tensor:
    """[blocks] @ turn."""
    result = torch.zeros(blocks[0].shape[0], turn.shape[1])
    row = 0
    for block in blocks:
        result.addmm_(block, turn[row : row + block.shape[1]])
        row += block.shape[1]
    return result


def square(tile: Tensor) -> float:
    """||tile||_F² to about 1e-7: norms of rows in fp32, where their squares are in its range,
    summed in fp64."""
    norms = torch.linalg.vector_norm(tile.flatten(1), dim=1)
    if not 1e-12 < float(norms.max()) < 1e18:
        norms = torch.linalg.vector_norm(tile.flatten(1), dim=1, dtype=torch.float64)
    return float(norms.double().square().sum())


def require_finite(tile: Tensor, start: int = 0) -> None:
    """UsageError with the number of values that are NaN or Inf and the first such row."""
    bad = (~torch.isfinite(tile)).any(1).nonzero().flatten()
    count = int((~torch.isfinite(tile)).sum())
    if count:
        raise UsageError(
            f"{count} values are NaN or Inf, first in row {start + int(bad[0])}; no SVD is defined."
        )
