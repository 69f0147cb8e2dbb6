"""GLoRA (Chavan et al. 2023, arXiv 2306.07967) in the form LyCORIS trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CannotFuse, UsageError
from ..linalg import RankRule
from .base import WeightAdapter
from .fresh import refuse_options
from .lora import LoRA
from .slots import Part, bit_equal
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class GLoRA(WeightAdapter):
    """ΔW = scale · (W a1 a2 + b1 b2), the first product over the input channels at every kernel
    position; with a Tucker core the second is Σ_mn b1[:, m] bm[m, n, *k] b2[n, :].

    a1    (i, r)            a2    (r, i)              kernels of size one may trail
    b1    (o, r)            b2    (r, i, *k)
    bm    None, or (r, r', *k) beside b2 (r', i, 1, …)

    The first generation of files names the factors the other way round; the codec turns them.
    """

    algorithm = "glora"
    fields = ("a1", "a2", "b1", "b2", "bm")
    side = "weight"
    a1: nn.Parameter
    a2: nn.Parameter
    b1: nn.Parameter
    b2: nn.Parameter
    bm: nn.Parameter | None

    def __init__(
        self,
        a1: Tensor,
        a2: Tensor,
        b1: Tensor,
        b2: Tensor,
        bm: Tensor | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__({"a1": a1, "a2": a2, "b1": b1, "b2": b2, "bm": bm}, **common)

    def _measure(self) -> tuple[int, ...]:
        if self.magnitude is not None:
            raise UsageError("GLoRA.magnitude: no DoRA is defined on this map.")
        for name in ("a1", "a2", "b1", "b2"):
            tensor = self._parameters[name]
            self._expect(name, tensor is not None and tensor.ndim >= 2, "a matrix")
        sum_part = LoRA(self.b1.detach(), self.b2.detach(), _detached(self.bm))
        i, r = sum_part.shape[1], self.a2.shape[0]
        flat = all(n == 1 for t in (self.a1, self.a2) for n in t.shape[2:])
        self._expect("a1", tuple(self.a1.shape[:2]) == (i, r) and flat, f"({i}, {r})")
        self._expect("a2", tuple(self.a2.shape[:2]) == (r, i), f"(rank, {i})")
        return sum_part.shape

    @property
    def rank(self) -> int:
        return self.a2.shape[0]

    @property
    def additive(self) -> bool:
        return False

    def _changes_nothing(self) -> bool:
        halves = ((self.a1, self.a2), (self.b1, self.b2))
        return float(self.scale) == 0 or all(
            any(not bool((t != 0).any()) for t in half) for half in halves
        )

    def _product(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """b1 b2 in the weight's shape."""
        b1, b2 = (t.to(dtype).flatten(1) for t in (self.b1, self.b2))
        if self.bm is None:
            return (b1 @ b2).reshape(shape)
        core = self.bm.to(dtype).flatten(2)
        return torch.einsum("mnk,om,ni->oik", core, b1, b2).reshape(shape)

    def _replacement(self, base: Tensor) -> Tensor:
        self._require_fit(tuple(base.shape))
        a1, a2 = (t.to(base.dtype).flatten(1) for t in (self.a1, self.a2))
        channels = base if base.ndim == 2 else base.movedim(1, -1)
        seen = channels @ a1 @ a2
        seen = seen if base.ndim == 2 else seen.movedim(-1, 1)
        change = seen + self._product(base.dtype, tuple(base.shape))
        return base + change * self.scale.to(base.dtype)

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> GLoRA:
        return GLoRA(self.a1, self.a2, self.b1[start:stop], self.b2, self.bm, **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> GLoRA:
        """The same a on all parts; the b halves are joined as LoRAs are."""
        live = [p.adapter for p in parts if isinstance(p.adapter, GLoRA)]
        first = live[0]
        same = all(
            bit_equal(a.a1, first.a1)
            and bit_equal(a.a2, first.a2)
            and float(a.scale) == float(first.scale)
            for a in live
        )
        if len(live) < len(parts) or not same:
            raise CannotFuse(
                "the parts change what the weight reads (a1, a2, alpha) differently, and one "
                "weight has one input"
            )
        joined = LoRA.fuse([LoRA(a.b1.detach(), a.b2.detach(), _detached(a.bm)) for a in live])
        assert isinstance(joined, LoRA)
        r, width = first.rank, joined.rank
        if width != r:  # one rank per module in the file: the a half is padded with zeros
            raise CannotFuse(
                "the parts have different b2, and their joined rank would differ from that of a1"
            )
        return GLoRA(first.a1, first.a2, joined.up, joined.down, joined.mid, **common)

    # --- init and fit -----------------------------------------------------------------------------

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
        """a2 = b2 = 0, a1 and b1 uniform in ±1/√r, as LyCORIS starts: ΔW = 0 exactly."""
        refuse_options(cls, options)
        if rank is None or rank < 1 or weight.ndim < 2:
            raise UsageError(f"GLoRA: no rank-{rank} start for a weight {list(weight.shape)}.")
        o, i, *k = weight.shape
        ones = [1] * len(k)
        place = {"device": weight.device, "dtype": dtype}

        def random(*shape: int) -> nn.Parameter:
            tensor = torch.empty(*shape, device=weight.device)
            tensor.uniform_(-(rank**-0.5), rank**-0.5, generator=generator)
            return nn.Parameter(tensor.to(dtype))

        return cls(
            random(i, rank, *ones),
            nn.Parameter(torch.zeros(rank, i, *ones, **place)),
            random(o, rank, *ones),
            nn.Parameter(torch.zeros(rank, i, *k, **place)),
            scale=1.0 if alpha is None else alpha / rank,
            stored=stored,
        )

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        rank: RankRule | str | int | None = None,
        weight: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> GLoRA:
        """The a half zero and the b half `LoRA.fit`: as exact, and right on any base."""
        if isinstance(source, GLoRA) and rank is None:
            return source
        lora = LoRA.fit(source, rank, weight, dtype=dtype)
        i, r = lora.shape[1], lora.rank
        a1, a2 = lora.down.new_zeros(i, r), lora.down.new_zeros(r, i)
        return cls(a1, a2, lora.up, lora.down, lora.mid, **lora.common())


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
