"""Equality with PEFT: weights of merge_and_unload, outputs of the attached model, real weights."""

# transformers, peft and diffusers are typed loosely
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import peftsurgery as ps
from fixtures import bases
from peftsurgery.errors import CheckFailed, UnsupportedError
from tests.operations.merging import GOLDEN, check, dotted_lora, random, saved, state

INDEX = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))["goldens"]
FOLDERS = sorted(name for name, entry in INDEX.items() if (GOLDEN / entry["path"]).is_dir())
NOT_MERGEABLE_BY_PEFT = {"peft_llama_replication"}  # it adds to the shared weight twice


def tokens(vocabulary: int = 97) -> Tensor:
    return torch.randint(3, vocabulary, (2, 13), generator=torch.Generator().manual_seed(11))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    output = model.eval()(input_ids=tokens())
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def base_folder(name: str) -> Path:
    return bases.minilm_folder() if INDEX[name]["base"] == "minilm" else saved(INDEX[name]["base"])


def loaded(folder: Path) -> torch.nn.Module:
    kind = (
        AutoModel
        if "minilm" in str(folder).lower() or folder == bases.minilm_folder()
        else AutoModelForCausalLM
    )
    return kind.from_pretrained(folder)


@pytest.mark.parametrize("name", sorted(set(FOLDERS) - NOT_MERGEABLE_BY_PEFT))
def test_weights_of_merge_and_unload(tmp_path: Path, name: str) -> None:
    base = base_folder(name)
    out = tmp_path / ("minilm" if base == bases.minilm_folder() else "out")
    ps.merge(base, [(GOLDEN / name, 1.0)], out, verify="full")
    model = PeftModel.from_pretrained(loaded(base), GOLDEN / name)
    attached = logits(model)
    expected = model.merge_and_unload().state_dict()
    result = loaded(out)
    for key, weight in result.state_dict().items():
        error = (weight.double() - expected[key].double()).abs().max()
        assert error <= 2e-6 * max(1e-3, float(expected[key].abs().max())), key
    torch.testing.assert_close(logits(result), attached, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits(loaded(base)), attached)


def test_replicated_layers_are_written_out(tmp_path: Path) -> None:
    base = saved("tiny_llama")
    report = ps.merge(
        base, [(GOLDEN / "peft_llama_replication", 1.0)], tmp_path / "out", verify="full"
    )
    assert any(finding.code == "layer-replication" for finding in report.findings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    model = PeftModel.from_pretrained(loaded(base), GOLDEN / "peft_llama_replication")
    result = loaded(tmp_path / "out")
    assert len(result.model.layers) == 4
    torch.testing.assert_close(logits(result), logits(model), rtol=1e-5, atol=1e-5)
    before, after = state(base), state(tmp_path / "out")
    kept = "model.layers.{}.input_layernorm.weight"
    for new, old in enumerate((0, 1, 0, 1)):
        assert torch.equal(after[kept.format(new)], before[kept.format(old)])


def test_replication_of_a_sharded_base_rewrites_the_index(tmp_path: Path) -> None:
    base = saved("tiny_llama", shard="60KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    ps.merge(base, [(GOLDEN / "peft_llama_replication", 1.0)], tmp_path / "out", verify="full")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = state(tmp_path / "out")
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    whole = ps.merge(
        saved("tiny_llama"),
        [(GOLDEN / "peft_llama_replication", 1.0)],
        tmp_path / "whole",
        verify="full",
    )
    assert whole.ok
    assert all(torch.equal(t, after[n]) for n, t in state(tmp_path / "whole").items())
    loaded(tmp_path / "out")


def test_replication_in_place_and_by_some_adapters_only_is_refused(tmp_path: Path) -> None:
    base, golden = saved("tiny_llama"), GOLDEN / "peft_llama_replication"
    with pytest.raises(UnsupportedError, match="-o"):
        ps.merge(base, [(golden, 1.0)], in_place=True)
    with pytest.raises(UnsupportedError, match="one after the other"):
        ps.merge(base, [(golden, 1.0), (GOLDEN / "peft_llama_lora", 1.0)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_replication_is_undone_by_its_undo_file(tmp_path: Path) -> None:
    base, undo = saved("tiny_llama", shard="60KB"), tmp_path / "undo.safetensors"
    ps.merge(base, [(GOLDEN / "peft_llama_replication", 1.0)], tmp_path / "out", undo=undo)
    ps.unmerge(tmp_path / "out", undo, tmp_path / "back")
    for file in base.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_peft_lora_into_a_sharded_model(tmp_path: Path) -> None:
    base = saved("tiny_llama", shard="60KB")
    ps.merge(base, [(GOLDEN / "peft_llama_lora", 0.8)], tmp_path / "out", verify="full")
    from safetensors.torch import load_file

    file = load_file(GOLDEN / "peft_llama_lora" / "adapter_model.safetensors")
    config = json.loads((GOLDEN / "peft_llama_lora" / "adapter_config.json").read_text())
    deltas = dotted_lora(file, 0.8 * config["lora_alpha"] / config["r"])
    named = {f"{m.removeprefix('base_model.model.')}.weight": d for m, d in deltas.items()}
    check(state(base), state(tmp_path / "out"), named)
    assert {p.name for p in base.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    for file_name in (p.name for p in base.glob("*.safetensors")):
        from safetensors.torch import load_file as read

        assert read(base / file_name).keys() == read(tmp_path / "out" / file_name).keys()


def test_the_real_minilm_gives_the_embeddings_of_the_attached_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, golden = bases.minilm_folder(), GOLDEN / "peft_minilm_lora"
    ps.merge(folder, [(golden, 1.0)], tmp_path / "minilm", verify="full")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["A merged model must say the same.", "Das Gewicht ist die Summe.", "short"],
        padding=True,
        return_tensors="pt",
    )

    @torch.no_grad()
    def embed(model: torch.nn.Module) -> Tensor:
        hidden = model.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled)

    attached = embed(PeftModel.from_pretrained(AutoModel.from_pretrained(folder), golden))
    result = embed(AutoModel.from_pretrained(tmp_path / "minilm"))
    assert float((attached - embed(AutoModel.from_pretrained(folder))).norm(dim=1).max()) > 0.1
    assert float((result - attached).norm(dim=1).max()) < 1e-5


@pytest.mark.parametrize(
    "settings", [{"lora_bias": True}, {"use_rslora": True}, {"use_dora": True}]
)
def test_fresh_adapters_on_a_biased_model(tmp_path: Path, settings: dict[str, bool]) -> None:
    base = saved("tiny_llama(biases=True)")
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "o_proj", "down_proj"], **settings
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    normal = random(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * normal(*parameter.shape).abs())
    model.save_pretrained(tmp_path / "adapter")
    ps.merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out", verify="full")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5
    )


def test_lora_bias_on_a_base_without_biases_is_refused(tmp_path: Path) -> None:
    base = saved("tiny_llama")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
    )
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data.fill_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckFailed, match=r"has no 'model.layers.0.self_attn.q_proj.bias'"):
        ps.merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_initialisations_need_their_residual_base(tmp_path: Path, init: str) -> None:
    base = saved("tiny_llama")
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="--residual-base"):
        ps.merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with torch.no_grad():  # what is left of the base
        for module in model.modules():
            if hasattr(module, "lora_A") and "default" in module.lora_B:
                module.lora_B["default"].weight.zero_()
    model.merge_and_unload().save_pretrained(tmp_path / "residual")
    ps.merge(
        tmp_path / "residual", [(tmp_path / "adapter", 1.0)], tmp_path / "out", residual_base=True
    )
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_for_the_inner_model_finds_its_prefix(tmp_path: Path) -> None:
    base = saved("tiny_llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    inner = get_peft_model(model.model, LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj"]))
    for name, parameter in inner.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(4))
    inner.save_pretrained(tmp_path / "adapter")
    report = ps.merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out", verify="full")
    assert any(finding.code == "prefix" for finding in report.findings)
    expected = inner.merge_and_unload().state_dict()
    for key, weight in state(tmp_path / "out").items():
        if key.startswith("model."):
            torch.testing.assert_close(
                weight, expected[key.removeprefix("model.")], rtol=1e-5, atol=1e-6
            )
