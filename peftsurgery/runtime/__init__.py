"""Adapters on live torch models: attach, train, switch, merge, save."""

from .allocating import Budget, RankAllocator
from .attaching import Attached, attach
from .controls import (
    activate,
    adapter_names,
    adapters,
    delete,
    detach,
    disabled,
    hot_swap,
    per_row,
    set_strength,
)
from .from_data import init_from_data
from .merging import merge, merge_and_detach, unmerge
from .regularizing import adalora_orthogonality, hra_orthogonality
from .replication import Replication, replicate_layers
from .resuming import load_state, save_state
from .saving import export, save
from .stack import Dropout
from .training import (
    EMA,
    Counts,
    adapter_parameters,
    check_gradients,
    counts,
    enable_input_gradients,
    param_groups,
    trainable_parameters,
    without_gradient,
)

__all__ = [
    "EMA",
    "Attached",
    "Budget",
    "Counts",
    "Dropout",
    "RankAllocator",
    "Replication",
    "activate",
    "adalora_orthogonality",
    "adapter_names",
    "adapter_parameters",
    "adapters",
    "attach",
    "check_gradients",
    "counts",
    "delete",
    "detach",
    "disabled",
    "enable_input_gradients",
    "export",
    "hot_swap",
    "hra_orthogonality",
    "init_from_data",
    "load_state",
    "merge",
    "merge_and_detach",
    "param_groups",
    "per_row",
    "replicate_layers",
    "save",
    "save_state",
    "set_strength",
    "trainable_parameters",
    "unmerge",
    "without_gradient",
]
