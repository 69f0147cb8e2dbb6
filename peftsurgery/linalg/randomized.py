"""Leading singular triplets of a matrix that is only ever seen in row tiles.

By a block Krylov space (`krylov`) where the rank is small beside the sides, by the Gram matrix of
the shorter side in fp64 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .krylov import KrylovSpace, RowTiles, fresh_memory, require_finite, square, whole
from .rank_rules import RankRule
from .rough import MOST, multiplies_bfloat16
from .svd import core_svd, dense_svd

OVERSAMPLING = 1.25  # columns of a block to one of the rank
LEAST_WIDTH = 24  # columns of a block: with fewer, reading M costs more than the products
NARROW = 4  # widths of a block: where the shorter side is less, the Gram matrix costs less
FIRST_RANK = 32  # tried first when a rule does not name one
DENSE_SHARE = 0.75  # of the shorter side: a wider space costs more than the Gram matrix
DENSE_SIDE = 96  # and below this side too
BOUND = 1.004  # times the smallest possible error; the last step is the first one to prove it
FEWEST_STEPS = 3  # (MᵀM)² X: before that, directions outside may be larger than those found
MOST_STEPS = 12
ROUNDING = 5e-7  # of σ_1²: a residual that fp32 products cannot tell from zero
NOTHING = 1e-12  # of ||M||²: products of factors in fp32 leave less
UNSEEN = 3e-7  # of ||M||²: energy that fp32 products cannot tell from zero
STRIPE = 512  # columns taken to fp64 at a time
EXACT = 1 << 18  # elements up to which LAPACK's SVD in fp64 costs nothing
HELD = 1 << 25  # elements up to which M is kept in fp32 once it was read


@dataclass(frozen=True)
class DenseTiles:
    """A dense matrix as `RowTiles`."""

    matrix: Tensor  # (o, n)
    step: int = 512

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(o, n)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def tiles(self, into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """See `RowTiles.tiles`."""
        for start in range(0, self.matrix.shape[0], self.step):
            rows = self.matrix[start : start + self.step]
            tile = rows.float() if into is None else into[start : start + self.step].copy_(rows)
            yield start, tile


@dataclass
class Held:
    """The row tiles of `source`, kept at the first reading and not made again."""

    source: RowTiles
    matrix: Tensor | None = None  # (o, n)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(o, n)."""
        return self.source.matrix_shape

    def tiles(self, into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """See `RowTiles.tiles`."""
        if self.matrix is not None:
            yield from DenseTiles(self.matrix, step=128).tiles(into)
            return
        matrix = fresh_memory(self.matrix_shape, torch.float32)
        yield from self.source.tiles(matrix)
        self.matrix = matrix


@dataclass(frozen=True)
class Truncated:
    """U diag(S) Vh, the best found approximation of M, with exact sums of squares.

    U (o, k), S (k,) descending, Vh (k, n) in fp32. `total` is ||M||_F², `kept` is Σ S², and since
    U diag(S) = M Vhᵀ the squared error ||M - U S Vh||_F² is their difference. `bound`: the error is
    at most that many times the smallest one of rank k; see `randomized_svd`.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    total: float
    kept: float
    bound: float = 1.0

    @property
    def energy(self) -> float:
        """Σ S² / ||M||_F²; 1 for a zero matrix."""
        return min(self.kept / self.total, 1.0) if self.total > 0 else 1.0

    @property
    def error(self) -> float:
        """||M - U S Vh||_F / ||M||_F."""
        return math.sqrt(max(1 - self.energy, 0.0))

    def transposed(self) -> Truncated:
        """That of Mᵀ."""
        return replace(self, u=self.vh.T, vh=self.u.T)


def randomized_svd(
    source: RowTiles, rule: RankRule | str | int, *, seed: int = 0, dense: bool | None = None
) -> Truncated:
    """The smallest rank that meets `rule`, and the triplets of that rank.

    The Ritz values θ of MᵀM in the Krylov space of q = 1.25 k random columns grow until

        (||M||² - Σ_{i<=k} θ_i) / (||M||² - Σ_{i<=k} θ_i - e) <= 1.004²,   e: `KrylovSpace.excess`,

    which bounds the squared error by that of the best approximation: ||M||² - Σθ is the error's
    square exactly, and e is what it can lack at most. Where fp32 sums cannot tell the numerator
    from 0, Σ_{i>k} θ_i takes its place, or the residual has to be rounding. At least
    `FEWEST_STEPS`, at most `MOST_STEPS` blocks; `bound` tells what was reached. Where a part of the
    last one promises to be enough, only the directions in which the residual is longest are taken
    in.

    Where the CPU multiplies bfloat16, and M in bfloat16 takes no more than that, the search begins
    near the end (`rough`), and one step from there will do for a σ_k that stands out of the
    rounding.

    M is read row tile by row tile, once for each block and once before; up to `HELD` elements it is
    kept in fp32 instead. Besides there are X (n, d) and M X (o, d) with d = q times the blocks, two
    and a part as a rule. A rule about energy starts with a narrow block and adds random columns
    until there are as many as the rank.

    Rules about the whole spectrum (cumulative, noise), ranks near the shorter side and small
    matrices take the Gram matrix of the shorter side in fp64 (`dense` True forces it, False forbids
    it): exact to fp32 and bound 1; singular values below 1e-8 of the largest are rounding. It holds
    min(o, n)² numbers in fp64, and M itself in fp32 where o < n.

    UsageError when M holds NaN or Inf.
    """
    rule = RankRule.parse(rule)
    shorter = min(source.matrix_shape)
    whole_spectrum = not rule.criteria and rule.cap is None
    whole_spectrum |= any(name in ("cumulative", "noise") for name, _ in rule.criteria)
    goal = rule.fixed or max(FIRST_RANK, rule.floor)
    if rule.fixed is None and rule.cap is not None:
        # below the cap, a block as wide as the cap answers every rule at once
        goal = rule.cap if rule.cap <= 4 * FIRST_RANK or not rule.criteria else goal
        goal = min(goal, rule.cap)
    width = _width(goal)
    widest = DENSE_SHARE * shorter
    small = shorter < max(NARROW * width, DENSE_SIDE) or whole_spectrum
    if dense or (dense is None and small):
        return _dense(source, rule)
    size = math.prod(source.matrix_shape)
    held = Held(source) if size <= HELD and not isinstance(source, DenseTiles) else source
    near = size <= 2 * HELD and goal <= min(MOST, shorter // NARROW) and multiplies_bfloat16()
    generator = torch.Generator().manual_seed(seed)
    space = KrylovSpace(held, min(width, shorter), generator, rough=goal if near else 0)
    since = 0  # steps since random columns came in
    for _ in range(MOST_STEPS):
        space.step()
        since += 1
        complete = space.dimension >= source.matrix_shape[1] or space.total == 0
        chosen = _choose(rule, space, shorter)
        k = min(chosen, space.dimension)
        answered = chosen <= space.random or space.random >= (rule.cap or shorter)
        fewest = 1 if space.near else FEWEST_STEPS
        if complete or (answered and _finished(space, k, since, fewest)):
            break
        more = 0
        if not answered and (since >= fewest or space.exhausted):
            more, since = min(_width(k) - space.random, 2 * space.dimension), 0
        if dense is None and space.dimension + more > widest - width:
            return _dense(source, rule)
        part = _enough(space, k) if answered and since >= fewest - 1 else 0
        if part:
            space.grow_narrow(k, part)
        else:
            space.grow(more)
    image, basis = space.leading(k)
    u, s, vh = core_svd(image, basis.T)
    kept = float(s.double().square().sum())
    return Truncated(u, s, vh, space.total, kept, 1.0 if complete else _bound(space, k))


def _width(rank: int) -> int:
    """Columns of a block for that rank."""
    return max(math.ceil(OVERSAMPLING * rank / 8) * 8, LEAST_WIDTH)


def _finished(space: KrylovSpace, k: int, since: int, fewest: int) -> bool:
    if space.exhausted:
        return True
    if since < fewest:  # of an exact rank nothing is left after two
        return since > 1 and float(space.values[k:].sum()) <= NOTHING * space.total
    return _bound(space, k) <= BOUND or space.residual(k) <= ROUNDING * float(space.values[0])


def _enough(space: KrylovSpace, k: int) -> int:
    """How many directions promise to bring the bound down; 0 where it takes a whole block."""
    for width in (k // 4, 3 * k // 8, k // 2):
        if width >= 4 and _bound(space, k, without=width) <= (1 + BOUND) / 2:
            return width
    return 0


def _bound(space: KrylovSpace, k: int, without: int = 0) -> float:
    """Error over smallest possible error of rank k, at most; see `randomized_svd` and
    `KrylovSpace.excess`.
    """
    excess = space.excess(k, without)
    missing = space.total - float(space.values[:k].sum())
    least = max(missing - excess, float(space.values[k:].sum()))
    return math.sqrt(1 + excess / least) if least > 0 else (1.0 if excess == 0 else math.inf)


def _choose(rule: RankRule, space: KrylovSpace, length: int) -> int:
    """The rank a rule asks for; what lies outside the space counts as spread evenly, which is the
    most it can cost, and as nothing where it is rounding."""
    kept, rest = space.values, length - space.dimension
    missing = space.total - float(kept.sum())
    if rest <= 0 or missing <= UNSEEN * space.total:
        return rule.choose(kept.sqrt()) if kept.numel() else 1
    spread = torch.full((rest,), missing / rest, dtype=kept.dtype)
    return rule.choose(torch.cat([kept, spread]).sqrt())


def _dense(source: RowTiles, rule: RankRule) -> Truncated:
    """From the eigenvectors of M Mᵀ or MᵀM, whichever is smaller, in fp64; small ones by LAPACK."""
    rows, columns = source.matrix_shape
    if rows < columns or rows * columns <= EXACT:
        matrix = whole(source)
        require_finite(matrix)
        total = square(matrix)
        if rows * columns <= EXACT:
            u, s, vh = dense_svd(matrix)
            k = rule.choose(s, (rows, columns))
            kept = total if k == s.numel() else float(s[:k].double().square().sum())
            return Truncated(u[:, :k], s[:k], vh[:k], total, kept)
        gram = torch.zeros(rows, rows, dtype=torch.float64)
        for start in range(0, columns, STRIPE):
            part = matrix[:, start : start + STRIPE].double()
            gram.addmm_(part, part.T)
        u = _eigenvectors(gram, rule, (rows, columns))
        return _from_one_side((u.T @ matrix).T, u, total, rows).transposed()
    gram, total = torch.zeros(columns, columns, dtype=torch.float64), 0.0
    for start, tile in source.tiles():
        part = square(tile)
        if not math.isfinite(part):
            require_finite(tile, start)
        total += part
        wide = tile.double()
        gram.addmm_(wide.T, wide)
    v = _eigenvectors(gram, rule, (rows, columns))
    image = torch.empty(rows, v.shape[1])
    for start, tile in source.tiles():
        torch.mm(tile, v, out=image[start : start + tile.shape[0]])
    return _from_one_side(image, v, total, columns)


def _eigenvectors(gram: Tensor, rule: RankRule, shape: tuple[int, int]) -> Tensor:
    """As many leading ones as the rule asks for."""
    values, vectors = torch.linalg.eigh(gram)
    k = rule.choose(values.clamp_min(0).sqrt().flip(0), shape)
    return vectors[:, -k:].flip(1).float()


def _from_one_side(image: Tensor, v: Tensor, total: float, whole: int) -> Truncated:
    """M V and V as U, S, Vh."""
    s = torch.linalg.vector_norm(image, dim=0, dtype=torch.float64)
    s, order = s.sort(descending=True, stable=True)
    kept = total if s.numel() == whole else float(s.square().sum())
    s = s.float()
    u = image[:, order] / s.clamp_min(torch.finfo(torch.float32).tiny)
    return Truncated(u, s, v[:, order].T, total, kept)
