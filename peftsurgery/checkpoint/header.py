"""The strict reader of a safetensors header.

A file is `u64 little-endian n`, `n` bytes of JSON, then the payload. The JSON maps a name to
`{"dtype", "shape", "data_offsets": [begin, end]}` with offsets counted from the start of the
payload, and `"__metadata__"` to an object of strings. Source: github.com/huggingface/safetensors,
README "Format".

Everything the safetensors library refuses is refused here too, and beyond it: repeated names,
names that are paths or hold control characters, absurd dimensions behind a zero, unknown fields,
and sizes over `Limits`.
"""

from __future__ import annotations

import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from peftsurgery.checkpoint import strict_json
from peftsurgery.checkpoint.dtypes import BITS
from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.errors import UnsafeInputError, UsageError

FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_ORDINARY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # the quick answer
_NEGATIVE = re.compile(rb"[\[,:]\s*-")
_DRIVE = re.compile(r"[A-Za-z]:")
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Limits:
    """What is read from an untrusted file before it is refused (UnsafeInputError)."""

    header_bytes: int = 100_000_000  # the safetensors library's own limit
    tensors: int = 200_000
    name_chars: int = 512
    dims: int = 8
    dim: int = 2**31  # of one dimension; also of the product of the others beside a zero
    metadata_bytes: int = 8_000_000
    json_bytes: int = 64_000_000  # indexes and configs
    pickle_bytes: int = 64_000_000  # data.pkl, without the storages
    pickle_ops: int = 4_000_000
    pickle_depth: int = 256
    alias_ratio: int = 64  # bytes of all tensors of a pickle over bytes of its storages


DEFAULT_LIMITS = Limits()


class TensorInfo(NamedTuple):
    """One entry of a header; `begin` and `end` count from the start of the payload."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorInfo]  # in file order of the JSON
    metadata: dict[str, str]
    data_start: int  # where the payload begins in the file
    file_size: int


def name_problem(name: str, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """Why `name` cannot be the name of a tensor, or None: 1 to 512 characters, printable, not a
    path.
    """
    if len(name) > limits.name_chars:
        return f"the name has {len(name)} characters, at most {limits.name_chars} are accepted"
    if _ORDINARY.fullmatch(name):
        return None
    if not name:
        return "the name is empty"
    if not (name.isascii() and name.isprintable()):
        for char in name:
            if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _BIDI:
                return f"the name holds the control character U+{ord(char):04X}"
    if name[0] == "/" or "\\" in name or _DRIVE.match(name) or ".." in name.split("/"):
        return "the name is a file path (a leading '/', '..', a backslash or a drive letter)"
    return None


def parse_header(
    raw: bytes, payload: int, *, where: str, limits: Limits = DEFAULT_LIMITS
) -> Header:
    """The header whose JSON is `raw`, of a file with `payload` bytes behind it; `where` opens
    every message.

    Raises UnsafeInputError, naming the tensor, for each rule broken; UsageError when the file
    merely ends early.
    """

    def refuse(key: str | None, what: str) -> NoReturn:
        raise UnsafeInputError(f"{where}: {what if key is None else f'{shown(key)}: {what}'}")

    if not raw.startswith(b"{"):
        refuse(None, "the header does not start with '{'")
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > limits.tensors * (len(FIELDS) + limits.dims + 5) + limits.metadata_bytes:
        refuse(
            None, f"the header holds {values} values, far more than {limits.tensors} tensors need"
        )
    parse_int = _unsigned if _NEGATIVE.search(raw) else int  # the hook is slow, and rarely needed
    table = strict_json.parse(raw, where=where, parse_int=parse_int, constants=False)
    if not isinstance(table, dict):
        refuse(None, "the header is not a JSON object")
    metadata = _metadata(table.pop("__metadata__", {}), refuse=refuse, limits=limits)
    if len(table) > limits.tensors:
        refuse(
            None, f"{len(table)} tensors, at most {limits.tensors} are accepted (Limits.tensors)"
        )

    tensors: dict[str, TensorInfo] = {}
    for name, entry in table.items():
        problem = name_problem(name, limits)
        if problem:
            refuse(name, problem)
        if not isinstance(entry, dict) or entry.keys() != FIELDS:
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            refuse(
                name, f"expected the fields dtype, shape, data_offsets; found {str(found)[:200]}"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            found = shown(dtype) if isinstance(dtype, str) else type(dtype).__name__
            refuse(name, f"unknown dtype {found}; known are {', '.join(BITS)}")
        problem = shape_problem(shape, limits)
        if problem:
            refuse(name, problem)
        if not (
            isinstance(offsets, list)
            and len(offsets) == 2
            and type(offsets[0]) is int
            and type(offsets[1]) is int
            and 0 <= offsets[0] <= offsets[1]
        ):
            refuse(name, "data_offsets are not two whole numbers, from 0 and ascending")
        begin, end = offsets
        bits = math.prod(shape) * BITS[dtype]
        if bits != 8 * (end - begin):
            refuse(
                name,
                f"shape {shape} of {dtype} takes {bits / 8:g} bytes, data_offsets hold "
                f"{str(end - begin)[:40]}",
            )
        tensors[name] = TensorInfo(dtype, tuple(shape), begin, end)

    _check_cover(tensors, payload, where=where, refuse=refuse)
    data_start = 8 + len(raw)
    return Header(tensors, metadata, data_start, data_start + payload)


def shape_problem(shape: object, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """Why `shape` (a list or tuple read from a file) is refused, or None."""
    if not isinstance(shape, list | tuple):
        return f"the shape is {type(shape).__name__}, a list was expected"
    if len(shape) > limits.dims:
        return f"{len(shape)} dimensions, at most {limits.dims} are accepted (Limits.dims)"
    for dim in shape:
        if type(dim) is not int or dim < 0:
            return "the shape holds something else than whole numbers from 0"
        if dim > limits.dim:
            return f"a dimension of {str(dim)[:40]}, at most {limits.dim} is accepted (Limits.dim)"
    if 0 in shape and math.prod(dim or 1 for dim in shape) > limits.dim:
        return f"the empty shape {list(shape)} hides dimensions whose product is over {limits.dim}"
    return None


def _unsigned(text: str) -> int:
    """An integer of the header; "-0", which the format's own reader refuses, becomes -1."""
    return min(int(text), -1) if text[0] == "-" else int(text)


def _metadata(
    value: object, *, refuse: Callable[[str, str], NoReturn], limits: Limits
) -> dict[str, str]:
    if not isinstance(value, dict):
        refuse("__metadata__", f"an object was expected, found {type(value).__name__}")
    size = 0
    for key, text in value.items():
        if not isinstance(text, str):
            refuse("__metadata__", f"{shown(key)} is {type(text).__name__}, text was expected")
        try:
            size += len(key.encode()) + len(text.encode())
        except UnicodeEncodeError:
            refuse("__metadata__", f"{shown(key)} holds half of a surrogate pair")
    if size > limits.metadata_bytes:
        refuse(
            "__metadata__",
            f"{size} bytes, at most {limits.metadata_bytes} are accepted (Limits.metadata_bytes)",
        )
    return value


def _check_cover(
    tensors: dict[str, TensorInfo],
    payload: int,
    *,
    where: str,
    refuse: Callable[[str | None, str], NoReturn],
) -> None:
    """Sorted by offset, the tensors must follow each other without overlap or hole, to the last
    byte.
    """
    position, last = 0, None
    for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if info.begin < position:
            refuse(name, f"overlaps {shown(str(last))}: begins at {info.begin}, before {position}")
        if info.begin > position:
            before = "the start of the payload" if last is None else shown(last)
            refuse(name, f"a hole of {info.begin - position} bytes lies between it and {before}")
        position, last = info.end, name
    if position > payload:
        raise UsageError(
            f"{where}: truncated, {position - payload} of {position} payload bytes are missing. "
            "Download or copy the file again."
        )
    if position < payload:
        refuse(None, f"{payload - position} bytes trail behind the last tensor")


_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive, perhaps a torch pickle: name it .pt and pass --allow-pickle"),
    (b"\x80\x02\x8a\n", "a torch pickle of before version 1.6: load and save it with torch >= 1.6"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
    (b"GGUF", "a GGUF file"),
    (b"<!", "a web page: download the file itself"),
    (b"<html", "a web page: download the file itself"),
    (b"<?xml", "XML, perhaps an error answer: download the file itself"),
)


def describe_start(start: bytes) -> str:
    """What a file beginning with `start` is, for messages; "" when not recognised."""
    return next(
        (f" It looks like {what}." for sign, what in _SIGNATURES if start.startswith(sign)), ""
    )


def read_header(file: BinaryIO, *, where: str, limits: Limits = DEFAULT_LIMITS) -> Header:
    """The header of the open file; see `parse_header`. Raises UsageError for what is not
    safetensors at all.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(32)
    length = int.from_bytes(start[:8], "little")
    brace = start[8:9] == b"{"
    if len(start) < 8 or (not brace and (length > size - 8 or describe_start(start))):
        raise UsageError(
            f"{where}: not a safetensors file (8 bytes of header length, then '{{', were expected)."
            + describe_start(start)
        )
    if length > limits.header_bytes:
        raise UnsafeInputError(
            f"{where}: a header of {length} bytes, at most {limits.header_bytes} are accepted "
            "(Limits.header_bytes)"
        )
    if length > size - 8:
        raise UsageError(
            f"{where}: truncated inside the header ({size - 8} of {length} bytes). Download or "
            "copy the file again."
        )
    file.seek(8)
    raw = file.read(length)
    return parse_header(raw, size - 8 - length, where=where, limits=limits)


def open_regular(path: Path) -> BinaryIO:
    """`path` opened; UsageError when missing, unreadable, a folder, a device or a pipe."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{path}: not a regular file")
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
