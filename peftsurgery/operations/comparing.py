"""One merged weight against what the merge gives: element by element, and as a strength.

With W the base, W' the exact result in fp32, Δ = W' - W and F what a file holds:

    right      |F - W'| <= Σ ulp(max(|W_k-1|, |W_k|, |W_k - W_k-1|))
                           + 2^-20 max(|W|, |W'|, |Δ| of the row)
    strength   t = <F - W, Δ> / ||Δ||², 1 when the adapters were merged at the strength asked for
    its error  sqrt(Σ (F - W - tΔ)² Δ²) / ||Δ||²

The sum runs over the adapters, W_k being the exact result of the first k, and ulp is that of the
file's number type: a tool that rounds every ΔW before it adds it, and the sum again, is off by half
a unit of each. The other term is for fp32 sums in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from peftsurgery.checkpoint.dtypes import torch_dtype

Verdict: TypeAlias = Literal["yes", "no", "undecided"]

# number type -> bits behind the point; fp64 is compared as fp32, in which the merge is computed
MANTISSA = {"F64": 23, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
SLACK = 2.0**-20  # of fp32 sums
SAME_STRENGTH = 0.01  # strengths closer than this are not told apart by projection
TOO_VAGUE = 0.25  # a strength known no better than this tells nothing
FEW = 16  # elements; fewer that moved are no evidence


@dataclass
class Comparison:
    """Sums over the elements of one weight, or of several."""

    elements: int = 0
    differing: int = 0  # not the nearest rounding of W'
    wrong: int = 0  # further than the tolerance
    worst: float = 0.0  # largest |F - W'| in units of the tolerance
    moved: int = 0  # rounding W' gives another value than rounding W
    arrived: int = 0  # of those, how many hold the rounding of W'
    inner: float = 0.0  # <F - W, Δ>
    kept: float = 0.0  # <round(W') - W, Δ>
    total: float = 0.0  # ||Δ||²
    change: float = 0.0  # ||F - W||²
    second: float = 0.0  # Σ E² Δ², E = F - W'
    third: float = 0.0  # Σ E Δ³
    fourth: float = 0.0  # Σ Δ⁴

    @property
    def strength(self) -> float | None:
        """t, in units of the strength asked for; None when the adapters change nothing here."""
        return self.inner / self.total if self.total > 0 else None

    @property
    def uncertainty(self) -> float:
        """Standard error of `strength` from rounding."""
        if self.total <= 0:
            return math.inf
        off = self.inner / self.total - 1  # F - W - tΔ = E - (t - 1) Δ
        noise = self.second - 2 * off * self.third + off * off * self.fourth
        return math.sqrt(max(0.0, noise)) / self.total

    @property
    def survival(self) -> float:
        """The strength that rounding to nearest leaves of 1."""
        return self.kept / self.total if self.total > 0 else 1.0

    @property
    def unexplained(self) -> float:
        """||F - W - tΔ|| / ||Δ||: what no strength accounts for."""
        if self.total <= 0:
            return math.inf if self.change > 0 else 0.0
        rest = max(0.0, self.change - self.inner**2 / self.total)
        return math.sqrt(rest / self.total)

    @property
    def verdict(self) -> Verdict:
        """Whether the weight is base + adapters.

        All elements must be right, and the change must be there: at the strength asked for, or at
        the one that rounding leaves of it. Where rounding swallows most of the change, those
        elements decide that it still moves.
        """
        if self.wrong:
            return "no"
        if self.total == 0:
            return "yes"
        if self.differing == 0:
            return "yes" if self.moved else "undecided"
        strength, margin = self.inner / self.total, max(SAME_STRENGTH, 4 * self.uncertainty)
        if margin > TOO_VAGUE:
            return "undecided"
        if abs(strength - 1) <= margin:
            return "yes"
        if self.survival < 0.5:
            if self.moved < FEW:
                return "undecided"
            if 2 * self.arrived >= self.moved and abs(strength - self.survival) <= margin:
                return "yes"
            return "no" if self.arrived == 0 else "undecided"
        return "yes" if abs(strength - self.survival) <= margin else "no"

    def add(self, other: Comparison) -> None:
        """Accumulate another sum."""
        self.worst = max(self.worst, other.worst)
        for name in vars(self):
            if name != "worst":
                setattr(self, name, getattr(self, name) + getattr(other, name))


ComparisonType = TypeVar("ComparisonType", bound=Comparison)


def compare(stages: Sequence[Tensor], found: Tensor, dtype: str) -> Comparison:
    """Compare rows of a file with W_0 = W, W_1, …, W_n = W' = `stages`, all (rows, columns).

    found: in its own number type `dtype`, a key of MANTISSA.
    """
    kind = torch_dtype(dtype)
    before, exact = stages[0], stages[-1]
    nearest, unmoved = exact.to(kind), before.to(kind)
    delta = exact - before
    value = found.float()
    allowed = SLACK * torch.maximum(exact.abs(), before.abs()).maximum(
        delta.abs().amax(dim=1, keepdim=True)
    )
    for first, second in pairwise(stages):
        allowed += ulp(
            torch.maximum(first.abs(), second.abs()).maximum((second - first).abs()), dtype
        )
    return measured(Comparison, before, exact, value, (nearest, unmoved), allowed)


def measured(
    kind: type[ComparisonType],
    before: Tensor,
    exact: Tensor,
    value: Tensor,
    rounded: tuple[Tensor, Tensor],
    allowed: Tensor,
) -> ComparisonType:
    """The sums over some rows. rounded: the nearest values to `exact` and to `before`; allowed: the
    tolerance. All (rows, columns) and fp32, but for `rounded`, which may be in its number type.
    """
    nearest, unmoved = rounded
    delta, error = exact - before, value - exact
    ratio = (error.abs() / allowed).nan_to_num(math.inf, math.inf)
    right = value == nearest
    moved = nearest != unmoved
    change = (value - before).nan_to_num(0.0, 0.0, 0.0).double()
    delta, error = delta.double(), error.nan_to_num(0.0, 0.0, 0.0).double()
    return kind(
        exact.numel(),
        int((~right).sum()),
        int((ratio > 1).sum()),
        float(ratio.max()) if ratio.numel() else 0.0,
        int(moved.sum()),
        int((moved & right).sum()),
        float((change * delta).sum()),
        float(((nearest.float() - before).double() * delta).sum()),
        float((delta * delta).sum()),
        float((change * change).sum()),
        float((error * delta).square().sum()),
        float((error * delta * delta.square()).sum()),
        float(delta.square().square().sum()),
    )


def ulp(value: Tensor, dtype: str) -> Tensor:
    """Distance of neighbouring numbers of `dtype` at |value| (fp32): 2^(floor(log2 |value|) - p), p
    its mantissa bits.

    Never below the smallest subnormal number of the type.
    """
    kind = torch.float32 if dtype == "F64" else torch_dtype(dtype)
    assert kind is not None
    limits = torch.finfo(kind)
    _, exponent = torch.frexp(value)  # value = m 2^e, m in [1/2, 1)
    step = torch.ldexp((value != 0).float(), exponent - 1 - MANTISSA[dtype])
    return step.clamp_(min=max(limits.smallest_normal * limits.eps, 2.0**-149))
