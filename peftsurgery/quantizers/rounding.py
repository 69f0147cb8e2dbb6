"""Ways to choose codes: at random without bias, or with the error fed forward.

Nearest rounding swallows a change smaller than half a step. With ε = w - q the others keep it

* on average: `stochastic` takes the upper neighbour with the probability of the weight's place
  between the two, so E[q] = w;
* where it matters: `feedback` minimises tr(ε H εᵀ) greedily over the columns, H = 1 + λ V Vᵀ with
  V the input directions that the change looks at (low rank), or any H = E[x xᵀ] of the inputs.

Sources: optimal brain quantization, Frantar et al. 2022, arXiv:2208.11580, and GPTQ, Frantar et
al. 2022, arXiv:2210.17323, whose step for one column is the case of one column here; with H of low
rank its inverse is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.errors import UsageError
from peftsurgery.quantizers.grids import PIECE, Grid

WEIGHT = 1000.0  # λ: how much more an error in the change's own directions counts
LEAST = 2  # columns of the smallest block


def stochastic(weight: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
    """One of the two neighbours of every weight (rows, columns), E[value] = weight."""
    lower, upper, share = grid.book.between(grid.units(weight))
    take = torch.rand(share.shape, generator=generator) < share
    return torch.where(take, upper, lower)


def blocks(columns: int, group: int = 0) -> list[tuple[int, int]]:
    """Blocks [start, stop) of columns that become smaller to the end, since nothing is left to make
    up for the error of the last; whole groups of `group` columns, or within one.

    Errors within a block wait for the next one, and what remains of ε V is governed by the last
    blocks. So the first ones may be large: with 2/5 of the columns left in each, some fifteen for
    2048 columns, the whole error is 4 to 5 % above that of 1/16 in each, at a fifth of the time.
    """
    found = []
    start = 0
    while start < columns:
        size = max(LEAST, (columns - start) * 2 // 5)
        stop = min(columns, start + size)
        if group > 1 and start // group != (stop - 1) // group:
            stop = max(stop // group, start // group + 1) * group
        found.append((start, min(stop, columns)))
        start = stop
    return found


@dataclass(frozen=True)
class Subspace:
    """Error feedback that keeps ε V small; basis V (columns, r), orthonormal.

    With S = Σ ε_k v_k over the columns done and G = Σ v_kᵀ v_k over those left, the errors of
    these that minimise ‖ε‖² + λ‖ε V‖² are -S (1/λ + G)⁻¹ Vᵀ: so much is added before they are
    rounded. `steps`: of every block its first column, its part of V (its size, r), and
    (1/λ + G)⁻¹ times that, transposed.
    """

    basis: Tensor
    steps: tuple[tuple[int, Tensor, Tensor], ...]

    @classmethod
    def of(cls, basis: Tensor, group: int = 0, weighting: float = WEIGHT) -> Subspace:
        """For scales of `group` columns; λ = `weighting`."""
        exact = basis.double()
        places = blocks(basis.shape[0], group)
        parts = [exact[start:stop] for start, stop in places]
        done = torch.stack([part.T @ part for part in parts]).cumsum(0)
        left = done[-1:] - done.roll(1, 0).index_fill_(0, torch.tensor([0]), 0.0)
        ridge = torch.eye(basis.shape[1], dtype=torch.float64) / weighting
        solved = torch.linalg.inv(ridge + left)
        steps = [
            (start, basis[start:stop], (inverse @ part.T).float())
            for (start, stop), part, inverse in zip(places, parts, solved, strict=True)
        ]
        return cls(basis, tuple(steps))

    def codes(self, weight: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """Codes for a weight (rows, columns), in `out` where it is given. Cost: 4 · rows · columns
        · r flops. UsageError for another number of columns.
        """
        _check(weight, self.basis.shape[0])
        total = torch.zeros(weight.shape[0], self.basis.shape[1])
        codes = torch.empty(weight.shape, dtype=grid.book.dtype) if out is None else out
        widths = [len(part) for _, part, _ in self.steps]
        blocks = zip(self.steps, weight.split(widths, 1), codes.split(widths, 1), strict=True)
        for (start, basis, solved), block, chosen in blocks:
            high = max(1, PIECE // len(basis))
            first = 0
            for given, codes_of, sums in zip(
                block.split(high), chosen.split(high), total.split(high), strict=True
            ):
                moved = torch.addmm(given, sums, solved) if start else given
                error = grid.errors(given, moved, codes_of, start, first)
                sums.addmm_(error, basis)
                first += high
        return codes


def subspace(weight: Tensor, grid: Grid, basis: Tensor, weighting: float = WEIGHT) -> Tensor:
    """Codes for weight (rows, columns) that keep ε V small; see `Subspace`."""
    return Subspace.of(basis, grid.group, weighting).codes(weight, grid)


def feedback_factor(gram: Tensor, basis: Tensor | None = None, damping: float = 0.01) -> Tensor:
    """The upper Cholesky factor U of H⁻¹, for `feedback`; gram H = Σ x xᵀ (columns, columns).

    H is divided by its mean diagonal and damped by `damping`; with a basis V (columns, r) of the
    directions of a change, WEIGHT · V Vᵀ is added, so that the change itself survives too.
    UsageError for a gram that is not positive definite.
    """
    columns = gram.shape[0]
    if gram.ndim != 2 or gram.shape[1] != columns:
        raise UsageError(f"gptq rounding: a Gram matrix of shape {list(gram.shape)}, not square.")
    exact = gram.double()
    exact = exact / exact.diagonal().mean() + damping * torch.eye(columns, dtype=torch.float64)
    if basis is not None:
        exact += WEIGHT * basis.double() @ basis.double().T
    lower, failed = torch.linalg.cholesky_ex(exact)
    if failed:
        raise UsageError("gptq rounding: the Gram matrix is not positive definite. Use more data.")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def feedback(weight: Tensor, grid: Grid, factor: Tensor) -> Tensor:
    """GPTQ: codes for weight (rows, columns) that keep tr(ε H εᵀ) small; `factor` U is that of H.

    Column k is rounded, and ε_k / U_kk · U_kj is taken from every column j behind it. UsageError
    for a factor of another size.
    """
    columns = weight.shape[1]
    _check(weight, factor.shape[0])
    work = weight.clone()
    codes = torch.empty(weight.shape, dtype=grid.book.dtype)
    for first in range(0, columns, 128):
        last = min(columns, first + 128)
        errors = torch.empty(weight.shape[0], last - first)
        for k in range(first, last):
            chosen = grid.book.nearest(grid.units(work[:, k : k + 1], k))
            codes[:, k : k + 1] = chosen
            error = (work[:, k] - grid.values(chosen, k)[:, 0]) / factor[k, k]
            errors[:, k - first] = error
            work[:, k + 1 : last].addr_(error, factor[k, k + 1 : last], alpha=-1)
        work[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return codes


def _check(weight: Tensor, columns: int) -> None:
    if weight.shape[1] != columns:
        raise UsageError(
            f"rounding: the weight has {weight.shape[1]} columns, what weighs its errors {columns}."
        )
