"""encode: Adapter -> keys and tensors of a layout, or a refusal that says what would make it
possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from peftsurgery import architectures
from peftsurgery.adapter import Adapter, is_group, members
from peftsurgery.algorithms import LoKr, WeightAdapter, swap_halves
from peftsurgery.algorithms.slots import bit_equal
from peftsurgery.architectures import Component, Site
from peftsurgery.codec.describing import config_of, metadata_of
from peftsurgery.codec.keys import BASE_COPY, is_unknown
from peftsurgery.codec.labelling import find_prefix, vocabulary
from peftsurgery.codec.peft_only import are_values
from peftsurgery.codec.refusals import LEFT_OUT, LORA_ONLY, Refused, way_out
from peftsurgery.codec.resolving import is_denoiser
from peftsurgery.codec.suffixes import Suffixes, fold_scale
from peftsurgery.errors import CannotFuse, CannotSplit, Finding, UnsupportedError
from peftsurgery.layouts import Layout, dialect_of, layout_named


@dataclass
class Encoded:
    """What is to be written: one part per folder ("" for a single file)."""

    tensors: dict[str, dict[str, torch.Tensor]]  # part -> key -> tensor
    metadata: dict[str, str]
    configs: dict[str, dict[str, object]] = field(
        default_factory=dict
    )  # part -> adapter_config.json
    sources: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # key -> module paths it was made of
    findings: list[Finding] = field(default_factory=list)
    release: Callable[[], None] | None = None  # gives memory back that tensors lie in as in a file


def encode(
    adapter: Adapter,
    layout: str,
    *,
    fold_alpha: bool = False,
    remedy: str | None = None,
    keep: Callable[[WeightAdapter], WeightAdapter] | None = None,
) -> Encoded:
    """Write `adapter` in `layout`'s keys.

    fold_alpha: multiply the scale into the factors instead of storing alpha (the factors' dtype
    rounds it). keep: gets every module that is made of several, and may put it elsewhere.

    Raises UnsupportedError naming the first module the layout cannot hold, how many there are, and
    the option of `convert` that makes it possible, or `remedy` instead. Shapes, dtypes and bytes of
    factors are kept wherever nothing has to change.
    """
    return Encoder(adapter, layout_named(layout), fold_alpha, remedy, keep).run()


class Encoder:
    """One encoding of `adapter` into `layout`."""

    def __init__(
        self,
        adapter: Adapter,
        layout: Layout,
        fold_alpha: bool,
        remedy: str | None = None,
        keep: Callable[[WeightAdapter], WeightAdapter] | None = None,
    ) -> None:
        self.adapter = adapter
        self.layout = layout
        self.remedy = remedy
        self.keep = keep or (lambda module: module)
        self.fold = fold_alpha or layout.alpha == "none"
        self.architecture = architectures.get(adapter.architecture)
        self.out: dict[str, dict[str, torch.Tensor]] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.written: dict[str, dict[str, WeightAdapter]] = {}  # component -> name -> adapter
        self.refusals: list[tuple[str, str, str | None]] = []  # module, reason, remedy
        self.findings: list[Finding] = []
        self.suffixes = Suffixes(
            layout, self.architecture, fold=self.fold, ndims=adapter.magnitude_ndim
        )
        self.in_folders = layout.alpha == "config" and len(adapter.components) > 1

    def run(self) -> Encoded:
        """See `encode`."""
        if reason := self._adapter_refused():
            for path in self.adapter.modules:
                self.refusals.append((path, *reason))
            raise UnsupportedError(self._refusal())
        for component_name in self.adapter.components:
            component = self.architecture.components[component_name]
            if reason := self._component_refused(component):
                for path in self.adapter.of(component_name):
                    remedy = self._drop(component_name)
                    self.refusals.append((f"{component_name}:{path}", reason, remedy))
                continue
            self._component(component)
        self._extras()
        self._values_alone()
        self._untranslated()
        if self.refusals:
            raise UnsupportedError(self._refusal())
        metadata, notes = metadata_of(self.adapter, self.layout, self.written)
        configs: dict[str, dict[str, object]] = {}
        if self.layout.alpha == "config":
            configs = {
                (c if self.in_folders else ""): config_of(self.adapter, self.layout, c, modules)
                for c, modules in self.written.items()
            }
        findings = [*self.findings, *self.suffixes.findings, *notes]
        return Encoded(self.out, metadata, configs, self.sources, findings)

    # what the layout cannot hold ----------------------------------------------------------------

    def _adapter_refused(self) -> tuple[str, str] | None:
        layout = self.layout
        if layout.families and self.architecture.name not in layout.families:
            families = ", ".join(layout.families)
            return (
                f"{layout.title} exists for {families} only, and this adapter is for "
                f"{self.architecture.title}",
                "--to peft holds any adapter",
            )
        if self.adapter.config.get("layer_replication") and layout.alpha != "config":
            return (
                "its layers are those of a model with repeated layers (layer_replication), and "
                "only a PEFT folder says so",
                "--to peft keeps it",
            )
        return None

    def _values_alone(self) -> None:
        """New values under their plain names are an adapter only beside something trained."""
        kinds = {m.algorithm for found in self.written.values() for m in found.values()}
        if (
            kinds == {"set"}
            and not self.suffixes.tuned
            and self.layout.dialect.algorithms["set"]["weight"] == "weight"
        ):
            reason = f"{self.layout.title} holds new values only beside a trained module"
            for path in self.adapter.modules:
                self.refusals.append((path, reason, "--to comfy holds values alone"))

    def _untranslated(self) -> None:
        if self.architecture.name != "generic" or not self.adapter.layout:
            return
        if layout_named(self.adapter.layout).container != self.layout.container:
            self.findings.append(
                Finding(
                    "warning",
                    "untranslated-names",
                    "there is no table for this family: the modules keep the names they had",
                    next(iter(self.adapter.modules)),
                    f"programs that read {self.layout.title} may call them otherwise",
                )
            )

    def _component_refused(self, component: Component) -> str | None:
        layout = self.layout
        if layout.components and component.name not in layout.components:
            return f"{layout.title} holds only {', '.join(layout.components)} modules"
        if (
            not layout.components
            and component.name == "controlnet"
            and layout.container != "component"
        ):
            return f"{layout.title} has no place for a controlnet"
        if (
            not layout.text_encoders
            and not is_denoiser(component.name)
            and component.name != "controlnet"
        ):
            return f"{layout.title} has no place for text encoders"
        if layout.name == "lycoris" and len(self.adapter.components) > 1:
            return (
                f"{layout.title} wraps one model per file, and this adapter changes "
                f"{', '.join(self.adapter.components)}"
            )
        if self.architecture.name == "llm" and layout.container not in ("peft", "flat"):
            return f"{layout.title} is a diffusion layout and has no names for a language model"
        if self.architecture.name == "llm" and layout.name not in ("peft", "lycoris"):
            return f"{layout.title} has no prefix for a language model"
        return None

    @staticmethod
    def _drop(component: str) -> str:
        return f"--drop '{component}{'' if ':' in component else ':*'}' leaves it out on request"

    def _refusal(self) -> str:
        module, reason, own = self.refusals[0]
        remedy = self.remedy or own
        others = len(self.refusals) - 1
        more = f" ({others} more modules cannot either)" if others else ""
        hint = f" {remedy[0].upper()}{remedy[1:]}." if remedy else ""
        return f"{module}: cannot be written as {self.layout.name}: {reason}{more}.{hint}"

    # modules ------------------------------------------------------------------------------------

    def _component(self, component: Component) -> None:
        column = vocabulary(self.layout, component)
        own = self.adapter.of(component.name)
        self.suffixes.kinds = frozenset(module.algorithm for module in own.values())
        self.suffixes.tuned = self.layout.alpha == "config" and are_values(
            self.suffixes.kinds, own, self.adapter.config
        )
        sites: dict[str, tuple[Site, dict[str, WeightAdapter]]] = {}
        for path, module in own.items():
            full = f"{component.name}:{path}"
            site = component.site_of(column, members(path)[0])
            if site is None:
                self.refusals.append(
                    (
                        full,
                        f"the {column} names of {self.architecture.title} have no such module",
                        self._drop(full),
                    )
                )
                continue
            sites.setdefault(site.name, (site, {}))[1][path] = module
        for site, found in sites.values():
            paths = tuple(f"{component.name}:{path}" for path in found)
            try:
                module = self._at_site(site, found)
                self._write(component, site, module, paths)
            except (CannotFuse, CannotSplit) as error:
                self.refusals.append((paths[0], str(error).rstrip("."), way_out(found.values())))
            except UnsupportedError as error:
                remedy = error.remedy if isinstance(error, Refused) else LEFT_OUT
                self.refusals.append((paths[0], str(error).rstrip("."), remedy))

    def _at_site(self, site: Site, found: Mapping[str, WeightAdapter]) -> WeightAdapter:
        """The adapter of one named module of the layout, from the home modules found for it."""
        whole = site.home
        marked = f"{whole}~{site.operator}" if site.operator else None
        if marked is not None and marked in found:
            return found[marked]
        grouped = [path for path in found if is_group(path)]
        if whole not in found and grouped:
            axis = found[grouped[0]].magnitude_axis
            kind = found[grouped[0]].algorithm if axis is None else f"DoRA (norm per {axis}put)"
            raise CannotSplit(
                f"{grouped[0]!r} is one {kind} record over a fused weight that {self.layout.title} "
                "stores apart, and the algorithm cannot be split there"
            )
        if whole in found:
            module = found[whole]
        else:
            first, share = next(
                (found[p], n)
                for p, n in zip(site.parts, site.proportions, strict=True)
                if p in found
            )
            unit = first.shape[0] // share
            parts = [
                found.get(part, proportion * unit)
                for part, proportion in zip(site.parts, site.proportions, strict=True)
            ]
            kinds = {type(part) for part in parts if isinstance(part, WeightAdapter)}
            if len(kinds) > 1:
                names = ", ".join(sorted(kind.algorithm for kind in kinds))
                raise CannotFuse(
                    f"{whole!r} would fuse different algorithms ({names}) into one weight"
                )
            module = self.keep(type(first).fuse(parts))
        return swap_halves(module) if site.operator == "swap_halves" else module

    def _write(
        self, component: Component, site: Site, module: WeightAdapter, paths: tuple[str, ...]
    ) -> None:
        dialect = dialect_of(self.layout, component.name)
        module = self._folded(module)
        name = self._name(component, self._parameter(component, site, module))
        part = component.name if self.in_folders else ""
        target = self.out.setdefault(part, {})
        for suffix, tensor in self.suffixes.of(dialect, component, site, module).items():
            key = suffix if suffix.startswith("=") else f"{name}{dialect.joint}{suffix}"
            key = key.removeprefix("=")
            if key in target and suffix.startswith("="):
                if bit_equal(target[key], tensor):
                    self.sources[f"{part}/{key}" if part else key] += paths
                    continue
                raise Refused(
                    f"{self.layout.title} has one {key!r} for all modules, and another module has "
                    "a different one",
                    LORA_ONLY,
                )
            if key in target:
                raise Refused(
                    f"{key!r} would be written twice: two module names flatten to one",
                    "a dotted layout tells them apart",
                )
            target[key] = tensor
            self.sources[f"{part}/{key}" if part else key] = paths
        self.written.setdefault(component.name, {})[site.name] = module

    def _parameter(self, component: Component, site: Site, module: WeightAdapter) -> str:
        """The name to write: ComfyUI finds what is not a module's `weight` by the parameter's own
        name (`….scale`).
        """
        if self.layout.container == "comfy" and module.algorithm in ("set", "full"):
            column = vocabulary(self.layout, component)
            found = component.tensor_of(column, f"{site.parts[0]}.weight")
            if found is not None and len(site.parts) == 1 and not found.name.endswith(".weight"):
                return found.name
        return site.name

    def _folded(self, module: WeightAdapter) -> WeightAdapter:
        if self.fold and module.algorithm in ("lora", "loha", "lokr", "glora"):
            return fold_scale(module)
        if isinstance(module, LoKr) and module.rank is None and self.layout.alpha == "tensor":
            return fold_scale(module)  # LyCORIS ignores alpha when both factors are full
        return module

    def _name(self, component: Component, dotted: str) -> str:
        if self.layout.spelling:
            plain = next((p for p in self.layout.spelling if dotted.endswith("." + p)), None)
            if plain is None:
                raise Refused(
                    f"{self.layout.title} names only attention projections, not {dotted!r}",
                    LEFT_OUT,
                )
            dotted = dotted.removesuffix(plain) + self.layout.spelling[plain]
        prefix = find_prefix(self.layout, component)
        if prefix is None:
            raise Refused(
                f"{self.layout.title} has no prefix for the {component.name} of "
                f"{self.architecture.title}",
                "--to peft or diffusers keeps the dotted name",
            )
        return prefix + (dotted.replace(".", "_") if self.layout.container == "flat" else dotted)

    # beside the modules -------------------------------------------------------------------------

    def _extras(self) -> None:
        for key, tensor in self.adapter.extras.items():
            control = key == "lora_controlnet" and self.layout.name == "sai-control-lora"
            if control or (key.startswith("bundle_emb.") and self.layout.embeddings):
                self.out.setdefault("", {})[key] = tensor
                self.sources[key] = (key,)
            elif key.endswith(BASE_COPY) and self.layout.alpha == "config":
                part, _, name = key.rpartition(":")
                self.out.setdefault(part if self.in_folders else "", {})[name] = tensor
                self.sources[f"{part}/{name}" if part else name] = (key,)
            elif is_unknown(key) and not self.in_folders and key not in self.out.get("", {}):
                self.out.setdefault("", {})[key] = tensor
                self.sources[key] = (key,)
            elif key == "lora_controlnet":
                self.findings.append(
                    Finding(
                        "info", "marker-dropped", "the control-LoRA marker has no meaning here", key
                    )
                )
            else:
                self.refusals.append(
                    (
                        key,
                        f"{self.layout.title} has no place for {_kind(key)}",
                        f"--drop '{key}' leaves it out on request",
                    )
                )

        if self.layout.name == "sai-control-lora":  # ComfyUI and diffusers know the file by it
            self.out.setdefault("", {}).setdefault("lora_controlnet", torch.zeros(()))


def _kind(key: str) -> str:
    """What a carried tensor is, in words."""
    if is_unknown(key):
        return "a key that nothing explains"
    if key.endswith(BASE_COPY):
        return "a copy of the base's own weight"
    return "textual-inversion vectors"
