"""inspect: what a file is, from headers alone; norms on request; coverage against a base.

Nothing here needs torch unless norms are asked for, or a base, or the file holds packed weights: an
adapter of any size is described in a fraction of a second.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peftsurgery import architectures
from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.checkpoint.gguf import GGUFCheckpoint
from peftsurgery.codec.conventions import Conventions
from peftsurgery.codec.detect import AmbiguousArchitecture, Explanation
from peftsurgery.codec.explaining import explain_checkpoint, open_adapter
from peftsurgery.codec.keys import Record, parse, rank_and_shape
from peftsurgery.codec.labelling import label
from peftsurgery.codec.resolving import Placement
from peftsurgery.errors import Finding, UsageError
from peftsurgery.operations.inspect_gguf import describe_gguf
from peftsurgery.operations.programs import programs
from peftsurgery.reports import Report, Row


@dataclass(frozen=True)
class InspectReport(Report):
    """Report of an inspection; `layout` and `architecture` are what detection found ("" when
    undecided).
    """

    layout: str = ""
    architecture: str = ""


def inspect(
    path: str | Path,
    *,
    base: str | Path | None = None,
    architecture: str | None = None,
    allow_pickle: bool = False,
    norms: bool = False,
) -> InspectReport:
    """Describe an adapter: layout, architecture, algorithm, rank and scale per module, and who will
    load it. Of a GGUF file: its architecture, types and tensors. Of a checkpoint with packed
    weights: formats, bits per weight, and what stays plain.

    norms: read the factors and add ||ΔW||_F per module and the energy (its square) per block. base:
    a checkpoint; the report then says which modules it covers.

    Raises UsageError when keys cannot be explained, UnsupportedError for algorithms this version
    does not handle.
    """
    checkpoint = open_adapter(path, allow_pickle=allow_pickle)
    if isinstance(checkpoint, GGUFCheckpoint):
        report = InspectReport("inspect", layout="gguf", architecture=checkpoint.architecture)
        describe_gguf(report, checkpoint)
        return report
    try:
        explanation, others = _explain(checkpoint, base, architecture)
    except UsageError:
        described = None if norms or base is not None else _packed(checkpoint)
        if described is None:
            raise
        return described
    conventions = Conventions(checkpoint, explanation)
    rows = [
        _row(checkpoint, conventions, record, explanation.placements[module])
        for module, record in explanation.parsed.records.items()
    ]
    layout, deviations = label(explanation, _has_alpha(explanation))
    report = InspectReport(
        "inspect", layout=layout.name, architecture="" if others else explanation.architecture.name
    )
    report.findings.extend(conventions.findings)
    if deviations:
        report.findings.append(
            Finding("info", "layout-deviates", f"not pure {layout.name}: {'; '.join(deviations)}")
        )
    if others:
        names = ", ".join(e.architecture.name for e in others)
        report.findings.append(
            Finding(
                "warning",
                "ambiguous-architecture",
                f"{names} explain every key alike",
                None,
                "pass --architecture to settle it",
            )
        )
    _summary(report, checkpoint, explanation, layout.title, rows, others)
    if norms:
        _norms(report, checkpoint, explanation.architecture.name, rows)
    report.modules.extend(rows)
    report.tables["components"] = _components(rows)
    report.tables["programs"] = programs(layout, explanation, rows)
    if base is not None:
        report.tables["coverage"] = _coverage(report, base, explanation, rows)
    metadata = _metadata(checkpoint)
    if metadata:
        report.tables["metadata"] = metadata
    return report


def _packed(checkpoint: Checkpoint) -> InspectReport | None:
    """What a checkpoint with packed weights holds; None for one without, and for adapters."""
    records = parse(checkpoint, checkpoint.source).records.values()
    if any(record.algorithm != "set" for record in records):
        return None
    from peftsurgery.operations.inspect_packed import describe

    report = InspectReport("inspect")
    return report if describe(checkpoint, report) else None


def _explain(
    checkpoint: Checkpoint, base: str | Path | None, architecture: str | None
) -> tuple[Explanation, list[Explanation]]:
    known = None
    if base is not None:
        from peftsurgery.codec.bases import base_names

        known = base_names(_opened(base))
    try:
        return explain_checkpoint(checkpoint, architecture=architecture, known=known), []
    except AmbiguousArchitecture as error:
        return error.candidates[0], error.candidates
    except UsageError:
        if architecture is not None:
            raise
        flat = _unresolved(checkpoint)
        if flat is None:
            raise
        return flat, []


def _unresolved(checkpoint: Checkpoint) -> Explanation | None:
    """A file of flattened names of an unknown family can still be described, module by module,
    under its own names.
    """
    parsed = parse(checkpoint, checkpoint.source)
    flat = [m for m in parsed.records if "." not in m and m.startswith(("lora_", "lycoris_"))]
    if not parsed.records or parsed.unknown or len(flat) != len(parsed.records):
        return None
    generic = architectures.get("generic")
    explanation = Explanation(generic, parsed)
    component = generic.components["transformer"]
    for module in parsed.records:
        site = component.site(component.home, module)
        assert site is not None
        explanation.placements[module] = Placement("flat", "?", component.home, site)
    return explanation


def _has_alpha(explanation: Explanation) -> bool:
    return any("alpha" in record.keys for record in explanation.parsed.records.values())


def _row(
    checkpoint: Checkpoint, conventions: Conventions, record: Record, placement: Placement
) -> Row:
    rank, (out, into) = rank_and_shape(record, checkpoint)
    tensors = [checkpoint[key] for key in record.keys.values()]
    dora = "magnitude" in record.keys or "magnitude_out" in record.keys
    return {
        "module": f"{placement.component}:{placement.site.home}",
        "algorithm": (record.algorithm or "full") + (" + DoRA" if dora else ""),
        "rank": rank,
        "alpha": conventions.alpha(record),
        "scale": conventions.scale(record, placement, rank),
        "out": out or None,
        "in": into or None,
        "dtype": "/".join(
            sorted({t.dtype for k, t in zip(record.keys, tensors, strict=True) if k != "alpha"})
        ),
        "bytes": sum(t.nbytes for t in tensors),
        "name in file": record.module,
    }


def _summary(
    report: InspectReport,
    checkpoint: Checkpoint,
    explanation: Explanation,
    title: str,
    rows: list[Row],
    others: list[Explanation],
) -> None:
    ranks = Counter(row["rank"] for row in rows if row["rank"] is not None)
    unknown = any(p.component == "?" for p in explanation.placements.values())
    name = explanation.architecture.title
    if unknown:
        name = "unknown (flattened names; --architecture or --base resolves them)"
        report.findings.append(
            Finding(
                "warning",
                "unknown-architecture",
                "no table has these flattened names",
                rows[0]["name in file"],  # type: ignore[arg-type]
                "pass --base with the checkpoint it was trained on",
            )
        )
    elif others:
        name = " or ".join(e.architecture.title for e in others)
    report.summary.update(
        {
            "file": checkpoint.source,
            "layout": f"{report.layout} ({title})",
            "architecture": name,
            "algorithms": _counted(Counter(str(row["algorithm"]) for row in rows)),
            "modules": len(rows),
            "keys": len(checkpoint),
            "ranks": _counted(ranks),
            "scales": _counted(Counter(f"{row['scale']:g}" for row in rows)),
            "dtypes": _counted(Counter(str(row["dtype"]) for row in rows)),
            "parameters": sum(math.prod(checkpoint[k].shape) for k in checkpoint),
            "bytes": checkpoint.nbytes,
            "written by": _trainer(checkpoint.metadata, checkpoint.config or {}),
        }
    )
    if explanation.parsed.carried:
        report.summary["carried tensors"] = len(explanation.parsed.carried)


def _counted(counts: Counter) -> str:
    items = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    if len(items) == 1:
        return str(items[0][0])
    shown = ", ".join(f"{value} ({count})" for value, count in items[:6])
    return shown + (f", … {len(items)} in all" if len(items) > 6 else "")


def _trainer(metadata: Mapping[str, str], config: Mapping[str, object]) -> str:
    """The program that wrote the file, when it says so."""
    if "peftsurgery.version" in metadata:
        return f"peftsurgery {metadata['peftsurgery.version']}"
    if "ss_network_module" in metadata:
        module = metadata["ss_network_module"]
        return "LyCORIS in sd-scripts" if module.startswith("lycoris") else f"sd-scripts ({module})"
    if "ot_config" in metadata or any(k.startswith("ot_") for k in metadata):
        return "OneTrainer"
    if "modelspec.implementation" in metadata:
        return metadata["modelspec.implementation"]
    if "software" in metadata:
        try:
            software = json.loads(metadata["software"])
            return f"{software.get('name', '?')} {software.get('version', '')}".strip()
        except (json.JSONDecodeError, AttributeError):
            return metadata["software"]
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    if "peft_version" in config:
        return f"PEFT {config['peft_version']}"
    return "PEFT" if "peft_type" in config else "not stated"


def _components(rows: list[Row]) -> list[Row]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["module"]).partition(":")[0], []).append(row)
    return [
        {
            "component": name,
            "modules": len(group),
            "ranks": _counted(Counter(r["rank"] for r in group)),
            "bytes": sum(int(r["bytes"] or 0) for r in group),
        }
        for name, group in found.items()
    ]


def _metadata(checkpoint: Checkpoint) -> list[Row]:
    return [
        {
            "key": key,
            "value": value if len(value) <= 120 else f"{value[:120]}… ({len(value)} characters)",
        }
        for key, value in sorted(checkpoint.metadata.items())
    ]


def block_of(path: str) -> str:
    """The block a module belongs to: its path up to and including the second number, or the first
    if there is one.
    """
    component, _, inner = path.partition(":")
    segments = inner.split(".")
    numbers = [i for i, s in enumerate(segments) if s.isdigit()]
    depth = 2 if segments[0] in ("down_blocks", "up_blocks") else 1
    end = numbers[min(depth, len(numbers)) - 1] + 1 if numbers else 1
    return f"{component}:{'.'.join(segments[:end])}"


def _norms(
    report: InspectReport, checkpoint: Checkpoint, architecture: str, rows: list[Row]
) -> None:
    from peftsurgery.algorithms import norm
    from peftsurgery.codec import decode

    adapter = decode(checkpoint, architecture=architecture)
    energy: dict[str, float] = {}
    sizes: dict[str, float | None] = {}
    for path, module in adapter.modules.items():
        for name in module.nonfinite():
            report.findings.append(
                Finding(
                    "error",
                    "not-finite",
                    f"{name} holds NaN or Inf",
                    path,
                    "the adapter is damaged",
                )
            )
        if module.is_zero():
            report.findings.append(
                Finding("warning", "dead-module", "all-zero factors: it does nothing", path)
            )
        size = norm(module) if module.additive and not module.nonfinite() else None
        sizes[path] = size
        if size is not None:
            energy[block_of(path)] = energy.get(block_of(path), 0.0) + size * size
    for row in rows:
        path = str(row["module"])
        component, _, inner = path.partition(":")
        found = [sizes[p] for p in {path, *_members(component, inner)} if p in sizes]
        known = [size for size in found if size is not None]
        row["norm"] = math.hypot(*known) if known else None
    total = sum(energy.values()) or 1.0
    report.tables["blocks"] = [
        {"block": name, "norm": math.sqrt(value), "energy": value / total}
        for name, value in energy.items()
    ]


def _members(component: str, inner: str) -> set[str]:
    return {f"{component}:{part}" for part in architectures.expand(inner)}


def _opened(base: str | Path) -> Checkpoint:
    """The base with the names of its model, whatever it is packed in."""
    from peftsurgery.quantizers import logical

    return logical(open_checkpoint(base))


def _coverage(
    report: InspectReport, base: str | Path, explanation: Explanation, rows: list[Row]
) -> list[Row]:
    """Which modules of the adapter the base has, and how much of the base they cover."""
    from peftsurgery.codec.bases import BaseWeights

    weights = BaseWeights(_opened(base), explanation.architecture)
    missing: list[str] = []
    found: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for row in rows:
        component, _, inner = str(row["module"]).partition(":")
        wanted[component] += 1
        parts = _members(component, inner)
        if all(weights.find(part) is not None for part in parts):
            found[component] += 1
        else:
            missing.append(str(row["module"]))
    for path in missing[:10]:
        report.findings.append(
            Finding(
                "error",
                "not-in-base",
                "the base has no such module",
                path,
                "give the base it was trained on",
            )
        )
    if missing:
        object.__setattr__(report, "ok", False)
    modules = weights.modules()
    return [
        {
            "component": component,
            "modules of the adapter": wanted[component],
            "found in the base": found[component],
            "modules of the base": len(modules.get(component, ())),
        }
        for component in wanted
    ]
