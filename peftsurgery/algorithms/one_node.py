"""Adapters that run a linear layer and their change of it in one node of autograd's graph.

On small layers a training step takes the time of its calls, not of its arithmetic, and half of
these are autograd's. The formulas are those of `WeightAdapter`; the gradients are worked out by
hand.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.nodes import by_hand
from .base import WeightAdapter

_PRECISE = (torch.float32, torch.float64)


class OneNode(WeightAdapter):
    """`linear` is the layer with the adapter at strength 1, for an additive adapter or a map on the
    inputs, and for a weight and a bias that are constants.
    """

    sides: ClassVar[tuple[str, ...]] = ("sum",)  # those of `side` with a `linear`
    _number: tuple[Tensor, int, float] | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W'ᵀ + b'; everything of one dtype."""
        raise NotImplementedError

    def joins(self, weight: Tensor, positions: int) -> bool:
        """Whether `linear` is there for this adapter and worth it for so many positions."""
        return True

    def takes(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether `linear` may run: one dtype of full precision, the weight and the bias constants,
        and a gradient by hand allowed.
        """
        dtype = x.dtype
        if not by_hand(x.device) or dtype not in _PRECISE:
            return False
        if weight.requires_grad or weight.dtype != dtype:
            return False
        if bias is not None and (bias.requires_grad or bias.dtype != dtype):
            return False
        for tensor in self._parameters.values():
            if tensor is not None and tensor.dtype != dtype:
                return False
        return True

    @property
    def number(self) -> float:
        """scale as a number, read again only after it changed."""
        scale = self._buffers["scale"]
        assert scale is not None
        known = self._number
        if known is not None and known[0] is scale and known[1] == scale._version:
            return known[2]
        found = float(scale)
        if not scale.is_inference():
            self.__dict__["_number"] = scale, scale._version, found
        return found

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_number": None}
