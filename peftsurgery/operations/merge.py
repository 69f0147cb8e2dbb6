"""merge: fold adapters into a base checkpoint, streamed, rounded once, and proved.

    save(W + delta), one row tile at a time

The base is never loaded: untouched tensors are copied as bytes, touched ones are computed tile by
tile while earlier tiles are written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from peftsurgery import __version__
from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import (
    Checkpoint,
    Deferred,
    LazyTensor,
    open_checkpoint,
    save,
    serialized_header,
)
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.checkpoint.folders import is_index
from peftsurgery.checkpoint.pickles import is_pickle_name
from peftsurgery.codec.files import publish
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.operations.apply import (
    TILE,
    Settings,
    Survival,
    alternatives,
    output_dtype,
)
from peftsurgery.operations.inputs import Inputs, open_inputs
from peftsurgery.operations.merge_proof import differences, written_dtype
from peftsurgery.operations.merge_report import (
    MergeReport,
    describe,
    plan_rows,
    report_survival,
)
from peftsurgery.operations.pipeline import Pipeline
from peftsurgery.operations.plan import Target
from peftsurgery.operations.side_files import copy_side_files
from peftsurgery.operations.staging import staged_beside
from peftsurgery.operations.strengths import Strength
from peftsurgery.operations.undo import Merge
from peftsurgery.operations.undo_writing import check_undoable, identity, write_undo
from peftsurgery.reports import Progress

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


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
    tied: str = "error",
    residual_base: bool = False,
    undo: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Fold `adapters` (source, strength) into `base` in the order given and write the result to
    `dst`.

    relative_to: "current" composes in order, "base" adds every adapter's change of the base itself.
    verify: "sample" recomputes one tile of every touched tensor from the written file, "full" all
    of them; untouched tensors are always compared byte by byte. tied: what to do when an adapter
    changes one side of an embedding that is also the output head: "both", "untie" or "error".
    residual_base: the base is the one PiSSA or OLoRA left. undo: a file that will hold the original
    bytes of the touched tensors, for `unmerge`. in_place: no `dst`; the touched tensors are
    overwritten in the base itself under a journal (see `merge_in_place`).

    Raises CheckFailed when a module does not land, when survival is below `min_survival` or when
    the written file is not what was planned; UsageError, UnsupportedError and UnsafeInputError as
    the readers do. Nothing is written then.
    """
    settings = _settings(relative_to, dtype, rounding, seed, verify)
    if in_place == (dst is not None):
        raise UsageError(
            "a merge is written either to an output (-o DST) or --in-place; give one of the two."
        )
    inputs = open_inputs(
        base,
        adapters,
        architecture=architecture,
        tied_weights=tied,
        residual_base=residual_base,
        allow_pickle=allow_pickle,
        unfinished=in_place,
    )
    checkpoint = inputs.base.checkpoint
    report = MergeReport("merge")
    if undo is not None:
        others = [str(base), *inputs.names, *([str(dst)] if dst else [])]
        _check_undo(Path(undo), others, overwrite or in_place)
        check_undoable(checkpoint)
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
    check_output(checkpoint, dst, overwrite)
    describe(report, inputs, settings)
    if dry_run:
        report.summary["written"] = "nothing (--dry-run)"
        report.tables["plan"] = plan_rows(inputs.plan, settings)
        return report
    folder = checkpoint.path.is_dir() or checkpoint.kind == "sharded"
    with staged_beside(dst, folder=folder) as staged:
        survival = _write(inputs, settings, staged, progress)
        other_dtypes = partial(alternatives, inputs.plan.targets.values(), settings)
        report_survival(report, survival, min_survival, other_dtypes)
        _prove(inputs, settings, staged, full=verify == "full")
        report.summary["check"] = (
            f"reopened: {len(survival)} touched tensors recomputed ({verify}), the others equal "
            "byte by byte"
        )
        if undo is not None:
            kept = _write_undo(inputs, settings, staged, Path(undo), overwrite)
            report.summary["undo file bytes"] = Path(undo).stat().st_size
            report.outputs.extend(str(path) for path in kept)
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    return report


def _settings(relative_to: str, dtype: str, rounding: str, seed: int, verify: str) -> Settings:
    for value, known, name in (
        (relative_to, ("current", "base"), "relative_to"),
        (dtype, ("keep", *DTYPES), "dtype"),
        (rounding, ("nearest", "stochastic"), "rounding"),
        (verify, ("sample", "full"), "verify"),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r} is not known. Expected one of: {', '.join(known)}.")
    return Settings(relative_to, rounding, seed, DTYPES.get(dtype))


def check_output(base: Checkpoint, dst: Path, overwrite: bool) -> None:
    """Refuse an output that exists, is an input, or is a file where a folder is to be written and
    the reverse.
    """
    folder = base.path.is_dir() or base.kind == "sharded"
    if dst.resolve() in {path.resolve() for path in (*base.files, base.path)}:
        raise UsageError(f"{dst}: is the base itself. Give another output path.")
    if dst.exists() and not overwrite:
        raise UsageError(f"{dst}: exists. Pass --overwrite to replace it.")
    if folder and dst.suffix in (".safetensors", ".sft"):
        raise UsageError(f"{dst}: the base is a folder of files; give a folder name.")
    if not folder and dst.is_dir():
        raise UsageError(f"{dst}: is a folder, and the base is one file; give a file name.")


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
            if _as_it_is(inputs, names, settings):
                shutil.copyfile(path, place)
                continue
            tensors = {
                base[name].name: _value(base[name], targets.get(name), pipeline, settings)
                for name in orders[path]
            }
            save(place, tensors, _metadata(inputs, path, settings))
        survival = dict(pipeline.survival)
    if staged.is_dir():
        copy_side_files(base, staged, config=inputs.config, dtype=settings.dtype)
    return survival


def _as_it_is(inputs: Inputs, names: Sequence[str], settings: Settings) -> bool:
    """Whether a file of the base is to be copied byte for byte."""
    touched = any(name in inputs.plan.targets for name in names)
    return not (touched or inputs.restructured or settings.dtype)


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
    return Deferred(written_dtype(tensor, settings), shape, lambda: iter(()))


def _value(
    tensor: LazyTensor, target: Target | None, pipeline: Pipeline, settings: Settings
) -> LazyTensor | Deferred:
    if target is not None:
        name = target.name
        dtype = output_dtype(target, settings)
        return Deferred(dtype, target.shape, lambda: pipeline.chunks(name), (tensor.path,))
    dtype = written_dtype(tensor, settings)
    if dtype == tensor.dtype:
        return tensor

    return Deferred(dtype, tuple(tensor.shape), lambda: cast(tensor, dtype), (tensor.path,))


def cast(tensor: LazyTensor, dtype: str) -> Iterator[torch.Tensor]:
    """A tensor that no adapter touches in another dtype, in pieces. Raises CheckFailed when a value
    does not fit.
    """
    flat = tensor.torch().reshape(-1)
    for start in range(0, flat.numel(), TILE):
        piece = flat[start : start + TILE]
        result = piece.to(torch_dtype(dtype))
        if not torch.equal(torch.isfinite(result), torch.isfinite(piece)):
            raise CheckFailed(
                f"{tensor.name!r}: a value of {float(piece.abs().max()):g} does not fit {dtype}; "
                "nothing was kept. Write "
                "--dtype bf16 or fp32."
            )
        yield result


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


def _check_undo(undo: Path, others: Sequence[str], overwrite: bool) -> None:
    """Refuse an undo file that cannot be written, before the work is done."""
    if undo.resolve() in {Path(other).resolve() for other in others}:
        raise UsageError(
            f"--undo {undo}: is an input or the output of this merge; give another name."
        )
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
    seen = inputs.base.checkpoint
    written = open_checkpoint(_entry(seen, staged))
    base = open_checkpoint(seen.path) if inputs.restructured else seen
    changed = [
        name
        for name, tensor in base.items()
        if name in inputs.plan.targets
        or name not in written
        or (seen[name].path, seen[name].file_range()) != (tensor.path, tensor.file_range())
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
    options = (
        f"relative-to={settings.relative_to} rounding={settings.rounding} seed={settings.seed}"
    )
    return Merge(identity(inputs.plan, settings), adapters, options, in_place)


# the proof ----------------------------------------------------------------------------------------


def _prove(inputs: Inputs, settings: Settings, staged: Path, *, full: bool) -> None:
    """Reopen what was written: touched tensors recomputed (a tile each, or all), the others
    compared with the base.
    """
    written = open_checkpoint(_entry(inputs.base.checkpoint, staged))
    problems = differences(inputs, settings, written, full=full)
    if problems:
        raise CheckFailed(
            f"the written checkpoint is not what was planned: {len(problems)} tensors differ, "
            f"first {problems[0]}. "
            "Nothing was kept."
        )


def _entry(base: Checkpoint, staged: Path) -> Path:
    if staged.is_dir() and base.kind == "sharded":
        return staged / base.path.name
    return staged
