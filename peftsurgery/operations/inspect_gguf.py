"""What a GGUF file holds, from its header alone."""

from __future__ import annotations

import math
from collections import Counter

from peftsurgery.checkpoint import LazyTensor
from peftsurgery.checkpoint.ggml import DENSE, READABLE
from peftsurgery.checkpoint.gguf import GGUFCheckpoint, GGUFTensor
from peftsurgery.errors import Finding
from peftsurgery.reports import Report, Row


def describe_gguf(report: Report, checkpoint: GGUFCheckpoint) -> None:
    """Fill a report: architecture, types and sizes, every tensor, and what cannot be merged into.

    Nothing is read beside the header, and torch is not needed.
    """
    header = checkpoint.header
    rows = [_row(name, tensor) for name, tensor in checkpoint.items()]
    report.summary.update(
        {
            "file": checkpoint.source,
            "layout": f"gguf (version {header.version})",
            "architecture": checkpoint.architecture or "not stated",
            "name": checkpoint.metadata.get("general.name", "not stated"),
            "tensors": len(rows),
            "types": ", ".join(
                f"{name} ({n})" for name, n in Counter(row["type"] for row in rows).most_common()
            ),
            "parameters": sum(int(row["parameters"] or 0) for row in rows),
            "bytes": checkpoint.nbytes,
        }
    )
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["type"]), []).append(row)
    report.tables["types"] = [
        {
            "type": name,
            "tensors": len(group),
            "parameters": sum(int(row["parameters"] or 0) for row in group),
            "bytes": sum(int(row["bytes"] or 0) for row in group),
            "merge": "yes" if name in READABLE else "copied only",
        }
        for name, group in found.items()
    ]
    for name, group in found.items():
        if name not in READABLE and name not in DENSE:
            message = f"{len(group)} tensors are {name}, which can be copied but not unpacked"
            remedy = "merge into a file of another type to change these"
            report.findings.append(Finding("warning", "gguf-type", message, None, remedy))
    report.modules.extend(rows)
    report.tables["metadata"] = [
        {"key": key, "value": value if len(value) <= 120 else f"{value[:120]}…"}
        for key, value in sorted(checkpoint.metadata.items())
    ]


def _row(name: str, tensor: LazyTensor) -> Row:
    packed = isinstance(tensor, GGUFTensor)
    shape = tensor.weight_shape if packed else tuple(tensor.shape)
    return {
        "tensor": name,
        "type": tensor.ggml_type if packed else tensor.dtype,
        "shape": " x ".join(map(str, shape)),
        "parameters": math.prod(shape),
        "bytes": tensor.nbytes,
    }
