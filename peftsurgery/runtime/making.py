"""The fresh adapter of one site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, nn

from peftsurgery.algorithms import Axis, Replace, WeightAdapter
from peftsurgery.errors import UsageError

from .inits import Start, start
from .stack import base_weight, parameter_of, weight_like
from .targets import Site, first_match


@dataclass(frozen=True)
class Maker:
    """Makes the fresh adapter of one site."""

    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    magnitude: Axis | None
    bias: str
    init: str
    dtype: torch.dtype
    generator: Generator | None

    def make(
        self,
        site: Site,
        kind: type[WeightAdapter],
        options: Mapping[str, object],
        slot: int | None = None,
    ) -> Start:
        """For a site, or for one slice of it; `rank` and `alpha` in options come before the
        patterns.
        """
        look = self.magnitude is not None or self.init != "default" or kind is Replace
        weight = (base_weight if look else weight_like)(site.host, site.parameter)
        if slot is not None:
            weight = weight[slot]
            if self.init.startswith("loftq"):
                raise UsageError(f"{site.path}: init {self.init!r} is not defined for slices.")
        rest = dict(options)
        rank = rest.pop("rank", first_match(self.rank_pattern, site.path, self.rank))
        alpha = rest.pop("alpha", first_match(self.alpha_pattern, site.path, self.alpha))
        if not isinstance(rank, (int, type(None))) or not isinstance(
            alpha, (int, float, type(None))
        ):
            raise UsageError(f"{site.path}: rank {rank!r} and alpha {alpha!r} must be numbers.")
        if self.rslora and rank is not None:
            alpha = (rank if alpha is None else alpha) * rank**0.5
        try:
            begun = start(
                kind,
                weight,
                self.init,
                rank=rank,
                alpha=alpha,
                generator=self.generator,
                stored=site.layer.stored,
                dtype=self.dtype,
                options=rest,
            )
        except UsageError as error:
            raise UsageError(f"{site.path}: {error}") from error
        adapter = begun.adapter
        changes: dict[str, object] = {}
        if self.magnitude is not None and weight.ndim > 1:
            if adapter.side != "sum" or not adapter.additive:
                raise UsageError(f"{site.path}: {kind.__name__} has no DoRA magnitude.")
            if begun.origin is not None or begun.base is not None:
                raise UsageError(f"{site.path}: init {self.init!r} is not defined with DoRA.")
            changes["magnitude"] = _norms(weight, self.magnitude, site.layer.stored, self.dtype)
            changes["magnitude_axis"] = _stored_axis(self.magnitude, site.layer.stored)
        if self.bias in ("targets", "lora_only", "all") and adapter.bias is None and slot is None:
            base = parameter_of(site.host, site.bias)
            if base is not None:
                change = torch.zeros(base.shape, dtype=self.dtype, device=base.device)
                changes["bias"] = nn.Parameter(change)
        return replace(begun, adapter=adapter.with_tensors(**changes)) if changes else begun


def _stored_axis(axis: Axis, stored: str) -> Axis:
    """Magnitudes per output are per column where the weight is stored (in, out)."""
    if stored == "linear":
        return axis
    return "in" if axis == "out" else "out"


def _norms(weight: torch.Tensor, axis: Axis, stored: str, dtype: torch.dtype) -> nn.Parameter:
    kept = 0 if _stored_axis(axis, stored) == "out" else 1
    others = [d for d in range(weight.ndim) if d != kept]
    return nn.Parameter(torch.linalg.vector_norm(weight.detach().float(), dim=others).to(dtype))
