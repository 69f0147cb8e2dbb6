"""Leading singular vectors found with bfloat16 products: near enough to begin with.

CPUs that multiply bfloat16 do so two to five times as fast as fp32. Rounding M to it changes its
singular values by at most 2^-9 ||M||_F, so that a search begun here has only the last step left.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .products import orthonormal, outside_of, polished

MOST = 128  # directions: for more, eigenvectors cost what the products save
NOISE = 2.0**-7  # of ||M||_F: singular values below it may be those of the rounding


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; torch before 2.10 cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def roughly_leading(
    matrix: Tensor, norm: float, rank: int, more: int, generator: torch.Generator
) -> tuple[Tensor, bool]:
    """(V, clear): orthonormal columns, about the leading right singular vectors of M (o, n), bf16,
    ||M||_F = norm. `rank` of them where σ_rank is clear of the rounding, `more` where it is not or
    M has no such rank.

    The Ritz vectors of MᵀM in span(X, MᵀM X), X = MᵀΨ with twice as many random columns as the
    rank. With X_0, X_1 orthonormal bases of X and of what MᵀM X_0 = N adds, MᵀM is in them

        [X_0ᵀN, NᵀX_1; X_1ᵀN, (M X_1)ᵀ M X_1].
    """
    rows, columns = matrix.shape
    width = min(math.ceil(rank / 16) * 32, columns // 2)
    random = torch.empty(width * math.ceil(rows / 8), dtype=torch.int64)  # eight at a time
    random = random.random_(-(2**63), None, generator=generator).view(torch.int8)
    psi = random.bfloat16().view(width, -1)[:, :rows]
    first = orthonormal(_columns(psi @ matrix), 0.0, width)
    if first.shape[1] == 0:
        return first, False
    back = _columns((matrix @ first.bfloat16()).T.contiguous() @ matrix)
    second = orthonormal(outside_of(back, [first]), 0.0, width)
    own, across = first.T @ back, back.T @ second
    image = (matrix @ second.bfloat16()).float()
    upper = torch.cat([own, across], 1)
    square = torch.cat([upper, torch.cat([across.T, image.T @ image], 1)]).double()
    values, turn = torch.linalg.eigh((square + square.T) / 2)
    clear = rank <= len(values) and float(values[-rank]) >= (NOISE * norm) ** 2
    turn = turn[:, -(rank if clear else more) :].flip(1).float()
    return polished(first @ turn[: first.shape[1]] + second @ turn[first.shape[1] :]), clear


def _columns(rows: Tensor) -> Tensor:
    return rows.float().T.contiguous()
