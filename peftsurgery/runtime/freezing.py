"""What is switched off in the base while adapters are attached, and undoing exactly that: training,
and the re-ordering of bitsandbytes.

On a CPU with AVX512-BF16 a `Linear4bit` re-orders its weight at its first call in eval mode. That
order has no gradients and is not undone exactly, so no layer of the model does it meanwhile.
"""

from __future__ import annotations

from torch import nn

from peftsurgery.errors import UnsupportedError

from .hosting import is_hosted, stack_of
from .packed import REORDERED
from .stack import Stack

REORDERS = "support_avx512bf16_for_cpu"  # an attribute of Linear4bit


def _stacks(model: nn.Module) -> list[Stack]:
    return [stack_of(module) for module in model.modules() if is_hosted(module)]


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by name."""
    adapters = {id(p) for stack in _stacks(model) for p in stack.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) not in adapters}


def keep_order(model: nn.Module) -> None:
    """Switch the re-ordering of bitsandbytes' 4-bit layers off; call with adapters attached."""
    stacks = _stacks(model)
    if not stacks:
        return
    for path, module in model.named_modules():
        if getattr(module, REORDERS, False):
            setattr(module, REORDERS, False)
            stacks[0].frozen = (*stacks[0].frozen, f"{path}.{REORDERS}")


def check_order(model: nn.Module) -> None:
    """UnsupportedError when a layer is in an order that has no gradients."""
    for path, module in model.named_modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedError(f"{path}: {REORDERED.format(type(module).__name__)}")


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
    """What `freeze` and `keep_order` switched off in the base."""
    return tuple(name for stack in _stacks(model) for name in stack.frozen)


def unfreeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """On again what `freeze` and `keep_order` switched off: parameters by their names, and
    re-ordering layers.
    """
    own = _own(model)
    for name in names:
        path, _, last = name.rpartition(".")
        if name in own:
            own[name].requires_grad_(True)
        elif last == REORDERS:
            setattr(model.get_submodule(path), REORDERS, True)


def hand_over(stack: Stack, model: nn.Module) -> None:
    """Give the names kept by a stack that goes to another one; call after it is gone."""
    others = _stacks(model)
    if stack.frozen and others:
        others[0].frozen = (*others[0].frozen, *stack.frozen)
    elif stack.frozen:
        unfreeze(model, stack.frozen)
