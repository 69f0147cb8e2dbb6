"""merge: fold adapters into a base checkpoint, streamed, rounded once, and proved.

    save(W + delta), one row tile at a time

The base is never loaded: untouched tensors are copied as bytes, touched ones are computed tile by tile while earlier
tiles are written.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftsurgery import __version__, architectures
from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import (
    Checkpoint,
    Deferred,
    LazyTensor,
    open_checkpoint,
    save,
    serialized_header,
)
from peftsurgery.checkpoint.folders import is_index
from peftsurgery.checkpoint.pickles import is_pickle_name
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.codec import BaseWeights, decode, open_adapter
from peftsurgery.codec.explaining import explain_checkpoint
from peftsurgery.codec.files import publish
from peftsurgery.errors import CheckFailed, Finding, UnsupportedError, UsageError
from peftsurgery.operations.apply import (
    Pipeline,
    Renderer,
    Settings,
    Survival,
    output_dtype,
    spans,
)
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.plan import MergePlan, Target, plan_merge
from peftsurgery.operations.strengths import Strength
from peftsurgery.operations.undo import Merge, identity, write_undo
from peftsurgery.reports import Progress, Report

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
DENSE = ("F64", "F32", "F16", "BF16")
SURVIVAL_WARNING = 0.95


@dataclass(frozen=True)
class MergeReport(Report):
    """Report of a merge; `survival` is the share of ΔW present in what was written, over all touched weights."""

    survival: float = 1.0
    touched: dict[str, float] = field(default_factory=dict)  # stored tensor -> survival


@dataclass(frozen=True)
class Inputs:
    """A base and the adapters to fold into it, opened and placed."""

    base: BaseWeights
    adapters: list[tuple[Adapter, Strength]]
    names: list[str]
    plan: MergePlan


def merge(
    base: str | Path,
    adapters: Sequence[tuple[str | Path | Adapter, float | Strength]],
    dst: str | Path | None = None,
    *,
    in_place: bool = False,
    architecture: str | None = None,
    relative_to: str = "current",
    dtype: str = "keep",
    rounding: str = "nearest",
    seed: int = 0,
    min_survival: float | None = None,
    verify: str = "sample",
    undo: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Fold `adapters` (source, strength) into `base` in the order given and write the result to `dst`.

    relative_to: "current" composes in order, "base" adds every adapter's change of the base itself. verify: "sample"
    recomputes one tile of every touched tensor from the written file, "full" all of them; untouched tensors are always
    compared byte by byte. undo: a file that will hold the original bytes of the touched tensors, for `unmerge`. in_place:
    no `dst`; the touched tensors are overwritten in the base itself under a journal (see `merge_in_place`).

    Raises CheckFailed when a module does not land, when survival is below `min_survival` or when the written file is not
    what was planned; UsageError, UnsupportedError and UnsafeInputError as the readers do. Nothing is written then.
    """
    settings = _settings(relative_to, dtype, rounding, seed, verify)
    if in_place == (dst is not None):
        raise UsageError("a merge is written either to an output (-o DST) or --in-place; give one of the two.")
    inputs = open_inputs(
        base, adapters, architecture=architecture, allow_pickle=allow_pickle, unfinished=in_place
    )
    checkpoint = inputs.base.checkpoint
    report = MergeReport("merge")
    if undo is not None:
        others = [str(base), *inputs.names, *([str(dst)] if dst else [])]
        _check_undo(Path(undo), others, overwrite or in_place)
    if dst is None:
        from peftsurgery.operations.in_place import merge_in_place

        return merge_in_place(
            report,
            inputs,
            settings,
            undo=Path(undo) if undo is not None else None,
            replace_undo=overwrite,
            min_survival=min_survival,
            full=verify == "full",
            dry_run=dry_run,
            progress=progress,
        )
    dst = Path(dst)
    _check_output(checkpoint, dst, overwrite)
    describe(report, inputs, settings)
    if dry_run:
        report.summary["written"] = "nothing (--dry-run)"
        report.tables["plan"] = plan_rows(inputs.plan, settings)
        return report
    with _staged(dst, folder=checkpoint.path.is_dir() or checkpoint.kind == "sharded") as staged:
        survival = _write(inputs, settings, staged, progress)
        report_survival(report, survival, min_survival)
        _prove(inputs, settings, staged, full=verify == "full")
        report.summary["check"] = (
            f"reopened: {len(survival)} touched tensors recomputed ({verify}), the others equal byte by byte"
        )
        if undo is not None:
            kept = _write_undo(inputs, settings, staged, Path(undo), overwrite)
            report.summary["undo file bytes"] = Path(undo).stat().st_size
            report.outputs.extend(str(path) for path in kept)
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    return report


def open_inputs(
    base: str | Path,
    adapters: Sequence[tuple[str | Path | Adapter, float | Strength]],
    *,
    architecture: str | None = None,
    allow_pickle: bool = False,
    unfinished: bool = False,
) -> Inputs:
    """Open and decode everything and place every module on the base; see `plan_merge` for what it refuses.

    unfinished: accept a base whose merge in place was interrupted; otherwise it is refused.
    """
    if not adapters:
        raise UsageError("no adapter given. Pass at least one with -a ADAPTER[=STRENGTH].")
    checkpoint = open_checkpoint(base, allow_pickle=allow_pickle)
    if not unfinished:
        refuse_pending(checkpoint)
    opened: list[tuple[str, Adapter | Checkpoint]] = []
    for source, _ in adapters:
        if isinstance(source, Adapter):
            opened.append((source.layout or "adapter", source))
        else:
            opened.append((str(source), open_adapter(source, allow_pickle=allow_pickle)))
    family = architecture or _family([found for _, found in opened], checkpoint)
    weights = BaseWeights(checkpoint, architectures.get(family))
    known = weights.modules()
    decoded: list[tuple[Adapter, Strength]] = []
    for (name, found), (_, strength) in zip(opened, adapters, strict=True):
        adapter = (
            found
            if isinstance(found, Adapter)
            else decode(found, architecture=family, known=known)
        )
        _mergeable(adapter, name)
        value = strength if isinstance(strength, Strength) else Strength(float(strength))
        decoded.append((adapter, value))
    names = [name for name, _ in opened]
    _dense(weights)
    return Inputs(weights, decoded, names, plan_merge(weights, decoded, names))


def _family(found: Sequence[Adapter | Checkpoint], base: Checkpoint) -> str:
    for item in found:
        if isinstance(item, Adapter):
            return item.architecture
        try:
            return explain_checkpoint(item).architecture.name
        except UsageError:
            continue
    for name in ("flux", "sdxl", "sd2", "sd1", "llm"):
        with contextlib.suppress(UsageError):
            BaseWeights(base, architectures.get(name))
            return name
    raise UsageError(
        f"{base.source}: the model family is not clear from the adapters. Pass --architecture."
    )


def _mergeable(adapter: Adapter, name: str) -> None:
    for finding in adapter.findings:
        if finding.code == "residual-base":
            raise UnsupportedError(f"{name}: {finding.message}. {finding.remedy}.")
    if adapter.config.get("layer_replication"):
        raise UnsupportedError(
            f"{name}: layer_replication makes several layers share one weight, which one merged weight cannot hold. "
            "Untie the layers of the base first (write the replicated model out)."
        )
    if adapter.config.get("target_parameters"):
        raise UnsupportedError(
            f"{name}: target_parameters (stacked experts) are not placed by this version."
        )


def _dense(weights: BaseWeights) -> None:
    config = weights.checkpoint.config or {}
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedError(
            f"{weights.checkpoint.source}: the base is quantized ({method}); this version merges into fp32, fp16 and bf16 "
            "bases. Merge into the original and quantize the result."
        )


def _settings(relative_to: str, dtype: str, rounding: str, seed: int, verify: str) -> Settings:
    for value, known, name in (
        (relative_to, ("current", "base"), "relative_to"),
        (dtype, ("keep", *DTYPES), "dtype"),
        (rounding, ("nearest", "stochastic"), "rounding"),
        (verify, ("sample", "full"), "verify"),
    ):
        if value not in known:
            raise UsageError(
                f"{name} {value!r} is not known. Expected one of: {', '.join(known)}."
            )
    return Settings(relative_to, rounding, seed, DTYPES.get(dtype))


def _check_output(base: Checkpoint, dst: Path, overwrite: bool) -> None:
    folder = base.path.is_dir() or base.kind == "sharded"
    if dst.resolve() in {path.resolve() for path in (*base.files, base.path)}:
        raise UsageError(f"{dst}: is the base itself. Give another output path.")
    if dst.exists() and not overwrite:
        raise UsageError(f"{dst}: exists. Pass --overwrite to replace it.")
    if folder and dst.suffix in (".safetensors", ".sft"):
        raise UsageError(f"{dst}: the base is a folder of files; give a folder name.")
    if not folder and dst.is_dir():
        raise UsageError(f"{dst}: is a folder, and the base is one file; give a file name.")


@contextlib.contextmanager
def _staged(dst: Path, *, folder: bool) -> Iterator[Path]:
    """A path beside `dst` to write to and check; whatever is left there when the block ends is removed."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    staged = dst.with_name(f".{dst.stem}.{secrets.token_hex(6)}{dst.suffix}")
    try:
        if folder:
            staged.mkdir()
        yield staged
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        else:
            staged.unlink(missing_ok=True)


# writing ------------------------------------------------------------------------------------------


def _write(
    inputs: Inputs, settings: Settings, staged: Path, progress: Progress | None
) -> dict[str, Survival]:
    """Write every file of the base to `staged`; returns the survival of every touched tensor."""
    base = inputs.base.checkpoint
    files = _files(base)
    targets = {name: inputs.plan.targets[name] for name in inputs.plan.targets}
    orders = {
        path: _order(base, names, targets, settings) for path, names in files.items() if names
    }
    sequence = [targets[name] for order in orders.values() for name in order if name in targets]
    total = sum(t.tensor.nbytes for t in sequence)
    done = 0

    def advance(target: Target) -> None:
        nonlocal done
        done += target.tensor.nbytes
        if progress is not None:
            progress(done, total, target.name)

    root = base.path if base.path.is_dir() else base.path.parent
    with Pipeline(sequence, settings, advance) as pipeline:
        for path, names in files.items():
            place = staged if not staged.is_dir() else staged / path.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not any(name in targets for name in names) and settings.dtype is None:
                shutil.copyfile(path, place)
                continue
            tensors = {
                base[name].name: _value(base[name], targets.get(name), pipeline, settings)
                for name in orders[path]
            }
            save(place, tensors, _metadata(inputs, path, settings))
        survival = dict(pipeline.survival)
    if staged.is_dir():
        _side_files(base, root, staged, files, settings)
    return survival


def _files(base: Checkpoint) -> dict[Path, list[str]]:
    """Weight files of the base with the names of their tensors, by offset."""
    files: dict[Path, list[str]] = {path: [] for path in base.files}
    for name in base:
        files[base[name].path].append(name)
    for names in files.values():
        names.sort(key=lambda name: (base[name].file_range() or (0, 0))[0])
    return files


def _order(
    base: Checkpoint, names: Sequence[str], targets: Mapping[str, Target], settings: Settings
) -> list[str]:
    """The order in which `save` will ask for the tensors."""
    outlines = {name: _outline(base[name], targets.get(name), settings) for name in names}
    by_stored = {base[name].name: name for name in names}
    _, order = serialized_header({base[name].name: outlines[name] for name in names})
    return [by_stored[stored] for stored in order]


def _outline(tensor: LazyTensor, target: Target | None, settings: Settings) -> Deferred:
    shape = target.shape if target is not None else tuple(tensor.shape)
    return Deferred(_dtype(tensor, settings), shape, lambda: iter(()))


def _dtype(tensor: LazyTensor, settings: Settings) -> str:
    return settings.dtype if settings.dtype and tensor.dtype in DENSE else tensor.dtype


def _value(
    tensor: LazyTensor, target: Target | None, pipeline: Pipeline, settings: Settings
) -> LazyTensor | Deferred:
    if target is not None:
        name = target.name
        dtype = output_dtype(target, settings)
        return Deferred(dtype, target.shape, lambda: pipeline.chunks(name), (tensor.path,))
    dtype = _dtype(tensor, settings)
    if dtype == tensor.dtype:
        return tensor

    def cast() -> Iterator[torch.Tensor]:
        from peftsurgery.checkpoint.dtypes import torch_dtype

        yield tensor.torch().to(torch_dtype(dtype))

    return Deferred(dtype, tuple(tensor.shape), cast, (tensor.path,))


def _metadata(inputs: Inputs, path: Path, settings: Settings) -> dict[str, str]:
    base = inputs.base.checkpoint
    known = dict(base.metadata) if len(base.files) == 1 else {"format": "pt"}
    known["peftsurgery.operation"] = "merge"
    known["peftsurgery.version"] = __version__
    known["peftsurgery.adapters"] = " ".join(
        f"{Path(name).name}={strength}"
        for name, (_, strength) in zip(inputs.names, inputs.adapters, strict=True)
    )
    known["peftsurgery.options"] = (
        f"relative-to={settings.relative_to} rounding={settings.rounding}"
        + (f" seed={settings.seed}" if settings.rounding == "stochastic" else "")
    )
    return known


def _side_files(
    base: Checkpoint,
    root: Path,
    staged: Path,
    files: Mapping[Path, list[str]],
    settings: Settings,
) -> None:
    """Configs, tokenizers and the rest of a folder; the index with its total in bytes; dtype in config.json."""
    single = not base.path.is_dir()
    for source in sorted(root.rglob("*")):
        name = source.relative_to(root)
        if not source.is_file() or source in files or (staged / name).exists():
            continue
        if any(part.startswith(".") for part in name.parts) or _is_weights(source):
            continue
        if single and not source.name.endswith(".index.json"):
            continue
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        if source.name.endswith(".safetensors.index.json"):
            _rewrite_index(source, staged / name)
        else:
            shutil.copyfile(source, staged / name)


def _is_weights(path: Path) -> bool:
    """Weights in other formats would no longer match the merged ones."""
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


def _rewrite_index(source: Path, target: Path) -> None:
    index = json.loads(source.read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    total = 0
    for shard in shards:
        total += sum(t.nbytes for t in open_checkpoint(target.parent / shard).values())
    index.setdefault("metadata", {})["total_size"] = total
    target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_undo(undo: Path, others: Sequence[str], overwrite: bool) -> None:
    """Refuse an undo file that cannot be written, before the work is done."""
    if undo.resolve() in {Path(other).resolve() for other in others}:
        raise UsageError(f"--undo {undo}: is an input or the output of this merge; give another name.")
    if undo.exists() and not overwrite:
        raise UsageError(f"--undo {undo}: exists. Pass --overwrite to replace it.")
    if is_pickle_name(undo.name) or is_index(undo.name):
        raise UsageError(f"--undo {undo}: is a safetensors file; give it a name that says so.")
    if not undo.parent.is_dir():
        raise UsageError(f"--undo {undo}: the folder {undo.parent} does not exist; make it first.")


def _write_undo(
    inputs: Inputs, settings: Settings, staged: Path, path: Path, overwrite: bool
) -> tuple[Path, ...]:
    """Originals of all tensors that the written checkpoint does not hold as they were."""
    base = inputs.base.checkpoint
    written = open_checkpoint(_entry(base, staged))
    changed = [
        name
        for name, tensor in base.items()
        if name in inputs.plan.targets
        or name not in written
        or (written[name].dtype, tuple(written[name].shape)) != (tensor.dtype, tuple(tensor.shape))
    ]
    return write_undo(
        path, base, changed, merge_words(inputs, settings), merged=staged, overwrite=overwrite
    )


def merge_words(inputs: Inputs, settings: Settings, *, in_place: bool = False) -> Merge:
    """What an undo file says about the merge it undoes."""
    adapters = " ".join(
        f"{name}={strength}"
        for name, (_, strength) in zip(inputs.names, inputs.adapters, strict=True)
    )
    options = f"relative-to={settings.relative_to} rounding={settings.rounding} seed={settings.seed}"
    return Merge(identity(inputs.plan, settings), adapters, options, in_place)


# the proof ----------------------------------------------------------------------------------------


def _prove(inputs: Inputs, settings: Settings, staged: Path, *, full: bool) -> None:
    """Reopen what was written: touched tensors recomputed (a tile each, or all), the others compared with the base."""
    written = open_checkpoint(_entry(inputs.base.checkpoint, staged))
    problems = differences(inputs, settings, written, full=full)
    if problems:
        raise CheckFailed(
            f"the written checkpoint is not what was planned: {len(problems)} tensors differ, first {problems[0]}. "
            "Nothing was kept."
        )


def _entry(base: Checkpoint, staged: Path) -> Path:
    if staged.is_dir() and base.kind == "sharded":
        return staged / base.path.name
    return staged


def differences(
    inputs: Inputs, settings: Settings, written: Checkpoint, *, full: bool
) -> list[str]:
    """Names of tensors of `written` that are not what the merge gives, with the reason."""
    base, problems = inputs.base.checkpoint, []
    names = set(base) | set(written)
    for name in sorted(names):
        if name not in written or name not in base:
            problems.append(f"{name!r} (only in {'the result' if name in written else 'the base'})")
            continue
        target = inputs.plan.targets.get(name)
        if target is None:
            if not _equal(base[name], written[name], settings):
                problems.append(f"{name!r} (untouched, but its bytes changed)")
            continue
        rows = tile_that_differs(target, settings, written[name], full=full)
        if rows is not None:
            problems.append(f"{name!r} (rows {rows})")
    return problems


def tile_that_differs(
    target: Target, settings: Settings, found: LazyTensor, *, full: bool
) -> str | None:
    """The first rows of `found` that are not what the merge gives, of the middle tile or of all; None when there are none."""
    renderer = Renderer(target, settings)
    tiles = spans(target)
    for start, stop in tiles if full else [tiles[len(tiles) // 2]]:
        expected, _ = renderer.tile(start, stop)
        part = found.rows(start, stop) if found.shape else found
        if as_bytes(expected) != part.read():
            return f"{start}:{stop}"
    return None


def _equal(before: LazyTensor, after: LazyTensor, settings: Settings) -> bool:
    if tuple(before.shape) != tuple(after.shape):
        return False
    dtype = _dtype(before, settings)
    if dtype != after.dtype:
        return False
    if dtype != before.dtype:
        from peftsurgery.checkpoint.dtypes import torch_dtype

        return torch.equal(before.torch().to(torch_dtype(dtype)), after.torch())
    return before.read() == after.read()


# the report ---------------------------------------------------------------------------------------


def describe(report: MergeReport, inputs: Inputs, settings: Settings) -> None:
    """Fill in what is known before anything is computed."""
    base, plan = inputs.base.checkpoint, inputs.plan
    for adapter, _ in inputs.adapters:
        report.findings.extend(adapter.findings)
    order = " then ".join(
        f"{Path(n).name}={s}" for n, (_, s) in zip(inputs.names, inputs.adapters, strict=True)
    )
    if len(inputs.adapters) > 1:
        order += " (composed in this order)" if settings.relative_to == "current" else " (each relative to the base)"
    for index, prefix in plan.prefixes.items():
        report.findings.append(
            Finding("info", "prefix", f"paths of {inputs.names[index]} found under another prefix ({prefix!r})")
        )
    largest = max((t.columns * (t.shape[0] if t.shape else 1) for t in plan.targets.values()), default=0)
    adapters = sum(m.nbytes for a, _ in inputs.adapters for m in a.modules.values())
    report.summary.update(
        {
            "base": base.source,
            "adapters": order,
            "architecture": inputs.base.architecture.title,
            "modules": plan.modules,
            "tensors touched": len(plan.targets),
            "tensors untouched": len(base) - len(plan.targets),
            "bytes touched": plan.nbytes,
            "bytes": base.nbytes,
            "largest touched tensor (elements)": largest,
            "estimated peak memory bytes": 400_000_000 + adapters,
        }
    )


def plan_rows(plan: MergePlan, settings: Settings) -> list[dict[str, str | int | float | bool | None]]:
    return [
        {
            "tensor": target.name,
            "shape": "x".join(map(str, target.shape)),
            "dtype": output_dtype(target, settings),
            "edits": len(target.edits),
            "modules": ", ".join(dict.fromkeys(edit.path for edit in target.edits)),
        }
        for target in plan.targets.values()
    ]


def report_survival(
    report: MergeReport, survival: Mapping[str, Survival], minimum: float | None
) -> None:
    total = Survival()
    for name, item in survival.items():
        total.add(item)
        relative = (item.error / item.total) ** 0.5 if item.total > 0 else 0.0
        report.touched[name] = item.share
        report.modules.append(
            {
                "tensor": name,
                "norm of ΔW": item.total**0.5,
                "survival": item.share,
                "rounding error": relative,
            }
        )
    report.summary["survival of ΔW"] = total.share
    object.__setattr__(report, "survival", total.share)
    if minimum is not None and total.share < minimum:
        raise CheckFailed(
            f"only {total.share:.1%} of ΔW survives rounding, less than --min-survival {minimum:g}; nothing was kept. "
            "--dtype fp32 (or fp16) keeps it, --rounding stochastic keeps it on average."
        )
    if total.share < SURVIVAL_WARNING:
        report.findings.append(
            Finding(
                "warning", "low-survival",
                f"{total.share:.1%} of ΔW survives rounding to the stored dtype", None,
                "--dtype fp32 (or fp16) keeps it, --rounding stochastic keeps it on average",
            )
        )
