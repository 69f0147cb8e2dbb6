"""Which modules and bare parameters of a model are meant."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import UsageError, nearest

from .describing import describe
from .hosting import STACK, is_hosted, stack_of
from .packed import is_packed
from .stack import Stack

Predicate = Callable[[str, nn.Module], bool]
Target = str | re.Pattern[str] | Predicate
V = TypeVar("V")

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Site:
    """A parameter that can carry an adapter.

    path        what targets are matched against and files name: the module's, or the parameter's
                own where it is not a layer's weight (`…attn.in_proj`, `…experts.gate_up_proj`)
    host        the module whose forward uses the parameter, and its path
    parameter   name below the host, and that of its bias
    """

    path: str
    host: nn.Module
    host_path: str
    layer: Layer
    parameter: str = "weight"
    bias: str | None = "bias"

    @property
    def module(self) -> nn.Module:
        """The module that owns the parameter."""
        owner = self.parameter.rpartition(".")[0]
        return self.host.get_submodule(owner) if owner else self.host


def sites(model: nn.Module) -> dict[str, Site]:
    """Every site of a model by path, in the model's order; shared modules count once."""
    found: dict[str, Site] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Stack):
            inside |= {id(m) for m in module.modules()}
        if id(module) in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.add(id(module.out_proj))
            for site in _attention(path, module):
                found[site.path] = site
            continue
        layer = stack_of(module).layer if is_hosted(module) else describe(module)
        if layer is not None and layer.kind != "parameter":
            held = "bias" in module._parameters or isinstance(getattr(module, "bias", None), Tensor)
            found[path] = Site(path, module, path, layer, bias="bias" if held else None)
        if is_packed(module):
            # its other parameters are parts of the weight, a module below it is what it was made of
            inside |= {id(m) for m in module.modules()}
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or (layer is not None and name in ("weight", "bias")):
                continue
            full = f"{path}.{name}" if path else name
            found[full] = Site(full, module, path, Layer("parameter"), name, None)
    return found


def _attention(path: str, module: nn.MultiheadAttention) -> list[Site]:
    """in_proj and out_proj, which MultiheadAttention reads as parameters; the three separate
    projections when key and value have other sizes.
    """
    start = f"{path}." if path else ""
    layer = Layer("parameter")
    bias = None if module.in_proj_bias is None else "in_proj_bias"
    if module.in_proj_weight is not None:
        projections = [Site(f"{start}in_proj", module, path, layer, "in_proj_weight", bias)]
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        projections = [Site(start + n, module, path, layer, n, None) for n in names]
    bias = None if module.out_proj.bias is None else "out_proj.bias"
    out = Site(f"{start}out_proj", module, path, layer, "out_proj.weight", bias)
    return [*projections, out]


def named(target: object, path: str) -> bool:
    """Whether a suffix, a glob or a compiled expression names this path.

    A plain string is the path or its end after a dot; with any of `*?[` it is a glob over the whole
    path or an end of it; an expression must match the whole path.
    """
    if isinstance(target, re.Pattern):
        return target.fullmatch(path) is not None
    text = str(target)
    if any(c in text for c in "*?["):
        return fnmatch.fnmatchcase(path, text) or fnmatch.fnmatchcase(path, f"*.{text}")
    return path == text or path.endswith(f".{text}")


def first_match(patterns: Mapping[str, V] | None, path: str, default: V) -> V:
    """The value of the first pattern that names the path (PEFT's rule for rank_pattern)."""
    for pattern, value in (patterns or {}).items():
        if named(pattern, path):
            return value
    return default


def _as_list(targets: Target | Iterable[Target]) -> list[Target]:
    if isinstance(targets, (str, re.Pattern)) or callable(targets):
        return [targets]
    return list(targets)


def select(
    model: nn.Module,
    targets: Target | Iterable[Target],
    exclude: Target | Iterable[Target] = (),
    *,
    known: Mapping[str, Site] | None = None,
) -> dict[str, Site]:
    """Sites named by any of the targets and by none of `exclude`.

    "all-linear" is every Linear and transformers Conv1D but the output head. A predicate gets
    (path, module). A name of a MultiheadAttention means all its projections. UsageError when a
    target names nothing.
    """
    known = sites(model) if known is None else known
    chosen: dict[str, Site] = {}
    for target in _as_list(targets):
        hits = {p: s for p, s in known.items() if _hit(model, target, s)}
        if not hits:
            last = {path.rpartition(".")[2] for path in known}
            close = nearest(str(target), last | set(known)) if isinstance(target, str) else []
            hint = f" (closest: {', '.join(map(repr, close))})" if close else ""
            raise UsageError(f"target {target!r} names no layer or parameter of the model{hint}.")
        chosen |= hits
    for target in _as_list(exclude):
        chosen = {p: s for p, s in chosen.items() if not _hit(model, target, s)}
    return {path: site for path, site in known.items() if path in chosen}


def _hit(model: nn.Module, target: Target, site: Site) -> bool:
    if target == ALL_LINEAR:
        linear = site.layer.kind in ("linear", "hf_conv1d")
        return linear and site.host is not _head(model)
    if isinstance(target, (str, re.Pattern)):
        whole = isinstance(site.host, nn.MultiheadAttention) and named(target, site.host_path)
        return whole or named(target, site.path)
    return bool(target(site.path, site.module))


def _head(model: nn.Module) -> object:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def hosts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with adapters, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if is_hosted(module) and not path.endswith(f".{STACK}")
    }
