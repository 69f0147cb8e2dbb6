"""Rows of adapters side by side: what can be joined, what is shared, how blocks are laid out."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CannotFuse, CannotSplit, UsageError

if TYPE_CHECKING:
    from .base import WeightAdapter


def _c_memcmp() -> Callable[[int, int, int], int] | None:
    """The C library's memcmp; torch.equal reaches a tenth to a third of its speed."""
    try:
        function = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # no such symbol, or Windows
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function


_memcmp = _c_memcmp()
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Part:
    """One slot of a fusion: rows start:stop of the result, filled by an adapter or untouched."""

    adapter: WeightAdapter | None
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


# --- shapes ---------------------------------------------------------------------------------------


def unit_tail(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without trailing ones behind the first dimension: a 1x1 convolution is a matrix."""
    end = len(shape)
    while end > 1 and shape[end - 1] == 1:
        end -= 1
    return tuple(shape[:end])


def shown_shape(shape: Sequence[int]) -> str:
    """A shape in a message; 0 is a size that is not known."""
    return "[" + ", ".join(str(n) if n else "any" for n in shape) + "]"


def fit_shape(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a change of this shape is a weight of the target shape, reshaped: same rows, same
    columns.

    Equal up to trailing ones, or one of the two is the flattened (o, i·k).
    """
    if shape[0] != target[0] or math.prod(shape) != math.prod(target):
        return False
    return len(shape) == 2 or len(target) == 2 or unit_tail(shape) == unit_tail(target)


def pad_to(tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Zeros appended at the end of each dimension up to `shape`; no copy when nothing is to do."""
    if shape is None or tuple(tensor.shape) == shape:
        return tensor
    if tensor.ndim != len(shape) or any(a > b for a, b in zip(tensor.shape, shape, strict=False)):
        raise UsageError(
            f"padded_shape: a weight {tuple(tensor.shape)} cannot be padded to {shape}."
        )
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return padded


# --- tensors --------------------------------------------------------------------------------------


def bit_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Same dtype, shape (trailing ones aside) and bits. Shared memory is not read.

    A meta tensor has no values to compare: it equals itself alone.
    """
    if a is None or b is None:
        return a is b
    if a is b:
        return True
    if a.is_meta or b.is_meta:
        return False
    if a.dtype != b.dtype or unit_tail(a.shape) != unit_tail(b.shape):
        return False
    if a.is_cpu and b.is_cpu and a.is_contiguous() and b.is_contiguous():
        x, y = a.data_ptr(), b.data_ptr()
        if x == y:
            return True
        if _memcmp is not None:
            return _memcmp(x, y, a.nbytes) == 0
    a, b = a.detach().reshape(unit_tail(a.shape)), b.detach().reshape(unit_tail(b.shape))
    if a.device == b.device and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    bits = _BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The smallest dtype that holds all exactly; fp8 beside another dtype counts as fp16."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    result: torch.dtype | None = None
    for dtype in dtypes:
        wide = torch.float16 if dtype.itemsize == 1 else dtype
        result = wide if result is None else torch.promote_types(result, wide)
    assert result is not None
    return result


def scaled(tensor: Tensor, ratio: float, dtype: torch.dtype) -> Tensor:
    """tensor · ratio in fp32, rounded once to dtype; left in fp32 where dtype would overflow."""
    if ratio == 1:
        return tensor.detach().to(dtype)
    exact = tensor.detach().float() * ratio
    rounded = exact.to(dtype)
    if rounded.is_meta:
        return rounded
    if bool(torch.isfinite(exact).all()) and not bool(torch.isfinite(rounded.float()).all()):
        return exact
    return rounded


def join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate, promoting to the widest dtype."""
    dtype = widest(tensors)
    return torch.cat([t.detach().to(dtype) for t in tensors], dim)


def stack_rows(blocks: Sequence[Tensor | int], columns: Sequence[int]) -> Tensor:
    """Blocks (rows, width, …) on top of each other with first column `columns[n]`, zeros elsewhere;
    an int is zero rows.

    The result is as wide as the furthest block; trailing dimensions are those of the first. Blocks
    that are rows of one tensor in order are that tensor again, not a copy.
    """
    if (whole := _undivided(blocks, columns)) is not None:
        return whole
    real = [b for b in blocks if isinstance(b, Tensor)]
    width = max(
        c + b.shape[1] for b, c in zip(blocks, columns, strict=False) if isinstance(b, Tensor)
    )
    rows = [b if isinstance(b, int) else b.shape[0] for b in blocks]
    tail = real[0].shape[2:]
    out = torch.zeros(sum(rows), width, *tail, dtype=widest(real), device=real[0].device)
    top = 0
    for block, count, column in zip(blocks, rows, columns, strict=False):
        if isinstance(block, Tensor):
            place = out.narrow(0, top, count).narrow(1, column, block.shape[1])
            place.copy_(block.detach().reshape(place.shape))
        top += count
    return out


def _undivided(blocks: Sequence[Tensor | int], columns: Sequence[int]) -> Tensor | None:
    """The tensor that was cut into these blocks, where they lie behind each other in its memory."""
    first = blocks[0]
    if isinstance(first, int) or first.is_meta or any(columns):
        return None
    place = first.data_ptr()
    for block in blocks:
        if isinstance(block, int) or not block.is_contiguous() or block.data_ptr() != place:
            return None
        if block.dtype != first.dtype or block.shape[1:] != first.shape[1:]:
            return None
        if block.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        place += block.nbytes
    rows = sum(block.shape[0] for block in blocks if isinstance(block, Tensor))
    whole = first.detach()
    return whole.as_strided((rows, *first.shape[1:]), whole.stride())


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks (r, r', *k) along the diagonal of the first two dimensions."""
    columns = [sum(b.shape[1] for b in blocks[:n]) for n in range(len(blocks))]
    return stack_rows(blocks, columns)


def group_by(slots: Sequence[Part], fields: Sequence[str]) -> tuple[list[int], list[WeightAdapter]]:
    """(group of each slot, one adapter per group): adapters whose fields are bit-equal share a
    group; -1 is untouched."""
    groups: list[int] = []
    members: list[WeightAdapter] = []
    for slot in slots:
        if slot.adapter is None:
            groups.append(-1)
            continue
        tensors = [slot.adapter._parameters[f] for f in fields]
        for n, member in enumerate(members):
            if all(
                bit_equal(t, member._parameters[f]) for t, f in zip(tensors, fields, strict=False)
            ):
                groups.append(n)
                break
        else:
            groups.append(len(members))
            members.append(slot.adapter)
    return groups, members


# --- fusion ---------------------------------------------------------------------------------------


def check_parts(cls: type[WeightAdapter], parts: Sequence[WeightAdapter | int]) -> list[Part]:
    """The parts as slots of one result; CannotFuse for mixed algorithms or input sides."""
    slots: list[Part] = []
    top = 0
    first: WeightAdapter | None = None
    for part in parts:
        rows = part if isinstance(part, int) else part.shape[0]
        if rows < 1:
            raise UsageError(f"fuse: a part with {rows} rows.")
        slots.append(Part(None if isinstance(part, int) else part, top, top + rows))
        top += rows
        if isinstance(part, int):
            continue
        if not isinstance(part, cls):
            raise CannotFuse(
                f"a {type(part).__name__} cannot be joined as {cls.__name__}. Convert with "
                "--algorithm lora."
            )
        if first is None or not first._has_product:
            first = part
        if part._has_product and not fit_shape((1, *part.shape[1:]), (1, *first.shape[1:])):
            raise CannotFuse(f"different input sides: {first.shape[1:]} and {part.shape[1:]}.")
    if first is None:
        raise CannotFuse("no part is an adapter: there is nothing to join.")
    return slots


def fuse_common(slots: Sequence[Part]) -> dict:
    """Joined magnitude, bias, padding and the common scale: the first non-zero one."""
    live = [s.adapter for s in slots if s.adapter is not None]
    first = live[0]
    common: dict = dict(first.common())
    common["scale"] = next((a.scale for a in live if float(a.scale) != 0), first.scale)

    axes = {a.magnitude_axis for a in live}
    if axes != {None}:
        if axes != {"out"}:
            kinds = ", ".join(sorted(str(a) for a in axes))
            raise CannotFuse(
                f"DoRA parts of axis {kinds}: only per-output magnitudes on every part can be "
                "joined."
            )
        if len(live) < len(slots):
            raise CannotFuse(
                "DoRA beside untouched rows: their magnitude would be the norm of the base weight."
            )
        common["magnitude"] = join([a.magnitude for a in live if a.magnitude is not None])

    biased = [a for a in live if a.bias is not None]
    if biased:
        if any(a._bias_axis for a in biased):
            raise CannotFuse("a Conv1D's bias belongs to its columns: its rows are not joined.")
        if len({a.bias_is_value for a in biased}) > 1:
            raise CannotFuse("one part holds a bias delta and another a bias value.")
        common["bias_is_value"] = biased[0].bias_is_value
        if biased[0].bias_is_value and len(biased) < len(slots):
            raise CannotFuse(
                "a bias value on some parts only: the other rows would need the base's bias."
            )
        common["bias"] = join([_bias_of(slot, biased[0]) for slot in slots])

    pads = {None if a.padded_shape is None else unit_tail(a.padded_shape)[1:] for a in live}
    if len(pads) > 1:
        raise CannotFuse("the parts pad the base weight differently.")
    if first.padded_shape is not None:
        common["padded_shape"] = (slots[-1].stop, *first.padded_shape[1:])
    return common


def _bias_of(slot: Part, like: WeightAdapter) -> Tensor:
    if slot.adapter is not None and slot.adapter.bias is not None:
        return slot.adapter.bias
    assert like.bias is not None
    return torch.zeros(slot.rows, dtype=like.bias.dtype, device=like.bias.device)


def ratio(adapter: WeightAdapter, scale: Tensor | float) -> float:
    """What the adapter's output side is multiplied by when it takes over the common scale."""
    own, common = float(adapter.scale), float(scale)
    return 1.0 if own == common else own / common


def swap_halves(adapter: WeightAdapter) -> WeightAdapter:
    """Output rows [h:2h] then [0:h]: scale and shift of an adaLN swapped. Its own inverse.

    A LoRA keeps its rank (both halves share `down`). Column norms do not see the order of rows, so
    a per-input DoRA keeps its magnitude. CannotSplit for an odd number of rows or when the
    algorithm cannot be cut in the middle.
    """
    o = adapter.shape[0]
    if o == 0:  # rows not known in number: the same map on each of them, or CannotSplit
        return adapter.rows(0, 0)
    if o % 2:
        raise CannotSplit(f"swap_halves: {o} output rows have no halves.")
    if adapter.magnitude is not None and adapter.magnitude_axis == "in":
        plain = swap_halves(adapter.with_tensors(magnitude=None, magnitude_axis=None))
        return plain.with_tensors(magnitude=adapter.magnitude, magnitude_axis="in")
    halves = [adapter.rows(o // 2, o), adapter.rows(0, o // 2)]
    try:
        return type(adapter).fuse(halves)
    except CannotFuse as error:
        raise CannotSplit(f"swap_halves: {error}") from None
