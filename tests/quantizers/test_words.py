"""Codes in words, and the extremes of groups."""

from __future__ import annotations

import pytest
import torch

from peftsurgery.quantizers import bits
from peftsurgery.quantizers.grids import extremes
from tests.quantizers.integer_files import row_words


@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
def test_words_hold_a_stream_of_codes(rng: torch.Generator, size: int, count: int) -> None:
    codes = torch.randint(0, 1 << size, (3, count), generator=rng, dtype=torch.uint8)
    words = bits.pack_words(codes, size)
    assert torch.equal(words, row_words(codes, size))
    assert torch.equal(bits.unpack_words(words, size, count), codes)
    for rows in (slice(0, 1), slice(2, 3)):  # a single row, of a larger tensor
        assert torch.equal(bits.pack_words(codes[rows], size), words[rows])
        assert torch.equal(bits.unpack_words(words[rows], size, count), codes[rows])
    stacked = codes.reshape(1, 3, 1, count)
    assert torch.equal(bits.pack_words(stacked, size), words.reshape(1, 3, 1, -1))


@pytest.mark.parametrize("shape", [(0,), (2,), (3, 14), (2, 1, 6)])
def test_bytes_hold_two_codes(rng: torch.Generator, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    for start in (0, 1):  # where the codes begin in a larger tensor
        whole = torch.randint(0, 16, (count + 1,), generator=rng, dtype=torch.uint8)
        codes = whole[start : start + count].reshape(shape)
        first, second = codes[..., 0::2], codes[..., 1::2]
        assert torch.equal(bits.pack_high_first(codes), first * 16 + second)
        assert torch.equal(bits.pack_low_first(codes), second * 16 + first)
        assert torch.equal(bits.high_first(bits.pack_high_first(codes)), codes)
        assert torch.equal(bits.low_first(bits.pack_low_first(codes)), codes)


def test_more_bytes_than_are_packed_together(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(0, 16, (3, 50), generator=rng, dtype=torch.uint8)
    whole = bits.pack_high_first(codes)
    monkeypatch.setattr(bits, "PIECE", 7)
    assert torch.equal(bits.pack_high_first(codes), whole)


@pytest.mark.parametrize("group", [0, 1, 4, 5, 24])
def test_extremes_of_groups_in_order(rng: torch.Generator, group: int) -> None:
    weight = torch.randn(3, 24, generator=rng)
    least, greatest = extremes(weight, group)
    size = group or 24
    for place in range(-(-24 // size)):
        part = weight[:, place * size : (place + 1) * size]
        assert torch.equal(least[:, place], part.amin(1))
        assert torch.equal(greatest[:, place], part.amax(1))


def test_extremes_of_groups_out_of_order(rng: torch.Generator) -> None:
    weight = torch.randn(3, 24, generator=rng)
    order = torch.randint(0, 4, (24,), generator=rng)
    order[order == 2] = 1
    least, greatest = extremes(weight, 0, order, 5)
    for place in range(5):
        part = weight[:, order == place]
        if part.shape[1] == 0:
            assert not bool(least[:, place].any() | greatest[:, place].any())
        else:
            assert torch.equal(least[:, place], part.amin(1))
            assert torch.equal(greatest[:, place], part.amax(1))
