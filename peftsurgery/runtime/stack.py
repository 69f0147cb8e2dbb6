"""What hangs on one adapted module: its adapters by name, in order, invisible to state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftsurgery.algorithms import WeightAdapter
from peftsurgery.algorithms.layer import Layer
from peftsurgery.algorithms.one_node import OneNode
from peftsurgery.errors import UnsupportedError, UsageError

from .packed import dense_weight, device_of, is_packed, logical_shape


@dataclass(frozen=True)
class Dropout:
    """What is left out while training, each with a probability of 0 for never.

    inputs      elements of x before an additive adapter (PEFT `lora_dropout`)
    rows        output channels of an additive adapter's change (LyCORIS `rank_dropout`);
                `rescale` divides by the share kept
    module      the whole adapter for one call of the layer (LyCORIS `module_dropout`)
    """

    inputs: float = 0.0
    rows: float = 0.0
    rescale: bool = False
    module: float = 0.0

    def __post_init__(self) -> None:
        for name in ("inputs", "rows", "module"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UsageError(f"dropout of {name}: got {value}, expected 0 <= p < 1.")

    def __bool__(self) -> bool:
        return bool(self.inputs or self.rows or self.module)


class Entry:
    """One adapter on one parameter of a module: ΔW of `adapter`, less that of `origin`.

    parameter   the parameter changed, dotted below the module ("weight", "out_proj.weight")
    slot        index along the first dimension of a stacked parameter, None for the whole
    origin      frozen starting point of an init whose adapter does not start at zero: what is
                applied is adapter - origin, so that the base stays as it is
    """

    def __init__(
        self,
        name: str,
        adapter: WeightAdapter,
        *,
        parameter: str = "weight",
        bias: str | None = "bias",
        dropout: Dropout | None = None,
        origin: WeightAdapter | None = None,
    ) -> None:
        self.name, self.adapter, self.origin = name, adapter, origin
        self.parameter, self.bias = parameter, bias
        self.slot: int | None = None
        self.original: Tensor | None = None  # the base's weight, where the start replaced it
        self.dropout = dropout or Dropout()
        self.strength = 1.0
        self.side = "sum"
        self.plain = False  # nothing but the map: no dropout, no origin, no bias
        self.joint: OneNode | None = None  # the adapter, where it and the layer can be one node
        self.gain = torch.ones(())  # the strength as a tensor: changing it recompiles nothing

    def settle(self, layer: Layer) -> None:
        """Choose how the map is realised on this layer: `WeightAdapter.side`, "dora" for the form
        of it that scales activations, or "weight" where only the composed weight is exact.
        """
        adapter, kind = self.adapter, layer.kind
        side = adapter.side
        self.plain = not self.dropout and self.origin is None and adapter.bias is None
        simple = kind in ("linear", "conv", "hf_conv1d", "embedding")
        if not simple or adapter.padded_shape is not None or layer.max_norm is not None:
            side = "weight"
        elif side == "sum" and adapter.magnitude is not None:
            forward_axis = "in" if kind in ("embedding", "hf_conv1d") else "out"
            narrow = layer.groups == 1 and kind in ("linear", "conv")
            side = "dora" if adapter.magnitude_axis == forward_axis or narrow else "weight"
        elif (side == "sum" and not adapter.additive) or (
            side in ("input", "output", "both")
            and (layer.groups > 1 or kind not in ("linear", "conv"))
        ):
            side = "weight"
        if side not in ("sum", "dora") and (self.dropout.inputs or self.dropout.rows):
            raise UsageError(
                f"{type(adapter).__name__} on a {kind}: dropout of inputs or rows is defined for "
                "additive changes only; module_dropout is there for all."
            )
        self.side = side
        self.joint = None
        if isinstance(adapter, OneNode) and kind == "linear" and side in adapter.sides:
            self.joint = adapter

    def set_strength(self, strength: float) -> None:
        """Both forms of the strength."""
        self.strength = float(strength)
        self.gain.fill_(self.strength)

    @property
    def key(self) -> str:
        """Name of the adapter inside `module.adapters`."""
        if self.parameter == "weight":
            return self.name
        mark = "" if self.slot is None else f"/{self.slot}"
        return f"{self.name}@{self.parameter.replace('.', '/')}{mark}"

    def composed(
        self, weight: Tensor, bias: Tensor | None, strength: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(W', b') in fp32."""
        t = strength_of(self) if strength is None else strength
        if self.origin is not None:
            weight, _ = self.origin.merged(weight, None, -t)
        return self.adapter.merged(weight, bias, t)


def strength_of(entry: Entry) -> float | Tensor:
    """t as a number, or as a tensor in a compiled graph, which must not depend on it."""
    return entry.gain if torch.compiler.is_compiling() else entry.strength


class Stack(nn.Module):
    """The adapters of one module. Children are the WeightAdapters (and `NAME!origin`), so that
    `parameters()`, `.to()`, `train()` and deepcopy reach them; state dicts do not list them, and
    loading one does not miss them.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.whole = False  # `Layer.apply` is all the module's own forward does
        self.entries: list[Entry] = []
        self.active: tuple[str, ...] | None = None  # None: all, in the order attached
        self.rows: tuple[tuple[str, ...], ...] | None = None  # active names per row of the batch
        self.disabled = 0
        self.frozen: tuple[str, ...] = ()  # see `freezing`
        self.backup: Mapping[str, object] | None = None  # what merging replaced
        self.refresh()
        self.register_load_state_dict_post_hook(_nothing_missing)
        # torch's fused transformer layers read weights past the modules, unless one below has a
        # forward hook
        self.register_forward_hook(_never_called)

    # --- entries ----------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters in the order attached."""
        return tuple(dict.fromkeys(entry.name for entry in self.entries))

    def add(self, entry: Entry) -> None:
        """UsageError when the name is taken on this parameter."""
        if entry.key in self._modules:
            raise UsageError(f"an adapter {entry.name!r} is attached already; delete it first.")
        entry.settle(self.layer)
        self.entries.append(entry)
        self._modules[entry.key] = entry.adapter
        if entry.origin is not None:
            self._modules[f"{entry.key}!origin"] = entry.origin
        self.refresh()

    def refresh(self) -> None:
        """Rebuild `plan`: what a forward runs through."""
        entries = self.live()
        if self.rows is not None and not self.disabled and self.backup is None:
            entries = tuple(self.entries)
        self.plan: tuple[Entry, ...] = entries
        # the one entry in force, where it is all there is to do: see `single`
        alone = len(entries) == 1 and self.rows is None
        self.single = entries[0] if alone and entries[0].plain else None
        # what `single` decided, by shape of x
        self.folding: dict[tuple[object, ...], bool] = {}
        self.joining: dict[tuple[int, ...], bool] = {}

    def remove(self, name: str) -> None:
        """Drop the adapter of that name, if it is here."""
        for entry in [e for e in self.entries if e.name == name]:
            self.entries.remove(entry)
            del self._modules[entry.key]
            self._modules.pop(f"{entry.key}!origin", None)
        if self.active is not None:
            self.active = tuple(n for n in self.active if n != name)
        self.refresh()

    def of(self, name: str) -> list[Entry]:
        """Entries of one adapter; several when the module has several parameters."""
        return [entry for entry in self.entries if entry.name == name]

    def __getitem__(self, name: str) -> WeightAdapter:
        """The adapter of that name on the module's weight."""
        found = self._modules.get(name)
        if not isinstance(found, WeightAdapter):
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self.names)

    def live(self, names: tuple[str, ...] | None = None) -> tuple[Entry, ...]:
        """Entries in force, in order: those active, or `names`; none while disabled or merged."""
        if self.disabled or self.backup is not None:
            return ()
        names = self.active if names is None else names
        if names is None:
            return tuple(self.entries)
        return tuple(entry for name in names for entry in self.of(name))

    # --- invisible to state dicts -----------------------------------------------------------------

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """Adds nothing: the model's state dict is that of the base."""
        destination = kwargs.get("destination", args[0] if args else None)
        return destination if isinstance(destination, dict) else {}

    def _load_from_state_dict(self, state_dict: object, prefix: str, *args: object) -> None:  # type: ignore[override]
        self._prefix = prefix


def _never_called(module: nn.Module, args: object, output: object) -> None:
    """A stack is not run."""


def _nothing_missing(module: nn.Module, incompatible: object) -> None:
    """Load hook: the adapters are not in a base's state dict, and that is not an error."""
    missing = getattr(incompatible, "missing_keys", None)
    prefix = module.__dict__.pop("_prefix", None)
    if isinstance(missing, list) and prefix is not None:
        missing[:] = [key for key in missing if not key.startswith(prefix)]


def parameter_of(module: nn.Module, dotted: str | None) -> Tensor | None:
    """The parameter at a dotted name below a module, or None."""
    if dotted is None:
        return None
    owner, _, name = dotted.rpartition(".")
    return getattr(module.get_submodule(owner) if owner else module, name, None)


def base_weight(module: nn.Module, dotted: str) -> Tensor:
    """The base's own weight, of a packed linear what it stands for; UnsupportedError when that
    cannot be told.
    """
    if dotted == "weight" and is_packed(module):
        return dense_weight(module)
    weight = parameter_of(module, dotted)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise UnsupportedError(
            f"{type(module).__name__}.{dotted} holds {kind}: the composed weight is needed here, "
            "and what it stands for is not known. Dequantize the layer first."
        )
    return weight


def weight_like(module: nn.Module, dotted: str) -> Tensor:
    """The base's weight, or for a packed linear a stand-in of its logical shape and device whose
    values are zeros: enough to size a fresh adapter.
    """
    if dotted == "weight" and is_packed(module):
        return torch.zeros((), device=device_of(module)).expand(logical_shape(module))
    return base_weight(module, dotted)


def slot_path(path: str, slot: int | None) -> str:
    """`experts.3.gate_up_proj` for slice 3 of `experts.gate_up_proj`."""
    if slot is None:
        return path
    owner, _, name = path.rpartition(".")
    return ".".join(part for part in (owner, str(slot), name) if part)


def stacked_path(path: str) -> tuple[str, int] | None:
    """The inverse of `slot_path`, or None."""
    owner, _, name = path.rpartition(".")
    rest, _, slot = owner.rpartition(".")
    return (f"{rest}.{name}" if rest else name, int(slot)) if slot.isdecimal() else None
