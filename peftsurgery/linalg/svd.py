"""The SVD of a product of thin factors without ever building it.

A matrix given as `up @ down`, up (o, r) and down (r, n), has all its spectrum in an r x r core.
Everything here works on that core in fp64 and returns fp32; nothing of size o x n is allocated
except by `dense_svd`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .rank_rules import RankRule

Triplet = tuple[Tensor, Tensor, Tensor]  # U (o, k), S (k,) descending, Vh (k, n)

_GRAM_CONDITION = (
    1e8  # largest squared condition number at which the Gram basis is orthonormal to 1e-8
)
_DENSE_FP64 = 1 << 20  # elements up to which a dense SVD runs in fp64


def _require_finite(**matrices: Tensor) -> None:
    for name, matrix in matrices.items():
        bad = matrix.numel() - int(torch.isfinite(matrix).sum())
        if bad:
            raise UsageError(
                f"{name}: {bad} of {matrix.numel()} values are NaN or Inf; no SVD is defined."
            )


def _svd(matrix: Tensor) -> Triplet:
    """Thin SVD; when the LAPACK driver does not converge, eigenvectors of the smaller Gram matrix
    in fp64."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        wide = matrix.shape[0] <= matrix.shape[1]
        m = (matrix if wide else matrix.T).double()
        values, left = torch.linalg.eigh(m @ m.T)
        s = values.clamp_min(0).sqrt().flip(0)
        keep = max(1, int((s > 1e-8 * s[0]).sum()))  # the Gram matrix squares the condition number
        s, left = s[:keep], left.flip(1)[:, :keep]
        right = (left.T @ m) / s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        u, vh = (left, right) if wide else (right.T, left.T)
        return u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype)


def _cut(s: Tensor, rule: RankRule | None) -> int:
    return s.numel() if rule is None else rule.choose(s)


def _basis(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(X, C, R) with matrix = Q R and Q = X C orthonormal; matrix (m, r) fp64, R (min(m, r), r).

    The Gram matrix when it is conditioned well enough (4-6 times faster), Householder QR otherwise.
    """
    m, r = matrix.shape
    if r <= m:
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)
        if float(values[0]) * _GRAM_CONDITION > float(values[-1]) > 0:
            roots = values.sqrt()
            return matrix, vectors / roots, roots[:, None] * vectors.T
    q, upper = torch.linalg.qr(matrix)
    return q, torch.eye(q.shape[1], dtype=q.dtype, device=q.device), upper


def core_svd(up: Tensor, down: Tensor, rule: RankRule | None = None) -> Triplet:
    """SVD of up @ down from the factors: up (o, r), down (r, n) -> U (o, k), S (k,), Vh (k, n) in
    fp32.

    up = Q_u R_u, downᵀ = Q_d R_d, SVD(R_u R_dᵀ) in fp64; k = min(o, r, n), or `rule.choose(S)`. Any
    r, also above min(o, n); rank-deficient and zero factors give zero singular values. UsageError
    names the factor with NaN or Inf.
    """
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise UsageError(
            f"core_svd: up {tuple(up.shape)} and down {tuple(down.shape)} do not multiply."
        )
    _require_finite(up=up, down=down)
    x_up, c_up, r_up = _basis(up.double())
    x_down, c_down, r_down = _basis(down.double().T)
    u, s, vh = _svd(r_up @ r_down.T)
    k = _cut(s, rule)
    left = x_up @ (c_up @ u[:, :k])
    right = (vh[:k] @ c_down.T) @ x_down.T
    return left.float(), s[:k].float(), right.float()


def dense_svd(matrix: Tensor, rule: RankRule | None = None) -> Triplet:
    """Thin SVD of a dense (o, n) matrix, fp32 out; computed in fp64 up to 2^20 elements."""
    _require_finite(matrix=matrix)
    u, s, vh = _svd(matrix.double() if matrix.numel() <= _DENSE_FP64 else matrix.float())
    k = _cut(s, rule)
    return u[:, :k].float(), s[:k].float(), vh[:k].float()


def kron_svd(first: Triplet, second: Triplet, rule: RankRule | None = None) -> Triplet:
    """SVD of A ⊗ B from the SVDs of A and B: the singular values are all products σ_i(A) σ_j(B),
    sorted.

    Only the kept columns u_i ⊗ u_j and rows v_i ⊗ v_j are built.
    """
    (u1, s1, v1), (u2, s2, v2) = first, second
    s, order = torch.outer(s1, s2).flatten().sort(descending=True, stable=True)
    order = order[: _cut(s, rule)]
    i, j = order // s2.numel(), order % s2.numel()
    u = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1)
    vh = (v1[i, :, None] * v2[j, None, :]).flatten(1)
    return u, s[: order.numel()], vh


def khatri_rao(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """(U, V) with U V = (a1 b1) ⊙ (a2 b2); a (o, r), b (r, n) -> U (o, r1 r2), V (r1 r2, n).

    Row-wise Khatri-Rao product of the a's and column-wise of the b's (Hyeon-Woo et al. 2021, arXiv
    2108.06098, prop. 1).
    """
    u = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    v = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return u, v
