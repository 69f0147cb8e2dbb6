"""Merging live adapters into the weights, and back to the exact bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftsurgery.errors import UsageError

from .composing import composed_parameters
from .controls import detach, stacks
from .hosting import stack_of
from .loading import components_of
from .stack import parameter_of
from .targets import hosts


@torch.no_grad()
def merge(model: object) -> None:
    """Write the composition of the active adapters into the weights, in fp32 with one rounding.

    Forward is that of the base afterwards. Parameters used by one module are changed in place;
    a tied one is replaced on its module alone, because the adapters are not on the others. What was
    there is kept on the CPU (a tied parameter as it is) for `unmerge`. UsageError when they are
    merged already, or rows of the batch have adapters of their own.
    """
    for stack in stacks(model).values():
        if stack.backup is not None:
            raise UsageError("merge: the adapters are merged already.")
        if stack.rows is not None:
            raise UsageError("merge: adapters chosen per row have no one merged weight.")
    plan: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for part in components_of(model).values():
        shared = shared_parameters(part)
        for module in hosts(part).values():
            stack = stack_of(module)
            entries = stack.live()
            values = composed_parameters(module, entries) if entries else {}
            plan.append((module, values))
            _write(module, values, shared)


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _write(module: nn.Module, values: dict[str, Tensor], shared: set[int]) -> None:
    backup: dict[str, object] = {}
    for dotted, value in values.items():
        path, _, name = dotted.rpartition(".")
        owner = module.get_submodule(path) if path else module
        old = parameter_of(module, dotted)
        if not isinstance(old, nn.Parameter) or id(old) in shared or old.shape != value.shape:
            backup[dotted] = old
            new = nn.Parameter(value.clone(), requires_grad=False)
            owner._parameters[name] = new
        else:
            backup[dotted] = old.detach().to("cpu", copy=True)
            old.copy_(value)
    stack = stack_of(module)
    stack.backup = backup
    stack.refresh()


@torch.no_grad()
def unmerge(model: object) -> None:
    """Put back the exact bytes that `merge` replaced; the adapters act again."""
    found = [stack for stack in stacks(model).values() if stack.backup is not None]
    if not found:
        raise UsageError("unmerge: nothing is merged.")
    for part in components_of(model).values():
        for module in hosts(part).values():
            stack = stack_of(module)
            for dotted, old in (stack.backup or {}).items():
                path, _, name = dotted.rpartition(".")
                owner = module.get_submodule(path) if path else module
                current = owner._parameters[name]
                if old is None or isinstance(old, nn.Parameter):
                    owner._parameters[name] = old
                elif isinstance(old, Tensor) and current is not None:
                    current.copy_(old)
            stack.backup = None
            stack.refresh()


def merge_and_detach(model: object) -> None:
    """Merge for good: a plain model without adapters or backups."""
    if not any(stack.backup is not None for stack in stacks(model).values()):
        merge(model)
    for stack in stacks(model).values():
        stack.backup = None
        for entry in stack.entries:
            entry.original = None  # the merged weight is what stays
    detach(model)
