"""Tables of model families: how each vocabulary names the modules of a model.

`ARCHITECTURES` lists them in detection order: the families with a complete table first, then those
that take any dotted name as it stands. To add one, write its TOML file (grammar in `table.py`) and
name it here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..errors import UsageError, nearest
from .component import OPERATORS, Component, Row, Site, TensorSite
from .family import Architecture, Pin
from .table import load
from .template import Trie, expand, flatten, group, index_flat

ARCHITECTURES = ("sd1", "sd2", "sdxl", "flux", "llm", "generic")

__all__ = [
    "ARCHITECTURES",
    "OPERATORS",
    "Architecture",
    "Component",
    "Pin",
    "Row",
    "Site",
    "TensorSite",
    "Trie",
    "expand",
    "flatten",
    "get",
    "group",
    "index_flat",
    "load",
]


@cache
def get(name: str) -> Architecture:
    """The family of that name, read on first use; `UsageError` for an unknown one."""
    if name not in ARCHITECTURES:
        closest = ", ".join(nearest(name, ARCHITECTURES)) or "none"
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"no architecture {name!r} (closest: {closest}). Known: {known}.")
    return load(Path(__file__).parent / f"{name}.toml")
