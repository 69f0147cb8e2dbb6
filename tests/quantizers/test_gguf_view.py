"""GGUF files as transformers names and orders them: against the name map of the gguf package, tiny
models of every family, and the loader of transformers.
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from safetensors.torch import load_file

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import PackedTensor, logical
from peftsurgery.quantizers.gguf_names import DERIVED, FAMILIES

ARCHITECTURES = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
LEFT_OUT = {  # names without a row: no model of the family has them in transformers
    "llama": {"attn_rot_embd"},
    "smollm3": {"attn_rot_embd"},
    "arcee": {"attn_rot_embd"},
    "starcoder2": {"attn_rot_embd"},
    "granite": {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"},
    "phi3": {"attn_q", "attn_k", "attn_v"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_package(family: str) -> None:
    """Every row is what the package's own map gives for the name in transformers; every tensor of
    the family has a row.
    """
    arch = ARCHITECTURES[family]
    known = gguf.get_tensor_name_map(arch, 2)
    for leaf, module in FAMILIES[family].leaves.items():
        path = f"model.layers.1.{module}".replace(".{}", "")
        assert known.get_name(f"{path}.weight", try_suffixes=(".weight",)) == f"blk.1.{leaf}.weight"
    stored = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[arch]}
    leaves = {name.removeprefix("blk.{bid}.") for name in stored if name.startswith("blk.")}
    assert leaves - set(FAMILIES[family].leaves) <= LEFT_OUT.get(family, set())
    top = {name for name in stored if not name.startswith("blk.")}
    assert top - {"token_embd", "output", "output_norm"} <= {d[:-7] for d in DERIVED}


COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 3}),
    "granite": ("GraniteForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128}),
    "qwen2moe": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "gemma": ("GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
}
LLAMA = ("llama", "mistral", "mixtral", "granite", "smollm3")  # conversion of LlamaModel
GEMMA = ("gemma", "gemma2", "gemma3")


def model_of(kind: str, folder: Path) -> transformers.PreTrainedModel:
    """A tiny model whose norms are not all ones, saved."""
    name, options = MODELS[kind]
    config_class = getattr(transformers, name).config_class
    model = getattr(transformers, name)(config_class(**{**COMMON, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of llama.cpp's converter."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def convert(kind: str, folder: Path, *, packed: str = "") -> Path:
    """What llama.cpp's converter does to the saved model; weights of two dimensions `packed`."""
    arch = "llama" if kind in ("mistral", "mixtral") else kind
    known = gguf.get_tensor_name_map(ARCHITECTURES[arch], 2)
    config = transformers.AutoConfig.from_pretrained(folder)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    head = getattr(config, "head_dim", None) or 16
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps if hasattr(config, "rms_norm_eps") else 1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(128)
    writer.add_token_list(["x"] * 128)
    if kind == "llama":
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if kind in LLAMA and re.search(r"q_proj\.(weight|bias)$", name):
            weight = interleaved(weight, 4)
        if kind in LLAMA and re.search(r"k_proj\.(weight|bias)$", name):
            weight = interleaved(weight, 2)
        if kind in GEMMA and name.endswith("norm.weight"):
            weight = weight + 1
        if expert := re.search(r"\.experts\.(\d+)\.", name):
            stack = stacks.setdefault(name.replace(expert[0], ".experts."), {})
            stack[int(expert[1])] = weight
            continue
        tensors[name] = weight.squeeze(0) if name.endswith("shared_expert_gate.weight") else weight
    for name, slices in stacks.items():
        tensors[name] = torch.stack([slices[i] for i in sorted(slices)])
    for name, weight in tensors.items():
        stored = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        array = weight.float().numpy()
        if packed and weight.ndim > 1 and weight.shape[-1] % 32 == 0:
            raw_type = gguf.GGMLQuantizationType[packed]
            writer.add_tensor(stored, gguf.quants.quantize(array, raw_type), raw_dtype=raw_type)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_every_family_as_it_was_saved(tmp_path: Path, kind: str) -> None:
    model_of(kind, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    view = logical(open_checkpoint(convert(kind, tmp_path)))
    assert set(view) == set(saved)
    for name, weight in saved.items():
        tensor = view[name]
        assert tuple(tensor.shape) == tuple(weight.shape), name
        if kind in GEMMA and "norm" in name:
            assert torch.equal(tensor.torch(), (weight + 1) - 1), name
        else:
            assert torch.equal(tensor.torch(), weight), name
        assert isinstance(tensor, PackedTensor)
        packed = tensor.packed
        made = packed.format.quantize(packed, tensor.torch())["weight"]
        assert bytes(made.numpy().tobytes()) == bytes(packed.parts["weight"].read()), name


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma2", "qwen3"])
def test_as_the_loader_of_transformers(tmp_path: Path, kind: str) -> None:
    model_of(kind, tmp_path)
    path = convert(kind, tmp_path, packed="Q8_0")
    name, _ = MODELS[kind]
    loaded = getattr(transformers, name).from_pretrained(tmp_path, gguf_file=path.name)
    view = logical(open_checkpoint(path))
    state = loaded.state_dict()
    assert set(view) <= set(state)
    assert set(state) - set(view) <= {"lm_head.weight"}
    for key, tensor in view.items():
        assert torch.equal(tensor.torch(), state[key].float()), key


def test_experts_are_slices_of_their_stack(tmp_path: Path) -> None:
    model_of("mixtral", tmp_path)
    checkpoint = open_checkpoint(convert("mixtral", tmp_path, packed="Q5_1"))
    view = logical(checkpoint)
    tensor = view["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert isinstance(tensor, PackedTensor)
    part = tensor.packed.parts["weight"]
    assert part.name == "blk.1.ffn_up_exps.weight[2]"
    stack = checkpoint["blk.1.ffn_up_exps.weight"]
    assert bytes(part.read()) == bytes(stack.read())[2 * stack.nbytes // 3 :]
    assert checkpoint[part.name].file_range() == part.file_range()


def test_image_models_keep_their_names(tmp_path: Path, np_rng: np.random.Generator) -> None:
    path = tmp_path / "flux.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    weight = np_rng.normal(0, 1, (6, 64)).astype(np.float32)
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor(
        "double_blocks.0.img_attn.proj.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    writer.add_tensor("double_blocks.0.img_attn.norm.key_norm.scale", weight[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    view = logical(open_checkpoint(path))
    assert list(view) == [
        "double_blocks.0.img_attn.proj.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ]
    found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(view["double_blocks.0.img_attn.proj.weight"].torch(), torch.tensor(found))


def one_tensor(path: Path, architecture: str, name: str, rows: int, **heads: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in heads.items():
        writer.add_uint32(f"{architecture}.attention.{key}", value)
    writer.add_tensor(name, np.ones((rows, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_refusals(tmp_path: Path) -> None:
    unknown = one_tensor(tmp_path / "a.gguf", "rwkv7", "blk.0.attn_norm.weight", 4)
    with pytest.raises(UnsupportedError, match=r"'rwkv7'.*qwen2"):
        logical(open_checkpoint(unknown))
    headless = one_tensor(tmp_path / "b.gguf", "llama", "blk.0.attn_q.weight", 8)
    with pytest.raises(UsageError, match="head_count says None heads"):
        logical(open_checkpoint(headless))
    odd = one_tensor(tmp_path / "c.gguf", "llama", "blk.0.attn_q.weight", 8, head_count=3)
    with pytest.raises(UsageError, match="8 rows"):
        logical(open_checkpoint(odd))
    fewer = one_tensor(
        tmp_path / "d.gguf", "llama", "blk.0.attn_k.weight", 8, head_count=3, head_count_kv=2
    )
    assert list(logical(open_checkpoint(fewer))) == ["model.layers.0.self_attn.k_proj.weight"]
