"""Packed formats, one file each, and a checkpoint's weights seen through them."""

from __future__ import annotations

from peftsurgery.quantizers.grids import Grid, Rounding, nearest
from peftsurgery.quantizers.packed import Format, Packed, PackedTensor
from peftsurgery.quantizers.registry import (
    FORMATS,
    PackedCheckpoint,
    by_name,
    is_marker,
    logical,
)

__all__ = [
    "FORMATS",
    "Format",
    "Grid",
    "Packed",
    "PackedCheckpoint",
    "PackedTensor",
    "Rounding",
    "by_name",
    "is_marker",
    "logical",
    "nearest",
]
