"""The codec: the only place that knows file keys. Checkpoint -> Adapter and back."""

from peftsurgery.codec.bases import BaseWeights
from peftsurgery.codec.decode import decode, explain_checkpoint
from peftsurgery.codec.detect import AmbiguousArchitecture
from peftsurgery.codec.encode import Encoded, encode
from peftsurgery.codec.files import load_adapter, open_adapter, save_adapter, write_encoded

__all__ = [
    "AmbiguousArchitecture",
    "BaseWeights",
    "Encoded",
    "decode",
    "encode",
    "explain_checkpoint",
    "load_adapter",
    "open_adapter",
    "save_adapter",
    "write_encoded",
]
