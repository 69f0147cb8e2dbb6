"""A small random language model in files, and random adapters for it: what the tests of merge
and unmerge start from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery import save_adapter
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import LoRA
from peftsurgery.checkpoint import save

HIDDEN, INNER, LAYERS, VOCABULARY = 24, 40, 4, 61
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Tensors of a Llama-like model, with one integer buffer and one tensor of odd size."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random) / 4).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = normal(HIDDEN)
    tensors["model.norm.weight"] = normal(HIDDEN - 1)
    tensors["model.position_ids"] = torch.arange(7)
    tensors["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    return tensors


def write_folder(
    folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16, shard_size: int | None = 4000
) -> Path:
    """A sharded transformers folder with config, tokenizer and an index nobody would write the
    same way.
    """
    folder.mkdir()
    metadata = {"format": "pt", "note": "ünïcode"}
    place = folder if shard_size else folder / "model.safetensors"
    save(place, weights(seed, dtype), metadata, shard_size=shard_size)
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "vocab_size": 61}
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    (folder / "tokenizer.json").write_text("{}\n")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = json.loads(index.read_text())
        index.write_text(json.dumps({"extra": 1, **text}, indent=1) + "\n\n")
    return folder


def write_adapter(
    folder: Path,
    seed: int,
    *,
    size: float = 0.3,
    modules: Mapping[str, tuple[int, int]] = SHAPES,
    layers: int = LAYERS,
) -> Path:
    """A PEFT folder with a random LoRA on every projection; ||ΔW|| is about `size` times ||W||."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, LoRA] = {}
    for layer in range(layers):
        for index, (name, (rows, columns)) in enumerate(modules.items()):
            rank = 2 + index
            up = torch.randn(rows, rank, generator=random) * size / 4 / rank**0.5
            down = torch.randn(rank, columns, generator=random)
            path = f"model:model.layers.{layer}.{name}"
            found[path] = LoRA(up, down, scale=0.5 + index)
    save_adapter(Adapter(dict(found), "llm"), folder, layout="peft")
    return folder


def contents(place: Path) -> dict[str, bytes]:
    """File name -> bytes, of a folder or of a single file."""
    if place.is_file():
        return {"": place.read_bytes()}
    files = (path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}
