"""How far two adapters are apart, and how large one is, without a dense ΔW larger than a tile."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UsageError
from ..linalg import low_rank_difference_norm, low_rank_norm
from .base import WeightAdapter
from .glora import GLoRA
from .hira import HiRA
from .lora import LoRA
from .maps import WeightMap
from .miss import Bat
from .oft import OFT
from .sized import SizedChange
from .slots import bit_equal, fit_shape
from .tokens import Tokens

TILE = 1 << 20  # elements of an fp64 row tile
SAFE = 1e-4  # least ||D||² / terms² at which the fp32 form of a difference is right to a percent
Triple = tuple[float, float, float]


def norm(adapter: WeightAdapter) -> float:
    """||ΔW||_F of an additive adapter, from factors or row tiles in fp64; else UsageError."""
    if not adapter.additive:
        raise UsageError(
            f"norm: the change of a {type(adapter).__name__} depends on the weight; use "
            "merged(weight)."
        )
    return _term_norm(adapter)


def difference(a: WeightAdapter, b: WeightAdapter) -> float:
    """max over weight and bias of ||x_a - x_b||_F / max(||x_a||, ||x_b||): 0 for equal, 1 to 2 for
    unrelated ones.

    Bit-equal adapters are 0 without arithmetic. Weights are compared through their factors in fp64
    (resolution about 1e-8) or by row tiles of fp64; LoRAs further apart than 1e-5 in fp32, to a
    percent. Two DoRA compare their products before the norm, and their magnitudes by
    max|m_a - m_b| / max|m|; two replacements compare values. inf when the two are of kinds that
    only a weight could compare: one additive and one not, another magnitude axis, bias delta
    against bias value, another padding. Maps of the weight (rotations, IA3, GLoRA) are compared by
    what they make of a trial weight, trainable tokens by their values, and changes that do not know
    the weight's shape on that of a trial weight. nan when either holds NaN.
    UsageError when the shapes differ (trailing ones and flattening aside).
    """
    if isinstance(a, Tokens) or isinstance(b, Tokens):
        return _token_difference(a, b)
    if any(isinstance(m, WeightMap | GLoRA | HiRA) for m in (a, b)):
        return _map_difference(a, b)
    if any(isinstance(m, SizedChange) and not m.complete for m in (a, b)):
        a, b = (m.beside(n) if isinstance(m, SizedChange) else m for m, n in ((a, b), (b, a)))
    if not fit_shape(a.shape, b.shape):
        raise UsageError(f"difference: shapes {a.shape} and {b.shape} are not of one weight.")
    if a is b or _identical(a, b):
        return 0.0
    if not _same_kind(a, b):
        return math.inf
    found = [_term_difference(a, b), _relative(a.bias, b.bias)]
    if a.magnitude is not None and b.magnitude is not None:
        x, y = a.magnitude.double(), b.magnitude.double()
        found.append(_ratio(float((x - y).abs().max()), float(x.abs().max()), float(y.abs().max())))
    return math.nan if any(math.isnan(f) for f in found) else max(found)


PROBE = 16  # rows, or columns, of the trial weight where neither map tells how many


def _map_difference(a: WeightAdapter, b: WeightAdapter) -> float:
    """By what both make of one trial weight of independent normal values, in fp64."""
    if _identical(a, b) and (not isinstance(a, WeightMap) or a.same_map(b)):
        return 0.0
    if a.additive or b.additive or a.magnitude is not None or b.magnitude is not None:
        return math.inf
    if a.bias_is_value != b.bias_is_value:
        return math.inf
    shape = _common_shape(a, b)
    trial = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = (m.on(shape)._replacement(trial).detach() - trial for m in (a, b))
    found = [_ratio(float((x - y).norm()), float(x.norm()), float(y.norm()))]
    found.append(_relative(a.bias, b.bias))
    if a.maps_bias or b.maps_bias:
        random = torch.Generator().manual_seed(1)
        bias = torch.randn(shape[a._bias_axis], generator=random)
        mapped = [m.on(shape).with_tensors(bias=None).merged_bias(bias, 1.0) for m in (a, b)]
        found.append(_relative(*(None if m is None else m.detach() - bias for m in mapped)))
    return math.nan if any(math.isnan(f) for f in found) else max(found)


def _token_difference(a: WeightAdapter, b: WeightAdapter) -> float:
    """By the values, row by row; inf when they are not of the same rows."""
    if not (isinstance(a, Tokens) and isinstance(b, Tokens)) or set(a.indices) != set(b.indices):
        return math.inf
    if a.values is None or b.values is None:
        return 0.0
    place = {n: k for k, n in enumerate(b.indices)}
    return _relative(a.values, b.values[[place[n] for n in a.indices]])


def _common_shape(a: WeightAdapter, b: WeightAdapter) -> tuple[int, ...]:
    rows = a.shape[0] or b.shape[0] or PROBE
    tails = [m.shape[1:] for m in (a, b) if len(m.shape) > 1 and all(m.shape[1:])]
    if tails:
        return rows, *max(tails, key=len)
    widths = [
        m.block_size
        for m in (a, b)
        if isinstance(m, Bat) or (isinstance(m, OFT) and m.acts_on == "in")
    ]
    return rows, math.lcm(*widths) if widths else PROBE


def _identical(a: WeightAdapter, b: WeightAdapter) -> bool:
    attributes = ("magnitude_axis", "bias_is_value", "padded_shape")
    if type(a) is not type(b) or any(getattr(a, n) != getattr(b, n) for n in attributes):
        return False
    if isinstance(a, SizedChange) and not (isinstance(b, SizedChange) and a.same_options(b)):
        return False
    names = (*a.fields, "magnitude", "bias")
    return bit_equal(a.scale, b.scale) and all(
        bit_equal(a._parameters[n], b._parameters[n]) for n in names
    )


def _same_kind(a: WeightAdapter, b: WeightAdapter) -> bool:
    if a.additive != b.additive or a.magnitude_axis != b.magnitude_axis:
        return False
    if not a.additive and "set" in (a.algorithm, b.algorithm):
        if a.algorithm != b.algorithm:
            return False
        present = [[t is None for t in (x._parameters["weight"], x.bias)] for x in (a, b)]
        if present[0] != present[1]:
            return False
    if a.bias is not None and b.bias is not None and a.bias_is_value != b.bias_is_value:
        return False
    if (a.bias is None) != (b.bias is None) and (a if b.bias is None else b).bias_is_value:
        return False
    return a.padded_shape == b.padded_shape


def _thin(adapter: WeightAdapter) -> tuple[Tensor, Tensor] | None:
    """fp64 factors, when the Gram matrices of two adapters cost less than their row tiles."""
    factors, inner = adapter._factors(torch.float64), adapter.rank
    if factors is None or inner is None:
        return None
    o, n = adapter.matrix_shape
    wide = 2 * factors[0].shape[1]
    return factors if wide * wide * (o + n) <= o * n * (2 * inner + 10) else None


def _step(adapter: WeightAdapter) -> int:
    return max(1, TILE // adapter.matrix_shape[1])


def _term_norm(adapter: WeightAdapter) -> float:
    if (factors := _thin(adapter)) is not None:
        return low_rank_norm(*factors)
    rows, step = adapter.shape[0], _step(adapter)
    tiles = (adapter._tile(i, min(i + step, rows), torch.float64) for i in range(0, rows, step))
    return math.sqrt(sum(float(t.square().sum()) for t in tiles))


def _term_difference(a: WeightAdapter, b: WeightAdapter) -> float:
    if isinstance(a, LoRA) and isinstance(b, LoRA):
        quick = _fp32_difference(a, b)
        if quick is not None:
            return quick
    first, second = _thin(a), _thin(b)
    if first and second:
        gap = low_rank_difference_norm(*first, *second)
        return _ratio(gap, low_rank_norm(*first), low_rank_norm(*second))
    sums = [0.0, 0.0, 0.0]
    rows, step = a.shape[0], _step(a)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        x, y = a._tile(start, stop, torch.float64), b._tile(start, stop, torch.float64)
        for n, part in enumerate((x - y, x, y)):
            sums[n] += float(part.square().sum())
    return _ratio(*(math.sqrt(s) for s in sums))


def _fp32_difference(a: LoRA, b: LoRA) -> float | None:
    """||D|| / max(||B_a A_a||, ||B_b A_b||) to a percent, with B = up and A = down in fp32.

    D = P A_a + B_b Q for P = B_a - B_b, Q = A_a - A_b: no large products are subtracted, so the
    rounding is relative to D and not to ΔW. None, for fp64 to decide, where that may fail: a result
    below 1e-5, terms of D that cancel, NaN or overflow, a Tucker core, other scales or ranks, fp64.
    """
    if a.mid is not None or b.mid is not None or a.rank != b.rank or float(a.scale) == 0:
        return None
    if float(a.scale) != float(b.scale) or torch.float64 in {t.dtype for t in _factor_pair(a, b)}:
        return None
    up, down, other_up, other_down = (t.detach().float().flatten(1) for t in _factor_pair(a, b))
    gap_up, gap_down = up - other_up, down - other_down
    o, n = a.matrix_shape
    form = _gram_squares if a.rank * (o + n) < o * n else _dense_squares
    squares, terms = form(gap_up, other_up, down, gap_down)
    if squares[0] == 0 and not bool(gap_up.any()) and not bool(gap_down.any()):
        return 0.0  # the same values in another dtype
    if not all(math.isfinite(s) and s > SAFE * t * t for s, t in zip(squares, terms, strict=True)):
        return None
    result = math.sqrt(squares[0] / max(squares[1:]))
    return result if result > 1e-5 else None


def _factor_pair(a: LoRA, b: LoRA) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return a.up, a.down, b.up, b.down


def _gram_squares(p: Tensor, b: Tensor, a: Tensor, q: Tensor) -> tuple[Triple, Triple]:
    """||P A + B Q||², ||(B + P) A||², ||B (A - Q)||² from six r x r Gram matrices, and what bounds
    their terms: Σ_i ||column i|| ||row i||."""
    pp, pb, bb = p.T @ p, p.T @ b, b.T @ b
    aa, aq, qq = a @ a.T, a @ q.T, q @ q.T
    first, second = pp + pb + pb.T + bb, aa - aq - aq.T + qq
    gap = (pp * aa).sum() + 2 * (pb * aq).sum() + (bb * qq).sum()
    squares = (float(gap), float((first * aa).sum()), float((bb * second).sum()))
    edges = [m.diagonal().clamp_min(0).sqrt() for m in (pp, bb, first, aa, qq, second)]
    return squares, _bounds(*edges)


def _dense_squares(p: Tensor, b: Tensor, a: Tensor, q: Tensor) -> tuple[Triple, Triple]:
    """The same from row tiles; cheaper where the rank is near the sides."""
    sums = [0.0, 0.0, 0.0]
    step = max(1, TILE // a.shape[1])
    for start in range(0, b.shape[0], step):
        some_p, some_b = p[start : start + step], b[start : start + step]
        gap = torch.addmm(some_p @ a, some_b, q)
        first = (some_p + some_b) @ a
        for n, part in enumerate((gap, first, first - gap)):
            sums[n] += float(part.square().sum())
    columns = [torch.linalg.vector_norm(m, dim=0) for m in (p, b, b + p)]
    rows = [torch.linalg.vector_norm(m, dim=1) for m in (a, q, a - q)]
    return (sums[0], sums[1], sums[2]), _bounds(*columns, *rows)


def _bounds(p: Tensor, b: Tensor, first: Tensor, a: Tensor, q: Tensor, second: Tensor) -> Triple:
    return float((p * a).sum() + (b * q).sum()), float((first * a).sum()), float((b * second).sum())


def _relative(x: Tensor | None, y: Tensor | None) -> float:
    """A missing bias is zero."""
    if x is None or y is None:
        x, y = (x, y) if x is not None else (y, x)
        if x is None:
            return 0.0
        y = torch.zeros_like(x)
    x, y = x.double(), y.double()
    return _ratio(float((x - y).norm()), float(x.norm()), float(y.norm()))


def _ratio(gap: float, x: float, y: float) -> float:
    if any(math.isnan(v) for v in (gap, x, y)):
        return math.nan
    return gap / max(x, y) if max(x, y) > 0 else 0.0
