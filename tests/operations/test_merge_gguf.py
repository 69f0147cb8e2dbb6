"""Merging into GGUF files: same types, nothing else touched, or plain weights under the names of
transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import logical

HIDDEN, HEADS = 256, 4
LAYER = {
    "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (HIDDEN // 2, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, 512)),
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_base(path: Path, kind: str, rng: np.random.Generator) -> dict[str, Tensor]:
    """A llama file of two layers, and the weights the model has, from the package's own reading.

    Weights of two dimensions are `kind`; what the package cannot quantize is random blocks.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_token_list(["a", "b"])
    code = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[code]
    model: dict[str, Tensor] = {}
    for layer in range(2):
        for leaf, (module, shape) in LAYER.items():
            values = rng.normal(0, 0.05, shape).astype(np.float32)
            heads = {"attn_q": HEADS, "attn_k": HEADS // 2}.get(leaf, 0)
            stored = interleaved(values, heads) if heads else values
            if kind in ("F16", "Q8_0", "Q4_1"):
                raw = gguf.quants.quantize(stored, code)
            else:
                raw = rng.integers(0, 256, (shape[0], shape[1] // block * size), dtype=np.uint8)
                raw.reshape(-1, size)[:, :4] = np.tile(
                    np.array([0.0005, 0.0005], np.float16).view(np.uint8), (raw.size // size, 1)
                )
            writer.add_tensor(f"blk.{layer}.{leaf}.weight", raw, raw_dtype=code)
            read = gguf.quants.dequantize(raw, code).reshape(shape)
            if heads:
                pairs = read.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2)
                read = pairs.reshape(shape)
            model[f"model.layers.{layer}.{module}.weight"] = torch.tensor(read)
        norm = rng.normal(1, 0.1, HIDDEN).astype(np.float32)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", norm)
        model[f"model.layers.{layer}.input_layernorm.weight"] = torch.tensor(norm)
    writer.add_tensor("rope_freqs.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_adapter(folder: Path, model: dict[str, Tensor], *, size: float) -> dict[str, Tensor]:
    """A LoRA on layer 1; weight name -> ΔW."""
    folder.mkdir()
    file, deltas = {}, {}
    for module, (rows, columns) in LAYER.values():
        up, down = torch.randn(rows, 4), torch.randn(4, columns)
        name = f"model.layers.1.{module}"
        up *= size * model[f"{name}.weight"].norm() / (up @ down).norm()
        file[f"base_model.model.{name}.lora_A.weight"] = down
        file[f"base_model.model.{name}.lora_B.weight"] = up
        deltas[f"{name}.weight"] = up @ down
    save_file(file, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "F16"])
def test_same_types_and_nothing_else_touched(
    tmp_path: Path, np_rng: np.random.Generator, kind: str
) -> None:
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    model = write_base(base, kind, np_rng)
    deltas = write_adapter(tmp_path / "lora", model, size=0.2)
    report = ps.merge(base, [(tmp_path / "lora", 1.0)], out, verify="full")
    assert report.ok
    before, after = gguf.GGUFReader(base), gguf.GGUFReader(out)
    assert base.stat().st_size == out.stat().st_size
    start = before.data_offset
    assert base.read_bytes()[:start] == out.read_bytes()[:start]
    changed = {
        one.name
        for one, other in zip(before.tensors, after.tensors, strict=True)
        if not np.array_equal(one.data, other.data)
    }
    assert changed == {f"blk.1.{leaf}.weight" for leaf in LAYER}
    view = logical(open_checkpoint(out))
    for name, weight in model.items():
        found = view[name].torch() - weight
        if name in deltas:
            share = float((found * deltas[name]).sum() / deltas[name].norm() ** 2)
            assert share == pytest.approx(1, abs=0.1)
        else:
            assert not found.any()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_K"])
def test_unpacked_under_the_names_of_transformers(
    tmp_path: Path, np_rng: np.random.Generator, kind: str
) -> None:
    model = write_base(tmp_path / "base.gguf", kind, np_rng)
    deltas = write_adapter(tmp_path / "lora", model, size=0.2)
    out = tmp_path / "out.safetensors"
    ps.merge(
        tmp_path / "base.gguf", [(tmp_path / "lora", 0.5)], out, requant="dequant", dtype="fp32"
    )
    written = load_file(out)
    assert set(written) == set(model)
    for name, weight in model.items():
        wanted = weight + 0.5 * deltas[name] if name in deltas else weight
        assert torch.allclose(written[name], wanted, atol=1e-6 * float(weight.abs().max())), name


def test_refusals(tmp_path: Path, np_rng: np.random.Generator) -> None:
    base = tmp_path / "base.gguf"
    model = write_base(base, "Q8_0", np_rng)
    write_adapter(tmp_path / "lora", model, size=0.1)
    adapters = [(tmp_path / "lora", 1.0)]
    with pytest.raises(UsageError, match=r"written as \.gguf"):
        ps.merge(base, adapters, tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match=r"requant dequant as \.safetensors"):
        ps.merge(base, adapters, tmp_path / "out.gguf", requant="dequant")
    with pytest.raises(UnsupportedError, match="keep the GGUF file"):
        ps.merge(base, adapters, tmp_path / "out.gguf", undo=tmp_path / "undo.safetensors")
    with pytest.raises(UnsupportedError, match="-o DST"):
        ps.merge(base, adapters, in_place=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "lora"}


def test_a_type_that_is_only_copied(tmp_path: Path, np_rng: np.random.Generator) -> None:
    """Untouched it passes through; a change of it is refused by name."""
    base = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(base, "qwen2")
    kinds = {"attn_q": "IQ2_XXS", "ffn_down": "Q8_0"}
    for leaf, kind in kinds.items():
        code = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[code]
        raw = np_rng.integers(0, 60, (8, 256 // block * size), dtype=np.uint8)
        writer.add_tensor(f"blk.0.{leaf}.weight", raw, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def lora(module: str) -> Path:
        folder = tmp_path / module
        folder.mkdir()
        name = f"base_model.model.model.layers.0.{module}"
        down, up = torch.randn(2, 256), torch.randn(8, 2)
        file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        save_file(file, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    ps.merge(base, [(lora("mlp.down_proj"), 1.0)], tmp_path / "out.gguf")
    before, after = gguf.GGUFReader(base).tensors, gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert np.array_equal(before[0].data, after[0].data)
    assert not np.array_equal(before[1].data, after[1].data)
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        ps.merge(base, [(lora("self_attn.q_proj"), 1.0)], tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


def test_an_image_model_with_fused_weights(tmp_path: Path, np_rng: np.random.Generator) -> None:
    """ComfyUI-GGUF keeps the original names; q is the first third of its qkv."""
    base, out = tmp_path / "flux.gguf", tmp_path / "out.gguf"
    code = gguf.GGMLQuantizationType.Q8_0
    values = np_rng.normal(0, 0.05, (3 * 64, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(base, "flux")
    for name in ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv"):
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    down, up = torch.randn(2, 64), 0.01 * torch.randn(64, 2)
    name = "transformer.transformer_blocks.0.attn.to_q"
    file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(file, tmp_path / "lora.safetensors")
    ps.merge(base, [(tmp_path / "lora.safetensors", 1.0)], out, architecture="flux")
    before, after = gguf.GGUFReader(base).tensors, gguf.GGUFReader(out).tensors
    assert np.array_equal(before[1].data, after[1].data)
    read = [torch.tensor(gguf.quants.dequantize(t[0].data, code)) for t in (before, after)]
    change = read[1] - read[0]
    assert not change[64:].any()
    assert (change[:64] - up @ down).norm() < 0.2 * (up @ down).norm()
