"""Modules joined as a layout stores them, so that a fused weight gets one rank and not three."""

from __future__ import annotations

from dataclasses import replace

from peftsurgery import architectures
from peftsurgery.adapter import Adapter, members
from peftsurgery.algorithms import LoRA, WeightAdapter
from peftsurgery.architectures import Site
from peftsurgery.codec.labelling import vocabulary
from peftsurgery.codec.placing import ungroup
from peftsurgery.errors import CannotFuse
from peftsurgery.layouts import layout_named


def joined(adapter: Adapter, to: str) -> Adapter:
    """The adapter with one record per weight that the layout `to` stores: those of a fused weight
    (`attn.[to_q,to_k,to_v]`) are joined, exactly, the others are the same objects.

    Parts of different algorithms, or that cannot be joined in their own, are joined as LoRAs.
    Raises CannotFuse where that is not possible either.
    """
    layout, architecture = layout_named(to), architectures.get(adapter.architecture)
    modules: dict[str, WeightAdapter] = {}
    groups: dict[str, tuple[Site, dict[str, WeightAdapter]]] = {}
    ndims = dict(adapter.magnitude_ndim)
    for path, module in adapter.modules.items():
        component = architecture.components[path.partition(":")[0]]
        inner = path.partition(":")[2]
        site = component.site_of(vocabulary(layout, component), members(inner)[0])
        if site is None or len(site.parts) < 2 or site.operator or inner not in site.parts:
            modules[path] = module
            continue
        whole = f"{component.name}:{site.home}"
        modules.setdefault(whole, module)  # its place in the order
        groups.setdefault(whole, (site, {}))[1][inner] = module
        if path in ndims:
            ndims[whole] = ndims[path]
    for whole, (site, found) in groups.items():
        modules[whole] = _fused(whole, site, found)
    return replace(adapter, modules=modules, magnitude_ndim=ndims)


def apart(adapter: Adapter) -> Adapter:
    """The same with joined records split into home modules again where their algorithm allows."""
    split = replace(adapter, modules=dict(adapter.modules))
    ungroup(split)
    return split


def _fused(whole: str, site: Site, found: dict[str, WeightAdapter]) -> WeightAdapter:
    first, share = next(
        (found[p], n) for p, n in zip(site.parts, site.proportions, strict=True) if p in found
    )
    unit = first.shape[0] // share
    parts = [found.get(p, n * unit) for p, n in zip(site.parts, site.proportions, strict=True)]
    try:
        if all(type(part) is type(first) for part in found.values()):
            return type(first).fuse(parts)
    except CannotFuse:
        pass  # as LoRAs below
    try:
        low = [LoRA.fit(p) if isinstance(p, WeightAdapter) and p.additive else p for p in parts]
        return LoRA.fuse(low)
    except CannotFuse as error:
        raise CannotFuse(f"{whole}: {error}") from error
