"""Methods whose result is a weighted sum with numbers found from inner products alone.

They stay exact on factors: Σ c_i U_i V_i is the concatenation of the c_i U_i and of the V_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import NORMALIZE, SCALE, Chosen, Coefficients

PARALLEL = 0.9995  # cosine above which slerp is the straight line, as in mergekit (slerp.py)
TOLERANCE = 1e-12  # length of the last step of the Karcher mean
MOST_STEPS = 1000


def linear(
    gram: Tensor, weights: Sequence[float], total: float, options: Chosen
) -> Sequence[float]:
    """ΔW = λ Σ w_i ΔW_i, divided by Σ w_i with `normalize`.

    Task arithmetic (Ilharco et al. 2022, arXiv 2212.04089). PEFT's "linear" is another thing: it
    adds the factors, √(w_i s_i) A_i and √(w_i s_i) B_i, whose product has cross terms B_i A_j; its
    "cat" is this method.
    """
    divisor = total if options.flag("normalize") and abs(total) > 1e-8 else 1.0
    return [options.number("scale") * w / divisor for w in weights]


def slerp(gram: Tensor, weights: Sequence[float], total: float, options: Chosen) -> Sequence[float]:
    """Spherical interpolation of two changes at t = w_2 / (w_1 + w_2), θ their angle:

        ΔW = λ ( sin((1-t)θ) / sin θ · ΔW_1  +  sin(tθ) / sin θ · ΔW_2 )

    Shoemake 1985; on weights of models as mergekit does it (slerp.py). The straight line where
    |cos θ| > 0.9995, or one of the two is zero or absent.
    """
    scale = options.number("scale")
    if len(weights) == 1:
        return [scale * weights[0] / total]
    norms = gram.diagonal().clamp_min(0).sqrt()
    t = weights[1] / total
    length = float(norms[0] * norms[1])
    cosine = float(gram[0, 1]) / length if length > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return [scale * (1 - t), scale * t]
    theta = math.acos(cosine)
    return [scale * math.sin(x * theta) / math.sin(theta) for x in (1 - t, t)]


def karcher(
    gram: Tensor, weights: Sequence[float], total: float, options: Chosen
) -> Sequence[float]:
    """ΔW = λ (Σ α_i ||ΔW_i||) u, α_i = w_i / Σ w_j, and u the mean on the sphere of the directions
    x_i = ΔW_i / ||ΔW_i||:

        u ← exp_u( Σ α_i log_u(x_i) ),  log_u(x) = θ / sin θ (x - cos θ u),  θ = arccos <u, x>

    Riemannian centre of mass (Karcher 1977); for models in mergekit (karcher.py). u stays in the
    span of the x_i, so only their coefficients are iterated, in fp64, to a step of 1e-12. Zero and
    absent changes have no direction, and count with length 0 (mergekit leaves them out of the mean
    of the lengths too).
    """
    scale = options.number("scale")
    norms = gram.diagonal().clamp_min(0).sqrt()
    shares = torch.tensor(list(weights), dtype=torch.float64) / total
    alpha = shares * (norms > 0)
    if float(alpha.sum()) <= 0:
        return [0.0] * len(weights)
    alpha /= alpha.sum()
    safe = torch.where(norms > 0, norms, 1.0)
    cosines = gram / torch.outer(safe, safe)
    point = _unit(alpha.clone(), cosines)
    if point is None:  # the directions cancel: start at the first of them
        point = torch.zeros_like(alpha)
        point[int(alpha.argmax())] = 1.0
    for _ in range(MOST_STEPS):
        inner = (cosines @ point).clamp(-1, 1)
        theta = inner.arccos()
        sine = theta.sin()
        stretch = torch.where(sine > 1e-12, theta / sine.clamp_min(1e-12), 1.0)
        tangent = alpha * stretch - (alpha * stretch * inner).sum() * point
        step = math.sqrt(max(float(tangent @ cosines @ tangent), 0.0))
        if step < TOLERANCE:
            break
        moved = _unit(math.cos(step) * point + math.sin(step) / step * tangent, cosines)
        if moved is None:
            break
        point = moved
    size = float((shares * norms).sum())
    return (scale * size * point / safe).tolist()


def _unit(coefficients: Tensor, cosines: Tensor) -> Tensor | None:
    """Coefficients of the point of length 1, None when the length vanishes."""
    square = float(coefficients @ cosines @ coefficients)
    return coefficients / math.sqrt(square) if square > 1e-12 else None


LINEAR = Coefficients("linear", (SCALE, NORMALIZE), run=linear)
SLERP = Coefficients("slerp", (SCALE,), exactly=2, positive=True, run=slerp)
KARCHER = Coefficients("karcher", (SCALE,), positive=True, run=karcher)
