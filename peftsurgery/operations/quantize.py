"""quantize and dequantize: plain weights packed, packed weights plain, streamed and proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery import __version__
from peftsurgery.checkpoint import Checkpoint, Deferred, LazyTensor, open_checkpoint, save
from peftsurgery.checkpoint.writing import Joint
from peftsurgery.codec.files import publish
from peftsurgery.errors import CheckFailed, Finding, UsageError
from peftsurgery.operations.ahead import Ahead
from peftsurgery.operations.apply import TILE, Settings
from peftsurgery.operations.grams import Grams
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.merge import DTYPES, check_output, reopened
from peftsurgery.operations.merge_proof import altered_part, differences, same_bytes
from peftsurgery.operations.merge_writing import Source, write_merged
from peftsurgery.operations.repacking import Digests, digests
from peftsurgery.operations.rounding import generator
from peftsurgery.operations.side_files import copy_side_files
from peftsurgery.operations.staging import staged_beside
from peftsurgery.quantizers import Grid, Packed, PackedTensor, Rounding, by_name, logical, nearest
from peftsurgery.quantizers.grids import pieces
from peftsurgery.quantizers.packable import LEFT_OUT, matrices_of, named
from peftsurgery.quantizers.rounding import feedback, feedback_factor, stochastic
from peftsurgery.reports import Progress, Report
from peftsurgery.reports.base import Row

ROUNDINGS = ("nearest", "stochastic", "gptq")


@dataclass(frozen=True)
class QuantizeReport(Report):
    """Report of packing; `loss` is ‖packed - W‖ / ‖W‖ over all packed weights."""

    loss: float = 0.0
    packed: dict[str, float] = field(default_factory=dict)  # weight -> its loss


@dataclass(frozen=True)
class Packing:
    """One weight as it will be stored, and the squares of its error and of itself."""

    parts: dict[str, Tensor]
    error: float
    total: float


def quantize(
    base: str | Path,
    dst: str | Path,
    *,
    format: str,
    options: Mapping[str, object] | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rounding: str = "nearest",
    gram: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Pack the matrices of `base` in `format` and write the result to `dst`, with the config that
    loaders need.

    options: of the format, such as block, nested, bits or group. only, exclude: patterns of tensor
    names; by default embeddings and the head stay plain, as loaders expect. rounding: "nearest",
    "stochastic" or "gptq" (with `gram`, a file of Gram matrices of the modules' inputs).

    Raises UsageError for a base that is packed already, for a pattern that names nothing, NaN or
    infinity; UnsupportedError for a weight of a shape the format does not have; CheckFailed when
    the written file is not what was made. Nothing is written then.
    """
    checkpoint = open_checkpoint(base, allow_pickle=allow_pickle)
    refuse_pending(checkpoint)
    if logical(checkpoint) is not checkpoint:
        raise UsageError(f"{checkpoint.source}: holds packed weights already; dequantize it first.")
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding {rounding!r}: expected one of {', '.join(ROUNDINGS)}.")
    if (gram is not None) != (rounding == "gptq"):
        raise UsageError("--gram and --rounding gptq go together.")
    dst = Path(dst)
    check_output(checkpoint, dst, overwrite)
    chosen = _chosen(checkpoint, only, exclude)
    fmt, given = by_name(format), dict(options or {})
    jobs = {
        name: fmt.fresh(name, tuple(tensor.shape), tensor.dtype, **given)
        for name, tensor in chosen.items()
    }
    grams = Grams(gram) if gram is not None else None
    rules = {name: _rule(rounding, name, grams, seed) for name in jobs}
    report = QuantizeReport("quantize")
    _describe(report, checkpoint, jobs, fmt.title)
    if dry_run:
        report.summary["written"] = "nothing (--dry-run)"
        report.tables["plan"] = [_planned(item) for item in jobs.values()]
        return report
    config = _config(checkpoint, fmt.config(**given, skip=_skipped(checkpoint, jobs)))
    if config is None and checkpoint.path.is_dir() and fmt.config(**given) is not None:
        message = "there is no config.json to say how the weights are packed"
        report.findings.append(Finding("warning", "no-config", message))
    total = sum(tensor.nbytes for tensor in chosen.values())
    made: Digests = {}
    results: dict[str, Packing] = {}

    def take(name: str) -> dict[str, Tensor]:
        result = ahead.take(name)
        results[name] = Packing({}, result.error, result.total)
        made.update(digests(name, result.parts))
        if progress is not None:
            progress(sum(chosen[n].nbytes for n in results), total, name)
        own = {role: _own(outline.name) for role, outline in jobs[name].outlines.items()}
        return {own[role]: part for role, part in result.parts.items()}

    folder = checkpoint.path.is_dir() or checkpoint.kind == "sharded"
    with (
        staged_beside(dst, folder=folder) as staged,
        Ahead(list(jobs), lambda name: _packing(jobs[name], chosen[name], rules[name])) as ahead,
    ):
        joints = {name: Joint(partial(take, name)) for name in jobs}
        for path, names in _files(checkpoint).items():
            tensors: dict[str, LazyTensor | Deferred | Tensor] = {}
            for name in names:
                if name in jobs:
                    tensors |= _deferred(jobs[name], checkpoint[name], joints[name])
                else:
                    tensors[checkpoint[name].name] = checkpoint[name]
            here = [jobs[name] for name in names if name in jobs]
            tensors |= {_own(name): mark for name, mark in fmt.markers(here).items()}
            near = [n for n, t in checkpoint.items() if t.path.parent == path.parent]
            whole = [jobs[name] for name in near if name in jobs]  # loaders take the last shard's
            others = [_own(name) for name in near if name not in jobs]
            about = {**_metadata(checkpoint, fmt.name), **fmt.metadata(whole, others)}
            save(_place(checkpoint, staged, path), tensors, about)
        if staged.is_dir():
            copy_side_files(checkpoint, staged, config=config)
        _prove(checkpoint, jobs, staged, made)
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    _account(report, jobs, results)
    return report


def dequantize(
    base: str | Path,
    dst: str | Path,
    *,
    dtype: str = "keep",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write `base` with every packed weight plain: in the dtype it was packed from ("keep"), or all
    floating-point weights in `dtype`. What configs say of packing is taken out.

    Raises UsageError when nothing is packed, CheckFailed when a value does not fit the dtype or the
    written file is not what was planned.
    """
    if dtype != "keep" and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected keep, {', '.join(DTYPES)}.")
    seen = logical(open_checkpoint(base))
    refuse_pending(seen)
    packed = {n: t.packed for n, t in seen.items() if isinstance(t, PackedTensor)}
    if not packed:
        raise UsageError(f"{seen.source}: no weight is packed in a known format.")
    dst = Path(dst)
    check_output(seen, dst, overwrite)
    settings = Settings(dtype=DTYPES.get(dtype), requant="dequant")
    report = Report("dequantize")
    report.summary["base"] = seen.source
    report.summary["weights unpacked"] = len(packed)
    report.summary["formats"] = ", ".join(dict.fromkeys(p.format.title for p in packed.values()))
    if dry_run:
        report.summary["written"] = "nothing (--dry-run)"
        report.tables["plan"] = [_planned(item) for item in packed.values()]
        return report
    source = Source(seen, {}, {"peftsurgery.operation": "dequantize"})
    with staged_beside(dst, folder=seen.path.is_dir() or seen.kind == "sharded") as staged:
        write_merged(source, settings, staged, {}, progress=progress)
        problems = differences(seen, {}, settings, reopened(seen, staged), full=True)
        _check(problems)
        report.summary["check"] = "reopened: every tensor equal to the packed one, rounded once"
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    return report


# what is packed -----------------------------------------------------------------------------------


def _chosen(
    checkpoint: Checkpoint, only: Sequence[str], exclude: Sequence[str]
) -> dict[str, LazyTensor]:
    """The matrices to pack: those that `only` names, or all but embeddings and head; without those
    that `exclude` names. Raises UsageError for a pattern that names nothing, and when nothing is
    left.
    """
    matrices = matrices_of(checkpoint)
    for pattern in (*only, *exclude):
        if not any(named(name, [pattern]) for name in matrices):
            raise UsageError(f"{checkpoint.source}: no matrix has a name like {pattern!r}.")
    chosen = {
        name: tensor
        for name, tensor in matrices.items()
        if (named(name, only) if only else not named(name, LEFT_OUT)) and not named(name, exclude)
    }
    if not chosen:
        raise UsageError(f"{checkpoint.source}: there is no matrix to pack.")
    return chosen


def _skipped(checkpoint: Checkpoint, jobs: Mapping[str, Packed]) -> list[str] | None:
    """Modules with a matrix that stays plain, for the config; None when the loaders' own rule says
    the same.
    """
    left = [
        name.removesuffix(".weight")
        for name, tensor in checkpoint.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and name not in jobs
    ]
    return None if all(named(name, LEFT_OUT) for name in left) else left


def _config(
    checkpoint: Checkpoint, quantization: dict[str, object] | None
) -> dict[str, object] | None:
    if checkpoint.config is None or quantization is None:
        return None
    return {**checkpoint.config, "quantization_config": quantization}


def _rule(rounding: str, name: str, grams: Grams | None, seed: int) -> Rounding:
    if rounding != "gptq" or grams is None:
        return partial(_randomly, seed=seed, name=name) if rounding == "stochastic" else nearest
    read = grams.of(name.removesuffix(".weight"))
    if read is None:
        raise UsageError(f"--gram: there is no Gram matrix for {name!r}.")

    held: list[Tensor] = []  # of one weight at a time: its chunks come one after another

    def rule(weight: Tensor, grid: Grid, previous: Tensor | None) -> Tensor:
        if not held:
            gram = read()
            held.append(feedback_factor(gram if gram.ndim == 2 else gram.diag()))
        return feedback(weight, grid, held[0])

    return rule


def _randomly(
    weight: Tensor, grid: Grid, previous: Tensor | None, *, seed: int, name: str
) -> Tensor:
    return stochastic(weight, grid, generator(seed, name, 0))


def _packing(packed: Packed, tensor: LazyTensor, rule: Rounding) -> Packing:
    """Pack one weight, by chunks of rows once its scales are known, and measure the loss."""
    weight = tensor.torch().float()
    error = total = 0.0

    def rounding(matrix: Tensor, grid: Grid, previous: Tensor | None) -> Tensor:
        nonlocal error, total
        codes = torch.empty(matrix.shape, dtype=grid.book.dtype)
        for start, stop in pieces(len(matrix), matrix.shape[1], TILE):
            rows, part = matrix[start:stop], grid.rows(start, stop)
            codes[start:stop] = chosen = rule(rows, part, None)
            error += float((part.values(chosen) - rows).square().sum())
            total += float(rows.square().sum())
        return codes

    parts = packed.format.quantize(packed, weight, rounding)
    return Packing(parts, error, total)


# writing ------------------------------------------------------------------------------------------


def _files(checkpoint: Checkpoint) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {path: [] for path in checkpoint.files}
    for name, tensor in checkpoint.items():
        files[tensor.path].append(name)
    return files


def _place(checkpoint: Checkpoint, staged: Path, path: Path) -> Path:
    if not staged.is_dir():
        return staged
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    place = staged / path.relative_to(root)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _deferred(packed: Packed, tensor: LazyTensor, joint: Joint) -> dict[str, Deferred]:
    found: dict[str, Deferred] = {}
    for outline in packed.outlines.values():
        name = _own(outline.name)

        def chunks(name: str = name) -> list[object]:
            return [joint.take(name)]

        found[name] = Deferred(outline.dtype, outline.shape, chunks, (tensor.path,), joint)  # pyright: ignore[reportArgumentType]
    return found


def _own(name: str) -> str:
    return name.rpartition(":")[2]


def _metadata(checkpoint: Checkpoint, format: str) -> dict[str, str]:
    known = dict(checkpoint.metadata) if len(checkpoint.files) == 1 else {"format": "pt"}
    known["peftsurgery.operation"] = "quantize"
    known["peftsurgery.options"] = f"format={format}"
    known["peftsurgery.version"] = __version__
    return known


def _prove(checkpoint: Checkpoint, jobs: Mapping[str, Packed], staged: Path, made: Digests) -> None:
    """Reopen: every packed weight is recognised, its parts are those that were made, and all other
    tensors have their bytes.
    """
    found = logical(reopened(checkpoint, staged))
    problems: list[str] = []
    for name, tensor in checkpoint.items():
        written = found.get(name)
        if written is None:
            problems.append(f"{name!r} (missing)")
        elif name not in jobs:
            if not same_bytes(tensor, written):
                problems.append(f"{name!r} (untouched, but its bytes changed)")
        elif not isinstance(written, PackedTensor) or written.shape != tuple(tensor.shape):
            problems.append(f"{name!r} (not recognised as {jobs[name].format.title})")
        elif (role := altered_part(name, written, made)) is not None:
            problems.append(f"{name!r} (its {role} is not what was made)")
    _check(problems)


def _check(problems: Sequence[str]) -> None:
    if problems:
        raise CheckFailed(
            f"the written checkpoint is not what was planned: {len(problems)} tensors differ, "
            f"first {problems[0]}. Nothing was kept."
        )


# the report ---------------------------------------------------------------------------------------


def _describe(
    report: QuantizeReport, checkpoint: Checkpoint, jobs: Mapping[str, Packed], title: str
) -> None:
    report.summary.update(
        {
            "base": checkpoint.source,
            "format": title,
            "weights packed": len(jobs),
            "tensors left as they are": len(checkpoint) - len(jobs),
            "bytes": checkpoint.nbytes,
        }
    )


def _planned(packed: Packed) -> Row:
    return {
        "tensor": packed.name,
        "shape": "x".join(map(str, packed.shape)),
        "format": packed.format.name,
        "parts": ", ".join(f"{o.name} {o.dtype}" for o in packed.outlines.values()),
    }


def _account(
    report: QuantizeReport, jobs: Mapping[str, Packed], results: Mapping[str, Packing]
) -> None:
    for name, packed in jobs.items():
        result = results[name]
        loss = (result.error / result.total) ** 0.5 if result.total > 0 else 0.0
        report.packed[name] = loss
        shape = "x".join(map(str, packed.shape))
        report.modules.append({"tensor": name, "shape": shape, "relative error": loss})
    total = sum(result.total for result in results.values())
    error = sum(result.error for result in results.values())
    loss = (error / total) ** 0.5 if total > 0 else 0.0
    object.__setattr__(report, "loss", loss)
    report.summary["relative error"] = loss
    report.summary["check"] = "reopened: every packed weight recognised, all bytes as made"
