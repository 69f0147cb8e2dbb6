"""LLM.int8 of bitsandbytes (Dettmers et al. 2022, arXiv:2208.07339): one scale per row.

Stored: `X.weight` int8 (rows, columns), `X.SCB` fp32 (rows,), the largest magnitude of each row,
and `X.weight_format`, uint8, 0 for plain rows:

    w = code · SCB / 127, computed as (code · SCB) · 0.0078740157
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.grids import Grid, magnitudes
from peftsurgery.quantizers.packed import Format, Outline, Packed, better_scales, found

FACTOR = 7.874015718698502e-3  # 1/127 in fp32, as bitsandbytes writes it


class Int8(Format):
    name = "int8"
    title = "bitsandbytes LLM.int8"
    book = Integers(-127, 127)

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for stored, scale in checkpoint.items():
            if not stored.endswith(".SCB"):
                continue
            module = stored.removesuffix(".SCB")
            weight = f"{module}.weight"
            if weight not in checkpoint or checkpoint[weight].dtype != "I8":
                raise UsageError(
                    f"{checkpoint.source}: {stored!r} without an int8 {weight!r}. Download it "
                    "again."
                )
            shape = tuple(checkpoint[weight].shape)
            if len(shape) != 2 or tuple(scale.shape) != shape[:1]:
                raise UsageError(
                    f"{checkpoint.source}: {stored!r} has shape {list(scale.shape)}, the weight "
                    f"{list(shape)}; one value per row was expected."
                )
            names = {"weight": weight, "scale": stored}
            order = f"{module}.weight_format"
            if order in checkpoint:
                if bytes(checkpoint[order].read()) != b"\0":
                    raise UnsupportedError(
                        f"{checkpoint.source}: {order!r}: the weight lies in the order of a GPU "
                        "kernel (col32, turing or ampere). Save it with bitsandbytes 0.45 or newer."
                    )
                names["format"] = order
            yield found(self, checkpoint, weight, shape, "F16", names)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        codes = packed.parts["weight"].rows(start, stop).torch()
        return self._grid(packed.whole("scale")[start:stop]), codes

    def _grid(self, largest: Tensor) -> Grid:
        return Grid(self.book, largest.float().reshape(-1, 1), factor=FACTOR)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        largest = magnitudes(matrix, packed.columns)[:, 0]
        parts: dict[str, Tensor] = {}
        if packed.parts:
            old = packed.whole("scale").float()
            # by a step up, where that is cut off; by five down, where the grid is too wide
            step = old / self.book.high
            moved = (largest > old + step) | (largest < old - 5 * step)
            largest = better_scales(matrix, old, largest, moved, self._grid)
        if "format" in packed.outlines:
            parts["format"] = torch.zeros(packed.outlines["format"].shape, dtype=torch.uint8)
        return self._grid(largest), {"scale": largest, **parts}

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": codes}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        if len(shape) != 2:
            raise UnsupportedError(f"{name!r}: LLM.int8 packs matrices, this is {list(shape)}.")
        module = name.removesuffix(".weight")
        outlines = {
            "weight": Outline(name, "I8", shape),
            "scale": Outline(f"{module}.SCB", "F32", shape[:1]),
            "format": Outline(f"{module}.weight_format", "U8", ()),
        }
        return Packed(self, name, shape, native, outlines)

    def config(self, **options: object) -> dict[str, object]:
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": False,
            "_load_in_8bit": True,
            "load_in_4bit": False,
            "load_in_8bit": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": options.get("skip"),
            "llm_int8_threshold": 6.0,
        }
