"""torchao's Int4Tensor (torchao 0.18, quantization/quantize_/workflows/int4/int4_tensor.py), the
plain packing of Int4WeightOnlyConfig.

`X._weight_qdata` int8 (o, i / 2) or (E, o, i / 2): two codes -8 to 7 to the byte, that of the even
input in the low half; `X._weight_scale` and `X._weight_zero_point` (i / group, o) or
(E, i / group, o), in the weight's dtype:

    w = scale · code + zero

as the kernel mslk.bf16i4bf16_rowwise computes it (FBGEMM, gen_ai/quantize.py
`int4_row_quantize_zp`; where activations are 8-bit floats, all zeros are 0). The formula is
computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.bits import low_first, pack_low_first
from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.grids import Grid, extremes
from peftsurgery.quantizers.packed import Format, Outline, Packed, better, found
from peftsurgery.quantizers.torchao_entries import (
    entries,
    loader_config,
    metadata_of,
    stored_names,
)

ROLES = {"qdata": "weight", "scale": "scale", "zero_point": "zero"}
NATIVE = ("BF16", "F16", "F32")
LEAST = 1e-6 / 15  # of a scale, as FBGEMM has it


class TorchAOInt4(Format):
    """fields: `group`; `told`, what the metadata has of the weight."""

    name = "torchao-int4"
    title = "torchao int4, plain"
    book = Integers(-8, 7)

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for entry in entries(checkpoint, ("Int4Tensor",)):
            where = f"{checkpoint.source}: {entry.name!r}"
            if set(entry.names) != set(ROLES):
                raise UsageError(
                    f"{where}: Int4Tensor with parts {sorted(entry.names)}; {sorted(ROLES)} were "
                    "expected. Download it again."
                )
            names = {ROLES[part]: name for part, name in entry.names.items()}
            codes, scale, zero = (checkpoint[names[role]] for role in ("weight", "scale", "zero"))
            shape = (*codes.shape[:-1], codes.shape[-1] * 2)
            block = entry.of("block_size")
            group = block[-1] if isinstance(block, list) and block else 0
            fitting = (
                codes.dtype in ("I8", "U8")
                and len(shape) in (2, 3)
                and isinstance(group, int)
                and group > 0
                and tuple(scale.shape) == (*shape[:-2], -(-shape[-1] // group), shape[-2])
                and tuple(zero.shape) == tuple(scale.shape)
                and scale.dtype == zero.dtype
                and scale.dtype in NATIVE
            )
            if not fitting:
                raise UsageError(
                    f"{where}: codes {codes.dtype} {list(codes.shape)}, scales {scale.dtype} "
                    f"{list(scale.shape)}, zeros {zero.dtype} {list(zero.shape)} and blocks "
                    f"{block} do not fit each other. Download it again."
                )
            told = {"_type": entry.kind, "_data": entry.data}
            fields = {"group": group, "told": {**told, "_tensor_data_names": list(entry.names)}}
            yield found(self, checkpoint, entry.name, shape, scale.dtype, names, **fields)

    def columns(self, packed: Packed) -> int:
        return packed.shape[-1]

    def _table(self, packed: Packed, role: str) -> Tensor:
        """A stored part by row and group."""
        return packed.whole(role).transpose(-1, -2).reshape(packed.rows, -1)

    def _grid(self, packed: Packed, scale: Tensor, zero: Tensor) -> Grid:
        group = cast(int, packed.fields["group"])
        return Grid(self.book, scale.float(), shift=zero.float(), group=group)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        scale, zero = (self._table(packed, role)[start:stop] for role in ("scale", "zero"))
        pairs = packed.part_rows("weight", start, stop).view(torch.uint8)
        return self._grid(packed, scale, zero), ((low_first(pairs) ^ 8).view(torch.int8) - 8)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        """scale = (max - min) / 15, zero = min + 8 · scale; zeros that are all 0 stay it, then
        scale = max(max / 7, -min / 8).
        """
        dtype = torch_dtype(packed.outlines["scale"].dtype)
        assert dtype is not None
        least, greatest = extremes(matrix, cast(int, packed.fields["group"]))
        old = [self._table(packed, role) for role in ("scale", "zero")] if packed.parts else []
        if old and not bool(old[1].any()):
            scale = torch.maximum(greatest / 7, -least / 8).clamp(min=LEAST)
            zero = torch.zeros_like(scale)
        else:
            scale = ((greatest - least) / 15).clamp(min=LEAST)
            zero = least + 8 * scale
        scale = scale.clamp(min=torch.finfo(dtype).smallest_normal).to(dtype)
        zero = zero.to(dtype)
        if not bool((torch.isfinite(scale) & torch.isfinite(zero)).all()):
            raise UsageError(
                f"{packed.name!r}: its values are too large for scales of {dtype}. Repair it."
            )
        if old:
            change = better(matrix, self._grid(packed, *old), self._grid(packed, scale, zero))
            scale, zero = torch.where(change, scale, old[0]), torch.where(change, zero, old[1])
        stored = {
            role: self._as_stored(packed, role, part)
            for role, part in (("scale", scale), ("zero", zero))
        }
        return self._grid(packed, scale, zero), stored

    def _as_stored(self, packed: Packed, role: str, part: Tensor) -> Tensor:
        by_matrix = part.reshape(*packed.shape[:-1], -1)
        return by_matrix.transpose(-1, -2).contiguous().reshape(packed.outlines[role].shape)

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        outline = packed.outlines["weight"]
        words = pack_low_first(codes.view(torch.uint8) & 15)
        words = words.view(torch.int8) if outline.dtype == "I8" else words
        return {"weight": words.reshape(outline.shape)}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """options: group (128)."""
        group = cast(int, options.get("group", 128))
        if len(shape) != 2 or group < 2 or group % 2 or shape[1] % group or 0 in shape:
            raise UnsupportedError(
                f"{name!r}: {list(shape)} does not fit {self.title}: a matrix is expected whose "
                f"inputs are a multiple of the group, {group}, an even number. Choose another."
            )
        if options.get("bits", 4) != 4:
            raise UsageError(f"{self.title}: {options['bits']} bits; expected 4.")
        native = native if native == "F16" else "BF16"
        stored = stored_names(name, tuple(ROLES))
        of_groups = (shape[1] // group, shape[0])
        outlines = {
            "weight": Outline(stored["qdata"], "I8", (shape[0], shape[1] // 2)),
            "scale": Outline(stored["scale"], native, of_groups),
            "zero": Outline(stored["zero_point"], native, of_groups),
        }
        activations = {"_type": "torch.dtype", "_data": "bfloat16"}
        data: dict[str, object] = {"activation_dtype": activations, "block_size": [1, group]}
        data["shape"] = list(shape)
        told = {"_type": "Int4Tensor", "_data": data, "_tensor_data_names": list(ROLES)}
        fields = {"group": group, "told": told}
        return Packed(self, name, shape, native, outlines, {}, fields)

    def config(self, **options: object) -> dict[str, object]:
        packing = {"_type": "Int4PackingFormat", "_data": "PLAIN"}
        algorithm = {"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"}
        data = {
            "group_size": options.get("group", 128),
            "set_inductor_config": True,
            "int4_packing_format": packing,
            "int4_choose_qparams_algorithm": algorithm,
            "int4_tile_packed_ntile": 8,
        }
        return loader_config("Int4WeightOnlyConfig", data, options.get("skip"))

    def metadata(self, packed: Sequence[Packed], others: Sequence[str]) -> dict[str, str]:
        return metadata_of(packed, others)
