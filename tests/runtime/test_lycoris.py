"""LyCORIS's forward (not its merge, which scales LoHa and LoKr twice) and its dropout of rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import lycoris
import pytest
import torch
from torch import Generator, nn

from peftsurgery import runtime
from tests.algorithms.cases import close


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(torch.tanh(self.first(x))).mean((2, 3)))


KINDS: dict[str, dict[str, object]] = {
    "lora": {"algo": "lora"},
    "tucker": {"algo": "lora", "use_tucker": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr-both": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr-tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "lokr-full": {"algo": "lokr", "factor": 2, "full_matrix": True},
    "full": {"algo": "full"},
}


@pytest.mark.parametrize(("kind", "dim"), list(itertools.product(KINDS, [2, 4])))
def test_the_forward_of_lycoris(kind: str, dim: int, rng: Generator, tmp_path: Path) -> None:
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=rng)))
    base = Net()
    theirs, ours = Net(), Net()
    theirs.load_state_dict(base.state_dict())
    ours.load_state_dict(base.state_dict())
    lycoris.LycorisNetwork.apply_preset(
        {
            "enable_conv": True,
            "target_module": ["Linear", "Conv2d"],
            "target_name": [],
            "module_algo_map": {},
            "name_algo_map": {},
        }
    )
    network = lycoris.create_lycoris(
        theirs,
        multiplier=1.0,
        linear_dim=dim,
        linear_alpha=3,
        conv_dim=dim,
        conv_alpha=5,
        **KINDS[kind],  # pyright: ignore[reportArgumentType]
    )
    network.apply_to()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng) * 0.2
            parameter.add_(noise if "dora_scale" not in name else noise.abs())
    theirs.eval()
    network.eval()
    network.save_weights(str(tmp_path / "file.safetensors"), torch.float32, {})
    x = torch.randn(2, 3, 5, 5, generator=rng)
    found = runtime.attach(ours, tmp_path / "file.safetensors")
    assert set(found.modules) == {"first", "second", "last"}
    with torch.no_grad():
        wanted = theirs(x)
        assert float((wanted - base(x)).abs().max()) > 1e-2
        close(ours(x), wanted, 1e-5)
        runtime.merge(ours)
        close(ours(x), wanted, 1e-5)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_fresh_shapes_are_those_of_lycoris(algorithm: str) -> None:
    """Same tensors with the same shapes from the same options."""
    wanted = {
        name: tuple(t.shape)
        for name, t in lycoris.create_lycoris(
            nn.Sequential(nn.Linear(12, 8)), 1.0, linear_dim=2, algo=algorithm
        )
        .loras[0]
        .state_dict()
        .items()
        if "alpha" not in name and "scalar" not in name
    }
    ours = runtime.attach(nn.Sequential(nn.Linear(12, 8)), algorithm, targets="0", rank=2)
    shapes = sorted(tuple(t.shape) for t in ours.modules["0"].tensors().values())
    assert shapes == sorted(wanted.values())
