"""Full difference: the change itself (LyCORIS `diff`, `diff_b`, `w_norm`, `b_norm`; ComfyUI the
same)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .base import WeightAdapter
from .fresh import refuse_options, trainable
from .slots import Part, ratio, scaled, stack_rows, widest
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Full(WeightAdapter):
    """ΔW = scale · diff, diff of the weight's shape, any number of dimensions; None when only the
    bias changes.

    Without diff, `shape` is (o,), the bias's, and `delta(weight)` is zero in the weight's shape.
    """

    algorithm = "full"
    fields = ("diff",)
    diff: nn.Parameter | None

    def __init__(self, diff: Tensor | None = None, **common: Unpack[Common]) -> None:
        super().__init__({"diff": diff}, **common)

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
    ) -> Full:
        """diff = 0, scale 1; rank and alpha mean nothing here."""
        refuse_options(cls, options)
        diff = torch.zeros(weight.shape, device=weight.device)
        return trainable(cls(diff, stored=stored), dtype)

    def _measure(self) -> tuple[int, ...]:
        if self.diff is not None:
            self._expect("diff", self.diff.ndim >= 1, "at least one dimension")
            return tuple(self.diff.shape)
        if self.bias is None:
            raise UsageError("Full: neither a weight nor a bias difference.")
        return (self.bias.numel(),)

    @property
    def _has_product(self) -> bool:
        return self.diff is not None

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self.diff is None:
            return torch.zeros(stop - start, 1, dtype=dtype, device=self.scale.device)
        rows = self.diff[start:stop].to(dtype).reshape(stop - start, -1)
        return rows * self.scale

    def _require_fit(self, target: tuple[int, ...]) -> None:
        if self.diff is not None:
            super()._require_fit(target)
        elif self.shape[0] not in target[:2]:
            raise UsageError(
                f"Full: a bias change of {self.shape[0]} values does not fit a weight {target}."
            )

    def _dense(self, target: tuple[int, ...]) -> Tensor:
        if self.diff is not None:
            return super()._dense(target)
        self._require_fit(target)
        return torch.zeros(target, device=self.scale.device)

    def accumulate(self, out: Tensor, start: int, stop: int, strength: float = 1.0) -> Tensor:
        return out if self.diff is None else super().accumulate(out, start, stop, strength)

    def _is_zero_product(self) -> bool:
        return self.diff is None or super()._is_zero_product()

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        weight: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Full:
        """ΔW -> its dense form, exact up to the rounding to `dtype` (None: fp32). source and weight
        as for `LoRA.fit`; bias, padding and `stored` are carried."""
        dtype = dtype or torch.float32
        if not isinstance(source, WeightAdapter):
            return cls(source.detach().to(dtype))
        return cls(
            source.delta(weight).detach().to(dtype),
            bias=source.bias,
            bias_is_value=source.bias_is_value,
            padded_shape=source.padded_shape,
            stored=source.stored,
        )

    def _rows(self, start: int, stop: int, common: Common) -> Full:
        return Full(None if self.diff is None else self.diff[start:stop], **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> Full:
        diffs = [
            p.adapter.diff
            for p in parts
            if isinstance(p.adapter, Full) and p.adapter.diff is not None
        ]
        if not diffs:
            return Full(None, **common)
        dtype = widest(diffs)
        tail = diffs[0].shape[1:]
        blocks: list[Tensor | int] = []
        for part in parts:
            if isinstance(part.adapter, Full) and part.adapter.diff is not None:
                factor = ratio(part.adapter, common.get("scale", 1.0))
                blocks.append(scaled(part.adapter.diff.reshape(part.rows, -1), factor, dtype))
            else:
                blocks.append(part.rows)
        stacked = stack_rows(blocks, [0] * len(blocks))
        return Full(stacked.reshape(stacked.shape[0], *tail), **common)
