"""AdaLoRA with pruned ranks, VeRA's drawn projections, transposed layers, Bone and Windows files,
and where PEFT errs."""

# peft is typed loosely
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from fixtures import bases
from peftsurgery import load_adapter, save_adapter
from peftsurgery.algorithms import VeRA, difference
from peftsurgery.algorithms.layer import Layer
from peftsurgery.algorithms.vera import drawn
from tests.interop.projections import (
    WITHIN,
    Block,
    applied,
    error,
    inputs,
    saved_base,
    shaken,
    trained,
)

# AdaLoRA ------------------------------------------------------------------------------------------


def allocated(alpha: int = 8) -> tuple[Block, PeftModel]:
    """A model whose allocator has pruned ranks, one module's to 0."""
    torch.manual_seed(5)
    base = Block()
    config = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=alpha, tinit=1, tfinal=1, total_step=8, deltaT=1,
        target_modules={"first", "second"},
    )  # fmt: skip
    model = get_peft_model(deepcopy(base), config)
    shaken(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(1, 8):
        out, _ = model(*inputs())
        out.square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return base, model.eval()


def test_pruned_ranks_keep_the_scale_of_the_first(tmp_path: Path) -> None:
    base, model = allocated()
    with torch.no_grad():
        wanted = model(*inputs())
    model.save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", architecture="generic")
    ranks = {m.rank for m in adapter.modules.values()}
    assert len(ranks) > 1
    assert max(r or 0 for r in ranks) <= 6
    for module in adapter.modules.values():
        assert float(module.scale) == pytest.approx(8 / (6 + 1e-5), rel=1e-7)
    ours = functional_call(base, applied(base, adapter), inputs())
    for found, expected in zip(ours, wanted, strict=True):
        assert error(found, expected) < 3 * WITHIN
    save_adapter(adapter, tmp_path / "ours", layout="peft")
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        for found, expected in zip(again(*inputs()), wanted, strict=True):
            assert error(found, expected) < 1e-6
    own = json.loads((tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8"))
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert own["rank_pattern"] == theirs["rank_pattern"]


def test_a_module_pruned_to_nothing_is_read_and_written(tmp_path: Path) -> None:
    base, model = trained("adalora_a8")
    pattern = {f"{n}.lora_E": [True] * 2 + [False] * 4 for n in ("first", "second", "conv")}
    pattern["inner.second.lora_E"] = [False] * 6
    for layer, kept in (("first", 2), ("second", 2), ("conv", 2), ("inner.second", 0)):
        tuner = model.base_model.model.get_submodule(layer)
        tuner.lora_E["default"].data[kept:] = 0
    model.peft_config["default"].rank_pattern = {
        k.replace("lora_E", "lora_E.default"): v for k, v in pattern.items()
    }
    with torch.no_grad():
        wanted = model(*inputs())
    model.save_pretrained(tmp_path / "peft")
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert stored["base_model.model.inner.second.lora_A"].shape == (0, 24)
    adapter = load_adapter(tmp_path / "peft", architecture="generic")
    assert adapter.modules["transformer:inner.second"].is_zero()
    assert adapter.modules["transformer:first"].rank == 2
    save_adapter(adapter, tmp_path / "ours", layout="peft")
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        for found, expected in zip(again(*inputs()), wanted, strict=True):
            assert error(found, expected) < 1e-6


def test_peft_itself_loses_the_scale_of_pruned_ranks_when_alpha_is_0(tmp_path: Path) -> None:
    """Trained with init_r / init_r, PEFT reloads it with kept / init_r; ours is the trained one."""
    base, model = allocated(alpha=0)
    with torch.no_grad():
        wanted = model(*inputs())
    model.save_pretrained(tmp_path / "peft")
    theirs = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "peft")).eval()
    adapter = load_adapter(tmp_path / "peft", architecture="generic")
    save_adapter(adapter, tmp_path / "ours", layout="peft")
    ours = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert error(theirs(*inputs())[0], wanted[0]) > 1e-3
        assert error(ours(*inputs())[0], wanted[0]) < 1e-6


# VeRA ---------------------------------------------------------------------------------------------


def test_drawn_projections_are_those_of_peft(tmp_path: Path) -> None:
    _, model = trained("vera_r64_False")
    down, up = drawn(11, 64, 36, 36)
    assert torch.equal(down, model.base_model.vera_A["default"])
    assert torch.equal(up, model.base_model.vera_B["default"])


def test_projections_that_were_not_saved_need_the_base_and_are_saved_with_it(
    tmp_path: Path,
) -> None:
    base, model = trained("vera_r5_False")
    model.save_pretrained(tmp_path / "peft")
    alone = load_adapter(tmp_path / "peft", architecture="generic")
    known = load_adapter(tmp_path / "peft", architecture="generic", base=saved_base(base, tmp_path))
    for path, module in alone.modules.items():
        assert isinstance(module, VeRA)
        assert module.down is None
        assert not module.additive
        assert difference(module, known.modules[path]) == 0
    save_adapter(known, tmp_path / "ours", layout="peft")
    keys = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert torch.equal(keys["base_model.vera_A"], model.base_model.vera_A["default"])
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["save_projection"] is True
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert torch.equal(again(*inputs())[0], model(*inputs())[0])


@pytest.mark.parametrize("kind", ["adalora", "vera", "fourierft"])
def test_layers_that_store_their_weight_transposed(kind: str, tmp_path: Path) -> None:
    base = bases.BUILDERS["tiny_gpt2"]().eval()
    targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    config = {
        "adalora": lambda: AdaLoraConfig(init_r=4, total_step=10, **targets),
        "vera": lambda: VeraConfig(r=6, save_projection=False, **targets),
        "fourierft": lambda: FourierFTConfig(n_frequency=30, **targets),
    }[kind]()
    model = get_peft_model(deepcopy(base), config)
    shaken(model)
    model.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", base=saved_tied(base, tmp_path))
    assert {m.stored for m in adapter.modules.values()} == {"conv1d"}
    state = applied(base, adapter)
    for key, wanted in deepcopy(model).merge_and_unload().state_dict().items():
        assert error(state[key], wanted) < WITHIN, key
    x = torch.randn(3, 5, base.config.n_embd)
    path, module = next(iter(adapter.modules.items()))
    layer = model.base_model.model.get_submodule(path.partition(":")[2])
    module = module.on(tuple(state[f"{path.partition(':')[2]}.weight"].shape))
    with torch.no_grad():
        wanted = layer(x) - layer.base_layer(x)
        assert error(module.change(x, Layer("hf_conv1d")), wanted) < 10 * WITHIN
    save_adapter(adapter, tmp_path / "b", layout="peft")
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "b")).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def saved_tied(base: nn.Module, folder: Path) -> Path:
    path = folder / "base.safetensors"
    save_file({k: t.clone() for k, t in base.state_dict().items()}, path)
    return path


# Bone, Windows, and where PEFT errs ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["miss_r5", "miss_bat_r12"])
def test_bone_files_are_miss_files(name: str, tmp_path: Path) -> None:
    base, model = trained(name)
    model.save_pretrained(tmp_path)
    wanted = load_adapter(tmp_path, architecture="generic")
    path = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("miss_", "bone_"): t for k, t in load_file(path).items()}, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    config["peft_type"] = "BONE"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = load_adapter(tmp_path, architecture="generic")
    for key, module in wanted.modules.items():
        assert difference(found.modules[key], module) == 0
    save_adapter(found, tmp_path / "ours", layout="peft")
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert torch.equal(again(*inputs())[0], model(*inputs())[0])


def test_indices_that_windows_stores_as_floats(tmp_path: Path) -> None:
    _, model = trained("shira_r4")
    model.save_pretrained(tmp_path)
    wanted = load_adapter(tmp_path, architecture="generic")
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: t.float() for k, t in load_file(path).items()}, path)
    found = load_adapter(tmp_path, architecture="generic")
    for key, module in wanted.modules.items():
        assert difference(found.modules[key], module) == 0
    save_adapter(found, tmp_path / "ours", layout="peft")
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert stored["base_model.model.first.shira_indices"].dtype == torch.int32


def test_two_c3a_adapters_of_peft_feed_one_another(tmp_path: Path) -> None:
    """Its forward hands the first adapter's change to the second as input; its merge adds both."""
    config = C3AConfig(block_size=6, target_modules=["square"])
    torch.manual_seed(5)

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.square = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.square(x)

    base = Square()
    both = get_peft_model(deepcopy(base), config)
    both.add_adapter("second", deepcopy(config))
    both.base_model.set_adapter(["default", "second"])
    for key, parameter in both.named_parameters():
        if "c3a_kernel" in key:
            parameter.data.normal_()
    x = inputs()[0]
    with torch.no_grad():
        run = both(x)
        merged = both.merge_and_unload(adapter_names=["default", "second"])(x)
    assert error(run, merged) > 1e-2
