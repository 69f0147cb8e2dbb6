"""One packed weight with its change, packed again: exact values, the directions that matter,
codes, and what survived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftsurgery.algorithms import LoRA
from peftsurgery.checkpoint import LazyTensor
from peftsurgery.errors import CheckFailed
from peftsurgery.operations.apply import TILE, Renderer, Scratch, Settings, spans
from peftsurgery.operations.plan import Target
from peftsurgery.operations.rounding import Survival, generator
from peftsurgery.quantizers import Grid, Packed, PackedTensor, nearest
from peftsurgery.quantizers.rounding import feedback, feedback_factor, stochastic, subspace

DIRECTIONS = 64  # input directions of a change whose factors are not at hand
SAFE = 1e-6  # of the largest: directions below are noise of the factors


@dataclass(frozen=True)
class Order:
    """How one packed weight is to be rounded, and from what."""

    rounding: str  # nearest, stochastic, subspace or gptq
    gram: Callable[[], Tensor] | None = None  # (columns, columns), for gptq
    original: LazyTensor | None = None  # the unquantized weight; None: the packed one


@dataclass(frozen=True)
class Repacked:
    """The parts of a weight as they will be stored, what survived, and, where it was asked for,
    what rounding took (wanted - written) and the change, in the shape of the weight.
    """

    parts: dict[str, Tensor]
    survival: Survival
    lost: Tensor | None = None
    change: Tensor | None = None


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
        self.renderer = Renderer(source, settings, scratch)

    def whole(self, *, keep_lost: bool = False) -> Repacked:
        """Every row. Raises CheckFailed when the merge gives NaN or infinity."""
        matrix, change = self.matrices()
        if not bool(torch.isfinite(matrix).all()):
            raise CheckFailed(
                f"{self.target.name!r}: the merge gives NaN or Inf; nothing was kept. Look at "
                "the adapters with inspect --norms."
            )
        grid, parts = self.format.fit(self.packed, matrix)
        old, previous = self.format.grid(self.packed, 0, self.packed.rows)
        codes = torch.empty_like(previous)  # the former may lie in the file's own pages
        total = Survival()
        lost = torch.empty_like(matrix) if keep_lost else None
        for start, stop in self.chunks():
            rows = slice(start, stop)
            before = old.rows(start, stop).values(previous[rows])
            chosen = self.codes(start, grid.rows(start, stop), matrix, change, previous[rows])
            written = grid.rows(start, stop).values(chosen)
            total.add(survival(matrix[rows], change[rows], before, written))
            codes[rows] = chosen
            if lost is not None:
                torch.sub(matrix[rows], written, out=lost[rows])
        parts |= self.format.pack(self.packed, codes)
        if lost is None:
            return Repacked(parts, total)
        return Repacked(parts, total, *(self._weight(tensor) for tensor in (lost, change)))

    def _weight(self, matrix: Tensor) -> Tensor:
        return self.format.to_weight(self.packed, matrix)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """`matrices`, of which at least rows start:stop are filled in."""
        target = self.target
        if self._factored is None or target.rows != self.packed.rows:
            return self.matrices()
        return self._filled(tile for tile in spans(target) if tile[0] < stop and tile[1] > start)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The wanted weight and its change, (rows, columns) fp32 as the format rounds them."""
        both = (t.reshape(self.packed.shape) for t in self._filled(spans(self.target)))
        first, second = (self.format.to_matrix(self.packed, tensor) for tensor in both)
        return first, second

    def _filled(self, tiles: Iterable[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        wanted, change = (torch.empty(self.target.rows, self.target.columns) for _ in range(2))
        for start, stop in tiles:
            exact, before = self.renderer.exact(start, stop)
            wanted[start:stop] = exact
            torch.sub(exact, before, out=change[start:stop])
        return wanted, change

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) that are rounded together; never of two experts."""
        per = self.packed.rows // self.slabs
        step = max(1, TILE // max(1, self.packed.columns))
        for slab in range(self.slabs):
            for start in range(slab * per, (slab + 1) * per, step):
                yield start, min(start + step, (slab + 1) * per)

    @property
    def slabs(self) -> int:
        """Matrices stacked in the weight: experts."""
        return self.packed.shape[0] if self.target.lead == 2 else 1

    def codes(
        self, start: int, grid: Grid, matrix: Tensor, change: Tensor, previous: Tensor
    ) -> Tensor:
        """Codes for the rows of `previous`, which begin at row `start` of `matrix`."""
        rows = matrix[start : start + len(previous)]
        rounding = self.order.rounding
        if rounding == "stochastic":
            random = generator(self.settings.seed, self.target.name, start)
            return stochastic(rows, grid, random)
        if rounding == "gptq":
            return feedback(rows, grid, self._gram_factor(start, change))
        if rounding == "subspace":
            basis = self.basis(start, change)
            if basis.shape[1]:
                return subspace(rows, grid, basis)
        return nearest(rows, grid, previous)

    def basis(self, start: int, change: Tensor) -> Tensor:
        """Orthonormal input directions (columns, r) of the change around row `start`."""
        if self._factored is not None:
            return self._factored
        per = self.packed.rows // self.slabs
        slab = start // per
        if self._found is None or self._found[0] != slab:
            self._found = (slab, directions(change[slab * per : (slab + 1) * per], start))
        return self._found[1]

    def _gram_factor(self, start: int, change: Tensor) -> Tensor:
        """What feedback needs of the Gram matrix, with the directions of the change around row
        `start`; one at a time is kept.
        """
        assert self.order.gram is not None
        basis = self.basis(start, change)
        if self._factor is None or self._factor[0] is not basis:
            self._factor = (basis, feedback_factor(self.order.gram(), basis))
        return self._factor[1]

    _found: tuple[int, Tensor] | None = None
    _factor: tuple[Tensor, Tensor] | None = None

    @property
    def _factored(self) -> Tensor | None:
        if not hasattr(self, "_inner"):
            self._inner = self._from_factors()
        return self._inner

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
        rows = torch.cat(inner)
        if len(rows) > min(DIRECTIONS * 4, rows.shape[1] // 2):
            return None
        _, sizes, right = torch.linalg.svd(rows.double(), full_matrices=False)
        return right[sizes > SAFE * sizes[0]].T.float().contiguous()


def directions(change: Tensor, seed: int, count: int = DIRECTIONS) -> Tensor:
    """Orthonormal input directions (columns, r) that hold most of a change (rows, columns): the
    range of Δᵀ Δ Ω, Ω Gaussian (Halko et al. 2011, arXiv:0909.4061).
    """
    count = min(count, *change.shape)
    random = torch.Generator().manual_seed(seed)
    probe = torch.randn(change.shape[1], count, generator=random)
    found = change.T @ (change @ probe)
    if not bool(found.any()):
        return found[:, :0]
    left, sizes, _ = torch.linalg.svd(found.double(), full_matrices=False)
    return left[:, sizes > SAFE * sizes[0]].float().contiguous()


def survival(wanted: Tensor, change: Tensor, before: Tensor, written: Tensor) -> Survival:
    """kept = <written - before, Δ>, error = ‖written - wanted‖²; `before` is what the packed base
    stands for, whatever Δ was added to.
    """
    delta = change.reshape(-1)
    kept = float(torch.dot((written - before).reshape(-1), delta))
    error = (written - wanted).reshape(-1)
    return Survival(kept, float(torch.dot(delta, delta)), float(torch.dot(error, error)))


def differs(repacker: Repacker, written: Mapping[str, LazyTensor], *, full: bool) -> str | None:
    """The first rows whose codes in `written` (role -> tensor) are not the ones that this merge
    gives with the scales found there; of the middle chunk, or of all. None when there are none.
    """
    packed = repacker.packed.with_parts(written)
    format = repacker.format
    chunks = list(repacker.chunks())
    chunks = chunks if full else [chunks[len(chunks) // 2]]
    matrix, change = repacker.part(*chunks[0]) if len(chunks) == 1 else repacker.matrices()
    for start, stop in chunks:
        grid, codes = format.grid(packed, start, stop)
        previous = format.grid(repacker.packed, start, stop)[1]
        expected = repacker.codes(start, grid, matrix, change, previous)
        if not torch.equal(grid.values(expected), grid.values(codes)):
            return f"{start}:{stop}"
    return None
