"""Control LoRAs and what may lie beside an adapter: new values, padded inputs, textual-inversion
vectors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.codec import load_adapter
from peftsurgery.errors import UnsupportedError
from peftsurgery.operations.convert import convert
from tests.codec.build import narrowed, read, shapes_of, write
from tests.codec.parts import Maker, Tensors
from tests.codec.test_listings import flux_file

CONTROLNETS = {"sd1": "base__diffusers_sd15_controlnet", "sdxl": "base__diffusers_sdxl_controlnet"}
# the ldm name of what stays whole, written out from the ControlNet code
WHOLE = ("input_hint_block", "zero_convs", "middle_block_out")


def control_lora(architecture: str) -> Tensors:
    """A control-LoRA on every layer of a ControlNet; norms, biases, the hint block and the zero
    convolutions whole.
    """
    from peftsurgery import architectures

    table, maker = architectures.get(architecture).components["controlnet"], Maker(8)
    found: Tensors = {"lora_controlnet": torch.zeros(())}
    for key, shape in narrowed(shapes_of(CONTROLNETS[architecture]), 32).items():
        path, _, parameter = key.rpartition(".")
        site = table.site_of("ldm", path)
        assert site is not None, key
        if parameter == "bias" or len(shape) < 2 or site.name.startswith(WHOLE):
            found[f"{site.name}.{parameter}"] = maker.draw(*shape)
        else:
            found[f"{site.name}.down"] = maker.draw(2, *shape[1:])
            found[f"{site.name}.up"] = maker.draw(shape[0], 2, *[1] * (len(shape) - 2))
    return found


@pytest.mark.parametrize("architecture", CONTROLNETS)
def test_control_loras_go_to_diffusers_and_back(architecture: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", control_lora(architecture))
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    report = convert(source, there, to="diffusers", architecture=architecture)
    assert report.summary["from"] == "sai-control-lora"
    names = read(there)
    assert all(key.startswith("controlnet.") for key in names)
    assert "controlnet.controlnet_cond_embedding.conv_in.weight" in names
    assert "controlnet.down_blocks.0.resnets.0.conv1.lora_A.weight" in names
    convert(there, back, to="sai-control-lora", architecture=architecture)
    before, after = read(source), read(back)
    assert before.keys() == after.keys()  # with the marker that ComfyUI and diffusers look for
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("layout", ["peft", "kohya", "comfy", "onetrainer-original"])
def test_other_layouts_have_no_place_for_a_controlnet(layout: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", control_lora("sd1"))
    with pytest.raises(UnsupportedError, match="no place for a controlnet"):
        convert(source, tmp_path / "b", to=layout, architecture="sd1")


def test_flux_control_norms_are_new_values_and_the_input_is_wider(tmp_path: Path) -> None:
    source = flux_file(tmp_path, "flux_control_lora", real=True)
    adapter = load_adapter(source)
    norm = adapter.modules["transformer:transformer_blocks.0.attn.norm_q"]
    assert (norm.algorithm, norm.shape) == ("set", (128,))
    assert adapter.modules["transformer:x_embedder"].padded_shape == (3072, 128)
    convert(source, tmp_path / "c.safetensors", to="comfy")
    comfy = read(tmp_path / "c.safetensors")
    block = "diffusion_model.double_blocks.0.img_attn"
    assert f"{block}.norm.query_norm.scale.set_weight" in comfy  # ComfyUI's own name of it
    assert f"{block}.qkv.diff_b" in comfy
    assert comfy["diffusion_model.img_in.reshape_weight"].tolist() == [3072, 128]


PADDED = "diffusion_model.{}.reshape_weight"


def padded(name: str) -> Tensors:
    """A ComfyUI LoRA that widens a layer to 128 inputs."""
    maker = Maker(2)
    tensors = maker.lora(f"diffusion_model.{name}", 48, 128)
    return {**tensors, PADDED.format(name): torch.tensor([48, 128])}


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "bfl"])
def test_only_img_in_may_be_widened_without_saying_so(layout: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", padded("img_in"))
    out = tmp_path / ("b" if layout == "peft" else "b.safetensors")
    report = convert(source, out, to=layout, architecture="flux")
    found = load_adapter(out, architecture="flux").modules["transformer:x_embedder"]
    assert found.padded_shape == (48, 128)
    warned = "wider-input" in [f.code for f in report.findings]
    assert warned == (layout == "kohya")
    other = write(tmp_path / "o.safetensors", padded("txt_in"))
    with pytest.raises(UnsupportedError, match=r"widened to \[48, 128\].*--to comfy"):
        convert(other, tmp_path / "c", to=layout, architecture="flux")


def test_a_base_that_really_has_a_wider_input_stays_in_kohya(tmp_path: Path) -> None:
    """FLUX.1 Fill has 384 inputs: its Kohya adapters name them without a word about padding."""
    source = write(tmp_path / "a.safetensors", Maker(1).lora("lora_unet_img_in", 3072, 384))
    convert(source, tmp_path / "b.safetensors", to="kohya")
    assert read(source).keys() <= read(tmp_path / "b.safetensors").keys()


@pytest.mark.parametrize("layout", ["kohya", "comfy", "onetrainer", "onetrainer-kohya"])
def test_textual_inversion_vectors_travel_along(layout: str, tmp_path: Path) -> None:
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    vectors = {"bundle_emb.cat.clip_l": torch.randn(3, 768)}
    source = write(tmp_path / "a.safetensors", {**Maker(1).lora(unet, 320, 320), **vectors})
    convert(source, tmp_path / "b.safetensors", to=layout, architecture="sd1")
    found = read(tmp_path / "b.safetensors")["bundle_emb.cat.clip_l"]
    assert np.array_equal(found, vectors["bundle_emb.cat.clip_l"].numpy())


def test_textual_inversion_vectors_are_not_lost_in_silence(tmp_path: Path) -> None:
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {**Maker(1).lora(unet, 320, 320), "bundle_emb.cat.clip_l": torch.randn(3, 768)}
    source, out = write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    with pytest.raises(UnsupportedError, match=r"--drop 'bundle_emb.cat.clip_l'"):
        convert(source, out, to="diffusers", architecture="sd1")
    report = convert(source, out, to="diffusers", architecture="sd1", drop=["bundle_emb.*"])
    assert report.keys["dropped"] == 1
    out.unlink()
    report = convert(source, out, to="diffusers", architecture="sd1", only=["unet"])
    assert "bundle_emb.cat.clip_l" in [f.key for f in report.findings if f.code == "left-out"]
