"""Detection is explanation: the architecture whose tables account for every module name wins.

Each module name is resolved by container (how the name is prefixed and whether it is flattened),
component and vocabulary. Ties are broken by pinned shapes, then by what the file says of itself in
its metadata, then by asking. Only headers are looked at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from peftsurgery import architectures
from peftsurgery.architectures import Architecture, Component, Site
from peftsurgery.codec.keys import HeaderTensor, Parsed, Record, rank_and_shape, repaired
from peftsurgery.errors import UnsupportedError, UsageError, nearest
from peftsurgery.layouts import LAYOUTS, Layout

PEFT_PREFIX = "base_model.model."
LYCORIS_PREFIX = "lycoris_"
FLAT_FAMILIES = ("kohya", "onetrainer")
SPECIFIC = ("sd1", "sd2", "sdxl", "flux")
STATED = {
    "sd1": ("stable-diffusion-v1", "sd_v1", "sd_1"),
    "sd2": ("stable-diffusion-v2", "sd_v2", "sd_2"),
    "sdxl": ("stable-diffusion-xl", "sdxl"),
    "flux": ("flux-1", "flux.1", "flux1", "flux"),
}


@dataclass(frozen=True)
class Placement:
    """Where a module name of the file belongs: container, component, vocabulary, and the site in
    its table.
    """

    container: str
    component: str
    column: str
    site: Site


@dataclass
class Explanation:
    """What one architecture makes of a file's module names."""

    architecture: Architecture
    parsed: Parsed
    placements: dict[str, Placement] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    pinned: int = 0
    contradicted: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every module is placed."""
        return not self.unexplained

    @property
    def fit(self) -> tuple[int, int]:
        """How well the pinned shapes agree; larger is better."""
        return -len(self.contradicted), self.pinned


def is_denoiser(component: str) -> bool:
    """Whether a component is the model a layout's unprefixed names mean (not a text encoder or
    controlnet).
    """
    return not component.startswith(("text_encoder", "controlnet"))


def denoiser(architecture: Architecture) -> Component:
    """The component that prefix-less containers mean."""
    return next(c for c in architecture.components.values() if is_denoiser(c.name))


class Resolver:
    """Resolves module names of a file for one architecture.

    `known`: module names of a base checkpoint (component -> dotted home names); with it, flattened
    names of any model can be restored, because flattening is then a look-up."""

    def __init__(
        self,
        architecture: Architecture,
        known: Mapping[str, Iterable[str]] | None = None,
        tensors: Mapping[str, HeaderTensor] | None = None,
    ) -> None:
        self.architecture = architecture
        self.tensors = tensors
        self.known: dict[str, dict[str, str]] = {}
        self.clashes: dict[str, tuple[str, str]] = {}
        for component, names in (known or {}).items():
            flat: dict[str, str] = {}
            for name in names:
                other = flat.setdefault(name.replace(".", "_"), name)
                if other != name:
                    self.clashes[name.replace(".", "_")] = (other, name)
            self.known[component] = flat
        self.flat: list[tuple[str, Component]] = []
        self.dotted: list[tuple[str, str, Component]] = []
        for component in architecture.components.values():
            for family in FLAT_FAMILIES:
                self.flat += [(p + "_", component) for p in component.prefixes.get(family, ())]
            if component.name != "controlnet":
                self.flat.append((LYCORIS_PREFIX, component))  # whatever it was wrapped around
            self.dotted += [
                (p + ".", "comfy", component) for p in component.prefixes.get("comfy", ())
            ]
            if architecture.name != "llm":
                self.dotted.append((component.name + ".", "component", component))
        self.flat.sort(key=lambda item: -len(item[0]))
        self.dotted.sort(key=lambda item: -len(item[0]))

    def resolve(self, record: Record, *, control: bool = False) -> Placement | None:
        """The placement of one record's module name, or None."""
        module = record.module
        prefix, separator, rest = module.partition(":")
        if separator:  # a folder of PEFT folders: the sub-folder names the component
            component = self.architecture.components.get(prefix)
            if component is None or not rest.startswith(PEFT_PREFIX):
                return None
            return self._dotted("peft", component, rest.removeprefix(PEFT_PREFIX), record)
        if module.startswith(PEFT_PREFIX):
            name = module.removeprefix(PEFT_PREFIX)
            for component in self.architecture.components.values():
                if component.name != "controlnet":
                    placement = self._dotted("peft", component, name, record)
                    if placement is not None:
                        return placement
            return None
        candidates: list[Placement] = []
        for start, component in self.flat:
            if module.startswith(start) and "." not in module:
                placement = self._flat(component, module.removeprefix(start))
                if placement is not None:
                    candidates.append(placement)
                    if start != LYCORIS_PREFIX:
                        break
        if candidates:
            return self._fitting(candidates, record)
        for start, container, component in self.dotted:
            if module.startswith(start):
                placement = self._dotted(container, component, module.removeprefix(start), record)
                if placement is not None:
                    return placement
        return self._bare(record, control)

    def _fitting(self, candidates: list[Placement], record: Record) -> Placement:
        """The first whose pinned shape agrees: CLIP-L and CLIP-G have the same module names."""
        if len(candidates) > 1 and self.tensors is not None and record.algorithm not in ("", "set"):
            _, (out, into) = rank_and_shape(record, self.tensors)
            for placement in candidates:
                path = placement.site.parts[0]
                if self.architecture.misfit(placement.component, path, out, into) is None:
                    return placement
        return candidates[0]

    def _bare(self, record: Record, control: bool) -> Placement | None:
        components = self.architecture.components
        component = components.get("controlnet") if control else denoiser(self.architecture)
        if component is None:
            return None
        if self.architecture.name == "llm" and (
            component.site_flat(component.home, record.module.replace(".", "_")) is None
        ):
            return None
        if self.architecture.name == "generic" and "." not in record.module:
            return None
        return self._dotted("bare", component, record.module, record)

    def _flat(self, component: Component, name: str) -> Placement | None:
        known = self.known.get(component.name, {}).get(name)
        if known is not None:
            site = component.site(component.home, known)
            if site is not None:
                if name in self.clashes:
                    first, second = self.clashes[name]
                    raise UsageError(
                        f"{name!r}: the module names {first!r} and {second!r} of the base flatten "
                        "to it; a "
                        "flattened layout cannot tell them apart."
                    )
                return Placement("flat", component.name, component.home, site)
        for column in component.columns:
            site = component.site_flat(column, name)
            if site is not None:
                return Placement("flat", component.name, column, site)
        return None

    def _dotted(
        self, container: str, component: Component, name: str, record: Record
    ) -> Placement | None:
        for candidate in respellings(name):
            for column in component.columns:
                site = component.site(column, candidate)
                if site is None and record.algorithm in ("set", "full"):
                    site = _parameter_site(component, column, candidate, record.parameter)
                if site is not None:
                    return Placement(container, component.name, column, site)
        return None


def _parameter_site(component: Component, column: str, module: str, parameter: str) -> Site | None:
    """A row that names a single parameter (a norm's scale), seen as a module."""
    found = component.tensor(column, f"{module}.{parameter}")
    if found is None:
        return None
    homes = tuple(name.rpartition(".")[0] for name in found.parts)
    return Site(column, module, homes, found.proportions, found.operator)


def respellings(name: str) -> list[str]:
    """The name itself, and without diffusers' old attention-processor spelling
    (`…processor.to_q_lora`).
    """
    from peftsurgery.layouts import OLD_ATTENTION

    names = [name]
    for plain, old in OLD_ATTENTION.items():
        if name.endswith("." + old):
            names.append(name.removesuffix(old) + plain)
    return names


def explain(
    parsed: Parsed,
    tensors: Mapping[str, HeaderTensor],
    architecture: Architecture,
    known: Mapping[str, Iterable[str]] | None = None,
    *,
    whole: bool = True,
) -> Explanation:
    """Place every record of `parsed` in `architecture` and check its pinned shapes.

    whole: go on after the first record that has no place; otherwise that one alone is in
    `unexplained`."""
    resolver = Resolver(architecture, known, tensors)
    explanation = Explanation(architecture, parsed)
    control = "lora_controlnet" in parsed.carried or any(
        r.suffixes & {"up", "down"} for r in parsed.records.values()
    )
    for module, record in parsed.records.items():
        placement = resolver.resolve(record, control=control)
        if placement is None:
            explanation.unexplained.append(module)
            if not whole:
                break
            continue
        explanation.placements[module] = placement
        if record.algorithm in ("", "set"):
            rank_and_shape(record, tensors)  # there must be something to apply
            continue
        _, (out, into) = rank_and_shape(record, tensors)
        shares, path = placement.site.proportions, placement.site.parts[0]
        out = out * shares[0] // sum(shares)
        if architecture.misfit(placement.component, path, out, into) is not None:
            explanation.contradicted.append(module)
        elif architecture.pin(placement.component, path) is not None:
            explanation.pinned += 1
    return explanation


def detect(
    parsed: Parsed,
    tensors: Mapping[str, HeaderTensor],
    *,
    source: str = "",
    architecture: str | None = None,
    known: Mapping[str, Iterable[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Explanation:
    """The explanation that accounts for every module of the file.

    Tried as the file stands, then after removing wrapper segments, then after undoing doubled
    prefixes; each repair is counted in `parsed.repairs`. Families without a table take what none of
    these explains.

    Raises UsageError naming the first keys the two best candidates cannot explain, or the
    candidates between which shapes and metadata do not decide."""
    names = (architecture,) if architecture else architectures.ARCHITECTURES
    if not parsed.records:
        raise UsageError(
            f"{source}: no adapter tensors found among the keys"
            + (f", first {parsed.unknown[0]!r}" if parsed.unknown else " (the file is empty)")
            + ". Expected LoRA, LoHa, LoKr, full or norm suffixes; a whole checkpoint is not an "
            "adapter."
        )
    tables = [name for name in names if name in SPECIFIC]
    free = [name for name in names if name not in SPECIFIC]  # these accept nearly any dotted name

    def complete(candidate: Parsed, which: list[str]) -> list[Explanation]:
        found = (
            explain(candidate, tensors, architectures.get(name), known, whole=False)
            for name in which
        )
        return [e for e in found if e.complete]

    tried: list[Parsed] = []
    for candidate in _repairs(parsed):
        tried.append(candidate)
        if found := complete(candidate, tables):
            return _decide(found + complete(candidate, free), source, metadata or {})
    if found := complete(tried[-1], free):
        return _decide(found, source, metadata or {})
    attempts = [
        explain(candidate, tensors, architectures.get(name), known)
        for candidate in tried
        for name in names
    ]
    raise UsageError(_cannot_explain(source, attempts))


def _repairs(parsed: Parsed) -> Iterator[Parsed]:
    """The file as it stands, and after each repair that changes a name."""
    yield parsed
    for stage in ("wrappers", "doubled"):
        candidate = repaired(parsed, stage)
        if candidate.repairs != parsed.repairs:
            yield candidate
        parsed = candidate


def _decide(complete: list[Explanation], source: str, metadata: Mapping[str, str]) -> Explanation:
    specific = [e for e in complete if e.architecture.name in SPECIFIC]
    clean = [e for e in specific if not e.contradicted]
    if not clean:
        others = [e for e in complete if e not in specific]
        if others:
            return others[0]
    best = max(e.fit for e in clean or specific)
    tied = [e for e in clean or specific if e.fit == best]
    if len(tied) > 1:
        stated = [e for e in tied if states(metadata, e.architecture.name)]
        if len(stated) == 1:
            return stated[0]
        raise AmbiguousArchitecture(source, tied)
    return tied[0]


class AmbiguousArchitecture(UsageError):
    """Several architectures explain every key and nothing in the file decides between them."""

    def __init__(self, source: str, candidates: list[Explanation]) -> None:
        self.candidates = candidates
        names = ", ".join(e.architecture.name for e in candidates)
        super().__init__(
            f"{source}: every key is explained by {names} alike, and no pinned shape or metadata "
            "decides. "
            f"Pass --architecture with one of them."
        )


def states(metadata: Mapping[str, str], name: str) -> bool:
    """Whether the file's own metadata (modelspec or sd-scripts) names this architecture."""
    said = " ".join(
        metadata.get(key, "").lower() for key in ("modelspec.architecture", "ss_base_model_version")
    )
    if not said.strip():
        return False
    words = [w for w in STATED.get(name, ()) if any(part.startswith(w) for part in said.split())]
    return bool(words)


def _cannot_explain(source: str, attempts: list[Explanation]) -> str:
    attempts = sorted(attempts, key=lambda e: len(e.unexplained))
    lines = [f"{source}: not every key could be explained."]
    for e in attempts[:2]:
        total = len(e.parsed.records)
        keys = [next(iter(e.parsed.records[m].keys.values())) for m in e.unexplained[:3]]
        lines.append(
            f"  {e.architecture.name}: {len(e.unexplained)} of {total} modules unexplained, first "
            f"{', '.join(map(repr, keys))}: no module of {e.architecture.title} has such a name"
            f"{_closest(e, e.unexplained[0])}."
        )
    lines.append("  Pass --architecture, or --base with the checkpoint it was trained on.")
    return "\n".join(lines)


def _closest(explanation: Explanation, module: str) -> str:
    component = denoiser(explanation.architecture)
    flat = "." not in module
    name = re.sub(r"^(lora_[a-z0-9]+_|lycoris_|base_model\.model\.|diffusion_model\.)", "", module)
    names = [n for c in component.columns for n in component.closest(c, name, flat=flat, n=1)]
    close = nearest(name, names, n=1)
    return f" (closest: {close[0]!r})" if close else ""


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


def written(dialect) -> set[str]:
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


def prefix_of(layout: Layout, component: Component) -> str:
    """`find_prefix`, or UnsupportedError."""
    prefix = find_prefix(layout, component)
    if prefix is None:
        raise UnsupportedError(
            f"the layout {layout.name!r} has no prefix for the component {component.name!r} of "
            "this "
            "architecture."
        )
    return prefix
