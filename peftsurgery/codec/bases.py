"""A base checkpoint seen through an architecture table: home module paths -> stored tensors, fused
rows included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftsurgery.adapter import members
from peftsurgery.architectures import Architecture, Component, TensorSite
from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.codec import experts
from peftsurgery.codec.resolving import denoiser
from peftsurgery.errors import UnsupportedError, UsageError, nearest


def base_names(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Module names of a base of any family: component -> dotted names, for restoring flattened
    names.

    A single file does not say which component it is, so its names stand for a language model and
    for a denoiser.
    """
    found: dict[str, dict[str, None]] = {}
    pipeline = checkpoint.kind == "pipeline"
    for name in checkpoint:
        component, _, tensor = name.partition(":") if pipeline else ("", "", name)
        for owner in (component,) if pipeline else ("model", "transformer"):
            found.setdefault(owner, {})[tensor.rpartition(".")[0]] = None
    return {component: list(names) for component, names in found.items()}


@dataclass(frozen=True)
class Stored:
    """One home tensor inside a checkpoint: the stored tensor, its site, and which rows of it.

    Rows are counted with the first `lead` dimensions taken together: 2 for one expert of a stacked
    (E, a, b) tensor.
    """

    name: str
    tensor: LazyTensor
    site: TensorSite
    part: int
    lead: int = 1
    span: tuple[int, int] | None = None  # rows, where the site does not tell them

    @property
    def rows(self) -> tuple[int, int]:
        """Rows [start, stop) of the stored tensor that are this home tensor."""
        if self.span is not None:
            return self.span
        count = self.tensor.shape[0] if self.tensor.shape else 1
        if len(self.site.parts) == 1:
            return 0, count
        return self.site.row_ranges(count)[self.part]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the home tensor."""
        if self.site.operator == "transpose":
            return tuple(self.tensor.shape[::-1])
        start, stop = self.rows
        return (stop - start, *self.tensor.shape[self.lead :]) if self.tensor.shape else ()

    def load(self) -> torch.Tensor:
        """The home tensor, row operator undone; of a fused tensor only its rows are read."""
        if self.site.operator == "swap_halves":
            value = self.tensor.torch()
            half = value.shape[0] // 2
            return torch.cat([value[half:], value[:half]])
        if self.site.operator == "transpose":
            return self.tensor.torch().T
        if self.span is None and len(self.site.parts) == 1:
            return self.tensor.torch()
        start, stop = self.rows
        return self.tensor.flattened(self.lead).rows(start, stop).torch()


class BaseWeights:
    """Index of a base checkpoint by `component:home tensor name`.

    A pipeline folder names its components; in a single file they are told apart by the family's
    prefixes. Raises UsageError when nothing of the checkpoint belongs to the architecture.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.stored: dict[str, Stored] = {}
        readers = self._readers()
        for name in checkpoint:
            for prefix, component, column in readers:
                if not name.startswith(prefix):
                    continue
                site = component.tensor(column, name.removeprefix(prefix))
                if site is None:
                    continue
                for index, part in enumerate(site.parts):
                    self.stored[f"{component.name}:{part}"] = Stored(
                        name, checkpoint[name], site, index
                    )
                break
        if not self.stored:
            first = next(iter(checkpoint), "nothing")
            raise UsageError(
                f"{checkpoint.source}: no tensor belongs to {architecture.title}; first is "
                f"{first!r}. Expected a base "
                "checkpoint of that family."
            )

    def _readers(self) -> list[tuple[str, Component, str]]:
        readers: list[tuple[str, Component, str]] = []
        components = self.architecture.components
        if self.checkpoint.kind == "pipeline":
            for name, component in components.items():
                readers += [(f"{name}:", component, column) for column in component.columns]
            return readers
        for component in components.values():
            for prefix in component.prefixes.get("checkpoint", ()):
                readers += [(prefix, component, column) for column in component.columns]
        readers += [
            ("", denoiser(self.architecture), c) for c in denoiser(self.architecture).columns
        ]
        first = denoiser(self.architecture).name
        named = {c.name: (-self._named(c), c.name != first) for p, c, _ in readers if not p}
        return sorted(readers, key=lambda r: (-len(r[0]), named.get(r[1].name, (0, False))))

    def _named(self, component: Component) -> int:
        """How many names of the file the component knows: a UNet and its ControlNet share most of
        theirs.
        """
        return sum(
            any(component.tensor(column, name) is not None for column in component.columns)
            for name in self.checkpoint
        )

    def modules(self) -> dict[str, list[str]]:
        """Component -> its home module paths, for restoring flattened names."""
        found: dict[str, dict[str, None]] = {}
        for path in self.stored:
            component, _, tensor = path.partition(":")
            found.setdefault(component, {})[tensor.rpartition(".")[0]] = None
        return {component: list(names) for component, names in found.items()}

    @property
    def model_type(self) -> str | None:
        """`model_type` of config.json, that of the text model inside first."""
        config = self.checkpoint.config or {}
        inner = config.get("text_config")
        name = (inner if isinstance(inner, dict) else config).get("model_type")
        return name if isinstance(name, str) else None

    def find(self, path: str, parameter: str = "weight") -> Stored | None:
        """The stored tensor of one home module (`component:path`), or None.

        Of a language model with experts, the spellings and the stacked form of transformers 5 are
        looked through (`codec.experts`).
        """
        found = self.stored.get(f"{path}.{parameter}")
        if found is None and self.architecture.name == "llm":
            return experts.find(self.stored, path, parameter, self.model_type)
        return found

    def shape_of(self, path: str) -> tuple[int, ...] | None:
        """Shape of the weight of one home module, or None."""
        found = self.find(path)
        return None if found is None else found.shape

    def weight(self, path: str, parameter: str = "weight") -> torch.Tensor:
        """The weight of a home module or group, in the home vocabulary's orientation and stored
        dtype.

        Raises UsageError naming the nearest modules when the base has none.
        """
        component, _, inner = path.partition(":")
        parts = []
        for part in members(inner):
            found = self.find(f"{component}:{part}", parameter)
            if found is None:
                close = nearest(f"{component}:{part}.{parameter}", self.stored, n=2)
                hint = f" (closest: {', '.join(map(repr, close))})" if close else ""
                raise UsageError(
                    f"{self.checkpoint.source}: has no {parameter} for {component}:{part}{hint}. "
                    "Give the base this adapter "
                    "was trained on."
                )
            if not found.tensor.dtype.startswith(("F16", "F32", "F64", "BF16")):
                raise UnsupportedError(
                    f"{self.checkpoint.source}: {found.name!r} is stored as {found.tensor.dtype}; "
                    "an unquantized base "
                    "(fp16, bf16 or fp32) is needed here."
                )
            parts.append(found.load())
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if "~swap_halves" in path:
            half = value.shape[0] // 2
            value = torch.cat([value[half:], value[:half]])
        return value
