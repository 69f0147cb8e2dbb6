"""What wrong tensors look like: adapters that are not in them, or with another strength."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from peftsurgery.errors import Finding
from peftsurgery.operations.apply import Renderer, Settings, spans
from peftsurgery.operations.comparing import SAME_STRENGTH, Comparison
from peftsurgery.operations.facing import Found
from peftsurgery.operations.plan import Target

Factors: TypeAlias = dict[int, tuple[float, float]]  # adapter -> (factor on its strength, margin)

FITS = 0.1  # of ||Δ||; more than that must not be left unexplained


def factors(target: Target, result: Comparison, found: Found, relative_to: str) -> Factors | None:
    """The factors f on the strengths asked for that explain a tensor best; None when none do.

        min ||F - W - Σ f_k Δ_k||, Δ_k the change by adapter k alone

    With several adapters on the rows of the middle tile.
    """
    indices = sorted({edit.adapter for edit in target.edits})
    margin = max(2 * SAME_STRENGTH, 4 * result.uncertainty)
    if result.total == 0 or margin > 0.5:
        return None
    if len(indices) == 1:
        noise = 4 * result.uncertainty * math.sqrt(max(1, result.elements))
        fits = result.unexplained <= max(FITS, noise)
        return {indices[0]: (result.strength or 0.0, margin)} if fits else None
    start, stop = spans(target)[len(spans(target)) // 2]
    settings = Settings(relative_to, dtype=found.dtype)
    columns: list[Tensor] = []
    before = torch.empty(0)
    for index in indices:
        exact, before = Renderer(with_adapters(target, [index]), settings).exact(start, stop)
        columns.append((exact - before).double().reshape(-1))
    change = (found.rows(start, stop, target.rows).float() - before).double().reshape(-1)
    if not bool(torch.isfinite(change).all()):
        return None
    matrix = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(matrix, change[:, None]).solution[:, 0]
    rest = torch.linalg.vector_norm(change - matrix @ solution)
    if found.packed is None and rest > FITS * torch.linalg.vector_norm(matrix):
        return None
    return {i: (float(f), margin) for i, f in zip(indices, solution, strict=True)}


def with_adapters(target: Target, adapters: Sequence[int]) -> Target:
    """The target with the edits of some adapters only."""
    return replace(target, edits=[edit for edit in target.edits if edit.adapter in adapters])


def explain(
    readings: Mapping[str, Factors | None],
    asked: Mapping[str, Mapping[int, float]],
    names: Sequence[str],
) -> tuple[list[Finding], dict[str, float]]:
    """Findings that put wrong tensors (`readings`) into words, and adapter -> strength found.

    asked: tensor -> adapter -> strength. The strengths found are means over the tensors that some
    strength explains.
    """
    absent: dict[int, list[str]] = {}
    other: dict[tuple[int, float, float], list[str]] = {}
    strange: list[str] = []
    found: dict[int, list[float]] = {}
    for name, reading in readings.items():
        if reading is None or all(abs(f - 1) <= margin for f, margin in reading.values()):
            strange.append(name)
            continue
        for adapter, (factor, margin) in reading.items():
            strength = asked[name][adapter]
            found.setdefault(adapter, []).append(factor * strength)
            if abs(factor) <= margin:
                absent.setdefault(adapter, []).append(name)
            elif abs(factor - 1) > margin:
                looks = float(f"{factor * strength:.2g}")
                other.setdefault((adapter, looks, strength), []).append(name)
    findings = [
        _error("not-merged", f"{names[adapter]} is not in {len(tensors)} tensors: {some(tensors)}")
        for adapter, tensors in absent.items()
    ]
    for (adapter, looks, strength), tensors in other.items():
        what = f"{names[adapter]} looks like strength {looks:g} instead of {strength:g}"
        findings.append(
            _error("wrong-strength", f"{what} in {len(tensors)} tensors: {some(tensors)}")
        )
    if strange:
        findings.append(
            _error("other-values", f"no strength explains {len(strange)} tensors: {some(strange)}")
        )
    return findings, {names[k]: sum(values) / len(values) for k, values in found.items()}


def _error(code: str, message: str) -> Finding:
    return Finding("error", code, message)


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:4])
    return f"{shown}, …" if len(names) > 4 else shown
