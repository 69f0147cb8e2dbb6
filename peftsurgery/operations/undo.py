"""The undo file: everything needed to turn a merged checkpoint back into its base, bit for bit.

A safetensors file. Tensors, counted by the weight files of the base in their order:

    header/<i>        the first bytes of file i, up to its payload, as they stand (U8)
    tensor/<i>/<name> the original of every tensor that the merge changed, its dtype and shape kept
    side/<k>          a small or changed side file (config, index), as it stands (U8)
    merged            SHA-256 of every merged file (U8, [files, 32]); zeros while a merge in place
                      is under way

Its metadata names the files with their digests. A merge in place writes the same file first, beside
the base and under a name of its own: then it is the journal, and as long as it lies there the base
is unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from peftsurgery.checkpoint import (
    Checkpoint,
    Header,
    LazyTensor,
    open_checkpoint,
    parse_header,
)
from peftsurgery.errors import UnsafeInputError, UnsupportedError, UsageError

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
        """The original of a tensor by the name it has in its file; None when the merge left it
        alone.
        """
        return self.checkpoint.get(f"tensor/{index}/{name}")

    def merged(self, index: int) -> str | None:
        """SHA-256 of the merged file; None before a merge in place has finished."""
        row = bytes(self.checkpoint["merged"].rows(index, index + 1).read())
        return row.hex() if any(row) else None

    def same_as(self, other: Undo) -> bool:
        """Whether both describe the same merge of the same base (copies, or links)."""
        return (self.merge, self.files, self.sides) == (other.merge, other.files, other.sides)


# reading ------------------------------------------------------------------------------------------


def read_undo(path: str | Path) -> Undo:
    """Open an undo file. Raises UsageError when it is none, UnsafeInputError when it contradicts
    itself.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    text = checkpoint.metadata.get(FORMAT)
    if text is None:
        raise UsageError(
            f"{path}: is no undo file. Expected what `merge --undo FILE` or an interrupted `merge "
            "--in-place` left."
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
        raise UnsafeInputError(
            f"{path}: the record of the undo file is damaged: {error}"
        ) from error
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


def below(path: Path, root: Path) -> str:
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
