"""DeLoRA, a low-rank change of bounded norm (Bini, Girrbach & Akata 2025, arXiv 2503.18225; PEFT
`tuners/delora`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from .base import WeightAdapter
from .fresh import kaiming, require_rank, trainable
from .layer import Layer
from .lora import LoRA
from .slots import Part
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

SMALLEST = 1e-4  # norms below it count as this much (PEFT)


class DeLoRA(WeightAdapter):
    """ΔW = (up diag(bound / (r ||up_j|| ||down_j||)) down) ∘ norms, with norms per column: rank one
    terms of the same norm.

    up, down   (o, r), (r, i)
    bound      (1,), lambda
    norms      (i,) column norms of the weight it was trained on, frozen (PEFT `delora_w_norm`)
    """

    algorithm = "delora"
    fields = ("up", "down", "bound", "norms")
    up: nn.Parameter
    down: nn.Parameter
    bound: nn.Parameter
    norms: nn.Parameter

    def __init__(
        self, up: Tensor, down: Tensor, bound: Tensor, norms: Tensor, **common: Unpack[Common]
    ) -> None:
        super().__init__({"up": up, "down": down, "bound": bound, "norms": norms}, **common)
        self.norms.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Of everything but the norms, which belong to the base."""
        super().requires_grad_(requires_grad)
        self.norms.requires_grad_(False)
        return self

    def _measure(self) -> tuple[int, ...]:
        down = self._parameters["down"]
        self._expect("down", down is not None and down.ndim == 2, "(rank, in)")
        r, n = self.down.shape
        self._expect("up", self.up.ndim == 2 and self.up.shape[1] == r, f"(out, {r})")
        self._expect("bound", self.bound.numel() == 1, "one number")
        self._expect("norms", tuple(self.norms.shape) == (n,), f"({n},)")
        return (self.up.shape[0], n)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def _weights(self, dtype: torch.dtype) -> Tensor:
        """What each rank one term is multiplied by, (r,), scale included."""
        up, down = self.up.to(dtype).norm(dim=0), self.down.to(dtype).norm(dim=1)
        product = up.clamp(min=SMALLEST) * down.clamp(min=SMALLEST)
        return self.bound.to(dtype) * (float(self.scale) / self.rank) / product

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        up, down = self.up[start:stop].to(dtype), self.down.to(dtype) * self.norms.to(dtype)
        return (up * self._weights(dtype)) @ down

    def _pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        up = self.up.to(dtype) * self._weights(dtype)
        return up, self.down.to(dtype) * self.norms.to(dtype)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        return self._pair(dtype)

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """r numbers per position in between, on linear layers."""
        if layer.kind != "linear":
            return super().change(x, layer)
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        h = F.linear(x * self.norms.to(x.dtype), down)
        return F.linear(h * self._weights(torch.float32).to(h.dtype), up)

    # --- rows -------------------------------------------------------------------------------------

    def as_lora(self) -> LoRA:
        """The same ΔW in two fp32 factors: the norms of `up` run over all rows, so that a range of
        rows is a LoRA and no DeLoRA."""
        up, down = self._pair(torch.float32)
        return LoRA(up.detach(), down.detach(), **{**self.common(), "scale": 1.0})

    def _rows(self, start: int, stop: int, common: Common) -> WeightAdapter:
        up, down = self._pair(torch.float32)
        return LoRA(up.detach()[start:stop], down.detach(), **{**common, "scale": 1.0})

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> WeightAdapter:
        """As LoRAs: the joined terms are no longer of one norm."""
        live = [p.adapter.as_lora() if isinstance(p.adapter, DeLoRA) else None for p in parts]
        slots = [Part(a, p.start, p.stop) for a, p in zip(live, parts, strict=True)]
        return LoRA._fuse(slots, Common(**{**common, "scale": 1.0}))

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
        bound: float = 15.0,
        **options: object,
    ) -> Self:
        """up = 0, down uniform in ±1/√n, `bound` lambda; the norms are the weight's and do not
        train. `alpha` has no meaning here."""
        rank = require_rank(cls, rank, weight, options)
        if weight.ndim > 2:
            raise UsageError(f"DeLoRA: {list(weight.shape)} is a convolution; it is for matrices.")
        (o, n), flat = weight.shape, weight.detach().float()
        made = cls(
            torch.zeros(o, rank, device=weight.device),
            kaiming(weight, (rank, n), n, generator),
            torch.full((1,), float(bound), device=weight.device),
            flat.norm(dim=0),
            stored=stored,
        )
        return trainable(made, dtype)
