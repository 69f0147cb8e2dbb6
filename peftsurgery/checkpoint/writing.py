"""The bytes of a tensor, whatever holds it, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peftsurgery.checkpoint.dtypes import BITS, FROM_TORCH_NAMES, NUMPY
from peftsurgery.checkpoint.tensors import FileMap, LazyTensor
from peftsurgery.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

Buffer = bytes | bytearray | memoryview | np.ndarray
_SMALL = 1 << 16  # below this, bytes are gathered before they are written
_COPY_STEP = 1 << 28
_WRITEBACK_STEP = 1 << 25


class Joint:
    """Several tensors that are made at once, by `make` on first need; those that are not asked for
    at once wait here.
    """

    def __init__(self, make: Callable[[], Mapping[str, Buffer | torch.Tensor]]) -> None:
        self._make = make
        self._waiting: dict[str, Buffer | torch.Tensor] | None = None

    def take(self, name: str) -> Buffer | torch.Tensor:
        """One of the tensors, by the name it is saved under; each can be had once."""
        if self._waiting is None:
            self._waiting = dict(self._make())
        return self._waiting.pop(name)

    def waiting(self) -> tuple[str, ...]:
        """Names of what was made and has not been asked for."""
        return tuple(self._waiting or ())


@dataclass(frozen=True)
class Deferred:
    """A tensor made while it is written: `chunks()` yields its bytes in order, in pieces of any
    size.

    shape counts elements as the file does. A piece is bytes-like, a numpy array or a torch tensor;
    it is written before the next one is asked for, so one buffer may be reused. `sources`: the
    files it is made from (never overwritten). joint: what makes it together with others, which
    `save` then writes to their places at the same time.
    """

    dtype: str  # a safetensors name
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Buffer | torch.Tensor]]
    sources: tuple[Path, ...] = ()
    joint: Joint | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def dtype_and_shape(value: object, name: str) -> tuple[str, tuple[int, ...]]:
    """How the file will describe `value`. Raises UnsupportedError for an element type the format
    does not have.
    """
    if isinstance(value, LazyTensor | Deferred):
        if value.dtype not in BITS:
            raise UnsupportedError(f"{name!r}: the safetensors format has no dtype {value.dtype!r}")
        return value.dtype, tuple(value.shape)
    if isinstance(value, np.ndarray):
        for dtype, known in NUMPY.items():
            if value.dtype.newbyteorder("<") == known:
                return dtype, value.shape
        raise UnsupportedError(f"{name!r}: the safetensors format has no numpy {value.dtype}")
    torch_name = str(getattr(value, "dtype", "")).removeprefix("torch.")
    layout = str(getattr(value, "layout", "torch.strided"))
    if getattr(value, "is_meta", False):
        layout = "on the meta device"
    if torch_name in FROM_TORCH_NAMES and layout == "torch.strided":
        dtype = FROM_TORCH_NAMES[torch_name]
        shape = tuple(int(dim) for dim in value.shape)  # pyright: ignore[reportAttributeAccessIssue]
        return dtype, (*shape[:-1], 2 * shape[-1]) if dtype == "F4" else shape
    raise UnsupportedError(
        f"{name!r}: {type(value).__name__} {torch_name} {layout} cannot be saved; expected a "
        "LazyTensor, a Deferred, a numpy array or a dense torch tensor of a dtype the safetensors "
        "format has"
    )


def buffers(value: object) -> Iterator[memoryview]:
    """The bytes of `value` in file order; a copy is made only of what is not contiguous or not on
    the CPU.
    """
    if isinstance(value, Deferred):
        for chunk in value.chunks():
            yield as_bytes(chunk)
    elif isinstance(value, LazyTensor):
        yield value.read()
    else:
        yield as_bytes(value)


def as_bytes(value: object) -> memoryview:
    """The bytes of a bytes-like object, array or tensor, row-major and little-endian."""
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        return array.reshape(-1).view(np.uint8).data
    if isinstance(value, bytes | bytearray | memoryview):
        view = memoryview(value)
        return view.cast("B") if view.nbytes else memoryview(b"")
    import torch

    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(
            f"bytes, an array or a tensor was expected, found {type(value).__name__}"
        )
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _start_writeback(fd: int, begin: int, end: int) -> None:
    """Have the disk begin with bytes `begin:end`, without waiting (Linux' sync_file_range); a hint,
    which says nothing of success: fsync does.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, begin, end - begin, 2)


def _linux_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):  # not Linux
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_sync_file_range = _linux_sync_file_range()


class Sink:
    """Writes to a descriptor: small pieces gathered, large ones passed straight on.

    eager: the disk works beside, so that an fsync at the end finds little left to do.
    """

    def __init__(self, fd: int, *, eager: bool = False) -> None:
        self.fd = fd
        self.eager = eager
        self.written = 0
        self._started = 0  # bytes handed to the disk
        self._pending = bytearray()

    def write(self, data: memoryview) -> None:
        self.written += data.nbytes
        if data.nbytes < _SMALL:
            self._pending += data
            if len(self._pending) >= _SMALL:
                self.flush()
        else:
            self.flush()
            _write_all(self.fd, data)
            self._writeback()

    def _writeback(self) -> None:
        if self.eager and self.written - self._started >= _WRITEBACK_STEP:
            _start_writeback(self.fd, self._started, self.written)
            self._started = self.written

    def flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        _write_all(self.fd, memoryview(pending))

    def place(self, offset: int, data: memoryview) -> None:
        """Write ahead, at a place in the file that `skip` will pass over."""
        while data.nbytes:
            count = os.pwrite(self.fd, data, offset)
            data, offset = data[count:], offset + count

    def skip(self, nbytes: int) -> None:
        """Pass over bytes that were written by `place`."""
        self.flush()
        os.lseek(self.fd, nbytes, os.SEEK_CUR)
        self.written += nbytes
        self._writeback()

    def copy(self, source: FileMap, begin: int, end: int) -> None:
        """Bytes `begin:end` of the file `source`, inside the kernel where it can, else from its
        map.
        """
        if end - begin < _SMALL or not hasattr(os, "copy_file_range"):
            self.write(source.view[begin:end])
            return
        self.flush()
        self.written += end - begin
        fd = source.reopen()
        try:
            while begin < end:
                try:
                    count = os.copy_file_range(fd, self.fd, min(end - begin, _COPY_STEP), begin)
                except (
                    OSError
                ):  # another file system, or one without it; a real write error recurs below
                    count = 0
                if count == 0:
                    _write_all(self.fd, source.view[begin:end])
                    return
                begin += count
            self._writeback()
        finally:
            os.close(fd)


def _write_all(fd: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(fd, data) :]


class Staging:
    """Files under temporary names beside their targets, renamed together at the end.

    `discard` removes whatever has not been published; after `publish` it does nothing.
    """

    def __init__(self, *, overwrite: bool, sync: bool) -> None:
        self.overwrite = overwrite
        self.sync = sync
        self._files: list[tuple[Path, Path]] = []  # temporary, target

    @contextlib.contextmanager
    def create(self, target: Path) -> Iterator[int]:
        """A descriptor of a new file (O_EXCL, the umask's mode, never executable); on disk when the
        block ends.
        """
        temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.part")
        self._files.append((temporary, target))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        try:
            fd = os.open(temporary, flags | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            self._files.pop()  # not ours, if it is there
            raise UsageError(f"{target}: cannot be written: {error.strerror}") from error
        try:
            yield fd
            if self.sync:
                os.fsync(fd)
        except OSError as error:
            raise UsageError(f"{target}: writing failed: {error.strerror}") from error
        finally:
            os.close(fd)

    def publish(self) -> None:
        """Rename every file to its target, in order of creation; undone when one fails."""
        done: list[Path] = []
        try:
            for temporary, target in self._files:
                if self.overwrite:
                    os.replace(temporary, target)
                else:
                    _rename_new(temporary, target)
                    done.append(target)
            if self.sync:
                for folder in {target.parent for _, target in self._files}:
                    sync_folder(folder)
        except BaseException as error:
            for target in done:
                target.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UsageError(
                    f"{error.filename}: cannot be renamed: {error.strerror}"
                ) from error
            raise
        self._files.clear()

    def discard(self) -> None:
        for temporary, _ in self._files:
            temporary.unlink(missing_ok=True)
        self._files.clear()


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename, refusing to replace a file that appeared in the meantime (link, where links exist, is
    atomic).
    """
    try:
        os.link(temporary, target)
    except FileExistsError as error:
        raise UsageError(
            f"{target}: appeared while writing; pass --overwrite to replace it"
        ) from error
    except OSError:
        os.replace(temporary, target)
    else:
        os.unlink(temporary)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
