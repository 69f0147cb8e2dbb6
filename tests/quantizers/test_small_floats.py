"""Rounding to 4-bit floats, and scales as files store them."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

from peftsurgery.quantizers.float4 import BOOK, MAGNITUDES
from peftsurgery.quantizers.float8 import as_stored, exponents, scales_of


def test_e2m1_rounds_as_compressed_tensors() -> None:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(MAGNITUDES)]
    values = torch.tensor([*MAGNITUDES, *middles, 1e-30, 5.5, 1e30])
    around = torch.cat(
        [torch.nextafter(values, torch.full_like(values, end)) for end in (0.0, torch.inf)]
    )
    drawn = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3
    units = torch.cat([values, around, drawn])
    units = torch.cat([units, -units]).reshape(2, -1)
    wanted = cast_to_fp4(units.clone().clamp(-6, 6))
    assert torch.equal(BOOK.values(BOOK.nearest(units)), wanted)
    assert torch.equal(BOOK.nearest(units) >> 3 != 0, units < 0)
    inner = units.clamp(-6, 6)
    lower, upper, share = BOOK.between(units)
    mean = BOOK.values(lower) * (1 - share) + BOOK.values(upper) * share
    assert torch.allclose(mean, inner, atol=1e-6)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_powers_of_two_are_rounded_up_and_exact(dtype: str) -> None:
    powers = torch.ldexp(torch.ones(250), torch.arange(-124, 126, dtype=torch.int32))
    assert torch.equal(scales_of(as_stored(powers, dtype)), powers)
    above = torch.nextafter(powers[:-1], torch.full((249,), torch.inf))
    assert torch.equal(scales_of(as_stored(above, dtype)), powers[1:])
    assert torch.equal(exponents(powers), torch.arange(-124, 126, dtype=torch.int32))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_scales_come_back(dtype: str) -> None:
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    stored = (torch.rand(100, generator=torch.Generator().manual_seed(1)) + 0.01).to(kind)
    assert torch.equal(as_stored(scales_of(stored), dtype), stored)
