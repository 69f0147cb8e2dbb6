"""Changing what an adapter's modules are: another algorithm, or a difference in place of a new
value.

Fits state their loss per module. Every other step here is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import Full, LoKr, LoRA, SizedChange, WeightAdapter, difference
from peftsurgery.codec import BaseWeights
from peftsurgery.codec.placing import ungroup
from peftsurgery.errors import CannotFit, Finding, UnsupportedError
from peftsurgery.layouts import Layout
from peftsurgery.reports import Progress

CONVOLUTIONS = ("conv", "conv1", "conv2", "conv_in", "conv_out", "op")  # kernel larger than 1


def refit(
    adapter: Adapter,
    algorithm: str,
    rank: str | None,
    weights: BaseWeights | None,
    progress: Progress | None = None,
    *,
    factor: int | None = -1,
) -> dict[str, float]:
    """Replace every module by its fit in `algorithm` ("lora", "lokr" or "full"); returns the loss
    per module. factor: see `LoKr.fit`.

    Norms and pure bias changes stay as they are. A record that lay on a fused weight because its
    algorithm could not be split is split afterwards. Raises UnsupportedError naming the module when
    the base weight is needed and was not given, CannotFit when there is no fit.
    """
    losses: dict[str, float] = {}
    modules = list(adapter.modules.items())
    for done, (path, module) in enumerate(modules):
        if progress is not None:
            progress(done, len(modules), path)
        if len(module.shape) < 2 or set(module.tensors()) <= {"bias"}:
            continue
        if algorithm == "lora" and _is_plain(module) and rank is None:
            continue
        weight = weight_for(path, module, weights)
        if algorithm == "full":
            fitted = Full.fit(module, weight)
        else:
            try:
                if algorithm == "lokr":
                    fitted = LoKr.fit(module, rank, weight, factor=factor)
                else:
                    fitted = LoRA.fit(module, rank, weight)
            except CannotFit as error:
                raise CannotFit(f"{path}: {error}") from error
        exact = module if module.additive else Full.fit(module, weight)
        if weights is not None and module.maps_bias:
            bias = _mapped_bias(path, module, weights)
            exact, fitted = exact.with_tensors(bias=bias), fitted.with_tensors(bias=bias)
        losses[path] = difference(exact, fitted)
        adapter.modules[path] = fitted
    dropped = ("use_dora", "use_rslora")
    adapter.config = {k: v for k, v in adapter.config.items() if k not in dropped}
    for path, whole in ungroup(adapter).items():
        if whole in losses:
            losses[path] = losses[whole]
    return losses


def _is_plain(module: WeightAdapter) -> bool:
    return isinstance(module, LoRA) and module.additive and module.mid is None


def weight_for(
    path: str, module: WeightAdapter, weights: BaseWeights | None
) -> torch.Tensor | None:
    """The base weight where the fit needs it, or where it tells the kernel of a convolution; None
    where neither. Raises UnsupportedError when it is needed and was not given.
    """
    if not module.additive:
        if weights is None:
            why = f"{module.algorithm} maps it to another"
            if module.magnitude is not None or module.algorithm == "set":
                why = "a DoRA magnitude" if module.magnitude is not None else "a replaced weight"
            if isinstance(module, SizedChange):
                why = f"the tensors of a {module.algorithm} do not tell its shape"
            raise UnsupportedError(
                f"{path}: the change depends on the base weight ({why}). Pass --base CHECKPOINT."
            )
        return weights.weight(path)
    if weights is not None and weights.find(path) is not None:
        return weights.weight(path)
    flat = module.algorithm in ("loha", "lokr") and len(module.shape) == 2
    if flat and path.rpartition(".")[2] in CONVOLUTIONS:
        raise UnsupportedError(
            f"{path}: the {module.algorithm} factors of a convolution do not tell its kernel. Pass "
            "--base CHECKPOINT."
        )
    return None


def _mapped_bias(path: str, module: WeightAdapter, weights: BaseWeights) -> torch.Tensor | None:
    """The change of a bias that is mapped with the weight; None where there is no bias."""
    if weights.find(path, "bias") is None:
        return None
    before = weights.weight(path, "bias").float()
    after = module.merged_bias(before, 1.0)
    return None if after is None else after.detach() - before


def values_as_differences(adapter: Adapter, layout: Layout, weights: BaseWeights) -> list[Finding]:
    """Write new values as differences from the base where `layout` holds only differences.

    ΔW = value - W and Δb = value - b, in fp32, which is the same W' at every strength. Returns one
    finding for all of them, if any. Raises UnsupportedError when a value has another shape than the
    base's.
    """
    dialect = layout.dialect
    wanted = "set" not in dialect.algorithms and "full" in dialect.algorithms
    biases = dialect.bias_value is None and dialect.bias is not None and not dialect.bias_is_scaled
    replaced: list[str] = []
    for path, module in list(adapter.modules.items()):
        if module.algorithm == "set" and wanted:
            adapter.modules[path] = _difference(path, module, weights)
        elif module.bias is not None and module.bias_is_value and biases:
            adapter.modules[path] = module.with_tensors(
                bias=_minus(path, module.bias, lambda path=path: weights.weight(path, "bias")),
                bias_is_value=False,
            )
        else:
            continue
        adapter.parameters.pop(path, None)
        replaced.append(path)
    if not replaced:
        return []
    count = f"{len(replaced)} new values are" if len(replaced) > 1 else "the new value is"
    return [
        Finding(
            "info",
            "values-as-differences",
            f"{layout.title} has no keys for new values: {count} written as the difference from "
            "--base",
            replaced[0],
            "the result is right on that base only",
        )
    ]


def _difference(path: str, module: WeightAdapter, weights: BaseWeights) -> Full:
    value, bias = module.tensors().get("weight"), module.bias
    return Full(
        None if value is None else _minus(path, value, lambda: weights.weight(path)),
        bias=None if bias is None else _minus(path, bias, lambda: weights.weight(path, "bias")),
        stored=module.stored,
    )


def _minus(path: str, value: torch.Tensor, base: Callable[[], torch.Tensor]) -> torch.Tensor:
    """value - base in fp32, in the value's shape as long as both have as many rows and columns."""
    weight = base()
    same = value.numel() == weight.numel() and value.shape[0] == weight.shape[0]
    if not same:
        raise UnsupportedError(
            f"{path}: the new value has shape {list(value.shape)} and the base "
            f"{list(weight.shape)}: "
            "there is no difference to write. A layout that holds values (comfy, peft, diffusers) "
            "keeps it."
        )
    if value.is_meta:
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    return value.detach().float().reshape(weight.shape) - weight.float()
