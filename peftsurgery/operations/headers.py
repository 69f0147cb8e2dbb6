"""A checkpoint seen through its headers: shapes and dtypes as tensors on the meta device."""

from __future__ import annotations

import torch

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import torch_dtype

READ_ANYWAY = (".alpha", ".reshape_weight")  # numbers that decide how the file is to be read


class Headers(Checkpoint):
    """A checkpoint whose tensors stay on the meta device: shapes and dtypes only."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(
            checkpoint.path,
            {name: checkpoint[name] for name in checkpoint},
            source=checkpoint.source,
            kind=checkpoint.kind,
            metadata=checkpoint.metadata,
            files=checkpoint.files,
            config=checkpoint.config,
            components=checkpoint.components,
        )

    def __getitem__(self, name: str):
        tensor = super().__getitem__(name)
        return tensor if name.endswith(READ_ANYWAY) else _Outline(tensor)


class _Outline:
    """Shape and dtype of a stored tensor, as a tensor on the meta device."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def torch(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=torch_dtype(self.dtype), device="meta")
