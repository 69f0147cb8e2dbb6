"""LoRA (Hu et al. 2021, arXiv 2106.09685), on convolutions too, and LoCon's Tucker form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CannotFit, CannotFuse, UsageError
from ..linalg import RankRule, dense_svd
from .base import WeightAdapter, is_one
from .fresh import kaiming, require_rank, trainable
from .layer import Layer
from .slots import (
    Part,
    block_diagonal,
    fit_shape,
    group_by,
    join,
    ratio,
    scaled,
    stack_rows,
    widest,
)
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


FEW = 4  # rows looked at first


class LoRA(WeightAdapter):
    """ΔW = scale · up @ down; with a Tucker core: scale · Σ_mn up[:, m] mid[m, n, *k] down[n, :].

    up     (o, r) or (o, r, 1, …)
    down   (r, i), or (r, i, *k) for a convolution, also beside a 2-D up
    mid    None, or (r, r', *k) with down (r', i, 1, …): LyCORIS `lora_mid`
    """

    algorithm = "lora"
    fields = ("up", "down", "mid")
    up: nn.Parameter
    down: nn.Parameter
    mid: nn.Parameter | None

    def __init__(
        self, up: Tensor, down: Tensor, mid: Tensor | None = None, **common: Unpack[Common]
    ) -> None:
        super().__init__({"up": up, "down": down, "mid": mid}, **common)

    def _measure(self) -> tuple[int, ...]:
        up, down, mid = (None if t is None else t.shape for t in self._fields())
        if up is None or down is None or len(down) < 2:
            name, wanted = ("up", "(out, rank)") if up is None else ("down", "(rank, in, *kernel)")
            raise self._mismatch(name, wanted)
        if mid is None:
            if len(up) < 2 or up[1] != down[0] or any(n != 1 for n in up[2:]):
                self._expect("up", False, f"(out, {down[0]}) or (out, {down[0]}, 1, …)")
            return (up[0], *down[1:])
        good = len(up) >= 2 and up[1] == mid[0] and all(n == 1 for n in up[2:])
        self._expect("up", good, f"(out, {mid[0]}) or (out, {mid[0]}, 1, …) beside mid")
        self._expect("mid", len(mid) >= 2 and mid[1] == down[0], f"({up[1]}, {down[0]}, *kernel)")
        self._expect("down", all(n == 1 for n in down[2:]), f"({down[0]}, in, 1, …) beside mid")
        return (up[0], down[1], *mid[2:])

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def _inner(self, dtype: torch.dtype) -> Tensor:
        """The input side (r, i·k)."""
        down = self.down.to(dtype).reshape(self.down.shape[0], -1)
        if self.mid is None:
            return down
        mid = self.mid.to(dtype).flatten(2) if self.mid.ndim > 2 else self.mid.to(dtype)[..., None]
        return torch.einsum("mnk,ni->mik", mid, down).flatten(1)

    def _outer(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of the output side (rows, r), scale included."""
        rows = self.up[start:stop].to(dtype).reshape(stop - start, -1)
        return rows if is_one(self.scale) else rows * self.scale

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._outer(start, stop, dtype) @ self._inner(dtype)

    def accumulate(self, out: Tensor, start: int, stop: int, strength: float = 1.0) -> Tensor:
        self._require_additive("accumulate")
        self._check_range(start, stop)
        outer, inner = self._outer(start, stop, torch.float32), self._inner(torch.float32)
        return out.addmm_(outer, inner, alpha=strength)

    def added(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        self._require_fit(tuple(weight.shape))
        outer = self._outer(0, self._shape[0], weight.dtype)
        if not is_one(strength):
            outer = outer * strength
        flat = weight if weight.ndim == 2 else weight.flatten(1)
        return torch.addmm(flat, outer, self._inner(weight.dtype)).view(weight.shape)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        return self._outer(0, self.shape[0], dtype), self._inner(dtype)

    # --- training ---------------------------------------------------------------------------------

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
        tucker: bool = False,
        **options: object,
    ) -> LoRA:
        """down ~ U(±1/√(i·k)) and up = 0 (PEFT's and Microsoft's default). Embeddings: up (V, r)
        = 0, down ~ N(0, 1). transformers Conv1D: the side that meets x is drawn, the other is 0.

        tucker   the (r, r, *k) core form for kernels larger than 1.
        """
        rank = require_rank(cls, rank, weight, options)
        o, i, *kernel = weight.shape
        ones = (1,) * len(kernel)
        scale = 1.0 if alpha is None else alpha / rank

        def draw(fan: int, *shape: int) -> Tensor:
            return kaiming(weight, shape, fan, generator)

        mid = None
        if stored == "embedding":
            up = torch.zeros(o, rank, device=weight.device)
            down = torch.empty(rank, i, device=weight.device).normal_(generator=generator)
        elif stored == "conv1d":
            up, down = draw(o, o, rank), torch.zeros(rank, i, device=weight.device)
        else:
            up = torch.zeros(o, rank, *ones, device=weight.device)
            if tucker and any(n > 1 for n in kernel):
                down = draw(i, rank, i, *ones)
                mid = draw(rank * torch.Size(kernel).numel(), rank, rank, *kernel)
            else:
                down = draw(i * torch.Size(kernel).numel(), rank, i, *kernel)
        return trainable(cls(up, down, mid, scale=scale, stored=stored), dtype)

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """up (scale · down x): r numbers per position in between. Grouped convolutions: dense."""
        own = self._parameters
        up, down, mid = own["up"], own["down"], own["mid"]
        assert up is not None
        assert down is not None
        if layer.kind == "linear" and mid is None:
            if up.ndim > 2 or down.ndim > 2:
                up, down = up.flatten(1), down.flatten(1)
            h = F.linear(x, down) * self.scale
            return F.linear(h, up if up.dtype == h.dtype else up.to(h.dtype))
        if layer.kind == "embedding" and mid is None:
            h = F.embedding(x, up, layer.padding_idx) * self.scale
            return layer.scaled(h @ down.to(h.dtype))
        if layer.kind == "hf_conv1d" and mid is None:
            h = (x @ up) * self.scale
            return h @ down.to(h.dtype)
        if layer.kind == "conv" and layer.groups == 1:
            return self._convolved(x, layer)
        return super().change(x, layer)

    def _convolved(self, x: Tensor, layer: Layer) -> Tensor:
        ones = (1,) * len(layer.kernel)
        point = Layer("conv", ones, (0,) * len(ones), ones, kernel=ones)
        if self.mid is None:
            h = layer.convolve(x, self.down.reshape(self.down.shape[0], -1, *layer.kernel))
        else:
            h = point.convolve(x, self.down.reshape(*self.down.shape[:2], *ones))
            h = layer.convolve(h, self.mid.reshape(*self.mid.shape[:2], *layer.kernel).to(h.dtype))
        up = self.up.reshape(*self.up.shape[:2], *ones)
        return point.convolve(h * self.scale, up.to(h.dtype))

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> LoRA:
        return LoRA(self.up[start:stop], self.down, self.mid, **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> LoRA:
        live = [p.adapter for p in parts if isinstance(p.adapter, LoRA)]
        if len({a.mid is None for a in live}) > 1:
            raise CannotFuse(
                "a Tucker LoRA beside a plain one: convert with --algorithm lora first."
            )
        groups, members = group_by(parts, ("down", "mid"))
        owners = [m for m in members if isinstance(m, LoRA)]
        widths = [m.up.shape[1] for m in owners]
        starts = [sum(widths[:n]) for n in range(len(widths))]
        dtype = widest([a.up for a in live])
        scale = common.get("scale", 1.0)
        blocks: list[Tensor | int] = []
        for part in parts:
            if isinstance(part.adapter, LoRA):
                blocks.append(scaled(part.adapter.up, ratio(part.adapter, scale), dtype))
            else:
                blocks.append(part.rows)
        up = stack_rows(blocks, [starts[g] if g >= 0 else 0 for g in groups])
        if len(owners) == 1:
            return LoRA(up, owners[0].down, owners[0].mid, **common)
        tail = owners[0].down.shape[1:]
        down = join([m.down.reshape(m.down.shape[0], *tail) for m in owners])
        mid = (
            block_diagonal([m.mid for m in owners if m.mid is not None])
            if owners[0].mid is not None
            else None
        )
        return LoRA(up, down, mid, **common)

    def _live_columns(self, rows: int | None = None) -> Tensor:
        """(r,) bool: columns of up, or of its first rows, that hold anything but zeros."""
        up = self.up.detach()[:rows]
        return (up.reshape(up.shape[0], -1).float() != 0).any(0)

    def compact(self) -> LoRA:
        """Without the rank indices whose column of up is exactly zero; ΔW and scale unchanged, rank
        at least 1.

        In the Tucker form the rows of down that no remaining slice of mid uses go too.
        """
        keep = _indices(self._live_columns())
        if len(keep) == self.up.shape[1]:
            return self
        up = _take(self.up, 1, keep)
        if self.mid is None:
            return self.with_tensors(up=up, down=_take(self.down, 0, keep))
        mid = _take(self.mid, 0, keep)
        used = _indices((mid.transpose(0, 1).flatten(1).float() != 0).any(1))
        return self.with_tensors(up=up, mid=_take(mid, 1, used), down=_take(self.down, 0, used))

    # --- fit --------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        rank: RankRule | str | int | None = None,
        weight: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> LoRA:
        """ΔW -> LoRA. Without a rank the factorisation is exact; with one it is the optimal
        truncation.

        source   an adapter, or a dense ΔW (o, i, *k). Those that look at the weight need `weight`:
                 then ΔW = W_1 - W. For additive ones it only supplies the kernel shape.
        rank     None: the adapter's own factors with scale 1 (a plain LoRA is returned as it is);
                 without factors the SVD down to rounding. A rule: up = U √S, down = √S Vh.
        dtype    of the factors; None is fp32, or unchanged for a LoRA returned as it is.

        Bias, padding and `stored` are carried. CannotFit for 1-D weights and pure bias changes;
        UsageError names a field with NaN or Inf.
        """
        rule = None if rank is None else RankRule.parse(rank)
        common = Common()
        if isinstance(source, WeightAdapter):
            if bad := source.nonfinite():
                raise UsageError(
                    f"{type(source).__name__}.{bad[0]}: NaN or Inf; it cannot be fitted."
                )
            common = source.common()
            common.update(scale=1.0, magnitude=None, magnitude_axis=None)
            if weight is not None:
                target = source.padded_shape or tuple(weight.shape)
                source = source.on(target)
            else:
                target = source.shape
        else:
            target = tuple(source.shape)
        if not fit_shape(tuple(source.shape), target):
            raise UsageError(
                f"a change of shape {tuple(source.shape)} does not fit a weight {target}."
            )
        if len(target) < 2:
            raise CannotFit(
                f"a change of shape {target} has no low-rank form; keep it as a full difference."
            )

        if not isinstance(source, WeightAdapter):
            up, down = _fit_dense(source.flatten(1), rule)
        elif not source.additive:
            up, down = _fit_dense(source.delta(weight).flatten(1), rule)
        elif rule is not None:
            up, down = _balance(*source.svd(rule))
        elif isinstance(source, LoRA) and source.mid is None:
            up, down = source.up, source.down
            common["scale"] = source.scale
            dtype = dtype or widest([up, down])
            if up.dtype == down.dtype == dtype and source.shape == target:
                return source
        elif (factors := source.factors()) is not None:
            up, down = factors
        else:
            up, down = _balance(*_above_rounding(*source.svd()))
        dtype = dtype or torch.float32
        inner, ones = up.shape[1], (1,) * (len(target) - 2)
        up = up.detach().to(dtype).reshape(target[0], inner, *ones)
        return cls(up, down.detach().to(dtype).reshape(inner, *target[1:]), **common)


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist() or [0]


def _take(tensor: Tensor, dim: int, indices: list[int]) -> Tensor:
    """Rows or columns; a view when they are contiguous."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return tensor.detach().narrow(dim, indices[0], len(indices))
    return torch.cat([tensor.detach().narrow(dim, i, 1) for i in indices], dim)


def _balance(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    root = s.sqrt()
    return u * root, root[:, None] * vh


def _above_rounding(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keep = max(1, int((s > torch.finfo(torch.float32).eps * s[0]).sum()))
    return u[:, :keep], s[:keep], vh[:keep]


def _fit_dense(matrix: Tensor, rule: RankRule | None) -> tuple[Tensor, Tensor]:
    triplet = dense_svd(matrix.detach(), rule)
    return _balance(*(triplet if rule else _above_rounding(*triplet)))


def split_blocks(parts: Sequence[LoRA]) -> list[LoRA]:
    """Undo a block-diagonal fusion after its rows were split: each part keeps only its own rank
    indices.

    Done when the parts share one input side and every rank index is used (non-zero column of up) by
    exactly one of them; otherwise the parts come back as they are. ΔW is unchanged either way.
    """
    parts = list(parts)
    if any(p.up.is_meta for p in parts):  # shapes only: nothing is known to be zero
        return parts
    if len(parts) < 2 or len({p.up.shape[1] for p in parts}) > 1:
        return parts
    slots = [Part(p, 0, p.shape[0]) for p in parts]
    if len(group_by(slots, ("down", "mid"))[1]) > 1:
        return parts
    few = torch.stack([p._live_columns(FEW) for p in parts]).sum(0)
    if bool((few > 1).any()):  # a few rows decide for nearly every record that was trained whole
        return parts
    used = torch.stack([p._live_columns() for p in parts]).sum(0)
    if not bool((used == 1).all()):
        return parts
    return [p.compact() for p in parts]
