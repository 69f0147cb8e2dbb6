"""encode: Adapter -> keys and tensors of a layout, or a refusal that says what would make it possible."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from peftsurgery import architectures
from peftsurgery.adapter import Adapter, is_group, members
from peftsurgery.algorithms import LoKr, LoRA, WeightAdapter, swap_halves
from peftsurgery.architectures import Component, Site
from peftsurgery.codec import peft_config
from peftsurgery.codec.detect import find_prefix, is_denoiser, vocabulary
from peftsurgery.codec.scales import alpha_of
from peftsurgery.errors import CannotFuse, CannotSplit, Finding, UnsupportedError
from peftsurgery.layouts import Dialect, Layout, dialect_of, layout_named

KOHYA_MODULES = {"lora": "networks.lora", "flux": "networks.lora_flux"}
LORA_ONLY = "--algorithm lora --rank RULE rewrites it as a LoRA and states the loss"
BAKED = (
    "--base CHECKPOINT --algorithm lora --rank RULE (or --algorithm full) bakes it into the change"
)
DIFFERENCE = "--base CHECKPOINT writes it as the difference from the base"
LEFT_OUT = "--drop PATTERN leaves it out on request"


class Refused(UnsupportedError):
    """One module that a layout cannot hold, and what would make it possible."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


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


def encode(adapter: Adapter, layout: str, *, fold_alpha: bool = False) -> Encoded:
    """Write `adapter` in `layout`'s keys.

    fold_alpha: multiply the scale into the factors instead of storing alpha (the factors' dtype rounds it).

    Raises UnsupportedError naming the first module the layout cannot hold, how many there are, and the option that
    makes it possible. Shapes, dtypes and bytes of factors are kept wherever nothing has to change.
    """
    return Encoder(adapter, layout_named(layout), fold_alpha).run()


class Encoder:
    """One encoding of `adapter` into `layout`."""

    def __init__(self, adapter: Adapter, layout: Layout, fold_alpha: bool) -> None:
        self.adapter = adapter
        self.layout = layout
        self.fold = fold_alpha or layout.alpha == "none"
        self.architecture = architectures.get(adapter.architecture)
        self.out: dict[str, dict[str, torch.Tensor]] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.written: dict[str, dict[str, WeightAdapter]] = {}  # component -> name -> adapter
        self.refusals: list[tuple[str, str, str | None]] = []  # module, reason, remedy
        self.findings: list[Finding] = []
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
        encoded = Encoded(self.out, {}, {}, self.sources, self.findings)
        self._describe(encoded)
        return encoded

    # what the layout cannot hold -----------------------------------------------------------------------------------

    def _adapter_refused(self) -> tuple[str, str] | None:
        layout = self.layout
        if layout.families and self.architecture.name not in layout.families:
            families = ", ".join(layout.families)
            return (
                f"{layout.title} exists for {families} only, and this adapter is for {self.architecture.title}",
                "--to peft holds any adapter",
            )
        if self.adapter.config.get("layer_replication") and layout.alpha != "config":
            return (
                "its layers are those of a model with repeated layers (layer_replication), and only a PEFT folder says so",
                "--to peft keeps it",
            )
        return None

    def _values_alone(self) -> None:
        """New values under their plain names are an adapter only beside something trained."""
        kinds = {m.algorithm for found in self.written.values() for m in found.values()}
        if kinds == {"set"} and self.layout.dialect.algorithms["set"]["weight"] == "weight":
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
        module, reason, remedy = self.refusals[0]
        others = len(self.refusals) - 1
        more = f" ({others} more modules cannot either)" if others else ""
        hint = f" {remedy[0].upper()}{remedy[1:]}." if remedy else ""
        return f"{module}: cannot be written as {self.layout.name}: {reason}{more}.{hint}"

    # modules -------------------------------------------------------------------------------------------------------

    def _component(self, component: Component) -> None:
        column = vocabulary(self.layout, component)
        sites: dict[str, tuple[Site, dict[str, WeightAdapter]]] = {}
        for path, module in self.adapter.of(component.name).items():
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
                self.refusals.append((paths[0], str(error).rstrip("."), _way_out(found.values())))
            except UnsupportedError as error:
                remedy = error.remedy if isinstance(error, Refused) else LEFT_OUT
                self.refusals.append((paths[0], str(error).rstrip("."), remedy))

    def _at_site(self, site: Site, found: Mapping[str, WeightAdapter]) -> WeightAdapter:
        """The adapter of one named module of the layout, from the home modules found for it."""
        whole = site.home
        marked = f"{whole}~{site.operator}" if site.operator else None
        if marked in found:
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
            module = type(first).fuse(parts)
        return swap_halves(module) if site.operator == "swap_halves" else module

    def _write(
        self, component: Component, site: Site, module: WeightAdapter, paths: tuple[str, ...]
    ) -> None:
        dialect = dialect_of(self.layout, component.name)
        module = self._folded(module)
        name = self._name(component, self._parameter(component, site, module))
        part = component.name if self.in_folders else ""
        target = self.out.setdefault(part, {})
        for suffix, tensor in self._suffixes(dialect, component, site, module).items():
            key = suffix if suffix.startswith("=") else f"{name}{dialect.joint}{suffix}"
            key = key.removeprefix("=")
            if key in target:
                raise Refused(
                    f"{key!r} would be written twice: two module names flatten to one",
                    "a dotted layout tells them apart",
                )
            target[key] = tensor
            self.sources[f"{part}/{key}" if part else key] = paths
        self.written.setdefault(component.name, {})[site.name] = module

    def _parameter(self, component: Component, site: Site, module: WeightAdapter) -> str:
        """The name to write: ComfyUI finds what is not a module's `weight` by the parameter's own name (`….scale`)."""
        if self.layout.container == "comfy" and module.algorithm in ("set", "full"):
            column = vocabulary(self.layout, component)
            found = component.tensor_of(column, f"{site.parts[0]}.weight")
            if found is not None and len(site.parts) == 1 and not found.name.endswith(".weight"):
                return found.name
        return site.name

    def _folded(self, module: WeightAdapter) -> WeightAdapter:
        if self.fold and module.algorithm in ("lora", "loha", "lokr"):
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
                f"{self.layout.title} has no prefix for the {component.name} of {self.architecture.title}",
                "--to peft or diffusers keeps the dotted name",
            )
        return prefix + (dotted.replace(".", "_") if self.layout.container == "flat" else dotted)

    # tensors of one module -------------------------------------------------------------------------------------------

    def _suffixes(
        self, dialect: Dialect, component: Component, site: Site, module: WeightAdapter
    ) -> dict[str, torch.Tensor]:
        fields = self._fields(dialect, module)
        own = module.tensors()
        result: dict[str, torch.Tensor] = {}
        for name, suffix in fields.items():
            if (tensor := own.pop(name, None)) is not None:
                result[suffix] = tensor
        if self.layout.alpha == "config" and module.stored != "linear" and isinstance(module, LoRA):
            result = _peft_orientation(module, dialect)
        if module.algorithm == "set":
            result = self._values(component, site, module, result)
        if dialect.alpha and module.rank is not None and not self.fold:
            alpha = alpha_of(float(module.scale), module.rank)
            result[dialect.alpha] = torch.tensor(alpha, dtype=torch.float32)
        if isinstance(module, LoKr) and module.rank is None and dialect.alpha:
            result[dialect.alpha] = torch.tensor(1.0)
        self._magnitude(dialect, f"{component.name}:{site.home}", module, own, result)
        self._bias(dialect, module, own, result)
        if module.padded_shape is not None:
            self._padding(dialect, component, site, module, result)
        if own:
            raise Refused(
                f"{self.layout.title} has no key for the {', '.join(sorted(own))} of {module.algorithm}",
                LEFT_OUT,
            )
        return result

    def _fields(self, dialect: Dialect, module: WeightAdapter) -> dict[str, str]:
        algorithm = module.algorithm
        if algorithm == "full" and len(module.shape) == 1 and "norm" in dialect.algorithms:
            algorithm = "norm"
        fields = dialect.algorithms.get(algorithm)
        bias_only = set(module.tensors()) <= {"bias"}
        if fields is None and not bias_only:
            if algorithm == "set":
                remedy = DIFFERENCE if "full" in dialect.algorithms else LEFT_OUT
            else:
                remedy = _way_out([module]) if len(module.shape) > 1 else LEFT_OUT
            what = (
                "norm differences" if len(module.shape) == 1 and algorithm == "full" else algorithm
            )
            held = ", ".join(a for a in dialect.algorithms if a != "norm")
            raise Refused(f"{self.layout.title} has no keys for {what}; it holds {held}", remedy)
        missing = {"mid"} & set(module.tensors()) - set(fields or {})
        if missing:
            raise Refused(
                f"{self.layout.title} has no key for the Tucker core (lora_mid)", _way_out([module])
            )
        return fields or {}

    def _values(
        self,
        component: Component,
        site: Site,
        module: WeightAdapter,
        result: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Keys of a replaced weight: the layout's own parameter name where a row maps the parameter."""
        if self.layout.container not in ("component", "bare", "peft"):
            return result
        if "weight" not in result:
            return result
        home = f"{site.parts[0]}.weight"
        found = component.tensor_of(vocabulary(self.layout, component), home)
        if found is None or len(site.parts) > 1:
            return result
        prefix = find_prefix(self.layout, component) or ""
        return {f"={prefix}{found.name}": result["weight"]}

    def _magnitude(
        self,
        dialect: Dialect,
        path: str,
        module: WeightAdapter,
        own: dict[str, torch.Tensor],
        result: dict[str, torch.Tensor],
    ) -> None:
        magnitude = own.pop("magnitude", None)
        if magnitude is None:
            return
        axis = module.magnitude_axis
        if module.stored != "linear":
            axis = "out" if axis == "in" else "in"
        if dialect.magnitude is None:
            raise Refused(f"{self.layout.title} cannot hold DoRA", BAKED)
        if axis not in dialect.magnitude_axes:
            raise Refused(
                f"{self.layout.title} holds a DoRA magnitude per output only, and this one is per input",
                BAKED,
            )
        ndim = len(module.tensors()["up"].shape) if isinstance(module, LoRA) else 2
        ndim = max(ndim, self.adapter.magnitude_ndim.get(path, 0))
        if dialect.magnitude == "dora_scale":
            trailing = [1] * (max(ndim, 2) - 2)
            shape = [-1, 1, *trailing] if module.magnitude_axis == "out" else [1, -1, *trailing]
            magnitude = magnitude.reshape(shape)
        elif ndim > 2:
            magnitude = magnitude.reshape(1, -1, *[1] * (ndim - 2))
        result[dialect.magnitude] = magnitude

    def _bias(
        self,
        dialect: Dialect,
        module: WeightAdapter,
        own: dict[str, torch.Tensor],
        result: dict[str, torch.Tensor],
    ) -> None:
        bias = own.pop("bias", None)
        if bias is None:
            return
        if module.bias_is_value:
            if dialect.bias_value is None:
                known = dialect.bias and not dialect.bias_is_scaled
                raise Refused(
                    f"{self.layout.title} cannot hold a replaced bias",
                    DIFFERENCE if known else LEFT_OUT,
                )
            suffix = dialect.bias_value
            if self.layout.alpha == "config" and module.algorithm in ("lora", "loha", "lokr"):
                suffix = "base_layer.bias"
            result[suffix] = bias
            return
        suffix = dialect.bias
        if len(module.shape) == 1 and "diff" in module.tensors() and dialect.norm_bias:
            suffix = dialect.norm_bias
        if suffix is None or (dialect.bias_is_scaled and not isinstance(module, LoRA)):
            raise Refused(f"{self.layout.title} cannot hold a change of the bias", LEFT_OUT)
        if dialect.bias_is_scaled:
            scale = float(module.scale)
            if scale == 0:
                raise Refused(
                    f"{self.layout.title} multiplies the change of the bias by the scale, which is 0",
                    LEFT_OUT,
                )
            bias = bias if scale == 1.0 else (bias.float() / scale).to(bias.dtype)
        result[suffix] = bias

    def _padding(
        self,
        dialect: Dialect,
        component: Component,
        site: Site,
        module: WeightAdapter,
        result: dict[str, torch.Tensor],
    ) -> None:
        """The shape the base weight is zero-padded to, where it is not clear from the input side."""
        wide = module.padded_shape
        assert wide is not None
        pin = self.architecture.pin(component.name, site.parts[0])
        known = pin is not None and pin.widens and wide == module.shape and pin.in_ is not None
        if dialect.padded_shape:
            result[dialect.padded_shape] = torch.tensor(wide, dtype=torch.int64)
        elif not known or pin is None or wide[1] <= (pin.in_ or 0):
            raise Refused(
                f"{self.layout.title} cannot say that the base weight is widened to {list(wide)}",
                "--to comfy says so",
            )
        elif self.layout.container in ("flat", "comfy"):
            self.findings.append(
                Finding(
                    "warning",
                    "wider-input",
                    f"it wants {wide[1]} inputs where {self.architecture.title} has {pin.in_}; {self.layout.title} has "
                    "no key that says so",
                    f"{component.name}:{site.home}",
                    "right for a base with as many inputs; otherwise --to comfy or diffusers",
                )
            )

    # beside the modules ------------------------------------------------------------------------------------------------

    def _extras(self) -> None:
        for key, tensor in self.adapter.extras.items():
            control = key == "lora_controlnet" and self.layout.name == "sai-control-lora"
            if control or (key.startswith("bundle_emb.") and self.layout.embeddings):
                self.out.setdefault("", {})[key] = tensor
                self.sources[key] = (key,)
            elif key.endswith(".base_layer.weight") and self.layout.alpha == "config":
                part, _, name = key.rpartition(":")
                self.out.setdefault(part if self.in_folders else "", {})[name] = tensor
                self.sources[f"{part}/{name}" if part else name] = (key,)
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

    def _describe(self, encoded: Encoded) -> None:
        metadata = dict(self.adapter.metadata)
        metadata.pop("lora_adapter_metadata", None)
        metadata["format"] = "pt"
        if self.layout.alpha == "config":
            encoded.configs = {
                (component if self.in_folders else ""): self._config(component, modules)
                for component, modules in self.written.items()
            }
            metadata = {k: v for k, v in metadata.items() if not k.startswith(("ss_", "sshs_"))}
        elif self.layout.alpha == "metadata":
            packed = peft_config.diffusers_metadata(self.written)
            if packed is not None:
                metadata["lora_adapter_metadata"] = json.dumps(packed, indent=2, sort_keys=True)
                self.findings.append(
                    Finding(
                        "info",
                        "alpha-in-metadata",
                        "alpha differs from rank and lies in lora_adapter_metadata, which diffusers reads; programs that "
                        "ignore it apply another strength",
                        None,
                        "--alpha fold stores the scale in the factors",
                    )
                )
        flat = self.layout.dialect.alpha and self.layout.container == "flat"
        if flat or "ss_network_dim" in metadata:
            metadata.update(self._kohya_metadata(metadata))
            if metadata["ss_network_module"] != self.adapter.metadata.get("ss_network_module"):
                metadata.pop("ss_network_args", None)  # of another algorithm
        encoded.metadata = metadata

    def _config(self, component: str, modules: Mapping[str, WeightAdapter]) -> dict[str, object]:
        try:
            return peft_config.build(modules, self.adapter, component)
        except UnsupportedError as error:
            first = next(p for p in self.adapter.modules if p.startswith(f"{component}:"))
            raise UnsupportedError(
                f"{first}: cannot be written as {self.layout.name}: {error}"
            ) from error

    def _kohya_metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        modules = [
            m for found in self.written.values() for m in found.values() if m.rank is not None
        ]
        ranks = {m.rank for m in modules}
        alphas = {alpha_of(float(m.scale), m.rank) for m in modules if m.rank}
        known = metadata.get("ss_network_module")
        plain = all(isinstance(m, LoRA) and m.magnitude is None for m in modules)
        kind = (
            KOHYA_MODULES.get(self.architecture.name, KOHYA_MODULES["lora"])
            if plain
            else "lycoris.kohya"
        )
        return {
            "ss_network_module": known
            if known and plain == known.startswith("networks.")
            else kind,
            "ss_network_dim": f"{ranks.pop()}" if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        }


def _way_out(modules: Collection[WeightAdapter]) -> str:
    """The option that makes modules splittable or joinable."""
    kinds = {m.algorithm for m in modules}
    if "set" in kinds:
        return "--base CHECKPOINT --algorithm full writes the difference from the base"
    return LORA_ONLY if all(m.additive for m in modules) else BAKED


def fold_scale(module: WeightAdapter) -> WeightAdapter:
    """The same ΔW with scale 1: the factor that is linear in ΔW takes the scale, in fp32, rounded once to its dtype."""
    scale = float(module.scale)
    if scale == 1.0:
        return module
    name = {"lora": "up", "loha": "w1_a", "full": "diff"}.get(module.algorithm)
    if module.algorithm == "lokr":
        name = "w1" if "w1" in module.tensors() else "w1_a"
    if name is None:
        return module
    tensor = module.tensors()[name]
    return module.with_tensors(**{name: (tensor.float() * scale).to(tensor.dtype), "scale": 1.0})


def _kind(key: str) -> str:
    """What a carried tensor is, in words."""
    if key.endswith(".base_layer.weight"):
        return "a copy of the base's own weight"
    return "textual-inversion vectors"


def _peft_orientation(module: LoRA, dialect: Dialect) -> dict[str, torch.Tensor]:
    """PEFT's own orientation of factors whose stored weight is transposed: embeddings and HF Conv1D."""
    if module.stored == "embedding":
        return {"lora_embedding_A": module.up.T, "lora_embedding_B": module.down.T}
    fields = dialect.algorithms["lora"]
    return {fields["down"]: module.up.T, fields["up"]: module.down.T}
