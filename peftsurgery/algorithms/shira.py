"""SHiRA, a sparse change at fixed places (Bhardwaj et al. 2024, arXiv 2406.13175)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import UsageError
from .base import WeightAdapter, is_one
from .fresh import refuse_options, trainable
from .layer import Layer
from .sized import SizedChange, dense_of
from .slots import Part, ratio, scaled, widest
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class SHiRA(SizedChange):
    """ΔW[indices[0, n], indices[1, n]] += scale · values[n], 0 elsewhere; equal places add up.

    values     (n,)
    indices    (2, n), rows and columns of the flattened weight; any dtype that holds them, floats
               too (PEFT on Windows)
    """

    algorithm = "shira"
    fields = ("values",)
    frozen = ("indices",)
    options = ("indices", "sized")
    values: nn.Parameter
    indices: Tensor

    def __init__(
        self,
        values: Tensor,
        indices: Tensor,
        *,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        if indices.is_floating_point():
            indices = indices.to(torch.int64)
        self.__dict__.update(sized=sized, _given={"indices": indices})
        super().__init__({"values": values}, **common)

    def _known(self) -> tuple[int, int]:
        self._expect("values", self.values is not None and self.values.ndim == 1, "a vector")
        n = self.values.numel()
        if tuple(self.indices.shape) != (2, n):
            found = tuple(self.indices.shape)
            raise UsageError(f"SHiRA.indices: got shape {found}, expected (2, {n}).")
        if not self.indices.is_meta and int(self.indices.min()) < 0:
            raise UsageError("SHiRA.indices: a negative place.")
        return 0, 0

    def _admits(self, rows: int, columns: int) -> bool:
        if self.indices.is_meta:
            return True
        last = self.indices.amax(1).tolist()
        return last[0] < rows and last[1] < columns

    def _trial(self) -> tuple[int, int]:
        rows, columns = (int(n) + 1 for n in self.indices.amax(1).tolist())
        return rows, columns

    def _places(self) -> Tensor:
        """(n,) places in the flattened weight, kept from call to call."""
        columns, kept = self.matrix_shape[1], self.__dict__.get("_kept")
        if kept is not None and kept[0] is self.indices and kept[1] == columns:
            return kept[2]
        row, column = self.indices.long()
        found = row * columns + column
        compiling = torch.compiler.is_compiling()
        if type(found) is Tensor and not compiling and not found.is_inference():
            self.__dict__["_kept"] = (self.indices, columns, found)
        return found

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        row, column = self.indices.long()
        columns = self.matrix_shape[1]
        values = self.values.to(dtype) * float(self.scale)
        if (start, stop) != (0, self.shape[0]):
            here = (row >= start) & (row < stop)
            row, column, values = row[here] - start, column[here], values[here]
        flat = torch.zeros((stop - start) * columns, dtype=dtype, device=values.device)
        return flat.index_add(0, row * columns + column, values).reshape(-1, columns)

    def folds(self, weight: Tensor, positions: int) -> bool:
        """Where a dense ΔW is less work: n numbers per position against o · i for the weight."""
        return positions * self.values.numel() > weight.numel()

    def added(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """One copy of the weight with the values added at their places; the gradient is read there
        and nowhere else."""
        self._require_fit(tuple(weight.shape))
        values = self.scaled(self.values.to(weight.dtype))
        values = values if is_one(strength) else values * strength
        return weight.put(self._places(), values, accumulate=True)

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """Gathered, multiplied and added for every place, or with a dense ΔW: see `folds`."""
        positions = x.numel() // x.shape[-1]
        rows, columns = self.matrix_shape
        if layer.kind != "linear" or positions * self.values.numel() > rows * columns:
            if layer.kind == "linear":
                return F.linear(x, self._dense(self.matrix_shape).to(x.dtype))
            return super().change(x, layer)
        row, column = self.indices.long()
        gain = self.scaled(self.values).to(x.dtype)
        found = torch.zeros(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
        return found.index_add(-1, row, x.index_select(-1, column) * gain)

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> SHiRA:
        here = (self.indices[0] >= start) & (self.indices[0] < stop)
        values, indices = self.values[here], self.indices[:, here]
        step = start
        if not values.numel():  # no place there: a zero at the first
            values, indices, step = values.new_zeros(1), indices.new_zeros(2, 1), 0
        moved = indices - torch.tensor([[step], [0]], dtype=indices.dtype, device=indices.device)
        return SHiRA(values, moved, sized=self._cut(start, stop), **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> SHiRA:
        live = [(p.start, p.adapter) for p in parts if isinstance(p.adapter, SHiRA)]
        dtype = widest([a.values for _, a in live])
        values, indices = [], []
        for start, own in live:
            values.append(scaled(own.values, ratio(own, common.get("scale", 1.0)), dtype))
            step = torch.tensor([[start], [0]], device=own.indices.device)
            indices.append(own.indices.long() + step)
        first = live[0][1]
        sized = None if first.sized is None else (parts[-1].stop, *first.sized[1:])
        places = torch.cat(indices, 1).to(first.indices.dtype)
        return SHiRA(torch.cat(values), places, sized=sized, **common)

    # --- fresh and fitted -------------------------------------------------------------------------

    @classmethod
    def init(
        cls,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        generator: Generator | None = None,
        stored: str = "linear",
        dtype: torch.dtype = torch.float32,
        count: int | None = None,
        **options: object,
    ) -> Self:
        """values = 0 at random places, the sparse mask of the paper's SHiRA-Rand. As many as a LoRA
        of this rank has numbers, rank · (o + i), or `count`. alpha has no meaning here."""
        refuse_options(cls, options)
        rows, columns = weight.shape[0], weight.numel() // max(1, weight.shape[0])
        if count is None:
            count = (rank or 0) * (rows + columns)
        if weight.ndim < 2 or not 1 <= count <= rows * columns:
            raise UsageError(
                f"SHiRA: {count} places (rank {rank}) in a weight {list(weight.shape)}."
            )
        device = generator.device if generator is not None else weight.device
        flat = torch.randperm(rows * columns, generator=generator, device=device)[:count].sort()[0]
        indices = torch.stack([flat // columns, flat % columns]).to(weight.device, torch.int32)
        values = torch.zeros(count, device=weight.device)
        return trainable(cls(values, indices, sized=tuple(weight.shape), stored=stored), dtype)

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        count: int,
        weight: Tensor | None = None,
    ) -> SHiRA:
        """ΔW -> its `count` largest entries, with scale 1: the nearest with so many."""
        dense, shape = dense_of(source, weight)
        columns = dense.shape[1]
        if not 1 <= count <= dense.numel():
            raise UsageError(f"SHiRA: {count} places in a weight {list(shape)}.")
        flat = dense.flatten().abs().topk(count, sorted=False)[1].sort()[0]
        indices = torch.stack([flat // columns, flat % columns]).to(torch.int32)
        common = source.common() if isinstance(source, WeightAdapter) else Common()
        common.update(scale=1.0, magnitude=None, magnitude_axis=None)
        return cls(dense.flatten()[flat], indices, sized=shape, **common)
