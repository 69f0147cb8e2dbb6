"""Adapters of files onto live models: canonical paths are found again among the model's modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from peftsurgery.adapter import Adapter, is_group, members
from peftsurgery.algorithms import Full, LoRA, Tokens, WeightAdapter
from peftsurgery.codec import decode, open_adapter
from peftsurgery.codec.settling import settle
from peftsurgery.errors import CannotSplit, Finding, UnsupportedError, UsageError, nearest

from .hosting import STACK, host, is_hosted, stack_of
from .packed import is_packed, logical_shape
from .stack import Dropout, Entry, parameter_of, slot_path, stacked_path, weight_like
from .targets import Site, sites

# levels that a model has or lacks depending on the class it was loaded with
LEVELS = ("model.", "transformer.", "text_model.", "language_model.", "base_model.", "encoder.")
SINGLE = ("model", "transformer", "unet", "text_encoder")  # what one model may be called in a file


def components_of(model: object) -> dict[str, nn.Module]:
    """Component name -> module; one with the empty name for a plain module.

    UsageError for what is neither a module nor a pipeline.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    parts = getattr(model, "components", None)
    if not isinstance(parts, Mapping):
        raise UsageError(f"{type(model).__name__}: neither a torch module nor a pipeline.")
    return {str(name): part for name, part in parts.items() if isinstance(part, nn.Module)}


def known_names(model: object) -> dict[str, list[str]]:
    """Names of modules and bare parameters per component, for reading flattened names."""
    parts = components_of(model)
    names: dict[str, list[str]] = {}
    for part, module in parts.items():
        modules = [n for n, _ in module.named_modules() if n and STACK not in n.split(".")]
        known = sites(module)
        slices = [slot_path(p, n) for p, site in known.items() for n in range(_stack_size(site))]
        names[part] = list(dict.fromkeys([*modules, *known, *slices]))
    return dict.fromkeys(SINGLE, names[""]) if "" in names else names


def attach_file(
    model: object,
    source: str | Path | Adapter,
    *,
    name: str,
    architecture: str | None,
    unmatched: str,
    dropout: Dropout,
    dtype: torch.dtype,
    trainable: bool,
    strength: float,
) -> tuple[dict[str, WeightAdapter], tuple[str, ...], list[Finding]]:
    """(path -> live adapter, names without a module, findings); see `attaching.attach`."""
    if unmatched not in ("error", "report"):
        raise UsageError(f"unmatched={unmatched!r}: expected 'error' or 'report'.")
    if isinstance(source, Adapter):
        adapter, label = source, "the adapter"
    else:
        label = str(source)
        checkpoint = open_adapter(source)
        adapter = decode(checkpoint, architecture=architecture, known=known_names(model))
    where = {part: sites(module) for part, module in components_of(model).items()}
    adapter = settle(adapter, lambda path: _shape_at(where, path))
    found: list[tuple[str, tuple[Site, int | None], WeightAdapter]] = []
    missing: list[str] = []
    for path, change in adapter.modules.items():
        pieces = _pieces(path, change)
        parameter = adapter.parameters.get(path)
        for part, piece in pieces.items():
            place = _site(where, part, parameter)
            if place is None:
                missing.append(part)
            else:
                found.append((part, place, piece))
    if missing and (unmatched == "error" or not found):
        every = [f"{c}:{p}" if c else p for c, known in where.items() for p in known]
        inner = missing[0].partition(":")[2] if "" in where else missing[0]
        close = nearest(inner, every, n=2)
        hint = f" (closest: {', '.join(map(repr, close))})" if close else ""
        raise UsageError(
            f"{label}: {len(missing)} of {len(adapter.modules)} modules are not in the model, "
            f"first {missing[0]!r}{hint}. unmatched='report' attaches the others."
        )
    entries: list[tuple[Site, Entry]] = []
    for path, (site, slot), change in found:
        try:
            entries.append((site, _entry(site, slot, change, name, dropout, dtype, trainable)))
        except (UsageError, UnsupportedError) as error:
            raise type(error)(f"{label}: {path}: {error}") from error
        if is_hosted(site.host) and name in stack_of(site.host):
            raise UsageError(f"{site.path}: an adapter {name!r} is attached; delete it first.")
    live = {path: entry.adapter for (path, _, _), (_, entry) in zip(found, entries, strict=True)}
    for site, entry in [*entries, *_tied_tokens(where, entries)]:
        stack = host(site.host, site.layer, site.host_path)
        entry.set_strength(strength)
        stack.add(entry)
    if "" in where:
        live = {path.partition(":")[2]: change for path, change in live.items()}
    return live, tuple(missing), adapter.findings


def _tied_tokens(
    where: Mapping[str, Mapping[str, Site]], entries: list[tuple[Site, Entry]]
) -> list[tuple[Site, Entry]]:
    """Trainable tokens once more on the other modules that have the same weight (an output head
    tied to the embedding), as PEFT has it; one adapter in both places.
    """
    taken = {id(site.host) for site, _ in entries}
    more: list[tuple[Site, Entry]] = []
    for site, entry in entries:
        if not isinstance(entry.adapter, Tokens):
            continue
        shared = parameter_of(site.host, site.parameter)
        for known in where.values():
            for other in known.values():
                same = parameter_of(other.host, other.parameter) is shared
                if not same or id(other.host) in taken:
                    continue
                again = Entry(entry.name, entry.adapter, parameter=other.parameter)
                again.settle(other.layer)
                taken.add(id(other.host))
                more.append((other, again))
    return more


def _pieces(path: str, change: WeightAdapter) -> dict[str, WeightAdapter]:
    """The record itself, or one per module of a group it could not be split on in its own form.

    An additive change is cut as dense rows; UnsupportedError for others.
    """
    if not is_group(path):
        return {path: change}
    component, _, inner = path.partition(":")
    if "~" in inner:
        raise UnsupportedError(f"{path}: its rows are reordered; convert it to lora first.")
    names = members(inner)
    size, rest = divmod(change.shape[0], len(names))
    if rest or not change.additive:
        raise UnsupportedError(
            f"{path}: one {change.algorithm} over several modules; convert it to lora first."
        )
    cut: dict[str, WeightAdapter] = {}
    for n, member in enumerate(names):
        try:
            cut[f"{component}:{member}"] = change.rows(n * size, (n + 1) * size)
        except CannotSplit:
            dense = change.tile(n * size, (n + 1) * size)
            cut[f"{component}:{member}"] = Full(dense.reshape(size, *change.shape[1:]))
    return cut


def _site(
    where: Mapping[str, Mapping[str, Site]], path: str, parameter: str | None
) -> tuple[Site, int | None] | None:
    """The site of a path, and the slice of it when the path names one of a stacked parameter."""
    component, _, inner = path.partition(":")
    known = where.get("") or where.get(component)
    if known is None:
        return None
    for candidate in spellings(inner):
        name = candidate if parameter is None else f"{candidate}.{parameter}"
        if name in known:
            return known[name], None
        stacked = stacked_path(name)
        if stacked is not None and stacked[0] in known:
            site, slot = known[stacked[0]], stacked[1]
            if slot < _stack_size(site):
                return site, slot
    return None


def _shape_at(where: Mapping[str, Mapping[str, Site]], path: str) -> tuple[int, ...] | None:
    place = _site(where, path, None)
    if place is None:
        return None
    if place[0].parameter == "weight" and is_packed(place[0].host):
        return logical_shape(place[0].host)
    weight = parameter_of(place[0].host, place[0].parameter)
    return None if weight is None else tuple(weight.shape)


def _stack_size(site: Site) -> int:
    weight = parameter_of(site.host, site.parameter)
    if site.layer.kind != "parameter" or weight is None or weight.ndim != 3:
        return 0
    return weight.shape[0]


def spellings(path: str) -> Iterable[str]:
    """The path, then with a level less or more that other classes of the same model have."""
    yield path
    for level in LEVELS:
        if path.startswith(level):
            yield path.removeprefix(level)
        yield level + path
        if path.startswith("model."):
            yield f"model.{level}{path.removeprefix('model.')}"


def _entry(
    site: Site,
    slot: int | None,
    change: WeightAdapter,
    name: str,
    dropout: Dropout,
    dtype: torch.dtype,
    trainable: bool,
) -> Entry:
    weight = weight_like(site.host, site.parameter)
    if slot is not None:
        weight = weight[slot]
    if site.layer.kind == "hf_conv1d" and change.stored != "conv1d":
        change = _transposed(change)
    target = change.padded_shape or tuple(weight.shape)
    if site.layer.kind != "parameter" or change.algorithm != "set":
        change._require_fit(target)
    tensors: dict[str, object] = {
        n: nn.Parameter(t.detach().to(weight.device, dtype, copy=True), requires_grad=trainable)
        for n, t in change.tensors().items()
    }
    live = change.on(target).with_tensors(**tensors)
    live.to(weight.device)
    if live.bias is not None and site.bias is None:
        raise UnsupportedError("it changes a bias, and the layer has none.")
    entry = Entry(name, live, parameter=site.parameter, dropout=dropout)
    entry.bias, entry.slot = None if slot is not None else site.bias, slot
    entry.settle(site.layer)
    return entry


def _transposed(change: WeightAdapter) -> WeightAdapter:
    """For a weight stored (in, out). LoRA files hold (out, in) factors whatever the layer, so these
    are exchanged; every other algorithm's files hold the change as the weight is stored.
    """
    if not isinstance(change, LoRA):
        return change.with_tensors(stored="conv1d")
    if change.mid is not None or len(change.shape) != 2:
        raise UnsupportedError("a convolution's LoRA on a matrix stored (in, out).")
    axis = {"out": "in", "in": "out", None: None}[change.magnitude_axis]
    return change.with_tensors(
        up=change.down.flatten(1).T,
        down=change.up.flatten(1).T,
        stored="conv1d",
        magnitude_axis=axis,
    )
