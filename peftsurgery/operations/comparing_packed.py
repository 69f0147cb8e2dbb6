"""One packed weight against what a merge gives: code by code, and as a strength.

Whoever packs a weight chooses among a few values with scales of his own, and by a rounding of his
own: nearest, at random, or with errors fed forward. So what is asked of F, unpacked, is

    right      |F - W'| <= the step of the grid there, for all but a few elements
    strength   t = <F - W, Δ> / ||Δ||², as precisely as the rounding lets it be known

The step is the distance of the two values of F's grid that W' lies between, or of those around F
where they are further apart; beyond the outermost value, what W' is beyond it comes on top. Where
the base is packed, F may have been made from what was packed there: half a step of the base's grid
comes on top. See `comparing` for t and its error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.operations.apply import TILE, Renderer, Settings, spans
from peftsurgery.operations.comparing import (
    FEW,
    SAME_STRENGTH,
    SLACK,
    TOO_VAGUE,
    Comparison,
    Verdict,
    measured,
)
from peftsurgery.operations.plan import Target
from peftsurgery.quantizers import Grid, Packed, PackedTensor
from peftsurgery.quantizers.grids import pieces

FAR_SHARE = 0.02  # of the elements; so many may be further than a step: errors fed forward do that
FAR_ROW = 0.25  # of the elements of one row
FAR = 24.0  # steps; no rounding takes a value so far


@dataclass
class PackedComparison(Comparison):
    """The same sums; `wrong` counts what is further than a step, `worst` is in steps. far_rows:
    rows of which too many elements are.
    """

    far_rows: int = 0
    noise: float = 0.0  # Σ step² / 12, what rounding to nearest adds
    size: float = 0.0  # ||W'||²

    @property
    def margin(self) -> float:
        """How far the strength found may be from another. The nearest of a few values are shorter
        than what they stand for, by about ||F - W'||² / ||W'||², and the change with them.
        """
        shrinking = self.noise / self.size if self.size > 0 else 0.0
        return max(SAME_STRENGTH, 4 * self.uncertainty, 2 * shrinking)

    @property
    def far(self) -> bool:
        """Whether it lies further off than roundings do."""
        return self.worst > FAR or self.far_rows > 0 or self.wrong > FAR_SHARE * self.elements

    @property
    def verdict(self) -> Verdict:
        """Whether the weight is base + adapters.

        Yes where the strength is the one asked for, or where the values are the nearest ones, which
        keep at least half of the change. Undecided where the rounding hides the strength, has
        swallowed most of the change, or lies further off than roundings do though the strength is
        right.
        """
        if self.worst > FAR or self.far_rows:
            return "no"
        if self.total == 0:
            return "no" if self.far else "yes"
        strength, margin = self.inner / self.total, self.margin
        if margin > TOO_VAGUE:
            other = min(abs(strength - 1), abs(strength - self.survival)) > 2 * margin
            return "no" if other else "undecided"
        if abs(strength - 1) <= margin:
            return "undecided" if self.far else "yes"
        if self.far:
            return "no"
        swallowed = abs(strength - self.survival) <= margin  # what nearest rounding leaves is there
        if swallowed and 2 * self.arrived >= self.moved:
            return "yes" if self.survival >= 0.5 else "undecided"
        if self.survival < 0.5:
            few = swallowed and self.moved < FEW
            lossy = 1 - TOO_VAGUE <= strength < 1  # as errors fed forward are with a small change
            return "undecided" if few or lossy else "no"
        return "no"


def compare_packed(target: Target, packed: Packed, relative_to: str) -> PackedComparison:
    """A weight that is packed in the file against base + adapters. `packed` has the shape of the
    target, up to dimensions of one.
    """
    renderer = Renderer(target, Settings(relative_to, dtype="F32", requant="dequant"))
    wanted, before = (torch.empty(target.rows, target.columns) for _ in range(2))
    for start, stop in spans(target):
        wanted[start:stop], before[start:stop] = renderer.exact(start, stop)
    base, room = target.tensor, None
    if isinstance(base, PackedTensor) and not target.resized:
        room = _half_steps(base.packed)
    return _compared(packed, before, wanted, room)


def compare_untouched(base: Tensor, packed: Packed) -> PackedComparison:
    """A weight that is packed in the file against the base's (fp32), which nothing changes."""
    return _compared(packed, base, base, None)


def _half_steps(packed: Packed) -> Tensor:
    """Half the step of the grid at every weight, in its shape."""
    steps = torch.empty(packed.rows, packed.columns)
    for start, stop in pieces(packed.rows, packed.columns, TILE):
        grid, codes = packed.format.grid(packed, start, stop)
        steps[start:stop] = _around(grid, grid.values(codes))[0] / 2
    return packed.format.to_weight(packed, steps)


def _compared(
    packed: Packed, before: Tensor, exact: Tensor, room: Tensor | None
) -> PackedComparison:
    old, new, more = (
        None if t is None else packed.format.to_matrix(packed, t.reshape(packed.shape))
        for t in (before, exact, room)
    )
    assert old is not None
    assert new is not None
    total = PackedComparison()
    for start, stop in pieces(packed.rows, packed.columns, TILE):
        grid, codes = packed.format.grid(packed, start, stop)
        extra = 0.0 if more is None else more[start:stop]
        total.add(_tile(grid, codes, old[start:stop], new[start:stop], extra))
    return total


def _tile(
    grid: Grid, codes: Tensor, before: Tensor, exact: Tensor, room: Tensor | float
) -> PackedComparison:
    value = grid.values(codes)
    here, beyond = _around(grid, exact)
    step = torch.maximum(here, _around(grid, value)[0])
    allowed = (
        step + beyond + room + SLACK * torch.maximum(exact.abs(), before.abs()).clamp_(min=1e-30)
    )
    rounded = grid.values(grid.nearest(exact)), grid.values(grid.nearest(before))
    found = measured(PackedComparison, before, exact, value, rounded, allowed)
    found.noise = float(here.square().sum(dtype=torch.float64)) / 12
    found.size = float(exact.square().sum(dtype=torch.float64))
    far = (value - exact).abs() > allowed
    found.far_rows = int((far.float().mean(1) > FAR_ROW).sum())
    return found


def _around(grid: Grid, exact: Tensor) -> tuple[Tensor, Tensor]:
    """(distance of the two neighbouring values, how far beyond both) of every element."""
    lower, upper, _ = grid.book.between(grid.units(exact))
    one, other = grid.values(lower), grid.values(upper)
    least, greatest = torch.minimum(one, other), torch.maximum(one, other)
    beyond = torch.maximum(least - exact, exact - greatest).clamp_(min=0)
    return greatest - least, beyond
