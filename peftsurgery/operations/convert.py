"""convert: one adapter, from any layout to any other, proved by reading the result back.

    save(encode(decode(open(src))))

Every key of the source is accounted for (mapped, folded, carried, left out on request) and ΔW of
every module of the written file is compared with the source before the report says ok.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftsurgery import architectures
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.codec import BaseWeights, Encoded, decode, encode, open_adapter, write_encoded
from peftsurgery.codec.bases import base_names
from peftsurgery.codec.explaining import explain_checkpoint
from peftsurgery.codec.files import flushing, publish
from peftsurgery.errors import Finding, UsageError
from peftsurgery.layouts import LAYOUT_NAMES, layout_named
from peftsurgery.operations.headers import Headers
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.lineage import Hashing, stamp
from peftsurgery.operations.proving import BATCH, prove
from peftsurgery.operations.refit import refit, values_as_differences
from peftsurgery.operations.staging import staged_beside, workers
from peftsurgery.reports import Progress, Report

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class ConvertReport(Report):
    """Report of a conversion; `largest_error` is the largest relative change of any module's ΔW."""

    largest_error: float = 0.0
    keys: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No cyclic garbage collection: thousands of objects are made and kept; each pass finds
    nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
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
    progress: Progress | None = None,
) -> ConvertReport:
    """Rewrite the adapter `src` as `dst` in the layout `to`; see `peftsurgery convert --help` for
    the options.

    algorithm: "lora" fits every module as a LoRA (`rank`: a rule, or None for the exact
    factorisation), "full" writes the dense change. Modules whose change depends on the weight
    (DoRA, replaced weights) then need `base`. drop: patterns of keys or module paths to leave out.
    only: components to keep.

    Raises UsageError, UnsupportedError or UnsafeInputError before anything is written; CheckFailed
    when the file that was written does not read back as the source (it is removed then).
    """
    _check_options(to, algorithm, rank, dtype, alpha)
    dst = Path(dst)
    source = open_adapter(src, allow_pickle=allow_pickle)
    refuse_pending(source)
    _check_target(source, dst, overwrite, to)
    kept = _without(source, drop)
    hashing = Hashing(source, enabled=not dry_run)
    weights, known = _base(base, architecture, kept)
    tensors = Headers(kept) if dry_run else kept
    adapter = decode(tensors, architecture=architecture, known=known)
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
        losses = refit(adapter, algorithm, rank, weights, progress)
    if weights is not None:
        adapter.findings += values_as_differences(adapter, layout_named(to), weights)
    encoded = encode(adapter, to, fold_alpha=alpha == "fold")
    if dtype != "keep":
        _cast(encoded, DTYPES[dtype], source)
    report = ConvertReport("convert")
    report.findings.extend([*adapter.findings, *encoded.findings, *_dead(adapter)])
    _account(report, source, kept, left_out, drop)
    _summarise(report, adapter, original_layout, to, encoded)
    if dry_run:
        _plan(report, encoded)
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
    stamp(encoded, to, report.inputs, algorithm, rank, dtype, alpha)
    with staged_beside(dst) as staged:
        write_encoded(encoded, staged, to, sync=False)
        encoded.tensors.clear()
        with flushing(staged):
            error = prove(report, adapter, source, staged, losses, progress)
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    report.summary["largest relative error of ΔW"] = error
    object.__setattr__(report, "largest_error", error)
    return report


# options ------------------------------------------------------------------------------------------


def _check_options(
    to: str, algorithm: str | None, rank: str | None, dtype: str, alpha: str
) -> None:
    for value, known, name in (
        (to, LAYOUT_NAMES, "layout"),
        (algorithm, (None, "lora", "full"), "algorithm"),
        (dtype, ("keep", *DTYPES), "dtype"),
        (alpha, ("keep", "fold"), "alpha"),
    ):
        if value not in known:
            choices = ", ".join(str(k) for k in known if k)
            raise UsageError(f"{name} {value!r} is not known. Expected one of: {choices}.")
    if rank is not None and algorithm != "lora":
        raise UsageError(
            "--rank goes with --algorithm lora; alone it changes nothing (see resize-rank)."
        )


def _check_target(source: Checkpoint, dst: Path, overwrite: bool, to: str) -> None:
    taken = {path.resolve() for path in (*source.files, source.path)}
    if dst.resolve() in taken:
        raise UsageError(f"{dst}: is the input. Give another output path.")
    row = layout_named(to)
    if row.alpha == "config":
        if dst.suffix in (".safetensors", ".sft"):
            raise UsageError(
                f"{dst}: {row.title} is a folder; give a folder name without {dst.suffix}."
            )
    elif dst.is_dir():
        raise UsageError(f"{dst}: is a folder; {row.title} is one file. Give a file name.")
    if dst.exists() and not overwrite:
        raise UsageError(f"{dst}: exists. Pass --overwrite to replace it.")


def _base(
    base: str | Path | None, architecture: str | None, checkpoint: Checkpoint
) -> tuple[BaseWeights | None, dict[str, list[str]] | None]:
    if base is None:
        return None, None
    opened = open_checkpoint(base)
    refuse_pending(opened)
    known = base_names(opened)
    if architecture is None:
        architecture = explain_checkpoint(checkpoint, known=known).architecture.name
    return BaseWeights(opened, architectures.get(architecture)), known


def _without(checkpoint: Checkpoint, patterns: Sequence[str]) -> Checkpoint:
    """The checkpoint without the keys that match a pattern of --drop."""
    if not patterns:
        return checkpoint
    kept = {k: checkpoint[k] for k in checkpoint if not _matches(k, patterns)}
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


def _dead(adapter: Adapter) -> list[Finding]:
    """Modules that change nothing: never trained, or what was trained was lost on saving."""
    dead = [path for path, module in adapter.modules.items() if module.is_zero()]
    if not dead:
        return []
    return [
        Finding(
            "warning",
            "dead-modules",
            f"{len(dead)} of {len(adapter.modules)} modules are all zero and do nothing",
            dead[0],
            "expected for modules that were not trained; otherwise the trained values were lost on "
            "saving",
        )
    ]


# writing ------------------------------------------------------------------------------------------


def _cast(encoded: Encoded, dtype: torch.dtype, source: Checkpoint) -> None:
    """Cast the factors; alpha stays fp32, integers stay. What was read of `source` is released."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        narrow = tensor.element_size() <= 2  # exact in fp32, and twice as fast by way of it
        return (tensor.detach().float() if narrow else tensor.detach()).to(dtype)

    with workers(4) as threads:
        for tensors in encoded.tensors.values():
            keys = [
                key
                for key, tensor in tensors.items()
                if tensor.is_floating_point()
                and not key.endswith(".alpha")
                and tensor.dtype != dtype
            ]
            for start in range(0, len(keys), BATCH):
                some = keys[start : start + BATCH]
                cast = threads.map(rounded, [tensors[key] for key in some])
                tensors.update(zip(some, cast, strict=True))
                source.release()


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


def _summarise(
    report: ConvertReport, adapter: Adapter, original: str, to: str, encoded: Encoded
) -> None:
    count = sum(len(tensors) for tensors in encoded.tensors.values())
    nbytes = sum(
        t.numel() * t.element_size()
        for tensors in encoded.tensors.values()
        for t in tensors.values()
    )
    report.keys["written"] = count
    report.summary.update(
        {
            "from": original,
            "to": to,
            "architecture": adapter.architecture,
            "modules": len(adapter.modules),
            "keys written": count,
            "bytes written": nbytes,
        }
    )


def _plan(report: ConvertReport, encoded: Encoded) -> None:
    rows = []
    for part, tensors in encoded.tensors.items():
        for key, tensor in ((k, tensors[k]) for k in sorted(tensors)):
            full = f"{part}/{key}" if part else key
            rows.append(
                {
                    "key": full,
                    "shape": "x".join(map(str, tensor.shape)) or "scalar",
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "bytes": tensor.numel() * tensor.element_size(),
                    "from": ", ".join(encoded.sources.get(full, ())),
                }
            )
    report.tables["plan"] = rows
