"""From one record of a file to home modules: row operators undone, fused weights split where the
algebra allows.
"""

from __future__ import annotations

from peftsurgery import architectures
from peftsurgery.adapter import Adapter, is_group, members
from peftsurgery.algorithms import LoRA, WeightAdapter, split_blocks, swap_halves
from peftsurgery.architectures import Component, Site, group
from peftsurgery.errors import CannotFuse, CannotSplit, UnsupportedError, UsageError


def place(site: Site, adapter: WeightAdapter, source: str = "") -> dict[str, WeightAdapter]:
    """The home modules of a record at `site`: path -> adapter.

    One that cannot be split stays whole under its group name, one whose operator cannot be undone
    keeps the operator's mark. Raises UsageError when the rows do not divide as the site says.
    """
    mark = ""
    if site.operator == "swap_halves":
        try:
            adapter = swap_halves(adapter)
        except (CannotSplit, CannotFuse):
            mark = "~swap_halves"
    elif site.operator is not None and site.operator != "transpose":
        raise UnsupportedError(f"{site.name!r}: the row operator {site.operator!r} is not known.")
    if len(site.parts) == 1:
        return {site.parts[0] + mark: adapter}
    if adapter.shape[0] == 0:  # rows not known in number: the same map on each of them, or none
        try:
            return dict.fromkeys(site.parts, adapter.rows(0, 0))
        except CannotSplit:
            return {group(site.parts) + mark: adapter}
    unit, remainder = divmod(adapter.shape[0], sum(site.proportions))
    if remainder:
        raise UsageError(
            f"{source}: {site.name!r} has {adapter.shape[0]} output rows, which do not divide as "
            f"{':'.join(map(str, site.proportions))} into {', '.join(site.parts)}."
        )
    try:
        pieces: list[WeightAdapter] = []
        start = 0
        for proportion in site.proportions:
            pieces.append(adapter.rows(start, start + proportion * unit))
            start += proportion * unit
    except CannotSplit:
        return {group(site.parts) + mark: adapter}
    if all(isinstance(piece, LoRA) for piece in pieces):
        pieces = list(split_blocks(pieces))  # type: ignore[arg-type]
    return {
        part: piece
        for part, piece in zip(site.parts, pieces, strict=True)
        if not (_untouched(piece) and len(pieces) > 1 and not _untouched(adapter))
    }


def _untouched(adapter: WeightAdapter) -> bool:
    return (
        isinstance(adapter, LoRA)
        and adapter.magnitude is None
        and adapter.bias is None
        and adapter.is_zero()
    )


def ungroup(adapter: Adapter) -> dict[str, str]:
    """Split the records that stayed on a group and can be split now (another algorithm); new path
    -> old path.
    """
    architecture = architectures.get(adapter.architecture)
    origin: dict[str, str] = {}
    for path in [p for p in adapter.modules if is_group(p)]:
        name, _, inner = path.partition(":")
        site = _group_site(architecture.components[name], inner)
        if site is None:
            continue
        placed = place(site, adapter.modules[path])
        if set(placed) != {inner}:
            del adapter.modules[path]
            for part, piece in placed.items():
                adapter.modules[f"{name}:{part}"] = piece
                origin[f"{name}:{part}"] = path
    return origin


def _group_site(component: Component, inner: str) -> Site | None:
    parts = members(inner)
    operator = inner.partition("~")[2] or None
    for column in component.columns:
        site = component.site_of(column, parts[0])
        if site is not None and site.parts == parts and site.operator == operator:
            return site
    return None
