"""SHA-256 of files, also ahead of need, on a thread beside whatever keeps the main one busy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from peftsurgery.checkpoint.header import Limits
from peftsurgery.errors import PeftSurgeryError, UsageError

# large: after every piece the thread waits for the interpreter's lock, for up to 5 ms
_BUFFER_BYTES = 32 << 20
_Identity = tuple[int, int, int, int]
_ahead: dict[_Identity, Future[str]] = {}


def sha256_of(path: Path | str, *, skip_header: bool = False) -> str:
    """SHA-256 of a file, in hex; with `skip_header`, of the bytes behind a safetensors header only.

    Waits for `hash_ahead` of the same file instead of reading it again. Raises UsageError for a
    file that cannot be read, or is no safetensors file where one is needed.
    """
    if not skip_header:
        with contextlib.suppress(OSError):
            started = _ahead.pop(_identity(path), None)
            if started is not None:
                return started.result()
    return _digest(path, skip_header)


def _digest(path: Path | str, skip_header: bool) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, 2)
            buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(size, 1))))
            file.seek(0)
            if skip_header:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > size - 8:
                    raise UsageError(f"{path}: not a safetensors file")
                file.seek(8 + length)
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def hash_ahead(*sources: Path | str) -> None:
    """Start hashing files, or the weights of folders, one after the other on a thread of its own.

    A later `sha256_of` of the same, unchanged file takes the result. Folders: PEFT's, with its
    sub-folders, and transformers'. Anything that is not a local file or such a folder is left
    alone: opening it will say what is wrong.
    """
    waiting: list[tuple[Path, Future[str]]] = []
    for file in (file for source in sources for file in _weights(Path(source))):
        with contextlib.suppress(OSError):
            future: Future[str] = Future()
            _ahead[_identity(file)] = future
            waiting.append((file, future))
    if waiting:  # a daemon: it keeps no process from ending
        threading.Thread(target=_hash_all, args=(waiting,), daemon=True).start()


def _weights(path: Path) -> list[Path]:
    if path.is_file():
        index = path.name.endswith(".index.json")
        return _shards(path) if index else [path]
    for name in ("model.safetensors.index.json", "model.safetensors"):
        if (path / name).is_file():
            return _weights(path / name)
    adapter = "adapter_model.safetensors"
    return [*path.glob(adapter), *path.glob(f"*/{adapter}")]


def _shards(index: Path) -> list[Path]:
    """The files an index names beside it; none when it is not what it should be."""
    from peftsurgery.checkpoint.opening import shard_map

    try:
        shards = set(shard_map(index, limit=Limits().json_bytes).values())
    except PeftSurgeryError:
        return []
    return [file for name in sorted(shards) if (file := index.parent / name).is_file()]


def _hash_all(waiting: Sequence[tuple[Path, Future[str]]]) -> None:
    for path, future in waiting:
        try:
            future.set_result(_digest(path, False))
        except BaseException as error:  # it belongs to whoever asks for this file
            future.set_exception(error)


def _identity(path: Path | str) -> _Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
