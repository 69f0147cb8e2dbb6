"""Merging live adapters into the weights, and back to the exact bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.surviving import MIN_SURVIVAL

from .composing import composed_parameters
from .controls import detach, stacks
from .hosting import stack_of
from .loading import components_of
from .packed import is_packed
from .repacking import REMEDY, Repacked, check_rounding, check_survival, repack, restore
from .stack import parameter_of
from .targets import hosts


@torch.no_grad()
def merge(
    model: object,
    *,
    rounding: str = "auto",
    min_survival: float = MIN_SURVIVAL,
    seed: int = 0,
) -> None:
    """Write the composition of the active adapters into the weights, in fp32 with one rounding.

    Forward is that of the base afterwards. Parameters used by one module are changed in place;
    a tied one is replaced on its module alone, because the adapters are not on the others. What was
    there is kept on the CPU (a tied parameter as it is) for `unmerge`. UsageError when they are
    merged already, or rows of the batch have adapters of their own.

    The weights of bitsandbytes layers are packed again in their own format:
    rounding       "nearest", "subspace" (error feedback in the directions of the change),
                   "stochastic" (with `seed`), or "auto": for each layer nearest where that keeps
                   98 % of the change, else subspace
    min_survival   the share of the change that has to be left in them, taken together

    CheckFailed when less survives; UnsupportedError for layers packed otherwise. Nothing is merged
    then.
    """
    check_rounding(rounding)
    for stack in stacks(model).values():
        if stack.backup is not None:
            raise UsageError("merge: the adapters are merged already.")
        if stack.rows is not None:
            raise UsageError("merge: adapters chosen per row have no one merged weight.")
    repacked: dict[nn.Module, Repacked] = {}
    for part in components_of(model).values():
        shared = shared_parameters(part)
        for path, module in hosts(part).items():
            entries = stack_of(module).live()
            if entries and is_packed(module):
                if id(module._parameters.get("weight")) in shared:
                    raise UnsupportedError(
                        f"{path}: its packed weight is shared with other modules, which would be "
                        f"merged with it; {REMEDY}"
                    )
                repacked[module] = repack(path, module, entries, rounding, seed)
    check_survival(list(repacked.values()), min_survival)
    for part in components_of(model).values():
        shared = shared_parameters(part)
        for module in hosts(part).values():
            entries = stack_of(module).live()
            packed = repacked.get(module)
            if packed is not None:
                _write_packed(module, packed, shared)
            else:
                _write(module, composed_parameters(module, entries) if entries else {}, shared)


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _write_packed(module: nn.Module, packed: Repacked, shared: set[int]) -> None:
    bias = parameter_of(module, "bias")
    values = {} if packed.bias is None or bias is None else {"bias": packed.bias.to(bias.dtype)}
    former = packed.write()
    _write(module, values, shared)
    stack = stack_of(module)
    stack.backup = {**(stack.backup or {}), "weight": former}


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
        for place, module in hosts(part).items():
            stack = stack_of(module)
            for dotted, old in (stack.backup or {}).items():
                if isinstance(old, dict):
                    restore(place, module, old)
                    continue
                path, _, name = dotted.rpartition(".")
                owner = module.get_submodule(path) if path else module
                current = owner._parameters[name]
                if old is None or isinstance(old, nn.Parameter):
                    owner._parameters[name] = old
                elif isinstance(old, Tensor) and current is not None:
                    current.copy_(old)
            stack.backup = None
            stack.refresh()


def merge_and_detach(
    model: object,
    *,
    rounding: str = "auto",
    min_survival: float = MIN_SURVIVAL,
    seed: int = 0,
) -> None:
    """Merge for good: a model without adapters or backups; see `merge` for the options."""
    if not any(stack.backup is not None for stack in stacks(model).values()):
        merge(model, rounding=rounding, min_survival=min_survival, seed=seed)
    for stack in stacks(model).values():
        stack.backup = None
        for entry in stack.entries:
            entry.original = None  # the merged weight is what stays
    detach(model)
