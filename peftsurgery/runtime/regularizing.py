"""Terms to add to a loss that keep the factors of an algorithm orthogonal."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from peftsurgery.algorithms import HRA, AdaLoRA, WeightAdapter
from peftsurgery.errors import UsageError
from peftsurgery.linalg import normalized_columns

from .controls import adapters

A = TypeVar("A", bound=WeightAdapter)


def adalora_orthogonality(model: nn.Module, name: str = "default") -> Tensor:
    """The mean over all factors of ||Pᵀ P - I||_F and ||Q Qᵀ - I||_F; ΔW = s P diag(e) Q (0-d,
    fp32).

    Zhang et al. 2023 (arXiv 2303.10512, eq. 4) sum the squares of these norms; the mean of the
    norms is what PEFT adds, with weight 0.5 (`tuners/adalora/model.py`). UsageError without an
    AdaLoRA of that name.
    """
    terms: list[Tensor] = []
    for adapter in _of(AdaLoRA, model, name):
        terms.append(_apart(adapter.up.float().T))
        terms.append(_apart(adapter.down.float().flatten(1)))
    return torch.stack([term.norm() for term in terms]).mean()


def hra_orthogonality(model: nn.Module, name: str = "default") -> Tensor:
    """The sum over all layers of ||Ûᵀ Û - I||²_F, Û the reflections' unit vectors (0-d, fp32).

    Yuan et al. 2024 (arXiv 2405.17484, section 3.2); times a weight of one's choice. UsageError
    without a Householder adapter of that name.
    """
    terms: list[Tensor] = []
    for adapter in _of(HRA, model, name):
        terms.append(_apart(normalized_columns(adapter.u.float()).T))
    return torch.stack([term.square().sum() for term in terms]).sum()


def _apart(rows: Tensor) -> Tensor:
    """X Xᵀ - I."""
    return rows @ rows.T - torch.eye(rows.shape[0], device=rows.device)


def _of(kind: type[A], model: nn.Module, name: str) -> list[A]:
    found = [a for a in adapters(model, name).values() if isinstance(a, kind)]
    if not found:
        raise UsageError(f"the adapter {name!r} has no module of {kind.__name__}.")
    return found
