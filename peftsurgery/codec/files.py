"""Adapters in files and folders: opening, hashing, lineage and writing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from peftsurgery import architectures
from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import Deferred, open_checkpoint, save, serialized_header
from peftsurgery.checkpoint.writing import dtype_and_shape
from peftsurgery.codec.bases import BaseWeights, base_names
from peftsurgery.codec.decoding import decode
from peftsurgery.codec.encoding import Encoded, encode
from peftsurgery.codec.explaining import CONFIG, WEIGHTS, open_adapter
from peftsurgery.codec.settling import settle
from peftsurgery.errors import UsageError
from peftsurgery.layouts import layout_named

STEP = 1 << 26  # bytes read between two releases of memory


def load_adapter(
    source: str | Path,
    *,
    architecture: str | None = None,
    base: str | Path | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """The canonical adapter of a file, folder or hub id, whatever its layout.

    base: the checkpoint it was trained on; its module list restores flattened names of models
    without a table, its shapes what a file draws anew (`codec.settling`). Raises UsageError,
    UnsupportedError or UnsafeInputError naming file, key, expectation and remedy.
    """
    opened = None if base is None else open_checkpoint(base)
    known = None if opened is None else base_names(opened)
    adapter = decode(
        open_adapter(source, allow_pickle=allow_pickle), architecture=architecture, known=known
    )
    if opened is None or "vera" not in adapter.algorithms:
        return adapter
    return settle(adapter, BaseWeights(opened, architectures.get(adapter.architecture)).shape_of)


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    layout: str,
    fold_alpha: bool = False,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write an adapter in a layout (a file, or a folder for PEFT); returns the files written.

    Raises UnsupportedError naming the first module the layout cannot hold. Nothing is written then.
    """
    return write_encoded(
        encode(adapter, layout, fold_alpha=fold_alpha), Path(path), layout, overwrite
    )


def write_encoded(
    encoded: Encoded, path: Path, layout: str, overwrite: bool = False, *, sync: bool = True
) -> tuple[Path, ...]:
    """Write what `encode` made, atomically: a file by rename, a folder by renaming a complete one
    into place.

    sync: wait for the disk; without it the caller flushes the files (see `flushing`) before they
    are published.
    """
    row = layout_named(layout)
    if row.alpha != "config":
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; {row.title} is one file. Give a file name.")
        tensors = _passing(ordered(encoded.tensors.get("", {})), encoded.release)
        return save(path, tensors, encoded.metadata, overwrite=overwrite, sync=sync)
    if path.suffix in (".safetensors", ".sft"):
        raise UsageError(
            f"{path}: {row.title} is a folder; give a folder name without {path.suffix}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:200]}."))
    try:
        for part, tensors in encoded.tensors.items():
            folder = temporary / part
            folder.mkdir(exist_ok=True)
            tensors = _passing(ordered(tensors), encoded.release)
            save(folder / WEIGHTS, tensors, encoded.metadata, sync=sync)
            _write_text(
                folder / CONFIG, json.dumps(encoded.configs[part], indent=2, sort_keys=True)
            )
        return publish(temporary, path, overwrite=overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def flushing(staged: Path) -> Iterator[None]:
    """The disk writes the file, or every file of the folder, while the block runs, and is done when
    it ends.
    """

    def flush() -> None:
        files = [f for f in staged.rglob("*") if f.is_file()] if staged.is_dir() else [staged]
        for file in files:
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(flush)
        yield
        try:
            done.result()
        except OSError as error:
            raise UsageError(f"{staged}: writing failed: {error.strerror}") from error


def publish(staged: Path, path: Path, *, overwrite: bool) -> tuple[Path, ...]:
    """Rename a complete file or folder into place. In an existing folder only files of the same
    name are replaced.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: exists. Pass --overwrite to replace it.")
    if not staged.is_dir():
        os.replace(staged, path)
        return (path,)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file, and a folder is to be written. Give another name.")
    names = sorted(file.relative_to(staged) for file in staged.rglob("*") if file.is_file())
    if path.exists():
        for name in names:
            (path / name).parent.mkdir(exist_ok=True)
            os.replace(staged / name, path / name)
    else:
        umask = os.umask(0)
        os.umask(umask)
        staged.chmod(0o777 & ~umask)
        os.rename(staged, path)
    return tuple(path / name for name in names)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def ordered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By name: with `save`'s order by element size, the order the safetensors library writes."""
    return {key: tensors[key] for key in sorted(tensors)}


class _Passed:
    """Calls `release` whenever `STEP` bytes have gone by."""

    def __init__(self, release: Callable[[], None] | None) -> None:
        self._release = release
        self._bytes = 0

    def add(self, nbytes: int) -> None:
        self._bytes += nbytes
        if self._bytes >= STEP and self._release is not None:
            self._bytes = 0
            self._release()


def _passing(
    tensors: Mapping[str, torch.Tensor], release: Callable[[], None] | None
) -> Mapping[str, torch.Tensor | Deferred]:
    """The same tensors; while they are written, their memory is released now and then."""
    if release is None:
        return tensors
    passed = _Passed(release)

    def chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        yield tensor
        passed.add(tensor.nbytes)

    return {
        key: Deferred(*dtype_and_shape(tensor, key), partial(chunks, tensor))
        for key, tensor in tensors.items()
    }


def kohya_hashes(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    release: Callable[[], None] | None = None,
) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a Kohya file (sd-scripts
    `library/train_util.py`).

    Both are of a serialisation that carries the `ss_*` metadata only: SHA-256 of everything behind
    its header, and the first 8 hex digits of the SHA-256 of 64 KiB at offset 1 MiB. release: see
    `Encoded.release`.
    """
    passed = _Passed(release)
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header, order = serialized_header(ordered(tensors), kept)
    digest = hashlib.sha256()
    window = bytearray()
    start, stop, position = 0x100000, 0x110000, len(header)
    window += header[start:stop]
    for name in order:
        tensor = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(tensor.data)
        low, high = max(start - position, 0), min(stop - position, tensor.nbytes)
        if low < high:
            window += tensor[low:high].tobytes()
        position += tensor.nbytes
        passed.add(tensor.nbytes)
    return {
        "sshs_model_hash": digest.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(bytes(window)).hexdigest()[:8],
    }
