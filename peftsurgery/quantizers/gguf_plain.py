"""Tensors of GGUF files that are not quantized, seen as the model has them, and those that are only
passed on.

A plain weight is a grid too: its codes are the bits of its floats, its scale is 1. Its rows may lie
in another order than the model's, and norms of Gemma are stored with 1 added: w = float - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.gguf import GGUFTensor
from peftsurgery.errors import CheckFailed, UnsupportedError
from peftsurgery.quantizers.books import Codebook, wide
from peftsurgery.quantizers.gguf_blocks import RowOrder
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Format, Outline, Packed

_WORDS = {"F32": (torch.float32, torch.int32), "F16": (torch.float16, torch.int16)}
_WORDS["BF16"] = (torch.bfloat16, torch.int16)


class Floats(Codebook):
    """Every value of a floating type, `shift` added; the codes are its bits as whole numbers."""

    def __init__(self, name: str, shift: float = 0.0) -> None:
        self.float_dtype, self.dtype = _WORDS[name]
        self.shift = shift

    @property
    def low(self) -> float:
        return torch.finfo(self.float_dtype).min + self.shift

    @property
    def high(self) -> float:
        return torch.finfo(self.float_dtype).max + self.shift

    @property
    def reach(self) -> tuple[float, float]:
        return self.low, self.high

    def near(self, scaled: Tensor, codes: Tensor | None = None) -> Tensor:
        chosen = self.nearest(scaled)
        if codes is not None:
            codes.copy_(chosen)
        return self.values(chosen)

    def values(self, codes: Tensor, out: Tensor | None = None) -> Tensor:
        found = wide(codes.view(self.float_dtype), out)
        return found.add_(self.shift) if self.shift else found

    def alike(self, codes: Tensor, others: Tensor) -> Tensor:
        return self.values(codes) == self.values(others)

    def nearest(self, units: Tensor) -> Tensor:
        """Halfway between two, the even one. CheckFailed for a value that does not fit."""
        found = (units - self.shift if self.shift else units).to(self.float_dtype)
        if not torch.equal(torch.isfinite(found), torch.isfinite(units)):
            raise CheckFailed(
                f"a value of {float(units.abs().max()):g} does not fit {self.float_dtype}, in "
                "which the GGUF file holds the weight; nothing was kept. Lower the strength."
            )
        return found.contiguous().view(self.dtype)

    def between(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = self.nearest(units)
        value = self.values(near)
        lower = torch.where(value > units, self._next(near, -1), near)
        upper = torch.where(value < units, self._next(near, 1), near)
        below = self.values(lower)
        room = self.values(upper) - below
        share = torch.where(room > 0, (units - below) / room, 0.0)
        return lower, upper, share

    def _next(self, codes: Tensor, step: int) -> Tensor:
        """The neighbour above (1) or below (-1): bits count upwards from 0 on either side."""
        top = torch.iinfo(self.dtype).min
        ordered = torch.where(codes < 0, top - codes, codes) + step
        return torch.where(ordered < 0, top - ordered, ordered).to(self.dtype)


class Plain(RowOrder):
    """A weight of F32, F16 or BF16 in a GGUF file."""

    name, title = "gguf-plain", "GGUF"
    quantizable = False

    def packed(
        self, name: str, tensor: LazyTensor, *, heads: int = 0, shift: float = 0.0
    ) -> Packed:
        """A stored tensor as the weight `name`: rows in the model's order, `shift` added."""
        outline = Outline(tensor.name, tensor.dtype, tuple(tensor.shape))
        fields = {"heads": heads, "shift": shift}
        shape = tuple(tensor.shape)
        return Packed(
            self, name, shape, tensor.dtype, {"weight": outline}, {"weight": tensor}, fields
        )

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for name, tensor in checkpoint.items():
            if tensor.dtype in _WORDS and tensor.shape:
                yield self.packed(name, tensor)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        word = _WORDS[packed.native][1]
        order = self.order(packed)
        stored = packed.whole("weight").reshape(packed.rows, packed.columns)
        rows = stored[start:stop] if order is None else stored[order[start:stop]]
        return self._grid(packed), rows.contiguous().view(word)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        return self._grid(packed), {}

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        flat = self.stored(packed, codes).contiguous().view(_WORDS[packed.native][0])
        return {"weight": flat.reshape(packed.outlines["weight"].shape)}

    def _grid(self, packed: Packed) -> Grid:
        shift = packed.fields.get("shift")
        book = Floats(packed.native, shift if isinstance(shift, float) else 0.0)
        return Grid(book, torch.ones(1, 1))


class Opaque(Format):
    """A GGUF type that is not unpacked: such a weight can be copied, not read."""

    name, title = "gguf-opaque", "GGUF"
    quantizable = False

    def packed(self, name: str, tensor: GGUFTensor) -> Packed:
        """A stored tensor as the weight `name`."""
        outline = Outline(tensor.name, "U8", tuple(tensor.shape))
        fields = {"type": tensor.ggml_type}
        return Packed(
            self, name, tensor.weight_shape, "F16", {"weight": outline}, {"weight": tensor}, fields
        )

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for name, tensor in checkpoint.items():
            if isinstance(tensor, GGUFTensor):
                yield self.packed(name, tensor)

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        self._refuse(packed)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        self._refuse(packed)

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        self._refuse(packed)

    def _refuse(self, packed: Packed) -> NoReturn:
        raise UnsupportedError(
            f"{packed.parts['weight'].path}: {packed.outlines['weight'].name!r} is stored as "
            f"{packed.fields['type']}, which can be copied but not unpacked. Expected F32, F16, "
            "BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or Q2_K to Q6_K. Merge into a file of one of "
            "these, or into the unquantized model."
        )
