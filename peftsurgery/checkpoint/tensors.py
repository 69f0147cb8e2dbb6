"""Tensors that stay in their file until somebody asks, over one private memory map per file."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peftsurgery.checkpoint.dtypes import BITS, NUMPY, WIDENED, torch_dtype, widen
from peftsurgery.checkpoint.header import open_regular
from peftsurgery.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch


_POPULATE_READ = 22  # MADV_POPULATE_READ; the mmap module has no name for it


class FileMap:
    """A file that was opened once; mapped on first use, copy-on-write, and checked to be the same
    file then.

    `identity` is (device, inode, size, mtime) at opening. The map is private: a write into a
    tensor that lies over it changes this process's pages and never the file.
    """

    __slots__ = ("_view", "identity", "path", "size")

    def __init__(self, path: Path, status: os.stat_result) -> None:
        self.path = path
        self.size = status.st_size
        self.identity = _identity(status)
        self._view: memoryview | None = None

    def reopen(self) -> int:
        """A new descriptor of the same file, the caller's to close; UsageError when the file has
        changed.
        """
        file = open_regular(self.path)
        fd = os.dup(file.fileno())
        file.close()
        if _identity(os.fstat(fd)) != self.identity:
            os.close(fd)
            raise UsageError(f"{self.path}: changed since it was opened; open it again")
        return fd

    @property
    def view(self) -> memoryview:
        """All bytes of the file, writable without reaching the file."""
        if self._view is None:
            fd = self.reopen()
            try:
                self._view = memoryview(_map(fd, self.size))
            finally:
                os.close(fd)
        return self._view

    def populate(self) -> None:
        """Map every page at once, for a file that is about to be read whole: taken one by one as
        they are touched, they cost a fifth of a copy. Does nothing on systems without the call.
        """
        if sys.platform == "linux" and self.size:
            with contextlib.suppress(OSError):  # before Linux 5.14
                self.view.obj.madvise(_POPULATE_READ)  # pyright: ignore[reportAttributeAccessIssue]

    def release(self) -> None:
        """Give the resident pages of the map back; the next access reads the file again.

        For a map nobody has written into: such changes would be lost. Does nothing where the system
        has no such call.
        """
        if self._view is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._view.obj.madvise(mmap.MADV_DONTNEED)  # pyright: ignore[reportAttributeAccessIssue]


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _map(fd: int, size: int) -> mmap.mmap:
    """ACCESS_COPY, on Linux with MAP_NORESERVE: a file may be larger than the memory."""
    if sys.platform == "linux":
        flags = mmap.MAP_PRIVATE | 0x4000
        return mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(fd, size, access=mmap.ACCESS_COPY)


class LazyTensor:
    """One tensor in a file, nothing read yet: bytes `begin:end` of `file`, row-major,
    little-endian.

    `shape` counts elements as the file does (two of them to a byte for F4). What `torch()`,
    `numpy()` and `read()` return shares memory with the private map: take it as read-only, a
    change would be seen by the next reader of the same tensor, though never by the file or by
    `save`, which copies the file's bytes.
    """

    __slots__ = ("begin", "dtype", "end", "file", "name", "shape")

    def __init__(
        self, file: FileMap, name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int
    ) -> None:
        self.file = file
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.begin = begin
        self.end = end

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.dtype}, {list(self.shape)})"

    @property
    def path(self) -> Path:
        """The file the tensor lies in."""
        return self.file.path

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def read(self) -> memoryview:
        """The bytes, `nbytes` of them, without a copy."""
        return self.file.view[self.begin : self.end]

    def file_range(self) -> tuple[int, int] | None:
        """`(begin, end)` of exactly these bytes in `file`; None when they are not one run of it."""
        return self.begin, self.end

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows `start:stop` of dimension 0, still lazy. UsageError when out of range or not on a
        byte boundary.
        """
        start_byte, stop_byte = self._row_bytes(start, stop)
        shape = (stop - start, *self.shape[1:])
        begin = self.begin
        return LazyTensor(
            self.file, self.name, self.dtype, shape, begin + start_byte, begin + stop_byte
        )

    def flattened(self, lead: int) -> LazyTensor:
        """The same bytes with the first `lead` dimensions taken as one. UnsupportedError for a
        tensor of a pickle.
        """
        span = self.file_range()
        if lead == 1:
            return self
        if span is None:
            raise UnsupportedError(
                f"{self.path}: {self.name!r}: a stacked tensor inside a pickle; convert the "
                "checkpoint to safetensors first."
            )
        shape = (math.prod(self.shape[:lead]), *self.shape[lead:])
        return LazyTensor(self.file, self.name, self.dtype, shape, *span)

    def _row_bytes(self, start: int, stop: int) -> tuple[int, int]:
        where = f"{self.path}: {self.name!r}: rows {start}:{stop} of shape {list(self.shape)}"
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"{where} do not exist")
        row_bits = int(np.prod(self.shape[1:], dtype=object)) * BITS[self.dtype]
        if start * row_bits % 8 or stop * row_bits % 8:
            raise UsageError(f"{where} do not end on a byte ({self.dtype})")
        return start * row_bits // 8, stop * row_bits // 8

    def numpy(self) -> np.ndarray:
        """The values; without a copy for numpy's own dtypes, widened exactly to float32 for BF16
        and 8-bit floats.

        Raises UnsupportedError for the 4- and 6-bit floats.
        """
        if self.dtype in NUMPY:
            return np.frombuffer(self.read(), dtype=NUMPY[self.dtype]).reshape(self.shape)
        if self.dtype in WIDENED:
            raw = np.frombuffer(self.read(), dtype=np.uint8)
            return widen(raw, self.dtype).reshape(self.shape)
        raise UnsupportedError(
            f"{self.path}: {self.name!r}: numpy has no {self.dtype}; use read() for the packed "
            "bytes"
        )

    def torch(self) -> torch.Tensor:
        """The tensor, without a copy (one is made when the file leaves it off its element's
        alignment).

        F4 becomes torch's packed pair type with half the last dimension. Raises UnsupportedError
        for F6.
        """
        import torch

        dtype = torch_dtype(self.dtype)
        shape = self.shape
        if self.dtype == "F4" and dtype is not None:
            if not shape or shape[-1] % 2:
                dtype = None
            else:
                shape = (*shape[:-1], shape[-1] // 2)
        if dtype is None:
            raise UnsupportedError(
                f"{self.path}: {self.name!r}: torch has no {self.dtype} of shape "
                f"{list(self.shape)}; use read() for the packed bytes"
            )
        if self.nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        buffer = self.read()
        if self.begin % max(BITS[self.dtype] // 8, 1):  # the map begins on a page
            buffer = bytearray(buffer)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


class StridedTensor(LazyTensor):
    """A view with strides into a storage of a torch pickle; `read()` gathers it into row-major
    order.

    element[i, j, ...] = storage[offset + i·stride[0] + j·stride[1] + ...], counted in elements;
    the storage is bytes `storage[0]:storage[1]` of the file.
    """

    __slots__ = ("offset", "storage", "strides")

    def __init__(
        self,
        file: FileMap,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        *,
        storage: tuple[int, int],
        offset: int,
        strides: tuple[int, ...],
    ) -> None:
        nbytes = int(np.prod(shape, dtype=object)) * BITS[dtype] // 8
        super().__init__(file, name, dtype, shape, 0, nbytes)
        self.storage = storage
        self.offset = offset
        self.strides = strides

    def file_range(self) -> tuple[int, int] | None:
        return None

    def read(self) -> memoryview:
        """The bytes in row-major order, gathered into fresh memory at every call."""
        size = BITS[self.dtype] // 8
        raw = np.frombuffer(self.file.view[self.storage[0] : self.storage[1]], dtype=f"<u{size}")
        strides = tuple(stride * size for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(raw[self.offset :], self.shape, strides)
        return view.copy(order="C").reshape(-1).view(np.uint8).data

    def rows(self, start: int, stop: int) -> LazyTensor:
        self._row_bytes(start, stop)
        return StridedTensor(
            self.file,
            self.name,
            self.dtype,
            (stop - start, *self.shape[1:]),
            storage=self.storage,
            offset=self.offset + start * self.strides[0],
            strides=self.strides,
        )
