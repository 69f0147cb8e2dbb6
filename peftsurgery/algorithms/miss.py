"""MiSS, one shard repeated along the inputs, and its block-affine form Bat (Kang and Yin 2024,
arXiv 2409.15371; the method was called Bone before)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CannotFuse, CannotSplit, UsageError
from .base import WeightAdapter, is_one
from .fresh import require_rank, trainable
from .layer import Layer, add_product
from .maps import MapAxis, WeightMap
from .sized import SizedChange, dense_of
from .slots import Part, bit_equal, ratio, scaled, widest
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class MiSS(SizedChange):
    """ΔW[p, q] = scale · block[q mod r, p mod m], for any number of inputs.

    block    (r, m); m is the number of outputs, or divides it (PEFT init_weights="mini")
    mini     whether m may be less than the outputs: then their number is not known
    """

    algorithm = "miss"
    fields = ("block",)
    options = ("mini", "sized")
    block: nn.Parameter
    mini: bool

    def __init__(
        self,
        block: Tensor,
        *,
        mini: bool = False,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(mini=mini, sized=sized)
        super().__init__({"block": block}, **common)

    def _known(self) -> tuple[int, int]:
        self._expect("block", self.block is not None and self.block.ndim == 2, "(rank, outputs)")
        return (0 if self.mini else self.block.shape[1]), 0

    def _admits(self, rows: int, columns: int) -> bool:
        return rows % self.block.shape[1] == 0

    def _trial(self) -> tuple[int, int]:
        return self.block.shape[1], 2 * self.block.shape[0] + 1

    @property
    def rank(self) -> int:
        return self.block.shape[0]

    def _spread(self, dtype: torch.dtype) -> Tensor:
        """(r, o): the block for every output."""
        return self.block.to(dtype).repeat(1, self.shape[0] // self.block.shape[1])

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        rows = self._spread(dtype)[:, start:stop].T * float(self.scale)
        columns = self.matrix_shape[1]
        return rows.repeat(1, -(-columns // self.rank))[:, :columns]

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.rank >= min(self.matrix_shape):
            return None
        columns = self.matrix_shape[1]
        eye = torch.eye(self.rank, dtype=dtype, device=self.block.device)
        inner = eye.repeat(1, -(-columns // self.rank))[:, :columns]
        return self._spread(dtype).T * float(self.scale), inner

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """The inputs summed r apart, then one (r, m) product."""
        if layer.kind != "linear":
            return super().change(x, layer)
        h = self._sums(x)
        h = (h @ self.scaled(self.block).to(h.dtype)).view(*x.shape[:-1], -1)
        times = self.shape[0] // self.block.shape[1]
        return h if times == 1 else h.repeat(*[1] * (h.ndim - 1), times)

    def onto(self, y: Tensor, x: Tensor, layer: Layer, strength: float | Tensor = 1.0) -> Tensor:
        block = self.block
        if layer.kind != "linear" or not is_one(strength) or block.shape[1] != self._shape[0]:
            return super().onto(y, x, layer, strength)
        return add_product(y, self._sums(x), self.scaled(block))

    def _sums(self, x: Tensor) -> Tensor:
        """(positions, r): inputs r apart added up."""
        rank, columns = self.block.shape[0], x.shape[-1]
        padded = x if columns % rank == 0 else F.pad(x, (0, -columns % rank))
        return padded.reshape(-1, -(-columns // rank), rank).sum(1)

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> MiSS:
        m = self.block.shape[1]
        sized = self._cut(start, stop)
        if self.mini and not (start % m or stop % m):
            return MiSS(self.block, mini=True, sized=sized, **common)
        place = torch.arange(start, stop, device=self.block.device) % m
        block = self.block[:, start:stop] if m == self.shape[0] else self.block[:, place]
        return MiSS(block, sized=sized, **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> MiSS:
        live = [p.adapter for p in parts if isinstance(p.adapter, MiSS)]
        first, scale = live[0], common.get("scale", 1.0)
        sized = None if first.sized is None else (parts[-1].stop, *first.sized[1:])
        if any(a.rank != first.rank for a in live):
            raise CannotFuse("MiSS shards of different ranks; convert with --algorithm lora")
        same = all(ratio(a, scale) == 1 and bit_equal(a.block, first.block) for a in live)
        if same and all(a.mini for a in live) and len(live) == len(parts):
            return MiSS(first.block, mini=True, sized=sized, **common)
        dtype = widest([a.block for a in live])
        pieces: list[Tensor] = []
        for part in parts:
            own = part.adapter
            if isinstance(own, MiSS):
                spread = own.block.repeat(1, part.rows // own.block.shape[1])
                pieces.append(scaled(spread, ratio(own, scale), dtype))
            else:
                pieces.append(first.block.new_zeros(first.rank, part.rows, dtype=dtype))
        return MiSS(torch.cat(pieces, 1), sized=sized, **common)

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
        mini: int | None = None,
        **options: object,
    ) -> Self:
        """block = 0. mini: m, which divides the outputs (PEFT mini_r); None: all outputs. alpha
        has no meaning here."""
        rank = require_rank(cls, rank, weight, options)
        width = weight.shape[0] if mini is None else mini
        if rank > weight[0].numel() or width < 1 or weight.shape[0] % width:
            raise UsageError(
                f"MiSS: rank {rank} and {width} shared outputs do not fit a weight "
                f"{list(weight.shape)}."
            )
        block = torch.zeros(rank, width, device=weight.device)
        adapter = cls(block, mini=mini is not None, sized=tuple(weight.shape), stored=stored)
        return trainable(adapter, dtype)

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        rank: int,
        weight: Tensor | None = None,
    ) -> MiSS:
        """ΔW -> the nearest MiSS in the Frobenius norm: the mean over the columns that share a row
        of the block, with scale 1."""
        dense, shape = dense_of(source, weight)
        if not 1 <= rank <= dense.shape[1]:
            raise UsageError(f"MiSS: rank {rank} of a weight {list(shape)}.")
        place = torch.arange(dense.shape[1], device=dense.device) % rank
        sums = dense.new_zeros(rank, dense.shape[0]).index_add(0, place, dense.T)
        common = source.common() if isinstance(source, WeightAdapter) else Common()
        common.update(scale=1.0, magnitude=None, magnitude_axis=None)
        return cls(sums / place.bincount()[:, None], sized=shape, **common)


class Bat(WeightMap):
    """W_1 = W + W_kc D_k + D_k in every r x r block, k its place among the outputs, c among the
    inputs (PEFT MiSS and Bone with init_weights="bat").

    block    (o / r, r, r)
    """

    algorithm = "bat"
    fields = ("block",)
    options = ("sized",)
    acts_on: MapAxis = "out"
    block: nn.Parameter

    def __init__(
        self,
        block: Tensor,
        *,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(sized=sized)
        super().__init__({"block": block}, **common)

    def _known(self) -> tuple[int, ...]:
        good = self.block is not None and self.block.ndim == 3
        good = good and self.block.shape[1] == self.block.shape[2]
        self._expect("block", good, "(out / r, r, r)")
        return self.block.shape[0] * self.block.shape[1], 0

    def _admits(self, shape: tuple[int, ...]) -> bool:
        known = len(shape) > 1 and shape[0] == self.block.shape[0] * self.block_size
        return known and torch.Size(shape[1:]).numel() % self.block_size == 0

    @property
    def block_size(self) -> int:
        return self.block.shape[1]

    @property
    def side(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "weight"

    def _map(self, weight: Tensor) -> Tensor:
        r, block = self.block_size, self.block.to(weight.dtype)[:, None]
        parts = weight.reshape(block.shape[0], r, -1, r).transpose(1, 2)  # (o / r, i / r, r, r)
        moved = parts + parts @ block + block
        return moved.transpose(1, 2).reshape(weight.shape)

    def _changes_nothing(self) -> bool:
        return not bool((self.block != 0).any())

    def _cut(self, start: int, stop: int) -> dict[str, object]:
        r = self.block_size
        if start % r or stop % r:
            raise CannotSplit(
                f"Bat mixes {r} neighbouring outputs, and rows {start}:{stop} of {self.shape[0]} "
                "cut such a block in two"
            )
        return {"block": self.block[start // r : stop // r]}

    @classmethod
    def _joined(cls, parts: Sequence[Part]) -> dict[str, object]:
        live = [p.adapter for p in parts if isinstance(p.adapter, Bat)]
        r = live[0].block_size
        if any(a.block_size != r for a in live) or any(p.rows % r for p in parts):
            raise CannotFuse("the parts are not made of blocks of one size")
        dtype = widest([a.block for a in live])
        pieces = [
            p.adapter.block.detach().to(dtype)
            if isinstance(p.adapter, Bat)
            else live[0].block.new_zeros(p.rows // r, r, r, dtype=dtype)
            for p in parts
        ]
        return {"block": torch.cat(pieces)}

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
        """block = 0; `rank` is r and divides both sides of the weight. alpha has no meaning
        here."""
        rank = require_rank(cls, rank, weight, options)
        if weight.shape[0] % rank or weight[0].numel() % rank:
            raise UsageError(f"Bat: r {rank} does not divide a weight {list(weight.shape)}.")
        block = torch.zeros(weight.shape[0] // rank, rank, rank, device=weight.device)
        return trainable(cls(block, sized=tuple(weight.shape), stored=stored), dtype)
