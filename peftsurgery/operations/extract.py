"""extract: what a fine-tune changed, as an adapter: fit(TUNED - BASE), proved on the written file.

Both checkpoints are read tile by tile; what comes out is read back and measured against TUNED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftsurgery import architectures
from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from peftsurgery.codec import BaseWeights
from peftsurgery.errors import CheckFailed, Finding, UsageError
from peftsurgery.layouts import layout_named
from peftsurgery.linalg import RankRule
from peftsurgery.operations.changes import Changes, Selection, changes_between, family_of_both
from peftsurgery.operations.extract_proof import Fidelity, measured
from peftsurgery.operations.inputs import OPEN
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.lineage import Hashing
from peftsurgery.operations.packed_sides import format_of, quantization_in_it, unpacked
from peftsurgery.operations.projecting import (
    ALGORITHMS,
    Job,
    Projected,
    Projection,
    Wanted,
    check_algorithm,
    jobs,
)
from peftsurgery.operations.staging import workers
from peftsurgery.operations.writing_adapter import (
    DTYPES,
    Origin,
    check_choice,
    check_dtype,
    check_layout,
    check_target,
    collector_paused,
    encode_as,
    plan,
    summarise,
    write_proved,
)
from peftsurgery.quantizers import logical
from peftsurgery.reports import Progress, Report
from peftsurgery.reports.base import Row

REMEDY = (
    "--to comfy, diffusers or peft holds other kinds of change; --exclude PATTERN leaves it out on "
    "request"
)


@dataclass(frozen=True)
class ExtractReport(Report):
    """Report of an extraction; `energy` is the share of ||TUNED - BASE||² that the adapter holds,
    `loss` the relative error ||TUNED - BASE - ΔW|| / ||TUNED - BASE||, both over all tensors.
    """

    energy: float = 1.0
    loss: float = 0.0


@collector_paused()
def extract(
    tuned: str | Path,
    base: str | Path,
    dst: str | Path,
    *,
    rank: str | int | None = None,
    algorithm: str = "lora",
    to: str | None = None,
    architecture: str | None = None,
    factor: int | None = -1,
    only: Sequence[str] = (),
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str = "keep",
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write `dst`, the adapter that turns BASE into TUNED as far as its rank allows.

    algorithm: "lora" (`rank`: a rule, of each weight's own spectrum), "lokr" (`rank`, if any, of
    the second factor; `factor` cuts the sides as LyCORIS does, None chooses the most exact cut of
    each weight with as many numbers, which takes a dozen times as long), "full" (exact). to: the
    layout; None is peft for language models and kohya for the rest. only: components; targets,
    exclude: patterns of module paths. dtype: of the factors, "keep" that of TUNED, of a packed
    TUNED the one its weights are computed in. Packed weights of either side are compared as what
    they stand for; those with the same bytes on both sides are not even unpacked. See `peftsurgery
    extract --help`.

    Raises CheckFailed when nothing differs, when a tensor holds NaN or Inf, or when the written
    file is not what was computed; UnsupportedError naming what the layout cannot hold. Nothing is
    written then.
    """
    if to is not None:
        check_layout(to)
    check_choice(algorithm, ALGORITHMS, "algorithm")
    check_dtype(dtype)
    if rank is None and algorithm == "lora":
        raise UsageError("--algorithm lora needs --rank, for example 32 or max:64,energy:0.99.")
    if rank is not None and algorithm == "full":
        raise UsageError("--algorithm full is exact and has no rank; leave --rank out.")
    rule = None if rank is None else RankRule.parse(rank)
    dst = Path(dst)
    sides = [logical(open_checkpoint(side, allow_pickle=allow_pickle)) for side in (tuned, base)]
    for side in sides:
        refuse_pending(side)
    name = architecture or family_of_both(sides[0], sides[1])
    to = to or ("peft" if name in OPEN else "kohya")
    check_target(sides, dst, to=to, overwrite=overwrite)
    weights = [BaseWeights(side, architectures.get(name)) for side in sides]
    kind = None if dtype == "keep" else DTYPES[dtype]
    wanted = Wanted(layout_named(to), algorithm, rule, factor, kind, seed)
    check_algorithm(wanted)
    selection = Selection(tuple(only), tuple(targets), tuple(exclude))
    hashing = [Hashing(side, enabled=not dry_run) for side in sides]
    changes = changes_between(
        weights[0], weights[1], selection, compare=not dry_run, progress=progress
    )
    report = ExtractReport("extract")
    _account(report, changes)
    _unpacking(report, changes, sides, compared=not dry_run)
    found = jobs(changes.modules, changes.tied, weights[1], wanted.layout)
    if not found:
        raise CheckFailed(
            f"{sides[0].source}: nothing differs from {sides[1].source}: {changes.compared} "
            f"tensors were compared and {len(changes.left_out)} left out on request."
        )
    projection = Projection(wanted, weights[1], changes.modules.values())
    outline = _adapter([projection.planned(job) for job in found], weights[1], base)
    if dry_run:
        return _planned(report, changes, outline, to)
    encode_as(
        outline, to, remedy=REMEDY
    )  # what the layout cannot hold is refused before the work, not after
    projected = _projected(projection, found, sides, progress)
    adapter = _adapter(projected, weights[1], base)
    encoded = encode_as(adapter, to, remedy=REMEDY)
    report.findings.extend([*adapter.findings, *encoded.findings])
    summarise(report, adapter, encoded, to=to)
    for side in hashing:
        report.inputs.update(side.result())
    options = {"to": to, "algorithm": algorithm, "rank": str(rule) if rule else None}
    options |= {"dtype": None if dtype == "keep" else dtype}
    cut = "auto" if factor is None else str(factor)
    options |= {"factor": cut if algorithm == "lokr" else None}

    def check(staged: Path) -> None:
        fidelity = measured(staged, adapter, found, projected, sides, progress)
        _fill(report, fidelity)

    write_proved(
        encoded,
        adapter,
        dst,
        to=to,
        report=report,
        origin=Origin("extract", options, report.inputs),
        overwrite=overwrite,
        check=check,
        progress=progress,
    )
    return report


def _adapter(projected: Sequence[Projected], base: BaseWeights, name: str | Path) -> Adapter:
    modules = {path: module for p in projected for path, module in p.modules.items()}
    config: dict[str, object] = {"base_model_name_or_path": str(name)}
    if base.architecture.name == "llm" and _generates(base.checkpoint):
        config["task_type"] = "CAUSAL_LM"
    return Adapter(modules, base.architecture.name, config=config)


def _generates(checkpoint: Checkpoint) -> bool:
    names = (checkpoint.config or {}).get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)


def _projected(
    projection: Projection,
    found: Sequence[Job],
    sides: Sequence[Checkpoint],
    progress: Progress | None,
) -> list[Projected]:
    def project(job: Job) -> Projected:
        result = projection.computed(job)
        for side in sides:
            side.release()
        return result

    results: list[Projected] = []
    with workers(2) as threads:
        for job, result in zip(found, threads.map(project, found), strict=True):
            results.append(result)
            if progress is not None:
                progress(len(results), len(found), job.path)
    return results


# the report ---------------------------------------------------------------------------------------


def _account(report: ExtractReport, changes: Changes) -> None:
    report.summary["tensors compared"] = changes.compared
    report.summary["unchanged"] = changes.unchanged
    report.summary["left out on request"] = len(changes.left_out)
    report.findings.extend(changes.findings)
    for embedding, head in changes.tied.items():
        if embedding in changes.modules:
            message = f"{head} is tied to it and gets the same change"
            report.findings.append(Finding("info", "tied", message, embedding))
    for change in changes.modules.values():
        for difference in change.differing.values():
            if difference.grown:
                shapes = f"{list(difference.base.shape)} to {list(difference.tuned.shape)}"
                message = f"its shape changes from {shapes}: written as a new value"
                report.findings.append(Finding("info", "new-shape", message, difference.name))


def _unpacking(
    report: ExtractReport, changes: Changes, sides: Sequence[Checkpoint], *, compared: bool
) -> None:
    """What is unpacked, and what packing leaves in the difference; where nothing was compared, only
    what it leaves in every pair.
    """
    for name, side in zip(("TUNED", "BASE"), sides, strict=True):
        what = unpacked(side)
        if what is not None:
            report.summary[f"unpacked of {name}"] = what
    differing = [d for change in changes.modules.values() for d in change.differing.values()]
    pairs = ((d.name, d.tuned.tensor, d.base.tensor) for d in differing)
    found = quantization_in_it(pairs)
    report.findings.extend(f for f in found if compared or f.level == "warning")


def _planned(report: ExtractReport, changes: Changes, outline: Adapter, to: str) -> ExtractReport:
    encoded = encode_as(outline, to, remedy=REMEDY)
    summarise(report, outline, encoded, to=to)
    plan(report, encoded)
    rows: list[Row] = []
    for change in changes.modules.values():
        for difference in change.differing.values():
            rows.append(
                {
                    "tensor": difference.name,
                    "shape": "x".join(map(str, difference.shape)),
                    "in TUNED": f"{difference.tuned.name} ({_kind(difference.tuned.tensor)})",
                    "in BASE": f"{difference.base.name} ({_kind(difference.base.tensor)})",
                }
            )
    report.tables["pairs"] = rows
    message = "values are not read: every pair is counted as differing, ranks are the largest"
    report.findings.append(Finding("info", "not-compared", message))
    report.summary["written"] = "nothing (--dry-run)"
    return report


def _kind(tensor: LazyTensor) -> str:
    return format_of(tensor) or tensor.dtype


def _fill(report: ExtractReport, fidelity: Sequence[Fidelity]) -> None:
    by_path = {item.path: item for item in fidelity}
    for row in report.modules:
        item = by_path.get(str(row["module"]))
        if item is not None:
            row |= {"norm": item.norm, "loss": item.loss, "energy": item.energy}
    total = math.fsum(item.norm**2 for item in fidelity)
    gone = math.fsum(item.error**2 for item in fidelity)
    energy = 1 - gone / total if total > 0 else 1.0
    loss = math.sqrt(gone / total) if total > 0 else 0.0
    object.__setattr__(report, "energy", energy)
    object.__setattr__(report, "loss", loss)
    report.summary["energy kept"] = energy
    report.summary["relative error against TUNED"] = loss
    worst = max(fidelity, key=lambda item: item.loss)
    report.summary["largest relative error of a module"] = f"{worst.loss:.3g} ({worst.path})"
