"""Tied embeddings, resized vocabularies, replaced and padded weights."""

# transformers, peft and diffusers are typed loosely
# pyright: reportArgumentType=false
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from fixtures import bases
from peftsurgery.errors import CheckFailed, UsageError
from tests.operations.merging import random, saved, state, write

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A tiny llama whose head is its embedding; the file holds one tensor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**{**bases.LLAMA, "tie_word_embeddings": True}))
    model.save_pretrained(tmp_path / "tied")
    assert HEAD not in load_file(tmp_path / "tied" / "model.safetensors")
    return tmp_path / "tied"


def adapter(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """A PEFT folder of these keys, with a LoRA on one projection where there is none."""
    if not any(".lora_" in key for key in tensors):
        normal = random(99)
        key = "model.layers.0.self_attn.q_proj"
        tensors = {
            **tensors,
            f"{key}.lora_A.weight": normal(2, 64),
            f"{key}.lora_B.weight": normal(64, 2),
        }
    write(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{k}": t for k, t in tensors.items()},
    )
    targets = sorted({key.split(".lora_")[0] for key in tensors if ".lora_" in key})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def on_embedding(folder: Path, seed: int = 1) -> tuple[Path, Tensor]:
    normal = random(seed)
    a, b = normal(2, 97) * 0.2, normal(64, 2) * 0.2
    tensors = {
        "model.embed_tokens.lora_embedding_A": a,
        "model.embed_tokens.lora_embedding_B": b,
    }
    return adapter(folder, tensors), 2 * (b.double() @ a.double()).T


def on_head(folder: Path, seed: int = 2) -> tuple[Path, Tensor]:
    normal = random(seed)
    a, b = normal(2, 64) * 0.2, normal(97, 2) * 0.2
    return adapter(folder, {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}), 2 * (
        b.double() @ a.double()
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(5))
    return model.eval()(input_ids=ids).logits


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("side", [on_embedding, on_head])
def test_one_side_of_a_tied_pair_is_an_error_that_says_what_to_pass(
    tmp_path: Path, tied: Path, side
) -> None:
    file, _ = side(tmp_path / "a")
    with pytest.raises(UsageError, match=r"--tied both .*--tied untie"):
        ps.merge(tied, [(file, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", [on_embedding, on_head])
def test_both_changes_the_shared_tensor(tmp_path: Path, tied: Path, side) -> None:
    file, delta = side(tmp_path / "a")
    ps.merge(tied, [(file, 1.0)], tmp_path / "out", tied="both", verify="full")
    before, after = state(tied), state(tmp_path / "out")
    assert before.keys() == after.keys()
    assert float((after[EMBED].double() - before[EMBED].double() - delta).abs().max()) < 1e-6
    assert config_of(tmp_path / "out") == config_of(tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("side", [on_embedding, on_head])
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_untie_writes_the_head_and_says_so_in_the_config(tmp_path: Path, side, shard: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**{**bases.LLAMA, "tie_word_embeddings": True}))
    base = tmp_path / "tied"
    model.save_pretrained(base, max_shard_size=shard)
    file, delta = side(tmp_path / "a")
    report = ps.merge(base, [(file, 1.0)], tmp_path / "out", tied="untie", verify="full")
    assert any(finding.code == "untied" for finding in report.findings)
    before, after = state(base), state(tmp_path / "out")
    touched, kept = (EMBED, HEAD) if side is on_embedding else (HEAD, EMBED)
    assert torch.equal(after[kept], before[EMBED])
    assert float((after[touched].double() - before[EMBED].double() - delta).abs().max()) < 1e-6
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    untied = LlamaForCausalLM(LlamaConfig(**bases.LLAMA)).eval()
    untied.load_state_dict({**model.state_dict(), **{n: t.float() for n, t in after.items()}})
    torch.testing.assert_close(logits(result), logits(untied))
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), file)
    torch.testing.assert_close(logits(result), logits(attached), rtol=1e-4, atol=1e-5)


def test_different_changes_of_both_sides_need_untie(tmp_path: Path, tied: Path) -> None:
    one, _ = on_embedding(tmp_path / "one")
    two, _ = on_head(tmp_path / "two")
    both = {
        **load_file(one / "adapter_model.safetensors"),
        **load_file(two / "adapter_model.safetensors"),
    }
    file = adapter(
        tmp_path / "both", {k.removeprefix("base_model.model."): t for k, t in both.items()}
    )
    for policy in ("error", "both"):
        with pytest.raises(UsageError, match="differently"):
            ps.merge(tied, [(file, 1.0)], tmp_path / "out", tied=policy)
    ps.merge(tied, [(file, 1.0)], tmp_path / "out", tied="untie", verify="full")
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), file)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(result), logits(attached), rtol=1e-4, atol=1e-5)


def test_modules_to_save_of_both_sides_alike_is_one_change(tmp_path: Path, tied: Path) -> None:
    value = random(9)(97, 64)
    file = adapter(
        tmp_path / "a", {EMBED: value, HEAD: value}, modules_to_save=["embed_tokens", "lm_head"]
    )
    ps.merge(tied, [(file, 1.0)], tmp_path / "out", verify="full")
    after = state(tmp_path / "out")
    assert torch.equal(after[EMBED], value)
    assert HEAD not in after


def test_a_stored_copy_of_a_tied_head_follows_the_embedding(tmp_path: Path, tied: Path) -> None:
    path = tied / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, HEAD: torch.zeros_like(tensors[EMBED])}, path, {"format": "pt"})
    file, delta = on_embedding(tmp_path / "a")
    ps.merge(tied, [(file, 1.0)], tmp_path / "out", tied="both", verify="full")
    after = state(tmp_path / "out")
    assert torch.equal(after[EMBED], after[HEAD])
    assert float((after[EMBED].double() - tensors[EMBED].double() - delta).abs().max()) < 1e-6


def test_untied_bases_and_encoders_are_left_alone(tmp_path: Path) -> None:
    file, delta = on_embedding(tmp_path / "a")
    base = saved("tiny_llama")
    ps.merge(base, [(file, 1.0)], tmp_path / "out", verify="full")
    before, after = state(base), state(tmp_path / "out")
    assert torch.equal(before[HEAD], after[HEAD])
    assert float((after[EMBED].double() - before[EMBED].double() - delta).abs().max()) < 1e-6


def test_gpt2_is_tied_by_its_head_that_is_not_stored(tmp_path: Path) -> None:
    base = saved("tiny_gpt2")
    normal = random(4)
    tensors = {"lm_head.lora_A.weight": normal(2, 48), "lm_head.lora_B.weight": normal(97, 2)}
    file = adapter(tmp_path / "a", tensors)
    with pytest.raises(UsageError, match="--tied"):
        ps.merge(base, [(file, 1.0)], tmp_path / "out")
    ps.merge(base, [(file, 1.0)], tmp_path / "out", tied="untie", verify="full")
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), file)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(result), logits(attached), rtol=1e-4, atol=1e-4)


# vocabularies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [104, 90])
def test_a_resized_vocabulary_is_written_into_the_config(tmp_path: Path, rows: int) -> None:
    base = saved("tiny_llama")
    normal = random(6)
    values = {EMBED: normal(rows, 64), HEAD: normal(rows, 64)}
    file = adapter(tmp_path / "a", values, modules_to_save=["embed_tokens", "lm_head"])
    ps.merge(base, [(file, 1.0)], tmp_path / "out", verify="full")
    assert config_of(tmp_path / "out")["vocab_size"] == rows
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result.lm_head.weight.shape == (rows, 64)
    after = state(tmp_path / "out")
    assert all(torch.equal(after[name], value) for name, value in values.items())


def test_a_vocabulary_resized_on_one_side_only_is_refused(tmp_path: Path) -> None:
    file = adapter(tmp_path / "a", {EMBED: random(6)(104, 64)}, modules_to_save=["embed_tokens"])
    with pytest.raises(UsageError, match="unevenly"):
        ps.merge(saved("tiny_llama"), [(file, 1.0)], tmp_path / "out")


def test_a_resized_value_has_no_half_strength(tmp_path: Path) -> None:
    values = {EMBED: random(6)(104, 64), HEAD: random(7)(104, 64)}
    file = adapter(tmp_path / "a", values)
    with pytest.raises(CheckFailed, match=r"no meaning at strength 0\.5"):
        ps.merge(saved("tiny_llama"), [(file, 0.5)], tmp_path / "out")


def test_peft_with_added_tokens(tmp_path: Path) -> None:
    """PEFT saves the grown embedding and head themselves, and LoRAs beside them."""
    base = saved("tiny_llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model.resize_token_embeddings(101)
        settings = LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens", "lm_head"],
        )
        attached = get_peft_model(model, settings)
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
    attached.save_pretrained(tmp_path / "a")
    expected = logits(attached)
    ps.merge(base, [(tmp_path / "a", 1.0)], tmp_path / "out", verify="full")
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 101
    torch.testing.assert_close(logits(result), expected, rtol=1e-4, atol=1e-5)


def test_lora_on_an_embedding_that_grew(tmp_path: Path) -> None:
    """With `embed_tokens` a LoRA target PEFT saves the grown base embedding as base_layer.weight
    beside the factors.
    """
    base = saved("tiny_llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model.resize_token_embeddings(101)
        settings = LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "embed_tokens", "lm_head"]
        )
        attached = get_peft_model(model, settings)
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
    attached.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in keys)
    expected = logits(attached)
    ps.merge(base, [(tmp_path / "a", 1.0)], tmp_path / "out", verify="full")
    assert config_of(tmp_path / "out")["vocab_size"] == 101
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(result), expected, rtol=1e-4, atol=1e-5)
