"""The layout row that describes a file, and what a layout writes for a component: vocabulary and
prefix.
"""

from __future__ import annotations

from peftsurgery.architectures import Component
from peftsurgery.codec.detect import Explanation
from peftsurgery.codec.resolving import PEFT_PREFIX, is_denoiser
from peftsurgery.layouts import LAYOUTS, Dialect, Layout


def label(explanation: Explanation, alphas: bool) -> tuple[Layout, list[str]]:
    """The layout row that describes a file best, and in what it deviates from that row.

    alphas: whether the file has alpha tensors.
    """
    placements = explanation.placements
    suffixes = {s for r in explanation.parsed.records.values() for s in r.suffixes}
    containers = {p.container for p in placements.values()}
    ranked: list[tuple[int, int, Layout, list[str]]] = []
    for order, layout in enumerate(LAYOUTS):
        if layout.families and explanation.architecture.name not in layout.families:
            continue
        deviations: list[str] = []
        penalty = 0
        if containers != {layout.container}:
            penalty += 100
            deviations.append(f"prefixes of {', '.join(sorted(containers - {layout.container}))}")
        dialects = (layout.dialect, layout.text_encoder_dialect, layout.controlnet_dialect)
        known = {s for d in dialects if d for s in written(d)}
        if extra := suffixes - known:
            penalty += 5 * len(extra)
            deviations.append(f"suffixes {', '.join(sorted(extra))}")
        if alphas != (layout.alpha == "tensor"):
            penalty += 2
        if layout.components and {p.component for p in placements.values()} - set(
            layout.components
        ):
            penalty += 50
        ranked.append((penalty, order, layout, deviations))
    ranked.sort(key=lambda item: item[:2])
    judged: list[tuple[int, int, Layout, list[str]]] = []
    for penalty, order, layout, deviations in ranked:
        if judged and penalty > min(item[0] for item in judged):
            break  # looking at every name can only add to it
        if wrong := _other_vocabulary(explanation, layout):
            penalty += 4
            deviations.append(f"{wrong} names of another vocabulary")
        if prefixed := _other_prefix(explanation, layout):
            penalty += 8
            deviations.append(f"{prefixed} names with another prefix")
        judged.append((penalty, order, layout, deviations))
    _, _, layout, deviations = min(judged, key=lambda item: item[:2])
    return layout, deviations


def written(dialect: Dialect) -> set[str]:
    """Every suffix a dialect can write."""
    own = {s for fields in dialect.algorithms.values() for s in fields.values()}
    shared = (
        dialect.alpha,
        dialect.magnitude,
        dialect.bias,
        dialect.norm_bias,
        dialect.bias_value,
        dialect.padded_shape,
    )
    return own | {s for s in shared if s}


def vocabulary(layout: Layout, component: Component) -> str:
    """The column of `component`'s table that `layout` writes."""
    family = {"preferred": "kohya", "native": "comfy"}.get(layout.vocabulary)
    if family is not None:
        return component.vocabularies.get(family, (component.home,))[0]
    return layout.vocabulary if layout.vocabulary in component.columns else component.home


def _other_vocabulary(explanation: Explanation, layout: Layout) -> int:
    """How many modules are not named in the vocabulary that `layout` writes."""
    components = explanation.architecture.components
    expected = {name: vocabulary(layout, component) for name, component in components.items()}
    return sum(
        components[p.component].site(expected[p.component], p.site.name) is None
        for p in explanation.placements.values()
        if p.column != expected.get(p.component, p.column)
    )


def _other_prefix(explanation: Explanation, layout: Layout) -> int:
    """How many flattened modules do not begin as `layout` writes them."""
    if layout.container != "flat":
        return 0
    components = explanation.architecture.components
    prefixes = {name: find_prefix(layout, component) for name, component in components.items()}
    wrong = 0
    for module, placement in explanation.placements.items():
        prefix = prefixes.get(placement.component)
        wrong += prefix is None or not module.startswith(prefix)
    return wrong


def find_prefix(layout: Layout, component: Component) -> str | None:
    """What `layout` puts before a module name of `component`, separator included; None when it has
    no place for it.
    """
    if layout.container == "bare":
        return ""
    if layout.container == "peft":
        return PEFT_PREFIX
    if layout.container == "component":
        return component.name + "."
    family = layout.prefixes[0 if is_denoiser(component.name) else 1]
    separator = "_" if layout.container == "flat" else "."
    if family == "lycoris":
        return "lycoris" + separator
    known = component.prefixes.get(family, ())
    return known[0] + separator if known else None
