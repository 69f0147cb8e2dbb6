"""A linear layer plus a Kronecker product, on activations: w1 ⊗ w2 is never built."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from ..linalg.nodes import by_autograd, in_full, run_node


def kronecker_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scale: float
) -> Tensor:
    """x (W + scale · w1 ⊗ w2)ᵀ + b as one node, for constants W (a b, c d) and b; w1 (a, c), w2 (b,
    d). `nodes.by_hand` has to hold.
    """
    return run_node(_KroneckerLinear, x, weight, bias, first, second, scale)


def _kronecker_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scale: float
) -> Tensor:
    """`kronecker_linear` as autograd takes it."""
    return _added(x, weight, bias, first, second, scale)[0]


def _added(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """x as a block X (c, d) per position: H = w1 X (p, a, d), then w2 along d; the sum and H."""
    (a, c), (b, d) = first.shape, second.shape
    blocks = x.reshape(-1, c, d)
    inner = torch.bmm(first.expand(blocks.shape[0], a, c), blocks)
    y = F.linear(x, weight, bias)
    y.view(-1, b).addmm_(inner.view(-1, d), second.t(), alpha=scale)
    return y, inner


class _KroneckerLinear(torch.autograd.Function):
    """`_kronecker_linear` with its gradients: with G as a block (a, b) per position, that of H is
    scale · G w2, that of w2 is scale · Σ Gᵀ H; that of w1 and the second part of that of x follow
    from H = w1 X.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor,
        second: Tensor,
        scale: float,
    ) -> Tensor:
        y, inner = _added(x, weight, bias, first, second, scale)
        ctx.save_for_backward(x, weight, first, second, inner)
        ctx.scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        return y

    @staticmethod
    @in_full
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, first, second, inner = tuple(ctx.saved_tensors)
        scale: float = ctx.scale  # pyright: ignore[reportAttributeAccessIssue]
        if torch.is_grad_enabled():
            return by_autograd(_kronecker_linear, (x, weight, None, first, second, scale), grad)
        for_x, _, _, for_first, for_second, _ = tuple(ctx.needs_input_grad)
        (a, c), (b, d) = first.shape, second.shape
        of_x = of_first = of_second = None
        g, inner = grad.reshape(-1, b), inner.view(-1, d)
        if for_second:  # with beta 0 the first matrix is not looked at
            of_second = torch.addmm(second, g.t(), inner, beta=0, alpha=scale)
        back = torch.addmm(inner, g, second, beta=0, alpha=scale).view(-1, a, d)
        if for_first:
            of_first = torch.bmm(back, x.reshape(-1, c, d).mT).sum(0)
        if for_x:
            of_x = torch.matmul(grad, weight)
            facing = first.t().expand(back.shape[0], c, a)
            of_x.view(-1, c, d).baddbmm_(facing, back)
        return of_x, None, None, of_first, of_second, None
