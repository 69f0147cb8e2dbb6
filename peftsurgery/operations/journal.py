"""The journal of a change in place: an undo file that lies beside the base from before its first
byte changes until after the last check.

Whatever happens in between, the originals are complete and on disk, so the change can be finished
or rolled back:

    journal written, fsync; renamed, folder fsync
    bytes overwritten, fsync; checked
    journal removed or renamed, folder fsync
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.writing import sync_folder
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.operations.undo import Undo, digest_of, originals, read_undo, root_of

SUFFIX = ".peftsurgery-journal"

Advance = Callable[[int, str], None]  # bytes done, what


def journal_path(base: Checkpoint) -> Path:
    """Where the journal of a merge in place into `base` lies: in its folder, named after its
    first weight file.
    """
    name = base.files[0].relative_to(root_of(base)).as_posix().replace("/", ".")
    return root_of(base) / f"{name}{SUFFIX}"


def pending(checkpoint: Checkpoint) -> Path | None:
    """The journal of an unfinished merge in place into any of the files of `checkpoint`, or
    None.
    """
    files = {file.resolve() for file in checkpoint.files}
    folders = {file.parent for file in checkpoint.files}
    for folder in sorted(folders | {folder.parent for folder in folders}):
        for journal in sorted(folder.glob(f"*{SUFFIX}")):
            undo = read_undo(journal)
            names = [file.path for file in undo.files]
            if not undo.folder:  # one file, which may have been renamed since
                names = [journal.name.removesuffix(SUFFIX)]
            if any((folder / name).resolve() in files for name in names):
                return journal
    return None


def refuse_pending(checkpoint: Checkpoint) -> None:
    """Raise UsageError, naming both ways out, when a merge in place into this checkpoint was
    interrupted.
    """
    journal = pending(checkpoint)
    if journal is not None:
        raise UsageError(unfinished(checkpoint.source, read_undo(journal)))


def unfinished(source: str, undo: Undo) -> str:
    """The message about an unfinished merge in place, with both ways out."""
    return (
        f"{source}: a merge in place was interrupted here; its weights are half written. Either "
        "finish it with the same "
        f"command (merge {source} --in-place, adapters {undo.merge.adapters}, "
        f"{undo.merge.options}), or roll it back: "
        f"peftsurgery unmerge {source} --undo {undo.path} --in-place."
    )


@contextmanager
def locked(journal: Path) -> Iterator[None]:
    """Hold the journal for this process; the lock ends with the process. Raises UsageError when
    another one has it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    fd = os.open(journal, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(fd), os.stat(journal))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise UsageError(f"{journal}: another process is at work on it. Wait until it is done.")
        yield
    finally:
        os.close(fd)


def has_head(undo: Undo, index: int, path: Path) -> bool:
    """Whether a file has the size and the header that its base has."""
    head = undo.head(index)
    with open(path, "rb") as opened:
        return opened.read(len(head)) == head and path.stat().st_size == undo.files[index].size


def check_untouched(undo: Undo, index: int, path: Path) -> None:
    """Raise CheckFailed unless header, size and all bytes that the merge leaves alone are those
    of the base's file.
    """
    if not has_head(undo, index, path):
        raise CheckFailed(
            f"{path}: is not the file that {undo.path} is about: its header or size differs; "
            "nothing was changed."
        )
    if digest_of(path, ranges_of(undo, index))[1] != undo.files[index].rest:
        raise CheckFailed(
            f"{path}: tensors that the merge leaves alone are not those of the base {undo.path} "
            "is about; nothing was "
            "changed."
        )


def ranges_of(undo: Undo, index: int) -> list[tuple[int, int]]:
    """The byte ranges of one file whose originals are kept."""
    return [(start, start + t.nbytes) for start, t in originals(undo, index).items()]


def overwrite(path: Path, pieces: Iterable[tuple[int, memoryview]]) -> None:
    """Write every (offset, bytes) into the file, which keeps its size; on disk when this
    returns.
    """
    fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        for offset, data in pieces:
            while data.nbytes:
                count = _pwrite(fd, data, offset)
                offset, data = offset + count, data[count:]
        os.fsync(fd)
    finally:
        os.close(fd)


def _pwrite(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, data)


def roll_back(undo: Undo, index: int, path: Path, advance: Advance | None = None) -> None:
    """Write the originals of one file back into it and prove it by its digest.

    Raises CheckFailed, before anything is written, when it is another file or has changed outside
    of the merge.
    """
    check_untouched(undo, index, path)
    kept = originals(undo, index)
    if kept:
        overwrite(path, _read(kept, advance))
    prove_base(undo, index, path)


def prove_base(undo: Undo, index: int, path: Path) -> None:
    """Raise CheckFailed unless the file is, byte for byte, the base's."""
    if digest_of(path)[0] != undo.files[index].sha256:
        raise CheckFailed(
            f"{path}: restored, but its SHA-256 is not that of the base "
            f"({undo.files[index].path}). {undo.path} was kept."
        )


def _read(
    tensors: Mapping[int, LazyTensor], advance: Advance | None
) -> Iterator[tuple[int, memoryview]]:
    for offset, tensor in tensors.items():
        yield offset, tensor.read()
        if advance is not None:
            advance(tensor.nbytes, tensor.name)


def sweep(*targets: Path) -> None:
    """Delete what killed runs left of files that were to get these names; call it with the lock
    held.
    """
    for target in targets:
        for part in target.parent.glob(f".{escape(target.name[:200])}.*.part"):
            part.unlink(missing_ok=True)


def remove(journal: Path) -> None:
    """Delete the journal; the folder is on disk when this returns."""
    os.unlink(journal)
    sync_folder(journal.parent)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file; the target appears complete and on disk, or not at all."""
    temporary = target.with_name(f".{target.name[:200]}.part")
    try:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)
