"""What the formats of scaled 8-bit floats share: w = code · scale of its tile."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.books import Float8
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Format, Outline, Packed, better_scales, found
from peftsurgery.quantizers.tiles import Tiles, tiled

FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = ("F32", "F16", "BF16", "F8_E8M0", "U8")  # U8: the exponents of E8M0, as bytes
SMALL16 = torch.finfo(torch.float16).tiny
KEPT = "kept "  # begins the roles of parts that come back as they were


@cache
def book(dtype: str) -> Float8:
    """The values of an 8-bit float by its safetensors name; UnsupportedError without torch's."""
    kind = torch_dtype(dtype)
    if kind is None:
        raise UnsupportedError(f"this torch has no {dtype}. Update torch to 2.7 or newer.")
    return Float8(kind)


def scales_of(stored: Tensor) -> Tensor:
    """Stored scales as fp32; bytes are exponents, 2^(byte - 127)."""
    if stored.dtype == torch.uint8:
        stored = stored.view(torch.float8_e8m0fnu)
    return stored.float()


def as_stored(scales: Tensor, dtype: str) -> Tensor:
    """fp32 scales in the dtype of the file; what that cannot hold is rounded, E8M0 upwards."""
    if dtype in ("F8_E8M0", "U8"):
        bytes_ = exponents(scales).add_(127).clamp_(0, 254).to(torch.uint8)
        return bytes_ if dtype == "U8" else bytes_.view(torch.float8_e8m0fnu)
    kind = torch_dtype(dtype)
    assert kind is not None
    return scales.to(kind)


def exponents(scales: Tensor) -> Tensor:
    """The least e with 2^e ≥ s, for s > 0; exact."""
    mantissa, exponent = torch.frexp(scales)  # mantissa in [0.5, 1)
    return exponent - (mantissa == 0.5).to(exponent.dtype)


class ScaledFloat8(Format, abc.ABC):
    """Parts `weight`, the codes, and `scale`. fields: `tiles`; `powers`, whether scales that could
    hold any value are powers of two, None for: if those that are there are.
    """

    def _claim(
        self,
        checkpoint: Checkpoint,
        name: str,
        native: str,
        names: Mapping[str, str],
        *,
        block: tuple[int, int] | None = None,
        stacked: bool = False,
        powers: bool | None = False,
    ) -> Packed:
        """A weight whose codes and scale are there, checked."""
        weight, scale = checkpoint[names["weight"]], checkpoint[names["scale"]]
        shape = tuple(weight.shape)
        if scale.dtype not in SCALES:
            raise UnsupportedError(
                f"{checkpoint.source}: {names['scale']!r} is {scale.dtype}; expected one of "
                f"{', '.join(SCALES)}. Quantize the original again."
            )
        tiles = None
        if len(shape) >= (3 if stacked else 2):
            tiles = tiled(shape, tuple(scale.shape), stacked=stacked, block=block)
        if tiles is None:
            raise UsageError(
                f"{checkpoint.source}: {names['scale']!r} of shape {list(scale.shape)} does not "
                f"fit {names['weight']!r} of shape {list(shape)}. Expected one scale, one for each "
                "row or one for each block. Download the file again."
            )
        return found(self, checkpoint, name, shape, native, names, tiles=tiles, powers=powers)

    def columns(self, packed: Packed) -> int:
        return _tiles(packed).columns

    def _scales(self, packed: Packed) -> Tensor:
        tiles = _tiles(packed)
        stored = scales_of(packed.whole("scale"))
        return stored.reshape(tiles.stack * tiles.down, tiles.across)

    def _grid(self, packed: Packed, scales: Tensor, start: int, stop: int) -> Grid:
        tiles = _tiles(packed)
        spread = tiles.spread(scales, start, stop)
        return Grid(book(packed.outlines["weight"].dtype), spread, group=tiles.width)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        codes = float8_rows(packed, start, stop)
        return self._grid(packed, self._scales(packed), start, stop), codes

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        tiles, outline = _tiles(packed), packed.outlines["scale"]
        held = book(packed.outlines["weight"].dtype)
        scales = tiles.largest(matrix) / held.high
        scales = torch.where(scales > 0, scales, 1.0)
        if self._powers(packed):
            scales = torch.ldexp(torch.ones_like(scales), exponents(scales))
        if outline.dtype == "F16":  # of a narrow range
            scales = scales.clamp(SMALL16, torch.finfo(torch.float16).max)
        scales = scales_of(as_stored(scales, outline.dtype))
        if packed.parts:
            old = self._scales(packed)
            # up to the outermost step little is cut off; down to half, floats are as good
            top = 1 - float(held.levels[-2]) / held.high
            moved = (scales > old * (1 + top)) | (scales <= old / 2)
            scales = self._better(packed, matrix, old, scales, moved)
        others = {role: packed.whole(role) for role in packed.parts if role.startswith(KEPT)}
        stored = as_stored(scales, outline.dtype).reshape(outline.shape)
        return self._grid(packed, scales, 0, len(matrix)), {"scale": stored, **others}

    def _better(
        self, packed: Packed, matrix: Tensor, old: Tensor, new: Tensor, moved: Tensor
    ) -> Tensor:
        """Scales of the tiles: the old ones, but of those that `moved` the new ones where they
        round with less squared error.
        """
        tiles = _tiles(packed)
        if tiles.height == 1 and tiles.across == 1:
            levels = book(packed.outlines["weight"].dtype)
            flat = (old[:, 0], new[:, 0], moved[:, 0])
            return better_scales(matrix, *flat, lambda scale: Grid(levels, scale))[:, None]
        before, after = (
            tiles.error(matrix, self._grid(packed, some, 0, len(matrix)), moved)
            for some in (old, new)
        )
        return torch.where(moved & (after < before), new, old)

    def _powers(self, packed: Packed) -> bool:
        told = packed.fields.get("powers")
        if told is None and packed.parts:
            scales = self._scales(packed)
            return scales.numel() > 1 and bool((torch.frexp(scales)[0] == 0.5).all())
        return bool(told)

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": float8_stored(packed, codes)}

    def _fresh(
        self,
        name: str,
        shape: tuple[int, ...],
        native: str,
        scale: Outline,
        *,
        dtype: str = "F8_E4M3",
        stacked: bool = False,
        block: tuple[int, int] | None = None,
        powers: bool = False,
    ) -> Packed:
        tiles = tiled(shape, scale.shape, stacked=stacked, block=block)
        assert tiles is not None
        outlines = {"weight": Outline(name, dtype, shape), "scale": scale}
        fields = {"tiles": tiles, "powers": powers}
        return Packed(self, name, shape, native, outlines, {}, fields)


def _tiles(packed: Packed) -> Tiles:
    tiles = packed.fields["tiles"]
    assert isinstance(tiles, Tiles)
    return tiles


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is the matrices of several experts: three dimensions, and a parameter of its
    own rather than the `.weight` of a layer.
    """
    return len(shape) == 3 and not name.endswith(".weight")


def float8_rows(packed: Packed, start: int, stop: int) -> Tensor:
    """The codes of rows start:stop of the matrix, uint8."""
    return packed.part_rows("weight", start, stop).view(torch.uint8)


def float8_stored(packed: Packed, codes: Tensor) -> Tensor:
    """Codes (rows, columns) in the dtype and the shape of the file."""
    outline = packed.outlines["weight"]
    return codes.view(book(outline.dtype).float_dtype).reshape(outline.shape)


def kept(checkpoint: Checkpoint, module: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """role -> name of the parts of a module that come back as they were."""
    names = {f"{KEPT}{suffix}": f"{module}.{suffix}" for suffix in suffixes}
    return {role: name for role, name in names.items() if name in checkpoint}
