"""Plain weights as a packed format would round them: what an adapter saw that was trained on the
packed model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.quantizers.packed import Format

KEPT = 3  # whole weights that are remembered: they are read tile by tile


class RoundedTensor(LazyTensor):
    """Rows of decode(encode(W)), fp32; `native` is the dtype W is stored in."""

    __slots__ = ("native", "rounding", "source", "start", "stop")

    def __init__(
        self, source: LazyTensor, rounding: Rounder, start: int = 0, stop: int | None = None
    ) -> None:
        self.source, self.rounding, self.native = source, rounding, source.dtype
        self.start, self.stop = start, source.shape[0] if stop is None else stop
        shape = (self.stop - start, *source.shape[1:])
        super().__init__(source.file, source.name, "F32", shape, source.begin, source.end)

    def file_range(self) -> None:
        return None

    def flattened(self, lead: int) -> LazyTensor:
        return self if lead == 1 else super().flattened(lead)

    def rows(self, start: int, stop: int) -> RoundedTensor:
        self._row_bytes(start, stop)
        return RoundedTensor(self.source, self.rounding, self.start + start, self.start + stop)

    def torch(self) -> Tensor:
        return self.rounding.weight(self.source)[self.start : self.stop]

    def numpy(self) -> np.ndarray:
        return self.torch().numpy()

    def read(self) -> memoryview:
        return as_bytes(self.torch())


class Rounder:
    """decode(encode(W)) of one format, the last few weights remembered."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def weight(self, source: LazyTensor) -> Tensor:
        """The whole weight, fp32. UnsupportedError for a shape the format does not have."""
        key = f"{source.path}:{source.name}"
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        weight = self.format.rounded(source.name, source.torch().float(), source.dtype)
        with self._lock:
            self._known[key] = weight
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return weight


def rounded(checkpoint: Checkpoint, names: Collection[str], format: Format) -> Checkpoint:
    """The checkpoint with the weights of some names as `format` would round them."""
    rounder = Rounder(format)
    return checkpoint.with_tensors(
        {
            name: RoundedTensor(tensor, rounder) if name in names else tensor
            for name, tensor in checkpoint.items()
        }
    )
