"""Replacement: the new value of a weight or bias (ComfyUI `set_weight`, PEFT `modules_to_save`, BFL
norm scales)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CannotFuse, UsageError
from .base import WeightAdapter, is_one
from .fresh import refuse_options, trainable
from .slots import Part, fit_shape, join
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Replace(WeightAdapter):
    """W_1 = weight, b_1 = bias: ΔW = weight - W, known only beside W. Either may be None, then that
    one stays.

    A value of another shape than the base weight (a grown vocabulary) is accepted at strength 1
    only. No scale.
    """

    algorithm = "set"
    fields = ("weight",)
    side: ClassVar[str] = "weight"
    weight: nn.Parameter | None

    def __init__(self, weight: Tensor | None = None, **common: Unpack[Common]) -> None:
        common.setdefault("bias_is_value", True)
        super().__init__({"weight": weight}, **common)

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
    ) -> Replace:
        """A copy of the weight; rank and alpha mean nothing here. ΔW = 0 when `dtype` holds it."""
        refuse_options(cls, options)
        return trainable(cls(weight.detach().clone(), stored=stored), dtype)

    def _measure(self) -> tuple[int, ...]:
        if not self.bias_is_value:
            raise UsageError("Replace.bias: is a value, not a delta.")
        if float(self.scale) != 1:
            raise UsageError(f"Replace.scale: got {float(self.scale):g}; a value is not scaled.")
        if self.magnitude is not None:
            raise UsageError("Replace.magnitude: a replaced weight has no DoRA magnitude.")
        if self.weight is not None:
            self._expect("weight", self.weight.ndim >= 1, "at least one dimension")
            return tuple(self.weight.shape)
        if self.bias is None:
            raise UsageError("Replace: neither a weight nor a bias.")
        return (self.bias.numel(),)

    @property
    def additive(self) -> bool:
        return False

    @property
    def _has_product(self) -> bool:
        return self.weight is not None

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of the value itself."""
        if self.weight is None:
            return torch.zeros(stop - start, 1, dtype=dtype, device=self.scale.device)
        return self.weight[start:stop].to(dtype).reshape(stop - start, -1)

    def _replacement(self, base: Tensor) -> Tensor:
        return base.clone() if self.weight is None else self._dense(tuple(base.shape))

    def merged(
        self, weight: Tensor, bias: Tensor | None = None, strength: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        if self.weight is not None and is_one(strength) and not fit_shape(self.shape, weight.shape):
            value = self.weight.float().clone() if self.padded_shape is None else None
            if value is not None:
                return value, None if self.bias is None else self.bias.float().clone()
        return super().merged(weight, bias, strength)

    def _rows(self, start: int, stop: int, common: Common) -> Replace:
        return Replace(None if self.weight is None else self.weight[start:stop], **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> Replace:
        live = [p.adapter for p in parts if isinstance(p.adapter, Replace)]
        weights = [a.weight for a in live if a.weight is not None]
        if len(live) < len(parts) or len(weights) not in (0, len(live)):
            raise CannotFuse(
                "a replaced weight beside untouched rows: their values are in the base only."
            )
        if not weights:
            return Replace(None, **common)
        tail = weights[0].shape[1:]
        return Replace(join([w.reshape(w.shape[0], *tail) for w in weights]), **common)
