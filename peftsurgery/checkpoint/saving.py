"""save: the one loop that pulls tensors into safetensors files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.checkpoint.dtypes import BITS
from peftsurgery.checkpoint.header import name_problem, shape_problem
from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.checkpoint.tensors import FileMap, LazyTensor
from peftsurgery.checkpoint.writing import (
    Deferred,
    Sink,
    Staging,
    as_bytes,
    buffers,
    dtype_and_shape,
)
from peftsurgery.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    value: object

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def save(
    path: str | Path,
    tensors: Mapping[str, LazyTensor | torch.Tensor | np.ndarray | Deferred],
    metadata: Mapping[str, str] | None = None,
    *,
    shard_size: int | str | None = None,
    overwrite: bool = False,
    index_name: str | None = None,
    sync: bool = True,
) -> tuple[Path, ...]:
    """Write `tensors` to `path`, a safetensors file, and return the files written (the index last).

    Deterministic: the order given, sorted (stable) by descending element size so that every tensor
    is aligned; metadata sorted by key. Memory: one chunk, or one tensor that is not contiguous.
    LazyTensors are copied as the bytes of their file. Files appear whole or not at all; `sync`
    waits for the disk before they appear.

    shard_size: bytes, or "5GB" (10^9) or "5GiB" (2^30). Over it,
    `<stem>-00001-of-0000N.safetensors` and the index (`index_name`, by default
    `<stem>.safetensors.index.json`) with `metadata.total_size` in bytes; then `path` may be a
    folder, made if missing, and the stem is "model". One tensor never spans two shards.

    Raises UsageError: the target exists and not `overwrite`, is a symbolic link, a folder, or an
    input of the tensors; a wrong name or metadata; UnsupportedError: a dtype the format lacks;
    CheckFailed: a Deferred of another length.
    """
    target = Path(path)
    entries = [_entry(name, value) for name, value in tensors.items()]
    entries.sort(key=lambda entry: -BITS[entry.dtype])
    text = _checked_metadata(metadata)
    shards = (
        [entries] if shard_size is None else _split(tensors, entries, size_in_bytes(shard_size))
    )
    made_folder = False
    if shard_size is not None and (
        target.is_dir() or target.suffix not in (".safetensors", ".sft")
    ):
        made_folder = not target.exists()
        if target.parent.is_dir():
            target.mkdir(exist_ok=True)
        target = target / "model.safetensors"
    targets = _targets(target, len(shards))
    index = target.with_name(index_name or f"{target.stem}.safetensors.index.json")
    written = (*targets, index) if len(shards) > 1 else tuple(targets)
    staging = Staging(overwrite=overwrite, sync=sync)
    try:
        _check_targets(written, _inputs(tensors), overwrite)
        if shard_size is not None:
            _check_stale(target, written, index)
        for shard, file in zip(shards, targets, strict=True):
            with staging.create(file) as fd:
                _write(fd, shard, text, file, eager=sync)
        if len(shards) > 1:
            with staging.create(index) as fd:
                sink = Sink(fd)
                sink.write(memoryview(_index(shards, targets)))
                sink.flush()
        staging.publish()
    except BaseException:
        staging.discard()
        if made_folder and target.parent.is_dir() and not any(target.parent.iterdir()):
            target.parent.rmdir()
        raise
    return written


def serialized_header(
    tensors: Mapping[str, LazyTensor | torch.Tensor | np.ndarray | Deferred],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, tuple[str, ...]]:
    """The header `save` would write for one file, and the names in the order their bytes follow."""
    entries = [_entry(name, value) for name, value in tensors.items()]
    entries.sort(key=lambda entry: -BITS[entry.dtype])
    return _header(entries, _checked_metadata(metadata)), tuple(entry.name for entry in entries)


def size_in_bytes(size: int | str) -> int:
    """5000000000, "5GB" (powers of 1000) or "5GiB" (powers of 1024) as bytes. Raises UsageError."""
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.strip())
        if found is None:
            raise UsageError(
                f"shard size {size!r}: expected a number of bytes, or e.g. 5GB, 500MB, 2GiB"
            )
        number, unit, binary = found.groups()
        power = " KMGT".index(unit.upper() or " ")
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if size <= 0:
        raise UsageError(f"shard size {size}: expected more than 0 bytes")
    return size


def _entry(name: str, value: object) -> _Entry:
    problem = name_problem(name) if isinstance(name, str) else "the name is not text"
    if problem is None and name == "__metadata__":
        problem = "the name is reserved"
    if problem is None and ":" in name:
        problem = "a name with ':' belongs to a pipeline; save each of its components by itself"
    if problem:
        raise UsageError(f"cannot save {shown(str(name))}: {problem}")
    dtype, shape = dtype_and_shape(value, name)
    problem = shape_problem(shape)
    if problem or math.prod(shape) * BITS[dtype] % 8:
        raise UsageError(
            f"cannot save {shown(name)}: {problem or 'it does not end on a whole byte'}"
        )
    return _Entry(name, dtype, shape, value)


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    text = dict(sorted((metadata or {}).items()))
    for key, value in text.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UsageError(
                f"metadata {shown(str(key))} is {type(value).__name__}; text was expected"
            )
    return text


def _split(
    tensors: Mapping[str, object], entries: Sequence[_Entry], limit: int
) -> list[list[_Entry]]:
    """Greedy, in the order given: a new shard where the next tensor would exceed `limit`."""
    by_name = {entry.name: entry for entry in entries}
    shards: list[list[_Entry]] = [[]]
    size = 0
    for name in tensors:
        entry = by_name[name]
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    for shard in shards:
        shard.sort(key=lambda entry: -BITS[entry.dtype])
    return shards


def _targets(target: Path, count: int) -> list[Path]:
    if count == 1:
        return [target]
    return [
        target.with_name(f"{target.stem}-{i:05}-of-{count:05}.safetensors")
        for i in range(1, count + 1)
    ]


def _inputs(tensors: Mapping[str, object]) -> set[Path]:
    paths: set[Path] = set()
    for value in tensors.values():
        if isinstance(value, LazyTensor):
            paths.add(value.path)
        elif isinstance(value, Deferred):
            paths.update(value.sources)
    return paths


def _check_targets(targets: Sequence[Path], inputs: set[Path], overwrite: bool) -> None:
    folder = targets[0].parent
    if not folder.is_dir():
        raise UsageError(f"{targets[0]}: the folder {folder} does not exist; make it first")
    for target in targets:
        if target.is_symlink():
            raise UsageError(f"{target}: is a symbolic link; give the path of the file itself")
        if not target.exists():
            continue
        if target.is_dir():
            raise UsageError(f"{target}: is a folder; give a file name in it")
        if any(path.exists() and os.path.samefile(path, target) for path in inputs):
            raise UsageError(f"{target}: is an input of this operation; write to another file")
        if not overwrite:
            raise UsageError(f"{target}: exists; pass --overwrite (overwrite=True) to replace it")


def _check_stale(target: Path, written: Sequence[Path], index: Path) -> None:
    """Files of another sharding of the same name would be left beside the new ones, and be loaded
    by some tools.
    """
    pattern = re.compile(re.escape(target.stem) + r"-\d{5}-of-\d{5}\.safetensors")
    stale = [
        path.name
        for path in sorted(target.parent.iterdir() if target.parent.is_dir() else ())
        if path not in written and (path in (target, index) or pattern.fullmatch(path.name))
    ]
    if stale:
        raise UsageError(
            f"{target.parent}: holds {', '.join(stale[:6])} of an earlier save, which would stay "
            "beside the new files; remove them or save to another folder"
        )


def _write(
    fd: int, entries: Sequence[_Entry], metadata: Mapping[str, str], path: Path, *, eager: bool
) -> None:
    header = _header(entries, metadata)
    sink = Sink(fd, eager=eager)
    sink.write(memoryview(header))
    run: tuple[FileMap, int, int] | None = None  # adjacent bytes of one input file, not yet copied
    places = _places(entries, len(header))
    ahead: set[str] = set()  # written to their places already
    for entry in entries:
        span = entry.value.file_range() if isinstance(entry.value, LazyTensor) else None
        if isinstance(entry.value, LazyTensor) and span is not None:
            file = entry.value.file
            if run is not None and run[0] is file and run[2] == span[0]:
                run = (file, run[1], span[1])
                continue
            if run is not None:
                sink.copy(*run)
            run = (file, *span)
            continue
        if run is not None:
            sink.copy(*run)
            run = None
        if entry.name in ahead:
            sink.skip(entry.nbytes)
            continue
        start = sink.written
        for buffer in buffers(entry.value):
            sink.write(buffer)
        _check_length(path, entry, sink.written - start)
        joint = entry.value.joint if isinstance(entry.value, Deferred) else None
        for name in joint.waiting() if joint is not None and hasattr(os, "pwrite") else ():
            if name in places:  # not in another shard
                other, place = places[name]
                data = as_bytes(joint.take(name))  # pyright: ignore[reportOptionalMemberAccess]
                _check_length(path, other, data.nbytes)
                sink.place(place, data)
                ahead.add(name)
    if run is not None:
        sink.copy(*run)
    sink.flush()


def _places(entries: Sequence[_Entry], start: int) -> dict[str, tuple[_Entry, int]]:
    """Where the bytes of every tensor go."""
    places = {}
    for entry in entries:
        places[entry.name] = (entry, start)
        start += entry.nbytes
    return places


def _check_length(path: Path, entry: _Entry, nbytes: int) -> None:
    if nbytes != entry.nbytes:
        raise CheckFailed(
            f"{path}: {shown(entry.name)} gave {nbytes} bytes, {entry.nbytes} were promised "
            f"({entry.dtype} {list(entry.shape)}); nothing was written"
        )


def _header(entries: Sequence[_Entry], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON and the spaces that align the payload to 8 bytes."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    try:
        raw = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "the metadata holds half of a surrogate pair, which is not text"
        ) from error
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _index(shards: Sequence[Sequence[_Entry]], targets: Sequence[Path]) -> bytes:
    total = sum(entry.nbytes for shard in shards for entry in shard)
    weight_map = {
        entry.name: target.name
        for shard, target in zip(shards, targets, strict=True)
        for entry in shard
    }
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
