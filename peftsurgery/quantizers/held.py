"""Packed weights of a live model: the tensors of its modules in the place of a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import FROM_TORCH_NAMES
from peftsurgery.checkpoint.tensors import FileMap
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.errors import UnsupportedError
from peftsurgery.quantizers.packed import Packed
from peftsurgery.quantizers.registry import PackedCheckpoint, logical


class _Memory(FileMap):
    """No file: the place of one in tensors that lie in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path


class HeldTensor(LazyTensor):
    """A tensor in memory, as a tensor of a checkpoint; `torch()` shares its memory."""

    __slots__ = ("held",)

    def __init__(self, file: FileMap, name: str, held: Tensor) -> None:
        dtype = FROM_TORCH_NAMES[str(held.dtype).removeprefix("torch.")]
        super().__init__(file, name, dtype, tuple(held.shape), 0, held.nbytes)
        self.held = held.detach().contiguous()

    def file_range(self) -> None:
        return None

    def read(self) -> memoryview:
        return as_bytes(self.held)

    def torch(self) -> Tensor:
        return self.held

    def numpy(self) -> np.ndarray:
        return (self.held.float() if self.held.dtype == torch.bfloat16 else self.held).numpy()

    def rows(self, start: int, stop: int) -> HeldTensor:
        self._row_bytes(start, stop)
        return HeldTensor(self.file, self.name, self.held[start:stop])

    def flattened(self, lead: int) -> HeldTensor:
        return HeldTensor(self.file, self.name, self.held.flatten(0, lead - 1))


def held(where: str, tensors: Mapping[str, Tensor]) -> Packed:
    """The one packed weight that these tensors on the CPU make up, named as in a checkpoint; its
    parts share their memory.

    where: what errors call it. UnsupportedError when they make up none, or several.
    """
    place = _Memory(Path(where))
    entries = {name: HeldTensor(place, name, tensor) for name, tensor in tensors.items()}
    checkpoint = Checkpoint(Path(where), entries, source=where, kind="file", metadata={}, files=())
    view = logical(checkpoint)
    found = view.packed.values() if isinstance(view, PackedCheckpoint) else ()
    if len(found) != 1:
        raise UnsupportedError(f"{where}: {', '.join(tensors)} are not one packed weight.")
    return next(iter(found))
