"""What a converted file says of itself: lineage, training metadata, hashes, and the configs of PEFT
and diffusers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from peftsurgery import __version__
from peftsurgery.operations.convert import convert
from tests.codec.build import write
from tests.codec.parts import Maker

FLUX = "lora_unet_double_blocks_0_"
BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_"
TRAINING = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "3.0",
    "ss_base_model_version": "sd_v1.5",
    "ss_tag_frequency": '{"cat": {"cat": 3}}',
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "deadbeef",
    "modelspec.title": "a test",
    "modelspec.hash_sha256": "0xdead",
}


def kohya_file(folder: Path, **metadata: str) -> Path:
    maker = Maker(3)
    tensors = {
        **maker.lora(f"{BLOCK}attn1_to_q", 640, 640, 4, alpha=3),
        **maker.lora(f"{BLOCK}attn2_to_k", 640, 768, 4, alpha=3),
        **maker.lora(f"{BLOCK}ff_net_0_proj", 5120, 640, 4, alpha=3),
    }
    return write(folder / "in.safetensors", tensors, **metadata)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def expected_hashes(path: Path) -> tuple[str, str]:
    """sd-scripts `precalculate_safetensors_hashes`, by the safetensors library: only ss_* metadata
    is kept.
    """
    kept = {k: v for k, v in metadata_of(path).items() if k.startswith("ss_")}
    data = save(load_file(path), kept)
    (length,) = struct.unpack("<Q", data[:8])
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return hashlib.sha256(data[8 + length :]).hexdigest(), legacy


@pytest.mark.parametrize("layout", ["kohya", "kohya-ldm", "lycoris"])
@pytest.mark.parametrize("big", [False, True])
def test_hashes_are_those_of_the_new_file(layout: str, big: bool, tmp_path: Path) -> None:
    source = kohya_file(tmp_path, **TRAINING)
    if big:  # the legacy hash looks behind the first MiB
        tensors = Maker(1).lora(f"{BLOCK}ff_net_2", 640, 2560, 256)
        write(source, {**load_file(source), **tensors}, **TRAINING)
    out = tmp_path / "out.safetensors"
    convert(source, out, to=layout)
    found = metadata_of(out)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == expected_hashes(out)
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    assert (found["sshs_legacy_hash"] == "e3b0c442") != big  # of nothing, below one MiB


def test_training_metadata_is_kept_and_updated(tmp_path: Path) -> None:
    source, out = kohya_file(tmp_path, **TRAINING), tmp_path / "out.safetensors"
    convert(source, out, to="kohya")
    found = metadata_of(out)
    same = ("ss_base_model_version", "ss_tag_frequency", "modelspec.title", "ss_network_module")
    assert all(found[key] == TRAINING[key] for key in same)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "3")
    out2 = tmp_path / "out2.safetensors"
    convert(source, out2, to="comfy", algorithm="lora", rank="2")
    found = metadata_of(out2)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "2")
    assert "sshs_model_hash" not in found
    tensors = {**load_file(source), **Maker(1).lora(f"{BLOCK}attn1_to_v", 640, 640, 2)}
    write(source, tensors, **TRAINING)
    convert(source, out, to="kohya", overwrite=True)
    assert metadata_of(out)["ss_network_dim"] == "Dynamic"


@pytest.mark.parametrize(
    ("tensors", "layout", "module"),
    [
        (Maker(1).lora(f"{BLOCK}attn1_to_q", 640, 640), "kohya", "networks.lora"),
        (Maker(1).loha(f"{BLOCK}attn1_to_q", 640, 640), "kohya", "lycoris.kohya"),
        (Maker(1).dora(f"{BLOCK}attn1_to_q", 640, 640, "out"), "kohya", "lycoris.kohya"),
        (Maker(1).lora(f"{FLUX}img_attn_proj", 3072, 3072), "kohya", "networks.lora_flux"),
    ],
)  # fmt: skip
def test_the_network_module_is_what_is_in_the_file(
    tensors: dict, layout: str, module: str, tmp_path: Path
) -> None:
    name = "flux" if "flux" in module else "sd1"
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write(source, tensors, ss_network_args='{"algo": "boft"}', ss_network_module="lycoris.kohya")
    convert(source, out, to=layout, architecture=name)
    found = metadata_of(out)
    assert found["ss_network_module"] == module
    assert ("ss_network_args" in found) == (module == "lycoris.kohya")


def test_lineage_is_complete_and_two_runs_are_byte_identical(tmp_path: Path) -> None:
    source = kohya_file(tmp_path, **TRAINING)
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out in outs:
        report = convert(source, out, to="comfy", dtype="fp16", alpha="fold")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    found = metadata_of(outs[0])
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert found["peftsurgery.operation"] == "convert"
    assert found["peftsurgery.version"] == __version__
    assert found["peftsurgery.options"] == "to=comfy dtype=fp16 alpha=fold"
    assert found["peftsurgery.inputs"] == f"in.safetensors=sha256:{digest}"
    assert report.inputs == {"in.safetensors": digest}
    folders = [tmp_path / "p1", tmp_path / "p2"]
    for folder in folders:
        convert(source, folder, to="peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_diffusers_metadata_says_every_rank_and_alpha(tmp_path: Path) -> None:
    maker, block = Maker(3), f"{BLOCK}attn"
    te = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {
        **maker.lora(f"{block}1_to_q", 640, 640, 4, alpha=2),
        **maker.lora(f"{block}2_to_k", 640, 768, 8, alpha=1),
        **maker.lora(f"{block}2_to_v", 640, 768, 4, alpha=2),
        **maker.lora(te, 768, 768, 2, alpha=6),
    }
    source, out = write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    report = convert(source, out, to="diffusers")
    assert "alpha-in-metadata" in [f.code for f in report.findings]
    said = json.loads(metadata_of(out)["lora_adapter_metadata"])
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn"
    assert (said["unet.r"], said["unet.lora_alpha"]) == (4, 2)
    assert said["unet.rank_pattern"] == {f"{path}2.to_k": 8}
    assert said["unet.alpha_pattern"] == {f"{path}2.to_k": 1}
    assert (said["text_encoder.r"], said["text_encoder.lora_alpha"]) == (2, 6)
    assert said["unet.use_dora"] is False
    convert(source, out, to="diffusers", alpha="fold", overwrite=True)
    assert "lora_adapter_metadata" not in metadata_of(out)
    plain = write(source, {k: t for k, t in tensors.items() if not k.endswith("alpha")})
    convert(plain, out, to="diffusers", overwrite=True)
    assert "lora_adapter_metadata" not in metadata_of(out)  # alpha = rank is what it assumes anyway


def config_of(tensors: dict[str, torch.Tensor], folder: Path) -> dict:
    source = write(folder / "in.safetensors", tensors)
    convert(source, folder / "out", to="peft", architecture="sd1")
    return json.loads((folder / "out" / "adapter_config.json").read_text(encoding="utf-8"))


def test_adapter_config_of_a_lora(tmp_path: Path) -> None:
    maker, path = Maker(3), "down_blocks.1.attentions.0.transformer_blocks.0.attn"
    tensors = {
        **maker.lora(f"{BLOCK}attn1_to_q", 640, 640, 4, alpha=2),
        **maker.lora(f"{BLOCK}attn1_to_k", 640, 640, 4, alpha=2),
        **maker.lora(f"{BLOCK}attn2_to_k", 640, 768, 8, alpha=1.5),
    }
    config = config_of(tensors, tmp_path)
    wanted = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {f"{path}2.to_k": 8},
        "alpha_pattern": {f"{path}2.to_k": 1.5},
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [f"{path}1.to_k", f"{path}1.to_q", f"{path}2.to_k"],
    }
    assert {key: config[key] for key in wanted} == wanted
    assert "modules_to_save" not in config


def test_adapter_config_of_other_kinds(tmp_path: Path) -> None:
    config = config_of(Maker(1).dora(f"{BLOCK}attn1_to_q", 640, 640, "out"), tmp_path / "dora")
    assert config["use_dora"] is True
    config = config_of(Maker(1).loha(f"{BLOCK}attn1_to_q", 640, 640, 4, alpha=2), tmp_path / "loha")
    assert (config["peft_type"], config["r"], config["alpha"]) == ("LOHA", 4, 2)
    lokr = Maker(1).lokr(f"{BLOCK}attn1_to_q", (20, 20), (32, 32), 4, alpha=1)
    config = config_of(lokr, tmp_path / "lokr")
    assert (config["peft_type"], config["r"], config["alpha"]) == ("LOKR", 4, 1)
    assert config["decompose_both"] is False
