"""Arithmetic of a merge, by row tiles: fp32 in between, one rounding at the end, and the share of
ΔW that survives it.

An ordered stack is the composition of weight maps, W_k = W_{k-1} + t_k (op_k(W_{k-1}) - W_{k-1});
relative to the base every op_k looks at W_0 instead, which makes the order irrelevant.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.algorithms import Full, LoRA, WeightAdapter
from peftsurgery.algorithms.slots import pad_to
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import CannotSplit, CheckFailed, UnsupportedError
from peftsurgery.operations.plan import Edit, Target
from peftsurgery.operations.rounding import Survival, generator, stochastic, survival_of
from peftsurgery.operations.staging import workers

TILE = 1 << 20  # elements of a row tile: smaller ones drown in dispatch, larger leave the cache
SAMPLED = 1 << 26  # elements; of larger merges survival is measured on some of the tiles
SAMPLING = 8  # every so many tiles, the first of each tensor included
AHEAD = 4  # tiles per thread that are under way or wait for the disk

RowOperation = Callable[[Tensor, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How results are rounded. `dtype` None keeps the stored one; `seed` is for stochastic
    rounding.
    """

    relative_to: str = "current"
    rounding: str = "nearest"
    seed: int = 0
    dtype: str | None = None


def output_dtype(target: Target, settings: Settings) -> str:
    """The safetensors dtype a target is written in."""
    return settings.dtype or target.tensor.dtype


def spans(target: Target) -> list[tuple[int, int]]:
    """Row tiles [start, stop) of a target, about `TILE` elements each."""
    rows = target.rows
    step = max(1, TILE // max(1, target.columns))
    return [(a, min(a + step, rows)) for a in range(0, rows, step)]


class Renderer:
    """Computes row tiles of one target."""

    def __init__(self, target: Target, settings: Settings) -> None:
        self.target = target
        self.settings = settings
        dtype = torch_dtype(output_dtype(target, settings))
        assert dtype is not None  # the plan refuses what torch does not have
        self.dtype = dtype
        self.whole: Tensor | None = None
        self.base: Tensor | None = None
        self.operations: list[tuple[Edit, RowOperation]] = []
        if needs_whole(target):
            self.base = self._load(0, target.rows).float()
            self.whole = self._composed(self.base)
        else:
            self.operations = [(edit, self._row_operation(edit)) for edit in target.edits]
        self._memory = threading.local()  # tiles are rendered on several threads

    def tile(self, start: int, stop: int, *, measure: bool = True) -> tuple[Tensor, Survival]:
        """Rows [start, stop) rounded to the output dtype, and what survived (zero sums without
        `measure`). Raises CheckFailed on NaN, Inf and values that do not fit the dtype.
        """
        exact, before = self.exact(start, stop)
        written = self._round(exact, start)
        if measure:
            return written, self._survival(exact, before, written)
        low, high = (float(bound) for bound in torch.aminmax(exact))
        if not max(-low, high) <= torch.finfo(self.dtype).max:
            raise CheckFailed(self._why_not_finite(exact, before))
        return written, Survival()

    def rounded(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) rounded to the output dtype, without looking at what survived."""
        return self._round(self.exact(start, stop)[0], start)

    def exact(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [start, stop) of the result and of the base in fp32, (rows, columns); the next call
        reuses the memory.
        """
        if self.whole is not None and self.base is not None:
            return self.whole[start:stop], self.base[start:stop]
        exact, before = self._scratch(stop - start)
        before.copy_(self._load(start, stop))
        exact.copy_(before)
        for edit, operation in self.operations:
            self._apply(edit, operation, exact, before, start, stop)
        return exact, before

    def _scratch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Two fp32 buffers of this thread, (rows, columns)."""
        if not hasattr(self._memory, "buffers"):
            most = max(b - a for a, b in spans(self.target))
            self._memory.buffers = torch.empty(2, most, self.target.columns)
        exact, before = self._memory.buffers
        return exact[:rows], before[:rows]

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

    def _load(self, start: int, stop: int) -> Tensor:
        """Rows of the base, zero-padded where the merge widens it: (rows, columns)."""
        tensor, shape = self.target.tensor, self.target.shape
        stored = tuple(tensor.shape)
        if not stored:
            return tensor.torch().float().reshape(1, 1)
        if stored == shape:
            rows = self.target.flat(tensor).rows(start, stop)
            return rows.torch().reshape(stop - start, -1)
        full = tensor.torch().float()
        if len(stored) == len(shape) and all(a <= b for a, b in zip(stored, shape, strict=True)):
            return pad_to(full, shape)[start:stop].reshape(stop - start, -1)
        kept = full[: shape[0]]  # a replaced weight with fewer rows
        return kept[start:stop].reshape(stop - start, -1)

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
        """The whole tensor at once, for maps that look at all rows (per-input DoRA, transposed
        weights).
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

    def _round(self, exact: Tensor, start: int) -> Tensor:
        if self.settings.rounding == "nearest" or self.dtype == torch.float32:
            return exact.to(self.dtype, copy=True)  # the scratch is reused
        return stochastic(exact, self.dtype, generator(self.settings.seed, self.target.name, start))

    def _survival(self, exact: Tensor, before: Tensor, written: Tensor) -> Survival:
        result = survival_of(exact, before, written)
        if not (math.isfinite(result.kept) and math.isfinite(result.total)):
            raise CheckFailed(self._why_not_finite(exact, before))
        return result

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


def needs_whole(target: Target) -> bool:
    """Whether some edit's map of a row looks at other rows too: a magnitude per input, or a
    transposed weight.
    """
    return any(
        edit.parameter == "weight"
        and (edit.transposed or (not edit.module.additive and edit.module.magnitude_axis == "in"))
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
    except CannotSplit:
        assert module.magnitude is not None
        delta = module.with_tensors(magnitude=None, magnitude_axis=None).tile(start, stop)
        return Full(delta, magnitude=module.magnitude[start:stop], magnitude_axis="out")


def _bias_operation(module: WeightAdapter, t: float) -> RowOperation:
    assert module.bias is not None
    bias, value = module.bias.detach().float(), module.bias_is_value

    def add(out: Tensor, a: int, b: int) -> None:
        part = bias[a:b].reshape(out.shape)
        if value:
            out.lerp_(part, t)
        else:
            out.add_(part, alpha=t)

    return add


class Pipeline:
    """Renders tiles on several threads, ahead of the writer and in its order."""

    def __init__(
        self,
        targets: Sequence[Target],
        settings: Settings,
        progress: Callable[[Target], None] | None = None,
    ) -> None:
        self.settings = settings
        self.survival: dict[str, Survival] = {}
        self.progress = progress
        self._threads = torch.get_num_threads()
        self._exit = contextlib.ExitStack()
        self._every = 1 if sum(t.numel for t in targets) <= SAMPLED else SAMPLING
        self._tiles = self._all(targets)
        self._ahead: deque[tuple[Target, Future[tuple[Tensor, Survival]]]] = deque()

    def __enter__(self) -> Pipeline:
        self._pool = self._exit.enter_context(workers())
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tiles of one target; targets have to be asked for in the order given."""
        total = Survival()
        self._fill()
        target = self._ahead[0][0] if self._ahead else None
        if target is None or target.name != name:
            raise RuntimeError(f"tiles of {target and target.name!r} where {name!r} was expected")
        while self._ahead and self._ahead[0][0] is target:
            tile, survival = self._ahead.popleft()[1].result()
            self._fill()
            total.add(survival)
            yield tile
        self.survival[name] = total
        if self.progress is not None:
            self.progress(target)

    def _fill(self) -> None:
        """Keep enough tiles under way, or waiting, for every thread and the writer."""
        while len(self._ahead) < AHEAD * self._threads:
            following = next(self._tiles, None)
            if following is None:
                return
            target, renderer, (start, stop) = following
            measure = start // max(1, stop - start) % self._every == 0
            tile = self._pool.submit(renderer.tile, start, stop, measure=measure)
            self._ahead.append((target, tile))

    def _all(self, targets: Sequence[Target]) -> Iterator[tuple[Target, Renderer, tuple[int, int]]]:
        for target in targets:
            renderer = Renderer(target, self.settings)
            for span in spans(target):
                yield target, renderer, span
