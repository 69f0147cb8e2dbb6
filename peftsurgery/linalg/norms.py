"""Frobenius norms of products and of their differences, from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def low_rank_norm(up: Tensor, down: Tensor, *, rough: bool = False) -> float:
    """||up @ down||_F = sqrt(Σ (upᵀup) ⊙ (down downᵀ)), fp64.

    rough: the Gram matrices in fp32, enough for five digits unless the terms cancel.
    """
    if rough:
        u, v = up.float(), down.float()
        left, right = u.T @ u, v @ v.T
        square = float((left * right).sum(dtype=torch.float64))
        terms = float((left.diagonal() * right.diagonal()).sum(dtype=torch.float64))
        if square > 0.1 * terms:
            return math.sqrt(square)
    u, v = up.double(), down.double()
    return math.sqrt(max(float(((u.T @ u) * (v @ v.T)).sum()), 0.0))


def low_rank_sum_norm(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """||Σ_i U_i V_i||_F = sqrt(Σ_ij <U_iᵀU_j, V_i V_jᵀ>) of fp32 factors, each pair of blocks once;
    to five digits, in fp64 where the terms cancel. 0 for no pairs.
    """
    square = terms = 0.0
    for i, (u, v) in enumerate(pairs):
        for x, y in pairs[: i + 1]:
            left, right = u.T @ x, v @ y.T
            inner = float((left * right).sum(dtype=torch.float64))
            square += inner if x is u else 2 * inner
            if x is u:
                terms += float((left.diagonal() * right.diagonal()).sum(dtype=torch.float64))
    if not square <= 0.1 * terms:
        return math.sqrt(square)
    if terms == 0:
        return 0.0
    return low_rank_norm(torch.cat([u for u, _ in pairs], 1), torch.cat([v for _, v in pairs], 0))


def low_rank_difference_norm(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> float:
    """||up1 down1 - up2 down2||_F without the dense matrices; accurate to about 1e-8 of what does
    not cancel.

    Equal shapes use (up1 - up2) down1 + up2 (down1 - down2), where nothing large cancels for
    neighbours. The Gram form is taken when its result is well above its own rounding, otherwise the
    R factors of two QR decompositions, whose error is 1e-15 of the terms.
    """
    u1, v1, u2, v2 = up1.double(), down1.double(), up2.double(), down2.double()
    if u1.shape == u2.shape and v1.shape == v2.shape:
        left, right = torch.cat([u1 - u2, u2], 1), torch.cat([v1, v1 - v2], 0)
    else:
        left, right = torch.cat([u1, -u2], 1), torch.cat([v1, v2], 0)
    gram_left, gram_right = left.T @ left, right @ right.T
    terms = float((gram_left.diagonal().sqrt() * gram_right.diagonal().sqrt()).sum())
    square = float((gram_left * gram_right).sum())
    if math.isnan(square) or terms == 0 or square > 1e-8 * terms * terms:
        return math.sqrt(square) if square > 0 or math.isnan(square) else 0.0
    upper_left = torch.linalg.qr(left, mode="r").R
    upper_right = torch.linalg.qr(right.T, mode="r").R
    return float(torch.linalg.matrix_norm(upper_left @ upper_right.T))


def truncation_gap(square: float, up: Tensor, down: Tensor, up_k: Tensor, down_k: Tensor) -> float:
    """||up down - up_k down_k||_F from square = ||up down||_F², up (o, r), up_k (o, k).

    sqrt(square - 2 <up down, up_k down_k> + ||up_k down_k||²), which resolves gaps above 3e-8 of
    ||up down||; the cost is that of k columns and not of r + k. Gaps above a tenth are measured in
    fp32, to 1e-5 of ||up down||.
    """

    def gap(dtype: torch.dtype) -> float:
        u, v, x, y = (t.to(dtype) for t in (up, down, up_k, down_k))
        cross = ((u.T @ x) * (v @ y.T)).sum(dtype=torch.float64)
        own = ((x.T @ x) * (y @ y.T)).sum(dtype=torch.float64)
        return square - 2 * float(cross) + float(own)

    quick = gap(torch.float32)
    if not quick > 1e-2 * square:
        quick = gap(torch.float64)
    return math.sqrt(max(quick, 0.0))
