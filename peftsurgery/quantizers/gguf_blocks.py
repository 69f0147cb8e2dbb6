"""Blocks of GGUF files: how rows of weights lie in them.

A row is cut into blocks of 32 or 256 weights; a block holds its scales and its codes together. The
rows of some weights lie in another order than the model has them (`heads`, see `gguf_names`): the
matrix of a Packed has the model's.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.ggml import BY_NAME
from peftsurgery.checkpoint.gguf import GGUFTensor
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.books import Codebook
from peftsurgery.quantizers.grids import Grid, Rounding, nearest
from peftsurgery.quantizers.packed import Format, Outline, Packed, check_finite

CHUNK = 1 << 21  # weights whose scales are looked for at once
CLEARLY = 1.25  # times the error that steps of a size make on average: scales no longer serve
SHRUNK = 0.5  # values that reach less far than this part of what they did deserve finer scales


def rope_order(rows: int, heads: int) -> Tensor:
    """order, with model[r] = stored[order[r]]: the two halves of every head, which llama.cpp
    interleaves (LlamaModel.permute of convert_hf_to_gguf.py).
    """
    return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).reshape(-1)


class RowOrder(Format):
    """Formats of one stored tensor, role "weight", whose rows may lie in another order."""

    def order(self, packed: Packed) -> Tensor | None:
        """Stored row of every row of the matrix; None when they are the same."""
        heads = packed.fields.get("heads")
        return rope_order(packed.rows, heads) if isinstance(heads, int) and heads else None

    def stored(self, packed: Packed, matrix: Tensor) -> Tensor:
        """A tensor of one row for each row of the matrix, brought into the order of the file."""
        order = self.order(packed)
        if order is None:
            return matrix
        found = torch.empty_like(matrix)
        found[order] = matrix
        return found


class Blocks(RowOrder):
    """Blocks of `block` weights in `size` bytes; `group` weights share a scale."""

    group: ClassVar[int]
    book: ClassVar[Codebook]
    largest_code: ClassVar[int]  # all bits set

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            cls.title = f"GGUF {cls.name}"

    def __init__(self) -> None:
        kind = BY_NAME[self.name]
        self.block, self.size = kind.block, kind.size
        ones = torch.full((1, self.block), self.largest_code, dtype=torch.uint8)
        self.scale_bits = ~self.place(ones)[0]  # (size,) the bits that hold no codes

    @abc.abstractmethod
    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scale and shift (n, block / group) fp32, and codes (n, block), of blocks (n, size)."""

    @abc.abstractmethod
    def place(self, codes: Tensor) -> Tensor:
        """Blocks (n, size) that hold codes (n, block) and zeros for their scales."""

    @abc.abstractmethod
    def scales(self, values: Tensor) -> Tensor:
        """Blocks (n, size) that hold fresh scales for values (n, block) and zeros for codes."""

    def encode(self, values: Tensor) -> Tensor:
        """Blocks (n, size) of values (n, block), as the reference implementation makes them."""
        held = self.scales(values)
        scale, shift, _ = self.unpack(held)
        return held | self.place(self._flat(scale, shift).nearest(values))

    # a packed weight ----------------------------------------------------------------------------

    def packed(self, name: str, tensor: GGUFTensor, *, heads: int = 0) -> Packed:
        """A stored tensor as the weight `name`; heads: of rows in llama.cpp's order of rope."""
        outline = Outline(tensor.name, "U8", tuple(tensor.shape))
        fields = {"heads": heads}
        return Packed(
            self, name, tensor.weight_shape, "F16", {"weight": outline}, {"weight": tensor}, fields
        )

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for name, tensor in checkpoint.items():
            if isinstance(tensor, GGUFTensor) and tensor.ggml_type == self.name:
                yield self.packed(name, tensor)

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        if not shape or shape[-1] % self.block:
            raise UnsupportedError(
                f"{name!r}: {self.title} packs rows of a multiple of {self.block} weights, this is "
                f"{list(shape)}."
            )
        stored = (*shape[:-1], shape[-1] // self.block * self.size)
        return Packed(self, name, shape, native, {"weight": Outline(name, "U8", stored)})

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        return self._grid(packed, self._raw(packed.parts["weight"]), start, stop)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        values = self.stored(packed, matrix).reshape(-1, self.block)
        if packed.parts:
            held = self._raw(packed.parts["weight"]) & self.scale_bits
        else:
            held = torch.empty(len(values), self.size, dtype=torch.uint8)
        step = max(1, CHUNK // self.block)
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            if packed.parts:
                self._refit(held[rows], values[rows], self._raw(packed.parts["weight"])[rows])
            else:
                held[rows] = self.scales(values[rows])
        grid, _ = self._grid(packed, held, 0, packed.rows)
        return grid, {"weight": held.reshape(packed.outlines["weight"].shape)}

    def _refit(self, held: Tensor, values: Tensor, before: Tensor) -> None:
        """Fresh scales for the blocks whose old ones do not serve: they round with clearly more
        error than steps of their size do on average (s² / 12 a weight), or reach twice as far as
        needed; and only when the fresh ones are better.
        """
        scale, shift, codes = self.unpack(before)
        old = self._flat(scale, shift)
        error = old.values(old.nearest(values)).sub_(values).square_().sum(1)
        expected = scale.square().sum(1) * (CLEARLY * self.group / 12)
        reach = old.values(codes).abs_().amax(1)
        ask = (error > expected) | (values.abs().amax(1) < SHRUNK * reach)
        ask = (ask & (error > 0)).nonzero()[:, 0]
        if not len(ask):
            return
        wanted = values[ask]
        fresh = self.scales(wanted)
        scale, shift, _ = self.unpack(fresh)
        new = self._flat(scale, shift)
        better = new.values(new.nearest(wanted)).sub_(wanted).square_().sum(1) < error[ask]
        held[ask[better]] = fresh[better]

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        flat = self.stored(packed, codes).reshape(-1, self.block)
        return {"weight": self.place(flat).reshape(packed.outlines["weight"].shape)}

    def join(self, scales: dict[str, Tensor], codes: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": scales["weight"] | codes["weight"]}

    def quantize(
        self, packed: Packed, weight: Tensor, rounding: Rounding = nearest
    ) -> dict[str, Tensor]:
        """As `Format.quantize`; fresh ones byte for byte as the reference implementation."""
        if packed.parts or rounding is not nearest:
            return super().quantize(packed, weight, rounding)
        matrix = self.to_matrix(packed, weight.float())
        check_finite(packed.name, matrix)
        raw = self.encode(self.stored(packed, matrix).reshape(-1, self.block))
        return {"weight": raw.reshape(packed.outlines["weight"].shape)}

    # blocks as a grid ---------------------------------------------------------------------------

    def _raw(self, part: LazyTensor) -> Tensor:
        return part.torch().reshape(-1, self.size)

    def _flat(self, scale: Tensor, shift: Tensor | None) -> Grid:
        """The grid whose rows are blocks."""
        return Grid(self.book, scale, shift=shift, group=self.group)

    def _grid(self, packed: Packed, raw: Tensor, start: int, stop: int) -> tuple[Grid, Tensor]:
        """Grid and codes of rows of the matrix, from all blocks of the weight."""
        columns, order = packed.columns, self.order(packed)
        if order is not None:
            by_row = raw.reshape(packed.rows, columns // self.block, self.size)
            raw, skipped = by_row[order[start:stop]].reshape(-1, self.size), 0
        else:
            first = start * columns // self.block
            raw = raw[first : -(-stop * columns // self.block)]
            skipped = start * columns - first * self.block
        scale, shift, codes = self.unpack(raw)
        count = (stop - start) * columns
        codes = codes.reshape(-1)[skipped : skipped + count].reshape(-1, columns)
        if columns % self.group == 0:
            place, group = slice(skipped // self.group, (skipped + count) // self.group), self.group
        else:  # groups run across rows
            each = torch.arange(skipped, skipped + count)
            place, group = torch.div(each, self.group, rounding_mode="floor"), 1
        across = columns // group

        def cut(values: Tensor) -> Tensor:
            return values.reshape(-1)[place].reshape(-1, across)

        shift = cut(shift) if shift is not None else None
        return Grid(self.book, cut(scale), shift=shift, group=group), codes


# pieces of blocks ---------------------------------------------------------------------------------


def half(raw: Tensor) -> Tensor:
    """fp16 values, as fp32 (n, k), of bytes (n, 2k)."""
    return raw.contiguous().view(torch.float16).float()


def as_half(values: Tensor) -> Tensor:
    """Bytes (n, 2k) of values (n, k) in fp16. UsageError when one does not fit."""
    found = values.half()
    if not bool(torch.isfinite(found).all()):
        raise UsageError(
            f"a scale of {float(values.abs().max()):g} does not fit the fp16 of a GGUF block; the "
            "weights are too large. Repair them, or keep them unpacked."
        )
    return found.contiguous().view(torch.uint8)


def planes(raw: Tensor, bits: int, chunk: int) -> Tensor:
    """Codes (n, m · 8 / bits) of bytes (n, m): of every `chunk` bytes the lowest `bits` of each,
    then the next.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    count, size = raw.shape
    wide = raw.reshape(count, size // chunk, 1, chunk) >> shifts[:, None]
    return (wide & ((1 << bits) - 1)).reshape(count, size * len(shifts))


def pack_planes(codes: Tensor, bits: int, chunk: int) -> Tensor:
    """The inverse of `planes`."""
    count = 8 // bits
    wide = codes.reshape(codes.shape[0], -1, count, chunk)
    found = torch.zeros_like(wide[:, :, 0])
    for i in range(count):
        found |= wide[:, :, i] << (i * bits)
    return found.reshape(codes.shape[0], -1)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is infinite."""
    found = 1 / scale
    return torch.where(torch.isinf(found), 0.0, found)
