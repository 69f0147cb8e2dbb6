"""The report of a merge: its plan before, and how much of ΔW survived after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peftsurgery.codec.keys import BASE_COPY
from peftsurgery.errors import CheckFailed, Finding
from peftsurgery.operations.apply import Settings, Survival, needs_whole, output_dtype
from peftsurgery.operations.inputs import Inputs
from peftsurgery.operations.plan import MergePlan
from peftsurgery.reports import Report
from peftsurgery.reports.base import Row

SURVIVAL_WARNING = 0.95
WORKING_BYTES = 400_000_000  # the process, the tiles and the queue before the disk
NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class MergeReport(Report):
    """Report of a merge; `survival` is the share of ΔW present in what was written, over all
    touched weights.
    """

    survival: float = 1.0
    touched: dict[str, float] = field(default_factory=dict)  # stored tensor -> survival


def describe(report: MergeReport, inputs: Inputs, settings: Settings) -> None:
    """Fill in what is known before anything is computed."""
    base, plan = inputs.base.checkpoint, inputs.plan
    report.findings.extend(inputs.findings)
    for index, (adapter, _) in enumerate(inputs.adapters):
        report.findings.extend(adapter.findings)
        _describe_adapter(report, inputs, index)
    order = " then ".join(
        f"{Path(n).name}={s}" for n, (_, s) in zip(inputs.names, inputs.adapters, strict=True)
    )
    if len(inputs.adapters) > 1:
        how = (
            "composed in this order"
            if settings.relative_to == "current"
            else "each relative to the base"
        )
        order += f" ({how})"
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
            "largest touched tensor (elements)": max(
                (t.numel for t in plan.targets.values()), default=0
            ),
            "estimated peak memory bytes": WORKING_BYTES + adapters + _whole_bytes(plan),
        }
    )


def _describe_adapter(report: MergeReport, inputs: Inputs, index: int) -> None:
    name, plan = inputs.names[index], inputs.plan
    if index in plan.prefixes:
        prefix = plan.prefixes[index]
        report.findings.append(
            Finding("info", "prefix", f"paths of {name} found under another prefix ({prefix!r})")
        )
    if index in plan.idle:
        report.findings.append(
            Finding(
                "info",
                "strength-zero",
                f"{plan.idle[index]} of {len(inputs.adapters[index][0].modules)} modules of {name} "
                "have strength 0 and change "
                "nothing",
            )
        )

    left = [
        key
        for key in inputs.adapters[index][0].extras
        if not key.endswith(BASE_COPY) and key != "lora_controlnet"
    ]
    if left:
        report.findings.append(
            Finding(
                "warning",
                "not-merged",
                f"{len(left)} tensors of {name} belong to no weight of the base and are left out",
                left[0],
                "textual-inversion vectors are loaded beside the model, not merged into it",
            )
        )


def _whole_bytes(plan: MergePlan) -> int:
    """Memory for the largest tensor that cannot be computed row by row: base, result and one copy
    in fp32.
    """
    return max((12 * t.numel for t in plan.targets.values() if needs_whole(t)), default=0)


def plan_rows(plan: MergePlan, settings: Settings) -> list[Row]:
    """One row per touched tensor, for --dry-run."""
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
    report: MergeReport,
    survival: Mapping[str, Survival],
    minimum: float | None,
    alternatives: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Fill in what survived. Raises CheckFailed below `minimum`, with the dtypes that would keep
    more.

    alternatives: the same share for other dtypes (safetensors names), asked for only when it is
    needed.
    """
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
    low = minimum is not None and total.share < minimum
    if not low and total.share >= SURVIVAL_WARNING:
        return
    remedy = _remedy(total.share, alternatives() if alternatives is not None else {})
    if low:
        raise CheckFailed(
            f"only {total.share:.1%} of ΔW survives rounding to the number type written, less than "
            "--min-survival "
            f"{minimum:g}; nothing was kept. {remedy[:1].upper()}{remedy[1:]}."
        )
    message = f"{total.share:.1%} of ΔW survives rounding to the number type written"
    report.findings.append(Finding("warning", "low-survival", message, None, remedy))


def _remedy(share: float, others: Mapping[str, float]) -> str:
    better = {NAMES[dtype]: kept for dtype, kept in others.items() if kept > share}
    listed = ", ".join(f"--dtype {name} keeps {kept:.1%}" for name, kept in better.items())
    return f"{listed or '--dtype fp32 keeps it'}; --rounding stochastic keeps it on average"
