"""What the tensors of a GGUF file are called in transformers, family by family.

Sources: gguf 0.19, constants.py (MODEL_TENSORS) and tensor_mapping.py for the names; llama.cpp's
converters for what they do to the values: LlamaModel.permute interleaves the two halves of every
head of q and k (Llama, Mistral, Mixtral, Granite, SmolLM 3, Arcee), Gemma's norms are stored with 1
added. Families without a row here, image models among them, keep the names they have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<leaf>\w+)\.(?P<parameter>weight|bias)")
_TOP = re.compile(r"(?P<leaf>\w+)\.(?P<parameter>weight|bias)")

DERIVED = frozenset(  # made from config.json when a model is converted
    f"{name}.weight" for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
)
MODEL = {"token_embd": "embed_tokens", "output_norm": "norm"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
AFTER = {  # a norm behind each part
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
BOTH = {**AFTER, "ffn_norm": "pre_feedforward_layernorm"}  # and before it
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
ROTATED = ("attn_q", "attn_k")


@dataclass(frozen=True)
class Family:
    """leaves: name in a block -> module below `model.layers.N`; `{}` is the number of an expert.

    rotated: q and k lie in llama.cpp's order of rope. norm_shift: what is added to stored norms.
    """

    leaves: Mapping[str, str] = field(default_factory=lambda: {**ATTENTION, **MLP})
    rotated: bool = False
    norm_shift: float = 0.0


def _leaves(*tables: Mapping[str, str], without: tuple[str, ...] = ()) -> dict[str, str]:
    merged = {leaf: module for table in tables for leaf, module in table.items()}
    return {leaf: module for leaf, module in merged.items() if leaf not in without}


_TRADITIONAL = _leaves(ATTENTION, MLP)
_SPARSE = _leaves(ATTENTION, MLP, EXPERTS, without=("ffn_gate", "ffn_up", "ffn_down"))
_BEHIND = _leaves(ATTENTION, NORMED, MLP, AFTER, without=("attn_norm", "ffn_norm"))

FAMILIES: Mapping[str, Family] = {
    "llama": Family(_leaves(_TRADITIONAL, MIXTRAL), rotated=True),
    "granite": Family(_TRADITIONAL, rotated=True),
    "smollm3": Family(_TRADITIONAL, rotated=True),
    "arcee": Family(_leaves(_TRADITIONAL, without=("ffn_gate",)), rotated=True),
    "qwen2": Family(_TRADITIONAL),
    "qwen2moe": Family(_leaves(_SPARSE, SHARED)),
    "qwen3": Family(_leaves(_TRADITIONAL, NORMED)),
    "qwen3moe": Family(_leaves(_SPARSE, NORMED)),
    "olmoe": Family(_leaves(_SPARSE, NORMED)),
    "gemma": Family(_TRADITIONAL, norm_shift=-1.0),
    "gemma2": Family(_leaves(_TRADITIONAL, BOTH), norm_shift=-1.0),
    "gemma3": Family(_leaves(_TRADITIONAL, NORMED, BOTH), norm_shift=-1.0),
    "olmo2": Family(_BEHIND),
    "exaone4": Family(_BEHIND),
    "phi3": Family(
        _leaves(
            ATTENTION, MLP, {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
            without=("attn_q", "attn_k", "attn_v", "ffn_gate"),
        )
    ),
    "starcoder2": Family(
        _leaves(
            ATTENTION, MLP, {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, without=("ffn_gate",)
        )
    ),
    "cohere2": Family(_leaves(ATTENTION, MLP, without=("ffn_norm",))),
    "command-r": Family(_leaves(ATTENTION, NORMED, MLP, without=("ffn_norm",))),
}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A tensor's name in transformers, and how its stored values differ.

    `path` has a `{}` where the number of an expert goes: the tensor is a stack of them.
    """

    path: str
    layer: int | None
    rotated: str | None  # "attn_q" or "attn_k"
    shift: float


def named(family: Family, stored: str) -> Name | None:
    """What a stored tensor is; None for those that are made from a config. A name without a row
    stays as it is.
    """
    same = None if stored in DERIVED else Name(stored, None, None, 0.0)
    match = _TOP.fullmatch(stored)
    if match is not None:
        leaf, parameter = match["leaf"], match["parameter"]
        module = "lm_head" if leaf == "output" else f"model.{MODEL[leaf]}" if leaf in MODEL else ""
        shift = family.norm_shift if leaf == "output_norm" else 0.0
        return Name(f"{module}.{parameter}", None, None, shift) if module else same
    match = _LAYER.fullmatch(stored)
    if match is None or match["leaf"] not in family.leaves:
        return same
    leaf, parameter, layer = match["leaf"], match["parameter"], int(match["layer"])
    path = f"model.layers.{layer}.{family.leaves[leaf]}.{parameter}"
    rotated = leaf if family.rotated and leaf in ROTATED else None
    shift = family.norm_shift if leaf.endswith("norm") and parameter == "weight" else 0.0
    return Name(path, layer, rotated, shift)
