"""K-quants of GGUF files: super-blocks of 256 weights whose groups have scales that are packed too.

Q2_K, Q4_K, Q5_K: w = d · s_g · q - dmin · m_g, with s and m of 4 (Q2_K) or 6 bits for each group of
16 (Q2_K) or 32. Q3_K, Q6_K: w = d · s_g · (q - z), groups of 16, s of 6 and of 8 bits with a sign.
Source: ggml, ggml-quants.c (Kawrakow 2023, llama.cpp pull request 1684); the search for scales
follows its `make_qkx2_quants` and `make_qx_quants`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.gguf_blocks import Blocks, as_half, half, inverse, pack_planes, planes

SUPER = 256
ROUND = 0.1  # step of the inverse scales that are tried, in codes


class WithMinima(Blocks):
    """w = d · s · q - dmin · m, s and m up to `top`."""

    top: ClassVar[int]
    steps: ClassVar[tuple[float, int]]  # first offset of the code that the maximum goes to, count
    plain_weights: ClassVar[bool] = False  # errors weigh |x| instead of rms + |x|

    def scales(self, values: Tensor) -> Tensor:
        groups = values.reshape(-1, self.group)
        scale, low = self._search(groups)
        count = SUPER // self.group
        scale, low = scale.reshape(-1, count), low.reshape(-1, count)
        d, dmin = (v.amax(1, keepdim=True) / self.top for v in (scale, low))
        s, m = (
            (v * inverse(unit)).round_().clamp_(0, self.top).to(torch.uint8)
            for v, unit in ((scale, d), (low, dmin))
        )
        return self.with_scales(as_half(torch.cat((d, dmin), 1)), s, m)

    def with_scales(self, halves: Tensor, s: Tensor, m: Tensor) -> Tensor:
        """Blocks with d and dmin (n, 4 bytes) and the codes of the scales (n, groups)."""
        raise NotImplementedError

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale and -min (n,) of groups x (n, group), min <= 0: for every way to spread the codes,
        the weighted least squares of x = scale · q + min; the best of them.
        """
        weight = x.abs()
        if not self.plain_weights:
            weight = weight + x.square().mean(1, keepdim=True).sqrt()
        low = x.amin(1).clamp_(max=0)
        span = x.amax(1) - low
        total, total_x = weight.sum(1), (weight * x).sum(1)
        shifted = x - low[:, None]

        def error(scale: Tensor, least: Tensor, codes: Tensor) -> Tensor:
            found = torch.addcmul(least[:, None], codes, scale[:, None]).sub_(x).square_()
            return found.mul_(weight).sum(1)

        first, count = self.steps
        codes = (shifted * (self.largest_code * inverse(span))[:, None]).round_()
        best_scale, best_low = span / self.largest_code, low
        best = error(best_scale, best_low, codes)
        for i in range(count + 1):
            to = self.largest_code + first + ROUND * i
            codes = (shifted * (to * inverse(span))[:, None]).round_()
            codes.clamp_(0, self.largest_code)
            weighted = weight * codes
            l1, l2 = weighted.sum(1), (weighted * codes).sum(1)
            xl = (weighted * x).sum(1)
            det = total * l2 - l1 * l1
            scale = (total * xl - total_x * l1) * inverse(det)
            least = (l2 * total_x - l1 * xl) * inverse(det)
            positive = least > 0
            scale = torch.where(positive, xl * inverse(l2), scale)
            least = torch.where(positive, 0.0, least)
            found = error(scale, least, codes)
            better = (det > 0) & (scale >= 0) & (found < best)
            best = torch.where(better, found, best)
            best_scale = torch.where(better, scale, best_scale)
            best_low = torch.where(better, least, best_low)
        return best_scale, -best_low


class SixBitScales(WithMinima):
    """Eight scales and eight minima of 6 bits in 12 bytes (Q4_K, Q5_K)."""

    group, top = 32, 63

    def grids(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (n, 8) of blocks that begin with d, dmin and the twelve bytes."""
        halves = half(raw[:, :4])
        low, high, rest = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
        s = torch.cat((low & 63, (rest & 15) | ((low >> 2) & 48)), 1)
        m = torch.cat((high & 63, (rest >> 4) | ((high >> 2) & 48)), 1)
        return halves[:, :1] * s.float(), -(halves[:, 1:] * m.float())

    def with_scales(self, halves: Tensor, s: Tensor, m: Tensor) -> Tensor:
        low = s[:, :4] | ((s[:, 4:] >> 4) << 6)
        high = m[:, :4] | ((m[:, 4:] >> 4) << 6)
        rest = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
        begin = torch.cat((halves, low, high, rest), 1)
        return torch.nn.functional.pad(begin, (0, self.size - 16))


class Q4_K(SixBitScales):
    name, largest_code, steps = "Q4_K", 15, (-1.0, 20)
    book = Integers(0, 15)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return *self.grids(raw), planes(raw[:, 16:], 4, 32)

    def place(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad(pack_planes(codes, 4, 32), (16, 0))


class Q5_K(SixBitScales):
    name, largest_code, steps = "Q5_K", 31, (-0.5, 15)
    book = Integers(0, 31)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        fifth = planes(raw[:, 16:48], 1, 32)
        return *self.grids(raw), planes(raw[:, 48:], 4, 32) | (fifth << 4)

    def place(self, codes: Tensor) -> Tensor:
        both = torch.cat((pack_planes(codes >> 4, 1, 32), pack_planes(codes & 15, 4, 32)), 1)
        return torch.nn.functional.pad(both, (16, 0))


class Q2_K(WithMinima):
    name, largest_code, steps = "Q2_K", 3, (-0.5, 15)
    group, top, plain_weights = 16, 15, True
    book = Integers(0, 3)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        halves = half(raw[:, 80:])
        s, m = (raw[:, :16] & 15).float(), (raw[:, :16] >> 4).float()
        return halves[:, :1] * s, -(halves[:, 1:] * m), planes(raw[:, 16:80], 2, 32)

    def place(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad(pack_planes(codes, 2, 32), (16, 4))

    def with_scales(self, halves: Tensor, s: Tensor, m: Tensor) -> Tensor:
        return torch.cat((s | (m << 4), halves.new_zeros(len(s), 64), halves), 1)


class Centred(Blocks):
    """w = d · s · (q - z), s from -`top` to `top` - 1."""

    group = 16
    zero: ClassVar[int]
    top: ClassVar[int]

    def scales(self, values: Tensor) -> Tensor:
        scale = self._search(values.reshape(-1, self.group)).reshape(-1, SUPER // self.group)
        furthest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        d = furthest / -self.top
        s = (scale * inverse(d)).round_().clamp_(-self.top, self.top - 1).to(torch.int8)
        return self.with_scales(as_half(d), s)

    def with_scales(self, halves: Tensor, s: Tensor) -> Tensor:
        """Blocks with d (n, 2 bytes) and the scales (n, 16)."""
        raise NotImplementedError

    def _search(self, x: Tensor) -> Tensor:
        """scale (n,) of groups x (n, 16): the value of largest magnitude goes to a code near -z,
        the scale is the least squares Σ x² · x q / Σ x² · q²; the best of 19.
        """
        furthest = x.gather(1, x.abs().argmax(1, keepdim=True))
        weight = x.square()
        best = torch.full((len(x),), -1.0)
        best_scale = torch.zeros(len(x))
        for i in sorted(range(-9, 10), key=abs):
            to = (self.zero + ROUND * i) * inverse(-furthest)
            codes = (x * to).round_().clamp_(-self.zero, self.zero - 1)
            xl, l2 = (weight * x * codes).sum(1), (weight * codes * codes).sum(1)
            scale = xl * inverse(l2)
            better = (l2 > 0) & (scale * xl > best)
            best = torch.where(better, scale * xl, best)
            best_scale = torch.where(better, scale, best_scale)
        return best_scale


class Q6_K(Centred):
    name, largest_code, zero, top = "Q6_K", 63, 32, 128
    book = Integers(-32, 31, 32)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        scale = half(raw[:, 208:]) * raw[:, 192:208].view(torch.int8).float()
        low, high = planes(raw[:, :128], 4, 64), planes(raw[:, 128:192], 2, 32)
        return scale, None, low | (high << 4)

    def place(self, codes: Tensor) -> Tensor:
        both = torch.cat((pack_planes(codes & 15, 4, 64), pack_planes(codes >> 4, 2, 32)), 1)
        return torch.nn.functional.pad(both, (0, 18))

    def with_scales(self, halves: Tensor, s: Tensor) -> Tensor:
        return torch.cat((halves.new_zeros(len(s), 192), s.view(torch.uint8), halves), 1)


class Q3_K(Centred):
    name, largest_code, zero, top = "Q3_K", 7, 4, 32
    book = Integers(-4, 3, 4)

    def unpack(self, raw: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        low, high = planes(raw[:, 96:104], 4, 8), planes(raw[:, 104:108], 2, 4)
        s = (low | (high << 4)).to(torch.int8) - 32
        third = planes(raw[:, :32], 1, 32)
        return half(raw[:, 108:]) * s.float(), None, planes(raw[:, 32:96], 2, 32) | (third << 2)

    def place(self, codes: Tensor) -> Tensor:
        both = torch.cat((pack_planes(codes >> 2, 1, 32), pack_planes(codes & 3, 2, 32)), 1)
        return torch.nn.functional.pad(both, (0, 14))

    def with_scales(self, halves: Tensor, s: Tensor) -> Tensor:
        raised = (s + 32).view(torch.uint8)
        low, high = pack_planes(raised & 15, 4, 8), pack_planes(raised >> 4, 2, 4)
        return torch.cat((halves.new_zeros(len(s), 96), low, high, halves), 1)
