"""SHA-256 of files, also ahead of need, on a thread beside whatever keeps the main one busy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path

from peftsurgery.errors import UsageError

# large: after every piece the thread waits for the interpreter's lock, for up to 5 ms
_BUFFER_BYTES = 32 << 20
_Identity = tuple[int, int, int, int]
_ahead: dict[_Identity, _Ahead] = {}


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


def hash_ahead(source: Path | str) -> None:
    """Start hashing a file, or the weights of a PEFT folder and of its sub-folders.

    A later `sha256_of` of the same, unchanged file takes the result. Anything that is not a local
    file or folder is left alone: opening it will say what is wrong.
    """
    path = Path(source)
    weights = "adapter_model.safetensors"
    files = [path] if path.is_file() else [*path.glob(weights), *path.glob(f"*/{weights}")]
    for file in files:
        with contextlib.suppress(OSError):
            thread = _Ahead(file)
            _ahead[_identity(file)] = thread
            thread.start()


def _identity(path: Path | str) -> _Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Ahead(threading.Thread):
    """One file's hash in the making. A daemon: it keeps no process from ending."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.digest = ""
        self.error: UsageError | None = None

    def run(self) -> None:
        try:
            self.digest = _digest(self.path, False)
        except UsageError as error:
            self.error = error

    def result(self) -> str:
        self.join()
        if self.error is not None:
            raise self.error
        return self.digest
