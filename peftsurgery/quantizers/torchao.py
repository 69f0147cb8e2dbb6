"""torchao's weights of whole numbers and of 8-bit floats (torchao 0.18; quantization/quantize_/
workflows/), each number in a byte of its own.

Int8Tensor, IntxUnpackedToInt8Tensor: `X._weight_qdata` int8 in the weight's shape (o, i) or
(E, o, i), `X._weight_scale`, one for each tile of it (as a rule a row or a group of inputs), and
`X._weight_zero_point` int8 of that shape:

    w = (code - zero) · scale

of int8, codes -128 to 127 (-64 to 63 where `reduce_range`); of int1 to int8 by `target_dtype`.
Float8Tensor: `X._weight_qdata` of 8-bit floats, w = code · scale.

`torchao_entries` has what the metadata says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.float8 import FLOAT8, KEPT, ScaledFloat8
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Format, Outline, Packed, found
from peftsurgery.quantizers.tiles import Tiles, tiled
from peftsurgery.quantizers.torchao_entries import (
    Entry,
    dtype_entry,
    entries,
    granularity,
    loader_config,
    metadata_of,
    native_of,
    stored_names,
)

PARTS = {"qdata": "weight", "scale": "scale", "zero_point": "zero"}  # others are kept
EPS = torch.finfo(torch.float32).eps  # the least scale of int8


def tiles_of(checkpoint: Checkpoint, entry: Entry) -> tuple[tuple[int, ...], Tiles]:
    """The shape of a weight, and the tiles that share a scale. UsageError when they contradict each
    other.
    """
    where = f"{checkpoint.source}: {entry.names['qdata']!r}"
    shape = tuple(checkpoint[entry.names["qdata"]].shape)
    scales = tuple(checkpoint[entry.names["scale"]].shape)
    stacked = len(shape) == 3
    tiles = None
    if len(shape) in (2, 3):
        tiles = tiled(shape, scales or (1,), stacked=stacked, block=block_of(entry))
    if tiles is None:
        raise UsageError(
            f"{where}: shape {list(shape)} with scales {list(scales)} and blocks "
            f"{entry.of('block_size')} do not fit each other. Download it again."
        )
    return shape, tiles


def block_of(entry: Entry) -> tuple[int, int] | None:
    """Height and width of the tiles."""
    block = entry.of("block_size")
    if not isinstance(block, list) or len(block) < 2:
        return None
    if not all(isinstance(side, int) and side > 0 for side in block):
        return None
    return block[-2], block[-1]


def roles(entry: Entry) -> dict[str, str]:
    """Role -> stored tensor."""
    return {PARTS.get(part, f"{KEPT}{part}"): name for part, name in entry.names.items()}


class TorchAO(Format):
    """fields: `tiles`; `low` and `high` of the codes; `told`, what the metadata has of it."""

    name = "torchao"
    title = "torchao, whole numbers in bytes"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for entry in entries(checkpoint, ("Int8Tensor", "IntxUnpackedToInt8Tensor")):
            where = f"{checkpoint.source}: {entry.name!r}"
            shape, tiles = tiles_of(checkpoint, entry)
            names = roles(entry)
            kinds = {role: checkpoint[name].dtype for role, name in names.items()}
            plain = kinds["weight"] == kinds.get("zero", "I8") == "I8"
            if not plain or kinds["scale"] not in ("F32", "F16", "BF16"):
                raise UnsupportedError(
                    f"{where}: codes are {kinds['weight']}, zeros {kinds.get('zero')}, scales "
                    f"{kinds['scale']}; int8, int8 and floats were expected. Quantize the original "
                    "again."
                )
            if "zero" in names:
                zero, scale = (checkpoint[names[role]].shape for role in ("zero", "scale"))
                if tuple(zero) != tuple(scale):
                    raise UsageError(
                        f"{where}: zeros {list(zero)} and scales {list(scale)} differ in shape. "
                        "Download it again."
                    )
            low, high = _range(where, entry)
            native = native_of(where, entry.of("dtype"))
            told = _told(entry)
            fields = {"tiles": tiles, "low": low, "high": high, "told": told}
            yield found(self, checkpoint, entry.name, shape, native, names, **fields)

    def columns(self, packed: Packed) -> int:
        return packed.shape[-1]

    def _table(self, packed: Packed, role: str) -> Tensor:
        """A stored part, one value for each tile, fp32."""
        tiles = _tiles(packed)
        return packed.whole(role).float().reshape(tiles.stack * tiles.down, tiles.across)

    def _grid(self, packed: Packed, scales: Tensor, zeros: Tensor, start: int, stop: int) -> Grid:
        tiles = _tiles(packed)
        book = Integers(cast(int, packed.fields["low"]), cast(int, packed.fields["high"]))
        zero = tiles.spread(zeros, start, stop) if bool(zeros.any()) else None
        return Grid(book, tiles.spread(scales, start, stop), zero, group=tiles.width)

    def _zeros(self, packed: Packed, scales: Tensor) -> Tensor:
        return self._table(packed, "zero") if "zero" in packed.parts else torch.zeros_like(scales)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        scales = self._table(packed, "scale")
        grid = self._grid(packed, scales, self._zeros(packed, scales), start, stop)
        return grid, packed.part_rows("weight", start, stop)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        tiles, outlines = _tiles(packed), packed.outlines
        dtype = torch_dtype(outlines["scale"].dtype)
        assert dtype is not None
        low, high = cast(int, packed.fields["low"]), cast(int, packed.fields["high"])
        scales = _least(dtype, tiles.largest(matrix) / ((high - low) / 2))
        zeros = torch.zeros_like(scales)
        if packed.parts:
            before = self._table(packed, "scale"), self._zeros(packed, scales)
            if bool(before[1].any()):
                scales, zeros = _asymmetric(tiles, matrix, dtype, low, high)
            errors = [
                tiles.error(matrix, self._grid(packed, *pair, 0, len(matrix)))
                for pair in (before, (scales, zeros))
            ]
            change = errors[1] < errors[0]
            scales, zeros = (
                torch.where(change, new, old)
                for new, old in zip((scales, zeros), before, strict=True)
            )
        if not bool(torch.isfinite(scales).all()):
            raise UsageError(
                f"{packed.name!r}: its values are too large for scales of {dtype}. Repair it."
            )
        parts = {role: packed.whole(role) for role in packed.parts if role.startswith(KEPT)}
        parts["scale"] = scales.to(dtype).reshape(outlines["scale"].shape)
        if "zero" in outlines:
            parts["zero"] = zeros.to(torch.int8).reshape(outlines["zero"].shape)
        return self._grid(packed, scales, zeros, 0, len(matrix)), parts

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": codes.to(torch.int8).reshape(packed.outlines["weight"].shape)}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """int8, symmetric. options: group, whole rows without it."""
        group = cast("int | None", options.get("group"))
        if len(shape) != 2 or 0 in shape:
            raise UnsupportedError(f"{name!r}: {self.title}: a matrix, not {list(shape)}.")
        if options.get("bits", 8) != 8:
            raise UsageError(f"{self.title}: {options['bits']} bits; expected 8.")
        width = shape[1] if group is None else group
        if width < 1 or shape[1] % width:
            raise UnsupportedError(
                f"{name!r}: {shape[1]} inputs are no multiple of the group, {width}. Choose "
                "another."
            )
        block, native = [1, width], native if native in ("F16", "BF16") else "F32"
        stored = stored_names(name, ("qdata", "scale", "zero_point"))
        counts = (shape[0], shape[1] // width)
        outlines = {
            "weight": Outline(stored["qdata"], "I8", shape),
            "scale": Outline(stored["scale"], "F32", counts),
            "zero": Outline(stored["zero_point"], "I8", counts),
        }
        data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": block}
        data["dtype"] = dtype_entry(native)
        names = ["zero_point", "qdata", "scale"]
        told = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": names}
        fields: dict[str, object] = {"tiles": Tiles(1, *shape, 1, width), "told": told}
        fields |= {"low": -128, "high": 127}
        return Packed(self, name, shape, native, outlines, {}, fields)

    def config(self, **options: object) -> dict[str, object]:
        told = granularity(cast("int | None", options.get("group")))
        data = {"group_size": None, "granularity": told, "set_inductor_config": True}
        return loader_config("Int8WeightOnlyConfig", data, options.get("skip"))

    def metadata(self, packed: Sequence[Packed], others: Sequence[str]) -> dict[str, str]:
        return metadata_of(packed, others)


class TorchAOFloat8(ScaledFloat8):
    name = "torchao-fp8"
    title = "torchao, 8-bit floats"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for entry in entries(checkpoint, ("Float8Tensor",)):
            where = f"{checkpoint.source}: {entry.name!r}"
            shape, _ = tiles_of(checkpoint, entry)
            names = roles(entry)
            if checkpoint[names["weight"]].dtype not in FLOAT8:
                raise UnsupportedError(
                    f"{where}: codes are {checkpoint[names['weight']].dtype}; 8-bit floats were "
                    "expected. Quantize the original again."
                )
            native = native_of(where, entry.of("dtype"))
            block, stacked = block_of(entry), len(shape) == 3
            packed = self._claim(
                checkpoint, entry.name, native, names, block=block, stacked=stacked
            )
            fields = {**packed.fields, "told": _told(entry)}
            yield found(self, checkpoint, entry.name, shape, native, names, **fields)

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """E4M3 with one scale for each row."""
        if len(shape) != 2 or 0 in shape:
            raise UnsupportedError(f"{name!r}: {self.title}: a matrix, not {list(shape)}.")
        native = native if native in ("F16", "BF16") else "F32"
        stored = stored_names(name, ("qdata", "scale"))
        scale = Outline(stored["scale"], "F32", (shape[0], 1))
        packed = self._fresh(stored["qdata"], shape, native, scale)
        data = {"block_size": [1, shape[1]], "mm_config": None, "act_quant_kwargs": None}
        data["kernel_preference"] = {"_type": "KernelPreference", "_data": "AUTO"}
        data["dtype"] = dtype_entry(native)
        names = ["qdata", "scale"]
        told = {"_type": "Float8Tensor", "_data": data, "_tensor_data_names": names}
        fields = {**packed.fields, "told": told}
        return Packed(self, name, shape, native, packed.outlines, {}, fields)

    def config(self, **options: object) -> dict[str, object]:
        kind = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
        data = {"weight_dtype": kind, "set_inductor_config": True, "granularity": granularity(None)}
        return loader_config("Float8WeightOnlyConfig", data, options.get("skip"))

    def metadata(self, packed: Sequence[Packed], others: Sequence[str]) -> dict[str, str]:
        return metadata_of(packed, others)


def _told(entry: Entry) -> dict[str, object]:
    return {"_type": entry.kind, "_data": entry.data, "_tensor_data_names": list(entry.names)}


def _tiles(packed: Packed) -> Tiles:
    tiles = packed.fields["tiles"]
    assert isinstance(tiles, Tiles)
    return tiles


def _range(where: str, entry: Entry) -> tuple[int, int]:
    bits = 8
    if entry.kind != "Int8Tensor":
        told = str(entry.of("target_dtype"))
        bits = int(told[3:]) if told in {f"int{n}" for n in range(1, 9)} else 0
    elif entry.of("reduce_range"):
        bits = 7
    if not bits:
        raise UnsupportedError(
            f"{where}: codes of {entry.of('target_dtype')}; int1 to int8 were expected. Quantize "
            "the original again."
        )
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _least(dtype: torch.dtype, scales: Tensor) -> Tensor:
    """Scales as a dtype holds them, none too small for it (choose_qparams_affine)."""
    least = EPS if dtype == torch.float32 else torch.finfo(dtype).smallest_normal
    return scales.clamp(min=least).to(dtype).float()


def _asymmetric(
    tiles: Tiles, matrix: Tensor, dtype: torch.dtype, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """scale = (max - min) / (high - low), 0 between them; zero = low - min / scale."""
    least, greatest = -tiles.largest(matrix.clamp(max=0)), tiles.largest(matrix.clamp(min=0))
    scales = _least(dtype, (greatest - least) / (high - low))
    return scales, (low - (least / scales).round()).clamp_(low, high)
