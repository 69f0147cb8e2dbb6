"""Fine-tunes to extract from: copies of checkpoints with known changes in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[str, Tensor], Tensor | None]  # (name, weight) -> what is added, or None


def low_rank(seed: int, rank: int = 2, size: float = 0.05) -> Change:
    """A change of that rank of every matrix and convolution."""
    random = torch.Generator().manual_seed(seed)

    def change(_: str, weight: Tensor) -> Tensor | None:
        if weight.ndim < 2:
            return None
        rows = weight.shape[0]
        up = torch.randn(rows, rank, generator=random)
        down = torch.randn(rank, weight.numel() // rows, generator=random)
        return size * (up @ down).reshape(weight.shape)

    return change


def everywhere(seed: int, size: float = 0.02) -> Change:
    """A random change of every floating-point tensor."""
    random = torch.Generator().manual_seed(seed)
    return lambda _, weight: size * torch.randn(weight.shape, generator=random)


def tuned_copy(source: Path, target: Path, change: Change) -> Path:
    """`source`, a file or a folder, with `change` added in fp32; VAEs stay."""
    if source.is_dir():
        shutil.copytree(source, target)
        files = [f for f in sorted(target.rglob("*.safetensors")) if f.parent.name != "vae"]
    else:
        shutil.copy(source, target)
        files = [target]
    for file in files:
        tensors = load_file(file)
        for name, weight in tensors.items():
            if weight.is_floating_point() and not name.startswith("first_stage_model"):
                added = change(name, weight)
                if added is not None:
                    tensors[name] = (weight.float() + added).to(weight.dtype)
        save_file(tensors, file, {"format": "pt"})
    return target
