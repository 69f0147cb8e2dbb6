"""Bases whose tensors are not the model's: layers that PEFT repeats, here, and tied heads
(`tying`).

A merged weight can hold one change only, so what adapters change separately is written out
separately: `layer_replication` becomes that many layers, and a tied head a tensor of its own.
Either way the base is seen through a checkpoint with more names over the same bytes, and everything
behind works as on any other.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.errors import Finding, UnsupportedError, UsageError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LAYER = re.compile(
    r"(?P<head>(?:[A-Za-z_]\w*\.)*?(?:layers|layer|h))\.(?P<index>\d+)\.(?P<rest>.+)"
)


@dataclass(frozen=True)
class Structure:
    """The base as the merge sees it, and the config.json that goes with the result (None:
    unchanged).
    """

    checkpoint: Checkpoint
    adapters: list[Adapter]
    config: dict[str, object] | None
    findings: tuple[Finding, ...] = ()


def renamed(tensor: LazyTensor, name: str) -> LazyTensor:
    """The same bytes under another name."""
    span = tensor.file_range()
    if span is None:
        raise UnsupportedError(
            f"{tensor.path}: {tensor.name!r}: a tensor of a pickle cannot be written twice; "
            "convert the checkpoint first."
        )
    return LazyTensor(tensor.file, name, tensor.dtype, tuple(tensor.shape), *span)


# layer replication --------------------------------------------------------------------------------


def replicated(base: Checkpoint, adapters: Sequence[Adapter], names: Sequence[str]) -> Structure:
    """The base with its layers written out as `layer_replication` lists them (half-open ranges, in
    order).

    Raises UnsupportedError when the adapters disagree or the base has several stacks of layers,
    UsageError for ranges outside the base.
    """
    maps = [
        _ranges(a.config.get("layer_replication"), n) for a, n in zip(adapters, names, strict=True)
    ]
    if not any(maps):
        return Structure(base, list(adapters), None)
    if any(found != maps[0] for found in maps):
        raise UnsupportedError(
            "only some adapters replicate layers, or they do it differently: "
            + "; ".join(
                f"{n}: {m or 'no layer_replication'}" for n, m in zip(names, maps, strict=True)
            )
            + ". Merge them one after the other, the replicating one first."
        )
    found = {name: match for name in base if (match := _LAYER.match(name))}
    heads = sorted({match["head"] for match in found.values()})
    if len(heads) != 1:
        raise UnsupportedError(
            f"{base.source}: layer_replication needs one stack of layers, and the base has "
            f"{', '.join(heads) or 'none'}. PEFT cannot replicate these either."
        )
    count = 1 + max(int(match["index"]) for match in found.values())
    ranges = maps[0]
    if any(not 0 <= start < stop <= count for start, stop in ranges):
        raise UsageError(
            f"{names[0]}: layer_replication {ranges} does not fit the {count} layers of the base."
        )
    order = [index for start, stop in ranges for index in range(start, stop)]
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in base.items():
        match = found.get(name)
        if match is None:
            tensors[name] = tensor
            continue
        for place, index in enumerate(order):
            if index == int(match["index"]):
                copied = f"{heads[0]}.{place}.{match['rest']}"
                tensors[copied] = renamed(tensor, copied)
    note = f"{count} layers written out as {len(order)}: {', '.join(map(str, order))}"
    config = _with_layers(base.config, count, order)
    finding = Finding("info", "layer-replication", note)
    if config is None:
        remedy = f"set num_hidden_layers to {len(order)} in the config.json used with the file"
        finding = Finding("warning", "layer-replication", note, None, remedy)
    return Structure(base.with_tensors(tensors), list(adapters), config, (finding,))


def _ranges(value: object, name: str) -> list[tuple[int, int]]:
    if not value:
        return []
    pairs = value if isinstance(value, list) else []
    good = [
        (pair[0], pair[1])
        for pair in pairs
        if isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(n, int) for n in pair)
    ]
    if len(good) != len(pairs) or not good:
        raise UsageError(
            f"{name}: layer_replication is {value!r}; expected a list of [start, end]."
        )
    return good


def _with_layers(
    config: Mapping[str, object] | None, count: int, order: Sequence[int]
) -> dict[str, object] | None:
    """config.json with the number of layers, and every list that has one entry per layer,
    rewritten.
    """
    if config is None:
        return None
    result = copy.deepcopy(dict(config))
    for part in parts_of(result):
        if not any(part.get(name) == count for name in LAYER_COUNTS):
            continue
        for name in LAYER_COUNTS:
            if part.get(name) == count:
                part[name] = len(order)
        for name, value in part.items():
            if isinstance(value, list) and len(value) == count and "layer" in name:
                part[name] = [value[index] for index in order]
    return result


def parts_of(config: dict[str, object]) -> list[dict[str, object]]:
    """The config and the one of the text model inside it."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]
