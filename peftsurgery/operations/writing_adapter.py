"""What every operation that writes an adapter does with it: target checks, encode, cast, stage,
write, prove by reading back, stamp, publish.

    check_target(sources, dst, to=…, overwrite=…)      before anything is read
    encoded = encode_as(adapter, to, dtype=…)           keys, tensors, metadata of the layout
    summarise(report, adapter, encoded, to=…)           or plan(report, encoded) for --dry-run
    write_proved(encoded, adapter, dst, to=…, report=…, origin=Origin("convert", {"to": to}, …))
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftsurgery import architectures
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.codec import BaseWeights, Encoded, encode, write_encoded
from peftsurgery.codec.bases import base_names
from peftsurgery.codec.explaining import explain_checkpoint
from peftsurgery.codec.files import flushing, publish
from peftsurgery.errors import Finding, UsageError
from peftsurgery.layouts import LAYOUT_NAMES, layout_named
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.lineage import stamp
from peftsurgery.operations.proving import BATCH, prove
from peftsurgery.operations.staging import staged_beside, workers
from peftsurgery.quantizers import logical
from peftsurgery.reports import Progress, Report
from peftsurgery.reports.base import Row

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Origin:
    """What the header of a written file says of where it comes from; no time, so two runs agree."""

    operation: str
    options: Mapping[str, str | None] = field(default_factory=dict)  # None: not given, left out
    inputs: Mapping[str, str] = field(default_factory=dict)  # path -> sha256


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic garbage collection: thousands of objects are made and kept; each pass finds
    nothing. Also usable as a decorator.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# checks before anything is read -------------------------------------------------------------------


def check_choice(value: str | None, known: Sequence[str | None], name: str) -> None:
    """UsageError when `value` is not one of `known`; None among them means it may be left out."""
    if value not in known:
        choices = ", ".join(str(k) for k in known if k)
        raise UsageError(f"{name} {value!r} is not known. Expected one of: {choices}.")


def check_layout(to: str) -> None:
    """UsageError when there is no such layout."""
    check_choice(to, LAYOUT_NAMES, "layout")


def check_dtype(dtype: str) -> None:
    """UsageError when `dtype` is neither "keep" nor one of `DTYPES`."""
    check_choice(dtype, ("keep", *DTYPES), "dtype")


def check_target(sources: Sequence[Checkpoint], dst: Path, *, to: str, overwrite: bool) -> None:
    """UsageError when `dst` is an input, exists (without `overwrite`), or is a file where `to` is a
    folder or the other way round.
    """
    taken = {path.resolve() for source in sources for path in (*source.files, source.path)}
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


def base_weights(
    base: str | Path | None,
    architecture: str | None,
    adapter: Checkpoint,
    *,
    keep_unknown: bool = False,
) -> tuple[BaseWeights | None, dict[str, list[str]] | None]:
    """The weights of `--base` by module path, packed ones as what they stand for, and its module
    names for decoding `adapter`; both None without a base.
    """
    if base is None:
        return None, None
    opened = logical(open_checkpoint(base))
    refuse_pending(opened)
    known = base_names(opened)
    if architecture is None:
        explanation = explain_checkpoint(adapter, known=known, keep_unknown=keep_unknown)
        architecture = explanation.architecture.name
    return BaseWeights(opened, architectures.get(architecture)), known


# encoding -----------------------------------------------------------------------------------------


def encode_as(
    adapter: Adapter,
    to: str,
    *,
    dtype: str = "keep",
    fold_alpha: bool = False,
    sources: Sequence[Checkpoint] = (),
    remedy: str | None = None,
    keep: Callable[[WeightAdapter], WeightAdapter] | None = None,
) -> Encoded:
    """`adapter` in the keys of the layout `to`, its floating-point tensors cast to `dtype`; alpha
    stays fp32. What the cast has read of `sources` is given back to the system as it goes. remedy:
    what to advise where the layout cannot hold it, if not options of convert. keep: see `encode`.
    """
    encoded = encode(adapter, to, fold_alpha=fold_alpha, remedy=remedy, keep=keep)
    if dtype != "keep":
        _cast(encoded, DTYPES[dtype], sources)
    return encoded


def _cast(encoded: Encoded, dtype: torch.dtype, sources: Sequence[Checkpoint]) -> None:
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
                for source in sources:
                    source.release()


# the report ---------------------------------------------------------------------------------------


def summarise(
    report: Report, adapter: Adapter, encoded: Encoded, *, to: str, original: str | None = None
) -> int:
    """Layouts, architecture, modules, keys and bytes into `report.summary`; returns the number of
    keys. original: the layout the adapter came in.
    """
    count = sum(len(tensors) for tensors in encoded.tensors.values())
    nbytes = sum(
        t.numel() * t.element_size()
        for tensors in encoded.tensors.values()
        for t in tensors.values()
    )
    if original is not None:
        report.summary["from"] = original
    report.summary.update(
        {
            "to": to,
            "architecture": adapter.architecture,
            "modules": len(adapter.modules),
            "keys written": count,
            "bytes written": nbytes,
        }
    )
    return count


def plan(report: Report, encoded: Encoded) -> None:
    """Every key that would be written, with shape, dtype, bytes and the modules it is made of."""
    rows: list[Row] = []
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


def dead_modules(adapter: Adapter) -> list[Finding]:
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


def write_proved(
    encoded: Encoded,
    adapter: Adapter,
    dst: Path,
    *,
    to: str,
    report: Report,
    origin: Origin,
    overwrite: bool = False,
    details: Mapping[str, Row] | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> float:
    """Write `encoded` beside `dst`, read it back, compare ΔW of every module with `adapter`, and
    rename it into place; returns the largest relative error of ΔW.

    `encoded` is stamped with `origin` and emptied. Adds one row per module to `report.modules`,
    with the columns of `details[path]` (the same for all modules) behind its own, and the files to
    `report.outputs`. check: a further check of the file before it is renamed. CheckFailed when a
    module, a key or a carried tensor is not what it was; nothing is left at `dst` then.
    """
    stamp(encoded, to, origin.operation, origin.options, origin.inputs)
    with staged_beside(dst) as staged:
        write_encoded(encoded, staged, to, sync=False)
        encoded.tensors.clear()
        with flushing(staged):
            error = prove(report, adapter, staged, details or {}, progress, encoded.release)
            if check is not None:
                check(staged)
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    report.summary["largest relative error of ΔW"] = error
    return error
