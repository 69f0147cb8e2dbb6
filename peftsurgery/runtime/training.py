"""What a training loop asks of attached adapters: parameters, groups, counts, checks, averages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftsurgery.algorithms import LoRA, WeightAdapter
from peftsurgery.errors import UsageError

from .hosting import stack_of
from .targets import hosts


@dataclass(frozen=True)
class Counts:
    """Numbers (elements), every tensor counted once however many modules share it.

    trainable   requiring gradients
    adapters    in adapters, origins of inits included
    base        in the model without adapters
    """

    trainable: int
    adapters: int
    base: int

    @property
    def share(self) -> float:
        """trainable / (base + adapters)."""
        return self.trainable / max(1, self.base + self.adapters)


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Tensors of the adapters (of one of them) by their name in `model.named_parameters()`."""
    mine: set[int] = set()
    for module in hosts(model).values():
        for entry in stack_of(module).entries:
            if name is None or entry.name == name:
                mine |= {id(p) for p in entry.adapter.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) in mine}


def trainable_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Those of `adapter_parameters` that require gradients: what an optimizer gets."""
    return {n: p for n, p in adapter_parameters(model, name).items() if p.requires_grad}


def counts(model: nn.Module) -> Counts:
    """How much trains, in unique totals."""
    inside = {id(p): p for module in hosts(model).values() for p in stack_of(module).parameters()}
    every = {id(p): p for p in model.parameters()}
    return Counts(
        sum(p.numel() for p in every.values() if p.requires_grad),
        sum(p.numel() for p in inside.values()),
        sum(p.numel() for key, p in every.items() if key not in inside),
    )


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    lora_plus_ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
    name: str | None = None,
) -> list[dict[str, object]]:
    """Parameter groups for any torch optimizer, with LoRA+'s rates (Hayou et al. 2024, arXiv
    2402.12354): lr · ratio for the output side of a LoRA, lr for everything else.

    The output side is `up`, or `down` on a weight stored (in, out). Embeddings have one rate,
    `embedding_lr` or lr. Vectors (biases, magnitudes) are not decayed. Each group has a `name` and
    the `parameter_names` in its order; empty groups are left out.
    """
    wanted = trainable_parameters(model, name)
    kinds = _kinds(model)
    rates = {
        "output": lr * lora_plus_ratio,
        "embedding": lr if embedding_lr is None else embedding_lr,
        "vector": lr,
        "other": lr,
    }
    groups: list[dict[str, object]] = []
    for kind, rate in rates.items():
        names = [n for n, p in wanted.items() if kinds.get(id(p), "other") == kind]
        if names:
            groups.append(
                {
                    "name": kind,
                    "params": [wanted[n] for n in names],
                    "parameter_names": names,
                    "lr": rate,
                    "weight_decay": 0.0 if kind == "vector" else weight_decay,
                }
            )
    if not groups:
        raise UsageError("param_groups: no adapter tensor requires a gradient.")
    return groups


def _kinds(model: nn.Module) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for module in hosts(model).values():
        stack = stack_of(module)
        for entry in stack.entries:
            for tensor_name, tensor in entry.adapter.tensors().items():
                kinds[id(tensor)] = _kind(entry.adapter, tensor_name, tensor, stack.layer.kind)
    return kinds


def _kind(adapter: WeightAdapter, name: str, tensor: Tensor, layer: str) -> str:
    if tensor.ndim < 2:
        return "vector"
    if layer == "embedding":
        return "embedding"
    output = "down" if adapter.stored == "conv1d" else "up"
    return "output" if isinstance(adapter, LoRA) and name == output else "other"


def without_gradient(model: nn.Module, name: str | None = None) -> tuple[str, ...]:
    """Trainable adapter tensors that the last backward did not reach."""
    return tuple(n for n, p in trainable_parameters(model, name).items() if p.grad is None)


def check_gradients(model: nn.Module, name: str | None = None) -> None:
    """After the first backward: UsageError naming the adapter tensors it did not reach."""
    if not trainable_parameters(model, name):
        raise UsageError("check_gradients: no adapter tensor requires a gradient.")
    if missing := without_gradient(model, name):
        raise UsageError(
            f"{len(missing)} adapter tensors got no gradient, first {missing[0]!r}. With reentrant "
            "gradient checkpointing call runtime.enable_input_gradients(model) before training; "
            "otherwise the layer is not used, or the adapter is not active."
        )


def enable_input_gradients(model: nn.Module) -> RemovableHandle:
    """Let the embeddings' output require gradients, which reentrant checkpointing over a frozen
    base needs. Remove the handle to undo it.
    """
    get = getattr(model, "get_input_embeddings", None)
    embeddings = get() if callable(get) else None
    if not isinstance(embeddings, nn.Module):
        raise UsageError(f"{type(model).__name__} has no get_input_embeddings().")

    def require(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_(True)

    return embeddings.register_forward_hook(require)


class EMA:
    """An exponential moving average of the adapters' tensors, in fp32, outside the model.

    update:  shadow <- d · shadow + (1 - d) · tensor,  d = min(decay, (1 + n) / (10 + n)) after n
    updates when `warmup` (the factors are averaged, not ΔW).
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        name: str | None = None,
        warmup: bool = True,
    ) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"EMA: got decay {decay}, expected 0 <= decay < 1.")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.live = trainable_parameters(model, name)
        if not self.live:
            raise UsageError("EMA: no adapter tensor requires a gradient.")
        self.shadow = {n: p.detach().float().clone() for n, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the tensors as they are into the average; call after the optimizer's step."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in self.live.items():
            shadow = self.shadow[name]
            if shadow.device != parameter.device:
                shadow = self.shadow[name] = shadow.to(parameter.device)
            shadow.lerp_(parameter.float(), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages inside the block (to evaluate or save), exact bytes after."""
        before = {n: p.detach().clone() for n, p in self.live.items()}
        with torch.no_grad():
            for name, parameter in self.live.items():
                parameter.copy_(self.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.live.items():
                    parameter.copy_(before[name])
