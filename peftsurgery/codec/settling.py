"""What a file leaves to the model it was trained on: the inputs of the largest layer, for which
VeRA's projections are drawn when they were not saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from peftsurgery.adapter import Adapter, members
from peftsurgery.algorithms import VeRA

ShapeOf = Callable[[str], tuple[int, ...] | None]


def settle(adapter: Adapter, shape_of: ShapeOf) -> Adapter:
    """The adapter with the projections of every VeRA that has only a seed; itself where none waits.

    shape_of: home path of one module (`component:path`) -> shape of its stored weight, None where
    the model has none. All VeRA modules of a component count, so this goes before any is left out;
    where one is not found, those of its component stay as they are.
    """
    modules = dict(adapter.modules)
    for component in adapter.components:
        waiting: dict[str, VeRA] = {}
        inputs: list[int] = []
        for path, module in adapter.of(component).items():
            if not isinstance(module, VeRA) or module.down is not None:
                continue
            shape = shape_of(f"{component}:{members(path)[0]}")
            waiting[f"{component}:{path}"] = module
            turned = module.stored == "conv1d"
            inputs.append(0 if shape is None else shape[0] if turned else math.prod(shape[1:]))
        if all(inputs):
            for path, module in waiting.items():
                modules[path] = module.with_tensors(widest=(module.widest[0], max(inputs)))
    same = all(modules[path] is module for path, module in adapter.modules.items())
    return adapter if same else replace(adapter, modules=modules)
