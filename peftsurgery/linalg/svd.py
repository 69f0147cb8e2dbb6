"""The SVD of a product of thin factors without ever building it.

A matrix given as `up @ down`, up (o, r) and down (r, n), has all its spectrum in an r x r core.
Everything here works on that core in fp64 and returns fp32; nothing of size o x n is allocated
except by `dense_svd`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UsageError
from .rank_rules import Chooser

Triplet = tuple[Tensor, Tensor, Tensor]  # U (o, k), S (k,) descending, Vh (k, n)

_ONCE = 1e8  # condition of the Gram matrix up to which one Cholesky step is orthonormal to 1e-8
_TWICE = 1e13  # and two of them to fp64
_SINGLE = 1e3  # and up to which fp32 is enough to multiply by the inverse
_SQUARED = 1e-4  # σ_k / ||factors|| from which a squared core's vectors are orthonormal to 1e-8
_PANEL = 64  # columns of a Gram matrix computed at a time
_ROWS = 1024  # rows of a Gram matrix taken to fp64 at a time
_DENSE_FP64 = 1 << 20  # elements up to which a dense SVD runs in fp64


def _require_finite(**matrices: Tensor) -> None:
    for name, matrix in matrices.items():
        if math.isfinite(float(matrix.float().sum())):  # ten times faster than to look
            continue
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


def _cut(s: Tensor, rule: Chooser | None, shape: tuple[int, int]) -> int:
    return s.numel() if rule is None else rule.choose(s, shape)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(R, R⁻¹, condition of the Gram matrix) with RᵀR = gram, or None when it is not positive."""
    upper, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if int(failed):
        return None
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    condition = float(upper.square().sum() * inverse.square().sum())
    return (upper, inverse, condition) if math.isfinite(condition) else None


def _gram(matrix: Tensor) -> Tensor:
    """MᵀM in fp64: some rows at a time are taken to fp64, and of the symmetric products those left
    of the diagonal are copies.
    """
    rows, r = matrix.shape
    gram = torch.zeros(r, r, dtype=torch.float64, device=matrix.device)
    panels = [(start, min(start + _PANEL, r)) for start in range(0, r, _PANEL)]
    for first in range(0, rows, _ROWS):
        some = _doubled(matrix[first : first + _ROWS])
        for start, stop in panels:
            gram[:stop, start:stop].addmm_(some[:, :stop].T, some[:, start:stop])
    for start, stop in panels:
        gram[start:stop, :start] = gram[:start, start:stop].T
    return gram


def _basis(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """(X, C, R, condition) with matrix = Q R and Q = X C orthonormal; matrix (m, r), R (min(m, r),
    r); the condition of the Gram matrix, Inf where it was not used. X is `matrix` itself where that
    condition is small, fp64 otherwise, C and R are fp64.

    By Cholesky of the Gram matrix where that is conditioned well enough, by two such steps up to a
    condition of 1e6 of the matrix (Yamamoto et al. 2015, CholeskyQR2), by Householder QR otherwise:
    rank-deficient factors, dead or duplicated columns.
    """
    m, r = matrix.shape
    if r <= m and (first := _cholesky(_gram(matrix))) is not None:
        upper, inverse, condition = first
        if condition <= _ONCE:
            return matrix, inverse, upper, condition
        if condition <= _TWICE:
            q = _doubled(matrix) @ inverse
            if (second := _cholesky(_gram(q))) is not None:
                return q, second[1], second[0] @ upper, condition
    q, upper = torch.linalg.qr(_doubled(matrix))
    return q, torch.eye(q.shape[1], dtype=q.dtype, device=q.device), upper, math.inf


def _leading(up: Tensor, down: Tensor, rule: Chooser) -> Triplet | None:
    """The kept part of the SVD of up @ down in half the time of the whole: with R the Cholesky
    factor of upᵀup, the eigenvectors u of R (down downᵀ) Rᵀ give U = up R⁻¹ u and
    S Vh = uᵀ R down. None where `up` is conditioned too badly for R⁻¹, or the kept singular values
    reach too far down for a square. `down` may be of any rank.
    """
    (o, r), n = up.shape, down.shape[1]
    if r > min(o, n) or (found := _cholesky(own := _gram(up))) is None or found[2] > _ONCE:
        return None
    upper, inverse, condition = found
    gram = _gram(down.T)
    square = upper @ gram @ upper.T
    terms = float(own.norm() * gram.norm())  # far above the square where they cancel
    if not math.isfinite(terms):
        return None
    values, vectors = torch.linalg.eigh(square)
    s = values.clamp_min(0).sqrt().flip(0)
    k = rule.choose(s, (o, n))
    if not float(s[k - 1]) > _SQUARED * math.sqrt(terms):
        return None
    s, u = s[:k], vectors[:, -k:].flip(1)
    outer, inner = inverse @ u, (u.T @ upper) / s[:, None]
    cancelled = float((inner.square() @ gram.diagonal()).max())  # of each row's square, to 1
    left = up.float() @ outer.float() if condition <= _SINGLE else (_doubled(up) @ outer).float()
    if cancelled <= _SINGLE:
        return left, s.float(), inner.float() @ down.float()
    return left, s.float(), (inner @ _doubled(down)).float()


def _doubled(matrix: Tensor) -> Tensor:
    narrow = matrix.element_size() <= 2  # by way of fp32: faster
    return (matrix.float() if narrow else matrix).double()


def core_svd(up: Tensor, down: Tensor, rule: Chooser | None = None) -> Triplet:
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
    if rule is not None and (found := _leading(up, down, rule)) is not None:
        return found
    x_up, c_up, r_up, worst_up = _basis(up)
    x_down, c_down, r_down, worst_down = _basis(down.T)
    core = r_up @ r_down.T
    if not math.isfinite(float(core.sum())):
        _require_finite(up=up, down=down)
    u, s, vh = _svd(core)
    k = _cut(s, rule, (up.shape[0], down.shape[1]))
    u, s, vh = u[:, :k], s[:k], vh[:k]
    inner_up, inner_down = c_up @ u, vh @ c_down.T
    single_up, single_down = worst_up <= _SINGLE, worst_down <= _SINGLE  # then X is the factor
    left = up.float() @ inner_up.float() if single_up else (_doubled(x_up) @ inner_up).float()
    right = (
        inner_down.float() @ down.float()
        if single_down
        else (inner_down @ _doubled(x_down).T).float()
    )
    return left, s.float(), right


def weighted_core(
    up: Tensor, down: Tensor, gram: Tensor, rule: Chooser | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rank-k matrix X = left @ right nearest to ΔW = up @ down in the inputs it is used on:
    it minimises ||(ΔW - X) G^½||_F = sqrt(tr((ΔW - X) G (ΔW - X)ᵀ)).

    gram: G = Σ x xᵀ of the inputs, (n, n) positive semidefinite, or its diagonal (n,). Returns left
    (o, k), right (k, n) in fp32, and all singular values of ΔW G^½ in fp64.

    X = U_k U_kᵀ ΔW with U_k the leading left singular vectors of ΔW G^½, so that no inverse of G is
    needed and a singular one is as good (the minimum of SVD-LLM, Wang et al. 2024, arXiv
    2403.07378, without its whitening by Cholesky). UsageError names the factor with NaN or Inf, and
    a Gram matrix that does not fit or has negative eigenvalues beyond rounding.
    """
    n = down.shape[1]
    if tuple(gram.shape) not in ((n,), (n, n)):
        raise UsageError(
            f"Gram matrix: shape {tuple(gram.shape)}, expected ({n}, {n}) or its diagonal ({n},)."
        )
    _require_finite(up=up, down=down, gram=gram)
    x_up, c_up, r_up, _ = _basis(_doubled(up))
    inner = _doubled(down)
    small = torch.zeros(inner.shape[0], inner.shape[0], dtype=inner.dtype, device=inner.device)
    for start in range(0, n, _ROWS):
        some = gram[start : start + _ROWS].to(inner)
        if gram.ndim == 1:
            small += (inner[:, start : start + _ROWS] * some) @ inner[:, start : start + _ROWS].T
        else:
            small += inner[:, start : start + _ROWS] @ (some @ inner.T)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    if float(values[0]) < -1e-4 * max(float(values[-1]), 0.0) or float(values[-1]) < 0:
        raise UsageError("Gram matrix: it has negative eigenvalues; expected a sum of x xᵀ.")
    root = vectors * values.clamp_min(0).sqrt()
    u, s, _ = _svd(r_up @ root)
    k = _cut(s, rule, (up.shape[0], n))
    left = x_up @ (c_up @ u[:, :k])
    return left.float(), ((u[:, :k].T @ r_up) @ inner).float(), s


def dense_svd(matrix: Tensor, rule: Chooser | None = None) -> Triplet:
    """Thin SVD of a dense (o, n) matrix, fp32 out; computed in fp64 up to 2^20 elements."""
    _require_finite(matrix=matrix)
    u, s, vh = _svd(matrix.double() if matrix.numel() <= _DENSE_FP64 else matrix.float())
    k = _cut(s, rule, (matrix.shape[0], matrix.shape[1]))
    return u[:, :k].float(), s[:k].float(), vh[:k].float()


def kron_svd(first: Triplet, second: Triplet, rule: Chooser | None = None) -> Triplet:
    """SVD of A ⊗ B from the SVDs of A and B: the singular values are all products σ_i(A) σ_j(B),
    sorted.

    Only the kept columns u_i ⊗ u_j and rows v_i ⊗ v_j are built.
    """
    (u1, s1, v1), (u2, s2, v2) = first, second
    s, order = torch.outer(s1, s2).flatten().sort(descending=True, stable=True)
    shape = (u1.shape[0] * u2.shape[0], v1.shape[1] * v2.shape[1])
    order = order[: _cut(s, rule, shape)]
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
