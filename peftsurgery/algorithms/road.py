"""RoAd, 2-D rotations of outputs (Liao & Monz 2024, arXiv 2409.00119; PEFT `tuners/road`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CannotFuse, UsageError
from .base import is_one, is_zero
from .fresh import refuse_options
from .maps import MapAxis, WeightMap, between_blocks
from .slots import Part, join
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .layer import Layer

PER_ROW = {1: 0.5, 2: 1.0, 4: 2.0}  # numbers of each kind per output, by variant


class RoAd(WeightMap):
    """W_1 = R W, b_1 = R b. Outputs j and j + g/2 of each group of g are one pair:

        (R y)_j       = c_j y_j             - s_j y_{j+g/2}
        (R y)_{j+g/2} = c_{j+g/2} y_{j+g/2} + s_{j+g/2} y_j

    with c = radius cos theta and s = radius sin theta.

    theta, radius   (n,) each; `variant` is how many of each a pair has (PEFT's road_1, 2, 4):
                    1  one for both outputs, n = o/2: a rotation and a scale
                    2  one per output, n = o
                    4  one per output and term, n = 2 o: of each group first g for c, then g for s
    group           g, even, dividing o
    """

    algorithm = "road"
    fields = ("theta", "radius")
    options = ("variant", "group", "sized")
    acts_on: MapAxis = "out"
    theta: nn.Parameter
    radius: nn.Parameter
    variant: int
    group: int

    def __init__(
        self,
        theta: Tensor,
        radius: Tensor,
        *,
        variant: int,
        group: int,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(variant=variant, group=group, sized=sized)
        super().__init__({"theta": theta, "radius": radius}, **common)

    def _known(self) -> tuple[int, ...]:
        if self.variant not in PER_ROW or self.group < 2 or self.group % 2:
            raise UsageError(
                f"RoAd: variant {self.variant} with groups of {self.group}; expected variant 1, 2 "
                "or 4 and an even group."
            )
        if self.stored != "linear":
            raise UsageError(
                "RoAd: rotates outputs, and the rows of an embedding or a transformers Conv1D are "
                "none."
            )
        rows = int(self.theta.numel() / PER_ROW[self.variant])
        good = self.theta.ndim == 1 and rows > 0 and rows % self.group == 0
        self._expect("theta", good, f"one dimension, whole groups of {self.group} outputs")
        self._expect("radius", self.radius.shape == self.theta.shape, f"{tuple(self.theta.shape)}")
        if self.bias is not None:
            raise UsageError("RoAd.bias: the base's bias is rotated; it has no change of its own.")
        return (rows, 0)

    def _admits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and shape[0] == self._known()[0]

    def columns(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(c, s), (o,) each."""
        theta, radius = self.theta.to(dtype), self.radius.to(dtype)
        if self.variant == 4:
            theta, radius = (t.reshape(-1, 2, self.group) for t in (theta, radius))
            c, s = radius[:, 0] * theta[:, 0].cos(), radius[:, 1] * theta[:, 1].sin()
            return c.reshape(-1), s.reshape(-1)
        c, s = radius * theta.cos(), radius * theta.sin()
        if self.variant == 2:
            return c, s
        halves = (c, s)
        half = self.group // 2
        c, s = (t.reshape(-1, 1, half).expand(-1, 2, -1).reshape(-1) for t in halves)
        return c, s

    def _rotate(self, y: Tensor, *, transposed: bool) -> Tensor:
        """R y, or Rᵀ y, along the last dimension."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        c, s = (t.to(y.dtype) for t in self.columns(dtype))
        first, second = (
            (y * s if transposed else y).reshape(*y.shape[:-1], -1, 2, self.group // 2).unbind(-2)
        )
        pair = (second, -first) if transposed else (-second, first)
        crossed = torch.stack(pair, -2).reshape(y.shape)
        return y * c + (crossed if transposed else crossed * s)

    def _map(self, weight: Tensor) -> Tensor:
        return self._rotate(weight.flatten(1).T, transposed=False).T.reshape(weight.shape)

    def _channels(self, y: Tensor, axis: int, *, transposed: bool) -> Tensor:
        return self._rotate(y.movedim(axis, -1), transposed=transposed).movedim(-1, axis)

    def _changes_nothing(self) -> bool:
        c, s = self.columns(torch.float32)
        return bool((c == 1).all()) and not bool((s != 0).any())

    # --- bias -------------------------------------------------------------------------------------

    @property
    def maps_bias(self) -> bool:
        return True

    def _merged_bias(self, bias: Tensor | None, strength: float | Tensor) -> Tensor | None:
        if bias is None:
            return None
        base = bias.float()
        if is_zero(strength):
            return base.clone()
        turned = self._rotate(base, transposed=False)
        return turned if is_one(strength) else base + strength * (turned - base)

    def mapped(
        self, y: Tensor, layer: Layer, bias: Tensor | None, strength: float | Tensor
    ) -> Tensor:
        return super().mapped(y, layer, None, strength)

    # --- rows -------------------------------------------------------------------------------------

    def _cut(self, start: int, stop: int) -> dict[str, object]:
        between_blocks("RoAd", self.group, start, stop, self.shape[0])
        low, high = (int(n * PER_ROW[self.variant]) for n in (start, stop))
        return {"theta": self.theta[low:high], "radius": self.radius[low:high]}

    @classmethod
    def _joined(cls, parts: Sequence[Part]) -> dict[str, object]:
        live = [p.adapter for p in parts if isinstance(p.adapter, RoAd)]
        first = live[0]
        if any((a.variant, a.group) != (first.variant, first.group) for a in live):
            raise CannotFuse("the parts have other variants or groups of other sizes")
        thetas: list[Tensor] = []
        radii: list[Tensor] = []
        for part in parts:
            if isinstance(part.adapter, RoAd):
                thetas.append(part.adapter.theta)
                radii.append(part.adapter.radius)
                continue
            if part.rows % first.group:
                raise CannotFuse(
                    f"{part.rows} untouched rows are no multiple of the group of {first.group}"
                )
            count = int(part.rows * PER_ROW[first.variant])
            thetas.append(first.theta.new_zeros(count))
            radii.append(first.radius.new_ones(count))
        return {"theta": join(thetas), "radius": join(radii)}

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
        variant: int = 1,
        group: int = 64,
        **options: object,
    ) -> Self:
        """theta = 0, radius = 1: R = I exactly. `rank`, `alpha` have no meaning here."""
        refuse_options(cls, options)
        if weight.ndim < 2 or variant not in PER_ROW or group < 2 or group % 2:
            raise UsageError(
                f"RoAd: no start of variant {variant} in groups of {group} for a weight "
                f"{list(weight.shape)}."
            )
        if weight.shape[0] % group:
            raise UsageError(
                f"RoAd: {weight.shape[0]} outputs do not divide into groups of {group}."
            )
        count = int(weight.shape[0] * PER_ROW[variant])
        place = {"device": weight.device, "dtype": dtype}
        return cls(
            nn.Parameter(torch.zeros(count, **place)),
            nn.Parameter(torch.ones(count, **place)),
            variant=variant,
            group=group,
            stored=stored,
            sized=tuple(weight.shape),
        )
