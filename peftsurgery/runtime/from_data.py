"""Starting a LoRA from what its layer sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftsurgery.algorithms import LoRA
from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import UsageError

from .hosting import stack_of
from .stack import Entry
from .targets import hosts


@torch.no_grad()
def init_from_data(
    model: nn.Module, forward: Callable[[], object], name: str = "default"
) -> dict[str, Tensor]:
    """Set the input side of every fresh LoRA to the leading principal directions of its inputs
    (Paischer et al. 2024, arXiv 2410.07170; every layer keeps its rank here).

    forward   runs the model on one or more batches; the inputs' second moments (i, i) are summed
              meanwhile, in fp32, one matrix per layer.

    ΔW stays 0, so the other side must still be 0. Linear layers and transformers Conv1D; returns
    path -> the share of the inputs' energy along each direction (r,). UsageError when a layer saw
    no input, or there is no fresh LoRA.
    """
    found: dict[str, tuple[nn.Module, Entry, Layer]] = {}
    for path, module in hosts(model).items():
        layer = stack_of(module).layer
        for entry in stack_of(module).of(name):
            if layer.kind in ("linear", "hf_conv1d") and isinstance(entry.adapter, LoRA):
                found[path] = module, entry, layer
    moments: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float().flatten(0, -2)
            moment = x.T @ x
            moments[path] = moments[path] + moment if path in moments else moment

        return add

    for path, (_, entry, _) in found.items():
        assert isinstance(entry.adapter, LoRA)
        if bool(_sides(entry.adapter)[1].any()) or entry.origin is not None:
            raise UsageError(f"{path}: the LoRA is not fresh; its change is not zero any more.")
    if not found:
        raise UsageError(f"no LoRA {name!r} on a linear layer is attached.")
    handles = [m.register_forward_pre_hook(watch(path)) for path, (m, _, _) in found.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [path for path in found if path not in moments]:
        raise UsageError(f"{', '.join(map(repr, unseen[:3]))} saw no input; nothing was changed.")
    shares: dict[str, Tensor] = {}
    for path, (_, entry, _) in found.items():
        assert isinstance(entry.adapter, LoRA)
        values, vectors = torch.linalg.eigh(moments[path])
        rank = min(entry.adapter.rank, values.numel())
        inner, _ = _sides(entry.adapter)
        inner.zero_()
        inner[:rank].copy_(vectors.flip(1)[:, :rank].T)
        shares[path] = values.flip(0)[:rank] / values.sum().clamp_min(1e-30)
    return shares


def _sides(adapter: LoRA) -> tuple[Tensor, Tensor]:
    """(the side that meets x as (r, i), the other one), views to write into."""
    up, down = adapter.up.detach(), adapter.down.detach()
    return (up.T, down) if adapter.stored == "conv1d" else (down, up)
