"""Exact small-core linear algebra: the SVD of a product of thin factors without ever building it.

A matrix given as `up @ down`, up (o, r) and down (r, n), has all its spectrum in an r x r core.
Everything here works on that core in fp64 and returns fp32; nothing of size o x n is allocated
except by `dense_svd`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError

Triplet = tuple[Tensor, Tensor, Tensor]  # U (o, k), S (k,) descending, Vh (k, n)

_GRAM_CONDITION = (
    1e8  # largest squared condition number at which the Gram basis is orthonormal to 1e-8
)
_DENSE_FP64 = 1 << 20  # elements up to which a dense SVD runs in fp64


# --- rank rules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankRule:
    """How many singular values σ_1 >= σ_2 >= … to keep: the smallest k that meets every criterion,
    then the cap.

    Written `16`, `energy:0.99`, `fro:0.95`, `cumulative:0.9`, `ratio:100`, `max:64`, or several
    joined by commas.

        16            k = 16 (k = number of singular values if there are fewer)
        energy:p      Σ_{j<=k} σ_j²  >= p · Σ σ_j²            0 < p <= 1
        fro:p         sqrt of the above: energy:p²             0 < p <= 1  (sd-scripts `sv_fro`)
        cumulative:p  Σ_{j<=k} σ_j   >= p · Σ σ_j             0 < p <= 1  (`sv_cumulative`)
        ratio:p       every σ_j >= σ_1 / p is kept             p > 1       (`sv_ratio`)
        max:n         k <= n, whatever the others ask

    k is at least 1. These are the definitions, not sd-scripts' results: its index is one too high.
    Sums are compared with a relative slack of 1e-12, so that `energy:0.5` of two equal values is
    one value.
    """

    criteria: tuple[tuple[str, float], ...]
    cap: int | None = None

    @classmethod
    def parse(cls, text: str | int | RankRule) -> RankRule:
        """Read a rule; UsageError names the part that is wrong and what is allowed."""
        if isinstance(text, RankRule):
            return text
        criteria: list[tuple[str, float]] = []
        cap: int | None = None
        for part in str(text).split(","):
            name, _, value = part.strip().rpartition(":")
            name = name.strip() or "rank"
            if name in ("rank", "max"):
                if not re.fullmatch(r"[0-9]+", value.strip()) or int(value) < 1:
                    raise UsageError(
                        f"rank rule '{part.strip()}': expected a whole number of at least 1, or "
                        "energy:0.99, fro:0.95, cumulative:0.9, ratio:100, max:64, or several "
                        "joined by commas."
                    )
                if name == "max":
                    cap = int(value) if cap is None else min(cap, int(value))
                else:
                    criteria.append((name, float(value)))
                continue
            if name not in ("energy", "fro", "cumulative", "ratio"):
                raise UsageError(
                    f"rank rule '{part.strip()}': unknown rule '{name}'. Known: a number, energy, "
                    "fro, cumulative, ratio, max."
                )
            try:
                number = float(value)
            except ValueError:
                raise UsageError(
                    f"rank rule '{part.strip()}': '{value}' is not a number."
                ) from None
            if name == "ratio" and not 1 < number < math.inf:
                raise UsageError(
                    f"rank rule '{part.strip()}': ratio:p keeps sigma >= sigma_1 / p and needs "
                    "p > 1, for example ratio:100. For a share of the spectrum use energy:0.99 or "
                    "cumulative:0.9."
                )
            if name != "ratio" and not 0 < number <= 1:
                raise UsageError(f"rank rule '{part.strip()}': expected a share with 0 < p <= 1.")
            criteria.append((name, number))
        return cls(tuple(criteria), cap)

    def __str__(self) -> str:
        parts = [f"{int(v)}" if n == "rank" else f"{n}:{v:g}" for n, v in self.criteria]
        return ",".join(([f"max:{self.cap}"] if self.cap else []) + parts)

    def choose(self, singular_values: Tensor | Sequence[float]) -> int:
        """The rank for a descending spectrum (k,); between 1 and k."""
        s = torch.as_tensor(singular_values).double().flatten()
        if s.numel() == 0:
            raise UsageError("rank rule: the spectrum is empty.")
        if not bool(torch.isfinite(s).all()):
            raise UsageError("rank rule: the singular values contain NaN or Inf.")
        wanted = [1]
        for name, p in self.criteria:
            if name == "rank":
                wanted.append(int(p))
            elif name == "ratio":
                wanted.append(int((s >= s[0] / p).sum()) if float(s[0]) > 0 else 1)
            else:
                sums = (s if name == "cumulative" else s.square()).cumsum(0)
                share = p * p if name == "fro" else p
                wanted.append(int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1)
        if not self.criteria:
            wanted.append(s.numel())
        rank = max(wanted)
        if self.cap is not None:
            rank = min(rank, self.cap)
        return min(rank, s.numel())


# --- singular value decompositions ----------------------------------------------------------------


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


# --- norms ----------------------------------------------------------------------------------------


def low_rank_norm(up: Tensor, down: Tensor) -> float:
    """||up @ down||_F = sqrt(Σ (upᵀup) ⊙ (down downᵀ)), fp64."""
    u, v = up.double(), down.double()
    return math.sqrt(max(float(((u.T @ u) * (v @ v.T)).sum()), 0.0))


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


# --- integers -------------------------------------------------------------------------------------


def factorization(dimension: int, factor: int = -1, *, ordered: bool = True) -> tuple[int, int]:
    """(m, n) with m n = dimension, as LoKr splits a layer's sides.

    If `factor` > 0 divides the dimension: (factor, dimension / factor). Otherwise, among the
    divisors m <= `factor` (any m for -1), walking up from 1 while m + n does not grow: the last
    pair, m <= n. LyCORIS (functional/general.py) sorts the first case too; PEFT
    (tuners/lokr/layer.py) does not: `ordered=False`.
    """
    if dimension < 1:
        raise UsageError(f"factorization: dimension {dimension}, expected at least 1.")
    if factor > 0 and dimension % factor == 0:
        pair = (factor, dimension // factor)
        return (min(pair), max(pair)) if ordered else pair
    limit = dimension if factor < 0 else factor
    m, n = 1, dimension
    for divisor in range(2, dimension + 1):
        if m >= n:
            break
        if dimension % divisor:
            continue
        if divisor > limit or divisor + dimension // divisor > m + n:
            break
        m, n = divisor, dimension // divisor
    return min(m, n), max(m, n)
