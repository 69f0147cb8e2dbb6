"""convert: one adapter, from any layout to any other, proved by reading the result back.

    save(encode(decode(open(src))))

Every key of the source is accounted for (mapped, folded, carried, left out on request) and ΔW of
every module of the written file is compared with the source before the report says ok.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec import decode, open_adapter
from peftsurgery.codec.settling import settle
from peftsurgery.errors import Finding, UsageError
from peftsurgery.layouts import layout_named
from peftsurgery.operations.headers import Headers
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.lineage import Hashing
from peftsurgery.operations.refit import refit, values_as_differences
from peftsurgery.operations.writing_adapter import (
    Origin,
    base_weights,
    check_choice,
    check_dtype,
    check_layout,
    check_target,
    collector_paused,
    dead_modules,
    encode_as,
    plan,
    summarise,
    write_proved,
)
from peftsurgery.reports import Progress, Report


@dataclass(frozen=True)
class ConvertReport(Report):
    """Report of a conversion; `largest_error` is the largest relative change of any module's ΔW."""

    largest_error: float = 0.0
    keys: dict[str, int] = field(default_factory=dict)


@collector_paused()
def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    architecture: str | None = None,
    base: str | Path | None = None,
    algorithm: str | None = None,
    rank: str | None = None,
    dtype: str = "keep",
    alpha: str = "keep",
    drop: Sequence[str] = (),
    only: Sequence[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    keep_unknown: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Rewrite the adapter `src` as `dst` in the layout `to`; see `peftsurgery convert --help` for
    the options.

    algorithm: "lokr" fits every module as the nearest Kronecker product (`rank`, if any, is that
    of its second factor), "lora" as a LoRA (`rank`: a rule, or None for the exact
    factorisation), "full" writes the dense change. Modules whose change depends on the weight
    (DoRA, replaced weights) then need `base`. drop: patterns of keys or module paths to leave out.
    only: components to keep. keep_unknown: carry keys that nothing explains as they are.

    Raises UsageError, UnsupportedError or UnsafeInputError before anything is written; CheckFailed
    when the file that was written does not read back as the source (it is removed then).
    """
    _check_options(to, algorithm, rank, dtype, alpha)
    dst = Path(dst)
    source = open_adapter(src, allow_pickle=allow_pickle)
    refuse_pending(source)
    check_target([source], dst, to=to, overwrite=overwrite)
    kept = _without(source, drop)
    hashing = Hashing(source, enabled=not dry_run)
    weights, known = base_weights(base, architecture, kept, keep_unknown=keep_unknown)
    tensors = Headers(kept) if dry_run else kept
    adapter = decode(tensors, architecture=architecture, known=known, keep_unknown=keep_unknown)
    if not dry_run:
        kept.populate()  # not before: a large file may be refused by its header alone
    if weights is not None:
        adapter = settle(adapter, weights.shape_of)
    original_layout = adapter.layout
    left_out = _filter(adapter, drop, only)
    if not adapter.modules:
        raise UsageError(f"{source.source}: nothing is left to convert after --drop and --only.")
    if left_out or len(kept) < len(source):
        adapter.config.pop("target_modules", None)  # it would select what was left out as well
    losses: dict[str, float] = {}
    if algorithm is not None:
        if dry_run:
            raise UsageError(
                "--dry-run reads headers only, and --algorithm needs the values; leave one of them "
                "out."
            )
        # PEFT cuts every module by one rule; elsewhere the most exact cut of each is taken
        factor = -1 if layout_named(to).alpha == "config" else None
        losses = refit(adapter, algorithm, rank, weights, progress, factor=factor)
    if weights is not None:
        adapter.findings += values_as_differences(adapter, layout_named(to), weights)
    encoded = encode_as(adapter, to, dtype=dtype, fold_alpha=alpha == "fold", sources=[source])
    report = ConvertReport("convert")
    report.findings.extend([*adapter.findings, *encoded.findings, *dead_modules(adapter)])
    _account(report, source, kept, left_out, drop)
    count = summarise(report, adapter, encoded, to=to, original=original_layout)
    report.keys["written"] = count
    if dry_run:
        plan(report, encoded)
        if any(len(paths) > 1 for paths in encoded.sources.values()):
            report.findings.append(
                Finding(
                    "info",
                    "ranks-not-read",
                    "modules are fused: the ranks shown are the largest possible; parts with the "
                    "same input side share it",
                )
            )
        report.summary["written"] = "nothing (--dry-run)"
        return report
    report.inputs.update(hashing.result())
    options = {
        "to": to,
        "algorithm": algorithm,
        "rank": rank,
        "dtype": None if dtype == "keep" else dtype,
        "alpha": None if alpha == "keep" else alpha,
    }
    error = write_proved(
        encoded,
        adapter,
        dst,
        to=to,
        report=report,
        origin=Origin("convert", options, report.inputs),
        overwrite=overwrite,
        details=({p: {"loss": losses.get(p, 0.0)} for p in adapter.modules} if losses else None),
        progress=progress,
    )
    if losses:
        report.summary["largest loss of the fit"] = max(losses.values())
    object.__setattr__(report, "largest_error", error)
    return report


# options ------------------------------------------------------------------------------------------


def _check_options(
    to: str, algorithm: str | None, rank: str | None, dtype: str, alpha: str
) -> None:
    check_layout(to)
    check_choice(algorithm, (None, "lora", "lokr", "full"), "algorithm")
    check_dtype(dtype)
    check_choice(alpha, ("keep", "fold"), "alpha")
    if rank is not None and algorithm not in ("lora", "lokr"):
        raise UsageError(
            "--rank goes with --algorithm lora or lokr; alone it changes nothing (see resize-rank)."
        )


def _without(checkpoint: Checkpoint, patterns: Sequence[str]) -> Checkpoint:
    """The checkpoint without the keys that match a pattern of --drop."""
    if not patterns:
        return checkpoint
    kept = {k: checkpoint[k] for k in checkpoint if not _matches(k, patterns)}
    left_out = [k for k in checkpoint if k not in kept and ".vera_lambda_" in k]
    if left_out and not any("base_model.vera_A" in k for k in checkpoint):
        raise UsageError(
            f"--drop matches {left_out[0]!r} of a VeRA whose projections are not in the file: they "
            "are drawn for the largest of all its layers. Drop the module by its path, as inspect "
            "prints it, with --base."
        )
    return checkpoint.with_tensors(kept)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == p or fnmatch.fnmatchcase(name, p) for p in patterns)


def _filter(
    adapter: Adapter, drop: Sequence[str], only: Sequence[str] | None
) -> dict[str, WeightAdapter]:
    """Remove modules by --drop and --only; returns what was removed."""
    if only:
        unknown = [c for c in only if c not in adapter.components]
        if unknown:
            raise UsageError(
                f"--only {unknown[0]}: the adapter has no such component; it has "
                f"{', '.join(adapter.components)}."
            )
    removed = {
        path: module
        for path, module in adapter.modules.items()
        if _matches(path, drop) or (only and path.partition(":")[0] not in only)
    }
    for path in removed:
        del adapter.modules[path]
    if only:
        for key in adapter.extras:
            adapter.findings.append(Finding("info", "left-out", "tensor left out on request", key))
        adapter.extras.clear()
    return removed


# the report ---------------------------------------------------------------------------------------


def _account(
    report: ConvertReport,
    source: Checkpoint,
    kept: Checkpoint,
    left_out: Mapping[str, WeightAdapter],
    drop: Sequence[str],
) -> None:
    dropped = len(source) - len(kept)
    report.keys.update(read=len(source), dropped=dropped)
    report.summary["keys read"] = len(source)
    report.summary["keys left out on request"] = dropped
    for path in left_out:
        report.findings.append(Finding("info", "left-out", "module left out on request", path))
    for pattern in drop:
        if not any(_matches(k, [pattern]) for k in (*source, *left_out)):
            raise UsageError(f"--drop {pattern!r} matches no key and no module. Check the pattern.")
