"""convert: one adapter, from any layout to any other, proved by reading the result back.

    save(encode(decode(open(src))))

Every key of the source is accounted for (mapped, folded, carried, left out on request) and ΔW of
every module of the written file is compared with the source before the report says ok."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftsurgery import __version__, architectures
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import WeightAdapter, difference
from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.codec import BaseWeights, Encoded, decode, encode, open_adapter, write_encoded
from peftsurgery.codec.bases import base_names
from peftsurgery.codec.explaining import explain_checkpoint
from peftsurgery.codec.files import flushing, kohya_hashes, publish
from peftsurgery.errors import CheckFailed, Finding, UsageError
from peftsurgery.layouts import LAYOUT_NAMES, layout_named
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.refit import refit, values_as_differences
from peftsurgery.reports import Progress, Report

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
BATCH = 32  # tensors or modules; then the pages they were read from are given back
BACKWARD_SAFE = (
    4.0  # a product of two rounded factors and a folded scale moves by a few units of roundoff
)


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
    when the file that was written does not read back as the source (it is removed then)."""
    _check_options(to, algorithm, rank, dtype, alpha)
    dst = Path(dst)
    source = open_adapter(src, allow_pickle=allow_pickle)
    refuse_pending(source)
    _check_target(source, dst, overwrite, to)
    kept = _without(source, drop)
    hashing = _Hashing(source, enabled=not dry_run)
    weights, known = _base(base, architecture, kept)
    tensors = _Headers(kept) if dry_run else kept
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
    _stamp(encoded, to, report.inputs, algorithm, rank, dtype, alpha)
    with _staged(dst) as staged:
        write_encoded(encoded, staged, to, sync=False)
        encoded.tensors.clear()
        with flushing(staged):
            error = _prove(report, adapter, source, staged, losses, progress)
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


READ_ANYWAY = (".alpha", ".reshape_weight")  # numbers that decide how the file is to be read


class _Headers(Checkpoint):
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

    def __init__(self, tensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def torch(self) -> torch.Tensor:
        from peftsurgery.checkpoint.dtypes import torch_dtype

        return torch.empty(self.shape, dtype=torch_dtype(self.dtype), device="meta")


def _without(checkpoint: Checkpoint, patterns: Sequence[str]) -> Checkpoint:
    """The checkpoint without the keys that match a pattern of --drop."""
    if not patterns:
        return checkpoint
    kept = {k: checkpoint[k] for k in checkpoint if not _matches(k, patterns)}
    return Checkpoint(
        checkpoint.path,
        kept,
        source=checkpoint.source,
        kind=checkpoint.kind,
        metadata=checkpoint.metadata,
        files=checkpoint.files,
        config=checkpoint.config,
        components=checkpoint.components,
    )


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

    with _workers() as threads:
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


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use in one operation, each running whole operations.

    Modules are many and small, and threads that meet inside every operation lose much of their time
    waiting, most of all where other programs run.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    threads = ThreadPoolExecutor(min(count, 4))
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(count)


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


def _stamp(
    encoded: Encoded,
    to: str,
    inputs: Mapping[str, str],
    algorithm: str | None,
    rank: str | None,
    dtype: str,
    alpha: str,
) -> None:
    """Lineage (deterministic, no time) and the hashes a Kohya file carries."""
    options = [f"to={to}"]
    options += [f"{k}={v}" for k, v in (("algorithm", algorithm), ("rank", rank)) if v]
    options += [f"{k}={v}" for k, v in (("dtype", dtype), ("alpha", alpha)) if v != "keep"]
    metadata = encoded.metadata
    metadata["peftsurgery.operation"] = "convert"
    metadata["peftsurgery.version"] = __version__
    metadata["peftsurgery.options"] = " ".join(options)
    metadata["peftsurgery.inputs"] = " ".join(
        f"{Path(name).name}=sha256:{digest}" for name, digest in sorted(inputs.items())
    )
    stale = [k for k in metadata if k.startswith("sshs_") or k == "modelspec.hash_sha256"]
    wants = bool(stale) or any(k.startswith("ss_") for k in metadata)
    for key in stale:
        del metadata[key]
    row = layout_named(to)
    if wants and row.container == "flat":
        hashes = kohya_hashes(encoded.tensors[""], metadata)
        metadata.update(hashes)
        if "modelspec.hash_sha256" in stale:
            metadata["modelspec.hash_sha256"] = "0x" + hashes["sshs_model_hash"]


class _Hashing:
    """SHA-256 of the input files, on a second thread while the rest goes on."""

    def __init__(self, checkpoint: Checkpoint, *, enabled: bool) -> None:
        self._digests: dict[str, str] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if enabled:
            self._thread = threading.Thread(target=self._run, args=(checkpoint,), daemon=True)
            self._thread.start()

    def _run(self, checkpoint: Checkpoint) -> None:
        try:
            self._digests = checkpoint.sha256()
        except BaseException as error:
            self._error = error

    def result(self) -> dict[str, str]:
        """File name -> digest; waits for the thread."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digests


# the proof ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staged(dst: Path) -> Iterator[Path]:
    """A path beside `dst` to write to and check; whatever is left there when the block ends is
    removed.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    staged = dst.with_name(f".{dst.stem}.{secrets.token_hex(6)}{dst.suffix}")
    try:
        yield staged
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        else:
            staged.unlink(missing_ok=True)


def _prove(
    report: ConvertReport,
    adapter: Adapter,
    source: Checkpoint,
    dst: Path,
    losses: Mapping[str, float],
    progress: Progress | None,
) -> float:
    """Reopen and decode `dst`, compare every module with the source; returns the largest relative
    error.
    """
    known = {c: list(adapter.of(c)) for c in adapter.components}
    written = open_adapter(dst)
    again = decode(written, architecture=adapter.architecture, known=_plain(known))
    worst, worst_path = 0.0, ""
    over: list[str] = []
    modules = list(adapter.modules.items())
    pairs = [(module, again.modules.pop(path, None)) for path, module in modules]
    batches = [pairs[n : n + BATCH] for n in range(0, len(pairs), BATCH)]
    with _workers() as threads:
        errors = (error for batch in threads.map(_changes, batches) for error in batch)
        for done, ((path, module), (_, back)) in enumerate(zip(modules, pairs, strict=True)):
            if progress is not None:
                progress(done, len(modules), path)
            error = next(errors)
            if done % BATCH == 0:
                written.release()
            if not error <= _roundoff(module, back):
                over.append(path)
            if error > worst or error != error:
                worst, worst_path = error, path
            row = {
                "module": path,
                "algorithm": module.algorithm,
                "rank": module.rank,
                "scale": float(module.scale),
                "error": error,
            }
            if losses:
                row["loss"] = losses.get(path, 0.0)
            report.modules.append(row)
    extra = [p for p, m in again.modules.items() if not m.is_zero()]
    missing = [
        key for key in adapter.extras if key not in again.extras and key != "lora_controlnet"
    ]
    if over or extra or missing:
        raise CheckFailed(_failure(over, extra, missing, worst, worst_path))
    report.summary["check"] = f"reopened, decoded and compared: {len(modules)} modules agree"
    if losses:
        report.summary["largest loss of the fit"] = max(losses.values(), default=0.0)
    return worst


def _changes(pairs: Sequence[tuple[WeightAdapter, WeightAdapter | None]]) -> list[float]:
    """The relative change of each module; a module that was not written counts as zero."""
    return [
        difference(module, back)
        if back is not None
        else (0.0 if module.is_zero() else float("inf"))
        for module, back in pairs
    ]


def _plain(known: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {c: [p for p in paths if "[" not in p and "~" not in p] for c, paths in known.items()}


def _roundoff(module: WeightAdapter, back: WeightAdapter | None) -> float:
    """What rounding to the coarser of the two dtypes may move ΔW, relatively."""
    tensors = [*module.tensors().values(), *(back.tensors().values() if back is not None else ())]
    return BACKWARD_SAFE * max(torch.finfo(t.dtype).eps for t in tensors)


def _failure(
    over: Sequence[str],
    extra: Sequence[str],
    missing: Sequence[str],
    worst: float,
    worst_path: str,
) -> str:
    reasons = []
    if over:
        reasons.append(
            f"ΔW of {len(over)} modules moved by more than the dtype's rounding, worst "
            f"{worst_path!r} by {worst:.3g}"
        )
    if extra:
        reasons.append(
            f"{len(extra)} modules appeared that the source does not have, first {extra[0]!r}"
        )
    if missing:
        reasons.append(f"{len(missing)} carried tensors are missing, first {missing[0]!r}")
    return (
        f"the written file does not read back as the source: {'; '.join(reasons)}. Nothing was "
        "kept. A wider --dtype "
        "(fp32) keeps more."
    )
