"""Counts and files that PEFT's documents state, on models of the real sizes without data."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    MT5Config,
    MT5ForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peftsurgery import runtime
from tests.algorithms.cases import close


def test_roberta_with_lora_and_its_head() -> None:
    """124,978,946 in all, 923,906 learnable (0.7392 %): rank 4 on query and every output.dense."""
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    assert config.num_labels == 2
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    found = runtime.attach(model, "lora", targets=["query", "output.dense"], rank=4)
    assert len(found.modules) == 3 * 12
    assert found.trainable == 331_776
    wide = found.modules["roberta.encoder.layer.0.output.dense"].tensors()
    assert (wide["down"].numel(), wide["up"].numel()) == (12_288, 3_072)
    model.classifier.requires_grad_(True)
    counts = runtime.counts(model)
    assert (counts.base, counts.adapters) == (124_647_170, 331_776)
    assert (counts.trainable, counts.base + counts.adapters) == (923_906, 124_978_946)
    assert round(counts.share * 100, 4) == 0.7392


def test_mt0_with_ia3() -> None:
    """282,624 of 1,229,863,936 (0.022980103060766553 %): outputs of k, v and wi_1 are scaled; one
    embedding for encoder and decoder, a head of its own.
    """
    config = MT5Config(
        vocab_size=250112,
        d_model=1024,
        d_kv=64,
        d_ff=2816,
        num_layers=24,
        num_heads=16,
        feed_forward_proj="gated-gelu",
    )
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(config)
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    found = runtime.attach(model, "ia3", targets=["k", "v", "wi_1"])
    counts = runtime.counts(model)
    assert found.trainable == counts.trainable == 282_624
    assert counts.base + counts.adapters == 1_229_863_936
    assert f"{counts.share * 100:.15f}" == f"{0.022980103060766553:.15f}"
    runtime.detach(model)
    plan = {"wi_1": ("ia3", {"acts_on": "in"}), "k": "ia3", "v": "ia3"}
    assert runtime.attach(model, plan).trainable == 196_608  # type: ignore[arg-type]


def test_an_mlp_with_lora_and_a_trained_head() -> None:
    """52,162 of 4,100,164. The documents state 56,164: the head's frozen original, 4,002 numbers,
    was counted as trainable too.
    """
    with torch.device("meta"):
        seq = nn.Sequential(
            nn.Linear(20, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 2)
        )
    model = nn.ModuleDict({"seq": seq})
    base = sum(p.numel() for p in model.parameters())
    materialised = model.to_empty(device="cpu")  # what is trained whole starts as a copy
    runtime.attach(
        materialised, "lora", targets=["seq.0", "seq.2"], rank=8, modules_to_save=["seq.4"]
    )
    counts = runtime.counts(materialised)
    assert (counts.trainable, counts.base) == (52_162, base)
    assert counts.base + counts.adapters == 4_100_164
    assert counts.trainable + 4_002 == 56_164
    assert not any(p.requires_grad for p in seq[4]._parameters.values() if p is not None)


def test_the_ia3_config_of_bert(tmp_path: Path) -> None:
    """output.dense is the attention's too: four vectors per layer, two of them on inputs."""
    model = BertModel(BertConfig(num_hidden_layers=1, vocab_size=30))
    model.config._name_or_path = "bert-base-uncased"
    plan = {"output.dense": ("ia3", {"acts_on": "in"}), "key": "ia3", "value": "ia3"}
    found = runtime.attach(model, plan)  # type: ignore[arg-type]
    shapes = [tuple(a.tensors()["vector"].shape) for a in found.modules.values()]
    assert sorted(shapes) == [(1, 768), (1, 3072), (768, 1), (768, 1)]
    runtime.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    assert config["base_model_name_or_path"] == "bert-base-uncased"
    assert not config["fan_in_fan_out"]
    last = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert last == {"key", "value", "dense"}
    assert {name.rpartition(".")[2] for name in config["feedforward_modules"]} == {"dense"}


class Dummy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.linear = nn.Linear(10, 10)
        self.lm_head = nn.Linear(10, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.linear(self.embedding(ids)))


def test_injection_into_any_module(tmp_path: Path) -> None:
    """Rank 64 on a layer of 10 by 10, alpha 16, dropout 0.1; the model stays of its class."""
    model, ids = Dummy().eval(), torch.arange(10)[None]
    before = model(ids).detach()
    keys = list(model.state_dict())
    runtime.attach(model, "lora", targets=["linear"], rank=64, alpha=16, dropout=0.1)
    assert type(model) is Dummy
    assert isinstance(model.linear, nn.Linear)
    assert list(model.state_dict()) == keys
    assert repr(model).count("(linear): Linear(") == 1
    assert "in_features=10" in repr(model.linear)
    assert torch.equal(model(ids), before)
    adapter = runtime.adapters(model)["linear"]
    assert float(adapter.scale) == 0.25
    runtime.save(model, tmp_path / "a")
    from safetensors import safe_open

    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    assert shapes == {
        "base_model.model.linear.lora_A.weight": (64, 10),
        "base_model.model.linear.lora_B.weight": (10, 64),
    }


def test_the_smallest_config_of_a_lora(tmp_path: Path) -> None:
    """{"target_modules": ["query", "value"], "peft_type": "LORA"}: rank and alpha are both 8."""
    model = BertModel(BertConfig(num_hidden_layers=1, vocab_size=30)).eval()
    start = "base_model.model.encoder.layer.0.attention.self"
    rng = torch.Generator().manual_seed(1)
    tensors = {
        f"{start}.{name}.lora_{side}.weight": torch.randn(shape, generator=rng)
        for name in ("query", "value")
        for side, shape in (("A", (8, 768)), ("B", (768, 8)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"target_modules": ["query", "value"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = runtime.attach(model, tmp_path)
    assert sorted(path.rpartition(".")[2] for path in found.modules) == ["query", "value"]
    delta = found.modules["encoder.layer.0.attention.self.query"].delta()
    a, b = (tensors[f"{start}.query.lora_{side}.weight"] for side in "AB")
    close(delta, b @ a, 1e-5)
