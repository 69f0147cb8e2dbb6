"""Whole numbers of compressed-tensors (0.20; llm-compressor, vLLM): `pack-quantized` and
`int-quantized`.

    w = scale · (q - zero),    q and zero in -2^(bits - 1) … 2^(bits - 1) - 1

`X.weight_scale`: one for the tensor (1,), for a row (rows, 1), or for a group of inputs (rows,
groups), floats. pack-quantized: `X.weight_packed` int32, a row's codes q + 2^(bits - 1) one after
the other from the lowest bits on, `X.weight_shape` the shape, `X.weight_zero_point` packed the same
along the rows, `X.weight_g_idx` the group of every input where they are out of order (until 2026).
int-quantized: `X.weight` int8, `X.weight_zero_point` int8. Stacked experts have one dimension more.

In older releases (0.10) no code crosses a word: of 3, 5, 6 and 7 bits 10, 6, 5 and 4 lie in one,
its highest bits empty. The width tells the two apart, or these bits.
"""

from __future__ import annotations

import abc
import math
from typing import cast

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import bits
from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.grids import Grid, extremes
from peftsurgery.quantizers.packed import Format, Packed, better

SIDES = {  # role -> parameter
    "scale": "weight_scale",
    "zero": "weight_zero_point",
    "order": "weight_g_idx",
    "shape": "weight_shape",
    "input_scale": "input_scale",
    "input_zero": "input_zero_point",
    "output_scale": "output_scale",
    "output_zero": "output_zero_point",
}


class CompressedIntegers(Format):
    """What the two share. `fields`: bits, padded (no code crosses a word), symmetric (afresh)."""

    @abc.abstractmethod
    def book(self, packed: Packed) -> Integers:
        """What codes stand for."""

    def columns(self, packed: Packed) -> int:
        return packed.shape[-1]

    def _order(self, packed: Packed) -> Tensor | None:
        if "order" not in packed.parts:
            return None
        order = packed.whole("order").reshape(-1)
        groups = packed.outlines["scale"].shape[-1]
        if bool((order == -1).any()):  # never set
            return None
        if len(order) != packed.columns or int(order.min()) < 0 or int(order.max()) >= groups:
            raise UsageError(
                f"{packed.outlines['order'].name!r}: has to name one of {groups} groups for each "
                f"of {packed.columns} inputs. Download it again."
            )
        return order.long()

    def _grid(self, packed: Packed, scale: Tensor, zero: Tensor | None) -> Grid:
        """scale and zero (rows or 1, groups)."""
        groups = scale.shape[1]
        return Grid(
            self.book(packed),
            scale.float(),
            None if zero is None else zero.float(),
            group=packed.columns // groups if groups > 1 else 0,
            order=self._order(packed) if groups > 1 else None,
        )

    def _scale(self, packed: Packed) -> Tensor:
        """(rows or 1, groups)."""
        scale = packed.whole("scale")
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        return scale.reshape(packed.rows, -1)

    def _zero(self, packed: Packed) -> Tensor | None:
        """(rows or 1, groups), in the range of q."""
        if "zero" not in packed.parts:
            return None
        zero = packed.whole("zero")
        if zero.dtype == torch.int32 and self._packs_zeros(packed):
            rows, groups = packed.shape[-2], packed.outlines["scale"].shape[-1]
            codes = unpacked(packed, zero.transpose(-1, -2), rows)
            zero = codes.transpose(-1, -2).reshape(-1, groups).int() - self.book(packed).offset
        return zero.reshape(1, 1) if zero.numel() == 1 else zero.reshape(packed.rows, -1)

    @staticmethod
    def _packs_zeros(packed: Packed) -> bool:
        return "packed" in packed.outlines and len(packed.outlines["scale"].shape) > 1

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        scale, zero = self._scale(packed), self._zero(packed)
        grid = self._grid(packed, scale, zero).rows(start, stop)
        return grid, self.codes(packed, start, stop)

    @abc.abstractmethod
    def codes(self, packed: Packed, start: int, stop: int) -> Tensor:
        """Codes of rows start:stop, (rows, columns)."""

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        if not packed.parts:
            scale, zero = self._fitted(packed, matrix, symmetric=bool(packed.fields["symmetric"]))
            parts = {}
            if "shape" in packed.outlines:
                parts["shape"] = torch.tensor(packed.shape)
            return self._grid(packed, scale, zero), parts | self._stored(packed, scale, zero)
        scale, zero = self._scale(packed), self._zero(packed)
        old = self._grid(packed, scale, zero)
        symmetric = zero is None or not bool(zero.any())  # zeros of 0 may be stored all the same
        new_scale, new_zero = self._fitted(packed, matrix, symmetric=symmetric)
        new = self._grid(packed, new_scale, new_zero)
        flat = matrix if scale.shape[0] > 1 or packed.rows == 1 else matrix.reshape(1, -1)
        change = better(flat, old, new)
        parts = {role: packed.whole(role) for role in packed.parts if role in SIDES}
        if not bool(change.any()):
            return old, parts
        scale = torch.where(change, new_scale, scale)
        if zero is not None and new_zero is not None:
            zero = torch.where(change, new_zero.to(zero.dtype), zero)
        return self._grid(packed, scale, zero), parts | self._stored(packed, scale, zero)

    def _fitted(
        self, packed: Packed, matrix: Tensor, *, symmetric: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Scales in the dtype they are stored in, and zeros, of the shapes of the outlines.

        With 0 in the range: scale = 2 max |w| / (2^bits - 1), or (max - min) / (2^bits - 1) and
        zero = low - min / scale, rounded. Source: compressed-tensors, calculate_qparams.
        """
        shape = packed.outlines["scale"].shape
        if math.prod(shape) == 1:
            least, greatest = (value.reshape(1, 1) for value in torch.aminmax(matrix))
        else:
            groups = shape[-1] if len(shape) > 1 else 1
            order = self._order(packed) if groups > 1 else None
            least, greatest = extremes(matrix, packed.columns // groups, order, groups)
        least, greatest = least.clamp(max=0), greatest.clamp(min=0)
        book = self.book(packed)
        steps = book.high - book.low
        dtype = torch_dtype(packed.outlines["scale"].dtype)
        assert dtype is not None
        if symmetric:
            step = torch.maximum(-least, greatest) * 2 / steps
        else:
            step = (greatest - least) / steps
        step = torch.where(step.to(dtype) == 0, torch.finfo(dtype).eps, step)
        scale = step.to(dtype)
        if not bool(torch.isfinite(scale).all()):
            raise UsageError(f"{packed.name!r}: its scales are too large for {dtype}. Repair it.")
        if symmetric:
            return scale, None
        return scale, (book.low - least / step).round_().clamp_(book.low, book.high)

    def _stored(self, packed: Packed, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        parts = {"scale": scale.reshape(packed.outlines["scale"].shape)}
        if zero is None:
            return parts
        outline = packed.outlines["zero"]
        if outline.dtype == "I32" and self._packs_zeros(packed):
            codes = (zero.int() + self.book(packed).offset).to(torch.uint8)
            codes = codes.reshape(*packed.shape[:-2], packed.shape[-2], -1).transpose(-1, -2)
            stored = words_of(packed, codes).transpose(-1, -2).contiguous()
        else:
            dtype = torch_dtype(outline.dtype)
            assert dtype is not None
            stored = zero.to(dtype).reshape(outline.shape)
        return parts | {"zero": stored}

    def sides(self, checkpoint: Checkpoint, module: str) -> dict[str, str]:
        """Role -> name, for the tensors that lie beside a weight."""
        every = {role: f"{module}.{suffix}" for role, suffix in SIDES.items()}
        return {role: name for role, name in every.items() if name in checkpoint}

    def check(self, packed: Packed) -> None:
        scale = packed.outlines["scale"]
        rows, columns = packed.rows, packed.columns
        count = math.prod(scale.shape)
        if count != 1 and (count % rows or columns % (count // rows)):
            raise UnsupportedError(
                f"{scale.name!r}: has shape {list(scale.shape)}, the weight {list(packed.shape)}; "
                "one scale for the tensor, a row or a group of columns was expected."
            )
        groups = max(1, count // rows)
        if "zero" not in packed.outlines:
            return
        zero = packed.outlines["zero"]
        words = -(-packed.shape[-2] // per_word(packed)) if packed.fields["padded"] else 0
        words = words or -(-packed.shape[-2] * cast(int, packed.fields["bits"]) // 32)
        wanted = count
        if zero.dtype == "I32" and self._packs_zeros(packed):
            wanted = math.prod(packed.shape[:-2]) * words * groups
        if math.prod(zero.shape) != wanted:
            raise UsageError(
                f"{zero.name!r}: has shape {list(zero.shape)}, the scales {list(scale.shape)}: "
                f"{wanted} values were expected. Download it again."
            )


def per_word(packed: Packed) -> int:
    return 32 // cast(int, packed.fields["bits"])


def unpacked(packed: Packed, words: Tensor, count: int) -> Tensor:
    """int32 words (…, w) -> codes (…, count)."""
    size = cast(int, packed.fields["bits"])
    if packed.fields["padded"]:
        return bits.unpack_words(words[..., None], size, per_word(packed)).flatten(-2)[..., :count]
    return bits.unpack_words(words, size, count)


def words_of(packed: Packed, codes: Tensor) -> Tensor:
    size = cast(int, packed.fields["bits"])
    if not packed.fields["padded"]:
        return bits.pack_words(codes, size)
    per = per_word(packed)
    full = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per))
    return bits.pack_words(full.unflatten(-1, (-1, per)), size)[..., 0]


def matrix_of(format: Format, name: str, shape: tuple[int, ...], group: int) -> tuple[int, int]:
    if len(shape) != 2:
        raise UnsupportedError(f"{name!r}: {format.title} packs matrices, this is {list(shape)}.")
    if group != -1 and (group < 1 or shape[1] % group):
        raise UnsupportedError(
            f"{name!r}: {shape[1]} inputs are no multiple of the group, {group}. Choose another "
            "group, or -1 for whole rows."
        )
    return shape[0], shape[1]
