"""Algorithms whose new weight is a function of the old one, W_1 = M(W): what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import CannotFit, CannotFuse, CannotSplit, UsageError
from .base import WeightAdapter, is_one
from .slots import Part, bit_equal, shown_shape
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self

    from .layer import Layer

MapAxis = Literal["in", "out"]


class WeightMap(WeightAdapter):
    """W_1 = M(W), linear in W; no scale, no magnitude.

    Such tensors often tell one side of the weight only. The unknown sizes are 0 in `shape`; `on`
    fills them in. Inputs are the dimensions of the stored weight behind the first.

    sized    full shape of the weight, once it is known.

    A map on the inputs acts on every row alike: any range of rows, and every weight that reads the
    same input, has the same map. One on the outputs mixes rows and is split only between blocks.
    """

    sized: tuple[int, ...] | None
    acts_on: MapAxis

    # --- to be written by each algorithm ----------------------------------------------------------

    def _known(self) -> tuple[int, ...]:
        """Check the fields; the shape of the weight, 0 where they do not tell."""
        raise NotImplementedError

    def _admits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be mapped."""
        raise NotImplementedError

    def _map(self, weight: Tensor) -> Tensor:
        """M(W) in W's dtype and shape."""
        raise NotImplementedError

    def _changes_nothing(self) -> bool:
        raise NotImplementedError

    def _cut(self, start: int, stop: int) -> dict[str, object]:
        """The fields and options of rows start:stop; CannotSplit with the reason."""
        return {}

    @classmethod
    def _joined(cls, parts: Sequence[Part]) -> dict[str, object]:
        """The fields and options of the joined map; CannotFuse with the reason."""
        raise NotImplementedError

    # --- shape ------------------------------------------------------------------------------------

    def _measure(self) -> tuple[int, ...]:
        if float(self.scale) != 1:
            name = type(self).__name__
            raise UsageError(f"{name}.scale: got {float(self.scale):g}; the map is not scaled.")
        if self.magnitude is not None:
            raise UsageError(f"{type(self).__name__}.magnitude: no DoRA is defined on this map.")
        known = self._known()
        if self.sized is None:
            return known if known[0] or self.bias is None else (self.bias.numel(), *known[1:])
        if not self._admits(self.sized):
            raise UsageError(
                f"{type(self).__name__}: a map of weights of shape {shown_shape(known)} does "
                f"not fit a weight {list(self.sized)}."
            )
        return self.sized

    def on(self, shape: tuple[int, ...]) -> Self:
        """The same map, of a weight of this shape; UsageError when it does not fit."""
        return self if self.sized == tuple(shape) else self.with_tensors(sized=tuple(shape))

    @property
    def additive(self) -> bool:
        return False

    @property
    def row_wise(self) -> bool:
        return self.acts_on == "in"

    # --- merging ----------------------------------------------------------------------------------

    def _replacement(self, base: Tensor) -> Tensor:
        self._require_fit(tuple(base.shape))
        return self._map(base)

    def _require_fit(self, target: tuple[int, ...]) -> None:
        self.on(target)

    def _channels(self, y: Tensor, axis: int, *, transposed: bool) -> Tensor:
        """M (or Mᵀ) applied along one axis of activations."""
        raise NotImplementedError

    @property
    def side(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The stored weight of an embedding or an HF Conv1D is the transpose of a Linear's."""
        if len(self.shape) > 2 and self.acts_on == "in":
            return "weight"  # the columns are channel and kernel position together
        turned = self.stored in ("embedding", "conv1d")
        return "input" if (self.acts_on == "in") != turned else "output"

    def turned(self, x: Tensor, layer: Layer, strength: float | Tensor) -> Tensor:
        turned = self._channels(x, layer.in_axis, transposed=True)
        return turned if is_one(strength) else x + strength * (turned - x)

    def mapped(
        self, y: Tensor, layer: Layer, bias: Tensor | None, strength: float | Tensor
    ) -> Tensor:
        if bias is not None:
            shift = bias.reshape(-1, *[1] * (-1 - layer.out_axis)).to(y.dtype)
            return self.mapped(y - shift, layer, None, strength) + shift
        mapped = self._channels(y, layer.out_axis, transposed=False)
        return mapped if is_one(strength) else y + strength * (mapped - y)

    # --- rows -------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> WeightAdapter:
        """See `WeightAdapter.rows`; rows not known in number all have the same map."""
        return self if self.shape[0] == 0 else super().rows(start, stop)

    def _rows(self, start: int, stop: int, common: Common) -> WeightAdapter:
        sized = None if self.sized is None else (stop - start, *self.sized[1:])
        return self.with_tensors(**{**common, **self._cut(start, stop), "sized": sized})

    @classmethod
    def fuse(cls, parts: Sequence[WeightAdapter | int]) -> WeightAdapter:
        """See `WeightAdapter.fuse`; maps on the inputs have to be one and the same."""
        if all(isinstance(p, int) or p.shape[0] for p in parts):
            return super().fuse(parts)
        first = next(p for p in parts if not isinstance(p, int))
        if not all(isinstance(p, cls) and p.same_map(first) for p in parts):
            raise CannotFuse(OTHER_INPUTS)
        return first

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> WeightAdapter:
        live = [p.adapter for p in parts if isinstance(p.adapter, cls)]
        shape = live[0].sized
        sized = None if shape is None else (parts[-1].stop, *shape[1:])
        return live[0].with_tensors(**{**common, **cls._joined(parts), "sized": sized})

    def same_map(self, other: WeightAdapter, fields: Sequence[str] | None = None) -> bool:
        """Whether both are bit-equal in tensors (or these `fields`) and in everything else that
        makes up the map."""
        options = [n for n in self.options if n != "sized"]
        return (
            type(self) is type(other)
            and all(getattr(self, n) == getattr(other, n) for n in options)
            and all(
                bit_equal(self._parameters[n], other._parameters[n]) for n in fields or self.fields
            )
        )

    # --- fit --------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        rank: object = None,
        weight: Tensor | None = None,
    ) -> WeightAdapter:
        """CannotFit, unless `source` is such a map already."""
        if isinstance(source, cls):
            return source
        raise CannotFit(
            f"{cls.__name__} reaches only some of all changes and has no projection from a general "
            "one. Those that have: lora, full."
        )


OTHER_INPUTS = (
    "the parts transform their input differently, and one weight has one input; the same map on "
    "all parts, and on all of them, can be joined"
)


def channels_last(y: Tensor, axis: int) -> Tensor:
    """The (negative) channel axis moved to the end."""
    return y if axis == -1 else y.movedim(axis, -1)


def channels_back(y: Tensor, axis: int) -> Tensor:
    """The inverse of `channels_last`."""
    return y if axis == -1 else y.movedim(-1, axis)


def vector_like(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements start:stop of a tensor with one dimension larger than one, as many dimensions."""
    axis = next((d for d, n in enumerate(tensor.shape) if n > 1), 0)
    return tensor.narrow(axis, start, stop - start)


def join_vectors(parts: Sequence[Part], name: str) -> Tensor | None:
    """Per-row factors side by side; a missing one is ones, None when all are missing."""
    found = [None if p.adapter is None else p.adapter._parameters[name] for p in parts]
    like = next((t for t in found if t is not None), None)
    if like is None:
        return None
    pieces = [
        (torch.ones(p.rows, device=like.device) if t is None else t.detach().float()).reshape(-1)
        for p, t in zip(parts, found, strict=True)
    ]
    axis = next((d for d, n in enumerate(like.shape) if n > 1), 0)
    shape = [-1 if d == axis else 1 for d in range(like.ndim)]
    exact = torch.cat(pieces)
    rounded = exact.to(like.dtype)
    return (rounded if bool((rounded.float() == exact).all()) else exact).reshape(shape)


def block_size_of(
    name: str, width: int, rank: int | None, block_size: int | None, *, least: int
) -> int:
    """Size of the blocks that `width` values divide into, from their number `rank` or as given;
    UsageError when they do not, or when a block would be smaller than `least`.
    """
    if (rank is None) == (block_size is None):
        raise UsageError(f"{name}: give either rank (the number of blocks) or block_size.")
    size = block_size if block_size is not None else width // max(rank or 1, 1)
    if size < least or width % size or (rank is not None and width % rank):
        raise UsageError(f"{name}: {width} values do not divide into blocks of {size}.")
    return size


def between_blocks(name: str, size: int, start: int, stop: int, rows: int) -> tuple[int, int]:
    """Row range -> block range; CannotSplit when it cuts a block of `size` rows."""
    if start % size or stop % size:
        raise CannotSplit(
            f"{name} mixes {size} neighbouring outputs, and rows {start}:{stop} of {rows} cut such "
            "a block in two"
        )
    return start // size, stop // size
