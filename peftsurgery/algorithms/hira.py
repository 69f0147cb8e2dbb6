"""HiRA, a low-rank change multiplied by the weight (Huang et al., ICLR 2025; PEFT
`tuners/hira`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CannotFit, UsageError
from .base import WeightAdapter
from .lora import LoRA
from .slots import Part
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class HiRA(WeightAdapter):
    """W_1 = W + scale · W ∘ (up @ down), factors as in LoRA."""

    algorithm = "hira"
    fields = ("up", "down")
    side = "weight"
    up: nn.Parameter
    down: nn.Parameter

    def __init__(self, up: Tensor, down: Tensor, **common: Unpack[Common]) -> None:
        super().__init__({"up": up, "down": down}, **common)

    def _measure(self) -> tuple[int, ...]:
        if self.magnitude is not None:
            raise UsageError("HiRA.magnitude: no DoRA is defined on this map.")
        if self._parameters["up"] is None or self._parameters["down"] is None:
            raise UsageError("HiRA: needs both factors, up and down.")
        return LoRA(self.up, self.down).shape

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def additive(self) -> bool:
        return False

    def _changes_nothing(self) -> bool:
        return self._is_nothing()

    def _replacement(self, base: Tensor) -> Tensor:
        self._require_fit(tuple(base.shape))
        up, down = (t.to(base.dtype).flatten(1) for t in (self.up, self.down))
        gain = self.scaled(up) @ down
        return torch.addcmul(base, base, gain if base.ndim == 2 else gain.reshape(base.shape))

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> HiRA:
        return HiRA(self.up[start:stop], self.down, **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> HiRA:
        """The factors are joined as those of LoRAs: untouched rows are multiplied by nothing."""
        live = [
            LoRA(p.adapter.up, p.adapter.down, scale=p.adapter.scale)
            if isinstance(p.adapter, HiRA)
            else None
            for p in parts
        ]
        slots = [Part(a, p.start, p.stop) for a, p in zip(live, parts, strict=True)]
        joined = LoRA._fuse(slots, Common(scale=common.get("scale", 1.0)))
        return HiRA(joined.up, joined.down, **common)

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
        """The factors of a fresh LoRA: W_1 = W exactly. PEFT's has no alpha: scale 1."""
        if options:
            name = next(iter(options))
            raise UsageError(f"HiRA has no option {name!r}.")
        fresh = LoRA.init(
            weight, rank=rank, alpha=alpha, generator=generator, stored=stored, dtype=dtype
        )
        return cls(fresh.up, fresh.down, scale=fresh.scale, stored=stored)

    @classmethod
    def fit(
        cls, source: WeightAdapter | Tensor, rank: object = None, weight: Tensor | None = None
    ) -> HiRA:
        """CannotFit, unless `source` is one already: where the weight is zero nothing changes."""
        if isinstance(source, HiRA):
            return source
        raise CannotFit(
            "HiRA multiplies the weight and has no projection from a general change. Those that "
            "have: lora, full."
        )
