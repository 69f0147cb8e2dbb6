"""Switching adapters of a live model: which act, how strongly, on which rows; taking them off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.errors import UsageError, nearest

from .freezing import frozen_names, hand_over, unfreeze
from .hosting import stack_of, unhost
from .loading import components_of
from .quantized_start import put_back
from .stack import Stack
from .targets import hosts


def stacks(model: object) -> dict[str, Stack]:
    """Path -> stack of every module with adapters, of a module or a pipeline."""
    found: dict[str, Stack] = {}
    for part, module in components_of(model).items():
        for path, hosted in hosts(module).items():
            found[f"{part}:{path}" if part else path] = stack_of(hosted)
    return found


def adapter_names(model: object) -> tuple[str, ...]:
    """Names of all attached adapters in the order attached."""
    return tuple(dict.fromkeys(n for stack in stacks(model).values() for n in stack.names))


def adapters(model: object, name: str = "default") -> dict[str, WeightAdapter]:
    """Module path -> live adapter of one name; a bare parameter is `path@parameter`."""
    require(model, name)
    found: dict[str, WeightAdapter] = {}
    for path, stack in stacks(model).items():
        for entry in stack.of(name):
            mark = entry.key.removeprefix(entry.name)
            found[path + mark] = entry.adapter
    return found


def require(model: object, *names: str) -> None:
    """UsageError when a name is not attached."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            close = nearest(name, known)
            hint = f" (closest: {', '.join(close)})" if close else ""
            raise UsageError(
                f"no adapter {name!r} is attached{hint}; there are {', '.join(known) or 'none'}."
            )


def _unmerged(model: object, verb: str) -> None:
    if any(stack.backup is not None for stack in stacks(model).values()):
        raise UsageError(f"{verb}: the adapters are merged into the weights; unmerge first.")


def activate(model: object, names: str | Sequence[str] | None = None) -> None:
    """Let these adapters act, in this order; None is all, in the order attached."""
    names = (names,) if isinstance(names, str) else None if names is None else tuple(names)
    require(model, *(names or ()))
    _unmerged(model, "activate")
    for stack in stacks(model).values():
        stack.active = names
        stack.refresh()


def set_strength(model: object, strength: float, name: str = "default") -> None:
    """W + t (W' - W) with this t for one adapter, everywhere."""
    require(model, name)
    _unmerged(model, "set_strength")
    for stack in stacks(model).values():
        for entry in stack.of(name):
            entry.set_strength(strength)


@contextlib.contextmanager
def disabled(model: object) -> Iterator[None]:
    """The base alone inside the block (merged adapters stay merged: UsageError)."""
    _unmerged(model, "disabled")
    mine = list(stacks(model).values())
    for stack in mine:
        stack.disabled += 1
        stack.refresh()
    try:
        yield
    finally:
        for stack in mine:
            stack.disabled -= 1
            stack.refresh()


@contextlib.contextmanager
def per_row(model: nn.Module, names: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """Row n of the batch goes through the adapter (or stack of adapters) names[n], None through the
    base; training too. Layers whose input has another number of rows raise UsageError, but for 1,
    which is repeated.
    """
    rows = tuple(() if n is None else (n,) if isinstance(n, str) else tuple(n) for n in names)
    require(model, *{name for row in rows for name in row})
    mine = list(stacks(model).values())
    before = [stack.rows for stack in mine]
    for stack in mine:
        stack.rows = rows
        stack.refresh()
    try:
        yield
    finally:
        for stack, old in zip(mine, before, strict=True):
            stack.rows = old
            stack.refresh()


def delete(model: object, name: str = "default") -> None:
    """Take one adapter off; modules without any other are as they were before."""
    require(model, name)
    _unmerged(model, "delete")
    for module in components_of(model).values():
        for hosted in hosts(module).values():
            stack = stack_of(hosted)
            for entry in stack.of(name):
                put_back(hosted, entry)
            stack.remove(name)
            if not stack.entries:
                unhost(hosted)
                hand_over(stack, module)


def detach(model: object) -> None:
    """Take all adapters off: the same class objects, parameters and requires_grad as before."""
    _unmerged(model, "detach")
    for module in components_of(model).values():
        names = frozen_names(module)
        for hosted in hosts(module).values():
            for entry in stack_of(hosted).entries:
                put_back(hosted, entry)
            unhost(hosted)
        unfreeze(module, names)


def hot_swap(model: object, source: Adapter | dict[str, WeightAdapter], name: str) -> None:
    """Copy other values into an attached adapter of the same shapes, in place: nothing recompiles.

    source   live path -> adapter (of `adapters`, say), or an `Adapter` of a single component.
    UsageError naming the first module or tensor that differs; nothing is changed then.
    """
    live = adapters(model, name)
    given = source
    if isinstance(given, Adapter):
        given = {path.partition(":")[2]: m for path, m in given.modules.items()}
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for path in {**live, **given}:
        if path not in live or path not in given:
            where = "the attached adapter" if path not in live else "the new one"
            raise UsageError(f"hot_swap: {path!r} is not in {where}.")
        old, new = live[path], given[path]
        ours, theirs = old.tensors(), new.tensors()
        shapes = {n: tuple(t.shape) for n, t in ours.items()}
        if type(old) is not type(new) or shapes != {n: tuple(t.shape) for n, t in theirs.items()}:
            raise UsageError(f"hot_swap: {path!r} has other tensors than the attached adapter.")
        pairs += [(ours[n], theirs[n]) for n in ours]
        pairs.append((old.scale, new.scale))
    with torch.no_grad():
        for old, new in pairs:
            old.copy_(new)
