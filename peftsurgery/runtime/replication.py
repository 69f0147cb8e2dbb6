"""A deeper model from the layers of a live one, which share their weights.

Kim et al. 2023 (SOLAR, arXiv 2312.15166) stack layers this way; PEFT calls it `layer_replication`
(`tuners/tuners_utils.py`). Only the adapters attached afterwards take memory of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from peftsurgery.errors import UsageError

from .hosting import is_hosted

PLACES = ("layers", "encoder.layer", "h")  # below the innermost `model`, `bert` or `transformer`
INNER = ("model", "bert", "transformer")


class ReplicatedLayers(nn.ModuleList):
    """The layers of a replicated model. ranges: [start, stop) of the original's, in order; none for
    a slice of it.
    """

    def __init__(
        self, layers: Iterable[nn.Module] = (), ranges: Sequence[tuple[int, int]] = ()
    ) -> None:
        super().__init__(layers)
        self.ranges = tuple(ranges)


@dataclass(frozen=True)
class Replication:
    """What `replicate_layers` changed; `undo` puts the original layers back."""

    owner: nn.Module
    name: str
    original: nn.ModuleList
    config: object
    settings: dict[str, object]

    def undo(self) -> None:
        """The model as it was. UsageError while adapters are attached to the replicas."""
        current = getattr(self.owner, self.name)
        if any(is_hosted(module) for module in current.modules()):
            raise UsageError("undo: adapters are attached to the replicas; detach them first.")
        setattr(self.owner, self.name, self.original)
        for name, value in self.settings.items():
            setattr(self.config, name, value)


def replicate_layers(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Replication:
    """Replace the layers of a transformer by layers[a:b] for each (a, b) in `ranges`, in order.

    [[0, 4], [2, 5]] runs layers 0 1 2 3 2 3 4. Every layer is a module of its own, with the same
    parameters; `config.num_hidden_layers`, `config.layer_types` and every `layer_idx` follow.
    Attach afterwards: adapters have the new indices. Merging unties what it changes.

    Llama-, Bert- and Falcon-like models (lists named `layers`, `encoder.layer` or `h`). UsageError
    for any other, for ranges outside the layers, and when adapters are attached already.
    """
    owner, name, layers = _find(model)
    pairs: list[tuple[int, int]] = []
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= len(layers):
            raise UsageError(
                f"replicate_layers: {list(pair)} is no range of layers; expected [a, b] with "
                f"0 <= a < b <= {len(layers)}."
            )
        pairs.append((pair[0], pair[1]))
    if not pairs:
        raise UsageError("replicate_layers: no range of layers is given.")
    if any(is_hosted(module) for module in layers.modules()):
        raise UsageError("replicate_layers: adapters are attached; replicate first, then attach.")
    order = [index for start, stop in pairs for index in range(start, stop)]
    replicas = [_replica(layers[index], place) for place, index in enumerate(order)]
    config, before = getattr(model, "config", None), {}
    for field in ("num_hidden_layers", "layer_types"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value == len(layers):
            before[field] = value
            setattr(config, field, len(order))
        elif isinstance(value, list) and len(value) == len(layers):
            before[field] = value
            setattr(config, field, [value[index] for index in order])
    setattr(owner, name, ReplicatedLayers(replicas, pairs))
    return Replication(owner, name, layers, config, before)


def _find(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    inner = model
    while True:
        deeper = next((getattr(inner, n) for n in INNER if hasattr(inner, n)), None)
        if not isinstance(deeper, nn.Module):
            break
        inner = deeper
    for place in PLACES:
        path, _, name = place.rpartition(".")
        owner = inner.get_submodule(path) if path and hasattr(inner, path) else inner
        layers = getattr(owner, name, None)
        if isinstance(layers, nn.ModuleList):
            return owner, name, layers
    raise UsageError(
        f"{type(model).__name__}: no list of layers named {', '.join(PLACES)} to replicate."
    )


def _replica(layer: nn.Module, place: int) -> nn.Module:
    """A copy that shares every parameter and buffer."""
    shared = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
    replica = copy.deepcopy(layer, shared)  # type: ignore[arg-type]
    for module in replica.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = place  # type: ignore[assignment]
    return replica


def replicated_ranges(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """The ranges a model was replicated with; () for a plain one."""
    return next((m.ranges for m in model.modules() if isinstance(m, ReplicatedLayers)), ())
