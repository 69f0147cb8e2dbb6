"""The tensors of one module in a layout's dialect, by suffix."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peftsurgery.algorithms import LoKr, LoRA, WeightAdapter
from peftsurgery.architectures import Architecture, Component, Site
from peftsurgery.codec.labelling import find_prefix, vocabulary
from peftsurgery.codec.maps import MAPS, write
from peftsurgery.codec.refusals import BAKED, DIFFERENCE, LEFT_OUT, Refused, way_out
from peftsurgery.codec.scales import alpha_of
from peftsurgery.errors import Finding
from peftsurgery.layouts import Dialect, Layout


class Suffixes:
    """Writes modules in the dialects of one layout; `ndims`: path -> dimensions of a stored
    dora_scale.
    """

    def __init__(
        self, layout: Layout, architecture: Architecture, *, fold: bool, ndims: Mapping[str, int]
    ) -> None:
        self.layout = layout
        self.architecture = architecture
        self.fold = fold
        self.ndims = ndims
        self.findings: list[Finding] = []
        self.kinds: frozenset[str] = frozenset()  # algorithms of the component being written
        self.tuned = False  # new values alone, as PEFT's LN tuning writes them

    def of(
        self, dialect: Dialect, component: Component, site: Site, module: WeightAdapter
    ) -> dict[str, torch.Tensor]:
        """The tensors of `module` at `site`; a suffix that begins with `=` is a whole key.

        Raises Refused for what the layout cannot hold.
        """
        own = module.tensors()
        result: dict[str, torch.Tensor] = {}
        if module.algorithm in MAPS:
            result |= write(self.layout, dialect, module)
            if module.algorithm == "tokens" and self.kinds != {"tokens"}:
                result = {f"token_adapter.{suffix}": t for suffix, t in result.items()}
            own = {n: t for n, t in own.items() if n in ("magnitude", "bias")}
            fields: dict[str, str] = {}
        else:
            fields = self._fields(dialect, module)
        for name, suffix in fields.items():
            if (tensor := own.pop(name, None)) is not None:
                result[suffix] = tensor
        if self.layout.alpha == "config" and module.stored != "linear" and isinstance(module, LoRA):
            result = _peft_orientation(module, dialect)
        if module.algorithm == "set" and self.tuned:
            result = {f"ln_tuning_layers.{suffix}": t for suffix, t in result.items()}
        elif module.algorithm == "set":
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
                f"{self.layout.title} has no key for the {', '.join(sorted(own))} of "
                f"{module.algorithm}",
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
                remedy = way_out([module]) if len(module.shape) > 1 else LEFT_OUT
            what = (
                "norm differences" if len(module.shape) == 1 and algorithm == "full" else algorithm
            )
            held = ", ".join(a for a in dialect.algorithms if a != "norm")
            raise Refused(f"{self.layout.title} has no keys for {what}; it holds {held}", remedy)
        missing = {"mid"} & set(module.tensors()) - set(fields or {})
        if missing:
            raise Refused(
                f"{self.layout.title} has no key for the Tucker core (lora_mid)", way_out([module])
            )
        return fields or {}

    def _values(
        self,
        component: Component,
        site: Site,
        module: WeightAdapter,
        result: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Keys of a replaced weight: the layout's own parameter name where a row maps the
        parameter.
        """
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
                f"{self.layout.title} holds a DoRA magnitude per output only, and this one is per "
                "input",
                BAKED,
            )
        ndim = len(module.tensors()["up"].shape) if isinstance(module, LoRA) else 2
        ndim = max(ndim, self.ndims.get(path, 0))
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
            trained = ("lora", "loha", "lokr", *MAPS)
            if self.layout.alpha == "config" and module.algorithm in trained:
                suffix = "base_layer.bias"
            elif self.tuned:
                suffix = f"ln_tuning_layers.{suffix}"
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
                    f"{self.layout.title} multiplies the change of the bias by the scale, which is "
                    "0",
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
        """The shape the base weight is zero-padded to, where the input side does not tell."""
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
                    f"it wants {wide[1]} inputs where {self.architecture.title} has {pin.in_}; "
                    f"{self.layout.title} has "
                    "no key that says so",
                    f"{component.name}:{site.home}",
                    "right for a base with as many inputs; otherwise --to comfy or diffusers",
                )
            )


def fold_scale(module: WeightAdapter) -> WeightAdapter:
    """The same ΔW with scale 1: the factor that is linear in ΔW takes the scale, in fp32, rounded
    once to its dtype.
    """
    scale = float(module.scale)
    if scale == 1.0:
        return module
    if module.algorithm == "glora":
        halves = {n: module.tensors()[n] for n in ("a1", "b1")}
        folded = {n: (t.float() * scale).to(t.dtype) for n, t in halves.items()}
        return module.with_tensors(**folded, scale=1.0)
    name = {"lora": "up", "loha": "w1_a", "full": "diff"}.get(module.algorithm)
    if module.algorithm == "lokr":
        name = "w1" if "w1" in module.tensors() else "w1_a"
    if name is None:
        return module
    tensor = module.tensors()[name]
    return module.with_tensors(**{name: (tensor.float() * scale).to(tensor.dtype), "scale": 1.0})


def _peft_orientation(module: LoRA, dialect: Dialect) -> dict[str, torch.Tensor]:
    """PEFT's own orientation of factors whose stored weight is transposed: embeddings and HF
    Conv1D.
    """
    if module.stored == "embedding":
        return {"lora_embedding_A": module.up.T, "lora_embedding_B": module.down.T}
    fields = dialect.algorithms["lora"]
    return {fields["down"]: module.up.T, fields["up"]: module.down.T}
