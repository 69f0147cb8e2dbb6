"""The proof of a merge: what was written is recomputed and compared, byte by byte."""

from __future__ import annotations

import numpy as np
import torch

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.operations.apply import Renderer, Settings, output_dtype, spans
from peftsurgery.operations.inputs import DENSE, Inputs
from peftsurgery.operations.plan import Target
from peftsurgery.operations.staging import workers

PIECE = 1 << 18  # bytes


def differences(
    inputs: Inputs, settings: Settings, written: Checkpoint, *, full: bool
) -> list[str]:
    """Names of tensors of `written` that are not what the merge gives, with the reason."""
    base = inputs.base.checkpoint

    def problem(name: str) -> str | None:
        if name not in written or name not in base:
            return f"{name!r} (only in {'the result' if name in written else 'the base'})"
        target = inputs.plan.targets.get(name)
        if target is None:
            same = _equal(base[name], written[name], settings)
            return None if same else f"{name!r} (untouched, but its bytes changed)"
        rows = tile_that_differs(target, settings, written[name], full=full)
        return None if rows is None else f"{name!r} (rows {rows})"

    with workers() as pool:
        found = pool.map(problem, sorted(set(base) | set(written)))
        return [text for text in found if text is not None]


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
    return settings.dtype if settings.dtype and tensor.dtype in DENSE else tensor.dtype
