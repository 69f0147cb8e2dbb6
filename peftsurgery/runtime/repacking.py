"""Merging into packed weights: the change is rounded into the layer's own format, in place.

What the files' merge does (`peftsurgery merge`), on a live layer: the scales are those that are
there unless fresh ones round with less error, and the codes are chosen by nearest rounding where
that keeps the change, else with error feedback in its directions (`quantizers.rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftsurgery.algorithms import LoRA
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.quantizers import Grid, Packed, nearest
from peftsurgery.quantizers.held import held
from peftsurgery.quantizers.rounding import stochastic, subspace
from peftsurgery.quantizers.surviving import ENOUGH, Survival, directions, row_space, survival

from .packed import REORDERED, dense_weight, int8_parts
from .stack import Entry, parameter_of

ROUNDINGS = ("auto", "nearest", "stochastic", "subspace")
REMEDY = (
    "merge the files instead (peftsurgery merge BASE -a ADAPTER -o DST), dequantize the layer, or "
    "leave the adapter attached."
)
WEIGHT = "layer.weight"
READING = 0.01  # of the largest weight: more than the rounding to the dtype it is computed in


@dataclass(frozen=True)
class Parts:
    """The tensors that hold a packed weight: stored name -> every place it lies in."""

    places: Mapping[str, tuple[Tensor, ...]]
    extra: Mapping[str, Tensor]  # what the format has to know beside them

    @classmethod
    def of(cls, path: str, module: nn.Module) -> Parts:
        """UnsupportedError for layers that are not packed again here."""
        weight = module._parameters.get("weight")
        names = {cls.__name__ for cls in type(weight).__mro__}
        if "Params4bit" in names:
            return cls._four_bits(path, module)
        if "Int8Params" in names:
            return cls._eight_bits(module)
        raise UnsupportedError(
            f"{path}: {type(module).__name__} is packed in a way that live merging does not write "
            f"(it writes bitsandbytes 4-bit and 8-bit); {REMEDY}"
        )

    @classmethod
    def _four_bits(cls, path: str, module: nn.Module) -> Parts:
        weight = module._parameters["weight"]
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        if weight is None or state is None or getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedError(f"{path}: {REORDERED.format(type(module).__name__)}")
        places = {WEIGHT: (weight.data,), f"{WEIGHT}.absmax": (state.absmax,)}
        if state.nested:
            places[f"{WEIGHT}.nested_absmax"] = (state.state2.absmax,)
        described: dict[str, Tensor] = state.as_dict(packed=True)
        extra = {f"{WEIGHT}.{name}": tensor for name, tensor in described.items()}
        return cls(places, {n: t for n, t in extra.items() if n not in places})

    @classmethod
    def _eight_bits(cls, module: nn.Module) -> Parts:
        codes, largest = int8_parts(module)
        weight, state = module._parameters["weight"], getattr(module, "state", None)
        cached = [getattr(owner, "CB", None) for owner in (weight, state)]
        copies = [c for c in cached if isinstance(c, Tensor) and c.data_ptr() != codes.data_ptr()]
        return cls({WEIGHT: (codes, *copies), "layer.SCB": (largest,)}, {})

    def copies(self) -> dict[str, Tensor]:
        """The exact bytes, on the CPU."""
        return {n: t[0].detach().to("cpu", copy=True) for n, t in self.places.items()}

    def packed(self, path: str) -> Packed:
        """The weight as the formats see it, in copies on the CPU."""
        extra = {name: tensor.detach().cpu() for name, tensor in self.extra.items()}
        return held(path, {**self.copies(), **extra})

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Copy tensors of the stored names in place."""
        for name, tensors in self.places.items():
            for tensor in tensors:
                tensor.copy_(values[name].reshape(tensor.shape))


@dataclass(frozen=True)
class Repacked:
    """One layer's merged weight: values by stored name, not written yet, and what survives."""

    path: str
    module: nn.Module
    values: dict[str, Tensor]
    bias: Tensor | None
    survival: Survival
    rounding: str

    def write(self) -> dict[str, Tensor]:
        """Write the weight in place; returns the bytes that were there."""
        parts = Parts.of(self.path, self.module)
        former = parts.copies()
        parts.write(self.values)
        return former


def restore(path: str, module: nn.Module, former: Mapping[str, Tensor]) -> None:
    """Put back what `Repacked.write` returned."""
    Parts.of(path, module).write(former)


@torch.no_grad()
def repack(
    path: str, module: nn.Module, entries: Sequence[Entry], rounding: str, seed: int
) -> Repacked:
    """W_0 with the entries in order, rounded into the format it is packed in; nothing is written.

    CheckFailed when that gives NaN or infinity; UnsupportedError when the layer's library reads its
    weight otherwise than the format says.
    """
    device = next(iter(entries)).adapter.scale.device
    packed = Parts.of(path, module).packed(path)
    format = packed.format
    before = packed.dequantize()
    _check_reading(path, module, before)
    wanted: Tensor = before.to(device)
    bias = parameter_of(module, "bias")
    for entry in entries:
        wanted, bias = entry.composed(wanted, bias)
    if not bool(torch.isfinite(wanted).all()):
        raise CheckFailed(f"{path}: the merge gives NaN or infinity; nothing was merged.")
    matrix = format.to_matrix(packed, wanted.float().cpu())
    held_before = format.to_matrix(packed, before)
    change = matrix - held_before
    grid, scales = format.fit(packed, matrix)
    previous = format.grid(packed, 0, packed.rows)[1]

    def by_directions(rows: Tensor, grid: Grid, codes: Tensor) -> Tensor:
        basis = _basis(entries, change)
        return subspace(rows, grid, basis) if basis.shape[1] else nearest(rows, grid, codes)

    random = torch.Generator().manual_seed(seed)
    ways: dict[str, Callable[[Tensor, Grid, Tensor], Tensor]] = {
        "nearest": nearest,
        "stochastic": lambda rows, grid, _: stochastic(rows, grid, random),
        "subspace": by_directions,
    }
    taken = "nearest" if rounding == "auto" else rounding
    codes = ways[taken](matrix, grid, previous)
    found = survival(matrix, change, held_before, grid.values(codes))
    if rounding == "auto" and found.share < ENOUGH:
        taken = "subspace"
        codes = ways[taken](matrix, grid, previous)
        found = survival(matrix, change, held_before, grid.values(codes))
    parts = format.join(scales, format.pack(packed, codes))
    values = {packed.outlines[role].name: tensor for role, tensor in parts.items()}
    return Repacked(path, module, values, bias, found, taken)


def _check_reading(path: str, module: nn.Module, before: Tensor) -> None:
    """bitsandbytes 0.50 on CPUs reads 4-bit weights wrongly whose rows are no multiple of the
    block: what is written would not be what the layer computes with.
    """
    read = dense_weight(module).float().cpu()
    if float((read - before).abs().max()) > READING * float(before.abs().max()):
        raise UnsupportedError(
            f"{path}: {type(module).__name__} of {list(before.shape)}: bitsandbytes reads this "
            "weight otherwise on this device than its format says (known of CPUs, for rows that "
            f"are no multiple of the block size); {REMEDY}"
        )


def _basis(entries: Sequence[Entry], change: Tensor) -> Tensor:
    """Orthonormal input directions (columns, r) of the change."""
    inner: list[Tensor] = []
    for entry in entries:
        adapter = entry.adapter
        plain = isinstance(adapter, LoRA) and adapter.additive and entry.origin is None
        factors = adapter.factors() if plain else None
        if factors is None:
            return directions(change, 0)
        inner.append(factors[1].detach().float().cpu())
    found = row_space(torch.cat(inner))
    return directions(change, 0) if found is None else found


def check_survival(found: Sequence[Repacked], minimum: float) -> None:
    """CheckFailed when less than `minimum` of the change survives in all of them together."""
    total = Survival()
    for item in found:
        total.add(item.survival)
    if not found or total.share >= minimum:
        return
    worst = min(found, key=lambda item: item.survival.share)
    ways = ", ".join(dict.fromkeys(item.rounding for item in found))
    remedy = (
        "rounding='auto' keeps more; min_survival= accepts it."
        if "subspace" not in ways
        else "Merge into the unquantized base and quantize the result (peftsurgery merge, then "
        "quantize), leave the adapter attached, or accept it with min_survival=."
    )
    raise CheckFailed(
        f"merge: {total.share:.1%} of the change survives {ways} rounding into packed weights, "
        f"less than {minimum:.0%} (least in {worst.path}: {worst.survival.share:.1%}); nothing was "
        f"merged. {remedy}"
    )


def check_rounding(rounding: str) -> None:
    """UsageError for a rounding that is not there."""
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding={rounding!r}: expected one of {', '.join(ROUNDINGS)}.")
