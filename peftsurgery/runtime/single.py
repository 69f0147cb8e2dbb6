"""The forward of a module with one adapter in force and nothing beside its map.

That is what training mostly is. The formulas are those of `running` for a stack of one; saved are
its search through the stack and, where it pays, a second product of the layer's size: the layer
runs once with W + t ΔW (see `WeightAdapter.folds`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftsurgery.algorithms import WeightAdapter
from peftsurgery.algorithms.base import is_one
from peftsurgery.algorithms.layer import Layer
from peftsurgery.algorithms.one_node import OneNode

from .running import cast, run
from .stack import Entry, Stack, parameter_of, strength_of

_PRECISE = (torch.float32, torch.float64)
_MANY = 1 << 30  # positions, where their number must not become a guard of a compiled graph
_SHAPES = 256  # decisions kept


def run_single(module: nn.Module, stack: Stack, entry: Entry, x: object) -> object:
    """The output for one input and no other argument; `entry` is `stack.single`."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    joint = entry.joint
    if joint is not None and weight is not None and type(x) is Tensor:  # noqa: SIM102
        if _joins(joint, stack, entry, x, weight, bias):
            return joint.linear(x, weight, bias)
    side, layer, adapter = entry.side, stack.layer, entry.adapter
    whole = stack.whole and weight is not None
    if not whole:
        bias = parameter_of(module, "bias")  # packed layers of other libraries have plain tensors
    if not isinstance(x, Tensor) or (side == "dora" and not whole):
        return run(module, stack, (x,), {})
    strength = strength_of(entry)
    if side == "weight":
        if weight is None or not whole or not weight.is_floating_point():
            return run(module, stack, (x,), {})
        composed, bias = adapter.merged(weight, bias, strength)
        if composed.dtype != weight.dtype:
            composed = composed.to(weight.dtype)
        return layer.apply(x, composed, None if bias is None else bias.to(weight.dtype))
    if side == "dora":
        assert weight is not None
        if layer.kind != "linear" or adapter.magnitude_axis != "out" or not is_one(strength):
            return run(module, stack, (x,), {})
        return _dora(adapter, stack, x, weight, bias)

    def base(x: Tensor) -> Tensor:
        if whole:
            assert weight is not None
            return layer.apply(x, weight, bias)
        return module.hosted_class.forward(module, x)  # type: ignore[union-attr, operator]

    if side == "sum":
        if not adapter._has_product:
            return base(x)
        if whole and weight is not None and _folds(adapter, stack, x, weight):
            return layer.apply(x, adapter.added(weight, strength), bias)
        return adapter.onto(base(x), cast(x, adapter), layer, strength)
    if side == "output":
        y = base(x)
        return adapter.mapped(cast(y, adapter), layer, bias, strength).to(y.dtype)
    once = strength if side == "input" else 1.0
    turned = adapter.turned(cast(x, adapter), layer, once).to(x.dtype)
    full = base(turned)
    if side == "input":
        return full
    full = adapter.mapped(cast(full, adapter), layer, bias, 1.0).to(full.dtype)
    return full if is_one(strength) else torch.lerp(base(x), full, strength)


def _dora(
    adapter: WeightAdapter, stack: Stack, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """g (W x + change(x)) + b, g = m / ||W + ΔW|| per output."""
    layer = stack.layer
    if _folds(adapter, stack, x, weight):
        direction = adapter.added(weight)
        return layer.apply(x, direction * adapter.gain(direction)[:, None], bias)
    with torch.no_grad():
        direction = adapter.added(weight.float())
    y = layer.apply(x, weight)
    full, gain = y + adapter.change(cast(x, adapter), layer), adapter.gain(direction)
    full = full * gain if bias is None else torch.addcmul(bias, full, gain)
    return full.to(y.dtype)


def _joins(
    joint: OneNode, stack: Stack, entry: Entry, x: Tensor, weight: Tensor, bias: Tensor | None
) -> bool:
    """Whether the layer and the adapter run as one node. Whether that pays is decided once for each
    shape of x.
    """
    if not joint.takes(x, weight, bias) or entry.strength != 1 or not stack.whole:
        return False  # `takes` first: a compiled graph is not to look at the strength
    found = stack.joining.get(x.shape)
    if found is None:
        if len(stack.joining) >= _SHAPES:
            stack.joining.clear()
        found = type(weight) is nn.Parameter and joint.joins(weight, x.numel() // x.shape[-1])
        stack.joining[x.shape] = found
    return found


def _folds(adapter: WeightAdapter, stack: Stack, x: Tensor, weight: Tensor) -> bool:
    """Whether the layer is run with W + t ΔW: for the price, and never where W + t ΔW would be
    rounded to fewer digits than `change` has. Decided once for each shape of x.
    """
    if torch.compiler.is_compiling():
        return _pays(adapter, stack.layer, x, weight, _MANY)
    key = (x.shape, x.dtype, weight.dtype)
    found = stack.folding.get(key)
    if found is None:
        if len(stack.folding) >= _SHAPES:
            stack.folding.clear()
        found = _pays(adapter, stack.layer, x, weight, x.numel() // max(x.shape[-1], 1))
        stack.folding[key] = found
    return found and not torch.is_autocast_enabled(x.device.type)


def _pays(adapter: WeightAdapter, layer: Layer, x: Tensor, weight: Tensor, positions: int) -> bool:
    if weight.dtype not in _PRECISE or type(weight) is not nn.Parameter:
        return False
    if layer.kind != "linear":
        return type(adapter).change is WeightAdapter.change
    return x.dtype == weight.dtype and adapter.folds(weight, positions)
