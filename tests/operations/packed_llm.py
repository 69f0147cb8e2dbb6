"""A small random language model packed by our own encoders, beside its plain form."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftsurgery.checkpoint import open_checkpoint, save
from peftsurgery.quantizers import logical

HIDDEN, INNER, LAYERS, VOCABULARY = 128, 256, 2, 50
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "mlp.up_proj": (INNER, HIDDEN),
}


def write_plain(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A transformers folder of two files and an index."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random) * 0.05).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = normal(HIDDEN)
    tensors["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    folder.mkdir()
    save(folder, tensors, {"format": "pt"}, shard_size=150_000)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_lora(folder: Path, seed: int, *, size: float, plain: Path, rank: int = 4) -> Path:
    """A PEFT folder; ‖ΔW‖ = size · ‖W‖ for q_proj and down_proj of every layer."""
    random = torch.Generator().manual_seed(seed)
    base = state(plain)
    file: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            weight = base[f"model.layers.{layer}.{name}.weight"].float()
            up = torch.randn(weight.shape[0], rank, generator=random)
            down = torch.randn(rank, weight.shape[1], generator=random)
            up *= size * weight.norm() / (up @ down).norm()
            key = f"base_model.model.model.layers.{layer}.{name}"
            file |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    folder.mkdir()
    save_file(file, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def deltas(adapter: Path) -> dict[str, Tensor]:
    """Weight name -> ΔW, from the file itself."""
    file = load_file(adapter / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(".lora_A", ""): (
            file[key.replace("lora_A", "lora_B")] @ down
        )
        for key, down in file.items()
        if ".lora_A." in key
    }


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder as its files hold it."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def unpacked(path: Path) -> dict[str, Tensor]:
    """Every weight of a checkpoint, packed ones as what they stand for."""
    return {name: t.torch().float() for name, t in logical(open_checkpoint(path)).items()}


def share_kept(before: Tensor, after: Tensor, delta: Tensor) -> float:
    """<after - before, Δ> / ‖Δ‖²."""
    return float(((after - before) * delta).sum() / delta.square().sum())
