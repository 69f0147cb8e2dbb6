"""The Kronecker product nearest to a matrix, from row tiles or from low-rank factors.

    min ||M - A ⊗ B||_F = min ||R(M) - vec(A) vec(B)ᵀ||_F,   R(M)[(α, γ), (β, δ)] = M[αb + β, γe +
    δ]

(Van Loan, Pitsianis 1993, "Approximation with Kronecker products"): the leading singular triplet of
the rearranged matrix R(M), found by block power iteration. M is never rearranged in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .krylov import RowTiles
from .norms import low_rank_norm

BLOCK = 4  # vectors iterated together
GAIN = 1e-4  # of the remaining energy; a step that gains less is the last one
ROUNDING = 1e-7  # of the whole energy
MOST_STEPS = 40


@dataclass(frozen=True)
class Kronecker:
    """A ⊗ B nearest to M (o, n) among all A (a, c) and B (b, e) with a b = o, c e = n.

    ||A|| = ||B||. `total` is ||M||_F²; since A ⊗ B is a projection of M, the squared error is
    total - kept with kept = ||A||² ||B||².
    """

    first: Tensor  # (a, c)
    second: Tensor  # (b, e)
    total: float
    kept: float

    @property
    def error(self) -> float:
        """||M - A ⊗ B||_F / ||M||_F; 0 for a zero matrix."""
        return math.sqrt(max(1 - self.kept / self.total, 0.0)) if self.total > 0 else 0.0

    @property
    def parameters(self) -> int:
        """Numbers in A and B."""
        return self.first.numel() + self.second.numel()


@dataclass(frozen=True)
class Split:
    """One way to cut (o, n): A is (a, c); `error` is that of the nearest product."""

    a: int
    c: int
    parameters: int
    error: float


def splits(rows: int, columns: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Every (a, c) with a | rows and c | columns / unit; unit: the kernel, which stays in B."""
    for a in _divisors(rows):
        for c in _divisors(columns // unit):
            yield a, c


def nearest_kronecker(
    source: RowTiles | tuple[Tensor, Tensor], a: int, c: int, *, seed: int = 0
) -> Kronecker:
    """The nearest A ⊗ B with A (a, c). source: row tiles of M, or (up (o, r), down (r, n)) with
    M = up down, which is not multiplied out.

    UsageError when a or c does not divide M's side, or M holds NaN or Inf.
    """
    rows, columns = _shape(source)
    if rows % a or columns % c:
        raise UsageError(f"a {rows}x{columns} matrix has no {a}x{c} Kronecker factor.")
    b, e = rows // a, columns // c
    if isinstance(source, tuple):
        forth, back, total = _of_factors(*source, a, b, c, e)
        dtype = torch.float64
    else:
        forth, back, total = _of_tiles(source, a, b, c, e)
        dtype = torch.float32
    if not math.isfinite(total):
        raise UsageError("the matrix holds NaN or Inf; it has no nearest Kronecker product.")
    if total == 0:
        return Kronecker(torch.zeros(a, c), torch.zeros(b, e), 0.0, 0.0)
    count = min(BLOCK, a * c, b * e)
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(a * c, count, generator=generator).to(dtype)
    found, gained, size = 0.0, 1.0, math.sqrt(total)
    right, values, turn = left, torch.zeros(1), left
    steps = 0
    while steps < MOST_STEPS and gained > max(GAIN * (1 - found), ROUNDING):
        right = torch.linalg.qr(back(left)).Q  # (b e, count)
        image = (forth(right) / size).double()  # (a c, count)
        left, values, turn = torch.linalg.svd(image, full_matrices=False)
        left = left.to(dtype)
        gained, found = float(values[0]) ** 2 - found, float(values[0]) ** 2
        steps += 1
    # image = R(M) right, so R(M) (right w) = s u for w the first row of turn: an exact projection
    root = math.sqrt(float(values[0]) * size)
    first = (left[:, 0].double() * root).reshape(a, c).float()
    second = (right.double() @ turn[0] * root).reshape(b, e).float()
    return Kronecker(first, second, total, found * total)


def kronecker_choices(
    source: RowTiles | tuple[Tensor, Tensor],
    *,
    unit: int = 1,
    parameters: int | None = None,
    most: int | None = None,
) -> list[Split]:
    """Every split with at most `parameters` numbers in A and B, and the error of its nearest
    product; the most exact first, of equal ones the smallest.

    most: look at that many only, those with the most numbers, which are nearly always the most
    exact. From factors a split costs a few thin products. Empty when no split is small enough.
    """
    rows, columns = _shape(source)
    sizes = {(a, c): a * c + (rows // a) * (columns // c) for a, c in splits(rows, columns, unit)}
    fitting = [cut for cut, n in sizes.items() if parameters is None or n <= parameters]
    fitting.sort(key=lambda cut: -sizes[cut])
    found = [
        Split(a, c, sizes[a, c], nearest_kronecker(source, a, c).error) for a, c in fitting[:most]
    ]
    return sorted(found, key=lambda split: (split.error, split.parameters))


def _shape(source: RowTiles | tuple[Tensor, Tensor]) -> tuple[int, int]:
    if isinstance(source, tuple):
        return source[0].shape[0], source[1].shape[1]
    return source.matrix_shape


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


Product = Callable[[Tensor], Tensor]


def _of_factors(
    up: Tensor, down: Tensor, a: int, b: int, c: int, e: int
) -> tuple[Product, Product, float]:
    """R(M) X, R(M)ᵀ Y and ||M||², for M = up down, in fp64."""
    rank = up.shape[1]
    u, v = up.double().reshape(a, b * rank), down.double().reshape(rank * c, e)

    def forth(right: Tensor) -> Tensor:
        count = right.shape[1]
        inner = right.T.reshape(count * b, e) @ v.T  # (count b, rank c)
        inner = inner.reshape(count, b * rank, c)
        return (u @ inner).reshape(count, a * c).T

    def back(left: Tensor) -> Tensor:
        count = left.shape[1]
        inner = u.T @ left.T.reshape(count, a, c)  # (count, b rank, c)
        return (inner.reshape(count * b, rank * c) @ v).reshape(count, b * e).T

    return forth, back, low_rank_norm(up, down) ** 2


def _of_tiles(source: RowTiles, a: int, b: int, c: int, e: int) -> tuple[Product, Product, float]:
    """The same from row tiles, one reading for each product."""

    def pieces() -> Iterator[tuple[int, int, Tensor]]:
        """(α, first β, rows (m, c, e)): tiles cut where a block of A's rows begins."""
        for start, tile in source.tiles():
            done = 0
            while done < tile.shape[0]:
                block, first = divmod(start + done, b)
                count = min(b - first, tile.shape[0] - done)
                yield block, first, tile[done : done + count].reshape(count, c, e)
                done += count

    def forth(right: Tensor) -> Tensor:
        count = right.shape[1]
        vectors = right.T.reshape(count, b, e)
        result = torch.zeros(count, a, c, dtype=right.dtype)
        for block, first, piece in pieces():
            some = vectors[:, first : first + piece.shape[0]]
            result[:, block] += torch.einsum("mce,pme->pc", piece, some)
        return result.reshape(count, a * c).T

    def back(left: Tensor) -> Tensor:
        count = left.shape[1]
        vectors = left.T.reshape(count, a, c)
        result = torch.zeros(count, b, e, dtype=left.dtype)
        for block, first, piece in pieces():
            some = torch.einsum("mce,pc->pme", piece, vectors[:, block])
            result[:, first : first + piece.shape[0]] += some
        return result.reshape(count, b * e).T

    total = sum(
        float(torch.linalg.vector_norm(tile, dtype=torch.float64)) ** 2
        for _, tile in source.tiles()
    )
    return forth, back, total
