"""Methods on singular vectors, run exactly in the core space of all factors (fp64), never dense."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import SCALE, Chosen, Elementwise, Option, Pair, Spectral, Stack
from .core_space import (
    above_rounding,
    core_space,
    nearest_orthonormal,
    principal,
)
from .elementwise import ALL, MAJORITY, TIES


def svd(pairs: Sequence[Pair], weights: Sequence[float], options: Chosen) -> Pair:
    """ΔW = λ Σ w_i ΔW_i, whose SVD is then cut at the rank: the best approximation of the exact sum
    (Eckart, Young 1936). PEFT's "svd" is the same on a dense ΔW.
    """
    scale = options.number("scale")
    left = torch.cat([scale * w * u for w, (u, _) in zip(weights, pairs, strict=True)], 1)
    return left, torch.cat([v for _, v in pairs], 0)


def knots(pairs: Sequence[Pair], weights: Sequence[float], options: Chosen) -> Pair:
    """[ΔW_1 … ΔW_n] = U S [V_1 … V_n]; ΔW = λ U S ties(V_1 … V_n).

    KnOTS (Stoica et al. 2024, arXiv 2410.19735): the changes are aligned in one left basis, and
    TIES (trim to `density`, elect, disjoint mean with `normalize`) merges what differs. U S is
    (o, k) and the V_i are (k, columns), k at most Σ R_i.
    """
    space = core_space(pairs)
    u, s, vh = torch.linalg.svd(torch.cat(space.cores, 1), full_matrices=False)
    k = above_rounding(s)
    width = space.cores[0].shape[1]
    blocks = [block @ space.right for block in vh[:k].split(width, 1)]
    return space.left @ (u[:, :k] * s[:k]), _elementwise(TIES, blocks, weights, options)


def core_ties(pairs: Sequence[Pair], weights: Sequence[float], options: Chosen) -> Pair:
    """ΔW = λ Q_u ties(M_1 … M_n) Q_v, ΔW_i = Q_u M_i Q_v.

    Core Space merging (Panariello et al. 2025, arXiv 2509.17786), with TIES on the cores. The
    bases are the singular vectors of the changes side by side and stacked, where the paper takes
    those of the factors: the result then does not depend on how a change was factored.
    """
    space = principal(core_space(pairs))
    return space.expand(_elementwise(TIES, space.cores, weights, options))


def tsv(pairs: Sequence[Pair], weights: Sequence[float], options: Chosen) -> Pair:
    """Task singular vectors (Gargiulo et al. 2024, arXiv 2412.00081, TSV-Merge):

        w_i ΔW_i ≈ U_i S_i V_i, cut at ⌈share · R⌉, share 1/n unless given, R the rank of ΔW_i
        U = [U_1 … U_n], V = [V_1; …; V_n], each replaced by the nearest orthonormal matrix
        ΔW = λ U diag(S_1 … S_n) V

    The paper cuts full-rank changes at 1/n of their smaller side; the rank of the adapter stands
    for it here.
    """
    share = options.number("keep") or 1 / len(pairs)
    space = core_space(pairs)
    parts = [_leading(w * core, share) for w, core in zip(weights, space.cores, strict=True)]
    u = nearest_orthonormal(torch.cat([p[0] for p in parts], 1))
    vh = nearest_orthonormal(torch.cat([p[2] for p in parts], 0))
    s = torch.cat([p[1] for p in parts]) * options.number("scale")
    return (space.left @ u) * s, vh @ space.right


def _leading(core: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    full = above_rounding(s)
    k = min(full, max(1, -int(-share * full // 1)))
    return u[:, :k], s[:k], vh[:k]


def iso_c(pairs: Sequence[Pair], weights: Sequence[float], options: Chosen) -> Pair:
    """Σ w_i ΔW_i = U S V of rank R;  ΔW = λ mean(S) U V.

    Isotropic merging in the common space (Marczak et al. 2025, arXiv 2502.04959, Iso-C). R counts
    the singular values above rounding, where the paper's changes have full rank.
    """
    space = core_space(pairs)
    u, s, vh = _summed(space.cores, weights)
    flat = options.number("scale") * s.mean()
    return space.left @ (u * flat), vh @ space.right


def iso_cts(pairs: Sequence[Pair], weights: Sequence[float], options: Chosen) -> Pair:
    """Iso-C with task-specific directions (Marczak et al. 2025, arXiv 2502.04959, Iso-CTS):

    U_c, S_c, V_c    the leading k = ⌈common · R⌉ triplets of Σ w_i ΔW_i, of rank R
    U_i, S_i, V_i    the leading ⌊(R - k) / n⌋ triplets of (1 - U_c U_cᵀ) w_i ΔW_i
    U, V             [U_c U_1 … U_n], [V_c; V_1; …; V_n], each the nearest orthonormal matrix
    ΔW = λ mean(S_c, S_1, …, S_n) U V
    """
    space = core_space(pairs)
    u, s, vh = _summed(space.cores, weights)
    rank = s.numel()
    k = max(1, min(rank, -int(-options.number("common") * rank // 1)))
    own = (rank - k) // len(pairs)
    parts = [(u[:, :k], s[:k], vh[:k])]
    for weight, core in zip(weights, space.cores, strict=True):
        rest = weight * (core - u[:, :k] @ (u[:, :k].T @ core))
        a, b, c = torch.linalg.svd(rest, full_matrices=False)
        parts.append((a[:, :own], b[:own], c[:own]))
    left = nearest_orthonormal(torch.cat([p[0] for p in parts], 1))
    right = nearest_orthonormal(torch.cat([p[2] for p in parts], 0))
    flat = options.number("scale") * torch.cat([p[1] for p in parts]).mean()
    return space.left @ (left * flat), right @ space.right


def _summed(cores: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of Σ w_i M_i without what is rounding."""
    mixed = torch.stack([w * core for w, core in zip(weights, cores, strict=True)]).sum(0)
    u, s, vh = torch.linalg.svd(mixed, full_matrices=False)
    k = above_rounding(s)
    return u[:, :k], s[:k], vh[:k]


def _elementwise(
    method: Elementwise, blocks: Sequence[Tensor], weights: Sequence[float], options: Chosen
) -> Tensor:
    """An element-wise method on matrices in memory; fp32 elements, fp64 out."""
    held = [block.float() for block in blocks]
    rows, columns = held[0].shape
    stack = Stack(
        "core",
        (rows, columns),
        tuple(range(len(held))),
        tuple(weights),
        sum(weights),
        lambda i, start, stop: held[i][start:stop].clone(),
    )
    return stack.dense(method.run(stack, options)).double()


NORMALIZE = Option("normalize", "divide by the sum of the weights that agree", True)
KEEP = Option("keep", "share of each adapter's rank that stays; 0 is one part in n", 0.0, 0, 1)
COMMON = Option("common", "share of the rank for common directions", 0.8, 0, 1, above=True)

SVD = Spectral("svd", (SCALE,), run=svd)
KNOTS = Spectral("knots", (ALL, SCALE, NORMALIZE, MAJORITY), run=knots)
TSV = Spectral("tsv", (KEEP, SCALE), run=tsv)
ISO_C = Spectral("iso_c", (SCALE,), alone=False, run=iso_c)
ISO_CTS = Spectral("iso_cts", (COMMON, SCALE), alone=False, run=iso_cts)
CORE_TIES = Spectral("core_ties", (ALL, SCALE, NORMALIZE, MAJORITY), run=core_ties)
