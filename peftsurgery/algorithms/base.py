"""What every adapter algorithm shares: the merge formula, splitting and joining of output rows.

An adapter changes one weight W (o, i, *k) and its bias. It is additive when ΔW does not depend on
W. Factors are oriented to the weight as stored in the file, so no transposes appear in the
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import CannotSplit, UnsupportedError, UsageError
from ..linalg import Chooser, Triplet, core_svd, dense_svd
from .layer import Layer
from .slots import Part, check_parts, fit_shape, fuse_common, pad_to
from .storage import AdapterTensors, Common

if TYPE_CHECKING:
    from typing_extensions import Self

CALL = 1e6  # multiplications that take about as long as the calls a folded weight saves


def is_one(strength: float | Tensor) -> bool:
    """Whether t is the number 1; a tensor is never looked into."""
    return not isinstance(strength, Tensor) and strength == 1


def is_zero(strength: float | Tensor) -> bool:
    """Whether t is the number 0; a tensor is never looked into."""
    return not isinstance(strength, Tensor) and strength == 0


class WeightAdapter(AdapterTensors):
    """One learned change of one weight; see the subclasses for the formula of ΔW.

    Tensors are kept as given (same storage, same dtype) in parameters without gradient; every
    formula casts to fp32. Construction checks the shapes and nothing else; UsageError names the
    field, what it got and what it expected.

    scale           fp32 0-d buffer; multiplies the algorithm's product; alpha / r is resolved.
    magnitude       DoRA (Liu et al. 2024, arXiv 2402.09353), (o,) for axis "out", (i,) for "in":
                    W' = m · (W + ΔW) / ||W + ΔW||, one norm per row, or one per column over rows
                    and kernel.
    bias            change of the bias (o,): a delta with scale, or its value (`bias_is_value`).
    padded_shape    W is zero-padded at the end of each dimension to this shape first.
    stored          how the file names the layer: "linear", "embedding" or "conv1d"; carried only.

    `side` says how a live layer realises the map W -> W' without forming W', on a layer that uses
    its weight as `Layer.apply` does:

    "sum"      y + t · change(x, layer)                ΔW does not look at W
    "input"    the layer run on turned(x, layer, t)    W' = W M
    "output"   mapped(y, layer, bias, t)               W' = M W
    "both"     y + t · (mapped(y', layer, bias, 1) - y), y' the layer run on turned(x, layer, 1)
    "weight"   not at all: the layer is run with W'    W' is no product of W with something

    The three are differentiable in the parameters, get x (y) in the parameters' dtype unless
    autocast is on, and may return any dtype.
    """

    side: ClassVar[str] = "sum"

    # --- to be written by each algorithm ----------------------------------------------------------

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start:stop of the product with scale, before DoRA: (rows, columns)."""
        raise NotImplementedError

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(U, V) with U V = the same product."""
        return None

    def _rows(self, start: int, stop: int, common: Common) -> WeightAdapter:
        raise NotImplementedError

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> WeightAdapter:
        raise NotImplementedError

    @classmethod
    def init(
        cls,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
        stored: str = "linear",
        dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> Self:
        """A fresh trainable adapter of `weight` (its device, `dtype`): ΔW = 0 exactly.

        rank, alpha   scale = alpha / rank; alpha missing is scale 1. `options` are the algorithm's.
        """
        raise UnsupportedError(f"{cls.__name__} cannot be started afresh; attach a file of it.")

    # --- on activations ---------------------------------------------------------------------------

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """layer.apply(x, ΔW), scale included, before any DoRA magnitude; "sum" only. Here through
        the dense ΔW.
        """
        dense = self._dense(self._shape)
        kernel = layer.kernel if layer.kind == "conv" else ()
        if kernel and tuple(dense.shape[2:]) != kernel:
            dense = dense.reshape(dense.shape[0], -1, *kernel)
        return layer.apply(x, dense if layer.kind == "embedding" else dense.to(x.dtype))

    def onto(self, y: Tensor, x: Tensor, layer: Layer, strength: float | Tensor = 1.0) -> Tensor:
        """y + t · change(x, layer) in y's dtype; "sum" only."""
        change = self.change(x, layer)
        if not is_one(strength):
            change = change * strength
        return y + (change if change.dtype == y.dtype else change.to(y.dtype))

    def folds(self, weight: Tensor, positions: int) -> bool:
        """Whether running a layer with `added(weight)` costs less than y + t · change(x, layer),
        for an x of that many positions (products with a row of W); "sum" only. Both are equal up
        to rounding.

        Folding saves the calls behind `change`, and costs forming W + t ΔW and, in the backward
        pass, one product as large as the layer's own for its gradient. Here: where `change` forms
        ΔW anyway, and folding saves a product of the layer's size.
        """
        return type(self).change is WeightAdapter.change

    def added(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """W + t ΔW before any magnitude, differentiable; t = `strength`."""
        dense = self._dense(tuple(weight.shape))
        return weight + (dense if is_one(strength) else strength * dense)

    def turned(self, x: Tensor, layer: Layer, strength: float | Tensor) -> Tensor:
        """x' with layer.apply(x', W) = layer.apply(x, W + t (W M - W)); "input" only."""
        raise UnsupportedError(f"{type(self).__name__} does not act on the layer's input.")

    def mapped(
        self, y: Tensor, layer: Layer, bias: Tensor | None, strength: float | Tensor
    ) -> Tensor:
        """layer.apply(x, W + t (M W - W), bias) from y = layer.apply(x, W, bias); "output" only.

        The bias is not mapped unless the algorithm says so.
        """
        raise UnsupportedError(f"{type(self).__name__} does not act on the layer's output.")

    # --- ΔW ---------------------------------------------------------------------------------------

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW in fp32, scale included, in the shape of `weight` (padded) or in `shape`.

        UsageError when the weight is needed and missing (not additive), or does not fit.
        """
        if not self.additive:
            if weight is None:
                raise UsageError(
                    f"{type(self).__name__}: the change depends on the weight; pass it to delta()."
                )
            base = pad_to(weight.float(), self.padded_shape)
            return self._replacement(base) - base
        target = self._shape if weight is None else (self.padded_shape or tuple(weight.shape))
        return self._dense(target)

    def _require_fit(self, target: tuple[int, ...]) -> None:
        if not fit_shape(self._shape, target):
            raise UsageError(
                f"{type(self).__name__}: a change of shape {self._shape} does not fit a weight "
                f"{target}."
            )

    def _dense(self, target: tuple[int, ...]) -> Tensor:
        self._require_fit(target)
        return self._tile(0, self._shape[0], torch.float32).reshape(target)

    def tile(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of ΔW, (rows, i·k) in fp32, without the rest; additive adapters only."""
        self._require_additive("tile")
        self._check_range(start, stop)
        return self._tile(start, stop, torch.float32)

    def accumulate(self, out: Tensor, start: int, stop: int, strength: float = 1.0) -> Tensor:
        """out += strength · tile(start, stop) in place; out (rows, i·k) fp32. Returns out."""
        return out.add_(self.tile(start, stop), alpha=strength)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(U (o, R), V (R, i·k)) in fp32 with U V = ΔW exactly.

        None when there are none, when R would reach min(o, i·k), or when it is not additive. May
        share storage with the parameters: do not write into them.
        """
        return self._factors(torch.float32) if self.additive else None

    def svd(self, rule: Chooser | None = None) -> Triplet:
        """U (o, k), S (k,), Vh (k, i·k) of ΔW, from factors if there are any; additive only."""
        self._require_additive("svd")
        if bad := self.nonfinite():
            raise UsageError(f"{self._at(bad[0])}: NaN or Inf; no SVD is defined.")
        factors = self._factors(torch.float32)
        if factors is not None:
            return core_svd(*factors, rule)
        return dense_svd(self._tile(0, self._shape[0], torch.float32), rule)

    def _require_additive(self, verb: str) -> None:
        if not self.additive:
            raise UsageError(
                f"{type(self).__name__}.{verb}: the change depends on the weight; use "
                "merged(weight)."
            )

    # --- merging ----------------------------------------------------------------------------------

    def merged(
        self, weight: Tensor, bias: Tensor | None = None, strength: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """(W', b') in fp32: W' = W + t (W_1 - W), b' likewise; t = `strength`, never looked into
        where it is a tensor.

        W_1 = W + ΔW, or m (W + ΔW) / ||W + ΔW|| for DoRA (a zero norm divides by nothing and leaves
        zeros), or the new value. Exactly W at t = 0 and exactly W_1 at t = 1. b' is None when
        neither side has a bias.
        """
        base = pad_to(weight.float(), self.padded_shape)
        if is_zero(strength):
            result = base.clone()
        elif not self.additive:
            full = self._replacement(base)
            result = full if is_one(strength) else base + strength * (full - base)
        elif isinstance(strength, Tensor):
            result = self.added(base, strength)
        else:
            self._require_fit(tuple(base.shape))
            flat = base.reshape(base.shape[0], -1)
            if flat.data_ptr() == weight.data_ptr():  # float() and reshape() did not copy
                flat = flat.clone()
            result = self.accumulate(flat, 0, self._shape[0], strength).reshape(base.shape)
        return result, self._merged_bias(bias, strength)

    def _replacement(self, base: Tensor) -> Tensor:
        """W_1 of an adapter that is not additive; here DoRA."""
        assert self.magnitude is not None
        direction = self.added(base)
        axis = 0 if self.magnitude_axis == "out" else 1
        if direction.ndim < 2 or direction.shape[axis] != self.magnitude.numel():
            raise UsageError(
                f"{self._at('magnitude')}: {self.magnitude.numel()} values do not fit axis "
                f"'{self.magnitude_axis}' of a weight {tuple(base.shape)}."
            )
        shape = [1] * direction.ndim
        shape[axis] = -1
        return direction * self.gain(direction).reshape(shape)

    def gain(self, direction: Tensor) -> Tensor:
        """m / ||V|| along the magnitude's axis, V = W + ΔW; 1 where the norm is zero.

        The norm is a constant in the backward pass, as the paper (section 4.3) and PEFT have it.
        """
        assert self.magnitude is not None
        axis = 0 if self.magnitude_axis == "out" else 1
        others = [d for d in range(direction.ndim) if d != axis]
        with torch.no_grad():
            norm = torch.linalg.vector_norm(direction, dim=others)
            zero = norm == 0
            norm = norm.masked_fill(zero, math.inf)
        return self.magnitude.float() / norm + zero

    def merged_bias(self, bias: Tensor | None, strength: float | Tensor) -> Tensor | None:
        """b' of `merged` alone."""
        return self._merged_bias(bias, strength)

    def _merged_bias(self, bias: Tensor | None, strength: float | Tensor) -> Tensor | None:
        if bias is not None:
            base = bias.float()
            if self.padded_shape is not None:
                base = pad_to(base, (self.padded_shape[self._bias_axis],))
        elif self.bias is None or is_zero(strength):
            return None
        else:
            base = torch.zeros(self.bias.numel(), device=self.bias.device)
        if self.bias is None or is_zero(strength):
            return base.clone()
        if base.shape != self.bias.shape:
            raise UsageError(
                f"{self._at('bias')}: {tuple(self.bias.shape)} does not fit a bias "
                f"{tuple(base.shape)}."
            )
        change = self.bias.float()
        if not self.bias_is_value:
            return base + strength * change
        return change.clone() if is_one(strength) else base + strength * (change - base)

    # --- rows -------------------------------------------------------------------------------------

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self._shape[0]:
            raise UsageError(f"{type(self).__name__}: rows {start}:{stop} of {self._shape[0]}.")

    def rows(self, start: int, stop: int) -> WeightAdapter:
        """The exact restriction to output rows start:stop, sharing storage, or CannotSplit.

        A per-input DoRA cannot be split: its norms run over all rows.
        """
        self._check_range(start, stop)
        if (start, stop) == (0, self._shape[0]):
            return self
        if self.magnitude_axis == "in":
            raise CannotSplit(
                "per-input DoRA: its column norms couple all output rows. Merge it into the "
                "base, or convert with --base and --algorithm lora."
            )
        if self.bias is not None and self._bias_axis:
            raise CannotSplit("a Conv1D's bias belongs to its columns, not to a range of its rows.")
        common = self.common()
        if self.magnitude is not None:
            common["magnitude"] = self.magnitude[start:stop]
        if self.bias is not None:
            common["bias"] = self.bias[start:stop]
        if self.padded_shape is not None:
            common["padded_shape"] = (stop - start, *self.padded_shape[1:])
        return self._rows(start, stop, common)

    @classmethod
    def fuse(cls, parts: Sequence[WeightAdapter | int]) -> WeightAdapter:
        """Join along the output rows; an int is that many untouched rows. Exact, or CannotFuse.

        Equal input sides are stored once, different ones block by block. Unequal scales: the first
        non-zero scale is kept and its ratio to the others goes into their output side, rounded once
        to the widest dtype of the parts. Biases: missing ones are zero deltas. DoRA: per-output
        magnitudes are concatenated.
        """
        slots = check_parts(cls, parts)
        if len(slots) == 1 and slots[0].adapter is not None:
            return slots[0].adapter
        return cls._fuse(slots, Common(**fuse_common(slots)))
