"""Gram matrices of the inputs of modules, from a file the user gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from peftsurgery.adapter import members
from peftsurgery.checkpoint import LazyTensor, open_checkpoint
from peftsurgery.errors import UsageError


class Grams:
    """G = Σ x xᵀ over the inputs x of a module, (n, n), or its diagonal (n,); n = in · kernel.

    A safetensors file, one tensor for each module, under its path (`unet:down_blocks.0.…`, with or
    without the component) or under the name that the layout gives it (`lora_unet_down_blocks_…`); a
    trailing `.weight` is allowed. For a fused weight the name of any of its parts will do: they
    have the same inputs. Read when it is needed, one at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.checkpoint = open_checkpoint(path)
        self.found: dict[str, LazyTensor] = {}
        for name, tensor in self.checkpoint.items():
            plain = name.removesuffix(".weight")
            if plain in self.found:
                raise UsageError(f"{self.checkpoint.source}: {plain!r} is there twice.")
            if len(tensor.shape) not in (1, 2) or tensor.shape[0] != tensor.shape[-1]:
                raise UsageError(
                    f"{self.checkpoint.source}: {name!r} has shape {list(tensor.shape)}; expected "
                    "a "
                    "Gram matrix (n, n) or its diagonal (n,)."
                )
            self.found[plain] = tensor
        self.used: set[str] = set()
        self.names: dict[str, set[str]] = {}  # path -> names of the layout

    def learn(self, sources: Mapping[str, Sequence[str]]) -> None:
        """Take the names of the layout from its keys: key -> paths it is made of. The beginnings of
        a key, cut at its dots, name the module if no other module shares them.
        """
        owners: dict[str, set[tuple[str, ...]]] = {}
        for key, paths in sources.items():
            pieces = key.split(".")
            for end in range(1, len(pieces)):
                owners.setdefault(".".join(pieces[:end]), set()).add(tuple(paths))
        for name, owned in owners.items():
            if len(owned) == 1:
                for path in next(iter(owned)):
                    self.names.setdefault(path, set()).add(name)

    def of(self, path: str) -> Callable[[], torch.Tensor] | None:
        """What reads the Gram matrix of a module or group, or None when the file has none."""
        component, _, inner = path.partition(":")
        inner = inner.partition("~")[0]
        candidates = [path, inner, *sorted(self.names.get(path, ()))]
        for part in members(inner):
            candidates += [f"{component}:{part}", part]
        for name in candidates:
            if name in self.found:
                self.used.add(name)
                tensor = self.found[name]
                return lambda: tensor.torch().float()
        return None
