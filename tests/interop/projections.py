"""A small model with PEFT's AdaLoRA, VeRA, FourierFT, C3A, MiSS or SHiRA on it, random numbers in
place of training."""

# peft is typed loosely
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from peftsurgery.adapter import Adapter

WITHIN = 3e-6  # of the norm
PREFIXES = ("lora_", "vera_", "fourierft_", "c3a_", "miss_", "shira_")


class Block(nn.Module):
    """Layers of the kinds that PEFT's tuners know; `second` is also the end of a longer name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 36)
        self.second = nn.Linear(36, 24, bias=False)
        self.inner = nn.ModuleDict({"second": nn.Linear(24, 12)})
        self.conv = nn.Conv2d(4, 10, 3, padding=1)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + self.second(torch.tanh(self.first(x)))
        return self.inner["second"](torch.tanh(hidden)), self.conv(image)


LINEAR = ["first", "second", "inner.second"]


def _cases() -> Iterator[tuple[str, PeftConfig, list[str]]]:
    for alpha in (8, 3, 0):
        config = AdaLoraConfig(init_r=6, lora_alpha=alpha, total_step=10)
        yield f"adalora_a{alpha}", config, [*LINEAR, "conv"]
    yield "adalora_wide", AdaLoraConfig(init_r=40, total_step=10), LINEAR
    for saved in (True, False):
        for r, seed in ((5, 0), (64, 11)):
            config = VeraConfig(r=r, projection_prng_key=seed, save_projection=saved)
            yield f"vera_r{r}_{saved}", config, LINEAR
    for n in (1, 7, 200):
        yield f"fourierft_n{n}", FourierFTConfig(n_frequency=n, scaling=90.5), LINEAR
    config = FourierFTConfig(
        n_frequency=9, n_frequency_pattern={"inner.second": 4, "first": 11}, random_loc_seed=5
    )
    yield "fourierft_pattern", config, LINEAR
    for b in (1, 4, 12):
        yield f"c3a_b{b}", C3AConfig(block_size=b), LINEAR
    config = C3AConfig(block_size=6, block_size_pattern={"inner.second": 4})
    yield "c3a_pattern", config, LINEAR
    for r in (1, 5, 12, 23):
        yield f"miss_r{r}", MissConfig(r=r), LINEAR
    yield "miss_random", MissConfig(r=7, init_weights=False), LINEAR
    for r, m in ((5, 4), (6, 12), (3, 1)):
        yield f"miss_mini_r{r}_m{m}", MissConfig(r=r, init_weights="mini", mini_r=m), LINEAR
    for r in (2, 12):
        yield f"miss_bat_r{r}", MissConfig(r=r, init_weights="bat"), LINEAR
    for r in (1, 4):
        yield f"shira_r{r}", ShiraConfig(r=r, random_seed=r), LINEAR


CASES = {name: (config, targets) for name, config, targets in _cases()}


def inputs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(2, 5, 24, generator=random), torch.randn(2, 4, 6, 7, generator=random)


def shaken(model: nn.Module, seed: int = 7) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))


def trained(name: str) -> tuple[Block, PeftModel]:
    config, targets = CASES[name]
    config = deepcopy(config)
    config.target_modules = {"first", "second"} | ({"conv"} & set(targets))
    torch.manual_seed(5)
    base = Block()
    model = get_peft_model(deepcopy(base), config)
    shaken(model)
    return base, model.eval()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def saved_base(base: nn.Module, folder: Path) -> Path:
    path = folder / "base.safetensors"
    save_file({k: t.contiguous() for k, t in base.state_dict().items()}, path)
    return path


def applied(base: nn.Module, adapter: Adapter, strength: float = 1.0) -> dict[str, Tensor]:
    """The base's state with every module merged."""
    state = {k: t.detach().clone() for k, t in base.state_dict().items()}
    for path, module in adapter.modules.items():
        name = path.partition(":")[2]
        bias = state.get(f"{name}.bias")
        weight, bias = module.merged(state[f"{name}.weight"], bias, strength)
        state[f"{name}.weight"] = weight.detach()
        if bias is not None:
            state[f"{name}.bias"] = bias.detach()
    return state
