"""Codes of few bits in words of many."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PIECE = 1 << 18  # pairs that are packed together: they stay in the cache


def high_first(pairs: Tensor) -> Tensor:
    """Two 4-bit codes of every byte, the high half first: uint8 (…, n) -> (…, 2n)."""
    wide = pairs.to(torch.int16)  # two bytes that lie side by side, the first one the lower
    return (wide & 15).bitwise_left_shift_(8).bitwise_or_(wide >> 4).view(torch.uint8)


def low_first(pairs: Tensor) -> Tensor:
    """Two 4-bit codes of every byte, the low half first: uint8 (…, n) -> (…, 2n)."""
    return torch.stack((pairs & 15, pairs >> 4), -1).reshape(*pairs.shape[:-1], -1)


def pack_high_first(codes: Tensor) -> Tensor:
    """The inverse of `high_first`: uint8 (…, 2n) -> (…, n)."""
    return _packed(codes, lambda wide: (wide << 4).bitwise_or_(wide >> 8))


def pack_low_first(codes: Tensor) -> Tensor:
    """The inverse of `low_first`."""
    return _packed(codes, lambda wide: (wide >> 4).bitwise_or_(wide))


def _packed(codes: Tensor, both: Callable[[Tensor], Tensor]) -> Tensor:
    """The lower byte of `both` of two codes side by side in int16, the first one the lower: several
    times as fast as to take them apart.
    """
    codes = codes.contiguous()
    wide = (codes.clone() if codes.storage_offset() % 2 else codes).view(torch.int16)
    found = torch.empty(wide.shape, dtype=torch.uint8)
    for part, place in zip(wide.view(-1).split(PIECE), found.view(-1).split(PIECE), strict=True):
        place.copy_(both(part))
    return found


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """`count` codes of `bits` each from int32 words (…, w), lowest bits first and running on
    across words: uint8 (…, count).
    """
    raw = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:  # no code crosses a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes = (raw[..., None] >> shifts) & ((1 << bits) - 1)
        return codes.flatten(-2)[..., :count]
    places = torch.arange(count) * bits
    byte, shift = places // 8, (places % 8).to(torch.int16)
    padded = torch.nn.functional.pad(raw, (0, 1))
    wide = padded[..., byte].to(torch.int16) | (padded[..., byte + 1].to(torch.int16) << 8)
    return ((wide >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_words`; the last word is filled with zeros: int32 (…, w)."""
    count = codes.shape[-1]
    size = -(-count * bits // 32) * 4  # bytes
    if 8 % bits == 0:
        full = torch.nn.functional.pad(codes, (0, size * 8 // bits - count))
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        parts = full.reshape(*codes.shape[:-1], size, 8 // bits) << shifts
        return parts.sum(-1, dtype=torch.uint8).view(torch.int32)
    places = torch.arange(count) * bits
    byte, shift = places // 8, (places % 8).to(torch.int32)
    wide = codes.to(torch.int32) << shift
    flat = torch.zeros(*codes.shape[:-1], size + 1, dtype=torch.int32)
    flat.index_add_(-1, byte, wide & 255)  # no two codes share a bit: adding is or
    flat.index_add_(-1, byte + 1, wide >> 8)
    stored = flat[..., :size].to(torch.uint8)
    return stored.clone(memory_format=torch.contiguous_format).view(torch.int32)
