"""PEFT reads the folders we write, and we read the folders PEFT writes: same outputs, no key too
many or too few."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from peftsurgery import load_adapter, save_adapter
from tests.interop import models

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden"
INDEX: dict[str, dict] = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))["goldens"]
OWN = ("lora_", "hada_", "lokr_", "modules_to_save")
WITHIN = 1e-5


def attached(base: nn.Module, folder: Path) -> PeftModel:
    """The folder on the base through PEFT's own loader, which must miss nothing and leave nothing
    over."""
    model = PeftModel.from_pretrained(base, str(folder)).float().eval()  # pyright: ignore[reportArgumentType]
    result = set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if any(own in key for own in OWN)]
    return model


# what PEFT wrote ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fresh adapter for PEFT to write: random, never zero anywhere."""

    name: str
    base: str
    config: PeftConfig
    component: str = "model"
    architecture: str = "llm"


UNET = ("tiny_sd_pipeline", "unet", "sd1")
MIXED = [
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.1.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.1.conv2",
]
SUFFIXED = {"base": "tiny_flux_pipeline", "component": "transformer", "architecture": "flux"}


def _cases() -> Iterator[Case]:
    base, component, architecture = UNET
    for name, config in {
        "conv": LoraConfig(r=3, lora_alpha=5, rank_pattern={"proj_in": 2}, target_modules=MIXED),
        "conv_rslora": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=MIXED),
        "conv_dora": LoraConfig(r=3, lora_alpha=2, use_dora=True, target_modules=MIXED),
        "conv_bias": LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=[*MIXED[1:]]),
        "conv_loha": LoHaConfig(r=3, alpha=7, target_modules=MIXED),
        "conv_loha_effective": LoHaConfig(
            r=3, alpha=7, use_effective_conv2d=True, target_modules=MIXED
        ),
        "conv_lokr": LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=MIXED),
        "conv_lokr_effective": LoKrConfig(
            r=2, alpha=3, use_effective_conv2d=True, decompose_both=True, target_modules=MIXED
        ),
        "conv_lokr_full": LoKrConfig(r=600, alpha=300, target_modules=MIXED),
    }.items():
        yield Case(name, base, config, component, architecture)
    gpt2 = ["c_attn", "c_proj", "c_fc"]
    llama = ["q_proj", "k_proj", "down_proj"]
    for name, base, config in (
        (
            "conv1d_dora",
            "tiny_gpt2",
            LoraConfig(r=3, lora_alpha=5, fan_in_fan_out=True, use_dora=True, target_modules=gpt2),
        ),
        (
            "conv1d_patterns",
            "tiny_gpt2",
            LoraConfig(
                r=4,
                lora_alpha=4,
                fan_in_fan_out=True,
                use_rslora=True,
                rank_pattern={"c_fc": 2},
                alpha_pattern={r"h\.1\.attn\.c_attn": 9},
                target_modules=gpt2,
            ),
        ),
        (
            "embedding_and_head",
            "tiny_llama",
            LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "o_proj"]),
        ),
        (
            "bias_lora_only",
            "tiny_llama(biases=True)",
            LoraConfig(r=3, lora_alpha=5, bias="lora_only", target_modules=llama),
        ),
        (
            "dora_bias",
            "tiny_llama(biases=True)",
            LoraConfig(r=3, lora_alpha=5, use_dora=True, bias="all", target_modules=llama),
        ),
        (
            "saved_norm",
            "tiny_llama",
            LoraConfig(
                r=3, lora_alpha=5, target_modules=llama, modules_to_save=["norm", "lm_head"]
            ),
        ),
        (
            "one_layer",
            "tiny_llama",
            LoraConfig(r=3, lora_alpha=5, target_modules=llama, layers_to_transform=[1]),
        ),
        (
            "regular_expression",
            "tiny_llama",
            LoraConfig(r=3, lora_alpha=5, target_modules=r".*layers\.\d\.self_attn\.[qv]_proj"),
        ),
        ("all_linear", "tiny_llama", LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")),
    ):
        yield Case(name, base, config)
    yield Case(
        "suffixes",  # proj_out is both top level and the tail of other names
        config=LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=["x_embedder", "proj_out", "norm_out.linear", "to_k"],
            rank_pattern={"^proj_out": 4},
            alpha_pattern={"^proj_out": 7, "to_k": 5},
        ),
        **SUFFIXED,
    )


CASES = {case.name: case for case in _cases()}


def written_by_peft(case: Case, base: nn.Module, folder: Path) -> None:
    """A random adapter of that config on the base, saved by PEFT; every tensor is a few times its
    usual size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = peft.get_peft_model(base, case.config)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                if "magnitude" in name or "modules_to_save" in name or parameter.ndim == 1:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
                else:
                    parameter.copy_(torch.randn_like(parameter) * 0.25)
    model.save_pretrained(str(folder))


def agreement(
    source: Path,
    fresh: Callable[[], nn.Module],
    untouched: nn.Module,
    plain: Tensor,
    component: str,
    architecture: str | None,
    tmp_path: Path,
) -> dict[str, float]:
    """Errors, relative to what the adapter changes, of our merged weights and of the folder we
    write."""
    adapter = load_adapter(source, architecture=architecture)
    expected = models.run(attached(fresh(), source))
    ours = tmp_path / "ours"
    save_adapter(adapter, ours, layout="peft")
    errors = {"folder": models.distance(models.run(attached(fresh(), ours)), expected, plain)}
    if "layer_replication" not in adapter.config:  # its adapter layers outnumber the base's
        merged = models.run_merged(untouched, adapter.of(component))
        errors["merged"] = models.distance(merged, expected, plain)
    return errors


PEFT_GOLDENS = [name for name, entry in INDEX.items() if entry["library"] == "peft"]


@pytest.mark.parametrize("name", PEFT_GOLDENS)
def test_trained_folders(name: str, untouched, plain_output, tmp_path: Path) -> None:
    base = INDEX[name]["base"]
    errors = agreement(
        GOLDEN / name,
        lambda: models.base_parts(base)["model"],
        untouched(base)["model"],
        plain_output(base),
        "model",
        None,
        tmp_path,
    )
    assert all(error < WITHIN for error in errors.values()), errors


@pytest.mark.parametrize("name", CASES)
def test_fresh_folders(name: str, untouched, plain_output, tmp_path: Path) -> None:
    case = CASES[name]

    def fresh() -> nn.Module:
        return models.base_parts(case.base)[case.component]

    written_by_peft(case, fresh(), tmp_path / "theirs")
    errors = agreement(
        tmp_path / "theirs",
        fresh,
        untouched(case.base)[case.component],
        plain_output(case.base, case.component),
        case.component,
        case.architecture,
        tmp_path,
    )
    assert all(error < WITHIN for error in errors.values()), errors
