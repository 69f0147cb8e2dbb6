"""NVFP4 as ComfyUI stores it (comfy-kitchen, tensor/nvfp4.py): ModelOpt's names and formula, with
`X.comfy_quant` {"format": "nvfp4"}; but the even column is in the high half of a byte, and the
scales lie in the order of cuBLAS ("1D block scaling factors layout"), padded to multiples of 128 x
4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UnsupportedError
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.nvfp4 import GROUP, ModelOptNvfp4
from peftsurgery.quantizers.packed import Outline, Packed
from peftsurgery.quantizers.scaled_float8 import TOLD, comfy_layers

COMFY = json.dumps({"format": "nvfp4"}).encode()


class ComfyNvfp4(ModelOptNvfp4):
    name = "nvfp4-comfy"
    title = "ComfyUI's NVFP4"
    others = ("input_scale", "comfy_quant")
    high_first = True
    empty = 0.0

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for module, told in comfy_layers(checkpoint).items():
            if told.get("format") == "nvfp4":
                yield self._claim(checkpoint, module)

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return -(-shape[0] // 128) * 128, -(-shape[1] // GROUP // 4) * 4

    def _order(self, shape: tuple[int, ...]) -> Tensor:
        """Where the scale of every (row, group) lies among the stored ones, padding included.

        Tiles of 128 x 4, row-major; in a tile, row r = 32 a + b and group c lie at 16 b + 4 a + c.
        """
        down, across = shape[0] // 128, shape[1] // 4
        places = torch.arange(down * across * 512).reshape(down, across, 32, 4, 4)
        return places.permute(0, 3, 2, 1, 4).reshape(shape)

    def _stored_scales(self, packed: Packed, start: int, stop: int) -> Tensor:
        stored = packed.whole("scale").view(torch.uint8)
        order = self._order(tuple(stored.shape))[start:stop, : packed.columns // GROUP]
        return stored.reshape(-1)[order].view(torch.float8_e4m3fn)

    def _as_stored(self, packed: Packed, scale: Tensor) -> Tensor:
        outline = packed.outlines["scale"]
        order = self._order(outline.shape)[: len(scale), : scale.shape[1]]
        if packed.parts:
            flat = packed.whole("scale").view(torch.uint8).reshape(-1).clone()
        else:
            flat = torch.zeros(math.prod(outline.shape), dtype=torch.uint8)
        flat[order.reshape(-1)] = scale.contiguous().view(torch.uint8).reshape(-1)
        held = flat.reshape(outline.shape)
        return held if outline.dtype == "U8" else held.view(torch.float8_e4m3fn)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        grid, parts = super().fit(packed, matrix)
        if not packed.parts:
            parts[TOLD] = torch.tensor(list(COMFY), dtype=torch.uint8)
        return grid, parts

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """Rows, too, have to be a multiple of 16: ComfyUI would pad the weight."""
        packed = super().fresh(name, shape, native, **options)
        if shape[0] % GROUP:
            raise UnsupportedError(
                f"{name!r}: {self.title}: expected a multiple of {GROUP} outputs, this is "
                f"{list(shape)}."
            )
        told = Outline(f"{name.removesuffix('.weight')}.comfy_quant", "U8", (len(COMFY),))
        return replace(packed, outlines={**packed.outlines, TOLD: told})

    def config(self, **options: object) -> None:
        return None
