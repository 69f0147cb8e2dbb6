"""GGUF formats of blocks of 32 weights with one scale.

Q8_0, Q4_0, Q5_0: w = d · (q - z), z = 0, 8, 16. Q4_1, Q5_1: w = d · q + m. d and m are fp16; the
half of a block that lies in the low bits comes first. Source: ggml, ggml-quants.c.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.gguf_blocks import Blocks, as_half, half, inverse, pack_planes, planes


class Q8_0(Blocks):
    name, group, largest_code = "Q8_0", 32, 255
    book = Integers(-128, 127)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return half(raw[:, :2]), None, raw[:, 2:].view(torch.int8)

    def place(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad(codes.view(torch.uint8), (2, 0))

    def scales(self, values: Tensor) -> Tensor:
        largest = values.abs().amax(1, keepdim=True)
        return torch.nn.functional.pad(as_half(largest / 127), (0, 32))

    def encode(self, values: Tensor) -> Tensor:
        units = values * inverse(values.abs().amax(1, keepdim=True) / 127)
        magnitude = units.abs()
        whole = magnitude.floor()
        rounded = whole + (2 * (magnitude - whole)).floor()  # halves away from zero
        return self.scales(values) | self.place((units.sign() * rounded).to(torch.int8))


class Symmetric(Blocks):
    """w = d · (q - z): d takes the value of largest magnitude to q = 0."""

    group = 32
    zero: ClassVar[int]

    def scales(self, values: Tensor) -> Tensor:
        return self._with_codes(as_half(self._step(values)))

    def _step(self, values: Tensor) -> Tensor:
        furthest = values.gather(1, values.abs().argmax(1, keepdim=True))
        return furthest / -self.zero

    def _with_codes(self, scales: Tensor) -> Tensor:
        return torch.nn.functional.pad(scales, (0, self.size - scales.shape[1]))

    def encode(self, values: Tensor) -> Tensor:
        units = values * inverse(self._step(values)) + (self.zero + 0.5)
        codes = units.trunc().clamp_(0, 2 * self.zero - 1).to(torch.uint8)
        return self.scales(values) | self.place(codes)


class Q4_0(Symmetric):
    name, zero, largest_code = "Q4_0", 8, 15
    book = Integers(-8, 7, 8)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return half(raw[:, :2]), None, planes(raw[:, 2:], 4, 16)

    def place(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad(pack_planes(codes, 4, 16), (2, 0))


class Q5_0(Symmetric):
    name, zero, largest_code = "Q5_0", 16, 31
    book = Integers(-16, 15, 16)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return half(raw[:, :2]), None, _five(raw[:, 2:])

    def place(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad(_pack_five(codes), (2, 0))


class Affine(Blocks):
    """w = d · q + m: from the least value of a block to the greatest."""

    group = 32

    def scales(self, values: Tensor) -> Tensor:
        low, step = self._range(values)
        return torch.nn.functional.pad(as_half(torch.cat((step, low), 1)), (0, self.size - 4))

    def _range(self, values: Tensor) -> tuple[Tensor, Tensor]:
        low = values.amin(1, keepdim=True)
        return low, (values.amax(1, keepdim=True) - low) / self.largest_code

    def encode(self, values: Tensor) -> Tensor:
        low, step = self._range(values)
        units = (values - low) * inverse(step) + 0.5
        codes = units.trunc().clamp_(0, self.largest_code).to(torch.uint8)
        return self.scales(values) | self.place(codes)


class Q4_1(Affine):
    name, largest_code = "Q4_1", 15
    book = Integers(0, 15)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        scales = half(raw[:, :4])
        return scales[:, :1], scales[:, 1:], planes(raw[:, 4:], 4, 16)

    def place(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad(pack_planes(codes, 4, 16), (4, 0))


class Q5_1(Affine):
    name, largest_code = "Q5_1", 31
    book = Integers(0, 31)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        scales = half(raw[:, :4])
        return scales[:, :1], scales[:, 1:], _five(raw[:, 4:])

    def place(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad(_pack_five(codes), (4, 0))


def _five(raw: Tensor) -> Tensor:
    """Codes (n, 32) of bytes (n, 4 + 16): the fifth bits, code i in bit i, and the others."""
    shifts = torch.arange(8, dtype=torch.uint8)
    fifth = ((raw[:, :4, None] >> shifts) & 1).reshape(-1, 32)
    return planes(raw[:, 4:], 4, 16) | (fifth << 4)


def _pack_five(codes: Tensor) -> Tensor:
    """The inverse of `_five`."""
    fifth = (codes >> 4).reshape(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)
    return torch.cat((fifth.sum(2).to(torch.uint8), pack_planes(codes & 15, 4, 16)), 1)
