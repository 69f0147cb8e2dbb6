"""combine: several adapters into one, in the space of changes, proved by reading back.

    encode(fit(method(ΔW_1 … ΔW_n)))

Whole checkpoints as inputs are fine-tunes of `--base`; they go through
`operations.combine_checkpoints`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import Replace
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec.placing import ungroup
from peftsurgery.errors import Finding, UnsupportedError, UsageError
from peftsurgery.linalg import RankRule
from peftsurgery.merge_methods import METHODS, Chosen, Coefficients, Method, method_named
from peftsurgery.merge_methods.base import Number
from peftsurgery.operations.combine_inputs import (
    AdapterInputs,
    Source,
    additive,
    combined_extras,
    combined_values,
    decode_all,
    is_checkpoint,
    open_sources,
    shared_config,
    shared_metadata,
)
from peftsurgery.operations.combine_modules import Combined, Plan, combine_module
from peftsurgery.operations.deltas import Entry
from peftsurgery.operations.lineage import Hashing
from peftsurgery.operations.spilling import Spill
from peftsurgery.operations.staging import workers
from peftsurgery.operations.strengths import Strength
from peftsurgery.operations.writing_adapter import (
    DTYPES,
    Origin,
    check_choice,
    check_dtype,
    check_layout,
    check_target,
    collector_paused,
    dead_modules,
    encode_as,
    summarise,
    write_proved,
)
from peftsurgery.reports import Progress, Report
from peftsurgery.reports.base import Row

ALGORITHMS = ("lora", "lokr", "full")


@dataclass(frozen=True)
class CombineReport(Report):
    """Report of a combination; `loss` is ||ΔW written - ΔW of the method||_F / ||ΔW||_F over all
    modules.
    """

    loss: float = 0.0


@collector_paused()
def combine(
    adapters: Sequence[tuple[Source, float | Strength]],
    dst: str | Path,
    *,
    method: str = "linear",
    base: str | Path | None = None,
    rank: str | int | None = None,
    algorithm: str | None = None,
    to: str | None = None,
    architecture: str | None = None,
    density: float | None = None,
    scale: float | None = None,
    epsilon: float | None = None,
    gamma: float | None = None,
    majority_sign: str | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    keep: float | None = None,
    common: float | None = None,
    seed: int = 0,
    dtype: str = "keep",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> CombineReport:
    """Combine `adapters` (source, weight) into one, written to `dst` in the layout `to` (that of
    the first adapter when None); see `merge_methods.METHODS` for the methods and their options.

    rank: a rule; None keeps what is exact, and fits what is not at the sum of the inputs' ranks
    ("svd": at the largest). algorithm: "lora", "lokr" or "full". Whole checkpoints as sources are
    fine-tunes of `base`, and the result is a whole checkpoint.

    Raises UsageError for an option that the method does not have, for NaN and for other shapes;
    UnsupportedError for what has no combination; CheckFailed when the written file does not read
    back. Nothing is written then.
    """
    chosen = method_named(method)
    options = chosen.choose(
        {
            "density": density,
            "scale": scale,
            "epsilon": epsilon,
            "gamma": gamma,
            "majority_sign": majority_sign,
            "normalize": normalize,
            "rescale": rescale,
            "keep": keep,
            "common": common,
        }
    )
    rule = None if rank is None else RankRule.parse(rank)
    check_choice(algorithm, (None, *ALGORITHMS), "algorithm")
    check_dtype(dtype)
    if rule is not None and algorithm == "full":
        raise UsageError("--rank has no meaning with --algorithm full.")
    names, found, strengths = open_sources(adapters, allow_pickle=allow_pickle)
    whole = [isinstance(item, Checkpoint) and is_checkpoint(item) for item in found]
    if any(whole):
        if not all(whole):
            one, other = names[whole.index(True)], names[whole.index(False)]
            raise UsageError(
                f"{one} is a whole checkpoint and {other} an adapter; all inputs must be of one "
                "kind. Merge the adapter into its base first."
            )
        for value, name in ((rank, "rank"), (algorithm, "algorithm"), (to, "to")):
            if value is not None:
                raise UsageError(f"--{name} is for adapters, and {names[0]} is a whole checkpoint.")
        from peftsurgery.operations.combine_checkpoints import combine_checkpoints

        report = CombineReport("combine")
        method_used, options = _alone(chosen, options, strengths, report)
        return combine_checkpoints(
            report,
            [item for item in found if isinstance(item, Checkpoint)],
            strengths,
            Path(dst),
            base=base,
            method=method_used,
            options=options,
            seed=seed,
            dtype=dtype,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    files = [item for item in found if isinstance(item, Checkpoint)]
    dst = Path(dst)
    if to is not None:
        check_layout(to)
        check_target(files, dst, to=to, overwrite=overwrite)
    inputs = decode_all(
        names, found, strengths, architecture=architecture, base=base, headers_only=dry_run
    )
    to = to or inputs.adapters[0].layout
    if not to:
        raise UsageError("the first adapter comes from no file; give the layout with --to LAYOUT.")
    check_target(files, dst, to=to, overwrite=overwrite)
    report = CombineReport("combine")
    report.findings.extend(inputs.findings)
    method_used, options = _alone(chosen, options, inputs.strengths, report)
    plan = Plan(
        method_used,
        options,
        len(inputs.adapters),
        rule,
        algorithm,
        None if dtype == "keep" else DTYPES[dtype],
        seed,
    )
    _describe(report, inputs, chosen, options, plan)
    if dry_run:
        _dry(report, inputs, to)
        return report
    hashes = [Hashing(file, enabled=True) for file in files]
    sums = method_used is METHODS["linear"]  # the same on a part as on the whole
    if rule is not None or sums or not isinstance(method_used, Coefficients):
        inputs.join(to)
    with Spill(dst.parent) as spill:
        combined = _run(inputs, plan, report, spill, progress)
        overall = _overall(combined)
        result, combined = _assembled(inputs, combined, to)
        encoded = encode_as(result, to, sources=files, keep=spill.keep)
        encoded.release = spill.release
        report.findings.extend([*encoded.findings, *dead_modules(result)])
        summarise(report, result, encoded, to=to)
        for hashing in hashes:
            report.inputs.update(hashing.result())
        write_proved(
            encoded,
            result,
            dst,
            to=to,
            report=report,
            origin=Origin("combine", _origin(inputs, chosen, options, plan, to), report.inputs),
            overwrite=overwrite,
            details={path: _row(item) for path, item in combined.items()},
            progress=progress,
        )
    report.summary["loss of the fit, all modules"] = overall
    object.__setattr__(report, "loss", overall)
    return report


def _alone(
    method: Method, options: Chosen, strengths: Sequence[Strength], report: Report
) -> tuple[Method, Chosen]:
    """The method, or the weighted sum where one input is given and the method needs several."""
    method.check_weights([s.value for s in strengths])
    if len(strengths) > 1 or method.alone:
        return method, options
    report.findings.append(
        Finding(
            "info",
            "one-adapter",
            f"{method.name} has no meaning on one input: it is only scaled by its weight",
        )
    )
    return METHODS["linear"], METHODS["linear"].choose({"scale": options.number("scale")})


def _run(
    inputs: AdapterInputs, plan: Plan, report: Report, spill: Spill, progress: Progress | None
) -> dict[str, Combined]:
    """Every module, several at a time; what was read of the files is released as it goes, and what
    was made goes to `spill`.
    """
    paths = inputs.paths()

    def one(path: str) -> Combined:
        weights = inputs.weights(path)
        entries = _entries(inputs, path, weights, report.findings)
        if isinstance(entries, Replace):
            return Combined(entries, 1)
        plan.method.check_weights(weights)
        made = combine_module(path, entries, sum(weights), plan)
        return made if made.kept else replace(made, module=spill.keep(made.module))

    result: dict[str, Combined] = {}
    with workers(4) as threads:
        for done, (path, item) in enumerate(zip(paths, threads.map(one, paths), strict=True)):
            result[path] = item
            if progress is not None:
                progress(done, len(paths), path)
            if done % 32 == 31:
                for file in inputs.opened:
                    file.release()
                spill.release()
    return result


def _entries(
    inputs: AdapterInputs, path: str, weights: Sequence[float], findings: list[Finding]
) -> list[Entry] | Replace:
    """Additive changes (and IA3) of one module; new values without a base come back combined."""
    holders = [
        (i, name, adapter.modules[path])
        for i, (name, adapter) in enumerate(zip(inputs.names, inputs.adapters, strict=True))
        if path in adapter.modules
    ]
    values = {
        name: (module, weights[i]) for i, name, module in holders if isinstance(module, Replace)
    }
    if len(values) == len(holders) and inputs.base is None:
        return combined_values(path, values, findings)
    entries: list[Entry] = []
    for i, name, module in holders:
        needs_weight = not module.additive and module.algorithm != "ia3"
        if needs_weight or (module.bias is not None and module.bias_is_value):
            module = additive(path, name, module, inputs.base)
        entries.append(Entry(i, name, weights[i], module))
    return entries


def _assembled(
    inputs: AdapterInputs, combined: Mapping[str, Combined], to: str
) -> tuple[Adapter, dict[str, Combined]]:
    """The adapter, and what is known of each of its modules; joined records are split again."""
    parameters: dict[str, str] = {}
    for adapter in inputs.adapters:
        parameters |= adapter.parameters
    modules = {path: item.module for path, item in combined.items()}
    result = Adapter(
        modules,
        inputs.architecture,
        to,
        combined_extras(inputs),
        shared_metadata(inputs.adapters, inputs.names),
        shared_config(inputs.adapters),
        {path: name for path, name in parameters.items() if path in modules},
    )
    origin = ungroup(result)
    found = {path: combined[origin.get(path, path)] for path in result.modules}
    return result, {p: replace(item, module=result.modules[p]) for p, item in found.items()}


# the report ---------------------------------------------------------------------------------------


def _describe(
    report: Report, inputs: AdapterInputs, method: Method, options: Chosen, plan: Plan
) -> None:
    report.summary["method"] = method.name
    for name, value in options.values.items():
        report.summary[f"option {name}"] = value
    if method.random:
        report.summary["seed"] = plan.seed
    report.tables["adapters"] = [
        {
            "adapter": name,
            "weight": str(strength),
            "layout": adapter.layout,
            "algorithms": ", ".join(adapter.algorithms),
            "modules": len(adapter.modules),
        }
        for name, adapter, strength in zip(
            inputs.names, inputs.adapters, inputs.strengths, strict=True
        )
    ]


def _dry(report: Report, inputs: AdapterInputs, to: str) -> None:
    """What would be combined, from headers alone."""
    for path in inputs.paths():
        holders = [a.modules[path] for a in inputs.adapters if path in a.modules]
        for module in holders:
            if not module.additive and module.algorithm not in ("ia3", "set") and not inputs.base:
                raise UnsupportedError(
                    f"{path}: the change depends on the weight. Pass --base CHECKPOINT."
                )
        report.modules.append(
            {
                "module": path,
                "from": len(holders),
                "algorithms": ", ".join(dict.fromkeys(m.algorithm for m in holders)),
                "shape": "x".join(map(str, holders[0].shape)),
                "ranks": "+".join(str(m.rank) for m in holders),
            }
        )
    report.summary.update(
        {
            "to": to,
            "architecture": inputs.architecture,
            "modules": len(report.modules),
            "written": "nothing (--dry-run)",
        }
    )


def _row(item: Combined) -> Row:
    return {
        "from": item.sources,
        "norm": item.size,
        "loss": item.loss,
        "rounding": item.rounding,
    }


def _overall(combined: Mapping[str, Combined]) -> float:
    lost = sum((item.loss * item.size) ** 2 for item in combined.values())
    size = sum(item.size**2 for item in combined.values())
    return math.sqrt(lost / size) if size > 0 else 0.0


def _origin(
    inputs: AdapterInputs, method: Method, options: Chosen, plan: Plan, to: str
) -> dict[str, str | None]:
    """What the header says of the run: method, options, weights, seed."""
    weights = ",".join(
        f"{Path(name).name}={strength}".replace(" ", "_")
        for name, strength in zip(inputs.names, inputs.strengths, strict=True)
    )
    values = {name: _text(value) for name, value in options.values.items()}
    return {
        "method": method.name,
        "weights": weights,
        **values,
        "seed": str(plan.seed) if method.random else None,
        "rank": None if plan.rank is None else str(plan.rank),
        "algorithm": plan.algorithm,
        "to": to,
        "dtype": None if plan.dtype is None else str(plan.dtype).removeprefix("torch."),
    }


def _text(value: Number) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
