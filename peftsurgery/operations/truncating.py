"""One module brought to a lower rank: the optimal truncation, rounded once, and what it lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.algorithms import LoRA, WeightAdapter, difference
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.linalg import (
    Chooser,
    Seen,
    core_svd,
    truncation_gap,
    weighted_core,
)

ROUNDING = 4.0  # units of roundoff that a product of two rounded factors may move by
RESOLUTION = 1e-5  # to which the measured error must agree with the discarded singular values


@dataclass(frozen=True)
class Subject:
    """A module whose rank is to change.

    ΔW = gain · product in norm, and `rebuilt(up, down, scale)` is the module with product = up @
    down · scale; `scale` is what it has now.
    """

    path: str
    module: WeightAdapter  # as it was read
    product: WeightAdapter  # additive, scale 1, without magnitude
    rebuilt: Callable[[Tensor, Tensor, float], WeightAdapter]
    scale: float
    gain: float  # ||ΔW||_F / ||product||_F
    dtype: torch.dtype  # of the factors written
    convolution: bool  # kernel larger than 1
    exact: bool  # a LoRA already: nothing changes when its rank does not
    gram: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i·k) of the matrix that is truncated."""
        return self.product.matrix_shape

    @property
    def cost(self) -> int:
        """Bytes that one more rank takes in the file."""
        return sum(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Resized:
    """A module at its new rank, its factors rounded to their dtype."""

    module: WeightAdapter
    old_rank: int | None
    rank: int
    norm: float  # ||ΔW||_F before
    energy: float  # share of ||ΔW||² that the kept singular values hold
    spectral: float  # ||error||_2 / ||ΔW||_2 of the truncation
    frobenius: float  # ||ΔW - what is written||_F / ||ΔW||_F, measured
    weighted: float | None = None  # the same behind G^½, of the truncation


def spectrum(subject: Subject, device: str = "cpu") -> Tensor:
    """Singular values of ΔW (of ΔW G^½ with a Gram matrix), descending, fp64."""
    seen = Seen()
    if subject.gram is None:
        _on(subject.product, device).svd(seen)
    else:
        up, down = _factors(_on(subject.product, device))
        seen.spectrum = weighted_core(up, down, _gram(subject, device), seen)[2].cpu()
    return seen.spectrum * subject.gain


def resize(
    subject: Subject, rule: Chooser, *, pad: int | None = None, device: str = "cpu"
) -> Resized:
    """The module at the rank the rule chooses; with `pad`, filled up to that rank with zeros.

    A LoRA that keeps its rank keeps its factors bit for bit. CheckFailed when the numbers to be
    written are not as near to ΔW as the discarded singular values say, or when their dtype loses
    them.
    """
    product = _on(subject.product, device)
    factors = product.factors() if isinstance(product, LoRA) else None
    try:
        cut = _cut(subject, product, factors, rule, device)
    except UsageError as error:
        raise UsageError(f"{subject.path}: {error}") from error
    old, square = subject.module.rank, float(cut.values.square().sum())
    norm = subject.gain * math.sqrt(square)
    if subject.exact and old is not None and old <= cut.rank:
        weighted = None if cut.weighted is None else 0.0
        same = _padded(subject.module, pad)
        return Resized(same, old, max(old, pad or 0), norm, 1.0, 0.0, 0.0, weighted)
    root = cut.s.sqrt()
    up, down, shift = _rounded(subject, (cut.u * root).cpu(), (root[:, None] * cut.vh).cpu())
    gap = _measured(product, factors, up.to(device), down.to(device), shift, square)
    tail = math.sqrt(cut.tail / square) if square else 0.0
    if not gap <= tail + ROUNDING * torch.finfo(subject.dtype).eps + RESOLUTION:
        raise CheckFailed(
            f"{subject.path}: at rank {cut.rank} the factors are {gap:.3g} from ΔW, and the "
            f"discarded singular values are {tail:.3g}. Nothing was written."
        )
    up, down = _columns(up, pad), _columns(down.T, pad).T.contiguous()
    return Resized(
        subject.rebuilt(up, down, subject.scale * shift),
        old,
        max(cut.rank, pad or 0),
        norm,
        1.0 - tail * tail,
        _spectral(product, cut),
        gap,
        cut.weighted,
    )


@dataclass(frozen=True)
class Cut:
    """The kept part of a product, U (o, k), S (k,), Vh (k, n)."""

    u: Tensor
    s: Tensor
    vh: Tensor
    values: Tensor  # all singular values of the product, fp64
    weighted: float | None  # relative error behind G^½, where a Gram matrix chose the subspace

    @property
    def rank(self) -> int:
        """k"""
        return self.s.numel()

    @property
    def tail(self) -> float:
        """||error||_F²: the discarded singular values; or, as the kept part is a projection of the
        product in any case, the difference of the squares."""
        if self.weighted is None:
            return float(self.values[self.rank :].square().sum())
        return max(float(self.values.square().sum() - self.s.double().square().sum()), 0.0)


def _cut(
    subject: Subject,
    product: WeightAdapter,
    factors: tuple[Tensor, Tensor] | None,
    rule: Chooser,
    device: str,
) -> Cut:
    seen = Seen(rule)
    if subject.gram is None:
        u, s, vh = product.svd(seen) if factors is None else core_svd(*factors, seen)
        return Cut(u, s, vh, seen.spectrum, None)
    up, down = _factors(product)
    left, right, values = weighted_core(up, down, _gram(subject, device), seen)
    u, s, vh = core_svd(left, right)
    plain = Seen()
    product.svd(plain)
    total = float(values.square().sum())
    lost = float(values[left.shape[1] :].square().sum())
    return Cut(u, s, vh, plain.spectrum, math.sqrt(lost / total) if total else 0.0)


def _on(product: WeightAdapter, device: str) -> WeightAdapter:
    if device == "cpu":
        return product
    return product.with_tensors(**{n: t.to(device) for n, t in product.tensors().items()})


def _gram(subject: Subject, device: str) -> Tensor:
    assert subject.gram is not None
    return subject.gram().to(device)


def _factors(product: WeightAdapter) -> tuple[Tensor, Tensor]:
    """Factors of ΔW, or ΔW itself beside a unit matrix."""
    found = product.factors()
    if found is not None:
        return found
    dense = product.delta().flatten(1)
    return torch.eye(dense.shape[0], device=dense.device), dense


def _spectral(product: WeightAdapter, cut: Cut) -> float:
    """||error||_2 / ||ΔW||_2"""
    top = float(cut.values[0])
    if top == 0:
        return 0.0
    if cut.weighted is None:
        return float(cut.values[cut.rank] / top) if cut.rank < cut.values.numel() else 0.0
    up, down = _factors(product)
    gap = Seen()
    core_svd(torch.cat([up, -cut.u * cut.s], 1), torch.cat([down, cut.vh]), gap)
    return float(gap.spectrum[0] / top)


def _measured(
    product: WeightAdapter,
    factors: tuple[Tensor, Tensor] | None,
    up: Tensor,
    down: Tensor,
    shift: float,
    square: float,
) -> float:
    """||product - up @ down · shift||_F / ||product||_F of the numbers that will be written."""
    if square == 0:
        return 0.0
    if factors is not None:
        return truncation_gap(square, *factors, up.float() * shift, down) / math.sqrt(square)
    return difference(product, LoRA(up, down, scale=shift))


def _rounded(subject: Subject, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, float]:
    """(up, down, shift) in the dtype to be written, up @ down · shift as before to its rounding.

    Balanced factors, √S on each side, fit fp16 nearly always. Where entries would leave its range,
    a power of two moves between the factors and the scale. CheckFailed when that does not help.
    """
    if subject.dtype == torch.float32:
        return up, down, 1.0
    tolerance = ROUNDING * torch.finfo(subject.dtype).eps
    low = up.to(subject.dtype), down.to(subject.dtype)
    if _lost(up, down, *low) <= tolerance:
        return (*low, 1.0)
    powers = [-math.frexp(float(t.abs().max()))[1] for t in (up, down)]
    raised = [torch.ldexp(t, torch.tensor(p)) for t, p in zip((up, down), powers, strict=True)]
    low = raised[0].to(subject.dtype), raised[1].to(subject.dtype)
    shift = math.ldexp(1.0, -sum(powers))
    lost = _lost(raised[0], raised[1], *low)
    if not lost <= tolerance:
        raise CheckFailed(
            f"{subject.path}: {subject.dtype} factors of ΔW would be off by {lost:.3g} of it. "
            "--dtype fp32 keeps it."
        )
    return (*low, shift)


def _lost(up: Tensor, down: Tensor, low_up: Tensor, low_down: Tensor) -> float:
    """An upper bound of ||up down - low_up low_down||_F / ||up down||_F for factors whose
    columns, and rows, are orthogonal: with e and f the errors of column i and row i, the three
    terms of the difference are at most sqrt(Σ ||e||² ||down_i||²), sqrt(Σ ||up_i||² ||f||²) and
    Σ ||e|| ||f||. NaN or Inf where something overflowed.
    """
    columns, rows = torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)
    columns, rows = columns.double(), rows.double()
    e = torch.linalg.vector_norm(up - low_up.float(), dim=0)
    f = torch.linalg.vector_norm(down - low_down.float(), dim=1)
    total = torch.linalg.vector_norm(columns * rows)
    terms = (
        torch.linalg.vector_norm(e * rows) + torch.linalg.vector_norm(columns * f) + (e * f).sum()
    )
    return float(terms / total) if bool(total != 0) else float(terms)


def _columns(matrix: Tensor, wanted: int | None) -> Tensor:
    missing = 0 if wanted is None else wanted - matrix.shape[1]
    if missing <= 0:
        return matrix
    return torch.cat([matrix, matrix.new_zeros(matrix.shape[0], missing)], 1)


def _padded(module: WeightAdapter, pad: int | None) -> WeightAdapter:
    """A LoRA with zero rank indices appended; its own values stay bit for bit."""
    rank = module.rank
    if pad is None or rank is None or rank >= pad:
        return module
    up, down = (module.tensors()[name].detach() for name in ("up", "down"))
    zeros_up = up.new_zeros(up.shape[0], pad - rank, *up.shape[2:])
    zeros_down = down.new_zeros(pad - rank, *down.shape[1:])
    return module.with_tensors(
        up=torch.cat([up, zeros_up], 1), down=torch.cat([down, zeros_down], 0)
    )
