"""The undo file: everything needed to turn a merged checkpoint back into its base, bit for bit.

A safetensors file. Tensors, counted by the weight files of the base in their order:

    header/<i>        the first bytes of file i, up to its payload, as they stand (U8)
    tensor/<i>/<name> the original of every tensor that the merge changed, in its own dtype and shape
    side/<k>          a small or changed side file (config, index), as it stands (U8)
    merged            SHA-256 of every merged file (U8, [files, 32]); zeros while a merge in place is under way

Its metadata names the files with their digests. A merge in place writes the same file first, beside the base and under a
name of its own: then it is the journal, and as long as it lies there the base is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from peftsurgery import __version__
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.checkpoint import (
    Checkpoint,
    Header,
    LazyTensor,
    open_checkpoint,
    parse_header,
    save,
    sha256_of,
)
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.errors import UnsafeInputError, UnsupportedError, UsageError
from peftsurgery.operations.apply import Settings
from peftsurgery.operations.plan import MergePlan

FORMAT = "peftsurgery.undo"
SMALL = 1 << 20  # bytes; side files up to here are kept whether the merge changed them or not
_STEP = 8 << 20


@dataclass(frozen=True)
class WeightFile:
    """One weight file of the base."""

    path: str  # below the root, with "/"
    size: int
    sha256: str
    rest: str  # SHA-256 of the file without the bytes of the tensors kept in the undo file


@dataclass(frozen=True)
class SideFile:
    """One other file of the base; `kept` when its bytes are in the undo file."""

    path: str
    sha256: str
    kept: bool


@dataclass(frozen=True)
class Merge:
    """Which merge the file undoes: a digest of its plan, and words for people."""

    plan: str
    adapters: str
    options: str
    in_place: bool = False

    def same_as(self, other: Merge) -> bool:
        """Whether the result is the same; the files of the adapters may have moved."""
        return (self.plan, self.in_place) == (other.plan, other.in_place)


@dataclass(frozen=True)
class Undo:
    """An undo file, opened and checked; nothing of it is read yet."""

    path: Path
    checkpoint: Checkpoint
    base: str
    folder: bool  # the base is several files below a root, or one file
    merge: Merge
    files: tuple[WeightFile, ...]
    sides: tuple[SideFile, ...]
    left_out: tuple[str, ...]  # files of the base that no merged checkpoint has

    def head(self, index: int) -> bytes:
        """The bytes of a base file up to its payload."""
        return bytes(self.checkpoint[f"header/{index}"].read())

    def header(self, index: int) -> Header:
        """`head`, read by the strict reader."""
        raw, size = self.head(index), self.files[index].size
        where = f"{self.path}: header of {self.files[index].path}"
        if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8 or len(raw) > size:
            raise UnsafeInputError(f"{where}: its length does not fit. The file is damaged.")
        return parse_header(raw[8:], size - len(raw), where=where)

    def original(self, index: int, name: str) -> LazyTensor | None:
        """The original of a tensor by the name it has in its file; None when the merge left it alone."""
        return self.checkpoint.get(f"tensor/{index}/{name}")

    def merged(self, index: int) -> str | None:
        """SHA-256 of the merged file; None before a merge in place has finished."""
        row = bytes(self.checkpoint["merged"].rows(index, index + 1).read())
        return row.hex() if any(row) else None

    def same_as(self, other: Undo) -> bool:
        """Whether both describe the same merge of the same base (copies, or links)."""
        return (self.merge, self.files, self.sides) == (other.merge, other.files, other.sides)


def identity(plan: MergePlan, settings: Settings) -> str:
    """SHA-256 of all that decides the result of a merge, besides the base: modules, places, strengths and rounding."""
    digest = hashlib.sha256(repr(settings).encode())
    modules: dict[int, bytes] = {}
    for target in plan.targets.values():
        digest.update(repr((target.name, target.shape)).encode())
        for edit in target.edits:
            for field in fields(edit):
                value = getattr(edit, field.name)
                if isinstance(value, WeightAdapter):
                    if id(value) not in modules:
                        modules[id(value)] = _module_digest(value)
                    digest.update(modules[id(value)])
                elif isinstance(value, torch.Tensor):
                    digest.update(as_bytes(value))
                else:
                    digest.update(repr((field.name, value)).encode())
    return digest.hexdigest()


def _module_digest(module: WeightAdapter) -> bytes:
    names = ("magnitude_axis", "bias_is_value", "padded_shape", "stored", *module.options)
    settings = [module.algorithm, float(module.scale), *(getattr(module, n) for n in names)]
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in module.tensors().items():
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(as_bytes(tensor))
    return digest.digest()


# writing ------------------------------------------------------------------------------------------


def check_undoable(base: Checkpoint) -> None:
    """Raise UnsupportedError for a base that no undo file can restore."""
    if any(tensor.file_range() is None for tensor in base.values()):
        raise UnsupportedError(
            f"{base.source}: a pickle cannot be restored bit for bit from safetensors; convert the base first, or leave "
            "--undo out."
        )


def write_undo(
    path: Path,
    base: Checkpoint,
    changed: Iterable[str],
    merge: Merge,
    *,
    merged: Path | None = None,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write the undo file of a merge of `base`: complete and on disk before it appears under `path`.

    changed: names of the tensors the merge changes. merged: the finished result, a file or a folder laid out like the
    base; None for a merge in place, whose digests are added at its end (`record_merged`).
    """
    check_undoable(base)
    root = root_of(base)
    index = {file: number for number, file in enumerate(base.files)}
    tensors: dict[str, LazyTensor | np.ndarray] = {}
    ranges: dict[Path, list[tuple[int, int]]] = {file: [] for file in base.files}
    for name in changed:
        tensor = base[name]
        tensors[f"tensor/{index[tensor.path]}/{tensor.name}"] = tensor
        span = tensor.file_range()
        assert span is not None
        ranges[tensor.path].append(span)
    files: list[WeightFile] = []
    digests = np.zeros((len(base.files), 32), np.uint8)
    for file, number in index.items():
        whole, rest = digest_of(file, ranges[file])
        files.append(WeightFile(_below(file, root), file.stat().st_size, whole, rest))
        tensors[f"header/{number}"] = np.frombuffer(_head_of(file), np.uint8)
        if merged is not None:
            result = merged / files[-1].path if merged.is_dir() else merged
            digests[number] = np.frombuffer(bytes.fromhex(sha256_of(result)), np.uint8)
    tensors["merged"] = digests
    sides, left_out = _side_files(base, root, merged, tensors)
    record = {
        "version": 1,
        "base": Path(base.source).name,
        "folder": is_folder(base),
        "merge": asdict(merge),
        "files": [asdict(file) for file in files],
        "sides": [asdict(side) for side in sides],
        "left_out": left_out,
    }
    metadata = {
        "peftsurgery.operation": "undo",
        "peftsurgery.version": __version__,
        FORMAT: json.dumps(record, sort_keys=True, ensure_ascii=False),
    }
    return save(path, tensors, metadata, overwrite=overwrite)


def _side_files(
    base: Checkpoint, root: Path, merged: Path | None, tensors: dict[str, LazyTensor | np.ndarray]
) -> tuple[list[SideFile], list[str]]:
    """Files beside the weights that the merge copied or rewrote, and those it left out."""
    sides: list[SideFile] = []
    if merged is None or not merged.is_dir():
        return sides, []
    weights = {_below(file, root) for file in base.files}
    written = {_below(file, merged) for file in merged.rglob("*") if file.is_file()} - weights
    for name in sorted(written):
        source = root / name
        if not source.is_file():
            continue
        digest = sha256_of(source)
        kept = source.stat().st_size <= SMALL or sha256_of(merged / name) != digest
        if kept:
            tensors[f"side/{len(sides)}"] = np.frombuffer(source.read_bytes(), np.uint8)
        sides.append(SideFile(name, digest, kept))
    left_out: list[str] = []
    if base.path.is_dir():
        present = {_below(file, root) for file in root.rglob("*") if file.is_file()}
        left_out = sorted(present - written - weights)
    return sides, left_out


def record_merged(path: Path, undo: Undo, digests: Sequence[str]) -> None:
    """Write the digests of the merged files into a finished journal, on disk before this returns."""
    span = undo.checkpoint["merged"].file_range()
    assert span is not None
    with open(path, "r+b", buffering=0) as file:
        file.seek(span[0])
        file.write(bytes.fromhex("".join(digests)))
        os.fsync(file.fileno())


# reading ------------------------------------------------------------------------------------------


def read_undo(path: str | Path) -> Undo:
    """Open an undo file. Raises UsageError when it is none, UnsafeInputError when it contradicts itself."""
    path = Path(path)
    checkpoint = open_checkpoint(path)
    text = checkpoint.metadata.get(FORMAT)
    if text is None:
        raise UsageError(
            f"{path}: is no undo file. Expected what `merge --undo FILE` or an interrupted `merge --in-place` left."
        )
    try:
        record = json.loads(text)
        if record["version"] != 1:
            raise UnsupportedError(f"{path}: an undo file of version {record['version']}, not 1.")
        undo = Undo(
            path,
            checkpoint,
            str(record["base"]),
            bool(record["folder"]),
            Merge(**record["merge"]),
            tuple(WeightFile(**item) for item in record["files"]),
            tuple(SideFile(**item) for item in record["sides"]),
            tuple(map(str, record["left_out"])),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UnsafeInputError(f"{path}: the record of the undo file is damaged: {error}") from error
    _check(undo)
    return undo


def _check(undo: Undo) -> None:
    for item in (*undo.files, *undo.sides):
        parts = PurePosixPath(item.path).parts if isinstance(item.path, str) else ()
        if not parts or item.path.startswith("/") or ".." in parts or set(item.path) & set("\\:\0"):
            raise UnsafeInputError(f"{undo.path}: {item.path!r} is no file name below a folder.")
    names = undo.checkpoint
    needed = {"merged"} | {f"header/{i}" for i in range(len(undo.files))}
    needed |= {f"side/{k}" for k, side in enumerate(undo.sides) if side.kept}
    missing = sorted(needed - set(names))
    if missing or names["merged"].shape != (len(undo.files), 32):
        raise UnsafeInputError(f"{undo.path}: incomplete: {', '.join(missing) or 'merged'}.")
    known: set[str] = set()
    for index in range(len(undo.files)):
        for name, info in undo.header(index).tensors.items():
            kept = undo.original(index, name)
            known.add(f"tensor/{index}/{name}")
            if kept is not None and (kept.dtype, tuple(kept.shape)) != (info.dtype, info.shape):
                raise UnsafeInputError(f"{undo.path}: {name!r} is not as its header says.")
    stray = [n for n in names if n.startswith("tensor/") and n not in known]
    if stray:
        raise UnsafeInputError(f"{undo.path}: {stray[0]!r} belongs to no file of the base.")


# files ------------------------------------------------------------------------------------------


def is_folder(checkpoint: Checkpoint) -> bool:
    """Whether a merge of this checkpoint is written as a folder."""
    return checkpoint.path.is_dir() or checkpoint.kind == "sharded"


def root_of(checkpoint: Checkpoint) -> Path:
    """The folder below which the files of a checkpoint are named."""
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def digest_of(path: Path, left_out: Sequence[tuple[int, int]] = ()) -> tuple[str, str]:
    """SHA-256 of a file, and of the file without the byte ranges `left_out`; read once."""
    whole, rest = hashlib.sha256(), hashlib.sha256()
    edges = sorted(left_out)
    with open(path, "rb", buffering=0) as file:
        position = 0
        buffer = memoryview(bytearray(_STEP))
        while count := file.readinto(buffer):
            whole.update(buffer[:count])
            start, end = position, position + count
            for low, high in edges:
                if low >= end:
                    break
                if high <= start:
                    continue
                if low > start:
                    rest.update(buffer[start - position : low - position])
                start = min(high, end)
            rest.update(buffer[start - position : count])
            position = end
            while edges and edges[0][1] <= position:
                edges.pop(0)
    return whole.hexdigest(), rest.hexdigest()


def _head_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def originals(undo: Undo, index: int) -> Mapping[int, LazyTensor]:
    """Offset in the file of the base -> original tensor, for one file."""
    header = undo.header(index)
    found: dict[int, LazyTensor] = {}
    for name, info in header.tensors.items():
        kept = undo.original(index, name)
        if kept is not None and kept.nbytes:
            found[header.data_start + info.begin] = kept
    return dict(sorted(found.items()))
