"""Adapters of other tools as PEFT folders: PEFT's outputs are those of our merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from peftsurgery import convert, load_adapter, save_adapter
from peftsurgery.errors import UnsupportedError
from tests.interop import models
from tests.interop.test_peft_folders import CASES, GOLDEN, INDEX, WITHIN, attached, written_by_peft

FAMILY = {"tiny_sd_pipeline": "sd1", "tiny_sdxl_pipeline": "sdxl", "tiny_flux_pipeline": "flux"}
# text encoders: written with the `text_model` level, which PEFT cannot drop (see the last test)
FROM_OTHERS = {
    "diffusers_sd_lora": "unet",
    "diffusers_sd_dora": "unet",
    "diffusers_sdxl_lora": "unet",
    "diffusers_flux_lora": "transformer",
    "diffusers_sd_lora_as_kohya": "unet",
    "lycoris_lora": "unet",
    "lycoris_kohya_rslora": "unet",
    "lycoris_loha": "unet",
    "lycoris_loha_tucker": "unet",
    "lycoris_lokr": "unet",
    "lycoris_lokr_tucker": "unet",
}


def check(
    folder: Path,
    base: str,
    component: str,
    modules: models.Modules,
    plain: Tensor,
    untouched: nn.Module,
) -> None:
    """PEFT's output with the folder is ours with the merged weights."""
    model = attached(models.base_parts(base)[component], folder)
    expected = models.run_merged(untouched, modules)
    assert models.distance(models.run(model), expected, plain) < WITHIN


@pytest.mark.parametrize(("name", "component"), FROM_OTHERS.items())
def test_golden(name: str, component: str, untouched, plain_output, tmp_path: Path) -> None:
    entry = INDEX[name]
    base = entry["base"]
    adapter = load_adapter(GOLDEN / entry["path"], architecture=FAMILY[base])
    convert(
        GOLDEN / entry["path"],
        tmp_path / "ours",
        to="peft",
        architecture=FAMILY[base],
        only=[component],
    )
    check(
        tmp_path / "ours",
        base,
        component,
        adapter.of(component),
        plain_output(base, component),
        untouched(base)[component],
    )


def test_lokr_blocks_that_no_decompose_factor_gives(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="decompose_factor"):
        convert(
            GOLDEN / "lycoris_lokr_full.safetensors",
            tmp_path / "ours",
            to="peft",
            architecture="sd1",
        )


@pytest.mark.parametrize("rank", [2, 6])
def test_names_that_end_other_names(
    rank: int, untouched, plain_output, random, tmp_path: Path
) -> None:
    """FLUX has a top-level proj_out and one in every single block: each keeps its own rank and
    scale."""
    base, component = "tiny_flux_pipeline", "transformer"
    model = untouched(base)[component]
    found = models.layers(model, "proj_out", "single_transformer_blocks.1.proj_out", "*.attn.to_k")
    modules = models.random_loras(found, random, ranks=(3,), alphas=(5, 2))
    modules["proj_out"] = models.lora_for(models.weight_of(model, "proj_out"), rank, 1.75, random)
    save_adapter(models.adapter_of("flux", {component: modules}), tmp_path / "ours", layout="peft")
    check(tmp_path / "ours", base, component, modules, plain_output(base, component), model)
    read = load_adapter(tmp_path / "ours", architecture="flux").of(component)
    assert {path: (m.rank, float(m.scale)) for path, m in read.items()} == {
        path: (m.rank, float(m.scale)) for path, m in modules.items()
    }


@pytest.mark.parametrize("fold", [False, True])
def test_alpha_folded_or_in_the_config(
    fold: bool, untouched, plain_output, random, tmp_path: Path
) -> None:
    base = "tiny_llama"
    model = untouched(base)["model"]
    modules = models.random_loras(models.layers(model, "*_proj"), random)
    adapter = models.adapter_of("llm", {"model": modules})
    save_adapter(adapter, tmp_path / "ours", layout="peft", fold_alpha=fold)
    check(tmp_path / "ours", base, "model", modules, plain_output(base), model)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (
        config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
    ) == fold


def test_what_was_dropped_is_not_built_again(untouched, plain_output, tmp_path: Path) -> None:
    """target_modules names what is in the folder, not what was in the source."""
    case = CASES["saved_norm"]
    written_by_peft(case, models.base_parts(case.base)["model"], tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", to="peft", drop=["*.k_proj", "*lm_head*"])
    adapter = load_adapter(tmp_path / "ours")
    assert not [path for path in adapter.modules if "k_proj" in path or "lm_head" in path]
    model = attached(models.base_parts(case.base)["model"], tmp_path / "ours")
    assert not [name for name, _ in model.named_parameters() if "k_proj.lora_" in name]
    expected = models.run_merged(untouched(case.base)["model"], adapter.of("model"))
    assert models.distance(models.run(model), expected, plain_output(case.base)) < WITHIN


def test_text_encoder_with_its_text_model_level(
    untouched, plain_output, random, tmp_path: Path
) -> None:
    """CLIPTextModelWithProjection still has the level, and a top-level text_projection makes the
    targets a pattern."""
    base, component = "tiny_sdxl_pipeline", "text_encoder_2"
    model = untouched(base)[component]
    modules = models.random_loras(
        models.layers(model, "*_proj", "*.fc1", "text_projection"), random
    )
    save_adapter(models.adapter_of("sdxl", {component: modules}), tmp_path / "ours", layout="peft")
    check(tmp_path / "ours", base, component, modules, plain_output(base, component), model)


def test_text_encoder_without_its_text_model_level(
    untouched, plain_output, random, tmp_path: Path
) -> None:
    """transformers >= 5.6 dropped `text_model` in CLIPTextModel; its load_adapter reads our names
    all the same.

    PeftModel matches the targets, does not find the tensors and stays at zero with a warning; right
    would be to rename them as transformers does.
    """
    base, component = "tiny_sd_pipeline", "text_encoder"
    plain = plain_output(base, component)
    modules = models.random_loras(
        models.layers(untouched(base)[component], "*_proj", "*.fc2"), random
    )
    save_adapter(models.adapter_of("sd1", {component: modules}), tmp_path / "ours", layout="peft")
    model = models.base_parts(base)[component]
    model.load_adapter(str(tmp_path / "ours"))  # pyright: ignore[reportCallIssue]
    expected = models.run_merged(untouched(base)[component], modules)
    assert models.distance(models.run(model), expected, plain) < WITHIN
    with pytest.warns(UserWarning, match="missing adapter keys"):
        silent = PeftModel.from_pretrained(
            models.base_parts(base)[component], str(tmp_path / "ours")
        )  # pyright: ignore[reportArgumentType]
    assert torch.equal(models.run(silent), plain)
