"""Bases as they are stored: fused CLIP-G, single files, shards and pipelines give the same weights
by home name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftsurgery import architectures, checkpoint
from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.codec import BaseWeights, load_adapter
from peftsurgery.codec.bases import base_names
from peftsurgery.errors import UsageError
from peftsurgery.operations.convert import convert
from peftsurgery.operations.inspect import inspect
from tests.codec.build import filled, narrowed, shapes_of, write
from tests.codec.parts import Maker

G = "conditioner.embedders.1.model."
LAYER = "transformer.resblocks.3."
HOME = "text_encoder_2:text_model.encoder.layers.3.self_attn."


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A narrow SDXL single file with sgm names."""
    shapes = narrowed(shapes_of("base__sdmecha_sdxl-sgm"), 32)
    kept = {k: s for k, s in shapes.items() if not k.startswith("first_stage")}
    return filled(kept, dtype=torch.float16)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tensors: dict) -> dict[str, Path]:
    """The same base as one file, as shards, and its UNet as a bare file."""
    folder = tmp_path_factory.mktemp("bases")
    one = write(folder / "one.safetensors", tensors)
    sharded = folder / "sharded"
    sharded.mkdir()
    checkpoint.save(sharded / "model.safetensors", open_checkpoint(one), shard_size=1_500_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    unet = "model.diffusion_model."
    bare = {k.removeprefix(unet): t for k, t in tensors.items() if k.startswith(unet)}
    index = next(sharded.glob("*.json"))
    return {"file": one, "shards": index, "bare": write(folder / "bare.safetensors", bare)}


def weights(path: Path) -> BaseWeights:
    return BaseWeights(open_checkpoint(path), architectures.get("sdxl"))


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_fused_rows_of_clip_g_are_sliced_in_thirds(kind: str, files: dict, tensors: dict) -> None:
    base = weights(files[kind])
    fused = tensors[f"{G}{LAYER}attn.in_proj_weight"]
    bias = tensors[f"{G}{LAYER}attn.in_proj_bias"]
    third = len(fused) // 3
    for n, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(n * third, (n + 1) * third)
        assert torch.equal(base.weight(HOME + name), fused[rows])
        assert torch.equal(base.weight(HOME + name, "bias"), bias[rows])
    assert torch.equal(base.weight(f"{HOME}[q_proj,k_proj,v_proj]"), fused)
    out = tensors[f"{G}{LAYER}attn.out_proj.weight"]
    assert torch.equal(base.weight(f"{HOME}out_proj"), out)


def test_the_text_projection_is_transposed(files: dict, tensors: dict) -> None:
    found = weights(files["file"]).weight("text_encoder_2:text_projection")
    assert torch.equal(found, tensors[f"{G}text_projection"].T)


@pytest.mark.parametrize("kind", ["file", "shards", "bare"])
def test_the_unet_by_its_home_names(kind: str, files: dict, tensors: dict) -> None:
    base = weights(files[kind])
    found = base.weight("unet:up_blocks.0.attentions.1.transformer_blocks.9.attn2.to_k")
    name = "model.diffusion_model.output_blocks.1.1.transformer_blocks.9.attn2.to_k.weight"
    assert torch.equal(found, tensors[name])
    assert not any(path.startswith("controlnet:") for path in base.stored)


def test_a_pipeline_folder_by_component(tmp_path: Path, tensors: dict) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    name = "up_blocks.0.attentions.1.transformer_blocks.9.attn2.to_k"
    weight = torch.randn(8, 8)
    write(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {f"{name}.weight": weight})
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert torch.equal(weights(tmp_path).weight(f"unet:{name}"), weight)
    assert base_names(open_checkpoint(tmp_path)) == {"unet": [name]}


def test_a_controlnet_is_told_from_a_unet(tmp_path: Path) -> None:
    shapes = narrowed(shapes_of("base__diffusers_sdxl_controlnet"), 32)
    base = weights(write(tmp_path / "c.safetensors", filled(shapes)))
    assert "controlnet:controlnet_cond_embedding.conv_in.weight" in base.stored
    assert "controlnet:down_blocks.0.resnets.0.conv1.weight" in base.stored


def test_swapped_halves_are_put_back(tmp_path: Path) -> None:
    fused = torch.randn(96, 48)
    name = "model.diffusion_model.final_layer.adaLN_modulation.1.weight"
    path = write(tmp_path / "f.safetensors", {name: fused})
    base = BaseWeights(open_checkpoint(path), architectures.get("flux"))
    assert torch.equal(
        base.weight("transformer:norm_out.linear"), torch.cat([fused[48:], fused[:48]])
    )
    assert torch.equal(base.weight("transformer:norm_out.linear~swap_halves"), fused)


def test_a_missing_module_names_the_nearest(files: dict) -> None:
    with pytest.raises(
        UsageError,
        match=r"has no weight for unet:conv_inn "
        r".*'unet:conv_in.weight'",
    ):
        weights(files["file"]).weight("unet:conv_inn")


def test_a_base_of_another_family_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"model.layers.0.mlp.weight": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match="no tensor belongs to Stable Diffusion XL"):
        weights(path)


def test_coverage_counts_fused_and_missing_modules(files: dict, tmp_path: Path) -> None:
    maker = Maker(1)
    tensors = {
        **maker.lora("lora_te2_text_model_encoder_layers_3_self_attn_q_proj", 40, 40),
        **maker.lora(
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 20, 64
        ),
        **maker.lora("lora_te1_text_model_encoder_layers_11_mlp_fc1", 96, 24),
    }
    source = write(tmp_path / "a.safetensors", tensors)
    report = inspect(source, base=files["bare"], architecture="sdxl")
    assert not report.ok
    rows = {str(r["component"]): r for r in report.tables["coverage"]}
    assert rows["unet"]["found in the base"] == 1
    assert rows["text_encoder_2"]["found in the base"] == 0
    report = inspect(source, base=files["file"], architecture="sdxl")
    assert report.ok
    assert all(r["found in the base"] == 1 for r in report.tables["coverage"])


def test_flattened_names_of_an_unknown_family_are_restored_by_its_base(tmp_path: Path) -> None:
    name = "blocks.0.adaln_modulation_cross_attn.1"
    source = write(
        tmp_path / "a.safetensors", Maker(1).lora(f"lora_unet_{name.replace('.', '_')}", 8, 8)
    )
    base = write(tmp_path / "b.safetensors", {f"{name}.weight": torch.zeros(8, 8)})
    assert list(load_adapter(source, base=base).modules) == [f"transformer:{name}"]
    report = convert(source, tmp_path / "c.safetensors", to="comfy", base=base)
    assert report.summary["architecture"] == "generic"
    assert "untranslated-names" in [f.code for f in report.findings]
    clash = {f"{n}.weight": torch.zeros(8, 8) for n in (name, name.replace("_cross", ".cross"))}
    with pytest.raises(UsageError, match="flatten to it"):
        load_adapter(source, base=write(tmp_path / "d.safetensors", clash))


def test_adapters_on_openclip_names_split_in_thirds(tmp_path: Path) -> None:
    """ComfyUI-style names of SDXL's own CLIP-G: one LoRA on in_proj is three on q, k and v."""
    name = "lora_te2_transformer_resblocks_3_attn_in_proj"
    tensors = {
        **Maker(1).lora(name, 3 * 40, 40, 4),
        **Maker(2).lora("lora_te2_transformer_resblocks_3_mlp_c_fc", 160, 40),
    }
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors), architecture="sdxl")
    assert set(adapter.modules) == {
        *(f"{HOME}{n}" for n in ("q_proj", "k_proj", "v_proj")),
        "text_encoder_2:text_model.encoder.layers.3.mlp.fc1",
    }
    whole = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    parts = [adapter.modules[f"{HOME}{n}"].delta() for n in ("q_proj", "k_proj", "v_proj")]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
