"""One tensor of a whole checkpoint, combined: the fine-tunes' changes of it as row tiles, and the
rows of the result in the number type that is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.merge_methods import (
    Chosen,
    Coefficients,
    Elementwise,
    Method,
    Pair,
    Spectral,
    Stack,
)
from peftsurgery.merge_methods.base import TileFunction
from peftsurgery.operations.inputs import DENSE
from peftsurgery.operations.rounding import Survival, survival_of
from peftsurgery.operations.strengths import Strength


@dataclass
class Job:
    """One combination: the files, what is done to every tensor, and what has come of it."""

    base: Checkpoint
    tuned: Sequence[Checkpoint]
    strengths: Sequence[Strength]
    method: Method
    options: Chosen
    seed: int
    dtype: str | None
    survival: Survival = field(default_factory=Survival)
    touched: int = 0
    ready: dict[str, TileFunction] = field(default_factory=dict)  # tensors already prepared

    def stack(self, name: str) -> Stack:
        """The changes of one stored tensor as a matrix (rows, all behind them)."""
        origin = self.base[name]
        weights = [strength.of(name, None) for strength in self.strengths]
        live = [i for i, weight in enumerate(weights) if weight != 0]

        def read(source: int, start: int, stop: int) -> Tensor:
            tuned = rows_of(self.tuned[live[source]][name], start, stop)
            change = tuned.to(torch.float32, copy=True).sub_(rows_of(origin, start, stop))
            if not bool(torch.isfinite(change).all()):
                raise UsageError(
                    f"{self.tuned[live[source]].source}: {name!r}: the change holds NaN or Inf; it "
                    "cannot be combined."
                )
            return change

        return Stack(
            name,
            matrix_shape(origin),
            tuple(live),
            tuple(weights[i] for i in live),
            sum(weights),
            read,
            self.seed,
        )

    def prepare(self, name: str) -> TileFunction:
        """The function that gives rows of the combined change of one tensor."""
        stack = self.stack(name)
        if not stack.count:
            return lambda start, stop: torch.zeros(stop - start, stack.shape[1])
        self.method.check_weights(stack.weights)
        if isinstance(self.method, Elementwise):
            return self.method.run(stack, self.options)
        if isinstance(self.method, Spectral):
            return _spectral(stack, self.method, self.options)
        assert isinstance(self.method, Coefficients)
        gram = _gram(stack) if self.method.name != "linear" else torch.zeros(0, 0)
        return _sum(stack, self.method.run(gram, stack.weights, stack.total_weight, self.options))

    def middle(self, name: str) -> tuple[int, int]:
        """The rows of a tensor that the proof looks at."""
        spans = list(self.stack(name).spans())
        return spans[len(spans) // 2]

    def settle(self, name: str) -> None:
        """A tensor is written: of a result that is held whole, keep what the proof looks at."""
        if isinstance(self.method, Spectral):
            rows = self.ready[name](*self.middle(name)).clone()
            self.ready[name] = lambda start, stop: rows

    def output_dtype(self, tensor: LazyTensor) -> str:
        """The safetensors dtype a tensor is written in."""
        return self.dtype if self.dtype and tensor.dtype in DENSE else tensor.dtype

    def written(self, name: str, change: Tensor, start: int, stop: int) -> tuple[Tensor, Survival]:
        """Rows of the result in the output's number type. CheckFailed when they do not fit it."""
        origin = self.base[name]
        raw = rows_of(origin, start, stop)
        dtype = torch_dtype(self.output_dtype(origin))
        assert dtype is not None
        if not bool(change.any()):
            return raw.to(dtype, copy=True), Survival()
        before = raw.float()
        exact = before + change
        rounded = exact.to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise CheckFailed(
                f"{name!r}: the result does not fit {self.output_dtype(origin)}; nothing was kept. "
                "Write --dtype bf16 or fp32."
            )
        return rounded, survival_of(exact, before, rounded)


def matrix_shape(tensor: LazyTensor) -> tuple[int, int]:
    """(rows, everything behind them); (1, 1) for a scalar, (n, 1) for a vector."""
    shape = tuple(tensor.shape)
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def rows_of(tensor: LazyTensor, start: int, stop: int) -> Tensor:
    """Rows of a stored tensor as a matrix, in its own number type."""
    part = tensor.rows(start, stop) if tensor.shape else tensor
    return part.torch().reshape(stop - start, -1)


def _sum(stack: Stack, numbers: Sequence[float]) -> TileFunction:
    """Σ c_i ΔW_i, row tile by row tile."""

    def tile(start: int, stop: int) -> Tensor:
        result = stack.read(0, start, stop).mul_(numbers[0])
        for source in range(1, stack.count):
            result.add_(stack.read(source, start, stop), alpha=numbers[source])
        return result

    return tile


def _spectral(stack: Stack, method: Spectral, options: Chosen) -> TileFunction:
    """A method on singular vectors: the changes as whole matrices in fp64, those that are zero left
    out. A vector has no spectrum: its weighted sum, times λ.
    """
    if min(stack.shape) == 1:
        return _sum(stack, [options.number("scale") * weight for weight in stack.weights])
    found = [(pair, w) for i, w in enumerate(stack.weights) if (pair := _as_pair(stack, i))]
    if not found:
        return lambda start, stop: torch.zeros(stop - start, stack.shape[1])
    left, right = method.run([pair for pair, _ in found], [w for _, w in found], options)
    whole = (left @ right).float()
    return lambda start, stop: whole[start:stop]


def _as_pair(stack: Stack, source: int) -> Pair | None:
    """A change as the product of itself and the unit matrix of its shorter side; None if zero."""
    change = stack.dense(lambda start, stop: stack.read(source, start, stop)).double()
    if not bool(change.any()):
        return None
    unit = torch.eye(min(change.shape), dtype=change.dtype)
    return (unit, change) if change.shape[0] <= change.shape[1] else (change, unit)


def _gram(stack: Stack) -> Tensor:
    """Frobenius inner products of the changes, fp64."""
    result = torch.zeros(stack.count, stack.count, dtype=torch.float64)
    for start, stop in stack.spans():
        parts = [stack.read(i, start, stop).double().flatten() for i in range(stack.count)]
        flat = torch.stack(parts)
        result += flat @ flat.T
    return result
