"""The codec: the only place that knows file keys. Checkpoint -> Adapter and back.

Names are imported on first use, so that detection (headers only) does not pull torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftsurgery.codec.bases import BaseWeights as BaseWeights
    from peftsurgery.codec.decoding import decode as decode
    from peftsurgery.codec.detect import AmbiguousArchitecture as AmbiguousArchitecture
    from peftsurgery.codec.encoding import Encoded as Encoded
    from peftsurgery.codec.encoding import encode as encode
    from peftsurgery.codec.explaining import explain_checkpoint as explain_checkpoint
    from peftsurgery.codec.explaining import open_adapter as open_adapter
    from peftsurgery.codec.files import load_adapter as load_adapter
    from peftsurgery.codec.files import save_adapter as save_adapter
    from peftsurgery.codec.files import write_encoded as write_encoded

_HOMES = {
    "AmbiguousArchitecture": "detect",
    "BaseWeights": "bases",
    "Encoded": "encoding",
    "decode": "decoding",
    "encode": "encoding",
    "explain_checkpoint": "explaining",
    "load_adapter": "files",
    "open_adapter": "explaining",
    "save_adapter": "files",
    "write_encoded": "files",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
