"""(IA)³, one factor per output or per input (Liu et al. 2022, arXiv 2205.05638; PEFT, LyCORIS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CannotFuse, UsageError
from .base import is_one, is_zero
from .fresh import refuse_options
from .maps import OTHER_INPUTS, MapAxis, WeightMap, join_vectors, vector_like
from .slots import Part
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .layer import Layer


class IA3(WeightMap):
    """W_1 = diag(l) W on outputs (rows), or W_1 = W diag(l) on inputs (dimension 1, all kernel
    positions alike); rows and dimension 1 are those of the stored weight.

    vector     n values, any shape: l itself (PEFT, 1 at the start), or
    centred    l - 1 (LyCORIS, 0 at the start)
    on_bias    b_1 = l · b too: PEFT scales what the layer puts out, LyCORIS only the weight
    """

    algorithm = "ia3"
    fields = ("vector",)
    options = ("acts_on", "centred", "on_bias", "sized")
    vector: nn.Parameter
    acts_on: MapAxis
    centred: bool
    on_bias: bool

    def __init__(
        self,
        vector: Tensor,
        *,
        acts_on: MapAxis = "out",
        centred: bool = False,
        on_bias: bool = False,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(acts_on=acts_on, centred=centred, on_bias=on_bias, sized=sized)
        super().__init__({"vector": vector}, **common)

    def _known(self) -> tuple[int, ...]:
        vector = self.vector
        good = vector is not None and vector.numel() == max(vector.shape, default=0)
        self._expect("vector", good, "one dimension larger than one")
        if self.on_bias and self.bias is not None:
            raise UsageError("IA3.bias: the base's bias is scaled; it has no change of its own.")
        n = vector.numel()
        return (n, 0) if self.acts_on == "out" else (0, n)

    def _admits(self, shape: tuple[int, ...]) -> bool:
        axis = 0 if self.acts_on == "out" else 1
        return len(shape) > axis and shape[axis] == self.vector.numel()

    @property
    def row_wise(self) -> bool:
        return True

    def factor(self, dtype: torch.dtype) -> Tensor:
        """l (n,)."""
        vector = self.vector
        if vector.dtype != dtype:
            vector = vector.to(dtype)
        if vector.ndim != 1:
            vector = vector.view(-1)
        return 1 + vector if self.centred else vector

    @property
    def bias_factor(self) -> Tensor | None:
        return self.factor(torch.float32) if self.on_bias else None

    def _merged_bias(self, bias: Tensor | None, strength: float | Tensor) -> Tensor | None:
        factor = self.bias_factor
        if bias is None or factor is None:
            return super()._merged_bias(bias, strength)
        base = bias.float()
        if is_zero(strength):
            return base.clone()
        return factor * base if is_one(strength) else base + strength * (factor * base - base)

    def _map(self, weight: Tensor) -> Tensor:
        axis = 0 if self.acts_on == "out" else 1
        shape = [1] * weight.ndim
        shape[axis] = -1
        return weight * self.factor(weight.dtype).reshape(shape)

    @property
    def side(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        turned = self.stored in ("embedding", "conv1d")
        return "input" if (self.acts_on == "in") != turned else "output"

    def _channels(self, y: Tensor, axis: int, *, transposed: bool) -> Tensor:
        factor = self.factor(y.dtype)
        return y * (factor if axis == -1 else factor.reshape(-1, *[1] * (-1 - axis)))

    def mapped(
        self, y: Tensor, layer: Layer, bias: Tensor | None, strength: float | Tensor
    ) -> Tensor:
        return super().mapped(y, layer, None if self.on_bias else bias, strength)

    def _changes_nothing(self) -> bool:
        return bool((self.vector == (0 if self.centred else 1)).all())

    # --- rows -------------------------------------------------------------------------------------

    def _cut(self, start: int, stop: int) -> dict[str, object]:
        return {"vector": vector_like(self.vector, start, stop)} if self.acts_on == "out" else {}

    @classmethod
    def _joined(cls, parts: Sequence[Part]) -> dict[str, object]:
        live = [p.adapter for p in parts if isinstance(p.adapter, IA3)]
        first = live[0]
        if any(a.acts_on == "in" for a in live):
            if len(live) < len(parts) or not all(a.same_map(first) for a in live):
                raise CannotFuse(OTHER_INPUTS)
            return {}
        if any((a.centred, a.on_bias) != (first.centred, first.on_bias) for a in live):
            raise CannotFuse("the parts follow different conventions (l or l - 1, bias or not)")
        if first.centred and len(live) < len(parts):
            raise CannotFuse("factors stored as l - 1 beside untouched rows")
        return {"vector": join_vectors(parts, "vector")}

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
        acts_on: MapAxis = "out",
        on_bias: bool | None = None,
        **options: object,
    ) -> Self:
        """l = 1 exactly. acts_on: "in" is what PEFT does to feedforward modules; on outputs the
        bias is scaled too unless `on_bias` says otherwise. `rank`, `alpha` have no meaning here."""
        refuse_options(cls, options)
        axis = 0 if acts_on == "out" else 1
        if weight.ndim <= axis:
            raise UsageError(f"IA3: a weight {list(weight.shape)} has no inputs to scale.")
        logical = (acts_on == "out") != (stored == "conv1d")
        shape = [1] * max(weight.ndim, 2)
        shape[(0 if logical else 1) if weight.ndim == 2 else 1] = weight.shape[axis]
        vector = nn.Parameter(torch.ones(shape, device=weight.device, dtype=dtype))
        scaled = logical if on_bias is None else on_bias
        return cls(
            vector, acts_on=acts_on, on_bias=scaled, stored=stored, sized=tuple(weight.shape)
        )
