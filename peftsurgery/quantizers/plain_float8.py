"""Weights cast to 8-bit floats, without a scale: the value of a code is the float that it is.

Stored: `X.weight`, F8_E4M3 or F8_E5M2 (or their FNUZ variants), as kohya's and ComfyUI's "fp8"
checkpoints hold them. OCP Microscaling Formats 1.0, 2023; FNUZ: Noune et al. 2022,
arXiv:2206.02915.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.block_float8 import scales_blocks
from peftsurgery.quantizers.configs import quantization_config
from peftsurgery.quantizers.float8 import FLOAT8, book, float8_rows, float8_stored, is_stack
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Format, Outline, Packed, found


class PlainFloat8(Format):
    """Claims every 8-bit float of two or more dimensions that no other format has claimed: the last
    one to be asked. What is larger than the largest value saturates.
    """

    name = "fp8"
    title = "8-bit floats without scales"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for name, tensor in checkpoint.items():
            if tensor.dtype in FLOAT8 and len(tensor.shape) >= 2:
                _check_alone(checkpoint, name)
                names = {"weight": name}
                yield found(self, checkpoint, name, tuple(tensor.shape), "BF16", names)

    def columns(self, packed: Packed) -> int:
        if is_stack(packed.name, packed.shape):
            return packed.shape[-1]
        return super().columns(packed)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        return self._grid(packed), float8_rows(packed, start, stop)

    def _grid(self, packed: Packed) -> Grid:
        return Grid(book(packed.outlines["weight"].dtype), torch.ones(1, 1))

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        return self._grid(packed), {}

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": float8_stored(packed, codes)}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """Options: `dtype`, one of F8_E4M3 (default), F8_E5M2 and their FNUZ variants."""
        dtype = str(options.get("dtype", "F8_E4M3"))
        if dtype not in FLOAT8:
            raise UsageError(f"{self.title}: dtype {dtype!r}; expected {', '.join(FLOAT8)}.")
        return Packed(self, name, shape, native, {"weight": Outline(name, dtype, shape)})


# Neighbours of a weight, `{}` its name, `{base}` that of its layer and `{part}` what torchao's
# parts
# begin with: scales that another format reads or refuses, and scales that none does.
_READ = (
    "{base}.weight_scale",
    "{base}.weight_scale_inv",
    "{}_scale_inv",
    "{base}.scale_weight",
    "{base}.qscale_weight",
    "{base}._scale",
    "{part}scale",
)
_UNREAD = ("{}_scale", "{}.scale", "{}._scale", "{base}.scale")


def _check_alone(checkpoint: Checkpoint, name: str) -> None:
    """UnsupportedError for a weight beside a scale that no format reads, UsageError for one without
    the scale that the config promises.
    """
    base = name.removesuffix(".weight").removesuffix("._data")
    if scales_blocks(checkpoint, f"{base}.scale"):
        return
    part = name.removesuffix("qdata")
    if any(neighbour.format(name, base=base, part=part) in checkpoint for neighbour in _READ):
        return
    for neighbour in _UNREAD:
        scale = neighbour.format(name, base=base)
        if scale in checkpoint:
            raise UnsupportedError(
                f"{checkpoint.source}: {name!r} is of 8-bit floats with a scale {scale!r}, in a "
                "format that is not known. Merge into the original and quantize the result."
            )
    if name.endswith((".weight_scale", "_scales")):
        return
    method = quantization_config(checkpoint, name).get("quant_method")
    if method is not None:
        raise UsageError(
            f"{checkpoint.source}: {name!r} is of 8-bit floats, and config.json says that they "
            f"have scales ({method}), but there is none beside it. Download the missing file."
        )
