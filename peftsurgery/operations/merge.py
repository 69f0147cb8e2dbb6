"""merge: fold adapters into a base checkpoint, streamed, rounded once, and proved.

    save(W + delta), one row tile at a time

The base is never loaded: untouched tensors are copied as bytes, touched ones are computed tile by
tile while earlier tiles are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import (
    Checkpoint,
    LazyTensor,
    open_checkpoint,
)
from peftsurgery.checkpoint.folders import is_index
from peftsurgery.checkpoint.pickles import is_pickle_name
from peftsurgery.codec.files import publish
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.operations.apply import Settings, alternatives
from peftsurgery.operations.inputs import Inputs, open_inputs
from peftsurgery.operations.merge_proof import PACKED_AGAIN, differences
from peftsurgery.operations.merge_report import (
    MergeReport,
    describe,
    plan_rows,
    report_survival,
)
from peftsurgery.operations.merge_writing import Source, Written, check_container, write_merged
from peftsurgery.operations.repack import Repack
from peftsurgery.operations.requant import ROUNDINGS, Requant, parse, trained_on
from peftsurgery.operations.staging import staged_beside
from peftsurgery.operations.strengths import Strength
from peftsurgery.operations.undo import Merge
from peftsurgery.operations.undo_writing import check_undoable, identity, write_undo
from peftsurgery.quantizers import PackedCheckpoint, by_name, logical
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
    rounding: str = "auto",
    seed: int = 0,
    requant: str | Requant = "auto",
    gram: str | Path | None = None,
    qlora_base: str | None = None,
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
    residual_base: the base is the one PiSSA or OLoRA left. requant: what packed weights become, see
    `Requant`; rounding: "nearest", "stochastic", and for packed weights "subspace" (error feedback
    in the input directions of the change), "gptq" (with `gram`, a file of Gram matrices) or "auto",
    which predicts what survives and chooses for each weight. min_survival: None is 0.9 where packed
    weights are packed again, else no limit. qlora_base: what the adapters were trained on, see
    `requant.trained_on`. undo: a file that will hold the original
    bytes of the touched tensors, for `unmerge`. in_place: no `dst`; the touched tensors are
    overwritten in the base itself under a journal (see `merge_in_place`).

    Raises CheckFailed when a module does not land, when survival is below `min_survival` or when
    the written file is not what was planned; UsageError, UnsupportedError and UnsafeInputError as
    the readers do. Nothing is written then.
    """
    wanted = parse(requant) if isinstance(requant, str) else requant
    settings = _settings(relative_to, dtype, rounding, seed, verify, wanted)
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
        trained_on=by_name(format) if (format := trained_on(qlora_base, wanted)) else None,
    )
    checkpoint = inputs.base.checkpoint
    repack = Repack(inputs, settings, wanted, gram, min_survival)
    repack.check_trained_on(qlora_base)
    report = MergeReport("merge")
    if undo is not None:
        others = [str(base), *inputs.names, *([str(dst)] if dst else [])]
        _check_undo(Path(undo), others, overwrite or in_place)
        check_undoable(checkpoint)
    if dst is None:
        repack.refuse_in_place()
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
    check_container(checkpoint, dst, settings)
    describe(report, inputs, settings)
    repack.predict(report, dst, overwrite=overwrite)
    if dry_run:
        report.summary["written"] = "nothing (--dry-run)"
        report.tables["plan"] = plan_rows(inputs.plan, settings)
        return report
    folder = checkpoint.path.is_dir() or checkpoint.kind == "sharded"
    source = Source(
        checkpoint,
        inputs.plan.targets,
        _metadata(inputs, settings),
        inputs.config,
        inputs.restructured,
    )
    with staged_beside(dst, folder=folder) as staged:
        written = write_merged(
            source, settings, staged, repack.orders, lost=repack.lost, progress=progress
        )
        other_dtypes = partial(alternatives, repack.dense, settings)
        minimum = repack.minimum
        report_survival(report, repack.kept(written.survival), minimum, other_dtypes)
        _prove(inputs, settings, staged, repack, written, full=verify == "full")
        report.summary["check"] = (
            f"reopened: {len(written.survival)} touched tensors recomputed ({verify}"
            f"{_packed_words(written, full=verify == 'full')}), the others equal byte by byte"
        )
        if undo is not None:
            kept = _write_undo(inputs, settings, staged, Path(undo), overwrite)
            report.summary["undo file bytes"] = Path(undo).stat().st_size
            report.outputs.extend(str(path) for path in kept)
        report.outputs.extend(repack.write_residual(dst, overwrite=overwrite))
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    return report


def _settings(
    relative_to: str, dtype: str, rounding: str, seed: int, verify: str, requant: Requant
) -> Settings:
    for value, known, name in (
        (relative_to, ("current", "base"), "relative_to"),
        (dtype, ("keep", *DTYPES), "dtype"),
        (rounding, ROUNDINGS, "rounding"),
        (verify, ("sample", "full"), "verify"),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r} is not known. Expected one of: {', '.join(known)}.")
    packing = "same" if requant.packs else "dequant"
    return Settings(relative_to, rounding, seed, DTYPES.get(dtype), packing)


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


def _metadata(inputs: Inputs, settings: Settings) -> dict[str, str]:
    adapters = " ".join(
        f"{Path(name).name}={strength}"
        for name, (_, strength) in zip(inputs.names, inputs.adapters, strict=True)
    )
    options = f"relative-to={settings.relative_to} rounding={settings.rounding}"
    if settings.rounding == "stochastic":
        options += f" seed={settings.seed}"
    return {
        "peftsurgery.operation": "merge",
        "peftsurgery.adapters": adapters,
        "peftsurgery.options": options,
    }


# undo ------------------------------------------------------------------------------------------


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
    written = reopened(seen, staged)
    base = open_checkpoint(seen.path) if inputs.restructured else seen
    parts: dict[str, str] = {}  # of packed weights -> the weight
    if isinstance(seen, PackedCheckpoint):
        base = open_checkpoint(seen.path)
        parts = {o.name: name for name, p in seen.packed.items() for o in p.outlines.values()}
    changed = [
        name
        for name, tensor in base.items()
        if parts.get(name, name) in inputs.plan.targets
        or name not in written
        or (name in seen and name not in parts and _span(seen[name]) != _span(tensor))
        or (written[name].dtype, tuple(written[name].shape)) != (tensor.dtype, tuple(tensor.shape))
    ]
    return write_undo(
        path, base, changed, merge_words(inputs, settings), merged=staged, overwrite=overwrite
    )


def _span(tensor: LazyTensor) -> tuple[Path, tuple[int, int] | None]:
    return tensor.path, tensor.file_range()


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


def _packed_words(written: Written, *, full: bool) -> str:
    """How the packed ones of the touched tensors were checked."""
    count = len({name for name, _ in written.digests})
    if not count or full:
        return ""
    return f"; one in {PACKED_AGAIN} of the {count} packed ones, all by their SHA-256"


def _prove(
    inputs: Inputs,
    settings: Settings,
    staged: Path,
    repack: Repack,
    written: Written,
    *,
    full: bool,
) -> None:
    """Reopen what was written: touched tensors recomputed (a tile each, or all), the others
    compared with the base.
    """
    found = reopened(inputs.base.checkpoint, staged)
    if settings.requant == "same":
        found = logical(found)
    problems = differences(
        inputs.base.checkpoint,
        inputs.plan.targets,
        settings,
        found,
        full=full,
        orders=repack.orders,
        digests=written.digests,
    )
    if problems:
        raise CheckFailed(
            f"the written checkpoint is not what was planned: {len(problems)} tensors differ, "
            f"first {problems[0]}. "
            "Nothing was kept."
        )


def reopened(base: Checkpoint, staged: Path) -> Checkpoint:
    """What was written to `staged` in the form of `base`, opened as that was."""
    lone = staged.is_dir() and base.kind == "sharded"
    return open_checkpoint(staged / base.path.name if lone else staged)
