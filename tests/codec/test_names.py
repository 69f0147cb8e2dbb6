"""Odd names: wrapper prefixes, doubled prefixes, adapter names, both vocabularies in one file, and
names given twice.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftsurgery.codec import load_adapter
from peftsurgery.errors import UsageError
from peftsurgery.operations.convert import convert
from peftsurgery.operations.inspect import inspect
from tests.codec.build import dense, gap, write
from tests.codec.parts import Maker, Tensors

DOTTED = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
FLAT = DOTTED.replace(".", "_")
HOME = f"unet:{DOTTED}"
LAYER = "model.layers.0.self_attn.q_proj"

# a PEFT-style name as found in the wild -> what is repaired
DOTTED_REPAIRS = {
    f"_orig_mod.unet.{DOTTED}": "_orig_mod.",
    f"unet._orig_mod.{DOTTED}": "_orig_mod.",
    f"module.unet.{DOTTED}": "module.",
    f"unet.module.{DOTTED}": "module.",
    f"_fsdp_wrapped_module.unet.{DOTTED}": "_fsdp_wrapped_module.",
    "unet." + DOTTED.replace(".attn2", "._fsdp_wrapped_module.attn2"): "_fsdp_wrapped_module.",
    "unet." + DOTTED.replace(".attn2", "._checkpoint_wrapped_module.attn2"): "_checkpoint_wrapped_",
    f"unet.{DOTTED}.base_layer": "base_layer.",
    f"unet.unet.{DOTTED}": "unet.unet.",
    f"unet.base_model.model.{DOTTED}": "unet.base_model.model.",
    f"base_model.model.unet.{DOTTED}": "base_model.model.unet.",
    f"base_model.model.base_model.model.{DOTTED}": "base_model.model.base_model.model.",
}
FLAT_REPAIRS = {
    f"lora_unet__{FLAT}": "lora_unet__",
    f"lora_unet_unet_{FLAT}": "lora_unet_unet_",
    f"lora_unet_{FLAT}_": "trailing underscore",
    f"lora_unet__orig_mod_{FLAT}": "_orig_mod.",
    "lora_unet_" + FLAT.replace("attentions", "_fsdp_wrapped_module_attentions"): "_fsdp_wrapped",
}
LLM_REPAIRS = {
    f"base_model.model._orig_mod.{LAYER}": "_orig_mod.",
    f"base_model.model.module.{LAYER}": "module.",
    f"base_model.model.base_model.model.{LAYER}": "base_model.model.base_model.model.",
    f"base_model.model.{LAYER}.base_layer": "base_layer.",
}


def check_repair(folder: Path, tensors: Tensors, home: str, what: str) -> None:
    source = write(folder / "in.safetensors", tensors)
    adapter = load_adapter(source)
    assert list(adapter.modules) == [home]
    named = [f for f in adapter.findings if f.code == "repaired-names"]
    assert len(named) == 1
    assert what in named[0].message
    there = folder / "out"
    report = convert(source, there, to="peft")
    assert "repaired-names" in [f.code for f in report.findings]
    assert all(f.code != "repaired-names" for f in load_adapter(there).findings)
    assert "repaired-names" in [f.code for f in inspect(source).findings]


@pytest.mark.parametrize("name", DOTTED_REPAIRS)
def test_dotted_names_are_repaired_by_name(name: str, tmp_path: Path) -> None:
    tensors = Maker(1, style="peft").lora(name, 320, 768)
    check_repair(tmp_path, tensors, HOME, DOTTED_REPAIRS[name])


@pytest.mark.parametrize("name", FLAT_REPAIRS)
def test_flattened_names_are_repaired_by_name(name: str, tmp_path: Path) -> None:
    check_repair(tmp_path, Maker(1).lora(name, 320, 768), HOME, FLAT_REPAIRS[name])


@pytest.mark.parametrize("name", LLM_REPAIRS)
def test_language_model_names_are_repaired_too(name: str, tmp_path: Path) -> None:
    """Tables of language models take nearly any name, so a wrapper must not pass for a module."""
    tensors = Maker(1, style="peft").lora(name, 32, 32)
    check_repair(tmp_path, tensors, f"model:{LAYER}", LLM_REPAIRS[name])


def test_a_module_called_module_stays(tmp_path: Path) -> None:
    name = "encoder.module.layers.0.self_attn.q_proj"
    tensors = Maker(1, style="peft").lora(f"base_model.model.{name}", 32, 32)
    assert list(load_adapter(write(tmp_path / "a.safetensors", tensors)).modules) == [
        f"model:{name}"
    ]


def test_two_wrapped_names_of_one_module_are_refused(tmp_path: Path) -> None:
    maker = Maker(1, style="peft")
    tensors = {
        **maker.lora(f"unet.{DOTTED}", 320, 768),
        **maker.lora(f"unet._orig_mod.{DOTTED}", 320, 768),
    }
    with pytest.raises(UsageError, match="twice"):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("label", ["default", "my-style_2"])
def test_named_adapters(label: str, tmp_path: Path) -> None:
    plain = Maker(1, style="peft").lora(f"base_model.model.{LAYER}", 32, 32)
    named = {k.replace(".weight", f".{label}.weight"): t for k, t in plain.items()}
    adapter = load_adapter(write(tmp_path / "a.safetensors", named))
    assert list(adapter.modules) == [f"model:{LAYER}"]
    assert "named-adapter" in [f.code for f in adapter.findings]
    plainly = load_adapter(write(tmp_path / "b.safetensors", plain))
    assert gap(*(dense(a.modules[f"model:{LAYER}"]) for a in (adapter, plainly))) == 0


def test_two_named_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    plain = Maker(1, style="peft").lora(f"base_model.model.{LAYER}", 32, 32)
    both = {
        k.replace(".weight", f".{n}.weight"): t for n in ("one", "two") for k, t in plain.items()
    }
    with pytest.raises(UsageError, match=r"several named adapters \(one, two\)"):
        load_adapter(write(tmp_path / "a.safetensors", both))


def sdxl(name: str) -> Tensors:
    return Maker(len(name)).lora(f"lora_unet_{name}", 640, 2048)


SGM, HF = (
    "input_blocks_5_1_transformer_blocks_0_attn2_to_k",
    "down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k",
)


def test_both_vocabularies_in_one_file_are_read(tmp_path: Path) -> None:
    """diffusers drops all sgm keys of such a file."""
    source = write(tmp_path / "a.safetensors", {**sdxl(SGM), **sdxl(FLAT)})
    report = convert(source, tmp_path / "b.safetensors", to="kohya")
    assert report.summary["architecture"] == "sdxl"
    assert len(report.modules) == 2


def test_a_module_under_both_names_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", {**sdxl(SGM), **sdxl(HF)})
    with pytest.raises(UsageError, match="both name the module") as caught:
        convert(source, tmp_path / "b.safetensors", to="kohya")
    assert f"lora_unet_{SGM}" in str(caught.value)
    assert f"lora_unet_{HF}" in str(caught.value)


@pytest.mark.parametrize("style", ["with", "without"])
def test_clip_with_and_without_the_text_model_level(style: str, tmp_path: Path) -> None:
    level = "text_model_" if style == "with" else ""
    key = f"lora_te_{level}encoder_layers_0_self_attn_q_proj"
    source = write(tmp_path / "a.safetensors", Maker(1).lora(key, 768, 768))
    adapter = load_adapter(source, architecture="sd1")
    assert list(adapter.modules) == ["text_encoder:text_model.encoder.layers.0.self_attn.q_proj"]
    assert isinstance(next(iter(adapter.modules.values())).delta(), torch.Tensor)
