"""Files of the base, rebuilt from a merged file and its undo file."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from peftsurgery.checkpoint import Checkpoint, LazyTensor, open_checkpoint, sha256_of
from peftsurgery.checkpoint.writing import Sink, sync_folder
from peftsurgery.errors import CheckFailed
from peftsurgery.operations.journal import Advance, copy_durably, prove_base
from peftsurgery.operations.undo import Undo


def rebuild(record: Undo, index: int, source: Path, place: Path, advance: Advance) -> None:
    """Write one file of the base to `place`, on disk and proved by its digest."""
    header = record.header(index)
    found = open_checkpoint(source)
    fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        sink = Sink(fd)
        sink.write(memoryview(record.head(index)))
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1][2:]):
            tensor = record.original(index, name) or _untouched(found, name, info.dtype, info.shape)
            span = tensor.file_range()
            assert span is not None
            sink.copy(tensor.file, *span)
            advance(tensor.nbytes, name)
        sink.flush()
        os.fsync(fd)
    finally:
        os.close(fd)
    prove_base(record, index, place)


def _untouched(found: Checkpoint, name: str, dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    tensor = found.get(name)
    if tensor is None or (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        what = f"{tensor.dtype} {list(tensor.shape)}" if tensor is not None else "missing"
        raise CheckFailed(f"{found.source}: {name!r} is {what}; expected {dtype} {list(shape)}.")
    return tensor


def restore_sides(record: Undo, source: Path, target: Path, *, only_kept: bool) -> None:
    """Side files: from the undo file, or from the merged folder where they must be as they were."""
    for number, side in enumerate(record.sides):
        place = target / side.path
        if side.kept:
            if place.is_file() and sha256_of(place) == side.sha256:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_name(f".{place.name[:200]}.{secrets.token_hex(6)}.part")
            try:
                temporary.write_bytes(record.checkpoint[f"side/{number}"].read())
                copy_durably(temporary, place)
            finally:
                temporary.unlink(missing_ok=True)
        elif not only_kept:
            if not (source / side.path).is_file() or sha256_of(source / side.path) != side.sha256:
                raise CheckFailed(
                    f"{source / side.path}: is missing or changed since the merge, and too large "
                    "for the undo file to hold."
                )
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / side.path, place)


def replace_file(record: Undo, index: int, path: Path, advance: Advance) -> None:
    """A file whose header the merge changed: the base's is written beside it and renamed over
    it.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.part")
    try:
        rebuild(record, index, path, temporary, advance)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
