"""Fresh trainable adapters: what every algorithm's `init` shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Generator, Tensor

from ..errors import UsageError
from .storage import AdapterTensors

A = TypeVar("A", bound=AdapterTensors)


def kaiming(like: Tensor, shape: tuple[int, ...], fan: int, generator: Generator | None) -> Tensor:
    """U(±1/√fan): kaiming_uniform with a = √5 (He et al. 2015, arXiv 1502.01852), as torch's
    Linear and PEFT's LoRA do; fp32 on the device of `like`.
    """
    bound = 1 / math.sqrt(fan)
    return torch.empty(shape, device=like.device).uniform_(-bound, bound, generator=generator)


def normal(like: Tensor, shape: tuple[int, ...], std: float, generator: Generator | None) -> Tensor:
    """N(0, std²) in fp32 on the device of `like`."""
    return torch.empty(shape, device=like.device).normal_(0.0, std, generator=generator)


def trainable(adapter: A, dtype: torch.dtype) -> A:
    """The adapter in `dtype`, every tensor requiring gradients."""
    return adapter.to(dtype).requires_grad_(True)


def refuse_options(cls: type, options: Mapping[str, object]) -> None:
    """UsageError naming the first option the algorithm does not have."""
    for name in options:
        raise UsageError(f"{cls.__name__} has no option {name!r}.")


def require_rank(cls: type, rank: int | None, weight: Tensor, options: Mapping[str, object]) -> int:
    """The rank, after checking it, the weight's dimensions and that no option is left over."""
    refuse_options(cls, options)
    if rank is None or rank < 1:
        raise UsageError(f"{cls.__name__}: got rank {rank}, expected a number of at least 1.")
    if weight.ndim < 2:
        raise UsageError(
            f"{cls.__name__}: a weight of shape {tuple(weight.shape)} has no low-rank change; "
            "use Full."
        )
    return rank
