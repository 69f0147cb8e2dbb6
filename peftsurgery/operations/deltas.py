"""The changes of one weight by several adapters, as merge methods want them: factors, inner
products or row tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from peftsurgery.algorithms import LoRA, WeightAdapter
from peftsurgery.algorithms.slots import bit_equal
from peftsurgery.linalg import low_rank_sum_norm
from peftsurgery.merge_methods import Pair, Stack

GRAM_TILE = 1 << 20  # elements


@dataclass(frozen=True)
class Entry:
    """One adapter's change of one module: its place among the adapters, its file, its weight."""

    index: int
    file: str
    weight: float
    module: WeightAdapter


@dataclass(frozen=True)
class SideBySide:
    """Σ c_i ΔW_i = scale · up @ down, the factors in the number type to be written."""

    up: Tensor  # (o, R)
    down: Tensor  # (R, n)
    scale: float
    size: float  # ||Σ c_i ΔW_i||_F
    lost: float  # ||Σ c_i ΔW_i - scale · up @ down||_F, of the rounding


@dataclass(frozen=True)
class Deltas:
    """Additive changes of one weight of matrix shape `shape`; all of them known without the base.

    Everything is computed on use, from factors wherever an adapter has them.
    """

    path: str
    entries: tuple[Entry, ...]
    total_weight: float  # over all adapters, those without this module too
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i·k)."""
        return self.entries[0].module.matrix_shape

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(entry.weight for entry in self.entries)

    @cached_property
    def factors(self) -> tuple[Pair | None, ...]:
        """(U, V) in fp32 with U V = ΔW, or None for a dense change."""
        return tuple(entry.module.factors() for entry in self.entries)

    def pairs(self) -> list[Pair]:
        """(U, V) of every change in fp64; of a dense one by its SVD."""
        found: list[Pair] = []
        for entry, factors in zip(self.entries, self.factors, strict=True):
            if factors is None:
                u, s, vh = entry.module.svd()
                factors = u * s, vh
            found.append((factors[0].detach().double(), factors[1].detach().double()))
        return found

    def tile(self, source: int, start: int, stop: int) -> Tensor:
        """Rows of one ΔW in fp32, in fresh memory."""
        factors = self.factors[source]
        if factors is None:
            return self.entries[source].module.tile(start, stop).detach().clone()
        return factors[0][start:stop].detach() @ factors[1].detach()

    def stack(self) -> Stack:
        """The same for element-wise methods."""
        indices = tuple(entry.index for entry in self.entries)
        return Stack(
            self.path, self.shape, indices, self.weights, self.total_weight, self.tile, self.seed
        )

    def gram(self) -> Tensor:
        """Frobenius inner products <ΔW_i, ΔW_j> (n, n) in fp64, from factors if all have them."""
        count = len(self.entries)
        result = torch.zeros(count, count, dtype=torch.float64)
        if all(factors is not None for factors in self.factors):
            pairs = self.pairs()
            for i in range(count):
                for j in range(i, count):
                    (u, v), (x, y) = pairs[i], pairs[j]
                    result[i, j] = result[j, i] = ((u.T @ x) * (v @ y.T)).sum()
            return result
        rows, columns = self.shape
        step = max(1, GRAM_TILE // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            flat = torch.stack([self.tile(i, start, stop).double().flatten() for i in range(count)])
            result += flat @ flat.T
        return result

    def concatenated(self, coefficients: Sequence[float]) -> Pair | None:
        """Factors of Σ c_i ΔW_i in fp32: the c_i U_i and the V_i side by side; None when one of the
        changes has no factors. Equal V_i are kept once, their U_i added up.
        """
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        for factors, coefficient in zip(self.factors, coefficients, strict=True):
            if factors is None:
                return None
            if coefficient == 0:
                continue
            left, right = factors[0].detach() * coefficient, factors[1].detach()
            same = [i for i, other in enumerate(rights) if _equal(other, right)]
            if same:
                lefts[same[0]] = lefts[same[0]] + left
            else:
                lefts.append(left)
                rights.append(right)
        if not lefts:
            rows, columns = self.shape
            return torch.zeros(rows, 1), torch.zeros(1, columns)
        return torch.cat(lefts, 1), torch.cat(rights, 0)

    def side_by_side(self, coefficients: Sequence[float], dtype: torch.dtype) -> SideBySide | None:
        """Factors of Σ c_i ΔW_i in `dtype`, block by block without an fp32 copy of the whole.

        With all |c_i s_i| alike, s_i the scales of the LoRAs, that is the scale of the result and
        the factors are the inputs' own numbers; otherwise each up is multiplied by its c_i s_i.
        None when a change is not a plain LoRA, when two share their down, when one does not fit
        `dtype` exactly, and when the sum of the ranks reaches a side.
        """
        live: list[tuple[Tensor, Tensor, float]] = []
        for entry, coefficient in zip(self.entries, coefficients, strict=True):
            module = entry.module
            if not isinstance(module, LoRA) or module.mid is not None:
                return None
            if coefficient != 0:
                up, down = module.up.detach().flatten(1), module.down.detach().flatten(1)
                live.append((up, down, coefficient * float(module.scale)))
        downs = [down for _, down, _ in live]
        rank = sum(down.shape[0] for down in downs)
        if not live or rank >= min(self.shape) or not all(_holds(dtype, d.dtype) for d in downs):
            return None
        if any(bit_equal(a, b) for i, a in enumerate(downs) for b in downs[:i]):
            return None
        sizes = {abs(factor) for _, _, factor in live}
        shared = sizes.pop() if len(sizes) == 1 else 1.0
        up = torch.empty(self.shape[0], rank, dtype=dtype)
        rounded: list[Pair] = []
        column = 0
        for left, right, factor in live:
            place = up[:, column : column + left.shape[1]]
            column += left.shape[1]
            if abs(factor) == shared and _holds(dtype, left.dtype):
                torch.mul(left, math.copysign(1.0, factor), out=place)
                continue
            exact = left.float() * (factor / shared)
            gap = exact - place.copy_(exact).float()
            if bool(gap.any()):
                rounded.append((gap, right))
        pairs = [(left.float() * (factor / shared), right.float()) for left, right, factor in live]
        lost = low_rank_sum_norm([(gap, right.float()) for gap, right in rounded])
        size = low_rank_sum_norm(pairs)
        return SideBySide(up, torch.cat(downs).to(dtype), shared, shared * size, shared * lost)

    def summed(self, coefficients: Sequence[float]) -> Tensor:
        """Σ c_i ΔW_i, dense in fp32."""
        rows, columns = self.shape
        result = torch.zeros(rows, columns)
        for source, coefficient in enumerate(coefficients):
            if coefficient != 0:
                self.entries[source].module.accumulate(result, 0, rows, coefficient)
        return result.detach()


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one number type is one of the other."""
    return narrow == wide or (wide == torch.float32 and narrow in (torch.float16, torch.bfloat16))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def length(matrix: Tensor) -> float:
    """||M||_F, summed in fp64."""
    return math.sqrt(float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2)
