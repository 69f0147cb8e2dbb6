"""PEFT's RoAd, DeLoRA, HiRA, LN tuning and trainable tokens: its merged weights and outputs against
ours, from folders it wrote; and it reads the folders we write."""

# peft is typed loosely
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import (
    DeloraConfig,
    HiraConfig,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    RoadConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from fixtures import bases
from peftsurgery import load_adapter, merge, runtime, save_adapter
from peftsurgery.errors import UnsupportedError, UsageError
from tests.interop.test_peft_rotations import WITHIN, applied, error, inputs


class Block(nn.Module):
    """One layer of each kind these tuners know, in a row; `embed_tokens` is a name PEFT knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 24)
        self.norm = nn.LayerNorm(24)
        self.first = nn.Linear(24, 36)
        self.second = nn.Linear(36, 24, bias=False)
        self.conv = nn.Conv2d(4, 10, 3, padding=1)
        self.line = nn.Conv1d(10, 6, 3, bias=False)
        self.point = nn.Conv2d(10, 10, 1, bias=False)
        self.group = nn.GroupNorm(2, 10)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(self.embed_tokens(ids))
        hidden = hidden + self.second(torch.tanh(self.first(hidden)))
        image = self.group(self.point(torch.tanh(self.conv(image))))
        return hidden, self.line(image.flatten(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


LINEAR = ["first", "second"]


def _cases() -> Iterator[tuple[str, PeftConfig]]:
    for variant in ("road_1", "road_2", "road_4"):
        for group in (2, 4, 12):
            config = RoadConfig(variant=variant, group_size=group, target_modules=LINEAR)
            yield f"{variant}_g{group}", config
    yield "delora", DeloraConfig(r=3, target_modules=LINEAR)
    yield "delora_bias", DeloraConfig(r=3, delora_lambda=4, bias="all", target_modules=LINEAR)
    config = DeloraConfig(r=40, rank_pattern={"second": 2}, target_modules=LINEAR)
    yield "delora_ranks", config
    yield "hira", HiraConfig(r=3, target_modules=[*LINEAR, "embed_tokens"])
    yield "hira_conv", HiraConfig(r=40, target_modules=["conv", "line", "point"])
    yield "ln", LNTuningConfig(target_modules=["norm", "group"])
    yield "ln_linear", LNTuningConfig(target_modules=["norm", "first"], modules_to_save=["second"])
    yield "tokens", TrainableTokensConfig(token_indices=[7, 0, 3], target_modules=["embed_tokens"])
    yield "tokens_beside_lora", LoraConfig(target_modules=LINEAR, trainable_token_indices=[9, 2])
    named = {"embed_tokens": [4]}
    config = LoraConfig(target_modules=["conv"], trainable_token_indices=named, use_dora=True)
    yield "tokens_beside_dora", config


CASES = dict(_cases())


def shake(model: nn.Module) -> None:
    """Training: something random added to every trained tensor."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    model.eval()


def trained(name: str) -> tuple[Block, PeftModel]:
    torch.manual_seed(5)
    base = Block()
    shake(base)
    model = get_peft_model(deepcopy(base), deepcopy(CASES[name]))
    shake(model)
    return base, model


@pytest.mark.parametrize("name", CASES)
def test_weights_and_outputs_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base, model = trained(name)
    with torch.no_grad():
        wanted = model(*inputs())
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, architecture="generic")
    state = applied(base, adapter)
    merged = deepcopy(model).merge_and_unload().state_dict()
    if name == "ln_linear":  # PEFT's LN tuning leaves its wrapper around modules_to_save
        assert "second.original_module.weight" in merged
        merged["second.weight"] = merged.pop("second.modules_to_save.default.weight")
        del merged["second.original_module.weight"]
    assert state.keys() == merged.keys()
    for key, tensor in merged.items():
        assert error(state[key], tensor) < WITHIN, key
    moved = sum(not torch.equal(state[k], t) for k, t in base.state_dict().items())
    assert moved >= len(adapter.modules)
    for found, expected in zip(functional_call(base, state, inputs()), wanted, strict=True):
        assert error(found, expected) < WITHIN * 3


@pytest.mark.parametrize("name", CASES)
def test_a_live_model_gives_the_outputs_of_peft(name: str, tmp_path: Path) -> None:
    base, model = trained(name)
    model.save_pretrained(tmp_path)
    runtime.attach(base, tmp_path, architecture="generic")
    with torch.no_grad():
        for found, wanted in zip(base(*inputs()), model(*inputs()), strict=True):
            assert error(found, wanted) < WITHIN * 3


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_we_write(name: str, tmp_path: Path) -> None:
    base, model = trained(name)
    model.save_pretrained(tmp_path / "peft")
    ours = tmp_path / "ours"
    save_adapter(load_adapter(tmp_path / "peft", architecture="generic"), ours, layout="peft")
    with torch.no_grad():
        outputs = model(*inputs())
    again = PeftModel.from_pretrained(deepcopy(base), str(ours)).eval()
    result = set_peft_model_state_dict(again, load_peft_weights(str(ours)))
    assert not result.unexpected_keys
    prefixes = ("road_", "delora_", "hira_", "ln_tuning", "trainable_tokens_delta")
    assert not [k for k in result.missing_keys if any(p in k for p in prefixes)]
    with torch.no_grad():
        for found, expected in zip(again(*inputs()), outputs, strict=True):
            assert torch.equal(found, expected)
    own = json.loads((ours / "adapter_config.json").read_text(encoding="utf-8"))
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert own.keys() <= theirs.keys() | {"use_dora", "use_rslora", "lora_bias"}
    other = {"ln_linear": {"target_modules"}, "delora_ranks": {"r", "rank_pattern"}}
    free = {"peft_version", "inference_mode", "init_lora_weights"} | other.get(name, set())
    for field in own.keys() - free:
        mine, wanted = own[field], theirs[field]
        if isinstance(mine, list):
            mine, wanted = sorted(mine), sorted(wanted)
        assert mine == wanted or (not mine and not wanted), field


def test_peft_ignores_the_ranks_of_hira(tmp_path: Path) -> None:
    """Its rank_pattern is read and not used, so that folders of several ranks cannot be loaded."""
    config = HiraConfig(r=4, rank_pattern={"second": 2}, target_modules=LINEAR)
    model = get_peft_model(Block(), config)
    assert model.base_model.model.second.r == {"default": 4}
    model.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", architecture="generic")
    path = next(p for p in adapter.modules if p.endswith("second"))
    adapter.modules[path] = adapter.modules[path].with_tensors(
        up=torch.ones(24, 2), down=torch.ones(2, 36)
    )
    with pytest.raises(UnsupportedError, match="ignores rank_pattern"):
        save_adapter(adapter, tmp_path / "b", layout="peft")


def llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    ).eval()


@pytest.mark.parametrize("lora", [False, True])
def test_tokens_of_a_tied_model_are_in_the_head_too(lora: bool, tmp_path: Path) -> None:
    base = llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    config = (
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 17])
        if lora
        else TrainableTokensConfig(token_indices=[3, 17])
    )
    model = get_peft_model(deepcopy(base), config)
    shake(model)
    model.save_pretrained(tmp_path / "a")
    ids = torch.arange(12).reshape(2, 6) + 5
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    save_adapter(load_adapter(tmp_path / "a"), tmp_path / "b", layout="peft")
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "b")).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, wanted)
    live = deepcopy(base)
    runtime.attach(live, tmp_path / "a")
    assert error(live(input_ids=ids).logits, wanted) < WITHIN
    runtime.merge(live)
    assert error(live(input_ids=ids).logits, wanted) < WITHIN
    runtime.unmerge(live)
    runtime.detach(live)
    assert live.lm_head.weight is live.model.embed_tokens.weight
    assert torch.equal(live(input_ids=ids).logits, base(input_ids=ids).logits)
    merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        assert error(merged(input_ids=ids).logits, wanted) < WITHIN
        assert error(base(input_ids=ids).logits, wanted) > 1e-2


def test_tokens_of_embedding_and_head_apart(tmp_path: Path) -> None:
    base = llama(tied=False)
    base.save_pretrained(tmp_path / "base")
    tokens = {"embed_tokens": [3, 5], "lm_head": [2]}
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens)
    model = get_peft_model(deepcopy(base), config)
    shake(model)
    model.save_pretrained(tmp_path / "a")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    adapter = load_adapter(tmp_path / "a")
    found = {p.rpartition(".")[2]: m for p, m in adapter.modules.items() if m.algorithm == "tokens"}
    assert sorted(m.indices for m in found.values()) == [(2,), (3, 5)]
    save_adapter(adapter, tmp_path / "b", layout="peft")
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "b")).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, wanted)
    merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert error(merged(input_ids=ids).logits, wanted) < WITHIN


def test_hira_on_layers_that_store_their_weight_transposed(tmp_path: Path) -> None:
    base = bases.BUILDERS["tiny_gpt2"]().eval()
    config = HiraConfig(r=2, target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True)
    model = get_peft_model(deepcopy(base), config)
    shake(model)
    model.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert {m.stored for m in adapter.modules.values()} == {"conv1d", "embedding"}
    state = applied(base, adapter)
    for key, wanted in deepcopy(model).merge_and_unload().state_dict().items():
        if key != "lm_head.weight":  # tied, and PEFT's merge leaves the embedding changed for both
            assert error(state[key], wanted) < WITHIN, key
    save_adapter(adapter, tmp_path / "b", layout="peft")
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "b")).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["road_1_g4", "tokens"])
def test_what_only_the_config_knows_is_asked_for(name: str, tmp_path: Path) -> None:
    trained(name)[1].save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        load_adapter(tmp_path / "adapter_model.safetensors", architecture="generic")
