"""Writing an undo file; `undo` says what is in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from peftsurgery import __version__
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.checkpoint import Checkpoint, LazyTensor, save, sha256_of
from peftsurgery.checkpoint.pickles import is_pickle_name
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.errors import UnsupportedError
from peftsurgery.operations.apply import Settings
from peftsurgery.operations.plan import MergePlan
from peftsurgery.operations.undo import (
    FORMAT,
    SMALL,
    Merge,
    SideFile,
    Undo,
    WeightFile,
    below,
    digest_of,
    is_folder,
    root_of,
)


def identity(plan: MergePlan, settings: Settings) -> str:
    """SHA-256 of all that decides the result of a merge, besides the base: modules, places,
    strengths and rounding.
    """
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


def check_undoable(base: Checkpoint) -> None:
    """Raise UnsupportedError for a base that no undo file can restore."""
    if base.kind == "gguf":
        raise UnsupportedError(
            f"{base.source}: undo files are made for safetensors bases; keep the GGUF file, "
            "which a merge leaves as it is, and leave --undo out."
        )
    if any(is_pickle_name(file.name) for file in base.files):
        raise UnsupportedError(
            f"{base.source}: a pickle cannot be restored bit for bit from safetensors; convert "
            "the base first, or leave "
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
    """Write the undo file of a merge of `base`: complete and on disk before it appears under
    `path`.

    changed: names of the tensors the merge changes. merged: the finished result, a file or a folder
    laid out like the base; None for a merge in place, whose digests are added at its end
    (`record_merged`).
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
        files.append(WeightFile(below(file, root), file.stat().st_size, whole, rest))
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
    weights = {below(file, root) for file in base.files}
    written = {below(file, merged) for file in merged.rglob("*") if file.is_file()} - weights
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
        present = {below(file, root) for file in root.rglob("*") if file.is_file()}
        left_out = sorted(present - written - weights)
    return sides, left_out


def record_merged(path: Path, undo: Undo, digests: Sequence[str]) -> None:
    """Write the digests of the merged files into a finished journal, on disk before this
    returns.
    """
    span = undo.checkpoint["merged"].file_range()
    assert span is not None
    with open(path, "r+b", buffering=0) as file:
        file.seek(span[0])
        file.write(bytes.fromhex("".join(digests)))
        os.fsync(file.fileno())


def _head_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))
