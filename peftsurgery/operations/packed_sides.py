"""What two checkpoints have packed: in words, and whether a weight has the same bytes in both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.errors import Finding
from peftsurgery.quantizers import PackedTensor
from peftsurgery.quantizers.gguf_plain import Plain

NAMED = 4  # weights named in one message


def format_of(tensor: LazyTensor) -> str | None:
    """The title of the format a tensor is packed in; None for plain floats, in GGUF files too."""
    if not isinstance(tensor, PackedTensor) or isinstance(tensor.packed.format, Plain):
        return None
    return tensor.packed.format.title


def formats(checkpoint: Checkpoint) -> dict[str, int]:
    """Title of every packed format in a checkpoint seen through `quantizers.logical` -> weights."""
    found = Counter(format_of(tensor) for tensor in checkpoint.values())
    return {title: count for title, count in found.items() if title is not None}


def unpacked(checkpoint: Checkpoint) -> str | None:
    """What of a checkpoint is unpacked when it is read, in words; None when nothing is."""
    found = formats(checkpoint)
    return ", ".join(f"{count} weights of {title}" for title, count in found.items()) or None


def same_stored(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors are stored alike: one format and its settings, shapes, and bytes; of
    packed weights those of every part. Nothing is decoded.
    """
    if not (isinstance(one, PackedTensor) and isinstance(other, PackedTensor)):
        packed = isinstance(one, PackedTensor) or isinstance(other, PackedTensor)
        return not packed and _same_bytes(one, other)
    first, second = one.packed, other.packed
    if first.format is not second.format or first.shape != second.shape:
        return False
    if first.fields != second.fields or first.parts.keys() != second.parts.keys():
        return False
    return all(_same_bytes(part, second.parts[role]) for role, part in first.parts.items())


def _same_bytes(one: LazyTensor, other: LazyTensor) -> bool:
    if (one.dtype, tuple(one.shape)) != (other.dtype, tuple(other.shape)):
        return False
    first, second = (np.frombuffer(side.read(), np.uint8) for side in (one, other))
    return bool(np.array_equal(first, second))


class StoredAlike:
    """`same_stored`, of which the answer for packed weights is kept: one stack of experts is asked
    for many times.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, names: tuple[str, str], one: LazyTensor, other: LazyTensor) -> bool:
        if not (isinstance(one, PackedTensor) and isinstance(other, PackedTensor)):
            return False
        if names not in self._known:
            self._known[names] = same_stored(one, other)
        return self._known[names]


def quantization_in_it(pairs: Iterable[tuple[str, LazyTensor, LazyTensor]]) -> list[Finding]:
    """Findings for weights (name, TUNED's, BASE's) that differ and are packed on a side: what
    packing took is part of TUNED - BASE.
    """
    found: dict[tuple[str | None, str | None], list[str]] = {}
    for name, tuned, base in pairs:
        kinds = (format_of(tuned), format_of(base))
        if kinds != (None, None):
            found.setdefault(kinds, []).append(name)
    return [_finding(*kinds, names) for kinds, names in found.items()]


def _finding(tuned: str | None, base: str | None, names: list[str]) -> Finding:
    shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
    if tuned is None or base is None:
        side, other, title = ("BASE", "TUNED", base) if tuned is None else ("TUNED", "BASE", tuned)
        message = (
            f"{len(names)} weights are packed in {side} only ({title}): the error of that packing "
            f"is in their difference, beside what was tuned: {shown}"
        )
        remedy = f"give the unquantized {side}, or a {other} packed the same way"
        return Finding("warning", "quantization-error", message, None, remedy)
    titles = title if (title := tuned) == base else f"{tuned} in TUNED, {base} in BASE"
    message = (
        f"{len(names)} weights that differ are packed on both sides ({titles}): their difference "
        f"holds what both roundings took: {shown}"
    )
    remedy = "give both unquantized for the change alone"
    return Finding("info", "quantization-error", message, None, remedy)
