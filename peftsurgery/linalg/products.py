"""Orthonormal columns from those given: by Gram matrices in fp64, products in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(matrix: Tensor, floor: float, most: int) -> Tensor:
    """Orthonormal columns that span those of `matrix` (n, q), but for directions no longer than
    `floor`, at most `most` of them; the shortest direction first.

    By the eigenvectors of the Gram matrix in fp64 (Stathopoulos, Wu 2002, SVQB). Unlike columns of
    a triangular factorisation, those of short directions are free of the long ones, so that their
    products are exact relative to themselves.
    """
    wide = matrix.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    lengths = values.clamp_min(0).sqrt()
    limit = max(floor, 1e-7 * float(lengths[-1])) if lengths.numel() else 0.0
    keep = min(int((lengths > limit).sum()), most)
    if keep == 0:
        return matrix[:, :0]
    return (wide @ (vectors[:, -keep:] / lengths[-keep:])).float()


def polished(matrix: Tensor) -> Tensor:
    """Nearly orthonormal columns made so, each staying what it is nearly (Cholesky of their Gram
    matrix, CholeskyQR, Yamamoto et al. 2015)."""
    wide = matrix.double()
    upper, failed = torch.linalg.cholesky_ex(wide.T @ wide, upper=True)
    if int(failed):
        return torch.linalg.qr(matrix).Q
    unit = torch.eye(len(upper), dtype=upper.dtype)
    return matrix @ torch.linalg.solve_triangular(upper, unit, upper=True).float()


def outside_of(block: Tensor, known: list[Tensor]) -> Tensor:
    """The part of `block` that is orthogonal to the columns of `known`."""
    block = block.clone()
    for basis in known:
        block.addmm_(basis, basis.T @ block, alpha=-1)
    return block
