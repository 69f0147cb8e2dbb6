"""The tensors of a merged checkpoint, asked for by the names of its base, whatever vocabulary or
sharding it has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.codec import BaseWeights
from peftsurgery.codec.bases import Stored
from peftsurgery.codec.experts import HALVES
from peftsurgery.errors import UsageError
from peftsurgery.operations.apply import plain_dtype
from peftsurgery.operations.packed_sides import format_of, same_stored
from peftsurgery.quantizers import Packed, PackedTensor, is_marker

_STACK = re.compile(r"(?P<experts>.+\.experts)\.(?P<leaf>gate_up_proj|down_proj)")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Found:
    """A tensor of the merged checkpoint in the base's orientation: stored so, or put together
    from its home parts.
    """

    dtype: str
    shape: tuple[int, ...]
    stored: LazyTensor | None
    whole: Tensor | None = None
    unpacked: bool = False  # put together from packed parts, of whose steps nothing is known

    @property
    def packed(self) -> Packed | None:
        """The packed weight that is stored so; None for plain numbers, in GGUF files too."""
        if self.stored is None or format_of(self.stored) is None:
            return None
        assert isinstance(self.stored, PackedTensor)
        return self.stored.packed

    def reshapes(self, shape: tuple[int, ...]) -> bool:
        """Whether it is the same weight up to dimensions of one (a linear layer as a 1x1
        convolution).
        """
        return [n for n in self.shape if n != 1] == [n for n in shape if n != 1]

    def rows(self, start: int, stop: int, count: int) -> Tensor:
        """Rows [start, stop) of `count`, (rows, columns), in the stored number type."""
        if self.whole is not None or self.stored is None or not self.shape:
            return self.tensor().reshape(count, -1)[start:stop]
        lead = 1
        while math.prod(self.shape[:lead]) != count:
            lead += 1
        return self.stored.flattened(lead).rows(start, stop).torch().reshape(stop - start, -1)

    def tensor(self) -> Tensor:
        """All of it."""
        if self.whole is not None:
            return self.whole
        assert self.stored is not None
        return self.stored.torch()

    def holds(self, base: LazyTensor) -> bool:
        """Whether it is the base's tensor, rounded to nearest where the number type differs; NaN
        equals NaN. A packed one by the bytes of its parts, or by what they stand for.
        """
        if not self.reshapes(tuple(base.shape)):
            return False
        if isinstance(self.stored, PackedTensor):
            if same_stored(self.stored, base):
                return True
        elif self.stored is not None and self.dtype == base.dtype:
            first, second = (np.frombuffer(t.read(), np.uint8) for t in (self.stored, base))
            return bool(np.array_equal(first, second))
        if (self.dtype in FLOATS) != (base.dtype in FLOATS):
            return False
        expected = base.torch()
        if self.dtype in FLOATS:
            kind = torch_dtype(self.dtype)
            expected = expected.to(kind)
            found = self.tensor().reshape(expected.shape)
            same = (found == expected) | ((found != found) & (expected != expected))
            return bool(same.all())
        return torch.equal(expected.long(), self.tensor().reshape(expected.shape).long())


def _computed(tensor: LazyTensor) -> str:
    """The number type that a tensor's values are rounded to; packed ones are to none."""
    return "F32" if format_of(tensor) is not None else plain_dtype(tensor)


class Facing:
    """Finds the counterpart of every tensor of `base` in `merged`."""

    def __init__(self, base: BaseWeights, merged: Checkpoint) -> None:
        self.base = base
        self.merged = merged
        self.used: set[str] = set()  # names of `merged` that something was found in
        self.renamed = False  # something was found under another name
        self.parts: dict[str, list[tuple[str, Stored]]] = {}
        for home, stored in base.stored.items():
            self.parts.setdefault(stored.name, []).append((home, stored))
        self.weights: BaseWeights | None = None
        try:
            self.weights = BaseWeights(merged, base.architecture)
        except UsageError:
            if not any(name in merged for name in base.checkpoint):
                raise

    @property
    def homes(self) -> Mapping[str, Stored]:
        """Home name -> tensor of the merged checkpoint."""
        return self.weights.stored if self.weights is not None else {}

    @property
    def dtypes(self) -> list[str]:
        """Number types of the merged checkpoint, most frequent bytes first."""
        sizes: dict[str, int] = {}
        for tensor in self.merged.values():
            kind = format_of(tensor) or plain_dtype(tensor)
            sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
        return sorted(sizes, key=lambda dtype: -sizes[dtype])

    def find(self, name: str) -> Found | None:
        """The counterpart of a tensor of the base, by its stored name or through its home names;
        None when there is none.
        """
        if name in self.merged:
            self.used.add(name)
            tensor = self.merged[name]
            return Found(_computed(tensor), tuple(tensor.shape), tensor)
        mine = sorted(self.parts.get(name, ()), key=lambda item: item[1].rows)
        found = self._all([home for home, _ in mine])
        if not found and mine:
            found = self._experts(mine[0][0], tuple(mine[0][1].tensor.shape))
        if not found:
            return None
        self.used.update(part.name for part in found)
        self.renamed = True
        return self._joined(found, [stored for _, stored in mine])

    def _all(self, homes: list[str]) -> list[Stored]:
        """The tensors of these home names, or none unless all are there."""
        found: list[Stored] = []
        for home in homes:
            module, _, parameter = home.rpartition(".")
            part = self.weights.find(module, parameter) if self.weights is not None else None
            if part is None:
                return []
            found.append(part)
        return found

    def _experts(self, home: str, shape: tuple[int, ...]) -> list[Stored]:
        """The single experts of a stack (E, rows, columns), where the file keeps them apart."""
        match = _STACK.fullmatch(home)
        if match is None or len(shape) != 3:
            return []
        leaves = HALVES if match["leaf"] == "gate_up_proj" else ("down_proj",)
        found = self._all(
            [f"{match['experts']}.{e}.{leaf}.weight" for e in range(shape[0]) for leaf in leaves]
        )
        one = (shape[1] // len(leaves), shape[2])
        return found if all(part.shape == one for part in found) else []

    def _joined(self, found: list[Stored], mine: list[Stored]) -> Found | None:
        """Home parts stacked and the base's row operator applied (each is its own inverse)."""
        operator = mine[0].site.operator
        same_row = len(found) == 1 and found[0].site.operator is None and operator is None
        if same_row and found[0].span is None and len(found[0].site.parts) == 1:
            tensor = found[0].tensor
            return Found(_computed(tensor), tuple(tensor.shape), tensor)
        pieces = [part.load() for part in found]
        if len({piece.dtype for piece in pieces}) > 1:
            return None
        if len(pieces) > 1:
            columns = [p.reshape(p.shape[0], -1) if p.ndim > 1 else p for p in pieces]
            whole = torch.cat(columns)
        else:
            whole = pieces[0]
        if operator == "swap_halves":
            whole = whole.roll(whole.shape[0] // 2, 0)
        elif operator == "transpose":
            whole = whole.T
        shape = tuple(self.base.checkpoint[mine[0].name].shape)
        if whole.numel() == math.prod(shape):
            whole = whole.reshape(shape)
        unpacked = any(format_of(part.tensor) is not None for part in found)
        dtype = "F32" if unpacked else _computed(found[0].tensor)
        return Found(dtype, tuple(whole.shape), None, whole, unpacked)


def leftovers(
    facing: Facing, missing: Iterable[str], touched: set[str]
) -> tuple[list[str], list[str], list[str]]:
    """(really missing, not compared, unexplained extra) of tensors without counterpart.

    Not compared: components one side lacks altogether, tensors no table knows on either side,
    integer buffers, and one of two tensors that are the same bytes (a tied head). Everything else
    counts.
    """
    base, merged = facing.base.checkpoint, facing.merged
    really: list[str] = []
    unseen: list[str] = []
    components = {home.partition(":")[0] for home in facing.homes}
    for name in missing:
        if is_marker(name):
            continue
        tensor = base[name]
        homes = [home for home, _ in facing.parts.get(name, ())]
        absent = bool(homes) and not any(home.partition(":")[0] in components for home in homes)
        unknown = not homes and facing.renamed
        if name in touched:
            really.append(name)
        elif absent or unknown or tensor.dtype not in FLOATS or _copied(tensor, base, name):
            unseen.append(name)
        else:
            really.append(name)
    known = {home.partition(":")[0] for home in facing.base.stored}
    homes_of: dict[str, set[str]] = {}
    for home, stored in facing.homes.items():
        homes_of.setdefault(stored.name, set()).add(home.partition(":")[0])
    extra: list[str] = []
    for name in merged:
        if name in facing.used or is_marker(name):
            continue
        tensor = merged[name]
        elsewhere = name in homes_of and not homes_of[name] & known
        unknown = name not in homes_of and facing.renamed
        if elsewhere or unknown or tensor.dtype not in FLOATS or _copied(tensor, merged, name):
            unseen.append(name)
        else:
            extra.append(name)
    return really, unseen, extra


def _copied(tensor: LazyTensor, checkpoint: Checkpoint, name: str) -> bool:
    """Whether another tensor of the checkpoint has the same shape, type and bytes."""
    if tensor.nbytes == 0:
        return True
    own: np.ndarray | None = None
    for other, candidate in checkpoint.items():
        if other == name or (candidate.dtype, candidate.shape) != (tensor.dtype, tensor.shape):
            continue
        if own is None:
            own = np.frombuffer(tensor.read(), np.uint8)
        if np.array_equal(own, np.frombuffer(candidate.read(), np.uint8)):
            return len(tensor.shape) > 1  # equal vectors prove nothing
    return False
