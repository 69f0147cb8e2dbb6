"""Orthogonal matrices from free parameters: Cayley transforms, butterflies, Householder products.

Everything is differentiable, batched over leading dimensions, and never forms a matrix larger than
its blocks. Blocks D (n, b, b) act on vectors along the last dimension, block by block: x -> D x.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from .nodes import by_autograd, by_hand, in_full, run_node


def skew_from_vector(vector: Tensor, size: int) -> Tensor:
    """(n, b(b-1)/2) -> S (n, b, b) with S = -Sᵀ; the vector is the upper triangle, row by row."""
    places = _kept(_upper_places, size, vector)
    upper = vector.new_zeros(vector.shape[0], size * size)
    upper = upper.index_copy(1, places, vector).view(-1, size, size)
    return upper - upper.mT


def _upper_places(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Places of the upper triangle in a flattened (size, size) matrix, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=device)
    return rows * size + columns


def _eye(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)


def _halves(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The upper triangle of ones with a diagonal of halves."""
    eye = _eye(size, dtype, device)
    return torch.ones_like(eye).triu_() - 0.5 * eye


def _tiny(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A diagonal of numbers just above zero."""
    return _eye(size, dtype, device) * torch.finfo(dtype).smallest_normal ** 0.5


_Maker = Callable[[int, torch.dtype, torch.device], Tensor]
_constants: dict[tuple[_Maker, int, torch.dtype, torch.device], Tensor] = {}


def _kept(make: _Maker, size: int, like: Tensor) -> Tensor:
    """A constant for the dtype and device of `like`, kept from call to call where both are ordinary
    tensors."""
    if torch.compiler.is_compiling():
        return make(size, like.dtype, like.device)
    key = make, size, like.dtype, like.device
    ordinary = type(like) in (Tensor, nn.Parameter)
    found = _constants.get(key) if ordinary else None
    if found is None:
        found = make(size, like.dtype, like.device)
        ordinary = ordinary and type(found) is Tensor and not found.is_inference()
        if ordinary and len(_constants) < 256:
            _constants[key] = found
    return found


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


def half_cayley(blocks: Tensor) -> Tensor:
    """Z = (I + S)⁻¹ for S = ½ (B - Bᵀ), with which cayley(-S) = 2 Z - I; blocks B (…, b, b)."""
    # inverses are taken of columns: A transposed in memory is not copied
    flipped = torch.add(_kept(_eye, blocks.shape[-1], blocks), blocks.mT, alpha=0.5).sub(
        blocks, alpha=0.5
    )
    return torch.linalg.inv_ex(flipped.mT).inverse


def turned_linear(
    x: Tensor, blocks: Tensor, weight: Tensor, bias: Tensor | None, rescale: Tensor | None
) -> Tensor:
    """rescale ∘ (x D Wᵀ) + b as one node, D = cayley(-S) of `half_cayley`, blocks ([1,] n, b, b),
    for constants W (o, n b) and b; rescale has o values. `nodes.by_hand` has to hold.
    """
    return run_node(_TurnedLinear, x, blocks, weight, bias, rescale)


def _turned_linear(
    x: Tensor, blocks: Tensor, weight: Tensor, bias: Tensor | None, rescale: Tensor | None
) -> Tensor:
    """`turned_linear` as autograd takes it."""
    turned, _, _ = _turned(x.reshape(-1, x.shape[-1]), blocks)
    y = _rescaled(F.linear(turned, weight), bias, rescale)
    return y.view(*x.shape[:-1], len(weight))


def _turned(x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x D = 2 x Z - x, x (p, n b); then x Z (n, p, b) and Z."""
    n, b = blocks.shape[-3:-1]
    inverse = half_cayley(blocks.view(n, b, b))
    parts = x.view(-1, n, b)
    half = torch.bmm(parts.transpose(0, 1), inverse)
    return torch.lerp(parts, half.transpose(0, 1), 2.0).view(x.shape), half, inverse


def _rescaled(y: Tensor, bias: Tensor | None, rescale: Tensor | None) -> Tensor:
    """y (p, o) rescaled, and the bias."""
    if rescale is None:
        return y if bias is None else y + bias
    factor = rescale.view(-1)
    return y * factor if bias is None else torch.addcmul(bias, y, factor)


class _TurnedLinear(torch.autograd.Function):
    """`_turned_linear` with its gradients. With G that of x D: that of x is 2 G Zᵀ - G, that of S
    is -2 (x Z)ᵀ (G Zᵀ), block by block, since that of Z is 2 xᵀ G and dZ = -Z dS Z.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        blocks: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rescale: Tensor | None,
    ) -> Tensor:
        turned, half, inverse = _turned(x.reshape(-1, x.shape[-1]), blocks)
        y = F.linear(turned, weight)
        kept = None if rescale is None else y
        saved = x, blocks, weight, bias, rescale, half, inverse, kept
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        return _rescaled(y, bias, rescale).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @in_full
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks, weight, bias, rescale, half, inverse, y = tuple(ctx.saved_tensors)
        if torch.is_grad_enabled():
            return by_autograd(_turned_linear, (x, blocks, weight, bias, rescale), grad)
        for_x, for_blocks, _, _, for_rescale = tuple(ctx.needs_input_grad)
        g = grad.reshape(-1, weight.shape[0])
        of_x = of_blocks = of_rescale = None
        if rescale is not None:
            if for_rescale:
                of_rescale = torch.mul(g, y).sum(0).view(rescale.shape)
            g = g * rescale.view(-1)
        g = torch.mm(g, weight)
        parts = g.view(-1, *inverse.shape[:2])
        back = torch.bmm(parts.transpose(0, 1), inverse.mT)
        if for_x:
            of_x = torch.lerp(parts, back.transpose(0, 1), 2.0).view(*x.shape)
        if for_blocks:
            flipped = torch.bmm(back.mT, half)  # that of S, transposed and by -2
            of_blocks = (flipped - flipped.mT).view(*blocks.shape)
        return of_x, of_blocks, None, None, of_rescale


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
    off inside.
    """
    if orthonormal:
        return x - 2 * (x @ u) @ u.T
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return householder(x, u, inverse=inverse)
    run = _Reflected.apply if by_hand(x.device) else _reflected
    return run(x, u, inverse, None, None)


def householder_linear(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Hᵀ Wᵀ + b as one node, for constants W (o, n) and b; `nodes.by_hand` has to hold."""
    return run_node(_Reflected, x, u, True, weight, bias)


def _reflected(
    x: Tensor, u: Tensor, inverse: bool, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`householder` as autograd takes it."""
    turned, *_ = _compact(x.reshape(-1, x.shape[-1]), u, inverse)
    if weight is not None:
        turned = F.linear(turned, weight, bias)
    return turned.view(*x.shape[:-1], turned.shape[-1])


def _compact(x: Tensor, u: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The compact WY form (Schreiber and Van Loan 1989): x H = x - N Vᵀ, N = x V C⁻¹, C =
    striu(VᵀV) + ½ diag(VᵀV), V columns of any length; C transposed for x Hᵀ. x (p, n).

    V is u divided by the largest entries of its columns, so that VᵀV neither overflows nor
    vanishes; H does not depend on them, so they are constants in the backward pass. With entries of
    1 nothing changes where the least of numbers is added to C, which is for columns of zeros.

    Returns x H, V, the largest entries, C (the lower half of it is undefined) and N.
    """
    limits = torch.finfo(u.dtype)
    least = limits.smallest_normal
    largest = torch.linalg.vector_norm(u.detach(), math.inf, dim=0).clamp_min_(least * limits.eps)
    v = u / largest
    tiny, halves = _kept(_tiny, u.shape[1], u), _kept(_halves, u.shape[1], u)
    core = torch.addmm(tiny, v.t(), v).mul_(halves)
    facing = core.t() if inverse else core
    inner = torch.linalg.solve_triangular(facing, torch.mm(x, v), upper=not inverse, left=False)
    return torch.addmm(x, inner, v.t(), alpha=-1), v, largest, core, inner


class _Reflected(torch.autograd.Function):
    """`_reflected` with its gradients: with G that of x H, S = G V C⁻ᵀ; that of x is G - S Vᵀ, that
    of V is V (L + Lᵀ) - xᵀ S - Gᵀ N, L the upper half of Nᵀ S (of its transpose for x Hᵀ) with the
    diagonal halved, as in C.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        u: Tensor,
        inverse: bool,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        turned, v, largest, core, inner = _compact(x.reshape(-1, x.shape[-1]), u, inverse)
        saved = x, u, weight, v, largest, core, inner
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        ctx.inverse = inverse  # pyright: ignore[reportAttributeAccessIssue]
        if weight is not None:
            turned = F.linear(turned, weight, bias)
        return turned.view(*x.shape[:-1], turned.shape[-1])

    @staticmethod
    @in_full
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, weight, v, largest, core, inner = tuple(ctx.saved_tensors)
        inverse: bool = ctx.inverse  # pyright: ignore[reportAttributeAccessIssue]
        if torch.is_grad_enabled():
            return by_autograd(_reflected, (x, u, inverse, weight, None), grad)
        for_x, for_u, *_ = tuple(ctx.needs_input_grad)
        g = grad.reshape(-1, grad.shape[-1])
        if weight is not None:
            g = torch.mm(g, weight)
        facing = core if inverse else core.t()
        s = torch.linalg.solve_triangular(facing, torch.mm(g, v), upper=inverse, left=False)
        of_x = torch.addmm(g, s, v.t(), alpha=-1).view(*x.shape) if for_x else None
        if not for_u:
            return of_x, None, None, None, None
        half = torch.mm(s.t(), inner) if inverse else torch.mm(inner.t(), s)
        half.mul_(_kept(_halves, u.shape[1], u))
        of_v = torch.mm(x.reshape(g.shape).t(), s).addmm_(g.t(), inner)
        of_v = torch.addmm(of_v, v, half + half.t(), beta=-1)
        return of_x, of_v.div_(largest), None, None, None
