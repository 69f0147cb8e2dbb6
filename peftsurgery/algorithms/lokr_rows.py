"""Splitting and joining Kronecker products along their output rows: the factors that come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CannotFuse, CannotSplit
from .slots import Part, bit_equal, join, ratio, scaled, stack_rows, widest

if TYPE_CHECKING:
    from .lokr import LoKr

Tensors = dict[str, Tensor | None]

_W2 = ("w2", "w2_a", "w2_b", "t2")


def factors_of(adapter: LoKr) -> Tensors:
    """Every field, missing ones too."""
    return {n: adapter._parameters[n] for n in adapter.fields}


def cut_rows(adapter: LoKr, start: int, stop: int) -> Tensors:
    """The factors of rows start:stop: whole blocks, or rows of a single block; else CannotSplit."""
    b = adapter.blocks[1]
    top, bottom = start // b, -(-stop // b)
    changes = factors_of(adapter)
    side = "w1_a" if adapter.w1 is None else "w1"
    whole = start % b == 0 and stop % b == 0
    if not whole and bottom - top > 1:
        raise CannotSplit(
            f"LoKr: rows {start}:{stop} cut through its blocks of {b} rows. Keep it on the "
            "fused layer, or convert with --algorithm lora."
        )
    w1 = changes[side]
    assert w1 is not None
    changes[side] = w1[top:bottom]
    if not whole:
        cut = slice(start - top * b, stop - top * b)
        name = "w2_a" if adapter.w2 is None else "w2"
        w2 = changes[name]
        assert w2 is not None
        changes[name] = w2[cut] if adapter.t2 is None else w2[:, cut]
    return changes


def joined_rows(parts: Sequence[Part], live: Sequence[LoKr], scale: float | Tensor) -> Tensors:
    """The factors of the parts on top of each other, for a common scale; `live` are their adapters.
    CannotFuse where no Kronecker product holds them.
    """
    shared = factors_of(live[0])
    if all(bit_equal(a._parameters[n], shared[n]) for a in live for n in _W2):
        return _joined_first(parts, live, shared, scale)
    # one block each, equal w1: the inverse of a cut inside a block
    if (
        len(live) == len(parts)
        and all(a.blocks[0] == 1 and ratio(a, scale) == 1 for a in live)
        and all(
            bit_equal(a._parameters[n], shared[n]) for a in live for n in ("w1", "w1_a", "w1_b")
        )
    ):
        if all(a.w2 is not None for a in live):
            shared["w2"] = join([a.w2 for a in live if a.w2 is not None])
            return shared
        if all(bit_equal(a._parameters[n], shared[n]) for a in live for n in ("w2", "w2_b", "t2")):
            dim = 0 if live[0].t2 is None else 1
            shared["w2_a"] = join([a.w2_a for a in live if a.w2_a is not None], dim)
            return shared
    raise CannotFuse(
        "LoKr parts with different second factors have no common Kronecker form. Convert with "
        "--algorithm lora."
    )


def _joined_first(
    parts: Sequence[Part], live: Sequence[LoKr], shared: Tensors, scale: float | Tensor
) -> Tensors:
    """w1 rows on top of each other. Different w1_b's: the products themselves, in fp32."""
    b = live[0].blocks[1]
    low = all(a.w1_b is not None and bit_equal(a.w1_b, live[0].w1_b) for a in live)
    sides: dict[int, Tensor] = {}
    for adapter in live:
        side = adapter.w1_a if low else adapter.w1
        sides[id(adapter)] = adapter.first(torch.float32) if side is None else side
    dtype = widest(list(sides.values()))
    blocks: list[Tensor | int] = []
    for part in parts:
        if part.adapter is not None:
            blocks.append(scaled(sides[id(part.adapter)], ratio(part.adapter, scale), dtype))
        elif part.rows % b:
            raise CannotFuse(
                f"LoKr: {part.rows} untouched rows are no multiple of its blocks of {b}. "
                "Convert with --algorithm lora."
            )
        else:
            blocks.append(part.rows // b)
    stacked = stack_rows(blocks, [0] * len(blocks))
    tensors: Tensors = {**shared, "w1": None, "w1_a": None}
    tensors["w1_a" if low else "w1"] = stacked
    if not low:
        tensors["w1_b"] = None
    return tensors
