"""Torch files (.pt .bin .ckpt .pth): the zip container checked, the pickle read by `unpickling`,
nothing run.

A torch file since 1.6 is an uncompressed zip: `<root>/data.pkl`, the bytes of storage k in
`<root>/data/<k>`, and `byteorder`, `version` and a few more small members. Source: torch
`torch/serialization.py`, `caffe2/serialize/inline_container.h`.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO, NoReturn

from peftsurgery.checkpoint.dtypes import BITS
from peftsurgery.checkpoint.header import (
    DEFAULT_LIMITS,
    Limits,
    describe_start,
    name_problem,
    open_regular,
)
from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.checkpoint.tensors import FileMap, LazyTensor, StridedTensor
from peftsurgery.checkpoint.unpickling import TensorRef, interpret
from peftsurgery.errors import UnsafeInputError, UsageError

SUFFIXES = (".pt", ".bin", ".ckpt", ".pth")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_OTHER_MEMBERS = frozenset(
    {"byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id"}
)
_REMEDY = (
    "Where it was made: `torch.save(torch.load(file, weights_only=True), file)` with torch >= "
    "1.6, or save it as safetensors."
)

Span = tuple[int, int]  # bytes begin:end of the file


def is_pickle_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def refuse_pickle(path: Path | str) -> NoReturn:
    raise UnsafeInputError(
        f"{path}: a pickle, which can run code when loaded. Use the .safetensors file instead, or "
        "pass --allow-pickle (allow_pickle=True): it is then read by an interpreter that runs "
        "nothing."
    )


def open_pickle(
    path: Path, *, limits: Limits = DEFAULT_LIMITS
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a torch file, lazy over it, and the scalars beside its "state_dict" as
    metadata.

    Raises UnsafeInputError, naming it, for anything but a zip of tensors in a dictionary, at most
    inside {"state_dict": ...}; UsageError for what is no torch file at all.
    """
    with open_regular(path) as file:
        spans = _members(file, path, limits)
        data = _read_span(file, spans["data.pkl"], path, "data.pkl", limits.pickle_bytes)
        if "byteorder" in spans:
            order = _read_span(file, spans["byteorder"], path, "byteorder", 16)
            if order != b"little":
                _refuse(path, f"byteorder {shown(order.decode('latin-1'))}, little was expected")
        opened = FileMap(path, os.fstat(file.fileno()))
    value = interpret(data, where=f"{path}: data.pkl", limits=limits)
    state, metadata = _unwrap(value, path, limits)
    if len(state) > limits.tensors:
        _refuse(
            path, f"{len(state)} tensors, at most {limits.tensors} are accepted (Limits.tensors)"
        )
    tensors: dict[str, LazyTensor] = {}
    for name, ref in state.items():
        problem = name_problem(name, limits)
        if problem:
            _refuse(path, f"{shown(name)}: {problem}")
        if not isinstance(ref, TensorRef):
            _refuse(path, f"{shown(name)} is {type(ref).__name__}, only tensors are accepted")
        tensors[name] = _place(opened, name, ref, spans)
    total = sum(tensor.nbytes for tensor in tensors.values())
    stored = sum(end - begin for begin, end in spans.values())
    if total > limits.alias_ratio * stored:
        _refuse(path, f"{total} bytes of tensors share {stored} bytes (Limits.alias_ratio)")
    return tensors, metadata


def _refuse(path: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    raise UnsafeInputError(f"{path}: {what}") from cause


def _members(file: BinaryIO, path: Path, limits: Limits) -> dict[str, Span]:
    """Where each member lies, by its name below the one root folder; every inconsistency of the zip
    is refused.
    """
    file.seek(0)
    start = file.read(32)
    if start[:1] == b"\x80":
        _refuse(
            path,
            f"a pickle without the zip container (torch before 1.6, or pickle.dump). {_REMEDY}",
        )
    if not start.startswith(b"PK\x03\x04"):
        raise UsageError(f"{path}: not a torch file (a zip was expected).{describe_start(start)}")
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OSError) as error:
        raise UsageError(f"{path}: a damaged or truncated zip: {error}") from error
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    names = [info.filename for info in infos]
    if any(name.split("/", 1)[-1].startswith("code/") or "constants.pkl" in name for name in names):
        _refuse(
            path, "a TorchScript archive, which is a program; save the model's state dict instead"
        )
    if len(infos) > limits.tensors + 16:
        _refuse(
            path, f"the zip holds {len(infos)} members, more than {limits.tensors} tensors need"
        )
    if archive.comment:
        _refuse(path, "the zip carries a comment, torch writes none")
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        _refuse(path, f"the zip holds {shown(twice)} twice")
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or "data.pkl" not in {name.partition("/")[2] for name in names}:
        _refuse(
            path, f"one folder with one data.pkl was expected, found {shown(', '.join(names[:8]))}"
        )
    spans: dict[str, Span] = {}
    position = 0
    for info in infos:
        name = info.filename.partition("/")[2]
        begin = _check_member(file, info, path)
        if not (name == "data.pkl" or name in _OTHER_MEMBERS or _is_storage(name)):
            _refuse(path, f"the zip holds {shown(info.filename)}, which no state dict needs")
        if info.header_offset < position or (position == 0 and info.header_offset != 0):
            _refuse(
                path, f"the zip member {shown(info.filename)} overlaps another or follows a prefix"
            )
        position = begin + info.file_size
        spans[name] = (begin, position)
        if name == "data.pkl" or name in _OTHER_MEMBERS:
            data = _read_span(file, spans[name], path, name, limits.pickle_bytes)
            if zlib.crc32(data) != info.CRC:
                _refuse(path, f"the zip member {shown(info.filename)} does not match its checksum")
    if position > archive.start_dir:
        _refuse(path, f"the zip member {shown(names[-1])} runs into the directory")
    return spans


def _check_member(file: BinaryIO, info: zipfile.ZipInfo, path: Path) -> int:
    """Where the bytes of the member begin; its local header must agree with the directory."""
    name = shown(info.filename)
    if info.flag_bits & 0x2041:
        _refuse(path, f"the zip member {name} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        _refuse(path, f"the zip member {name} is compressed; torch stores members as they are")
    if info.header_offset < 0:
        _refuse(path, f"the zip member {name} lies outside the file")
    file.seek(info.header_offset)
    raw = file.read(_LOCAL_HEADER.size)
    if len(raw) < _LOCAL_HEADER.size:
        _refuse(path, f"the zip member {name} lies outside the file")
    sign, _, flags, method, _, _, _, _, _, name_bytes, extra = _LOCAL_HEADER.unpack(raw)
    local = file.read(name_bytes)
    expected = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
    if (
        sign != b"PK\x03\x04"
        or flags != info.flag_bits
        or method != info.compress_type
        or local != expected
        or info.orig_filename != info.filename
    ):
        _refuse(path, f"the zip member {name} differs between its own header and the directory")
    return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra


def _is_storage(name: str) -> bool:
    folder, _, key = name.partition("/")
    return folder == "data" and key.isascii() and key.isdigit()


def _read_span(file: BinaryIO, span: Span, path: Path, name: str, limit: int) -> bytes:
    if span[1] - span[0] > limit:
        _refuse(path, f"{name} has {span[1] - span[0]} bytes, at most {limit} are accepted")
    file.seek(span[0])
    return file.read(span[1] - span[0])


def _unwrap(value: object, path: Path, limits: Limits) -> tuple[dict[str, object], dict[str, str]]:
    """The innermost state dict, and the scalars that stood beside it."""
    metadata: dict[str, str] = {}
    for _ in range(8):
        if not isinstance(value, dict):
            _refuse(path, f"a dictionary of tensors was expected, found {type(value).__name__}")
        if not isinstance(value.get("state_dict"), dict):
            break
        for key, item in value.items():
            if key == "state_dict":
                continue
            if not (item is None or isinstance(item, str | int | float)):
                _refuse(
                    path,
                    f"{shown(key)} beside the state dict is {type(item).__name__}; only tensors, "
                    "and numbers or text beside them, are accepted. Save the state dict alone.",
                )
            metadata[key] = str(item)
        value = value["state_dict"]
    else:
        _refuse(path, 'more than 8 levels of "state_dict"')
    if sum(len(key) + len(text) for key, text in metadata.items()) > limits.metadata_bytes:
        _refuse(path, "too much text beside the state dict (Limits.metadata_bytes)")
    return value, metadata


def _place(file: FileMap, name: str, ref: TensorRef, spans: dict[str, Span]) -> LazyTensor:
    """The tensor over its storage's bytes, after checking that every element lies inside them."""
    span = spans.get(f"data/{ref.storage.key}")
    if span is None:
        _refuse(file.path, f"{shown(name)}: its storage {shown(ref.storage.key)} is not in the zip")
    size = BITS[ref.dtype] // 8
    declared = ref.storage.numel * (size if ref.storage.dtype else 1)
    if declared != span[1] - span[0]:
        _refuse(
            file.path,
            f"{shown(name)}: a storage of {declared} bytes was promised, the zip holds "
            f"{span[1] - span[0]}",
        )
    count = math.prod(ref.shape)
    elements = declared // size
    last = ref.offset + sum(
        (dim - 1) * stride for dim, stride in zip(ref.shape, ref.strides, strict=True)
    )
    if count and (last >= elements or count > elements):
        _refuse(
            file.path,
            f"{shown(name)}: shape {list(ref.shape)} with strides {list(ref.strides)} from "
            f"{ref.offset} reaches outside its storage of {elements} elements, or repeats some of "
            "them",
        )
    if count == 0:
        return LazyTensor(file, name, ref.dtype, ref.shape, span[0], span[0])
    if _is_contiguous(ref):
        begin = span[0] + ref.offset * size
        return LazyTensor(file, name, ref.dtype, ref.shape, begin, begin + count * size)
    return StridedTensor(
        file,
        name,
        ref.dtype,
        ref.shape,
        storage=span,
        offset=ref.offset,
        strides=ref.strides,
    )


def _is_contiguous(ref: TensorRef) -> bool:
    expected = 1
    for dim, stride in zip(reversed(ref.shape), reversed(ref.strides), strict=True):
        if dim != 1 and stride != expected:
            return False
        expected *= dim
    return True
