"""The proof of a merge: what was written is recomputed and compared, byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.operations.apply import (
    Renderer,
    Settings,
    is_repacked,
    output_dtype,
    plain_dtype,
    spans,
)
from peftsurgery.operations.inputs import DENSE
from peftsurgery.operations.plan import Target
from peftsurgery.operations.requantizing import Order, Repacker, differs
from peftsurgery.operations.staging import workers
from peftsurgery.quantizers import PackedTensor, is_marker

PIECE = 1 << 18  # bytes
PACKED_AGAIN = 16  # one in so many packed weights is rounded again; the digests tell of all


def differences(
    base: Checkpoint,
    targets: Mapping[str, Target],
    settings: Settings,
    written: Checkpoint,
    *,
    full: bool,
    orders: Mapping[str, Order] | None = None,
    digests: Mapping[tuple[str, str], bytes] | None = None,
) -> list[str]:
    """Names of tensors of `written` that are not what the merge gives, with the reason.

    orders, digests: of the packed weights, how they were rounded and (name, role) -> the SHA-256 of
    each part as it was made. Where there are digests, they are compared for every packed weight,
    and rows of each fourth one, in the order of the names, are made again; `full`: all of all.
    """
    recomputed = set(sorted(orders or {})[:: 1 if full or not digests else PACKED_AGAIN])

    def problem(name: str) -> str | None:
        if name not in written or name not in base:
            return f"{name!r} (only in {'the result' if name in written else 'the base'})"
        target = targets.get(name)
        if target is None:
            same = _equal(base[name], written[name], settings)
            return None if same else f"{name!r} (untouched, but its bytes changed)"
        if is_repacked(base[name], settings):
            order = (orders or {})[name]
            wrong = _parts_differ(target, written[name], digests or {})
            if wrong is None and name in recomputed:
                wrong = _rows_differ(target, settings, written[name], order, full=full)
            return wrong
        rows = tile_that_differs(target, settings, written[name], full=full)
        return None if rows is None else f"{name!r} (rows {rows})"

    names = set(base) | set(written)
    if settings.requant == "dequant":
        names = {name for name in names if name in written or not is_marker(name)}
    with workers() as pool:
        found = pool.map(problem, sorted(names))
        return [text for text in found if text is not None]


def _parts_differ(
    target: Target, found: LazyTensor, digests: Mapping[tuple[str, str], bytes]
) -> str | None:
    """What is wrong with a weight that was packed again: another format, or parts that are not
    those that were made.
    """
    name = target.name
    assert isinstance(target.tensor, PackedTensor)
    if not isinstance(found, PackedTensor) or found.shape != target.tensor.shape:
        return f"{name!r} (is no longer {target.tensor.packed.format.title})"
    role = altered_part(name, found, digests)
    return None if role is None else f"{name!r} (its {role} is not what was written)"


def _rows_differ(
    target: Target, settings: Settings, found: LazyTensor, order: Order, *, full: bool
) -> str | None:
    """Rows of a weight that was packed again which this merge does not give."""
    assert isinstance(found, PackedTensor)
    rows = differs(Repacker(target, settings, order), found.packed.parts, full=full)
    return None if rows is None else f"{target.name!r} (rows {rows})"


def altered_part(
    name: str, found: PackedTensor, digests: Mapping[tuple[str, str], bytes]
) -> str | None:
    """The first role of a packed weight whose bytes are not those that were made."""
    for role, part in found.packed.parts.items():
        expected = digests.get((name, role))
        if expected is not None and hashlib.sha256(part.read()).digest() != expected:
            return role
    return None


def same_bytes(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether two tensors have the same bytes."""
    return _same(first.read(), second.read())


def tile_that_differs(
    target: Target, settings: Settings, found: LazyTensor, *, full: bool
) -> str | None:
    """The first rows of `found` that are not what the merge gives, of the middle tile or of all;
    None when there are none.
    """
    if (found.dtype, tuple(found.shape)) != (output_dtype(target, settings), target.shape):
        wanted = f"{output_dtype(target, settings)} {list(target.shape)}"
        return f"of {found.dtype} {list(found.shape)}, not {wanted}"
    renderer = Renderer(target, settings)
    tiles = spans(target)
    flat = target.flat(found)
    for start, stop in tiles if full else [tiles[len(tiles) // 2]]:
        expected = renderer.rounded(start, stop)
        part = flat.rows(start, stop) if flat.shape else flat
        if not _same(as_bytes(expected), part.read()):
            return f"{start}:{stop}"
    return None


def _equal(before: LazyTensor, after: LazyTensor, settings: Settings) -> bool:
    if isinstance(before, PackedTensor) and isinstance(after, PackedTensor):
        one, other = before.packed.parts, after.packed.parts
        return one.keys() == other.keys() and all(
            _same(part.read(), other[role].read()) for role, part in one.items()
        )
    if tuple(before.shape) != tuple(after.shape):
        return False
    dtype = written_dtype(before, settings)
    if dtype != after.dtype:
        return False
    if dtype != before.dtype:
        return torch.equal(before.torch().to(torch_dtype(dtype)), after.torch())
    return _same(before.read(), after.read())


def _same(first: memoryview, second: memoryview) -> bool:
    """Whether two runs of bytes are equal, compared by pieces: numpy makes a mask of each."""
    if first.nbytes != second.nbytes:
        return False
    pairs = ((first[n : n + PIECE], second[n : n + PIECE]) for n in range(0, first.nbytes, PIECE))
    return all(
        np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs
    )


def written_dtype(tensor: LazyTensor, settings: Settings) -> str:
    """The dtype a tensor is written in: integers and packed types stay as they are."""
    if settings.dtype and tensor.dtype in DENSE:
        return settings.dtype
    return plain_dtype(tensor)
