"""The adapters of a combination side by side: opened, decoded, and made to speak of the same
modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftsurgery import architectures
from peftsurgery.adapter import Adapter, is_group, members
from peftsurgery.algorithms import Full, LoRA, Replace, WeightAdapter
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec import BaseWeights, decode, open_adapter
from peftsurgery.codec.detect import AmbiguousArchitecture
from peftsurgery.codec.keys import parse
from peftsurgery.codec.placing import ungroup
from peftsurgery.codec.settling import settle
from peftsurgery.errors import CannotFit, CannotFuse, Finding, UnsupportedError, UsageError
from peftsurgery.operations.headers import Headers
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.regrouping import joined
from peftsurgery.operations.strengths import Strength, block_name, check_used
from peftsurgery.operations.writing_adapter import base_weights

PLAIN = {"weight", "bias", "scale"}
COMMON_CONFIG = ("base_model_name_or_path", "revision", "task_type", "bias")
Source = str | Path | Adapter


@dataclass
class AdapterInputs:
    """Decoded adapters, their names and strengths, and the weights of the base if one was given."""

    names: list[str]
    adapters: list[Adapter]
    strengths: list[Strength]
    opened: list[Checkpoint]
    base: BaseWeights | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def architecture(self) -> str:
        return self.adapters[0].architecture

    def paths(self) -> list[str]:
        """Module paths of all adapters, in order of appearance."""
        return list(dict.fromkeys(path for adapter in self.adapters for path in adapter.modules))

    def join(self, to: str) -> None:
        """One record per weight that the layout `to` stores, where every adapter's parts have one
        weight: a fused weight gets one rank. Adapters that cannot be joined leave all as they are.
        """
        if any(s.patterns or s.blocks for s in self.strengths):
            return
        try:
            joined_adapters = [joined(adapter, to) for adapter in self.adapters]
        except CannotFuse:
            return
        self.adapters = joined_adapters

    def weights(self, path: str) -> list[float]:
        """The weight of every adapter at one module, those without it too."""
        block = _block(self.architecture, path)
        return [strength.of(path, block) for strength in self.strengths]


def is_checkpoint(checkpoint: Checkpoint) -> bool:
    """Whether its keys are those of a whole model: no adapter suffix at all."""
    records = parse(checkpoint, checkpoint.source).records.values()
    return all(record.suffixes <= PLAIN for record in records)


def open_sources(
    sources: Sequence[tuple[Source, float | Strength]], *, allow_pickle: bool
) -> tuple[list[str], list[Adapter | Checkpoint], list[Strength]]:
    """Names, opened files (or adapters given as such) and strengths, in order."""
    if not sources:
        raise UsageError("no adapter given. Pass at least one with -a ADAPTER[=WEIGHT].")
    found: list[Adapter | Checkpoint] = []
    names: list[str] = []
    for source, _ in sources:
        if isinstance(source, Adapter):
            found.append(source)
            names.append(source.layout or "adapter")
            continue
        opened = open_adapter(source, allow_pickle=allow_pickle)
        refuse_pending(opened)
        found.append(opened)
        names.append(str(source))
    strengths = [s if isinstance(s, Strength) else Strength(float(s)) for _, s in sources]
    return names, found, strengths


def decode_all(
    names: Sequence[str],
    found: Sequence[Adapter | Checkpoint],
    strengths: Sequence[Strength],
    *,
    architecture: str | None,
    base: str | Path | None,
    headers_only: bool,
) -> AdapterInputs:
    """Decode every file and line the modules up. UnsupportedError when they are of different
    architectures, or when a record on a fused weight cannot be split where another adapter needs
    it.
    """
    files = [item for item in found if isinstance(item, Checkpoint)]
    weights, known = None, None
    if base is not None:
        if not files:
            raise UsageError("--base goes with files; adapters in memory are combined as they are.")
        weights, known = base_weights(base, architecture, files[0])
    adapters = _decoded(found, architecture, known, headers_only)
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.architecture != adapters[0].architecture:
            raise UnsupportedError(
                f"{name}: is for {adapter.architecture}, and {names[0]} for "
                f"{adapters[0].architecture}: adapters of different models do not combine."
            )
    if weights is not None:
        adapters = [settle(adapter, weights.shape_of) for adapter in adapters]
    inputs = AdapterInputs(list(names), adapters, list(strengths), files, weights)
    for name, adapter in zip(names, adapters, strict=True):
        for finding in adapter.findings:
            if finding.code == "residual-base":
                raise UnsupportedError(f"{name}: {finding.message}; {finding.remedy}.")
            if finding not in inputs.findings:
                inputs.findings.append(finding)
    _align(inputs)
    for adapter, strength, name in zip(adapters, strengths, names, strict=True):
        check_used(strength, adapter.modules, adapter.architecture, name)
    return inputs


def _decoded(
    found: Sequence[Adapter | Checkpoint],
    architecture: str | None,
    known: Mapping[str, Sequence[str]] | None,
    headers_only: bool,
) -> list[Adapter]:
    """Every input as an adapter; a file that several families explain belongs to that of the
    others. Raises AmbiguousArchitecture when no input decides.
    """
    result: dict[int, Adapter] = {}
    unclear: list[AmbiguousArchitecture] = []
    for index, item in enumerate(found):
        if isinstance(item, Adapter):
            result[index] = _copied(item)
            continue
        try:
            tensors = Headers(item) if headers_only else item
            result[index] = decode(tensors, architecture=architecture, known=known)
        except AmbiguousArchitecture as error:
            unclear.append(error)
    if unclear and not result:
        raise unclear[0]
    family = next(iter(result.values())).architecture
    for index, item in enumerate(found):
        if index not in result and isinstance(item, Checkpoint):
            tensors = Headers(item) if headers_only else item
            result[index] = decode(tensors, architecture=family, known=known)
    return [result[index] for index in range(len(found))]


def _copied(adapter: Adapter) -> Adapter:
    """The same modules in a dictionary of its own, which may be rearranged."""
    return Adapter(
        dict(adapter.modules),
        adapter.architecture,
        adapter.layout,
        dict(adapter.extras),
        dict(adapter.metadata),
        dict(adapter.config),
        dict(adapter.parameters),
        list(adapter.findings),
        dict(adapter.magnitude_ndim),
    )


def _align(inputs: AdapterInputs) -> None:
    """Split records on fused weights where not every adapter has the same record there."""
    for name, adapter in zip(inputs.names, inputs.adapters, strict=True):
        for path in [p for p in adapter.modules if is_group(p)]:
            if all(path in other.modules or not _touches(other, path) for other in inputs.adapters):
                continue
            module = adapter.modules[path]
            if not module.additive:
                module = additive(path, name, module, inputs.base)
            try:
                adapter.modules[path] = LoRA.fit(module)
            except CannotFit as error:
                raise UnsupportedError(f"{name}: {path}: cannot be split: {error}") from error
        ungroup(adapter)
        left = [
            p
            for p in adapter.modules
            if is_group(p)
            and any(p not in other.modules and _touches(other, p) for other in inputs.adapters)
        ]
        if left:
            raise UnsupportedError(
                f"{name}: {left[0]}: lies on a fused weight that another adapter changes in parts, "
                "and cannot be split. Convert it with --algorithm lora --base first."
            )


def _touches(adapter: Adapter, path: str) -> bool:
    component, _, inner = path.partition(":")
    mine = {f"{component}:{part}" for part in members(inner)}
    for other in adapter.modules:
        head, _, rest = other.partition(":")
        if head == component and mine & {f"{head}:{part}" for part in members(rest)}:
            return True
    return False


def additive(
    path: str, name: str, module: WeightAdapter, base: BaseWeights | None
) -> WeightAdapter:
    """What a module that looks at the weight does to the base's: ΔW = W_1 - W and Δb = b_1 - b."""
    if base is None:
        raise UnsupportedError(
            f"{name}: {path}: the change of a {_kind(module)} depends on the weight. Pass --base "
            "CHECKPOINT."
        )
    weight = base.weight(path)
    bias = module.bias
    if module.bias is not None and module.bias_is_value:
        bias = module.bias.detach().float() - base.weight(path, "bias").float()
    if isinstance(module, Replace) and module.weight is None:
        return Full(None, bias=bias, stored=module.stored)
    return Full(
        module.delta(weight).detach(),
        bias=bias,
        padded_shape=module.padded_shape,
        stored=module.stored,
    )


def _kind(module: WeightAdapter) -> str:
    return "DoRA" if module.magnitude is not None else module.algorithm


def _block(architecture: str, path: str) -> str | None:
    component, _, inner = path.partition(":")
    part = architectures.get(architecture).components.get(component)
    if part is None or "ldm" not in part.columns:
        return block_name(component, None)
    site = part.site_of("ldm", members(inner)[0])
    return block_name(component, site.name if site else None)


# what lies beside the modules ---------------------------------------------------------------------


def shared_metadata(adapters: Sequence[Adapter], names: Sequence[str]) -> dict[str, str]:
    """Header metadata that all adapters agree on; the first one's network fields are rewritten when
    the file is written. Where they disagree (`ss_steps`, `ss_tag_frequency`), it is told per file.
    """
    first = adapters[0].metadata
    kept = {k: v for k, v in first.items() if all(a.metadata.get(k) == v for a in adapters)}
    differing = sorted({k for a in adapters for k in a.metadata if k.startswith("ss_")} - set(kept))
    if differing and len(adapters) > 1:
        told = {
            Path(name).name: {k: a.metadata[k] for k in differing if k in a.metadata}
            for name, a in zip(names, adapters, strict=True)
        }
        kept["peftsurgery.training"] = json.dumps(told, sort_keys=True)
    for key in ("ss_network_dim", "ss_network_alpha", "ss_network_module"):
        if all(key in adapter.metadata for adapter in adapters):
            kept[key] = first[key]
    return {k: v for k, v in kept.items() if not k.startswith("peftsurgery.") or k.endswith("ing")}


def shared_config(adapters: Sequence[Adapter]) -> dict[str, object]:
    """What of adapter_config.json still holds for the combination."""
    first = adapters[0].config
    if len(adapters) == 1:
        return dict(first)
    return {
        name: first[name]
        for name in COMMON_CONFIG
        if name in first and all(a.config.get(name) == first[name] for a in adapters)
    }


def combined_extras(inputs: AdapterInputs) -> dict[str, torch.Tensor]:
    """Carried tensors: one that a single file has, or all have alike, is kept; textual-inversion
    vectors of one name and shape are Σ w_i v_i. Anything else is a conflict: UnsupportedError.
    """
    result: dict[str, torch.Tensor] = {}
    keys = dict.fromkeys(key for adapter in inputs.adapters for key in adapter.extras)
    for key in keys:
        holders = [i for i, adapter in enumerate(inputs.adapters) if key in adapter.extras]
        values = [inputs.adapters[i].extras[key] for i in holders]
        first = values[0]
        if len(values) == 1 or all(_alike(first, value) for value in values):
            result[key] = first
            continue
        shapes = {tuple(value.shape) for value in values}
        if not key.startswith("bundle_emb.") or len(shapes) > 1:
            files = ", ".join(inputs.names[i] for i in holders)
            raise UnsupportedError(
                f"{key!r}: is in {files} with different values, and has no combination. Leave it "
                "out of all but one with convert --drop."
            )
        weights = [inputs.strengths[i].value for i in holders]
        total = torch.zeros(first.shape)
        for value, weight in zip(values, weights, strict=True):
            total += weight * value.detach().float()
        result[key] = total.to(first.dtype)
    return result


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.is_meta or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def combined_values(
    path: str, entries: Mapping[str, tuple[Replace, float]], findings: list[Finding]
) -> Replace:
    """New values of one weight without a base: the value itself where all agree or one file has it
    (its weight then says nothing), Σ w_i v_i where the weights sum to 1 (that is W + Σ w_i (v_i -
    W) for any W); else UnsupportedError.
    """
    names = list(entries)
    modules = [module for module, _ in entries.values()]
    weights = [weight for _, weight in entries.values()]
    first = modules[0]
    if all(_same_value(first, module) for module in modules):
        if any(weight != 1 for weight in weights) and abs(sum(weights) - 1) > 1e-6:
            findings.append(
                Finding(
                    "warning",
                    "value-carried",
                    "a new value is kept as it is, whatever the weight",
                    path,
                    "--base weights its difference from the base",
                )
            )
        return first
    if abs(sum(weights) - 1) > 1e-6:
        raise UnsupportedError(
            f"{path}: {' and '.join(names)} hold different new values, and their weights sum to "
            f"{sum(weights):g}, not 1. Pass --base CHECKPOINT."
        )
    tensors: dict[str, torch.Tensor] = {}
    for field_name, tensor in first.tensors().items():
        total = torch.zeros(tensor.shape)
        for name, module, weight in zip(names, modules, weights, strict=True):
            other = module.tensors().get(field_name)
            if other is None or other.shape != tensor.shape:
                raise UnsupportedError(
                    f"{path}: {field_name} of {names[0]} and {name} differ in shape."
                )
            total += weight * other.detach().float()
        tensors[field_name] = total.to(tensor.dtype)
    return first.with_tensors(**tensors)


def _same_value(a: Replace, b: Replace) -> bool:
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
