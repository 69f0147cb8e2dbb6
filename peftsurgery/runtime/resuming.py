"""Everything an exact resume needs in one safetensors file: adapters, optimizer, rank allocator,
random numbers.

Tensors are `adapter/NAME`, `optimizer/NAME/KEY`, `allocator/…` and `rng/…`, by the parameter names
of the model, so that the order in which an optimizer got them does not matter; plain values lie in
the metadata.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.checkpoint import save as write
from peftsurgery.errors import UsageError

from .allocating import RankAllocator
from .training import adapter_parameters

META = "peftsurgery.training_state"


def save_state(
    model: nn.Module,
    path: str | Path,
    optimizer: Optimizer | None = None,
    *,
    allocator: RankAllocator | None = None,
    step: int = 0,
    extra: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write the adapters' tensors, the optimizer's state by name, that of AdaLoRA's allocator, and
    torch's (CPU and CUDA) and Python's random states. extra: anything JSON holds.

    UsageError when the optimizer has parameters that are no adapter's.
    """
    live = adapter_parameters(model)
    tensors: dict[str, Tensor] = {f"adapter/{n}": p.detach() for n, p in live.items()}
    plain: dict[str, dict[str, object]] = {}
    groups: list[dict[str, object]] = []
    if optimizer is not None:
        names = {id(p): n for n, p in live.items()}
        for group in optimizer.param_groups:
            members = [_named(names, p) for p in group["params"]]
            options = {k: v for k, v in group.items() if k not in ("params", "parameter_names")}
            groups.append({"parameters": members, "options": options})
        for parameter, state in optimizer.state.items():
            name = _named(names, parameter)
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value.detach()
                else:
                    plain.setdefault(name, {})[key] = value
    if allocator is not None:
        tensors |= {f"allocator/{n}": t for n, t in allocator.state().items()}
    tensors["rng/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for n, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda/{n}"] = state
    version, values, gauss = random.getstate()
    record = {
        "step": step,
        "extra": dict(extra or {}),
        "groups": groups,
        "plain": plain,
        "allocator": None if allocator is None else allocator.settings(),
        "python": [version, list(values), gauss],
    }
    cpu = {n: t.to("cpu").contiguous() for n, t in tensors.items()}
    return write(path, cpu, {META: json.dumps(record)}, overwrite=overwrite)


def _named(names: Mapping[int, str], parameter: Tensor) -> str:
    if id(parameter) not in names:
        raise UsageError(
            f"the optimizer holds a parameter {tuple(parameter.shape)} that is no adapter's."
        )
    return names[id(parameter)]


def load_state(
    model: nn.Module,
    path: str | Path,
    optimizer: Optimizer | None = None,
    *,
    allocator: RankAllocator | None = None,
) -> tuple[int, dict[str, object]]:
    """Put a state back into a model with the same adapters attached; returns (step, extra).

    UsageError names the first tensor that is missing or has another shape, or the setting of the
    allocator that differs; nothing changes then.
    """
    checkpoint = open_checkpoint(path)
    text = checkpoint.metadata.get(META)
    if text is None:
        raise UsageError(f"{path}: no training state (metadata {META!r} is missing).")
    record = json.loads(text)
    live = adapter_parameters(model)
    stored = {n.removeprefix("adapter/") for n in checkpoint if n.startswith("adapter/")}
    for name in sorted(stored ^ set(live)):
        where = "the model" if name in stored else "the file"
        raise UsageError(f"{path}: {name!r} is not in {where}; attach the same adapters first.")
    for name, parameter in live.items():
        shape = tuple(checkpoint[f"adapter/{name}"].shape)
        if shape != tuple(parameter.shape):
            raise UsageError(
                f"{path}: {name!r} has shape {shape}, expected {tuple(parameter.shape)}."
            )
    if allocator is not None:
        _load_allocator(allocator, checkpoint, record.get("allocator"), str(path))
    if optimizer is not None:
        options = {n: g["options"] for g in record["groups"] for n in g["parameters"]}
        _load_optimizer(optimizer, checkpoint, options, record["plain"], live, str(path))
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(checkpoint[f"adapter/{name}"].torch())
    torch.set_rng_state(checkpoint["rng/torch"].torch().clone())
    cuda = [n for n in checkpoint if n.startswith("rng/cuda/")]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all([checkpoint[n].torch().clone() for n in sorted(cuda)])
    version, values, gauss = record["python"]
    random.setstate((version, tuple(values), gauss))
    return record["step"], record["extra"]


def _load_allocator(
    allocator: RankAllocator,
    checkpoint: Checkpoint,
    settings: Mapping[str, object] | None,
    path: str,
) -> None:
    if settings is None:
        raise UsageError(f"{path}: was written without an allocator.")
    for key, value in allocator.settings().items():
        if settings.get(key) != value:
            raise UsageError(
                f"{path}: the allocator's {key} was {settings.get(key)}, here it is {value}."
            )
    start = "allocator/"
    names = [n for n in checkpoint if n.startswith(start)]
    allocator.load({n.removeprefix(start): checkpoint[n].torch() for n in names})


def _load_optimizer(
    optimizer: Optimizer,
    checkpoint: Checkpoint,
    options: Mapping[str, Mapping[str, object]],
    plain: Mapping[str, Mapping[str, object]],
    live: Mapping[str, nn.Parameter],
    path: str,
) -> None:
    """options: of a parameter's group, by its name; plain: its state besides tensors."""
    names = {id(p): n for n, p in live.items()}
    mine = {_named(names, p) for group in optimizer.param_groups for p in group["params"]}
    if mine != set(options):
        odd = sorted(mine ^ set(options))[0]
        raise UsageError(f"{path}: the optimizer and the file disagree about {odd!r}.")
    for group in optimizer.param_groups:
        for key, value in options[_named(names, group["params"][0])].items():
            group[key] = tuple(value) if isinstance(value, list) else value
    for name in mine:
        parameter = live[name]
        state: dict[str, object] = {}
        state.update(plain.get(name, {}))
        start = f"optimizer/{name}/"
        for key in (k for k in checkpoint if k.startswith(start)):
            value = checkpoint[key].torch().clone()
            short = key.removeprefix(start)
            state[short] = value if short == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
