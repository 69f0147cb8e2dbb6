"""Gradients worked out by hand: when they may stand in for autograd's, and what is left to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import BackwardCFunction

Argument = Tensor | float | bool | None
Backward = Callable[[BackwardCFunction, Tensor], tuple[Tensor | None, ...]]


def by_hand(device: torch.device) -> bool:
    """Whether a `torch.autograd.Function` that knows the backward pass and nothing else may run:
    not in a compiled graph, under autocast, inside transforms of `torch.func`, or in forward mode.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(device.type)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def in_full(backward: Backward) -> Backward:
    """The backward pass of a node, with autocast off where it is called under it."""

    @functools.wraps(backward)
    def run(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_autocast_enabled(grad.device.type):
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run


def run_node(node: type[Function], *arguments: Argument) -> Tensor:
    """`node.apply(*arguments)` where `by_hand` holds, without asking for transforms once more."""
    return super(Function, node).apply(*arguments)  # pyright: ignore[reportAttributeAccessIssue]


def by_autograd(
    function: Callable[..., Tensor], arguments: Sequence[Argument], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of `function(*arguments)` one by one, as autograd finds them and with gradients
    of their own; None for what needs none.
    """
    given = [a if isinstance(a, Tensor) and a.requires_grad else None for a in arguments]
    wanted = [a for a in given if a is not None]
    found = iter(torch.autograd.grad(function(*arguments), wanted, grad, create_graph=True))
    return tuple(None if a is None else next(found) for a in given)
