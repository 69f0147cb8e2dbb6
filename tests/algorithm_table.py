"""The README's table of algorithms, made from the registry and the layouts."""

from __future__ import annotations

import inspect

from peftsurgery.algorithms import ALGORITHMS, WeightAdapter
from peftsurgery.layouts import LAYOUT_NAMES, layout_named


def table() -> str:
    """One row per algorithm: name, what it is, whether ΔW is a function of the weight, and the
    layouts with keys for it.
    """
    lines = ["| algorithm | what it is | looks at the weight | layouts |", "|---|---|---|---|"]
    for name, algorithm in ALGORITHMS.items():
        holders = [n for n in LAYOUT_NAMES if name in layout_named(n).dialect.algorithms]
        listed = ", ".join(holders) if len(holders) < len(LAYOUT_NAMES) else "all"
        looks = "no" if algorithm.side == "sum" else "yes"
        lines.append(f"| `{name}` | {_title(algorithm)} | {looks} | {listed} |")
    return "\n".join(lines)


def _title(algorithm: type[WeightAdapter]) -> str:
    """The first paragraph of the docstring of its module."""
    text = inspect.getdoc(inspect.getmodule(algorithm)) or ""
    return " ".join(text.partition("\n\n")[0].split())
