"""optimum-quanto (0.2.7; tensor/weights/qbytes.py, qbits.py and packed.py), as
`QModuleMixin.state_dict` stores it: qint8, qfloat8, qint4 and qint2.

8 bits: `X.weight._data`, int8 or an 8-bit float in the weight's shape, `X.weight._scale` (o, 1, …),
or one scale where there is one output:

    w = scale · code

4 and 2 bits: every row is cut into groups of 128 inputs (96, 64 or 32 where 128 does not divide
them; the whole row where none does, or where it has no more than 128), codes (n, group) of all
groups. `X.weight._data._data`, bytes: the rows of codes in as many slabs as fit a byte, the first
slab in the lowest bits, (⌈n / slabs⌉, group). `X.weight._scale` (n, 1) and `X.weight._shift`, float
or a whole number, the zero:

    w = scale · code - shift,   w = scale · (code - shift)

The product is rounded to the dtype of the scale before a float shift is taken off, as quanto does.
The shape of a grouped weight is not stored: `quanto_shapes` finds it.
Beside every weight lie `X.input_scale` and `X.output_scale`, of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.books import Codebook, Integers
from peftsurgery.quantizers.float8 import FLOAT8, KEPT, book, float8_rows, float8_stored, kept
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Format, Outline, Packed, better, found
from peftsurgery.quantizers.quanto_shapes import group_of, stored_bits, weight_shape

NATIVE = ("F32", "F16", "BF16")
ACTIVATIONS = ("input_scale", "output_scale")


@dataclass(frozen=True)
class Stepped(Grid):
    """A grid whose product is rounded to a dtype before the shift is added."""

    step: torch.dtype = torch.float32

    def values(self, codes: Tensor, start: int = 0, out: Tensor | None = None) -> Tensor:
        found = replace(self, shift=None)._product(codes, start, out)
        found.copy_(found.to(self.step))
        if self.shift is not None:
            found += self.spread(self.shift, start, start + codes.shape[1])
        return found

    def _product(self, codes: Tensor, start: int, out: Tensor | None) -> Tensor:
        return super().values(codes, start, out)


class Quanto(Format):
    """fields: `bits`; of 4 and 2 also `size`, the codes of a group."""

    name = "quanto"
    title = "optimum-quanto"
    floats: ClassVar[bool] = False

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for stored in checkpoint:
            if not stored.endswith(".weight._data") and not stored.endswith(".weight._data._data"):
                continue
            name = stored.removesuffix("._data").removesuffix("._data")
            parts = {"weight": stored, "scale": f"{name}._scale"}
            short = stored.endswith("._data._data")
            if short:
                parts["shift"] = f"{name}._shift"
            for part in parts.values():
                if part not in checkpoint:
                    raise UsageError(
                        f"{checkpoint.source}: {stored!r} is packed by quanto, but {part!r} is "
                        "missing. Download it again."
                    )
            if (checkpoint[stored].dtype in FLOAT8) != self.floats:
                continue
            names = parts | kept(checkpoint, name.removesuffix(".weight"), ACTIVATIONS)
            yield (self._short if short else self._bytes)(checkpoint, name, names)

    def _bytes(self, checkpoint: Checkpoint, name: str, names: dict[str, str]) -> Packed:
        weight, scale = checkpoint[names["weight"]], checkpoint[names["scale"]]
        where = f"{checkpoint.source}: {names['weight']!r}"
        shape = tuple(weight.shape)
        if weight.dtype not in ("I8", *FLOAT8) or scale.dtype not in NATIVE:
            raise UnsupportedError(
                f"{where}: {weight.dtype} with {scale.dtype} scales; int8 or 8-bit floats with "
                f"scales of {', '.join(NATIVE)} were expected. Quantize the original again."
            )
        per_row = (shape[:1], (), (1,)) if shape[:1] == (1,) else (shape[:1],)
        if len(shape) < 2 or math.prod(scale.shape[1:]) != 1 or scale.shape[:1] not in per_row:
            raise UsageError(
                f"{where}: shape {list(shape)} with scales {list(scale.shape)}; one scale for each "
                "row was expected. Download it again."
            )
        return found(self, checkpoint, name, shape, scale.dtype, names, bits=8)

    def _short(self, checkpoint: Checkpoint, name: str, names: dict[str, str]) -> Packed:
        words, scale, shift = (checkpoint[names[role]] for role in ("weight", "scale", "shift"))
        where = f"{checkpoint.source}: {names['weight']!r}"
        if words.dtype != "U8" or scale.dtype not in NATIVE or len(words.shape) < 2:
            raise UnsupportedError(
                f"{where}: {words.dtype} {list(words.shape)} with {scale.dtype} scales; bytes with "
                f"scales of {', '.join(NATIVE)} were expected. Quantize the original again."
            )
        if shift.dtype not in (scale.dtype, "U8", "I8") or shift.shape != scale.shape:
            raise UsageError(
                f"{where}: scales {scale.dtype} {list(scale.shape)}, shifts {shift.dtype} "
                f"{list(shift.shape)}; the same shape was expected. Download it again."
            )
        size, count = math.prod(words.shape[1:]), scale.shape[0] if scale.shape else 0
        lone = count == 1 and tuple(scale.shape) == tuple(words.shape) == (1, size)
        if math.prod(scale.shape) != (size if lone else count) or not count:
            raise UsageError(
                f"{where}: codes {list(words.shape)}, scales {list(scale.shape)}; one scale for "
                "each group was expected. Download it again."
            )
        bits = stored_bits(checkpoint, name, words.shape[0], count)
        shape = weight_shape(checkpoint, name, count, tuple(words.shape[1:]))
        fields = {"bits": bits, "size": size}
        return found(self, checkpoint, name, shape, scale.dtype, names, **fields)

    def _book(self, packed: Packed) -> Codebook:
        if self.floats:
            return book(packed.outlines["weight"].dtype)
        return Integers(-128, 127) if _bits(packed) == 8 else Integers(0, (1 << _bits(packed)) - 1)

    def _grid(self, packed: Packed, scale: Tensor, shift: Tensor | None, per: int) -> Grid:
        """scale and shift (groups, 1), as stored; `per` groups in a row of the grid."""
        size = cast(int, packed.fields.get("size", 0))
        lone = shift is not None and scale.shape[1] > 1  # one scale for each weight of one row
        wide = scale.float() if lone else scale.float().reshape(-1, per)
        grid = Grid(self._book(packed), wide, group=1 if lone else size if per > 1 else 0)
        if shift is None:
            return grid
        moved = shift.float().reshape(wide.shape)
        if not shift.dtype.is_floating_point:
            return replace(grid, zero=moved)
        return Stepped(grid.book, wide, shift=-moved, group=grid.group, step=scale.dtype)

    def _stored_grid(self, packed: Packed, start: int, stop: int, per: int) -> Grid:
        scale = packed.whole("scale").reshape(_groups(packed), -1)[start:stop]
        shift = packed.whole("shift")[start:stop] if "shift" in packed.parts else None
        if shift is not None:
            shift = shift.reshape(scale.shape)
        return self._grid(packed, scale, shift, per)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        per = _groups(packed) // packed.rows
        grid = self._stored_grid(packed, start * per, stop * per, per)
        if _bits(packed) < 8:
            codes = _unpacked(packed, start * per, stop * per)
            return grid, codes.reshape(stop - start, -1)
        if self.floats:
            return grid, float8_rows(packed, start, stop)
        return grid, packed.part_rows("weight", start, stop)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        """Scales of the largest magnitude, or of min and max."""
        groups = matrix.reshape(_groups(packed), -1)
        scale, shift = self._scales(packed, groups)
        if packed.parts:
            old = self._stored_grid(packed, 0, len(groups), 1)
            change = better(groups, old, self._grid(packed, scale, shift, 1))
            scale = torch.where(change, scale, packed.whole("scale").reshape(scale.shape))
            if shift is not None:
                shift = torch.where(change, shift, packed.whole("shift").reshape(scale.shape))
        stored = {"scale": scale} if shift is None else {"scale": scale, "shift": shift}
        parts = {role: part.reshape(packed.outlines[role].shape) for role, part in stored.items()}
        for role, outline in packed.outlines.items():
            if role.startswith(KEPT):
                parts[role] = packed.whole(role) if packed.parts else _ones(outline)
        return self._grid(packed, scale, shift, len(groups) // packed.rows), parts

    def _scales(self, packed: Packed, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        """scale = max |w| / high, or (max - min) / high with shift = -min, as stored.

        Source: quanto's AbsmaxOptimizer and MaxOptimizer (tensor/optimizers/).
        """
        high = self._book(packed).high
        dtype = torch_dtype(packed.outlines["scale"].dtype)
        assert dtype is not None
        shift = None
        if _bits(packed) == 8:
            scale = _as(dtype, groups.abs().amax(1, keepdim=True) / high)
        else:
            lone = packed.outlines["scale"].shape == groups.shape != (1, 1)
            least = groups if lone else groups.amin(1, keepdim=True)
            greatest = groups if lone else groups.amax(1, keepdim=True)
            scale, shift = _as(dtype, (greatest - least) / high), (-least).to(dtype)
            if packed.outlines["shift"].dtype not in NATIVE:
                kind = torch_dtype(packed.outlines["shift"].dtype)
                steps = -least / torch.where(scale == 0, 1.0, scale.float())
                shift = steps.round_().clamp_(0, high).to(kind)
        for part in (scale, shift):
            if part is not None and not bool(torch.isfinite(part).all()):
                raise UsageError(
                    f"{packed.name!r}: its values are too large for scales of {dtype}. Repair it, "
                    "or pack it as F32."
                )
        return scale, shift

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        outline, bits = packed.outlines["weight"], _bits(packed)
        if self.floats:
            return {"weight": float8_stored(packed, codes)}
        if bits == 8:
            return {"weight": codes.reshape(outline.shape)}
        slabs = 8 // bits
        rows = codes.reshape(_groups(packed), -1)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % slabs))
        words = torch.zeros_like(rows[: len(rows) // slabs])
        for place, slab in enumerate(rows.chunk(slabs)):
            words |= slab << place * bits
        return {"weight": words.reshape(outline.shape)}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """options: bits (8), of 8, 4 and 2."""
        bits = cast(int, options.get("bits", 8))
        if bits not in (8, 4, 2) or (self.floats and bits != 8):
            expected = "8" if self.floats else "8, 4 or 2"
            raise UsageError(f"{self.title}: {bits} bits; expected {expected}.")
        if len(shape) != 2 or 0 in shape:
            raise UnsupportedError(f"{name!r}: {self.title} packs matrices, not {list(shape)}.")
        rows, columns = shape
        beside = {key: Outline(f"{name}.{key}", native, ()) for key in ("_scale", "_shift")}
        module = name.removesuffix(".weight")
        outlines: dict[str, Outline] = {}
        if bits == 8:
            kind = "F8_E4M3" if self.floats else "I8"
            outlines["weight"] = Outline(f"{name}._data", kind, shape)
            outlines["scale"] = replace(beside["_scale"], shape=(rows, 1) if rows > 1 else ())
            fields: dict[str, object] = {"bits": 8}
        else:
            size = group_of(columns)
            count = rows * columns // size
            of_codes = (count, size) if size < columns else shape
            of_scales = (count, 1) if count > 1 else of_codes
            words = (-(-count * bits // 8), *of_codes[1:])
            outlines["weight"] = Outline(f"{name}._data._data", "U8", words)
            outlines["scale"] = replace(beside["_scale"], shape=of_scales)
            outlines["shift"] = replace(beside["_shift"], shape=of_scales)
            fields = {"bits": bits, "size": size}
        for key in ACTIVATIONS:
            outlines[f"{KEPT}{key}"] = Outline(f"{module}.{key}", native, ())
        return Packed(self, name, shape, native, outlines, {}, fields)

    def config(self, **options: object) -> dict[str, object]:
        """As diffusers reads it, and transformers' QuantoConfig."""
        weights = "float8" if self.floats else f"int{options.get('bits', 8)}"
        return {
            "quant_method": "quanto",
            "weights": weights,
            "weights_dtype": weights,
            "activations": None,
            "modules_to_not_convert": options.get("skip") or [],
        }


class QuantoFloat8(Quanto):
    name = "quanto-fp8"
    title = "optimum-quanto, 8-bit floats"
    floats = True


def _bits(packed: Packed) -> int:
    return cast(int, packed.fields["bits"])


def _groups(packed: Packed) -> int:
    size = cast(int, packed.fields.get("size", packed.columns))
    return packed.rows * packed.columns // size


def _as(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """Scales in a dtype; none that is not 0 becomes 0."""
    least = torch.finfo(dtype).smallest_normal
    return torch.where(scale > 0, scale.clamp(min=least), scale).to(dtype)


def _ones(outline: Outline) -> Tensor:
    return torch.ones(outline.shape, dtype=torch_dtype(outline.dtype))


def _unpacked(packed: Packed, start: int, stop: int) -> Tensor:
    """Rows start:stop of the codes, from the rows of bytes that hold them."""
    bits = _bits(packed)
    words: LazyTensor = packed.parts["weight"]
    height = words.shape[0]
    found = []
    for slab in range(8 // bits):
        first, last = max(start - slab * height, 0), min(stop - slab * height, height)
        if first < last:
            found.append((words.rows(first, last).torch() >> slab * bits) & ((1 << bits) - 1))
    return torch.cat(found)
