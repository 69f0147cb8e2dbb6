"""One packed weight with its change, packed again: exact values, the directions that matter,
codes, and what survived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from peftsurgery.algorithms import LoRA
from peftsurgery.checkpoint import LazyTensor
from peftsurgery.errors import CheckFailed
from peftsurgery.operations.apply import TILE, Renderer, Scratch, Settings, spans
from peftsurgery.operations.plan import Target
from peftsurgery.operations.rounding import generator
from peftsurgery.quantizers import Format, Grid, Packed, PackedTensor, nearest
from peftsurgery.quantizers.grids import pieces
from peftsurgery.quantizers.rounding import Subspace, feedback, feedback_factor, stochastic
from peftsurgery.quantizers.surviving import Survival, directions, row_space, survival

TOGETHER = 4  # tiles rounded at a time


@dataclass(frozen=True)
class Order:
    """How one packed weight is to be rounded, and from what."""

    rounding: str  # nearest, stochastic, subspace or gptq
    gram: Callable[[], Tensor] | None = None  # (columns, columns), for gptq
    original: LazyTensor | None = None  # the unquantized weight; None: the packed one
    feedback: Subspace | None = None  # of the down factors, where it is known already
    sample: int = 1  # survival is measured on one in so many rows


@dataclass(frozen=True)
class Repacked:
    """The parts of a weight as they will be stored, what survived, and, where it was asked for,
    what rounding took (wanted - written) and the change, in the shape of the weight.
    """

    parts: dict[str, Tensor]
    survival: Survival
    lost: Tensor | None = None
    change: Tensor | None = None


@dataclass(frozen=True)
class Exact:
    """The wanted matrix (rows, columns) fp32, as the format rounds it, and its change: all of it,
    or the sampled rows of every chunk by the chunk's first row. finite: it holds no NaN or
    infinity.
    """

    wanted: Tensor
    change: Tensor | None
    sampled: Mapping[int, Tensor]
    finite: bool = True


class Repacker:
    """Packs one target again. Rows are rounded in chunks, each by itself, so that any chunk can be
    made again from the written scales.
    """

    def __init__(
        self, target: Target, settings: Settings, order: Order, scratch: Scratch | None = None
    ) -> None:
        assert isinstance(target.tensor, PackedTensor)
        self.packed: Packed = target.tensor.packed
        self.format = self.packed.format
        self.settings, self.order, self.target = settings, order, target
        source = target if order.original is None else replace(target, tensor=order.original)
        self.scratch = scratch or Scratch()
        self.renderer = Renderer(source, settings, self.scratch)
        # what the format multiplies inputs by, seen from the unquantized weight
        self._scales = (
            self.format.input_scales(self.packed, order.original.torch().float())
            if order.original is not None
            else None
        )

    def whole(self, *, keep_lost: bool = False) -> Repacked:
        """Every row. Raises CheckFailed when the merge gives NaN or infinity."""
        exact = self.exact(keep_change=keep_lost)
        matrix = exact.wanted
        if not exact.finite:
            raise CheckFailed(
                f"{self.target.name!r}: the merge gives NaN or Inf; nothing was kept. Look at "
                "the adapters with inspect --norms."
            )
        grid, parts = self.format.fit(self.packed, matrix)
        previous = self._previous()
        codes = torch.empty(matrix.shape, dtype=grid.book.dtype)
        total = Survival()
        lost = torch.empty_like(matrix) if keep_lost else None
        for start, stop in self.chunks():
            rows = slice(start, stop)
            part, old = grid.rows(start, stop), None if previous is None else previous[rows]
            chosen = self.codes(start, stop, part, exact, old, codes[rows])
            for first, last in _tiles(start, stop, self.packed.columns):
                total.add(self._survival(first, last, grid.rows(first, last), codes, exact))
            if lost is not None:
                torch.sub(matrix[rows], part.values(chosen), out=lost[rows])
        parts = self.format.join(parts, self.format.pack(self.packed, codes))
        if lost is None or exact.change is None:
            return Repacked(parts, total)
        return Repacked(parts, total, *(self._weight(tensor) for tensor in (lost, exact.change)))

    def _previous(self) -> Tensor | None:
        """The codes there are, where the rounding has use for them."""
        if self.order.rounding != "nearest":
            return None
        return self.format.grid(self.packed, 0, self.packed.rows)[1]

    def _survival(self, start: int, stop: int, grid: Grid, codes: Tensor, exact: Exact) -> Survival:
        """What survives in rows start:stop, from every `sample`th of them; codes: of all rows."""
        sample = self.order.sample
        wanted, delta = exact.wanted[start:stop:sample], exact.sampled.get(start)
        if delta is None:
            assert exact.change is not None
            delta = exact.change[start:stop:sample]
        if self.order.original is None:
            before = wanted - delta
        else:
            held, known = self.format.grid(self.packed, start, stop)
            before = held.values(known)[::sample]
        part = grid if sample == 1 else grid.every(sample)
        found = survival(wanted, delta, before, part.values(codes[start:stop:sample]))
        found.scale((stop - start) / len(wanted))
        return found

    def _weight(self, matrix: Tensor) -> Tensor:
        return self.format.to_weight(self.packed, matrix)

    def exact(self, *, keep_change: bool = True) -> Exact:
        """What the merge gives, every row; keep_change: all of the change, not only what error
        feedback and `_survival` need. What is wanted lies in `scratch`: good until the thread's
        next call.
        """
        sample = self.order.sample
        known = self.order.rounding in ("nearest", "stochastic") or self.known_feedback is not None
        if keep_change or not known or sample == 1 or not self._by_rows:
            wanted, change = self._filled(spans(self.target))
            finite = math.isfinite(float(wanted.sum()))
            return Exact(self._matrix(wanted), self._matrix(change), {}, finite)
        wanted, finite = self._room(), True
        sampled: dict[int, Tensor] = {}
        for start, stop in spans(self.target):
            out = wanted[start:stop]
            _, before = self.renderer.exact(start, stop, sample=sample, out=out)
            sampled[start] = out[::sample] - before
            if self._scales is not None:
                out *= self._scales
                sampled[start] *= self._scales
            finite = finite and math.isfinite(float(out.sum()))
        return Exact(wanted, None, sampled, finite)

    def part(self, start: int, stop: int, *, tiled: bool = True) -> Exact:
        """`exact`, of which at least rows start:stop are filled in; `tiled`: to the bit, from the
        same tiles, which products over other numbers of rows are not.
        """
        if self.known_feedback is None or not self._by_rows:
            return self.exact()
        tiles = [(start, stop)]
        if tiled:
            tiles = [tile for tile in spans(self.target) if tile[0] < stop and tile[1] > start]
        return Exact(*self._filled(tiles), {})

    def _filled(self, tiles: Iterable[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        wanted, change = self._room(), torch.empty(self.target.rows, self.target.columns)
        for start, stop in tiles:
            out = wanted[start:stop]
            _, before = self.renderer.exact(start, stop, out=out)
            torch.sub(out, before, out=change[start:stop])
        if self._scales is not None:
            wanted *= self._scales
            change *= self._scales
        return wanted, change

    def _room(self) -> Tensor:
        """Memory for the weight, used before where there is some."""
        return self.scratch.take(2, self.target.rows, self.target.columns)

    def _matrix(self, weight: Tensor) -> Tensor:
        return self.format.to_matrix(self.packed, weight.reshape(self.packed.shape))

    @property
    def _by_rows(self) -> bool:
        """Whether the rows of the matrix are those of the target, and its chunks made of tiles."""
        same = self.target.rows == self.packed.rows and self.slabs == 1
        return same and type(self.format).to_matrix is Format.to_matrix

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) that are rounded together, several tiles of them: feedback goes by
        narrow blocks of columns, which want to be high. Never of two experts.
        """
        per = self.packed.rows // self.slabs
        for slab in range(self.slabs):
            tiles = _tiles(slab * per, (slab + 1) * per, self.packed.columns)
            for some in (tiles[n : n + TOGETHER] for n in range(0, len(tiles), TOGETHER)):
                yield some[0][0], some[-1][1]

    @property
    def slabs(self) -> int:
        """Matrices stacked in the weight: experts."""
        return self.packed.shape[0] if self.target.lead == 2 else 1

    def codes(
        self,
        start: int,
        stop: int,
        grid: Grid,
        exact: Exact,
        previous: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Codes for rows start:stop; `previous` are those they had, for nearest; out: memory."""
        rows = exact.wanted[start:stop]
        rounding = self.order.rounding
        if rounding == "subspace":
            fed = self._feedback(start, exact, grid)
            if fed.basis.shape[1]:
                return fed.codes(rows, grid, out)
        if rounding == "stochastic":
            random = generator(self.settings.seed, self.target.name, start)
            found = stochastic(rows, grid, random)
        elif rounding == "gptq":
            found = feedback(rows, grid, self._gram_factor(start, exact, grid))
        else:
            found = nearest(rows, grid, previous)
        return found if out is None else out.copy_(found)

    def _feedback(self, start: int, exact: Exact, grid: Grid) -> Subspace:
        """Error feedback in the input directions of the change around row `start`."""
        if self.known_feedback is not None:
            return self.known_feedback
        per = self.packed.rows // self.slabs
        slab = start // per
        if self._found is None or self._found[0] != slab:
            assert exact.change is not None
            basis = directions(exact.change[slab * per : (slab + 1) * per], start)
            self._found = (slab, Subspace.of(basis, grid.group))
        return self._found[1]

    def _gram_factor(self, start: int, exact: Exact, grid: Grid) -> Tensor:
        """What feedback needs of the Gram matrix, with the directions of the change around row
        `start`; one at a time is kept.
        """
        assert self.order.gram is not None
        fed = self._feedback(start, exact, grid)
        if self._factor is None or self._factor[0] is not fed:
            self._factor = (fed, feedback_factor(self.order.gram(), fed.basis))
        return self._factor[1]

    _found: tuple[int, Subspace] | None = None
    _factor: tuple[Subspace, Tensor] | None = None

    @cached_property
    def known_feedback(self) -> Subspace | None:
        """The feedback that holds for every row, for another `Order` of the same weight too."""
        if self.order.feedback is not None:
            return self.order.feedback
        basis = self._from_factors()
        if basis is None:
            return None
        grid, _ = self.format.grid(self.packed, 0, 1)
        return Subspace.of(basis, grid.group)

    def _from_factors(self) -> Tensor | None:
        """The row space of the down factors, when every edit is a LoRA on this orientation."""
        inner: list[Tensor] = []
        if self.slabs > 1 or self.packed.columns != self.target.columns:
            return None
        for edit in self.target.edits:
            module = edit.module
            plain = isinstance(module, LoRA) and module.additive and not edit.transposed
            factors = module.factors() if plain and edit.columns is None else None
            if factors is None or edit.parameter != "weight":
                return None
            inner.append(factors[1].detach())
        return row_space(torch.cat(inner))


def _tiles(start: int, stop: int, columns: int) -> list[tuple[int, int]]:
    return [(start + a, start + b) for a, b in pieces(stop - start, columns, TILE)]


def differs(repacker: Repacker, written: Mapping[str, LazyTensor], *, full: bool) -> str | None:
    """The first rows whose codes in `written` (role -> tensor) are not the ones that this merge
    gives with the scales found there; of the middle chunk, or of all. None when there are none.
    """
    packed = repacker.packed.with_parts(written)
    format = repacker.format
    chunks = list(repacker.chunks())
    chunks = chunks if full else [chunks[len(chunks) // 2]]
    exact = repacker.part(*chunks[0]) if len(chunks) == 1 else repacker.exact(keep_change=False)
    for start, stop in chunks:
        grid, codes = format.grid(packed, start, stop)
        expected = repacker.codes(start, stop, grid, exact, None)
        if not torch.equal(grid.values(expected), grid.values(codes)):
            return f"{start}:{stop}"
    return None
