"""Report -> strict JSON."""

from __future__ import annotations

import json
import math

from peftsurgery.reports.base import SCHEMA_VERSION, Report


def render(report: Report) -> str:
    """`report.to_dict()` as RFC 8259 JSON, ASCII only, two-space indent, newline at the end.

    JSON has no NaN or infinity: such floats become the strings "NaN", "Infinity", "-Infinity".
    """
    return dump(report.to_dict())


def render_error(kind: str, message: str, *, exit_code: int, operation: str | None = None) -> str:
    """The same envelope for an operation that raised: `error` holds the class name and message."""
    return dump(
        {
            "schema_version": SCHEMA_VERSION,
            "operation": operation,
            "ok": False,
            "exit_code": exit_code,
            "error": {"type": kind, "message": message},
        }
    )


def dump(document: object) -> str:
    """Strict JSON text of plain dicts, lists and scalars."""
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _finite(node: object) -> object:
    if isinstance(node, dict):
        return {str(name): _finite(child) for name, child in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(child) for child in node]
    if isinstance(node, float) and not math.isfinite(node):
        return "NaN" if math.isnan(node) else "Infinity" if node > 0 else "-Infinity"
    return node
