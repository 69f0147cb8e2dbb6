"""Results of many modules that are kept in a file until they are written, and not in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from peftsurgery.algorithms import WeightAdapter
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.errors import UsageError

ROOM = 1 << 28  # bytes that stay in memory: most adapters need no file
LEAST = 1 << 16  # bytes of a tensor; smaller ones always stay

_libc = ctypes.CDLL(None) if os.name == "posix" else None
_malloc_trim = getattr(_libc, "malloc_trim", None)  # glibc alone has it


class Spill:
    """Tensors beyond `room` bytes lie in one file without a name in `folder`, mapped like the files
    that are read: their pages may be given back at any time and come again when they are touched.

    A context; the file is gone when the last tensor in it is. Threads may `keep` at once.
    """

    def __init__(self, folder: Path, room: int = ROOM) -> None:
        self._folder = folder
        self._room = room
        self._file: IO[bytes] | None = None
        self._end = 0
        self._maps: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._maps.clear()
        if self._file is not None:
            self._file.close()

    def keep(self, module: WeightAdapter) -> WeightAdapter:
        """The same module, its tensors in the file where there is no more room.

        UsageError when the file cannot be written.
        """
        tensors = {n: t.detach() for n, t in module.tensors().items() if t.nbytes >= LEAST}
        with self._lock:
            self._room -= sum(t.nbytes for t in tensors.values())
            if self._room >= 0 or not tensors:
                return module
            try:
                moved = {name: self._mapped(tensor) for name, tensor in tensors.items()}
            except OSError as error:
                raise UsageError(
                    f"{self._folder}: a temporary file cannot be written there: {error.strerror}"
                ) from error
        return module.with_tensors(**moved)

    def release(self) -> None:
        """Give the resident pages back, and what the allocator holds in pieces between tensors that
        are in use (600 MB behind 500 modules), where the system has calls for that.
        """
        with self._lock:
            for mapped in self._maps if hasattr(mmap, "MADV_DONTNEED") else ():
                mapped.madvise(mmap.MADV_DONTNEED)
        if _malloc_trim is not None:
            _malloc_trim(0)

    def _mapped(self, tensor: Tensor) -> Tensor:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        data = as_bytes(tensor)
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._end = start + data.nbytes
        while data.nbytes:
            data = data[self._file.write(data) :]
        mapped = mmap.mmap(
            self._file.fileno(), tensor.nbytes, access=mmap.ACCESS_COPY, offset=start
        )
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=tensor.dtype).reshape(tensor.shape)
