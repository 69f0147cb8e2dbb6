"""HRA, a product of Householder reflections of the inputs (Yuan et al. 2024, arXiv 2405.17484)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CannotFuse, UsageError
from ..linalg import gram_schmidt, householder, householder_linear
from .fresh import refuse_options
from .maps import OTHER_INPUTS, MapAxis, WeightMap, channels_back, channels_last
from .one_node import OneNode
from .slots import Part
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class HRA(OneNode, WeightMap):
    """W_1 = W H, H = Π_{k=1..r} (I - 2 û_k û_kᵀ), û the columns of u at length one.

    u             (i, r); i counts the columns of the flattened weight, kernel included. Columns of
                  zeros reflect nothing
    orthogonal    Gram-Schmidt on the columns first (PEFT apply_GS): H = I - 2 Q Qᵀ
    """

    algorithm = "hra"
    fields = ("u",)
    options = ("orthogonal", "sized")
    sides = ("input",)
    acts_on: MapAxis = "in"
    u: nn.Parameter
    orthogonal: bool

    def __init__(
        self,
        u: Tensor,
        *,
        orthogonal: bool = False,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(orthogonal=orthogonal, sized=sized)
        super().__init__({"u": u}, **common)

    def _known(self) -> tuple[int, ...]:
        self._expect("u", self.u is not None and self.u.ndim == 2, "(in, reflections)")
        return 0, self.u.shape[0]

    def _admits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and math.prod(shape[1:]) == self.u.shape[0]

    def _reflected(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """x H (or x Hᵀ) along the last dimension."""
        u = self.u.to(x.dtype)
        if self.orthogonal:
            return householder(x, gram_schmidt(u), orthonormal=True)
        return householder(x, u, inverse=inverse)

    def _map(self, weight: Tensor) -> Tensor:
        return self._reflected(weight.flatten(1)).reshape(weight.shape)

    def _channels(self, y: Tensor, axis: int, *, transposed: bool) -> Tensor:
        dtype = torch.promote_types(y.dtype, torch.float32)
        turned = self._reflected(channels_last(y, axis).to(dtype), inverse=transposed)
        return channels_back(turned.to(y.dtype), axis)

    def joins(self, weight: Tensor, positions: int) -> bool:
        return not self.orthogonal

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return householder_linear(x, self.u, weight, bias)

    def _changes_nothing(self) -> bool:
        """Neighbouring equal columns cancel, zeros reflect nothing; other products are not the
        identity as far as this looks."""
        columns = [c for c in self.u.detach().unbind(1) if bool((c != 0).any())]
        if self.orthogonal or len(columns) % 2:
            return not columns
        return all(torch.equal(a, b) for a, b in zip(columns[::2], columns[1::2], strict=True))

    @classmethod
    def _joined(cls, parts: Sequence[Part]) -> dict[str, object]:
        live = [p.adapter for p in parts if isinstance(p.adapter, HRA)]
        if len(live) < len(parts) or not all(a.same_map(live[0]) for a in live):
            raise CannotFuse(OTHER_INPUTS)
        return {}

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
        """`rank` reflections in pairs that undo each other, so that H = I to rounding (1e-7) and
        every column has a gradient. UsageError for an odd rank, which has no such start.
        `orthogonal` has none either: Q Qᵀ = 0 needs Q = 0. `alpha` has no meaning here."""
        refuse_options(cls, options)
        if rank is None or rank < 2 or rank % 2:
            raise UsageError(f"HRA: the number of reflections is {rank}; expected an even one.")
        width = math.prod(weight.shape[1:])
        bound = 1 / math.sqrt(rank // 2)  # only the direction matters
        half = torch.empty(width, rank // 2, device=weight.device, dtype=torch.float32)
        half.uniform_(-bound, bound, generator=generator)
        u = nn.Parameter(half.repeat_interleave(2, 1).to(dtype))
        return cls(u, stored=stored, sized=tuple(weight.shape))
