"""Live adapters back to files, through the codec."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from peftsurgery import architectures
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import LoRA, WeightAdapter
from peftsurgery.codec import encode, write_encoded
from peftsurgery.errors import UnsupportedError, UsageError

from .controls import require
from .hosting import stack_of
from .loading import components_of, spellings
from .replication import replicated_ranges
from .stack import Entry, slot_path
from .targets import hosts

BARE = {"in_proj_weight": "in_proj", "out_proj.weight": "out_proj"}  # of MultiheadAttention


def save(
    model: object,
    path: str | Path,
    layout: str = "peft",
    name: str = "default",
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    origin: str = "subtract",
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write one adapter in a layout, a PEFT folder by default; returns the files written.

    architecture   the family whose names the layout uses ("sdxl"); a model with a transformers
                   config is a language model by default, any other keeps its dotted names
    dtype          of the tensors, as they are by default
    origin         of inits that subtract a start from the base (PiSSA, OLoRA): "subtract" writes
                   ΔW - ΔW_0 as a LoRA of rank 2 r, which works on the base as it is; "keep" writes
                   the bare factors, which need the base less the start

    The strength is not part of the file. UnsupportedError names the module a layout cannot hold.
    """
    adapter = export(model, name, architecture=architecture, dtype=dtype, origin=origin)
    return write_encoded(encode(adapter, layout), Path(path), layout, overwrite)


def export(
    model: object,
    name: str = "default",
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    origin: str = "subtract",
) -> Adapter:
    """The canonical `Adapter` of an attached one, with copies of its tensors; see `save`."""
    require(model, name)
    if origin not in ("subtract", "keep"):
        raise UsageError(f"origin={origin!r}: expected 'subtract' or 'keep'.")
    modules: dict[str, WeightAdapter] = {}
    config: dict[str, object] = {}
    family = architecture
    for part, module in components_of(model).items():
        if family is None:
            family = "llm" if not part and _is_language_model(module) else "generic"
        component = part or _component(module, family)
        config |= _config(module)
        for path, hosted in hosts(module).items():
            for entry in stack_of(hosted).of(name):
                home = _home(family, component, _path(path, entry))
                modules[f"{component}:{home}"] = _copied(entry, dtype, origin)
    return Adapter(modules, family or "generic", "peft", config=config)


def _home(family: str, component: str, path: str) -> str:
    """The family's own spelling of a live path (CLIPTextModel has lost its `text_model` level in
    transformers 5.6); the path itself where its table has no such module, for encode to name.
    """
    known = architectures.get(family).components.get(component)
    if known is None:
        names = ", ".join(architectures.get(family).components)
        raise UsageError(
            f"{family} has no component {component!r} (it has {names}); save that part of the "
            "pipeline alone, or as another architecture."
        )
    for name in spellings(path):
        site = known.site(known.home, name)
        if site is not None and len(site.parts) == 1:
            return site.parts[0]
    return path


def _path(path: str, entry: Entry) -> str:
    if entry.parameter == "weight":
        return path
    last = BARE.get(entry.parameter, entry.parameter)
    return slot_path(f"{path}.{last}" if path else last, entry.slot)


def _copied(entry: Entry, dtype: torch.dtype | None, origin: str) -> WeightAdapter:
    adapter = entry.adapter
    if entry.origin is not None and origin == "subtract":
        adapter = difference_of(adapter, entry.origin)
    tensors: dict[str, Tensor] = {
        n: t.detach().to("cpu", dtype or t.dtype, copy=True).contiguous()
        for n, t in adapter.tensors().items()
    }
    return adapter.with_tensors(**tensors)


def difference_of(adapter: WeightAdapter, origin: WeightAdapter) -> LoRA:
    """ΔW - ΔW_0 of two LoRAs of one scale: up [B, -B_0], down [A; A_0]."""
    if not isinstance(adapter, LoRA) or not isinstance(origin, LoRA):
        raise UnsupportedError(f"an origin of a {type(adapter).__name__} cannot be subtracted.")
    ratio = float(origin.scale) / float(adapter.scale)
    up = torch.cat([adapter.up.detach(), -ratio * origin.up.detach()], 1)
    down = torch.cat([adapter.down.detach(), origin.down.detach()])
    return adapter.with_tensors(up=up, down=down)


def _is_language_model(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(config, "model_type") and hasattr(module, "get_input_embeddings")


def _component(module: nn.Module, family: str) -> str:
    if family == "llm":
        return "model"
    if _is_language_model(module):
        return "text_encoder"
    return "unet" if type(module).__name__.startswith("UNet") else "transformer"


def _config(module: nn.Module) -> dict[str, object]:
    name = getattr(getattr(module, "config", None), "_name_or_path", None)
    found: dict[str, object] = {}
    if isinstance(name, str) and name:
        found["base_model_name_or_path"] = name
    if ranges := replicated_ranges(module):
        found["layer_replication"] = [list(pair) for pair in ranges]
    return found
