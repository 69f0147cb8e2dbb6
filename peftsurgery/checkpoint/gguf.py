"""GGUF files as checkpoints: packed blocks with what they stand for, and slices of stacks."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from peftsurgery.checkpoint.container import Checkpoint
from peftsurgery.checkpoint.ggml import DENSE
from peftsurgery.checkpoint.gguf_header import MAGIC, GGUFHeader, GGUFTensorInfo, read_gguf
from peftsurgery.checkpoint.header import DEFAULT_LIMITS, Limits, open_regular, shape_problem
from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.checkpoint.tensors import FileMap, LazyTensor
from peftsurgery.errors import UnsafeInputError, UsageError

SLICE = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\]", re.DOTALL)


class GGUFTensor(LazyTensor):
    """Packed blocks: U8 of shape (rows …, bytes of a row), with what they stand for.

    `weight_shape` is that of the weight, (rows …, columns); ComfyUI-GGUF lays some weights out in
    rows of 256 and keeps their own shape beside, then it is that one.
    """

    __slots__ = ("ggml_type", "weight_shape")

    def __init__(
        self,
        file: FileMap,
        name: str,
        shape: tuple[int, ...],
        begin: int,
        end: int,
        *,
        ggml_type: str,
        weight_shape: tuple[int, ...],
    ) -> None:
        super().__init__(file, name, "U8", shape, begin, end)
        self.ggml_type = ggml_type
        self.weight_shape = weight_shape


class GGUFCheckpoint(Checkpoint):
    """A GGUF file: packed weights are `GGUFTensor`s, the others plain."""

    header: GGUFHeader

    @property
    def architecture(self) -> str:
        """`general.architecture`: "llama", "qwen2", "flux" …; "" when it is not given."""
        found = self.header.values.get("general.architecture", "")
        return found if isinstance(found, str) else ""

    def __getitem__(self, name: str) -> LazyTensor:
        """A tensor, or with `NAME[3]` a slice of a stack."""
        if name in self._tensors or not (match := SLICE.fullmatch(name)):
            return self._tensors[name]
        return slice_of(self._tensors[match["name"]], int(match["index"]))

    def with_tensors(self, tensors: Mapping[str, LazyTensor]) -> GGUFCheckpoint:
        found = GGUFCheckpoint(
            self.path,
            tensors,
            source=self.source,
            kind=self.kind,
            metadata=self.metadata,
            files=self.files,
            config=self.config,
        )
        found.header = self.header
        return found


def slice_of(tensor: LazyTensor, index: int) -> LazyTensor:
    """Slice `index` of the first dimension, as a tensor `NAME[index]` over the same bytes.
    KeyError when there is none.
    """
    name = f"{tensor.name}[{index}]"
    if len(tensor.shape) < 2 or index >= tensor.shape[0]:
        raise KeyError(name)
    step = tensor.nbytes // tensor.shape[0]
    shape, begin = tuple(tensor.shape[1:]), tensor.begin + index * step
    if not isinstance(tensor, GGUFTensor):
        return LazyTensor(tensor.file, name, tensor.dtype, shape, begin, begin + step)
    kind, weight_shape = tensor.ggml_type, tensor.weight_shape[1:]
    return GGUFTensor(
        tensor.file, name, shape, begin, begin + step, ggml_type=kind, weight_shape=weight_shape
    )


def is_gguf(path: Path) -> bool:
    """Whether a regular file is one, by its name or by its first bytes; nothing else is opened."""
    if path.name.lower().endswith(".gguf"):
        return True
    try:
        with open_regular(path) as file:
            return file.read(4) == MAGIC
    except UsageError:  # said by whoever opens it next
        return False


def open_gguf(path: Path, *, source: str, limits: Limits = DEFAULT_LIMITS) -> GGUFCheckpoint:
    """The file as a Checkpoint of kind "gguf"; `metadata` holds the scalar keys but those of the
    tokenizer. Raises UsageError, UnsafeInputError and UnsupportedError as `read_gguf` does.
    """
    with open_regular(path) as file:
        opened = FileMap(path, os.fstat(file.fileno()))
    header = read_gguf(opened, limits=limits)
    tensors = {name: _lazy(opened, name, info, header) for name, info in header.tensors.items()}
    metadata = {
        key: str(value)
        for key, value in header.values.items()
        if not isinstance(value, tuple) and not key.startswith("tokenizer.")
    }
    found = GGUFCheckpoint(
        path, tensors, source=source, kind="gguf", metadata=metadata, files=(path,)
    )
    found.header = header
    return found


def _lazy(file: FileMap, name: str, info: GGUFTensorInfo, header: GGUFHeader) -> LazyTensor:
    shape = _original_shape(file, name, info.shape, header)
    if info.type.name in DENSE:
        return LazyTensor(file, name, info.type.name, shape, info.begin, info.end)
    row = info.shape[-1] // info.type.block * info.type.size
    return GGUFTensor(
        file,
        name,
        (*info.shape[:-1], row),
        info.begin,
        info.end,
        ggml_type=info.type.name,
        weight_shape=shape,
    )


def _original_shape(
    file: FileMap, name: str, shape: tuple[int, ...], header: GGUFHeader
) -> tuple[int, ...]:
    """`comfy.gguf.orig_shape.NAME` where there is one (ComfyUI-GGUF, tools/convert.py)."""
    original = header.values.get(f"comfy.gguf.orig_shape.{name}")
    if original is None:
        return shape
    problem = shape_problem(original)
    if problem or not isinstance(original, tuple) or math.prod(original) != math.prod(shape):
        raise UnsafeInputError(
            f"{file.path}: {shown(name)}: its original shape {str(original)[:80]} is not one of "
            f"the {math.prod(shape)} values it holds"
        )
    return tuple(int(dim) for dim in original)
