"""What headers and configs alone say of OFT, BOFT, HRA, IA3 and GLoRA: sizes of the weight,
conventions of the program that wrote them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ShapeOf = Callable[[str], tuple[int, ...]]

NEEDED = {
    "oft": (("blocks",), ("vector",), ("embedding_vector",)),
    "boft": (("blocks", "rescale"),),
    "hra": (("u",),),
    "ia3": (("vector",),),
    "glora": (("a1", "a2", "b1", "b2"),),
    "road": (("theta", "radius"),),
    "delora": (("up", "down", "bound", "norms"),),
    "hira": (("up", "down"), ("embedding_A", "embedding_B")),
    "tokens": (("values",),),
    "adalora": (("up", "e", "down"),),
    "vera": (("lambda_b", "lambda_d"),),
    "fourierft": (("spectrum",),),
    "c3a": (("kernel",),),
    "miss": (("block",),),
    "bat": (("block",),),
    "shira": (("values", "indices"),),
}


def incomplete(algorithm: str, have: Mapping[str, str]) -> tuple[str, ...]:
    """The fields missing from a record of one of these algorithms, () when it is complete."""
    lacking = [tuple(n for n in names if n not in have) for names in NEEDED[algorithm]]
    return min(lacking, key=len)


def map_shape(
    algorithm: str, have: Mapping[str, str], shape: ShapeOf
) -> tuple[int | None, tuple[int, int]]:
    """(rank, (out, in)) of a complete record; 0 where the tensors do not tell.

    `in` of a rotation of inputs counts kernel positions too.
    """
    if algorithm == "glora":
        a1, b1, b2 = shape("a1"), shape("b1"), shape("b2")
        if old_glora(have, shape):
            out, into, rank = shape("b2")[0], shape("a1")[1], a1[0]
        else:
            out, into, rank = b1[0], b2[1], a1[1]
        return rank, (out, into)
    if algorithm in ("delora", "hira"):
        if "embedding_A" in have:
            a, b = shape("embedding_A"), shape("embedding_B")
            return a[0], (math.prod(a[1:]), b[0])
        return shape("down")[0], (shape("up")[0], math.prod(shape("down")[1:2]))
    if algorithm == "adalora":
        return shape("down")[0] or None, (shape("up")[0], math.prod(shape("down")[1:]))
    if algorithm == "vera":
        return math.prod(shape("lambda_d")), (math.prod(shape("lambda_b")), 0)
    if algorithm == "c3a":
        kernel = (*shape("kernel"), 1, 1, 1)
        return None, (kernel[0] * kernel[2], kernel[1] * kernel[2])
    if algorithm == "miss":
        block = shape("block")
        return (None, (block[0] * block[1], 0)) if len(block) == 3 else (block[0], (0, 0))
    if algorithm in ("fourierft", "shira"):
        return None, (0, 0)
    if algorithm == "tokens":
        return None, (0, math.prod(shape("values")[1:]))
    if algorithm == "road":
        return None, (0, 0)  # how many numbers belong to an output stands in the config
    if algorithm == "hra":
        return None, (0, shape("u")[0])
    if algorithm == "boft":  # PEFT's: blocks on the input, factors on the output
        blocks = shape("blocks")
        return None, (math.prod(shape("rescale")), math.prod(blocks[1:3]))
    if algorithm == "ia3":
        n = math.prod(shape("vector"))
        sides = ia3_sides(shape("vector"))
        if "on_input" in have or len(sides) > 1:
            return None, (0, 0)  # which side it is stands in a value
        return None, ((n, 0) if sides == ("out",) else (0, n))
    if "blocks" in have:
        return None, (math.prod(shape("blocks")[-3:-1]), 0)
    count, length = shape("vector" if "vector" in have else "embedding_vector")[:2]
    size = (1 + math.isqrt(1 + 8 * length)) // 2
    return None, (0, 0 if count == 1 else count * size)  # one block may be shared by all inputs


def ia3_sides(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The sides of the layer that PEFT's ia3_l of this shape can scale: [o, 1] is outputs, [1, i]
    inputs, [1, n, 1, 1] of a convolution either."""
    if len(shape) != 2 or shape[0] == shape[1]:
        return ("out", "in")
    return ("out",) if shape[1] == 1 else ("in",)


def old_glora(have: Mapping[str, str], shape: ShapeOf) -> bool:
    """Whether a record is of GLoRA's first generation, W a2 a1 + b2 b1: a1, b1 (r, i) and a2 (i,
    r), b2 (o, r). Where both readings fit (r = i = o) it is taken as the second generation.
    """
    a1, a2, b1, b2 = (shape(n)[:2] for n in ("a1", "a2", "b1", "b2"))
    new = a1[1] == a2[0] == b1[1] == b2[0] and a1[0] == a2[1] == b2[1]
    old = a1[0] == a2[1] == b1[0] == b2[1] and a1[1] == a2[0] == b1[1]
    return old and not new


@dataclass(frozen=True)
class Source:
    """What is known of a record besides its tensors."""

    key: str  # one of its keys, for messages
    name: str  # dotted name in the layout's vocabulary
    config: Mapping[str, object] | None  # adapter_config.json of its component
    alpha: float | None
    conv1d: bool  # a transformers Conv1D, by name and fan_in_fan_out
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of all its modules, by name
    widest: int = 0  # outputs of the largest VeRA module of its component


def version_of(config: Mapping[str, object]) -> tuple[int, int]:
    """peft_version as (major, minor); files without it are older than 0.18."""
    match = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return (int(match[1]), int(match[2])) if match else (0, 0)
