"""Freezing the base while adapters train, and undoing exactly that."""

from __future__ import annotations

from torch import nn

from .hosting import is_hosted, stack_of
from .stack import Stack


def _stacks(model: nn.Module) -> list[Stack]:
    return [stack_of(module) for module in model.modules() if is_hosted(module)]


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by name."""
    adapters = {id(p) for stack in _stacks(model) for p in stack.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) not in adapters}


def freeze(model: nn.Module) -> None:
    """requires_grad off for the base; the names are kept with the adapters, for `unfreeze`."""
    names = tuple(name for name, p in _own(model).items() if p.requires_grad)
    stacks = _stacks(model)
    if not stacks:
        return
    stacks[0].frozen = (*stacks[0].frozen, *names)
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def frozen_names(model: nn.Module) -> tuple[str, ...]:
    """Parameters of the base that `freeze` switched off."""
    return tuple(name for stack in _stacks(model) for name in stack.frozen)


def unfreeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """requires_grad on again for the names that `freeze` switched off."""
    own = _own(model)
    for name in names:
        if name in own:
            own[name].requires_grad_(True)


def hand_over(stack: Stack, model: nn.Module) -> None:
    """Give the names kept by a stack that goes to another one; call after it is gone."""
    others = _stacks(model)
    if stack.frozen and others:
        others[0].frozen = (*others[0].frozen, *stack.frozen)
    elif stack.frozen:
        unfreeze(model, stack.frozen)
