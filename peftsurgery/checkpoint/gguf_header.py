"""The strict reader of the header of GGUF files (llama.cpp, stable-diffusion.cpp, ComfyUI-GGUF).

Little-endian, version 2 or 3: `"GGUF"`, u32 version, u64 tensor count, u64 key count; the keys,
each a string (u64 length, bytes), a u32 type and a value; the tensors, each a string, u32
dimensions, as many u64 sizes with the innermost first, u32 element type and u64 offset; padding to
the alignment (`general.alignment`, 32 by default); the data, every tensor from a multiple of the
alignment. Source: ggml, docs/gguf.md.

Refused beyond what llama.cpp refuses: overlapping tensors, holes larger than the padding, bytes
behind the last tensor, repeated names, names with control characters, nested arrays, and sizes over
`Limits`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from peftsurgery.checkpoint.ggml import TYPES, GGMLType
from peftsurgery.checkpoint.header import DEFAULT_LIMITS, Limits, name_problem, shape_problem
from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.checkpoint.tensors import FileMap
from peftsurgery.errors import UnsafeInputError, UnsupportedError, UsageError

MAGIC = b"GGUF"
ALIGNMENT = 32
DIMS = 4
KEYS = 65_536  # keys of a file; llama.cpp writes some dozens
LARGEST_ALIGNMENT = 1 << 20
SHORT = 4096  # bytes of a string, or numbers of an array, that are kept

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _STRING, _ARRAY, _UINT32 = 7, 8, 9, 4

Value = int | float | bool | str | tuple[int | float, ...]


class GGUFTensorInfo(NamedTuple):
    """One tensor: `shape` as a row-major array has it, the bytes `begin:end` of the file."""

    type: GGMLType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    version: int
    values: Mapping[str, Value]  # scalars, short strings and short arrays of numbers
    skipped: tuple[str, ...]  # the other keys: tokens, merges, templates
    tensors: dict[str, GGUFTensorInfo]
    alignment: int
    data_start: int
    file_size: int


def read_gguf(file: FileMap, *, limits: Limits = DEFAULT_LIMITS) -> GGUFHeader:
    """The header of a GGUF file.

    Raises UsageError for what is no GGUF file or ends early, UnsupportedError for other versions,
    big-endian files and parts of a split file, UnsafeInputError for every rule broken.
    """
    return _Reader(file, limits).read()


class _Reader:
    def __init__(self, file: FileMap, limits: Limits) -> None:
        self.file = file
        self.limits = limits
        self.where = str(file.path)
        self.position = 0

    def refuse(self, key: str | None, what: str) -> NoReturn:
        key = "" if key is None else f"{shown(key)}: "
        raise UnsafeInputError(f"{self.where}: {key}{what}")

    def read(self) -> GGUFHeader:
        if self.file.size < 24 or bytes(self.file.view[:4]) != MAGIC:
            raise UsageError(f"{self.where}: not a GGUF file (it does not begin with 'GGUF').")
        self.position = 4
        version = self.number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian" if swapped in (2, 3) else f"of version {version}"
            raise UnsupportedError(
                f"{self.where}: a GGUF file {what}; little-endian ones of version 2 and 3 are "
                "read. Convert the model again with a current llama.cpp."
            )
        tensors, keys = self.number("Q"), self.number("Q")
        if tensors > self.limits.tensors:
            self.refuse(None, f"{tensors} tensors, at most {self.limits.tensors} are accepted")
        if keys > KEYS:
            self.refuse(None, f"{keys} keys, at most {KEYS} are accepted")
        values, skipped = self.keys(keys)
        if (parts := values.get("split.count", 0)) not in (0, 1):
            raise UnsupportedError(
                f"{self.where}: one of {parts} files of a split GGUF. Join them first: "
                "llama-gguf-split --merge FIRST OUTPUT."
            )
        alignment = self.alignment(values)
        entries = self.infos(tensors, alignment)
        data_start = -(-self.position // alignment) * alignment
        if tensors and data_start > self.file.size:
            self.truncated(data_start)
        found = {
            name: info._replace(begin=info.begin + data_start, end=info.end + data_start)
            for name, info in entries.items()
        }
        self.check_cover(found, data_start, alignment)
        return GGUFHeader(version, values, skipped, found, alignment, data_start, self.file.size)

    # pieces ---------------------------------------------------------------------------------------

    def take(self, count: int) -> int:
        """The place of the next `count` bytes, which are passed over."""
        start = self.position
        if start + count > self.limits.header_bytes:
            self.refuse(
                None,
                f"a header of more than {self.limits.header_bytes} bytes (Limits.header_bytes)",
            )
        if start + count > self.file.size:
            self.truncated(start + count)
        self.position = start + count
        return start

    def truncated(self, needed: int) -> NoReturn:
        raise UsageError(
            f"{self.where}: truncated, at least {needed} bytes were expected, it has "
            f"{self.file.size}. Download or copy the file again."
        )

    def number(self, code: str) -> int:
        return self.scalar(code)  # pyright: ignore[reportReturnType]

    def scalar(self, code: str) -> int | float:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.file.view, self.take(size))[0]

    def string(self, longest: int) -> bytes | None:
        """The bytes of a string; None, and passed over, when it is longer than `longest`."""
        size = self.number("Q")
        start = self.take(size)
        return bytes(self.file.view[start : start + size]) if size <= longest else None

    def name(self, what: str) -> str:
        raw = self.string(4 * self.limits.name_chars)
        if raw is None:
            self.refuse(None, f"the name of a {what} has more than {self.limits.name_chars} bytes")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            self.refuse(ascii(raw[:60]), f"the name of a {what} is not UTF-8")
        problem = name_problem(text, self.limits)
        if problem:
            self.refuse(text, problem)
        return text

    # keys -----------------------------------------------------------------------------------------

    def keys(self, count: int) -> tuple[dict[str, Value], tuple[str, ...]]:
        values: dict[str, Value] = {}
        skipped: dict[str, None] = {}
        for _ in range(count):
            key = self.name("key")
            if key in values or key in skipped:
                self.refuse(key, "the key occurs twice")
            value = self.value(key)
            if value is None:
                skipped[key] = None
            else:
                values[key] = value
        return values, tuple(skipped)

    def value(self, key: str) -> Value | None:
        kind = self.number("I")
        if kind == _STRING:
            raw = self.string(SHORT)
            try:
                return None if raw is None else raw.decode()
            except UnicodeDecodeError:
                return None
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            self.refuse(key, f"a value of type {kind}, which GGUF does not have")
        value = self.scalar(_SCALARS[kind])
        if kind != _BOOL:
            return value
        if value not in (0, 1):
            self.refuse(key, f"a truth value of {value}")
        return bool(value)

    def array(self, key: str) -> tuple[int | float, ...] | None:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            if count * 8 > self.file.size - self.position:
                self.refuse(key, f"an array of {count} strings, more than the file can hold")
            for _ in range(count):
                self.take(self.number("Q"))
            return None
        if kind not in _SCALARS:
            what = "an array of arrays" if kind == _ARRAY else f"an array of type {kind}"
            self.refuse(key, f"{what}; numbers, truth values or strings were expected")
        size = struct.calcsize("<" + _SCALARS[kind])
        start = self.take(count * size)
        if count > SHORT:
            return None
        return struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.file.view, start)

    def alignment(self, values: Mapping[str, Value]) -> int:
        found = values.get("general.alignment", ALIGNMENT)
        good = type(found) is int and 0 < found <= LARGEST_ALIGNMENT and not found & (found - 1)
        if not good:
            self.refuse("general.alignment", f"{str(found)[:40]} is not a power of two up to 2^20")
        return found  # pyright: ignore[reportReturnType]

    # tensors --------------------------------------------------------------------------------------

    def infos(self, count: int, alignment: int) -> dict[str, GGUFTensorInfo]:
        """The tensors, places counted from the start of the data."""
        found: dict[str, GGUFTensorInfo] = {}
        for _ in range(count):
            name = self.name("tensor")
            if name in found:
                self.refuse(name, "two tensors have this name")
            dims = self.number("I")
            if dims > DIMS:
                self.refuse(name, f"{dims} dimensions, at most {DIMS} are accepted")
            shape = tuple(self.number("Q") for _ in range(dims))[::-1]
            problem = shape_problem(shape, self.limits)
            if problem:
                self.refuse(name, problem)
            code, begin = self.number("I"), self.number("Q")
            if code not in TYPES:
                self.refuse(name, f"elements of type {code}, which ggml does not have")
            kind = TYPES[code]
            if kind.block > 1 and (not shape or shape[-1] % kind.block):
                self.refuse(
                    name,
                    f"rows of {shape[-1] if shape else 1} elements, {kind.name} needs a multiple "
                    f"of {kind.block}",
                )
            if begin % alignment:
                self.refuse(name, f"begins at {begin}, not a multiple of {alignment}")
            size = math.prod(shape) // kind.block * kind.size
            found[name] = GGUFTensorInfo(kind, shape, begin, begin + size)
        return found

    def check_cover(
        self, tensors: Mapping[str, GGUFTensorInfo], data_start: int, alignment: int
    ) -> None:
        """Tensors follow each other with nothing but the padding between them."""
        position, last = data_start, "the start of the data"
        for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if info.begin < position:
                self.refuse(name, f"overlaps {last}: begins at {info.begin}, before {position}")
            if info.begin - position >= alignment:
                self.refuse(name, f"{info.begin - position} bytes lie between it and {last}")
            position, last = info.end, shown(name)
        if position > self.file.size:
            self.truncated(position)
        if self.file.size - position >= max(alignment, 1) and tensors:
            self.refuse(None, f"{self.file.size - position} bytes trail behind the last tensor")
