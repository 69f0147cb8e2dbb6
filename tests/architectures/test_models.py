"""Against model classes and converters of transformers and diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from diffusers.utils import state_dict_utils
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForSeq2SeqLM as Seq2Seq

from peftsurgery import architectures
from peftsurgery.architectures import flatten

from .listings import shapes

CAUSAL = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "gpt_bigcode",
    "falcon",
    "bloom",
    "opt",
    "stablelm",
    "starcoder2",
    "olmo2",
)
MASKED = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "mpnet")
MODELS = [
    *((name, AutoModelForCausalLM) for name in CAUSAL),
    *((name, AutoModelForMaskedLM) for name in MASKED),
    ("t5", Seq2Seq),
    ("mt5", Seq2Seq),
]
HEADS = (
    "cls.predictions",
    "embeddings_project",
    "generator_",
    "lm_head.",
    "relative_attention_bias",
)


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_flattened_names_of_language_models(name: str, kind: type) -> None:
    two = {} if name == "gpt_neo" else {"num_hidden_layers": 2}
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(name, **two))  # type: ignore[attr-defined]
    table = architectures.get("llm").components["model"]
    leaves = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        or type(module).__name__ in ("Conv1D", "LayerNorm")
        or type(module).__name__.endswith("RMSNorm")
    ]
    assert leaves
    for path in leaves:
        if path.startswith(HEADS) or path.endswith("embeddings_project"):
            continue
        flat = table.site_flat("hf", flatten(path))
        assert flat is not None, path
        assert flat.parts == (path,)
        site = table.site("hf", path)
        assert site == flat
        assert table.site_of("hf", path) == flat


@pytest.mark.parametrize(("architecture", "listing"), [("sd1", "sd15"), ("sdxl", "sdxl")])
def test_controlnet_names_agree_with_diffusers(architecture: str, listing: str) -> None:
    table = architectures.get(architecture).components["controlnet"]
    home = list(shapes(f"base__diffusers_{listing}_controlnet"))
    marks: dict[str, torch.Tensor] = {}
    for i, name in enumerate(home):
        site = table.tensor_of("ldm", name)
        assert site is not None
        assert table.tensor("ldm", site.name) == site
        marks[site.name] = torch.tensor(i)
    assert len(marks) == len(home)
    theirs = state_dict_utils.convert_sai_sd_control_lora_state_dict_to_peft(marks)
    assert {home[int(mark)]: name for name, mark in theirs.items() if mark is not None} == {
        name: name for name in home
    }


def test_flux_rows_agree_with_diffusers() -> None:
    """Order, proportions and the swapped halves: the converter's rows are those of the sites."""
    table = architectures.get("flux").components["transformer"]
    theirs_in: dict[str, torch.Tensor] = {}
    for name, shape in shapes("published__flux_control_lora_format").items():
        small = (1, 4) if "lora_A" in name else (shape[0], 1) if len(shape) == 2 else shape
        theirs_in[name] = torch.rand(small)
    ours_in = dict(theirs_in)
    theirs = lora_conversion_utils._convert_bfl_flux_control_lora_to_diffusers(theirs_in)
    checked = 0
    for name, value in ours_in.items():
        if not name.endswith("lora_B.weight"):
            continue
        site = table.site("bfl", name.removesuffix(".lora_B.weight"))
        assert site is not None, name
        if site.operator == "swap_halves":
            value = torch.cat(value.chunk(2)[::-1])
        for part, (start, stop) in zip(site.parts, site.row_ranges(len(value)), strict=True):
            assert torch.equal(theirs[f"transformer.{part}.lora_B.weight"], value[start:stop])
            checked += 1
    assert checked == 19 * 14 + 38 * 6 + 10
