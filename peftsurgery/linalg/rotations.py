"""Orthogonal matrices from free parameters: Cayley transforms, butterflies, Householder products.

Everything is differentiable, batched over leading dimensions, and never forms a matrix larger than
its blocks. Blocks D (n, b, b) act on vectors along the last dimension, block by block: x -> D x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable


def skew_from_vector(vector: Tensor, size: int) -> Tensor:
    """(n, b(b-1)/2) -> S (n, b, b) with S = -Sᵀ; the vector is the upper triangle, row by row."""
    places = _upper_places(size, vector.device)
    upper = vector.new_zeros(vector.shape[0], size * size)
    upper = upper.index_copy(1, places, vector).view(-1, size, size)
    return upper - upper.mT


_places: dict[tuple[int, torch.device], Tensor] = {}


def _upper_places(size: int, device: torch.device) -> Tensor:
    """Places of the upper triangle in a flattened (size, size) matrix, row by row; kept from call
    to call where an ordinary tensor comes out."""
    if torch.compiler.is_compiling() or (size, device) not in _places:
        rows, columns = torch.triu_indices(size, size, 1, device=device)
        found = rows * size + columns
        if type(found) is Tensor and not found.is_inference() and len(_places) < 64:
            _places[size, device] = found
        return found
    return _places[size, device]


def skew_part(blocks: Tensor) -> Tensor:
    """B - Bᵀ, not halved."""
    return blocks - blocks.mT


def cayley(skew: Tensor) -> Tensor:
    """(I + S) (I - S)⁻¹ = 2 (I - S)⁻¹ - I, orthogonal for S = -Sᵀ. Its transpose is cayley(-S).

    The inverse always exists: the eigenvalues of I - S are 1 plus something imaginary.
    """
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return 2 * torch.linalg.inv_ex(eye - skew).inverse - eye


def cayley_neumann(skew: Tensor, terms: int, *, half_last: bool = True) -> Tensor:
    """The series of `cayley` cut off: I + 2S + 2S² + … , only nearly orthogonal.

    PEFT's `terms` (tuners/oft/layer.py): 1 is I, 2 is I + 2S; from 3 on, since 0.18, the last power
    is S^max(terms - 1, 3) with weight 1 (`half_last`); before, S^(terms - 1) with weight 2.
    """
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    if terms < 2:
        return eye
    if terms == 2:
        return eye + 2 * skew
    last = max(terms - 1, 3) if half_last else terms - 1
    inner = skew if half_last else 2 * skew  # Horner's rule: I + S (2I + S (2I + … ))
    for _ in range(last - 1):
        inner = torch.baddbmm(2 * skew, skew, inner)
    return inner + eye


def within_norm(skew: Tensor, limit: float, *, each: bool) -> Tensor:
    """S scaled down to a Frobenius norm of at most `limit`, block by block or as a whole.

    Block by block the factor is a constant in the backward pass, as PEFT's projection is: otherwise
    a block at its limit could not shrink again.
    """
    measured, dims = (skew.detach(), (-2, -1)) if each else (skew, None)
    norm = torch.linalg.vector_norm(measured, dim=dims, keepdim=each)
    return skew * torch.where(norm > limit, limit / torch.where(norm > 0, norm, 1.0), 1.0)


def turn(x: Tensor, blocks: Tensor) -> Tensor:
    """D x along the last dimension: x (…, n·b), blocks (n, b, b)."""
    n, b, _ = blocks.shape
    columns = x.reshape(-1, n, b).transpose(0, 1)
    return torch.bmm(columns, blocks.mT).transpose(0, 1).reshape(x.shape)


def chunk_order(size: int, block: int, stage: int, device: torch.device) -> Tensor:
    """Butterfly of halves of blocks: halves that lie 2^stage apart become neighbours (PEFT's
    `block_butterfly_perm`, transposed; Liu et al. 2023, arXiv 2311.06243)."""
    index = torch.arange(size, device=device)
    if stage == 0:
        return index
    return index.reshape(-1, 2, 2**stage, block // 2).transpose(1, 2).reshape(-1)


def element_order(size: int, block: int, stage: int, device: torch.device) -> Tensor:
    """Butterfly of single elements: those 2^stage · block/2 apart become neighbours (LyCORIS
    functional/boft.py)."""
    index = torch.arange(size, device=device)
    return index.reshape(-1, 2, 2**stage * (block // 2)).transpose(1, 2).reshape(-1)


def butterfly(x: Tensor, blocks: Tensor, *, chunks: bool, inverse: bool = False) -> Tensor:
    """B_{m-1} … B_0 x along the last dimension, B_k = Π_kᵀ D_k Π_k; blocks (m, n, b, b).

    Π_k: `chunk_order` or `element_order`. inverse: the transpose of the product.
    """
    order = chunk_order if chunks else element_order
    stages = range(blocks.shape[0])
    for k in reversed(stages) if inverse else stages:
        block = blocks[k].mT if inverse else blocks[k]
        if chunks and k == 0:  # halves of blocks that are neighbours already
            x = turn(x, block)
            continue
        index = order(x.shape[-1], blocks.shape[-1], k, x.device)
        back = torch.argsort(index)
        x = turn(x[..., index], block)[..., back]
    return x


def normalized_columns(u: Tensor) -> Tensor:
    """Columns of length one; a zero column stays zero."""
    norm = torch.linalg.vector_norm(u, dim=0)
    return u / torch.where(norm > 0, norm, 1.0)


def gram_schmidt(u: Tensor) -> Tensor:
    """Orthonormal columns spanning those of u, in order; one that depends on those before is zero.

    Each column is projected twice, so the result is orthonormal to rounding.
    """
    found: list[Tensor] = []
    for column in normalized_columns(u).unbind(1):
        rest = column
        if found:
            basis = torch.stack(found, 1)
            for _ in range(2):
                rest = rest - basis @ (basis.T @ rest)
        norm = torch.linalg.vector_norm(rest)
        dependent = norm <= 8 * u.shape[0] ** 0.5 * torch.finfo(u.dtype).eps
        found.append(torch.where(dependent, 0.0, rest / torch.where(dependent, 1.0, norm)))
    return torch.stack(found, 1)


def householder(
    x: Tensor, u: Tensor, *, orthonormal: bool = False, inverse: bool = False
) -> Tensor:
    """x H along the last dimension, H = Π_k (I - 2 û_k û_kᵀ), û the columns of u (n, r) at length
    one; a column of zeros reflects nothing. inverse: x Hᵀ.

    orthonormal: the columns are that already, or zero, and H = I - 2 U Uᵀ. Otherwise autocast is
    off inside, and the gradient has no gradient itself (RuntimeError).
    """
    if orthonormal:
        return x - 2 * (x @ u) @ u.T
    if not torch.is_autocast_enabled(x.device.type):
        return _Reflected.apply(x, u, inverse)
    with torch.autocast(x.device.type, enabled=False):
        return _Reflected.apply(x, u, inverse)


class _Reflected(torch.autograd.Function):
    """The compact WY form (Schreiber and Van Loan 1989): x H = x - P M, P = x V, M = C⁻¹ Vᵀ, C =
    striu(VᵀV) + ½ diag(VᵀV), V columns of any length; C transposed for x Hᵀ. Two products of rank
    r and a triangular solve.

    V is u divided by the largest entries of its columns, so that VᵀV neither overflows nor
    vanishes; H does not depend on them, so they are constants in the backward pass.

    With the gradient G: S = G Mᵀ and Z = C⁻ᵀ Pᵀ G, that of x is G - S Vᵀ, that of V is
    -xᵀ S - Zᵀ + V (L + Lᵀ), L the upper half of Z Mᵀ (of its transpose for x Hᵀ) as in C.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, u: Tensor, inverse: bool) -> Tensor:
        limits = torch.finfo(u.dtype)
        largest = torch.linalg.vector_norm(u, math.inf, dim=0)
        largest.clamp_min_(limits.smallest_normal * limits.eps)  # the least number above zero
        v = u / largest
        core = torch.mm(v.t(), v)
        core.diagonal().mul_(0.5).clamp_min_(0.5)  # less only for a column of zeros
        facing = core.t() if inverse else core
        outer = torch.linalg.solve_triangular(facing, v.t(), upper=not inverse)
        flat = x.reshape(-1, u.shape[0])
        inner = torch.mm(flat, v)
        ctx.save_for_backward(flat, v, largest, core, outer, inner)
        ctx.inverse = inverse  # pyright: ignore[reportAttributeAccessIssue]
        return torch.addmm(flat, inner, outer, alpha=-1).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        flat, v, largest, core, outer, inner = tuple(ctx.saved_tensors)
        for_x, for_u, _ = tuple(ctx.needs_input_grad)
        inverse: bool = ctx.inverse  # pyright: ignore[reportAttributeAccessIssue]
        of_x = of_u = None
        g = grad.reshape(flat.shape)
        s = torch.mm(g, outer.t())
        if for_x:
            of_x = torch.addmm(g, s, v.t(), alpha=-1).view(grad.shape)
        if for_u:
            turned = core if inverse else core.t()
            z = torch.linalg.solve_triangular(turned, torch.mm(inner.t(), g), upper=inverse)
            half = (torch.mm(outer, z.t()) if inverse else torch.mm(z, outer.t())).triu_()
            half.diagonal().mul_(0.5)
            of_u = torch.addmm(z.t(), flat.t(), s)
            of_u = torch.addmm(of_u, v, half + half.t(), beta=-1).div_(largest)
        return of_x, of_u, None
