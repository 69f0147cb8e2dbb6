"""PEFT's OFT, BOFT, HRA and IA3: its merged weights and its outputs against ours, from folders it
wrote; and it reads the folders we write."""

# peft is typed loosely
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    OFTConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.boft import layer as boft_layer
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call

from fixtures import bases
from peftsurgery import load_adapter, save_adapter

WITHIN = 3e-6  # of the norm


class Block(nn.Module):
    """One layer of each kind that PEFT's tuners know, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.first = nn.Linear(24, 36)
        self.second = nn.Linear(36, 24, bias=False)
        self.square = nn.Linear(24, 24)
        self.conv = nn.Conv2d(4, 10, 3, padding=1)
        self.point = nn.Conv2d(10, 6, 1, bias=False)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(ids)
        hidden = hidden + self.second(torch.tanh(self.first(hidden)))
        return self.square(hidden), self.point(torch.tanh(self.conv(image)))


LINEAR = ["first", "second", "square"]
ALL = [*LINEAR, "conv", "point"]


def _cases() -> Iterator[tuple[str, PeftConfig, list[str]]]:
    for exact in (False, True):
        kind = "exact" if exact else "neumann"
        common = {"use_cayley_neumann": not exact}
        for size in (2, 4, 12):
            config = OFTConfig(r=0, oft_block_size=size, **common)
            yield f"oft_{kind}_b{size}", config, [*LINEAR, "embed"]
        yield f"oft_{kind}_r3", OFTConfig(r=3, oft_block_size=0, **common), LINEAR
        yield f"oft_{kind}_adjusted", OFTConfig(r=0, oft_block_size=5, **common), LINEAR
        yield (
            f"oft_{kind}_shared",
            OFTConfig(r=0, oft_block_size=6, block_share=True, **common),
            LINEAR,
        )
        yield (
            f"oft_{kind}_coft",
            OFTConfig(r=0, oft_block_size=6, coft=True, eps=0.1, **common),
            [*LINEAR, "embed"],
        )
        yield f"oft_{kind}_conv", OFTConfig(r=0, oft_block_size=2, **common), ALL
    for terms in (2, 3, 4, 7):
        config = OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=terms)
        yield f"oft_terms{terms}", config, LINEAR
    for depth, size in ((1, 4), (1, 3), (2, 2), (2, 6), (3, 2)):
        config = BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=depth)
        yield f"boft_m{depth}_b{size}", config, ["first", "square"]
    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=1)
    yield "boft_conv", config, ["conv", "point", "second"]
    config = BOFTConfig(boft_block_num=2, boft_block_size=0, boft_n_butterfly_factor=2)
    yield "boft_num", config, ["first", "second"]
    for r in (2, 3, 8):
        for orthogonal in (False, True):
            yield f"hra_r{r}_{orthogonal}", HRAConfig(r=r, apply_GS=orthogonal), ALL[:4]
    yield "ia3", IA3Config(target_modules=ALL, feedforward_modules=["second", "point"]), ALL
    yield "ia3_out", IA3Config(target_modules=LINEAR, feedforward_modules=[]), LINEAR


CASES = {name: (config, targets) for name, config, targets in _cases()}


@pytest.fixture
def butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's CUDA op, which only lays blocks on a diagonal, in plain torch: without it PEFT has
    depth 1 alone."""

    class Diagonal:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in blocks])

    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", Diagonal)


def inputs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 11, (2, 5), generator=random)
    return ids, torch.randn(2, 4, 6, 7, generator=random)


def trained(name: str) -> tuple[Block, PeftModel]:
    config, targets = CASES[name]
    config = deepcopy(config)
    config.target_modules = set(targets)
    torch.manual_seed(5)
    base = Block()
    model = get_peft_model(deepcopy(base), config)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=random)
                parameter.copy_(noise if "hra_u" in key else parameter + 0.3 * noise)
    return base, model.eval()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def applied(base: Block, adapter, strength: float = 1.0) -> dict[str, Tensor]:
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


@pytest.mark.parametrize("name", CASES)
def test_weights_and_outputs_are_those_of_peft(
    name: str, tmp_path: Path, butterflies: None
) -> None:
    base, model = trained(name)
    with torch.no_grad():
        peft_output = model(*inputs())
    model.save_pretrained(tmp_path)
    state = applied(base, load_adapter(tmp_path, architecture="generic"))
    merged = deepcopy(model).merge_and_unload().state_dict()
    for key, wanted in merged.items():
        assert error(state[key], wanted) < WITHIN, key
    moved = sum(not torch.equal(state[k], t) for k, t in base.state_dict().items())
    assert moved >= len(CASES[name][1])
    ours = functional_call(base, state, inputs())
    for found, wanted in zip(ours, peft_output, strict=True):
        if name.startswith("oft") and "conv" in CASES[name][1] and wanted.ndim == 4:
            # its forward folds overlapping patches on top of each other, unlike its merge
            assert error(found, wanted) > 0.1
        else:
            assert error(found, wanted) < WITHIN * 3


@pytest.mark.parametrize("feedforward", [[], ["c_fc"], ["c_attn", "mlp.c_proj"]])
def test_ia3_on_layers_that_store_their_weight_transposed(
    feedforward: list[str], tmp_path: Path
) -> None:
    base = bases.BUILDERS["tiny_gpt2"]().eval()
    config = IA3Config(
        target_modules=["c_attn", "c_fc", "mlp.c_proj"],
        feedforward_modules=feedforward,
        fan_in_fan_out=True,
    )
    model = get_peft_model(deepcopy(base), config)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert {m.stored for m in adapter.modules.values()} == {"conv1d"}
    state = applied(base, adapter)
    for key, wanted in deepcopy(model).merge_and_unload().state_dict().items():
        assert error(state[key], wanted) < WITHIN, key
    save_adapter(adapter, tmp_path / "b", layout="peft")
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "b")).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_we_write(name: str, tmp_path: Path, butterflies: None) -> None:
    base, model = trained(name)
    model.save_pretrained(tmp_path / "peft")
    ours = tmp_path / "ours"
    save_adapter(load_adapter(tmp_path / "peft", architecture="generic"), ours, layout="peft")
    with torch.no_grad():
        wanted = model(*inputs())
    again = PeftModel.from_pretrained(deepcopy(base), str(ours)).eval()
    result = set_peft_model_state_dict(again, load_peft_weights(str(ours)))
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if any(p in k for p in ("oft_", "hra_", "ia3_"))]
    with torch.no_grad():
        for found, expected in zip(again(*inputs()), wanted, strict=True):
            assert torch.equal(found, expected)
    own = json.loads((ours / "adapter_config.json").read_text(encoding="utf-8"))
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    for field, value in own.items():
        if field == "oft_block_size" and value != theirs[field]:
            continue  # the size PEFT moved to, instead of the one it was asked for
        if field in ("peft_version", "inference_mode", "num_cayley_neumann_terms"):
            continue
        if isinstance(value, list):
            value, theirs[field] = sorted(value), sorted(theirs[field])
        assert value == theirs[field], field
