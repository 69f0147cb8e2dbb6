"""QLoRA from end to end: quantize, train beside the packed base, hand over to PEFT, merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peftsurgery as ps
from peftsurgery import runtime
from tests.algorithms.cases import close


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "plain"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def answer(model: torch.nn.Module, x: Tensor) -> Tensor:
    """Logits as in training: in eval mode some CPUs re-order 4-bit weights, see `freezing`."""
    model.train()
    with torch.no_grad():
        return model(x).logits.float()


def dense(folder: Path, name: Path) -> PreTrainedModel:
    """The packed folder as plain weights: its own kernels add noise of their own."""
    ps.dequantize(folder, name)
    return load(name)


@pytest.mark.parametrize(("format", "rate", "left"), [("nf4", 2e-4, 0.7), ("int8", 5e-4, 0.1)])
def test_from_end_to_end(
    format: str, rate: float, left: float, plain: Path, tmp_path: Path, rng: torch.Generator
) -> None:
    """left: how much of the change the merged model may be away from the attached one."""
    packed = tmp_path / "packed"
    ps.quantize(plain, packed, format=format)
    model, x = load(packed), torch.randint(0, 64, (4, 12), generator=rng)
    kind = "Linear4bit" if format == "nf4" else "Linear8bitLt"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = answer(model, x)
    found = runtime.attach(model, "lora", targets="all-linear", rank=2, alpha=8.0, generator=rng)
    assert len(found.modules) == 14
    assert {type(model.get_submodule(path)).__name__ for path in found.modules} == {kind}
    optimizer = torch.optim.Adam(runtime.trainable_parameters(model).values(), rate)
    losses: list[float] = []
    for _ in range(20):
        loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    live = answer(model, x)
    runtime.save(model, tmp_path / "lora")

    runtime.merge(model, min_survival=-10.0)
    merged = answer(model, x)
    runtime.unmerge(model)
    runtime.detach(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(answer(model, x), base)

    runtime.attach(model, tmp_path / "lora")
    close(answer(model, x), live, 1e-5)
    runtime.detach(model)
    theirs = PeftModel.from_pretrained(model, tmp_path / "lora")
    close(answer(theirs, x), live, 1e-4)

    lora = [(tmp_path / "lora", 1.0)]
    ps.merge(packed, lora, tmp_path / "out", min_survival=-10.0)
    ps.merge(packed, lora, tmp_path / "near", rounding="nearest", min_survival=-10.0)
    assert {type(m).__name__ for m in load(tmp_path / "out").modules()} >= {kind}
    wanted = dense(packed, tmp_path / "wide")
    runtime.attach(wanted, tmp_path / "lora")
    exact = answer(wanted, x)
    with runtime.disabled(wanted):
        change = float((answer(wanted, x) - exact).norm())
    outs = {n: answer(dense(tmp_path / n, tmp_path / f"{n} wide"), x) for n in ("out", "near")}
    distances = {name: float((found - exact).norm()) for name, found in outs.items()}
    assert distances["out"] < left * change
    if format == "nf4":  # int8 is fine enough for this change
        assert distances["out"] < 0.8 * distances["near"]
    close(merged, answer(load(tmp_path / "out"), x), 1e-4)
