"""Which weights of a plain checkpoint are packed."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from peftsurgery.checkpoint import Checkpoint, LazyTensor

PLAIN = ("F32", "F16", "BF16")
# What loaders leave alone unless told otherwise: tables of rows, and the head.
LEFT_OUT = ("*embed*", "*lm_head*", "*wte*", "*wpe*", "shared.weight")


def matrices_of(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every plain matrix of weights."""
    return {
        name: tensor
        for name, tensor in checkpoint.items()
        if len(tensor.shape) == 2 and tensor.dtype in PLAIN and name.endswith(".weight")
    }


def packable(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The matrices that loaders pack unless told otherwise."""
    return {n: t for n, t in matrices_of(checkpoint).items() if not named(n, LEFT_OUT)}


def named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor, or the module it belongs to, has a name like one of some patterns."""
    plain = name.removesuffix(".weight")
    return any(fnmatch.fnmatchcase(n, p) for n in (name, plain) for p in patterns)
