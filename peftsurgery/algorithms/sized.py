"""Changes whose tensors do not tell the shape of the weight they lie on: what they share."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import CannotFit, CannotFuse, CannotSplit, UsageError
from .base import WeightAdapter
from .slots import bit_equal, shown_shape

if TYPE_CHECKING:
    from typing_extensions import Self


class SizedChange(WeightAdapter):
    """ΔW = scale · (a function of the tensors and of the weight's shape), without looking at W.

    sized    shape of the weight, once it is known; `on` fills it in. The sizes that the tensors do
             not tell are 0 in `shape`, and the change is not additive before they are known:
             `delta(weight)` and `merged(weight)` take them from the weight.

    `frozen` names tensors that belong to the change and are not trained: buffers, copied as options
    are; a constructor leaves them in `_given`.
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    sized: tuple[int, ...] | None

    # --- to be written by each algorithm ----------------------------------------------------------

    def _known(self) -> tuple[int, int]:
        """Check the fields; (rows, columns) of the stored weight, 0 where they do not tell."""
        raise NotImplementedError

    def _admits(self, rows: int, columns: int) -> bool:
        """Whether a weight of this many rows and columns can be changed; sizes that `_known` tells
        agree already."""
        return True

    def _trial(self) -> tuple[int, int]:
        """Rows and columns of some weight that can be changed: to compare two changes on."""
        raise NotImplementedError

    # --- shape ------------------------------------------------------------------------------------

    def _measure(self) -> tuple[int, ...]:
        self._buffers.update(self.__dict__.pop("_given", {}))  # nn.Module has made its room now
        rows, columns = self._known()
        if self.sized is None:
            if self.bias is not None:
                n = self.bias.numel()
                rows, columns = (rows, columns or n) if self._turned else (rows or n, columns)
            return rows, columns
        wide = len(self.sized) > 1 and self.sized[0], math.prod(self.sized[1:])
        good = all(a in (0, b) for a, b in zip((rows, columns), wide, strict=True))
        if not (wide[0] and good and self._admits(*wide)):
            raise UsageError(
                f"{type(self).__name__}: a change of shape {shown_shape((rows, columns))} does "
                f"not fit a weight {list(self.sized)}."
            )
        return self.sized

    @property
    def _turned(self) -> bool:
        """A transformers Conv1D stores its weight (in, out)."""
        return self.stored == "conv1d"

    @property
    def complete(self) -> bool:
        """Whether the change is known without a weight."""
        return all(self._shape)

    @property
    def additive(self) -> bool:
        return self.magnitude is None and self.complete

    def on(self, shape: tuple[int, ...]) -> Self:
        """The same change, of a weight of this shape; UsageError when it does not fit."""
        return self if self.sized == tuple(shape) else self.with_tensors(sized=tuple(shape))

    def beside(self, other: WeightAdapter) -> SizedChange:
        """The same change with the sizes that `other`, a change of the same weight, knows."""
        if self.complete:
            return self
        known = self.shape
        if len(other.shape) > 1:
            if all(other.shape):
                return self.on(other.shape)
            known = tuple(a or b for a, b in zip(known, other.shape, strict=False))
        trial = self._trial()
        if isinstance(other, type(self)):
            trial = tuple(max(pair) for pair in zip(trial, other._trial(), strict=True))
        return self.on(tuple(a or b for a, b in zip(known, trial, strict=True)))

    def same_options(self, other: SizedChange) -> bool:
        """Whether everything besides the trained tensors is equal, the size aside."""
        options = [n for n in self.options if n not in (*self.frozen, "sized")]
        return all(getattr(self, n) == getattr(other, n) for n in options) and all(
            bit_equal(self._buffers[n], other._buffers[n]) for n in self.frozen
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Frozen tensors go where the trained ones go and keep their dtype, which a seed or a file
        says; shared by several adapters, they are shared there too."""
        before = {n: self._buffers.pop(n) for n in self.frozen}
        super()._apply(fn, recurse)
        device = next(t.device for t in self._parameters.values() if t is not None)
        for name, tensor in before.items():
            moved = tensor
            if tensor is not None:
                moved = fn(tensor) if tensor.is_meta else _moved(tensor, device)
            self._buffers[name] = moved
        return self

    def _changes_nothing(self) -> bool:
        return self.magnitude is None and self._is_nothing()

    def nonfinite(self) -> tuple[str, ...]:
        frozen = {n: t for n in self.frozen if (t := self._buffers[n]) is not None}
        bad = tuple(n for n, t in frozen.items() if not bool(torch.isfinite(t).all()))
        return (*super().nonfinite(), *bad)

    # --- the change -------------------------------------------------------------------------------

    def delta(self, weight: Tensor | None = None) -> Tensor:
        if self.complete:
            return super().delta(weight)
        if weight is None:
            raise UsageError(self._unknown("delta"))
        return self._placed(weight, "delta").delta(weight)

    def merged(
        self, weight: Tensor, bias: Tensor | None = None, strength: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        if self.complete:
            return super().merged(weight, bias, strength)
        return self._placed(weight, "merged").merged(weight, bias, strength)

    def _placed(self, weight: Tensor, verb: str) -> Self:
        placed = self.on(self.padded_shape or tuple(weight.shape))
        if not placed.complete:
            raise UsageError(placed._unknown(verb))
        return placed

    def _require_fit(self, target: tuple[int, ...]) -> None:
        if self.complete:
            super()._require_fit(target)
        else:
            self.on(target)

    def _require_additive(self, verb: str) -> None:
        if not self.complete:
            raise UsageError(self._unknown(verb))
        super()._require_additive(verb)

    def _unknown(self, verb: str) -> str:
        return (
            f"{type(self).__name__}.{verb}: the change depends on the weight's shape, and the "
            f"tensors tell {shown_shape(self.shape)}; use on(shape), or pass the weight to delta()."
        )

    # --- rows -------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> WeightAdapter:
        """See `WeightAdapter.rows`."""
        if self.shape[0] == 0:
            raise CannotSplit(
                f"{type(self).__name__} does not tell how many rows it changes, nor where they end"
            )
        return super().rows(start, stop)

    def _cut(self, start: int, stop: int) -> tuple[int, ...] | None:
        """`sized` of rows start:stop."""
        return None if self.sized is None else (stop - start, *self.sized[1:])

    @classmethod
    def fuse(cls, parts: Sequence[WeightAdapter | int]) -> WeightAdapter:
        """See `WeightAdapter.fuse`."""
        if any(not isinstance(p, int) and p.shape[0] == 0 for p in parts):
            raise CannotFuse(
                f"a {cls.__name__} does not tell how many rows it changes; convert it with --base "
                "CHECKPOINT --algorithm lora first"
            )
        return super().fuse(parts)

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        rank: object = None,
        weight: Tensor | None = None,
    ) -> WeightAdapter:
        """CannotFit, unless `source` is of this class already."""
        if isinstance(source, cls):
            return source
        raise CannotFit(
            f"{cls.__name__} reaches only some of all changes and has no projection from a general "
            "one. Those that have: lora, lokr, full."
        )


def dense_of(
    source: WeightAdapter | Tensor, weight: Tensor | None
) -> tuple[Tensor, tuple[int, ...]]:
    """ΔW of a fit's source as a matrix in fp32, and its shape."""
    delta = source.delta(weight) if isinstance(source, WeightAdapter) else source
    if delta.ndim < 2:
        raise CannotFit(
            f"a change of shape {tuple(delta.shape)} has no such form; keep it as a full "
            "difference."
        )
    return delta.detach().float().flatten(1), tuple(delta.shape)


_MOVED: dict[tuple[int, torch.device], tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the same copy for all who ask while anyone holds it."""
    if tensor.device == device:
        return tensor
    key = (id(tensor), device)
    if key in _MOVED:
        source, copy = _MOVED[key]
        found = copy()
        if source() is tensor and found is not None:
            return found
    found = tensor.to(device)
    _MOVED[key] = weakref.ref(tensor), weakref.ref(found)
    return found
