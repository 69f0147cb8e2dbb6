"""AdaLoRA, LoRA in the form of a singular value decomposition (Zhang et al. 2023, arXiv
2303.10512)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg import RankRule, dense_svd
from .base import WeightAdapter
from .fresh import normal, require_rank, trainable
from .layer import Layer
from .sized import dense_of
from .slots import Part, group_by, join, ratio, scaled, stack_rows, widest
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AdaLoRA(WeightAdapter):
    """ΔW = scale · up diag(e) down.

    up      (o, r), the left singular vectors P of the paper
    e       (r, 1), the singular values; a rank that the allocator pruned is 0
    down    (r, i·k), the right singular vectors Q; convolutions flattened, as PEFT has them

    A class of its own, since the budget allocator and the orthogonality regulariser need the three
    factors apart; `LoRA.fit` gives the same change as a LoRA.
    """

    algorithm = "adalora"
    fields = ("up", "e", "down")
    up: nn.Parameter
    e: nn.Parameter
    down: nn.Parameter

    def __init__(self, up: Tensor, e: Tensor, down: Tensor, **common: Unpack[Common]) -> None:
        super().__init__({"up": up, "e": e, "down": down}, **common)

    def _measure(self) -> tuple[int, ...]:
        up, e, down = self._fields()
        self._expect("down", down is not None and down.ndim >= 2, "(rank, in, *kernel)")
        assert down is not None
        r = down.shape[0]
        self._expect("up", up is not None and tuple(up.shape[1:]) == (r,), f"(out, {r})")
        self._expect("e", e is not None and e.numel() == r == e.shape[0], f"({r}, 1)")
        assert up is not None
        return up.shape[0], *down.shape[1:]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def _inner(self, dtype: torch.dtype) -> Tensor:
        """diag(e) down, (r, i·k)."""
        return self.e.to(dtype).reshape(-1, 1) * self.down.to(dtype).flatten(1)

    def _outer(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        scale = float(self.scale)
        up = self.up[start:stop].to(dtype)
        return up if scale == 1 else up * scale

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._outer(start, stop, dtype) @ self._inner(dtype)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.rank >= min(self.matrix_shape):
            return None
        return self._outer(0, self.shape[0], dtype), self._inner(dtype)

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """up (scale · e · down x): r numbers per position in between."""
        gain = self.scale * self.e.reshape(-1)
        if layer.kind == "linear":
            h = F.linear(x, self.down.flatten(1))
            return F.linear(h * gain.to(h.dtype), self.up.to(h.dtype))
        if layer.kind == "hf_conv1d":
            h = x @ self.up
            return (h * gain.to(h.dtype)) @ self.down.to(h.dtype)
        if layer.kind == "embedding":
            h = F.embedding(x, self.up, layer.padding_idx)
            return layer.scaled((h * gain.to(h.dtype)) @ self.down.to(h.dtype))
        if layer.kind == "conv" and layer.groups == 1:
            ones = (1,) * len(layer.kernel)
            point = Layer("conv", ones, (0,) * len(ones), ones, kernel=ones)
            h = layer.convolve(x, self.down.reshape(self.rank, -1, *layer.kernel))
            h = h * gain.to(h.dtype).reshape(-1, *ones)
            return point.convolve(h, self.up.to(h.dtype).reshape(*self.up.shape, *ones))
        return super().change(x, layer)

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> AdaLoRA:
        return AdaLoRA(self.up[start:stop], self.e, self.down, **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> AdaLoRA:
        groups, members = group_by(parts, ("e", "down"))
        owners = [m for m in members if isinstance(m, AdaLoRA)]
        starts = [sum(m.rank for m in owners[:n]) for n in range(len(owners))]
        dtype = widest([m.up for m in owners])
        blocks: list[Tensor | int] = []
        for part in parts:
            if isinstance(part.adapter, AdaLoRA):
                own = part.adapter
                blocks.append(scaled(own.up, ratio(own, common.get("scale", 1.0)), dtype))
            else:
                blocks.append(part.rows)
        up = stack_rows(blocks, [starts[g] if g >= 0 else 0 for g in groups])
        if len(owners) == 1:
            return AdaLoRA(up, owners[0].e, owners[0].down, **common)
        tail = owners[0].down.shape[1:]
        down = join([m.down.reshape(m.rank, *tail) for m in owners])
        return AdaLoRA(up, join([m.e.reshape(-1, 1) for m in owners]), down, **common)

    # --- fresh and fitted -------------------------------------------------------------------------

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
        """up, down ~ N(0, 0.02²), e = 0; scale alpha / (rank + 1e-5) as PEFT has it, whatever the
        allocator prunes later."""
        rank = require_rank(cls, rank, weight, options)
        width = weight[0].numel()
        adapter = cls(
            normal(weight, (weight.shape[0], rank), 0.02, generator),
            torch.zeros(rank, 1, device=weight.device),
            normal(weight, (rank, width), 0.02, generator),
            scale=1.0 if alpha is None else adalora_scale(alpha, rank),
            stored=stored,
        )
        return trainable(adapter, dtype)

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        rank: RankRule | str | int | None = None,
        weight: Tensor | None = None,
    ) -> AdaLoRA:
        """ΔW -> its singular value decomposition, truncated by `rank`, with scale 1; optimal."""
        if isinstance(source, cls) and rank is None:
            return source
        dense, _ = dense_of(source, weight)
        u, s, vh = dense_svd(dense, None if rank is None else RankRule.parse(rank))
        common = source.common() if isinstance(source, WeightAdapter) else Common()
        common.update(scale=1.0, magnitude=None, magnitude_axis=None)
        return cls(u, s[:, None], vh, **common)


def adalora_scale(alpha: float, init_rank: int) -> float:
    """alpha / (r + 1e-5), r the rank before pruning; alpha at most 0 stands for r (PEFT
    `tuners/adalora/layer.py`)."""
    return (alpha if alpha > 0 else float(init_rank)) / (init_rank + 1e-5)
