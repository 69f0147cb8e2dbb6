"""The forward of a hosted module: its adapters on activations, equal to running it merged.

With f_0 the base's own forward and W_k = W_{k-1} + t_k (op_k(W_{k-1}) - W_{k-1}), f_k runs with
W_k:

    sum      f_k(x) = f_{k-1}(x) + t_k change_k(x)
    input    f_k(x) = f_{k-1}(turned_k(x, t_k))
    output   f_k(x) = mapped_k(f_{k-1}(x), b_{k-1}, t_k)
    both     f_k(x) = y + t_k (mapped_k(f_{k-1}(turned_k(x, 1)), b_{k-1}, 1) - y), y = f_{k-1}(x)
    dora     f_k(x) = y + t_k (g (y + change_k(x)) - y) + b, y = f_{k-1}(x) - b_{k-1},
             g = m / ||W_{k-1} + ΔW_k||; per-input magnitudes scale x instead
    weight   f_k(x) = layer(x, W_k, b_k); W_0 of a packed layer is the dequantized weight, and the
             product is taken in the dtype of x
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftsurgery.algorithms import WeightAdapter
from peftsurgery.algorithms.base import is_one
from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import UnsupportedError, UsageError

from .composing import composed, composed_bias, composed_parameters, substituted
from .describing import runs_plainly
from .packed import is_packed
from .stack import Entry, Stack, strength_of

Arguments = tuple[object, ...]
Keywords = dict[str, object]


def run(module: nn.Module, stack: Stack, args: Arguments, kwargs: Keywords) -> object:
    """The forward of `module` with the adapters in force."""
    if stack.rows is not None:
        return _by_rows(module, stack, args, kwargs)
    return _through(module, stack, stack.plan, args, kwargs)


def _through(
    module: nn.Module,
    stack: Stack,
    entries: Sequence[Entry],
    args: Arguments,
    kwargs: Keywords,
) -> object:
    if stack.training:
        entries = [e for e in entries if not _left_out(e)]
    if not entries:
        return _base(module, args, kwargs)
    if stack.layer.kind in ("norm", "parameter"):
        with substituted(module, composed_parameters(module, entries)):
            return _base(module, args, kwargs)
    x, rest, keywords = _input(args, kwargs)
    return _Call(module, stack, entries, rest, keywords).output(len(entries), x)


def _base(module: nn.Module, args: Arguments, kwargs: Keywords) -> object:
    return module.hosted_class.forward(module, *args, **kwargs)  # type: ignore[union-attr, operator]


def _left_out(entry: Entry) -> bool:
    p = entry.dropout.module
    return p > 0 and bool(torch.rand(()) < p)


def _input(args: Arguments, kwargs: Keywords) -> tuple[Tensor, Arguments, Keywords]:
    if args:
        x, rest, keywords = args[0], args[1:], kwargs
    else:
        name = next(iter(kwargs), "")
        x, rest = kwargs.get(name), ()
        keywords = {k: v for k, v in kwargs.items() if k != name}
    if not isinstance(x, Tensor):
        raise UsageError(f"a layer with adapters got {type(x).__name__}, expected a tensor.")
    return x, rest, keywords


class _Call:
    """One forward of one module."""

    def __init__(
        self,
        module: nn.Module,
        stack: Stack,
        entries: Sequence[Entry],
        rest: Arguments,
        keywords: Keywords,
    ) -> None:
        self.module, self.stack, self.entries = module, stack, entries
        self.layer: Layer = stack.layer
        self.rest, self.keywords = rest, keywords

    def output(self, n: int, x: Tensor) -> Tensor:
        """f_n(x)."""
        start = n
        while start and self.entries[start - 1].side == "sum":
            start -= 1
        if start == 0:
            y = _base(self.module, (x, *self.rest), self.keywords)
            assert isinstance(y, Tensor)
        else:
            y = self._changed(start, x)
        for k in range(start, n):
            y = self._added(k, x, y)
        return y

    def _changed(self, n: int, x: Tensor) -> Tensor:
        """f_n(x) where entry n (from 1) is not a sum."""
        entry = self.entries[n - 1]
        adapter, side = entry.adapter, entry.side
        if side == "weight":
            return self._with_weight(n, x)
        if side == "dora":
            return self._dora(n, x)
        t = strength_of(entry)
        if side == "input":
            turned = adapter.turned(cast(x, adapter), self.layer, t)
            return self._biased(n - 1, self.output(n - 1, turned.to(x.dtype)))
        bias = composed_bias(self.module, self.entries[: n - 1])
        if side == "output":
            y = self.output(n - 1, x)
            mapped = adapter.mapped(cast(y, adapter), self.layer, bias, t)
            return self._biased(n - 1, mapped.to(y.dtype))
        turned = adapter.turned(cast(x, adapter), self.layer, 1.0)
        y = self.output(n - 1, turned.to(x.dtype))
        full = adapter.mapped(cast(y, adapter), self.layer, bias, 1.0).to(y.dtype)
        if not is_one(t):
            y = self.output(n - 1, x)
            full = y + t * (full - y)
        return self._biased(n - 1, full)

    def _with_weight(self, n: int, x: Tensor) -> Tensor:
        if runs_plainly(self.module):
            weight, bias = composed(self.module, self.entries[:n])
            return self.layer.apply(x, weight, bias)
        if is_packed(self.module):
            weight, bias = composed(self.module, self.entries[:n], rounded=False)
            bias = None if bias is None else bias.to(x.dtype)
            return self.layer.apply(x, weight.to(x.dtype), bias)
        with substituted(self.module, composed_parameters(self.module, self.entries[:n])):
            y = _base(self.module, (x, *self.rest), self.keywords)
        assert isinstance(y, Tensor)
        return y

    def _change(self, entry: Entry, x: Tensor) -> Tensor:
        """t-free change of one additive entry, dropout included."""
        adapter, dropout = entry.adapter, entry.dropout
        h = cast(x, adapter)
        training = self.stack.training
        if training and dropout.inputs and h.is_floating_point():
            h = F.dropout(h, dropout.inputs)
        change = adapter.change(h, self.layer)
        if entry.origin is not None:
            change = change - entry.origin.change(h, self.layer)
        if training and dropout.rows:
            change = change * _row_mask(change, self.layer, dropout.rows, dropout.rescale)
        return change

    def _added(self, k: int, x: Tensor, y: Tensor) -> Tensor:
        entry = self.entries[k]
        if entry.adapter._has_product:
            change = self._change(entry, x)
            if torch.compiler.is_compiling() or entry.strength != 1:
                change = change * entry.gain
            y = y + (change if change.dtype == y.dtype else change.to(y.dtype))
        return self._biased(k, y)

    def _biased(self, k: int, y: Tensor) -> Tensor:
        """The change of the bias by entry k (from 0)."""
        adapter = self.entries[k].adapter
        if adapter.bias is None:
            return y
        change = adapter.bias
        if adapter.bias_is_value:
            before = composed_bias(self.module, self.entries[:k])
            change = change if before is None else change.float() - before.float()
        change = _along(change * strength_of(self.entries[k]), y, self.layer.out_axis)
        return y + change.to(y.dtype)

    def _dora(self, n: int, x: Tensor) -> Tensor:
        entry = self.entries[n - 1]
        adapter, t = entry.adapter, strength_of(entry)
        bias = composed_bias(self.module, self.entries[: n - 1])
        gain = self._magnitude(n)
        on_input = (adapter.magnitude_axis == "in") == (self.layer.kind in ("linear", "conv"))
        always = torch.compiler.is_compiling() or entry.strength != 1
        raw = None if on_input and not always else self.output(n - 1, x)
        y = None if raw is None else self._without(raw, bias)
        if on_input:
            scaled = x * _along(gain, x, self.layer.in_axis).to(x.dtype)
            raw = self.output(n - 1, scaled)
            full = self._without(raw, bias) + self._change(entry, scaled)
        else:
            assert y is not None
            full = (y + self._change(entry, x)) * _along(gain, y, self.layer.out_axis)
        assert raw is not None
        result = full if y is None or not always else y + t * (full - y)
        if bias is not None:
            result = result + _along(bias, result, self.layer.out_axis)
        return self._biased(n - 1, result.to(raw.dtype))

    def _without(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y - _along(bias, y, self.layer.out_axis)

    def _magnitude(self, n: int) -> Tensor:
        """`WeightAdapter.gain` of entry n on W_{n-1} + ΔW."""
        adapter = self.entries[n - 1].adapter
        with torch.no_grad():
            weight, _ = composed(self.module, self.entries[: n - 1], rounded=False)
            direction = adapter.added(weight)
        return adapter.gain(direction)


def cast(x: Tensor, adapter: WeightAdapter) -> Tensor:
    """x in the dtype of the adapter's tensors, unless autocast decides."""
    for tensor in adapter._parameters.values():
        if tensor is None:
            continue
        same = x.dtype == tensor.dtype or not x.is_floating_point()
        return x if same or torch.is_autocast_enabled(x.device.type) else x.to(tensor.dtype)
    return x


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector shaped to broadcast along one (negative) axis."""
    return values if axis == -1 else values.reshape(-1, *[1] * (-axis - 1))


def _row_mask(change: Tensor, layer: Layer, p: float, rescale: bool) -> Tensor:
    """Output channels kept with probability 1 - p (LyCORIS drops rows of ΔW)."""
    size = change.shape[layer.out_axis]
    mask = (torch.rand(size, device=change.device) > p).to(change.dtype)
    if rescale:
        mask = mask / mask.mean()
    return _along(mask, change, layer.out_axis)


def _by_rows(module: nn.Module, stack: Stack, args: Arguments, kwargs: Keywords) -> object:
    """Each row of the batch through its own adapters; one base call per distinct choice."""
    assert stack.rows is not None
    x, rest, keywords = _input(args, kwargs)
    if stack.layer.kind == "parameter":
        raise UnsupportedError(
            f"{type(module).__name__}: adapters per row need a layer with one input; bare "
            "parameters serve the whole batch."
        )
    if x.shape[0] == 1 and len(stack.rows) > 1:
        x = x.expand(len(stack.rows), *x.shape[1:])
    if x.shape[0] != len(stack.rows):
        raise UsageError(
            f"{type(module).__name__}: {len(stack.rows)} rows have adapters, but the layer got "
            f"{x.shape[0]}."
        )
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, names in enumerate(stack.rows):
        groups.setdefault(names, []).append(row)
    outputs: list[Tensor] = []
    for names, rows in groups.items():
        part = x[torch.tensor(rows, device=x.device)] if len(groups) > 1 else x
        y = _through(module, stack, stack.live(names), (part, *rest), keywords)
        assert isinstance(y, Tensor)
        outputs.append(y)
    if len(outputs) == 1:
        return outputs[0]
    order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
    return torch.cat(outputs)[torch.argsort(order)]
