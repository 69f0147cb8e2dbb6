"""Files to tensors and back: strict headers, lazy tensors, checkpoints in any container, atomic
saving.
"""

from peftsurgery.checkpoint.container import Checkpoint
from peftsurgery.checkpoint.hashing import hash_ahead, sha256_of
from peftsurgery.checkpoint.header import Header, Limits, TensorInfo, parse_header, read_header
from peftsurgery.checkpoint.opening import open_checkpoint
from peftsurgery.checkpoint.saving import save, serialized_header
from peftsurgery.checkpoint.tensors import LazyTensor
from peftsurgery.checkpoint.writing import Deferred

__all__ = [
    "Checkpoint",
    "Deferred",
    "Header",
    "LazyTensor",
    "Limits",
    "TensorInfo",
    "hash_ahead",
    "open_checkpoint",
    "parse_header",
    "read_header",
    "save",
    "serialized_header",
    "sha256_of",
]
