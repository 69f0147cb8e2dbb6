"""Surgery on model adapters and checkpoints, on the files themselves."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from peftsurgery import algorithms as algorithms
    from peftsurgery import runtime as runtime
    from peftsurgery.adapter import Adapter as Adapter
    from peftsurgery.checkpoint import Checkpoint as Checkpoint
    from peftsurgery.checkpoint import open_checkpoint as open_checkpoint
    from peftsurgery.codec import load_adapter as load_adapter
    from peftsurgery.codec import save_adapter as save_adapter
    from peftsurgery.operations.combine import combine as combine
    from peftsurgery.operations.convert import convert as convert
    from peftsurgery.operations.extract import extract as extract
    from peftsurgery.operations.inspect import inspect as inspect
    from peftsurgery.operations.merge import merge as merge
    from peftsurgery.operations.quantize import dequantize as dequantize
    from peftsurgery.operations.quantize import quantize as quantize
    from peftsurgery.operations.resize_rank import resize_rank as resize_rank
    from peftsurgery.operations.unmerge import unmerge as unmerge
    from peftsurgery.operations.verify import verify as verify

_HOMES = {
    "Adapter": "peftsurgery.adapter",
    "Checkpoint": "peftsurgery.checkpoint",
    "combine": "peftsurgery.operations.combine",
    "convert": "peftsurgery.operations.convert",
    "dequantize": "peftsurgery.operations.quantize",
    "extract": "peftsurgery.operations.extract",
    "inspect": "peftsurgery.operations.inspect",
    "load_adapter": "peftsurgery.codec",
    "merge": "peftsurgery.operations.merge",
    "open_checkpoint": "peftsurgery.checkpoint",
    "quantize": "peftsurgery.operations.quantize",
    "resize_rank": "peftsurgery.operations.resize_rank",
    "save_adapter": "peftsurgery.codec",
    "unmerge": "peftsurgery.operations.unmerge",
    "verify": "peftsurgery.operations.verify",
}

_PACKAGES = ("algorithms", "runtime")

__all__ = [*_HOMES, *_PACKAGES]


def __getattr__(name: str) -> object:
    """Public names are imported on first use: importing the package costs nothing."""
    if name in _PACKAGES:
        return importlib.import_module(f"peftsurgery.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'peftsurgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
