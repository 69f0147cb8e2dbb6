"""What resize-rank reports: errors of every module, what was noticed, the plan of a dry run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from peftsurgery.adapter import Adapter, members
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec import BaseWeights
from peftsurgery.errors import Finding
from peftsurgery.operations.grams import Grams
from peftsurgery.operations.rank_choices import curve
from peftsurgery.operations.subjects import Subjects
from peftsurgery.operations.truncating import Resized
from peftsurgery.reports import Report
from peftsurgery.reports.base import Row


@dataclass(frozen=True)
class ResizeReport(Report):
    """Report of a resize; `energy` is the share of Σ||ΔW||² over all resized modules that is kept.

    Columns of `modules`: rank (new), old_rank; energy, spectral_error and frobenius_error, relative
    to ||ΔW||², ||ΔW||_2 and ||ΔW||_F; the last is measured on the numbers written, against the
    source. weighted_error is the one behind G^½ (with a Gram file), merged_error that of W' - W of
    a DoRA (with a base).
    """

    energy: float = 1.0


def planned(
    report: ResizeReport,
    subjects: Subjects,
    spectra: Sequence[Tensor],
    ranks: Mapping[str, int],
    fixed: int,
    original: str,
    to: str,
) -> ResizeReport:
    """Fill in the report of a dry run: the curve, and what the rule would choose."""
    kept = total = 0.0
    for subject, values in zip(subjects.resized, spectra, strict=True):
        k = ranks[subject.path]
        squares = values.square()
        kept, total = kept + float(squares[:k].sum()), total + float(squares.sum())
        whole = float(squares.sum())
        share = float(squares[:k].sum()) / whole if whole else 1.0
        report.modules.append(
            {
                "module": subject.path,
                "algorithm": subject.module.algorithm,
                "rank": k,
                "old_rank": subject.module.rank,
                "energy": share,
                "frobenius_error": math.sqrt(max(1 - share, 0.0)),
            }
        )
    energy = kept / total if total else 1.0
    nbytes = fixed + sum(ranks[s.path] * s.cost for s in subjects.resized)
    report.tables["curve"] = curve(subjects.resized, spectra, fixed)
    report.summary.update(
        {
            "from": original,
            "to": to,
            "modules resized": len(subjects.resized),
            "modules carried": len(subjects.carried),
            "total rank": sum(ranks.values()),
            "energy kept": energy,
            "bytes at most": nbytes,
            "written": "nothing (--dry-run)",
        }
    )
    object.__setattr__(report, "energy", energy)
    return report


def merged_errors(
    resized: Mapping[str, Resized],
    modules: Mapping[str, WeightAdapter],
    weights: BaseWeights | None,
) -> dict[str, float]:
    """||W'_new - W'||_F / ||W' - W||_F of every DoRA, with the base."""
    errors: dict[str, float] = {}
    if weights is None:
        return errors
    for path, result in resized.items():
        before = modules[path]
        if before.magnitude is None or result.module.magnitude is None:
            continue
        weight = weights.weight(path).float()
        wanted = before.merged(weight)[0]
        change = float((wanted - weight).norm())
        gap = float((result.module.merged(weight)[0] - wanted).norm())
        errors[path] = gap / change if change else (math.inf if gap else 0.0)
    return errors


def findings_of(
    subjects: Subjects,
    resized: Mapping[str, Resized],
    weights: BaseWeights | None,
    grams: Grams | None,
) -> list[Finding]:
    """What is to be known about the result, one finding for all modules it concerns."""
    found: list[Finding] = []

    def note(code: str, paths: Sequence[str], text: str, remedy: str | None = None) -> None:
        if paths:
            count = f"{len(paths)} module{'s' if len(paths) > 1 else ''}"
            found.append(Finding("info", code, f"{count}: {text}", paths[0], remedy))

    dora = [s.path for s in subjects.resized if resized[s.path].module.magnitude is not None]
    if weights is None:
        note(
            "dora-error-unknown",
            dora,
            "a DoRA keeps its magnitude, which stays that of W'; the errors are those of ΔW before "
            "its norm",
            "--base tells the error in W'",
        )
    for why in dict.fromkeys(subjects.carried.values()):
        note("carried", [p for p, w in subjects.carried.items() if w == why], f"carried: {why}")
    changed = [
        s for s in subjects.resized if s.module.algorithm != resized[s.path].module.algorithm
    ]
    note("now-lora", [s.path for s in changed], "another algorithm became LoRA")
    tucker = [s.path for s in subjects.resized if s.module.tensors().get("mid") is not None]
    note("tucker-core", tucker, "the Tucker core (lora_mid) was multiplied into down")
    moved = [
        s.path
        for s in subjects.resized
        if s.exact and not math.isclose(float(resized[s.path].module.scale), s.scale)
    ]
    note(
        "scale-moved",
        moved,
        "factors would have left the range of their dtype; a power of two moved into alpha / rank",
    )
    note("zero", [p for p, r in resized.items() if r.norm == 0], "ΔW is zero")
    if grams is not None:
        note("no-gram", [s.path for s in subjects.resized if s.gram is None], "no Gram matrix")
        unused = sorted(set(grams.found) - grams.used)
        note("gram-unused", unused, "a Gram matrix names no module of the adapter")
    return found


def summary(report: ResizeReport, resized: Mapping[str, Resized], source: Checkpoint) -> float:
    """What was read and kept in all; returns the share of Σ||ΔW||² kept."""
    total = sum(r.norm**2 for r in resized.values())
    energy = sum(r.energy * r.norm**2 for r in resized.values()) / total if total else 1.0
    ranks = [r.rank for r in resized.values()]
    report.summary.update(
        {
            "bytes read": sum(tensor.nbytes for tensor in source.values()),
            "modules resized": len(resized),
            "total rank": sum(ranks),
            "ranks": f"{min(ranks)} to {max(ranks)}",
            "energy kept": energy,
            "largest Frobenius error": max(r.frobenius for r in resized.values()),
        }
    )
    return energy


def details(
    adapter: Adapter,
    written: Adapter,
    resized: Mapping[str, Resized],
    merged: Mapping[str, float],
    *,
    with_gram: bool,
) -> dict[str, Row]:
    """Columns of the report for every module of `written`; the parts of a fused weight show its
    own.
    """
    owner: dict[str, str] = {}
    for path in adapter.modules:
        component, _, inner = path.partition(":")
        owner |= {f"{component}:{part}": path for part in members(inner)}
        owner[path] = path
    rows: dict[str, Row] = {}
    for path in written.modules:
        whole = owner.get(path, path)
        result = resized.get(whole)
        row: Row = {
            "old_rank": None if result is None else result.old_rank,
            "energy": 1.0 if result is None else result.energy,
            "spectral_error": 0.0 if result is None else result.spectral,
            "frobenius_error": 0.0 if result is None else result.frobenius,
        }
        if with_gram:
            row["weighted_error"] = None if result is None else result.weighted
        if merged:
            row["merged_error"] = merged.get(whole)
        rows[path] = row
    return rows
