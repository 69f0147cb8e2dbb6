"""DyLoRA files are LoRA files: LyCORIS's modules at their full rank against ours, and the shapes
sd-scripts writes."""

# lycoris is not typed
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.dylora import DyLoraModule
from safetensors.torch import save_file
from torch import Tensor, nn

from peftsurgery import load_adapter
from peftsurgery.algorithms import LoRA

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(10, 12),
    "conv1x1": lambda: nn.Conv2d(10, 12, 1, bias=False),
    "conv3x3": lambda: nn.Conv2d(10, 12, 3, padding=1),
}


def trained(layer: nn.Module, block: int) -> DyLoraModule:
    module = DyLoraModule("lycoris_block_to_q", layer, 1.0, 4, 3.0, block_size=block)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*module.up_list, *module.down_list):
            tensor.copy_(torch.randn(tensor.shape, generator=random))
    return module.eval()


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_lycoris_files_are_read_as_loras(name: str, block: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    layer = LAYERS[name]()
    module = trained(layer, block)
    tensors: dict[str, Tensor] = {
        f"lycoris_block_to_q.{k}": torch.as_tensor(t).detach().clone()
        for k, t in module.custom_state_dict().items()
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    base = tmp_path / "base.safetensors"
    save_file({"block.to_q.weight": layer.weight.detach()}, base)
    adapter = load_adapter(path, base=base)
    (found,) = adapter.modules.values()
    assert isinstance(found, LoRA)
    assert float(found.scale) == 3 / 4  # alpha / rank
    full = module.get_diff_weight(rank=4 - block)[0].detach()  # every block is in play
    # LyCORIS divides alpha by the number of blocks instead, which the file does not tell
    torch.testing.assert_close(found.delta(layer.weight) * block, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_shapes_of_sd_scripts(name: str, tmp_path: Path) -> None:
    """networks/dylora.py: matrices, 1x1 kernels on both, or (r, i, 3, 3) and (o, r, 1, 1)."""
    random = torch.Generator().manual_seed(3)
    kernel = {"linear": (), "conv1x1": (1, 1), "conv3x3": (3, 3)}[name]
    ones = (1,) * len(kernel)
    down = torch.randn(4, 10, *kernel, generator=random)
    up = torch.randn(12, 4, *ones, generator=random)
    keys = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    path = tmp_path / "a.safetensors"
    save_file({f"lora_unet_block_to_q.{k}": t for k, t in keys.items()}, path)
    base = tmp_path / "base.safetensors"
    save_file({"block.to_q.weight": torch.zeros(12, 10, *kernel)}, base)
    (found,) = load_adapter(path, base=base).modules.values()
    wanted = 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(12, 10, *kernel)
    torch.testing.assert_close(found.delta(), wanted)
