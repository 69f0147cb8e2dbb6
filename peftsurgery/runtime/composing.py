"""Weights with adapters applied, one after the other: what merging writes and forward falls back
on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .stack import Entry, base_weight, parameter_of, strength_of


def composed(
    module: nn.Module, entries: Sequence[Entry], *, rounded: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(W_n, b_n) of the module's `weight` and `bias` under the entries in order, computed in fp32
    and rounded once to the base's dtype (the bias to the weight's).
    """
    base = base_weight(module, "weight")
    bias = parameter_of(module, "bias")
    weight: Tensor = base
    for entry in entries:
        weight, bias = entry.composed(weight, bias)
    if not rounded:
        return weight.float(), bias
    return weight.to(base.dtype), None if bias is None else bias.to(base.dtype)


def composed_bias(module: nn.Module, entries: Sequence[Entry]) -> Tensor | None:
    """b_n alone; the base's own when no entry is there."""
    bias = parameter_of(module, "bias")
    for entry in entries:
        bias = entry.adapter.merged_bias(bias, strength_of(entry))
    return bias


def composed_parameters(module: nn.Module, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Every parameter the entries change, by dotted name, rounded to its dtype."""
    changed: dict[str, Tensor] = {}
    for name in dict.fromkeys(entry.parameter for entry in entries):
        base = base_weight(module, name)
        mine = [entry for entry in entries if entry.parameter == name]
        slots = [entry for entry in mine if entry.slot is not None]
        if slots:
            pieces: list[Tensor] = list(base.unbind(0))
            for entry in slots:
                assert entry.slot is not None
                pieces[entry.slot] = entry.composed(pieces[entry.slot], None)[0]
            changed[name] = torch.stack([piece.to(base.dtype) for piece in pieces])
            continue
        weight, bias_name = base, mine[0].bias
        bias = parameter_of(module, bias_name)
        for entry in mine:
            weight, bias = entry.composed(weight, bias)
        changed[name] = weight.to(base.dtype)
        if bias is not None and bias_name is not None:
            changed[bias_name] = bias.to(base.dtype)
    return changed


@contextlib.contextmanager
def substituted(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Attributes of the module (and of modules below) read as these tensors inside the block.

    An instance attribute comes before a registered parameter; not for several threads on one
    module at once.
    """
    placed: list[tuple[nn.Module, str]] = []
    try:
        for dotted, value in values.items():
            path, _, name = dotted.rpartition(".")
            owner = module.get_submodule(path) if path else module
            owner.__dict__[name] = value
            placed.append((owner, name))
        yield
    finally:
        for owner, name in placed:
            del owner.__dict__[name]
