"""Every method PEFT registers is handled here or refused by name, so that none is missed when PEFT
gains one."""

# peft is typed loosely
# pyright: reportArgumentType=false, reportPrivateImportUsage=false
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftsurgery import load_adapter
from peftsurgery.codec.conventions import PEFT_TYPES
from peftsurgery.codec.foreign import FOREIGN, foreign_key, foreign_type
from peftsurgery.errors import UnsupportedError

VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_layers": 1, "adapter_len": 3},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": VIRTUAL,
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "FOURIERFT": {"n_frequency": 5},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": VIRTUAL,
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "PSOFT": {"r": 4},
    "P_TUNING": VIRTUAL,
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "WAVEFT": {"n_frequency": 5},
}
OWN_TARGETS = ("ADAPTION_PROMPT", "LN_TUNING", "SHADOW", "TRAINABLE_TOKENS")
TYPES = [kind.value for kind in PeftType]
BUILT = [kind for kind in TYPES if kind != "XLORA"]  # which needs saved experts first


def saved(kind: str, folder: Path) -> Path:
    """What PEFT writes for a fresh adapter of this kind."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    options: dict[str, Any] = dict(OPTIONS.get(kind, {}))
    known = {field.name for field in dataclasses.fields(cls)}
    if "target_modules" in known and kind not in OWN_TARGETS:
        options["target_modules"] = ["q_proj"]
    config: PeftConfig = cls(task_type="CAUSAL_LM", **options)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_has_one_answer(kind: str) -> None:
    assert (kind in PEFT_TYPES) != (foreign_type(kind) is not None)


def test_no_answer_is_for_a_type_peft_never_had() -> None:
    named = {kind for method in FOREIGN for kind in method.types} | set(PEFT_TYPES)
    assert named <= {*TYPES, "BONE"}  # renamed MISS


@pytest.mark.parametrize("kind", BUILT)
def test_what_peft_saves_is_read_or_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    if kind in PEFT_TYPES:
        adapter = load_adapter(folder)
        tensors = sum(len(m.tensors()) for m in adapter.modules.values())
        assert tensors >= len(adapter.modules) > 0
        return
    method = foreign_type(kind)
    assert method is not None
    keys = load_file(folder / "adapter_model.safetensors")
    assert {foreign_key(key) for key in keys} == {method}
    with pytest.raises(UnsupportedError) as caught:
        load_adapter(folder)
    assert caught.value.exit_code == 3
    assert method.reason in str(caught.value)


@pytest.mark.parametrize("kind", [*(k for k in TYPES if k not in PEFT_TYPES), "NEWER"])
def test_the_config_alone_is_enough(kind: str, tmp_path: Path) -> None:
    """Keys of a LoRA under another method's config."""
    head = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{head}.lora_A.weight": torch.ones(2, 4), f"{head}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": kind, "r": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedError, match=f"peft_type '{kind}'") as caught:
        load_adapter(tmp_path)
    method = foreign_type(kind)
    assert ("not known to PEFT" if method is None else method.reason) in str(caught.value)


LYCORIS = {
    "T-LoRA": ("q_layer.weight", "p_layer.weight", "lambda_layer"),
    "sparse bias": ("bias_indices", "bias_values", "bias_size"),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_what_lycoris_has_beside_weights_is_refused_by_name(name: str, tmp_path: Path) -> None:
    tensors = {f"lycoris_attn_to_q.{suffix}": torch.ones(4, 4) for suffix in LYCORIS[name]}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match=name) as caught:
        load_adapter(tmp_path / "a.safetensors")
    method = foreign_key(next(iter(tensors)))
    assert method is not None
    assert method.reason in str(caught.value)


def test_mixtures_are_refused_by_name(tmp_path: Path) -> None:
    key = "base_model.internal_xlora_classifier.layers.0.weight"
    save_file({key: torch.ones(2, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="folder of one expert"):
        load_adapter(tmp_path / "a.safetensors")
