"""The small space that all changes of one weight share.

With orthonormal Q_u (o, p) and Q_v (q, n) that span every U_i's columns and every V_i's rows,
ΔW_i = Q_u M_i Q_v exactly, and M_i is p x q: at most Σ R_i on a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Pair

RELATIVE = 1e-12  # singular values below this share of the largest are rounding of fp64


@dataclass(frozen=True)
class CoreSpace:
    """ΔW_i = left @ cores[i] @ right."""

    left: Tensor  # (o, p), orthonormal columns
    right: Tensor  # (q, n), orthonormal rows
    cores: tuple[Tensor, ...]  # (p, q) each

    def expand(self, core: Tensor) -> Pair:
        """Factors of left @ core @ right, as thin as the core's smaller side."""
        if core.shape[0] <= core.shape[1]:
            return self.left, core @ self.right
        return self.left @ core, self.right


def core_space(pairs: Sequence[Pair]) -> CoreSpace:
    """Bases by Householder QR of all U_i and all V_iᵀ side by side, or the unit vectors where these
    are as many as the side is long; fp64 in and out.
    """
    left, upper = _basis([u for u, _ in pairs])
    right, lower = _basis([v.T for _, v in pairs])
    cores = [a @ b.T for a, b in zip(upper, lower, strict=True)]
    return CoreSpace(left, right.T, tuple(cores))


def _basis(parts: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Q with orthonormal columns that span those of all parts, and Qᵀ times each part."""
    side, ranks = parts[0].shape[0], [part.shape[1] for part in parts]
    if sum(ranks) >= side:
        return torch.eye(side, dtype=parts[0].dtype, device=parts[0].device), parts
    basis, upper = torch.linalg.qr(torch.cat(list(parts), 1))
    return basis, upper.split(ranks, 1)


def principal(space: CoreSpace) -> CoreSpace:
    """The same with the bases every ΔW defines by itself: left singular vectors of [ΔW_1 … ΔW_n]
    and right ones of the changes stacked; those of zero singular values are left out.

    Unlike bases of the factors they do not depend on how a change was factored.
    """
    u, s, _ = torch.linalg.svd(torch.cat(space.cores, 1), full_matrices=False)
    u = u[:, : above_rounding(s)]
    _, t, vh = torch.linalg.svd(torch.cat(space.cores, 0), full_matrices=False)
    vh = vh[: above_rounding(t)]
    cores = tuple(u.T @ core @ vh.T for core in space.cores)
    return CoreSpace(space.left @ u, vh @ space.right, cores)


def above_rounding(s: Tensor) -> int:
    """How many of the descending singular values are not rounding; at least 1."""
    return max(1, int((s > RELATIVE * s[0]).sum()))


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """P Qᵀ of the SVD P D Qᵀ: the orthonormal matrix closest to it (Schönemann 1966)."""
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qh
