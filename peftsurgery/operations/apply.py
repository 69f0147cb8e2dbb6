"""Arithmetic of a merge, by row tiles: fp32 in between, one rounding at the end, and the share of
ΔW that survives it.

An ordered stack is the composition of weight maps, W_k = W_{k-1} + t_k (op_k(W_{k-1}) - W_{k-1});
relative to the base every op_k looks at W_0 instead, which makes the order irrelevant.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from peftsurgery.algorithms import Full, LoRA, WeightAdapter
from peftsurgery.algorithms.slots import pad_to
from peftsurgery.checkpoint import LazyTensor
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import CannotSplit, CheckFailed, UnsupportedError
from peftsurgery.operations.plan import Edit, Target
from peftsurgery.operations.rounding import Survival, generator, stochastic, survival_of
from peftsurgery.quantizers import PackedTensor
from peftsurgery.quantizers.grids import pieces
from peftsurgery.quantizers.rounded import RoundedTensor

TILE = 1 << 20  # elements of a row tile: smaller ones drown in dispatch, larger leave the cache
SAMPLED = 1 << 26  # elements; of larger merges survival is measured on some of the rows

RowOperation = Callable[[Tensor, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How results are rounded. `dtype` None keeps the stored one; `seed` is for stochastic
    rounding. requant: what packed weights become, "same" or "dequant".
    """

    relative_to: str = "current"
    rounding: str = "nearest"
    seed: int = 0
    dtype: str | None = None
    requant: str = "same"


def output_dtype(target: Target, settings: Settings) -> str:
    """The safetensors dtype a target is written in, where it is not packed again."""
    return settings.dtype or plain_dtype(target.tensor)


def plain_dtype(tensor: LazyTensor) -> str:
    """The dtype of a tensor; of a packed or rounded one, that of the weight it stands for."""
    if isinstance(tensor, RoundedTensor):
        return tensor.native
    return tensor.packed.native if isinstance(tensor, PackedTensor) else tensor.dtype


def is_repacked(tensor: LazyTensor, settings: Settings) -> bool:
    """Whether a tensor is packed and stays so."""
    return isinstance(tensor, PackedTensor) and settings.requant == "same"


def spans(target: Target) -> list[tuple[int, int]]:
    """Row tiles [start, stop) of a target, about `TILE` elements each."""
    return list(pieces(target.rows, target.columns, TILE))


class Scratch(threading.local):
    """A few fp32 buffers of each thread, kept from tile to tile: the pages of fresh memory cost
    more than the arithmetic on them.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(0)] * 4

    def take(self, which: int, rows: int, columns: int) -> Tensor:
        """Buffer 0 to 3 as (rows, columns); holds what was there before."""
        if self._buffers[which].numel() < rows * columns:
            self._buffers[which] = torch.empty(rows * columns)
        return self._buffers[which][: rows * columns].view(rows, columns)


class Renderer:
    """Computes row tiles of one target; `scratch` is memory that renderers may share."""

    def __init__(self, target: Target, settings: Settings, scratch: Scratch | None = None) -> None:
        self.target = target
        self.settings = settings
        dtype = torch_dtype(output_dtype(target, settings))
        assert dtype is not None  # the plan refuses what torch does not have
        self.dtype = dtype
        self.whole: Tensor | None = None
        self.base: Tensor | None = None
        self.operations: list[tuple[Edit, RowOperation]] = []
        if needs_whole(target):
            self.base = self._stored.float()
            self.whole = self._composed(self.base)
        else:
            self.operations = [(edit, self._row_operation(edit)) for edit in target.edits]
        self._scratch = scratch or Scratch()
        self._window = threading.local()
        self._keeps_base = settings.relative_to == "base" and any(
            not edit.module.additive for edit in target.edits
        )

    def tile(
        self, start: int, stop: int, out: Tensor | None = None, *, sample: int = 1
    ) -> tuple[Tensor, Survival]:
        """Rows [start, stop) rounded to the output dtype, and what survived, estimated from one in
        `sample` rows. out: memory for the rows. Raises CheckFailed on NaN, Inf and values that do
        not fit the dtype.
        """
        exact = self._exact(start, stop)
        written = self._round(exact, start, out)
        if not _bounded(exact, torch.finfo(self.dtype).max):
            raise CheckFailed(self._why_not_finite(exact, self.before(start, stop)))
        before = self.before(start, stop, sample)
        room = (self._scratch.take(2, *before.shape), self._scratch.take(3, *before.shape))
        survival = survival_of(exact[::sample], before, written[::sample], room)
        survival.scale((stop - start) / before.shape[0])
        if not (math.isfinite(survival.kept) and math.isfinite(survival.total)):
            raise CheckFailed(self._why_not_finite(exact, self.before(start, stop)))
        return written, survival

    def rounded(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) rounded to the output dtype, without looking at what survived."""
        return self._round(self._exact(start, stop), start)

    def exact(
        self, start: int, stop: int, *, sample: int = 1, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows [start, stop) of the result, and one in `sample` of those of the base, in fp32,
        (rows, columns); the next call reuses the memory, but for that of `out`.
        """
        packed = self._packed
        if packed is None or out is None:
            return self._exact(start, stop, out), self.before(start, stop, sample)
        packed.rows(start, stop).into(out)
        before = self._scratch.take(1, *out[::sample].shape).copy_(out[::sample])
        return self._changed(out, start, stop), before

    @cached_property
    def _packed(self) -> PackedTensor | None:
        """The base where its rows can be unpacked alone, straight to where they are changed."""
        plain = self.whole is None and not self._keeps_base and not self.target.resized
        tensor = self.target.flat(self.target.tensor) if plain else None
        return tensor if isinstance(tensor, PackedTensor) else None

    def before(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Rows start:stop:step of the base in fp32; the next call reuses the memory."""
        if self.base is not None:
            return self.base[start:stop:step]
        rows = self._rows(start, stop)[::step]
        return self._scratch.take(1, *rows.shape).copy_(rows)

    def _rows(self, start: int, stop: int) -> Tensor:
        """Rows as they are stored; of a packed weight only those are unpacked, and kept until this
        thread asks for others.
        """
        tensor = self.target.tensor
        if not isinstance(tensor, PackedTensor | RoundedTensor) or self.target.resized:
            return self._stored[start:stop]
        held = getattr(self._window, "held", None)
        if held is None or held[0] != (start, stop):
            rows = self.target.flat(tensor).rows(start, stop).torch()
            held = self._window.held = ((start, stop), rows.reshape(stop - start, -1))
        return held[1]

    def _exact(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        if self.whole is not None:
            rows = self.whole[start:stop]
            return rows if out is None else out.copy_(rows)
        exact = self._scratch.take(0, stop - start, self.target.columns) if out is None else out
        return self._changed(exact.copy_(self._rows(start, stop)), start, stop)

    def _changed(self, exact: Tensor, start: int, stop: int) -> Tensor:
        """Rows of the base, overwritten by those of the result."""
        before = self.before(start, stop) if self._keeps_base else exact
        for edit, operation in self.operations:
            self._apply(edit, operation, exact, before, start, stop)
        return exact

    def _apply(
        self,
        edit: Edit,
        operation: RowOperation,
        out: Tensor,
        before: Tensor,
        start: int,
        stop: int,
    ) -> None:
        low, high = max(start, edit.start), min(stop, edit.stop)
        while low < high:
            row = (low - edit.start + edit.offset) % edit.modulus
            end = min(high, low + edit.modulus - row)
            view = out[low - start : end - start, : edit.columns]
            if self.settings.relative_to == "base" and not edit.module.additive:
                change = before[low - start : end - start, : edit.columns].clone()
                origin = change.clone()
                operation(change, row, row + end - low)
                view += change - origin
            else:
                operation(view, row, row + end - low)
            low = end

    @cached_property
    def _stored(self) -> Tensor:
        """The base as (rows, columns), zero-padded where the merge widens it; otherwise a view of
        the file.
        """
        tensor, shape = self.target.tensor, self.target.shape
        stored = tensor.torch()
        if stored.ndim == 0:
            return stored.reshape(1, 1)
        if tuple(stored.shape) != shape:
            same = stored.ndim == len(shape)
            if same and all(a <= b for a, b in zip(stored.shape, shape, strict=True)):
                stored = pad_to(stored, shape)
            else:
                stored = stored[: shape[0]]  # a replaced weight with fewer rows
        return stored.reshape(self.target.rows, self.target.columns)

    def _row_operation(self, edit: Edit) -> RowOperation:
        module, t = edit.module, edit.strength
        if edit.parameter == "bias":
            return _bias_operation(module, t)
        if isinstance(module, LoRA) and module.additive:
            factors = module.factors()
            assert factors is not None
            outer, inner = factors
            return lambda out, a, b: out.addmm_(outer[a:b], inner, alpha=t)  # type: ignore[return-value]
        if module.additive:
            return lambda out, a, b: module.accumulate(out, a, b, t)  # type: ignore[return-value]

        def replace(out: Tensor, a: int, b: int) -> None:
            part = _restricted(module, a, b)
            shape = (b - a, *part.shape[1:])
            out.copy_(part.merged(out.reshape(shape), None, t)[0].reshape(out.shape))

        return replace

    def _composed(self, base: Tensor) -> Tensor:
        """The whole tensor at once, for maps that look at all rows (per-input DoRA, rotations of
        outputs, transposed weights).
        """
        current = base.clone()
        for edit in self.target.edits:
            relative = self.settings.relative_to == "base"
            rows = (base if relative else current)[edit.start : edit.stop, : edit.columns]
            if edit.parameter == "bias":
                change = rows.clone()
                _bias_operation(edit.module, edit.strength)(
                    change, edit.offset, edit.offset + rows.shape[0]
                )
            else:
                change = self._mapped(edit, rows)
            if relative:
                current[edit.start : edit.stop, : edit.columns] += change - rows
            else:
                current[edit.start : edit.stop, : edit.columns] = change
        return current

    def _mapped(self, edit: Edit, rows: Tensor) -> Tensor:
        module = edit.module
        if edit.transposed:
            home = rows.reshape(self.target.shape).T
            return module.merged(home, None, edit.strength)[0].T.reshape(rows.shape)
        if rows.shape[0] != edit.modulus and module.magnitude_axis == "in":
            raise UnsupportedError(
                f"{edit.path}: a DoRA with one magnitude per input over several weights that the "
                "base stores apart: its norms "
                "run over all of them. Give a base that stores them fused, or convert the adapter "
                "with --algorithm lora "
                "--base first."
            )
        place = (torch.arange(rows.shape[0]) + edit.offset) % edit.modulus
        if rows.shape[0] == edit.modulus:
            inverse = torch.argsort(place)
            turned = rows[inverse].reshape(rows.shape[0], *self.target.shape[1:])
            plain = module.with_tensors(padded_shape=None)
            return plain.merged(turned, None, edit.strength)[0].reshape(rows.shape)[place]
        part = _restricted(module, edit.offset, edit.offset + rows.shape[0])
        shape = (rows.shape[0], *part.shape[1:])
        return part.merged(rows.reshape(shape), None, edit.strength)[0].reshape(rows.shape)

    def _round(self, exact: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        if self.settings.rounding == "stochastic" and self.dtype != torch.float32:
            random = generator(self.settings.seed, self.target.name, start)
            return stochastic(exact, self.dtype, random)
        if out is None:
            return exact.to(self.dtype, copy=True)  # the scratch is reused
        return out.copy_(exact)

    def _why_not_finite(self, exact: Tensor, before: Tensor) -> str:
        name, dtype = self.target.name, output_dtype(self.target, self.settings)
        if not bool(torch.isfinite(before).all()):
            return (
                f"{name!r}: the base holds NaN or Inf there already; nothing was kept. Repair the "
                "base first."
            )
        if not bool(torch.isfinite(exact).all()):
            paths = ", ".join(dict.fromkeys(edit.path for edit in self.target.edits))
            return (
                f"{name!r}: the merge gives NaN or Inf; nothing was kept. Look at {paths} with "
                "inspect --norms: the adapter is "
                "damaged, or its strength far too large."
            )
        largest = float(exact.abs().max())
        return (
            f"{name!r}: the merge gives {largest:g}, which does not fit {dtype}; nothing was kept. "
            "Write --dtype bf16 or fp32."
        )


ALTERNATIVES = ("F16", "BF16", "F32")


def alternatives(targets: Iterable[Target], settings: Settings) -> dict[str, float]:
    """The share of ΔW that other dtypes would keep, from the same tiles; without those a value does
    not fit into.
    """
    targets = list(targets)
    sums = {dtype: Survival() for dtype in ALTERNATIVES}
    sampled = sum(target.numel for target in targets) > SAMPLED
    for target in targets:
        renderer = Renderer(target, settings)
        tiles = spans(target)
        for start, stop in [tiles[len(tiles) // 2]] if sampled else tiles:
            exact, before = renderer.exact(start, stop)
            for dtype, total in sums.items():
                rounded = exact.to(torch_dtype(dtype)).float()
                total.add(survival_of(exact, before, rounded))
    return {dtype: total.share for dtype, total in sums.items() if math.isfinite(total.kept)}


def _bounded(exact: Tensor, largest: float) -> bool:
    """Whether every value is a number of at most `largest`: the norm says so in one quick pass, and
    the extremes where it is not small enough.
    """
    flat = exact.reshape(-1)
    if math.sqrt(float(torch.dot(flat, flat))) <= largest:  # False for NaN
        return True
    low, high = (float(bound) for bound in torch.aminmax(flat))
    return max(-low, high) <= largest


def needs_whole(target: Target) -> bool:
    """Whether some edit's map of a row looks at other rows too: a magnitude per input, a rotation
    of outputs, or a transposed weight.
    """
    return any(
        edit.parameter == "weight"
        and (edit.transposed or not (edit.module.additive or edit.module.row_wise))
        for edit in target.edits
    )


def _restricted(module: WeightAdapter, start: int, stop: int) -> WeightAdapter:
    """Rows start:stop of a map that looks at one row at a time; where the algorithm cannot cut, of
    its ΔW written out.
    """
    if module.bias is not None or module.padded_shape is not None:
        module = module.with_tensors(bias=None, padded_shape=None)
    try:
        return module.rows(start, stop)
    except CannotSplit as error:
        if module.magnitude is None:
            raise UnsupportedError(
                f"{error}; the base stores these rows apart. Give a base that stores them fused, "
                "or convert the adapter with --algorithm lora --base first."
            ) from error
        delta = module.with_tensors(magnitude=None, magnitude_axis=None).tile(start, stop)
        return Full(delta, magnitude=module.magnitude[start:stop], magnitude_axis="out")


def _bias_operation(module: WeightAdapter, t: float) -> RowOperation:
    if (factor := module.bias_factor) is not None:
        step = t * (factor.detach() - 1)

        def multiply(out: Tensor, a: int, b: int) -> None:
            out.addcmul_(out, step[a:b].reshape(out.shape))

        return multiply
    if module.maps_bias:

        def mapped(out: Tensor, a: int, b: int) -> None:
            found = _restricted(module, a, b).merged_bias(out.reshape(-1), t)
            assert found is not None
            out.copy_(found.detach().reshape(out.shape))

        return mapped
    assert module.bias is not None
    bias, value = module.bias.detach().float(), module.bias_is_value

    def add(out: Tensor, a: int, b: int) -> None:
        part = bias[a:b].reshape(out.shape)
        if value:
            out.lerp_(part, t)
        else:
            out.add_(part, alpha=t)

    return add
