"""A packed weight: the stored tensors it consists of, and the weight they stand for."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.grids import PIECE, Grid, Rounding, nearest, pieces

LOOKED_UP = 1e-4  # of a weight: more than `Grid.errors` may be off


@dataclass(frozen=True)
class Outline:
    """A stored tensor before it exists."""

    name: str  # in the checkpoint, component included
    dtype: str  # a safetensors name
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One weight in one packed format.

    parts: role -> stored tensor; empty for a weight that is to be packed afresh, of which only the
    `outlines` are known. fields: what the format has to know beside the tensors.
    """

    format: Format
    name: str  # of the weight, `….weight`, component included
    shape: tuple[int, ...]
    native: str  # the dtype the weight had, or is computed in: F32, F16 or BF16
    outlines: Mapping[str, Outline]
    parts: Mapping[str, LazyTensor] = field(default_factory=dict)
    fields: Mapping[str, object] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the matrix that is rounded."""
        return math.prod(self.shape) // self.columns

    @property
    def columns(self) -> int:
        """Columns of that matrix."""
        return self.format.columns(self)

    def dequantize(self) -> Tensor:
        """The weight, fp32 (shape)."""
        return self.format.dequantize(self, 0, self.shape[0])

    def with_parts(self, parts: Mapping[str, LazyTensor]) -> Packed:
        """The same weight with other tensors, as written elsewhere."""
        return replace(self, parts=dict(parts))

    def whole(self, role: str) -> Tensor:
        """A stored part as a tensor."""
        return self.parts[role].torch()

    def part_rows(self, role: str, start: int, stop: int) -> Tensor:
        """What a stored part holds for rows start:stop of the matrix, one row each; its first
        dimensions are the matrix's rows.
        """
        part = self.parts[role]
        lead = 1
        while lead < len(part.shape) and math.prod(part.shape[:lead]) < self.rows:
            lead += 1
        part = part.flattened(lead) if lead > 1 else part
        return part.rows(start, stop).torch().reshape(stop - start, -1)


class Format(abc.ABC):
    """A way to pack weights: `find` claims them, `grid` unpacks, `fit` and `pack` quantize.

    A weight is seen as a matrix (rows, columns) whose rows are quantized independently of each
    other once the scales are known. By default rows are dimension 0 and columns the others.
    """

    name: ClassVar[str]  # as the command line calls it
    title: ClassVar[str]
    quantizable: ClassVar[bool] = True  # `fresh` works

    @abc.abstractmethod
    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        """The weights of a checkpoint packed in this format. Raises UnsupportedError for one that
        says so and cannot be read.
        """

    @abc.abstractmethod
    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        """The grid and the codes of rows start:stop of the matrix."""

    @abc.abstractmethod
    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        """Scales for a matrix (rows, columns), as stored, and the grid they make.

        Those of `packed.parts` are kept as far as they serve the new values: what did not change
        gets the bytes it had.
        """

    @abc.abstractmethod
    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        """The codes (rows, columns) as stored: the parts that `fit` does not make."""

    def join(self, scales: dict[str, Tensor], codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """All parts, from what `fit` and `pack` gave of one weight; formats whose scales and codes
        share a tensor put them together here.
        """
        return {**scales, **codes}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """A weight to be packed, outlines only. UnsupportedError when the shape does not fit the
        format, or the format is only read.
        """
        raise UnsupportedError(f"{self.title}: is read and merged into, not made afresh.")

    def config(self, **options: object) -> dict[str, object] | None:
        """`quantization_config` of a config.json for what `fresh` makes; None: the format has
        none.
        """
        return None

    def markers(self, packed: Sequence[Packed]) -> dict[str, Tensor]:
        """Tensors, name -> tensor, that a file needs beside these weights because it holds them,
        packed afresh; for formats that mark the file as a whole.
        """
        return {}

    def metadata(self, packed: Sequence[Packed], others: Sequence[str]) -> dict[str, str]:
        """What the `__metadata__` of a file says of the weights packed afresh in it, beside the
        other tensors of some names.
        """
        return {}

    def marks(self, name: str) -> bool:
        """Whether a stored tensor is such a marker: to be left out of a file that holds no packed
        weight any more.
        """
        return False

    def input_scales(self, packed: Packed, original: Tensor) -> Tensor | None:
        """s (columns,) where the packed weight is that of W · diag(s) and an operation before it
        divides by s; None where the format does not do that. `original` is W.
        """
        return None

    def columns(self, packed: Packed) -> int:
        """Columns of the matrix of a weight."""
        return math.prod(packed.shape[1:])

    def to_matrix(self, packed: Packed, weight: Tensor) -> Tensor:
        """The weight (shape), or whole rows of it, as the matrix that is rounded."""
        return weight.reshape(-1, packed.columns)

    def to_weight(self, packed: Packed, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`."""
        return matrix.reshape(-1, *packed.shape[1:])

    def matrix_rows(self, packed: Packed, start: int, stop: int) -> tuple[int, int]:
        """The rows of the matrix that are rows start:stop of the weight's first dimension."""
        per = packed.rows // packed.shape[0]
        return start * per, stop * per

    def dequantize(
        self, packed: Packed, start: int, stop: int, out: Tensor | None = None
    ) -> Tensor:
        """Rows start:stop of the weight's first dimension, fp32; `out` may be used for them, memory
        for as many rows of the matrix.
        """
        grid, codes = self.grid(packed, *self.matrix_rows(packed, start, stop))
        return self.to_weight(packed, grid.values(codes, out=out))

    def rounded(self, name: str, weight: Tensor, native: str) -> Tensor:
        """decode(encode(W)) of a plain weight, fp32, without writing anything. UnsupportedError as
        `fresh`.
        """
        packed = self.fresh(name, tuple(weight.shape), native)
        matrix = self.to_matrix(packed, weight.float())
        check_finite(name, matrix)
        grid, _ = self.fit(packed, matrix)
        return self.to_weight(packed, grid.values(grid.nearest(matrix)))

    def quantize(
        self, packed: Packed, weight: Tensor, rounding: Rounding = nearest
    ) -> dict[str, Tensor]:
        """Every part of the packed weight, stored dtype and shape. Raises UsageError for NaN and
        infinity.
        """
        matrix = self.to_matrix(packed, weight.float())
        check_finite(packed.name, matrix)
        grid, parts = self.fit(packed, matrix)
        before = self.grid(packed, 0, packed.rows)[1] if packed.parts else None
        codes = rounding(matrix, grid, before)
        return self.join(parts, self.pack(packed, codes))


def check_finite(name: str, weight: Tensor) -> None:
    """UsageError when a weight that is to be packed holds NaN or infinity."""
    if not math.isfinite(float(weight.sum())) and not bool(torch.isfinite(weight).all()):
        raise UsageError(f"{name!r}: holds NaN or infinity, which cannot be packed. Repair it.")


def outlined(parts: Mapping[str, LazyTensor], names: Mapping[str, str]) -> dict[str, Outline]:
    """Outlines of stored parts; names: role -> name in the checkpoint."""
    return {
        role: Outline(names[role], tensor.dtype, tuple(tensor.shape))
        for role, tensor in parts.items()
    }


def found(
    format: Format,
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    native: str,
    names: Mapping[str, str],
    **fields: object,
) -> Packed:
    """A Packed of stored tensors: role -> name in the checkpoint."""
    parts = {role: checkpoint[stored] for role, stored in names.items()}
    return Packed(format, name, shape, native, outlined(parts, names), parts, fields)


def better(matrix: Tensor, old: Grid, new: Grid) -> Tensor:
    """Whether, group by group (rows, groups), the new scales round a matrix with less squared
    error than the old ones.
    """
    found = []
    for start, stop in pieces(*matrix.shape):
        part = matrix[start:stop]
        errors = []
        for grid in (old.rows(start, stop), new.rows(start, stop)):
            error = grid.values(grid.nearest(part)).sub_(part).square_()
            errors.append(grid.grouped(error))
        found.append(errors[1] < errors[0])
    return torch.cat(found)


def better_scales(
    matrix: Tensor, old: Tensor, new: Tensor, moved: Tensor, grid: Callable[[Tensor], Grid]
) -> Tensor:
    """One scale for every row of a matrix, (rows,): the old one, but of rows that `moved` the new
    one where that rounds them with less squared error. grid: of scales (n, 1).
    """
    scales = old.clone()
    moving = moved.nonzero()[:, 0]
    for part in moving.split(max(1, PIECE // matrix.shape[1])) if len(moving) else ():
        first, last = int(part[0]), int(part[-1]) + 1
        neighbours = len(part) == last - first
        some = matrix[first:last] if neighbours else matrix.index_select(0, part)
        before, after = (
            grid(scale[part, None]).errors(some, some).norm(dim=1) for scale in (old, new)
        )
        least = some.norm(dim=1) * LOOKED_UP
        scales[part] = torch.where(after + least < before, new[part], old[part])
    return scales


class PackedTensor(LazyTensor):
    """The weight of a Packed as a tensor of the checkpoint: fp32, dequantized when asked for.

    Rows count over the first `lead` dimensions; `start:stop` are those that are there.
    """

    __slots__ = ("lead", "packed", "start", "stop")

    def __init__(
        self, packed: Packed, start: int = 0, stop: int | None = None, lead: int = 1
    ) -> None:
        first = next(iter(packed.parts.values()))
        count = math.prod(packed.shape[:lead])
        self.packed, self.lead, self.start = packed, lead, start
        self.stop = count if stop is None else stop
        own = packed.name.rpartition(":")[2]
        shape = (self.stop - start, *packed.shape[lead:])
        super().__init__(first.file, own, "F32", shape, 0, 4 * math.prod(shape))

    def file_range(self) -> None:
        return None

    def flattened(self, lead: int) -> PackedTensor:
        """The same weight with its first `lead` dimensions taken as one."""
        return PackedTensor(self.packed, lead=lead)

    def rows(self, start: int, stop: int) -> PackedTensor:
        self._row_bytes(start, stop)
        return PackedTensor(self.packed, self.start + start, self.start + stop, self.lead)

    def torch(self) -> Tensor:
        return self._unpacked(None)

    def into(self, out: Tensor) -> Tensor:
        """`torch` into contiguous fp32 memory, (rows, columns) of these rows."""
        found = self._unpacked(out if self._straight else None).reshape(out.shape)
        return out if found.data_ptr() == out.data_ptr() else out.copy_(found)

    @property
    def _straight(self) -> bool:
        """Whether the rows of the matrix that is rounded are those of this tensor, in order."""
        straight = type(self.packed.format).to_weight is Format.to_weight
        return straight and self.packed.columns == math.prod(self.shape[1:])

    def _unpacked(self, out: Tensor | None) -> Tensor:
        per = math.prod(self.packed.shape[1 : self.lead])
        first, last = self.start // per, -(-self.stop // per)
        whole = (last - first) * per == self.stop - self.start
        weight = self.packed.format.dequantize(self.packed, first, last, out if whole else None)
        flat = weight.reshape(-1, *self.packed.shape[self.lead :])
        return flat[self.start - first * per : self.stop - first * per]

    def numpy(self) -> np.ndarray:
        return self.torch().numpy()

    def read(self) -> memoryview:
        return as_bytes(self.torch())
