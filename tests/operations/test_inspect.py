"""inspect: what a file is, who loads it, and how large its changes are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from peftsurgery.layouts import LAYOUT_NAMES
from peftsurgery.operations.convert import convert
from peftsurgery.operations.inspect import block_of, inspect
from peftsurgery.reports.json import render
from tests.codec.build import lora_product, write
from tests.codec.parts import Maker, Tensors

H = 48
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def flux(maker: Maker) -> Tensors:
    return {
        **maker.lora(QKV, 3 * H, H, 4, alpha=2),
        **maker.lora("lora_unet_double_blocks_1_img_mlp_0", 4 * H, H, 8, alpha=8),
        **maker.lora("lora_unet_single_blocks_7_linear1", 7 * H, H, 4, alpha=2),
        **maker.lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 96, 24, 4, alpha=4),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(
        tmp_path / "in.safetensors", flux(Maker(4)), ss_network_module="networks.lora_flux"
    )


def test_modules_ranks_and_scales(source: Path) -> None:
    report = inspect(source, architecture="flux")
    assert (report.layout, report.architecture) == ("kohya", "flux")
    rows = {str(r["name in file"]): r for r in report.modules}
    row = rows[QKV]
    assert row["module"] == "transformer:transformer_blocks.0.attn.[to_q,to_k,to_v]"
    assert (row["algorithm"], row["rank"], row["alpha"], row["scale"]) == ("lora", 4, 2.0, 0.5)
    assert (row["out"], row["in"], row["dtype"]) == (3 * H, H, "F32")
    assert {str(r["component"]): r["modules"] for r in report.tables["components"]} == {
        "transformer": 3,
        "text_encoder": 1,
    }
    assert report.summary["written by"] == "sd-scripts (networks.lora_flux)"
    assert report.summary["keys"] == 12
    assert report.summary["ranks"] == "4 (3), 8 (1)"


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_every_layout_written_is_recognised(layout: str, tmp_path: Path) -> None:
    """A file of each layout is called by that layout's name, or by one with the same keys."""
    maker, out = Maker(6), tmp_path / ("out" if layout == "peft" else "out.safetensors")
    if layout == "sai-control-lora":
        name, tensors = "sd1", maker.lora("input_blocks.1.0.in_layers.2", 320, 320, 2)
        tensors = {k.replace("lora_", "").removesuffix(".weight"): t for k, t in tensors.items()}
    elif layout == "diffusers-old":
        block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        name, tensors = "sd1", maker.lora(block, 320, 320)
    elif layout in ("kohya-ldm", "kohya-hf"):
        block = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        name, tensors = "sd1", maker.lora(f"lora_unet_{block}", 320, 320)
    else:
        name, tensors = "flux", maker.lora(QKV, 3 * H, H)
    convert(write(tmp_path / "in.safetensors", tensors), out, to=layout, architecture=name)
    same = {
        "kohya-hf": "kohya",
        "onetrainer-kohya": "kohya",
    }  # SD 1 in diffusers names; a UNet alone
    assert inspect(out, architecture=name).layout == same.get(layout, layout)


def test_norms_and_energy(source: Path) -> None:
    tensors = flux(Maker(4))
    report = inspect(source, architecture="flux", norms=True)
    rows = {str(r["name in file"]): r["norm"] for r in report.modules}
    for name, norm in rows.items():
        up, down = (tensors[f"{name}.lora_{n}.weight"].double().numpy() for n in ("up", "down"))
        scale = float(tensors[f"{name}.alpha"]) / len(down)
        assert norm == pytest.approx(np.linalg.norm(scale * lora_product(up, down)), rel=1e-6)
    blocks = report.tables["blocks"]
    assert sum(float(r["energy"] or 0) for r in blocks) == pytest.approx(1)
    total = sum(float(n) ** 2 for n in rows.values() if n is not None)
    first = next(r for r in blocks if r["block"] == "transformer:transformer_blocks.0")
    assert first["energy"] == pytest.approx(float(rows[QKV] or 0) ** 2 / total, rel=1e-6)


@pytest.mark.parametrize(
    ("path", "block"),
    [
        (
            "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "unet:down_blocks.1.attentions.0",
        ),
        ("unet:mid_block.resnets.0.conv1", "unet:mid_block.resnets.0"),
        ("transformer:transformer_blocks.3.attn.to_q", "transformer:transformer_blocks.3"),
        ("model:model.layers.11.mlp.up_proj", "model:model.layers.11"),
        ("unet:conv_in", "unet:conv_in"),
    ],
)  # fmt: skip
def test_blocks(path: str, block: str) -> None:
    assert block_of(path) == block


def loads(tensors: Tensors, folder: Path, architecture: str) -> dict[str, tuple[str, str]]:
    report = inspect(write(folder / "p.safetensors", tensors), architecture=architecture)
    return {str(r["program"]): (str(r["loads"]), str(r["why"])) for r in report.tables["programs"]}


def test_programs_that_lose_something_are_named(tmp_path: Path) -> None:
    maker, attn = Maker(2), "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    said = loads(maker.dora(attn, 320, 320, "out"), tmp_path, "sd1")
    assert said["diffusers"] == ("partly", "drops dora_scale and applies a plain LoRA")
    assert said["InvokeAI"][0] == "partly"
    said = loads(maker.loha(attn, 320, 320), tmp_path, "sd1")
    assert said["diffusers"][0] == "no"
    assert "--algorithm lora" in said["diffusers"][1]
    said = loads(maker.lora("lora_unet_final_layer_linear", 64, H), tmp_path, "flux")
    assert said["diffusers"][0] == "partly"
    assert "outside the blocks" in said["diffusers"][1]
    plain = loads(maker.lora(attn, 320, 320), tmp_path, "sd1")
    assert {n for n, (verdict, _) in plain.items() if verdict == "yes"} >= {
        *("diffusers", "ComfyUI", "A1111, Forge", "sd-scripts", "InvokeAI"),
    }
    assert plain["PEFT"][0] == "no"


def test_language_models_name_their_own_programs(tmp_path: Path) -> None:
    tensors = Maker(1, style="peft").lora("base_model.model.model.layers.0.mlp.up_proj", 64, 32)
    write(tmp_path / "f" / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "f" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    report = inspect(tmp_path / "f")
    verdicts = {r["program"]: r["loads"] for r in report.tables["programs"]}
    assert verdicts == {"PEFT": "yes", "LyCORIS": "no", "vLLM": "yes"}
    assert report.modules[0]["scale"] == 2.0


def test_the_report_is_plain_json(source: Path) -> None:
    data = json.loads(render(inspect(source, architecture="flux", norms=True)))
    assert data["schema_version"] == 1
    assert len(data["modules"]) == 4


def test_headers_alone_need_no_torch(source: Path) -> None:
    code = (
        "import sys; from peftsurgery.operations.inspect import inspect; "
        f"inspect({str(source)!r}, architecture='flux'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
