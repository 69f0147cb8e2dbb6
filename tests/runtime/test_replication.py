"""Layers run several times, with weights shared and adapters of their own, as PEFT has it."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from peftsurgery import runtime
from peftsurgery.errors import UsageError
from tests.algorithms.cases import close
from tests.runtime import small
from tests.runtime.models import scramble

RANGES = [[0, 2], [1, 2], [0, 1]]


def bert() -> PreTrainedModel:
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    return BertModel(config).eval()


@pytest.mark.parametrize("make", [small.llama, bert])
def test_outputs_are_pefts(make: type, tmp_path: Path) -> None:
    model, x = make(), small.tokens()
    own = sum(p.numel() for p in model.parameters())
    before = model(x)[0].detach()
    change = runtime.replicate_layers(model, RANGES)
    assert model.config.num_hidden_layers == 4
    assert sum(p.numel() for p in model.parameters()) == own
    targets = ["q_proj", "v_proj"] if make is small.llama else ["query", "value"]
    found = runtime.attach(model, "lora", targets=targets, rank=3, alpha=2.0)
    assert len(found.modules) == 8
    assert runtime.counts(model).base == own
    rng = torch.Generator().manual_seed(6)
    scramble(found, rng)
    wanted = model(x)[0].detach()
    runtime.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a").eval()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["layer_replication"] == RANGES
    close(theirs(x)[0], wanted, 1e-5)
    again = make()
    runtime.replicate_layers(again, RANGES)
    runtime.attach(again, tmp_path / "a")
    close(again(x)[0], wanted, 1e-5)
    # merging unties what it changes, unmerging ties it again
    runtime.merge(model)
    close(model(x)[0], wanted, 1e-5)
    runtime.unmerge(model)
    assert sum(p.numel() for p in model.parameters()) == own + runtime.counts(model).adapters
    with pytest.raises(UsageError, match="detach them first"):
        change.undo()
    runtime.detach(model)
    change.undo()
    assert model.config.num_hidden_layers == 2
    assert torch.equal(model(x)[0], before)


def test_the_cache_has_one_place_per_replica() -> None:
    model, x = small.llama(), small.tokens()
    runtime.replicate_layers(model, RANGES)
    full = model(x).logits
    first = model(x[:, :5], use_cache=True)
    rest = model(x[:, 5:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, rest.logits], 1), full, 1e-5)
    x = x[:, :4]
    model.train()
    runtime.attach(model, "lora", targets="q_proj", rank=2)
    model(x, labels=x).loss.backward()
    runtime.check_gradients(model)


def test_what_cannot_be_replicated() -> None:
    model = small.llama()
    for ranges, error in (
        ([[0, 3]], r"\[0, 3\] is no range"),
        ([[1, 1]], "no range"),
        ([[0]], "no range"),
        ([], "no range of layers is given"),
    ):
        with pytest.raises(UsageError, match=error):
            runtime.replicate_layers(model, ranges)
    with pytest.raises(UsageError, match="no list of layers"):
        runtime.replicate_layers(nn.Sequential(nn.Linear(2, 2)), RANGES)
    runtime.attach(model, "lora", targets="q_proj", rank=2)
    with pytest.raises(UsageError, match="replicate first, then attach"):
        runtime.replicate_layers(model, RANGES)
