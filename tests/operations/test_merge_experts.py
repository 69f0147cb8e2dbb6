"""Stacked experts against PEFT on tiny mixtures from config, whichever way the base stores them."""

# transformers, peft and diffusers are typed loosely
# pyright: reportArgumentType=false, reportCallIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import peftsurgery as ps
from peftsurgery.errors import CheckFailed, UnsupportedError
from tests.operations.merging import random, write

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}


def mixtral(intermediate: int = 48) -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(**COMMON, intermediate_size=intermediate, num_local_experts=4)
    )


def qwen() -> nn.Module:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **COMMON,
            intermediate_size=40,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=3,
        )
    )


def gpt_oss(intermediate: int = 48) -> nn.Module:
    return GptOssForCausalLM(
        GptOssConfig(**COMMON, intermediate_size=intermediate, num_local_experts=3, head_dim=8)
    )


def built(make: Callable[..., nn.Module], *arguments: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return make(*arguments).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


def attached(base: Path, folder: Path, *, seed: int = 2, **settings: object) -> nn.Module:
    """A PEFT model with random factors everywhere, saved to `folder`."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(lora_alpha=5, **settings)
    )
    normal = random(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * normal(*parameter.shape))
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("make", [mixtral, qwen, gpt_oss])
@pytest.mark.parametrize(
    "settings",
    [{"r": 3}, {"r": 2, "use_rslora": True}, {"r": 2, "alpha_pattern": {"experts.down_proj": 9}}],
)
def test_target_parameters(tmp_path: Path, make: Callable[..., nn.Module], settings: dict) -> None:
    built(make).save_pretrained(tmp_path / "base")
    model = attached(
        tmp_path / "base",
        tmp_path / "a",
        target_modules=["q_proj"],
        target_parameters=BOTH,
        **settings,
    )
    expected = logits(model)
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert float((expected - plain).abs().max()) > 0.05
    ps.merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out", verify="full")
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(result), expected, rtol=1e-4, atol=2e-5)
    merged = model.merge_and_unload().state_dict()
    for name, weight in result.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", BOTH)
def test_one_parameter_alone_and_the_router(tmp_path: Path, target: str) -> None:
    built(mixtral).save_pretrained(tmp_path / "base")
    model = attached(
        tmp_path / "base",
        tmp_path / "a",
        r=2,
        target_modules=[],
        target_parameters=[target, "mlp.gate.weight"],
    )
    expected = logits(model)
    ps.merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out", verify="full")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        expected,
        rtol=1e-4,
        atol=2e-5,
    )


@pytest.mark.parametrize(("make", "intermediate"), [(gpt_oss, 32), (mixtral, 32), (mixtral, 16)])
def test_square_experts_are_decided_by_the_config(
    tmp_path: Path, make: Callable[..., nn.Module], intermediate: int
) -> None:
    built(make, intermediate).save_pretrained(tmp_path / "base")
    model = attached(
        tmp_path / "base", tmp_path / "a", r=2, target_modules=[], target_parameters=BOTH
    )
    expected = logits(model)
    ps.merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out", verify="full")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        expected,
        rtol=1e-4,
        atol=2e-5,
    )


def test_square_experts_of_an_unknown_model_are_refused(tmp_path: Path) -> None:
    built(gpt_oss, 32).save_pretrained(tmp_path / "base")
    attached(tmp_path / "base", tmp_path / "a", r=2, target_modules=[], target_parameters=BOTH[1:])
    config = tmp_path / "base" / "config.json"
    config.write_text(
        config.read_text().replace('"model_type": "gpt_oss"', '"model_type": "somebody_elses"')
    )
    with pytest.raises(UnsupportedError, match="square"):
        ps.merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def stacked(folder: Path, target: Path) -> Path:
    """The same mixture with its experts stacked, as transformers holds them in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    target.mkdir()
    save_file(
        {n: t.contiguous().clone() for n, t in model.state_dict().items()},
        target / "model.safetensors",
    )
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_the_same_adapter_into_stacked_experts(
    tmp_path: Path, make: Callable[..., nn.Module]
) -> None:
    built(make).save_pretrained(tmp_path / "base")
    model = attached(
        tmp_path / "base", tmp_path / "a", r=2, target_modules=[], target_parameters=BOTH
    )
    base = stacked(tmp_path / "base", tmp_path / "stacked")
    ps.merge(base, [(tmp_path / "a", 0.5)], tmp_path / "out", verify="full")
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    merged = model.merge_and_unload().state_dict()
    for name, weight in after.items():
        expected = before[name] + 0.5 * (merged[name] - before[name])
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        after["model.layers.0.mlp.experts.down_proj"],
        before["model.layers.0.mlp.experts.down_proj"],
    )


@pytest.mark.parametrize("names", ["block_sparse_moe", "mlp"])
def test_adapters_of_single_experts_into_stacked_ones(tmp_path: Path, names: str) -> None:
    built(mixtral).save_pretrained(tmp_path / "base")
    base = stacked(tmp_path / "base", tmp_path / "stacked")
    leaves = (
        ("w1", "w3", "w2") if names == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
    )
    normal = random(7)
    file, deltas = {}, {}
    before = load_file(base / "model.safetensors")
    for layer in range(2):
        for expert in (0, 3):
            for row, leaf in enumerate(leaves):
                shape = (32, 48) if row == 2 else (48, 32)
                up, down = normal(shape[0], 2) * 0.1, normal(2, shape[1]) * 0.1
                key = f"base_model.model.model.layers.{layer}.{names}.experts.{expert}.{leaf}"
                file |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
                stored = "down_proj" if row == 2 else "gate_up_proj"
                name = f"model.layers.{layer}.mlp.experts.{stored}"
                whole = deltas.setdefault(
                    name, torch.zeros(before[name].shape, dtype=torch.float64)
                )
                start = 48 if row == 1 else 0
                whole[expert, start : start + shape[0]] += up.double() @ down.double()
    write(tmp_path / "a" / "adapter_model.safetensors", file)
    (tmp_path / "a" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2}'
    )
    ps.merge(base, [(tmp_path / "a", 1.0)], tmp_path / "out", verify="full")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in before.items():
        expected = weight.double() + deltas.get(name, 0)
        assert float((after[name].double() - expected).abs().max()) < 1e-6, name
    # and the same file into the release's own names
    ps.merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "single", verify="full")
    one_by_one = AutoModelForCausalLM.from_pretrained(tmp_path / "single").state_dict()
    for name, weight in after.items():
        torch.testing.assert_close(weight, one_by_one[name], rtol=0, atol=1e-6)


def test_records_that_fit_no_parameter_are_named(tmp_path: Path) -> None:
    built(mixtral).save_pretrained(tmp_path / "base")
    built(mixtral, 40).save_pretrained(tmp_path / "other")
    attached(tmp_path / "base", tmp_path / "a", r=2, target_modules=[], target_parameters=BOTH)
    with pytest.raises(CheckFailed, match="fits none of the stacked parameters"):
        ps.merge(tmp_path / "other", [(tmp_path / "a", 1.0)], tmp_path / "out")


def test_single_experts_of_a_square_stack_need_a_known_model(tmp_path: Path) -> None:
    built(gpt_oss, 32).save_pretrained(tmp_path / "base")
    key = "base_model.model.model.layers.0.mlp.experts.1.down_proj"
    normal = random(3)
    file = {f"{key}.lora_A.weight": normal(2, 32), f"{key}.lora_B.weight": normal(32, 2)}
    write(tmp_path / "a" / "adapter_model.safetensors", file)
    (tmp_path / "a" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2}'
    )
    with pytest.raises(UnsupportedError, match=r"square \(32 x 32\).*'gpt_oss'"):
        ps.merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
