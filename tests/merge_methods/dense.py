"""Merge methods written out on dense fp64 matrices, from the papers and from mergekit's formulas.

mergekit: sparsify.py (magnitude, magnitude_outliers, della_magprune),
generalized_task_arithmetic.py (get_mask, the sums), sce.py, slerp.py, karcher.py. Nothing of the
package is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def top(delta: Tensor, count: int) -> Tensor:
    """`delta` with its `count` largest magnitudes, the rest zero."""
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.abs().flatten().topk(count).indices] = True
    return delta * mask.reshape(delta.shape)


def band(delta: Tensor, density: float, gamma: float) -> Tensor:
    """mergekit's magnitude_outliers, right for gamma = 0 too."""
    n = delta.numel()
    kept, upper = int(density * n), int(gamma * n)
    lower = n - kept - upper
    if lower < 0:
        upper, lower = upper + lower, 0
    order = delta.abs().flatten().argsort()
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[lower : n - upper]] = True
    return delta * mask.reshape(delta.shape)


def keep_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """mergekit's della_magprune: by the rank of the magnitude in its row."""
    ranks = delta.abs().argsort(1).argsort(1).double()
    return (density - epsilon) + ranks / (delta.shape[1] - 1) * 2 * epsilon


def elected(
    deltas: Sequence[Tensor], weights: Sequence[float], mode: str, normalize: bool
) -> Tensor:
    """mergekit's get_mask and weighted mean; weights > 0."""
    stack = torch.stack(list(deltas))
    w = torch.tensor(list(weights), dtype=stack.dtype).reshape(-1, 1, 1)
    weighted = stack * w
    sign = weighted.sign()
    votes = weighted.sum(0) if mode == "total" else sign.sum(0)
    majority = (votes >= 0).to(stack.dtype) * 2 - 1
    mask = sign == majority
    result = (weighted * mask).sum(0)
    if normalize:
        divisor = (w * mask).sum(0)
        divisor[divisor == 0] = 1
        result = result / divisor
    return result


def summed(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool = False) -> Tensor:
    """Σ w_i Δ_i, over Σ w_i when asked."""
    result = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)]).sum(0)
    return result / sum(weights) if normalize else result


def sce(deltas: Sequence[Tensor], density: float) -> Tensor:
    """mergekit's sce."""
    stack = torch.stack(list(deltas))
    if density < 1:
        variance = stack.var(0, unbiased=False)
        count = int(int((variance != 0).sum()) * density)
        mask = torch.zeros(variance.numel(), dtype=torch.bool)
        mask[variance.flatten().topk(count).indices] = True
        stack = stack * mask.reshape(variance.shape)
    sign = stack.sign()
    majority = (stack.sum(0) >= 0).to(stack.dtype) * 2 - 1
    energy = stack.square().mean((1, 2))
    weights = (energy / energy.sum()).reshape(-1, 1, 1) * (sign == majority)
    return (stack * weights).sum(0) / weights.sum(0).clamp_min(1e-6)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """mergekit's slerp."""
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    theta = math.acos(cosine)
    turned = theta * t
    first = math.sin(theta - turned) / math.sin(theta)
    return first * a + math.sin(turned) / math.sin(theta) * b


def karcher(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """mergekit's karcher in the space of matrices, run until it stands."""
    total = sum(weights)
    alphas = [w / total for w in weights]
    norms = [float(d.norm()) for d in deltas]
    units = [d / n for d, n in zip(deltas, norms, strict=True)]
    point = summed(units, alphas)
    point = point / point.norm()
    for _ in range(500):
        tangent = torch.zeros_like(point)
        for alpha, unit in zip(alphas, units, strict=True):
            cosine = float((unit * point).sum().clamp(-1, 1))
            theta = math.acos(cosine)
            if theta > 1e-9:
                tangent += alpha * theta / math.sin(theta) * (unit - cosine * point)
        step = float(tangent.norm())
        if step < 1e-13:
            break
        point = math.cos(step) * point + math.sin(step) / step * tangent
        point = point / point.norm()
    return sum(a * n for a, n in zip(alphas, norms, strict=True)) * point
