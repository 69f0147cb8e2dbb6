"""From a module name of a file to its place: container, component, vocabulary, and the site in its
table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peftsurgery.architectures import Architecture, Component, Site
from peftsurgery.codec.keys import HeaderTensor, Record, rank_and_shape
from peftsurgery.errors import UsageError
from peftsurgery.layouts import OLD_ATTENTION

PEFT_PREFIX = "base_model.model."
LYCORIS_PREFIX = "lycoris_"
FLAT_FAMILIES = ("kohya", "onetrainer")


@dataclass(frozen=True)
class Placement:
    """Where a module name of the file belongs: container, component, vocabulary, and the site in
    its table.
    """

    container: str
    component: str
    column: str
    site: Site


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
    names of any model can be restored, because flattening is then a look-up.
    """

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
        """CLIP-L and CLIP-G share their module names: the one of the base, or whose shape fits."""
        candidates = [c for c in candidates if c.component in self.known] or candidates
        if len(candidates) > 1 and self.tensors is not None and record.algorithm not in ("", "set"):
            _, (out, into) = rank_and_shape(record, self.tensors)
            for placement in candidates:
                path = placement.site.parts[0]
                sizes = out or None, into or None
                if self.architecture.misfit(placement.component, path, *sizes) is None:
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
    names = [name]
    for plain, old in OLD_ATTENTION.items():
        if name.endswith("." + old):
            names.append(name.removesuffix(old) + plain)
    return names
