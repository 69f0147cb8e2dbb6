"""ΔW -> a Kronecker product: what `LoKr.fit` looks for, and the rank of its second factor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CannotFit, UsageError
from ..linalg import RankRule, dense_svd, factorization
from ..linalg.kronecker import Kronecker, kronecker_choices, nearest_kronecker
from ..linalg.randomized import DenseTiles
from .base import WeightAdapter
from .slots import fit_shape
from .storage import Common

_CHOICES = 12  # splits tried when the most exact one is asked for


def require_finite(source: WeightAdapter) -> None:
    """UsageError naming a field with NaN or Inf."""
    if bad := source.nonfinite():
        raise UsageError(f"{type(source).__name__}.{bad[0]}: NaN or Inf; it cannot be fitted.")


def nearest_product(
    source: WeightAdapter | Tensor, weight: Tensor | None, factor: int | None
) -> tuple[Kronecker, tuple[int, ...], Common]:
    """The A ⊗ B nearest to ΔW, the shape (o, i, *k) of the weight, and what is carried from the
    source; arguments and errors are those of `LoKr.fit`.
    """
    common = Common()
    target = tuple(source.shape)
    if isinstance(source, WeightAdapter):
        common = source.common()
        common.update(scale=1.0, magnitude=None, magnitude_axis=None)
        if weight is not None:
            target = source.padded_shape or tuple(weight.shape)
            source = source.on(target)
    if not fit_shape(tuple(source.shape), target):
        raise UsageError(f"a change of shape {tuple(source.shape)} does not fit a weight {target}.")
    if len(target) < 2:
        raise CannotFit(
            f"a change of shape {target} has no Kronecker form; keep it as a full difference."
        )
    factors = source.factors() if isinstance(source, WeightAdapter) else None
    if factors is not None:
        tiles = factors[0].detach(), factors[1].detach()
    else:
        whole = source.delta(weight) if isinstance(source, WeightAdapter) else source
        tiles = DenseTiles(whole.detach().reshape(target[0], -1))
    a, c = factorization(target[0], factor or -1)[0], factorization(target[1], factor or -1)[0]
    if factor is None:
        kernel = torch.Size(target[2:]).numel()
        rows, columns = target[0], target[1] * kernel
        limit = a * c + (rows // a) * (columns // c)
        if factors is not None and isinstance(source, WeightAdapter):
            limit = max(limit, source.numel)
        best = kronecker_choices(tiles, unit=kernel, parameters=limit, most=_CHOICES)[0]
        a, c = best.a, best.c
    return nearest_kronecker(tiles, a, c), target, common


def split_second(
    second: Tensor, longest: int, rank: RankRule | str | int
) -> tuple[Tensor, Tensor] | None:
    """The best (left, right) of the rank for B; None when the rank reaches half of its longest
    side, where B stays whole.
    """
    u, s, vh = dense_svd(second, RankRule.parse(rank))
    if s.numel() >= longest / 2:
        return None
    root = s.sqrt()
    return u * root, root[:, None] * vh
