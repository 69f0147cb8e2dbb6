"""Train a real model, save, load by us and by PEFT, merge as a file: one and the same outputs."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

import peftsurgery
from peftsurgery import runtime
from peftsurgery.errors import UsageError
from tests.algorithms.cases import close
from tests.runtime import small

LLAMA = "all-linear"
GPT2 = ["c_attn", "c_proj", "c_fc"]
CASES = {
    "lora": (small.llama, "lora", LLAMA, {"alpha": 8}),
    "dora": (small.llama, "lora", LLAMA, {"dora": True}),
    "rslora": (small.llama, "lora", LLAMA, {"rslora": True, "alpha": 8}),
    "patterns": (small.llama, "lora", LLAMA, {"rank_pattern": {"q_proj": 2}}),
    "head": (small.llama, "lora", "q_proj", {"modules_to_save": ["lm_head"]}),
    "loha": (small.llama, "loha", LLAMA, {"alpha": 8}),
    "lokr": (small.llama, "lokr", LLAMA, {"alpha": 8}),
    "pissa": (small.llama, "lora", LLAMA, {"init": "pissa", "alpha": 8}),
    "olora": (small.llama, "lora", LLAMA, {"init": "olora"}),
    "embedding": (small.llama, "lora", ["embed_tokens", "v_proj"], {"alpha": 8}),
    "gpt2": (small.gpt2, "lora", GPT2, {"alpha": 8}),
    "gpt2-dora": (small.gpt2, "lora", GPT2, {"dora": True}),
    "gpt2-bias": (small.gpt2, "lora", GPT2, {"bias": "targets"}),
}


def train(model: PreTrainedModel, steps: int = 3) -> None:
    """The loss falls over a few steps on one batch."""
    model.train()
    optimizer = torch.optim.AdamW(runtime.param_groups(model, 5e-3))  # type: ignore[arg-type]
    losses: list[float] = []
    for _ in range(steps):
        loss = model(small.tokens(), labels=small.tokens()).loss
        loss.backward()
        runtime.check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()


@pytest.mark.parametrize("case", CASES)
def test_train_save_load_merge(case: str, tmp_path: Path) -> None:
    make, algorithm, targets, options = CASES[case]
    base = tmp_path / "base"
    make().save_pretrained(base)
    model = make()
    x = small.tokens(1)
    before = model(x).logits
    runtime.attach(model, algorithm, targets=targets, rank=4, **options)  # type: ignore[arg-type]
    close(model(x).logits, before, 1e-5)
    train(model)
    with torch.no_grad():
        wanted = model(x).logits
        assert float((wanted - before).abs().max()) > 1e-3
        runtime.save(model, tmp_path / "adapter")
        again = make()
        found = runtime.attach(again, tmp_path / "adapter")
        assert found.unmatched == ()
        close(again(x).logits, wanted, 1e-5)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
        close(theirs(x).logits, wanted, 1e-5)
        peftsurgery.merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
        merged = type(again).from_pretrained(tmp_path / "merged").eval()
        close(merged(x).logits, wanted, 1e-5)
        runtime.merge(again)
        close(again(x).logits, wanted, 1e-5)
        runtime.unmerge(again)
        runtime.detach(again)
        assert torch.equal(again(x).logits, before)


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    "rslora": lambda: peft.LoraConfig(r=3, use_rslora=True, target_modules=["o_proj"]),
    "dora": lambda: peft.LoraConfig(r=3, use_dora=True, target_modules="all-linear"),
    "bias": lambda: peft.LoraConfig(r=3, lora_bias=True, target_modules=["q_proj"]),
    "embedding": lambda: peft.LoraConfig(r=3, target_modules=["embed_tokens", "v_proj"]),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"]),
    "lokr-both": lambda: peft.LoKrConfig(r=2, decompose_both=True, target_modules=["up_proj"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_pefts_forward_and_merge(case: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(small.llama(), CONFIGS[case]()).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
                assert "lora" in name or "hada" in name or "lokr" in name
    theirs.save_pretrained(tmp_path)
    ours, x = small.llama(), small.tokens(1)
    runtime.attach(ours, tmp_path)
    with torch.no_grad():
        wanted = theirs(x).logits
        assert float((wanted - small.llama()(x).logits).abs().max()) > 1e-2
        close(ours(x).logits, wanted, 1e-5)
        runtime.merge(ours)
        close(ours(x).logits, wanted, 1e-5)
        runtime.unmerge(ours)
        if case != "bias":  # PEFT cannot merge a bias into a layer without one; we can
            merged = theirs.merge_and_unload()
            close(ours(x).logits, merged(x).logits, 1e-5)
        runtime.detach(ours)
    if case == "bias":  # PEFT's is scaled in the forward, ours when the file is read
        return
    # gradients of the factors as PEFT has them
    theirs = peft.PeftModel.from_pretrained(small.llama(), tmp_path, is_trainable=True).eval()
    runtime.attach(ours, tmp_path, trainable=True)
    for model in (theirs, ours):
        model(x, labels=x).loss.backward()
    mine = sum(float(p.grad.norm() ** 2) for p in ours.parameters() if p.grad is not None)
    other = sum(float(p.grad.norm() ** 2) for p in theirs.parameters() if p.grad is not None)
    assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradient_checkpointing_in_both_modes(checkpointing: bool | None) -> None:
    model = small.llama().train()
    runtime.attach(model, "lora", targets="all-linear", rank=2, dropout=0.1)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    handle = None
    if checkpointing:
        handle = runtime.enable_input_gradients(model)
    torch.manual_seed(0)
    model(small.tokens(), labels=small.tokens()).loss.backward()
    runtime.check_gradients(model)
    got = {n: p.grad for n, p in runtime.trainable_parameters(model).items()}
    if handle is not None:
        handle.remove()
    plain = small.llama().train()
    runtime.attach(plain, "lora", targets="all-linear", rank=2, dropout=0.1)
    plain.load_state_dict({}, strict=False)
    for ours, theirs in zip(
        runtime.adapters(plain).values(), runtime.adapters(model).values(), strict=True
    ):
        ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(0)
    plain(small.tokens(), labels=small.tokens()).loss.backward()
    for name, parameter in runtime.trainable_parameters(plain).items():
        grad = got[name]
        assert grad is not None
        assert parameter.grad is not None
        close(grad, parameter.grad, 1e-5)


LAYOUTS: list[tuple[str, str, object]] = [
    ("peft", "lora", "all-linear"),
    ("diffusers", "lora", ["to_q", "conv1"]),
    ("lycoris", "lora", ["to_q", "conv1"]),
    ("lycoris", "lokr", "all-linear"),
    ("lycoris", "loha", ["conv1", "to_k"]),
    ("lycoris", "full", ["norm1", "to_k", "conv_in"]),
    ("onetrainer", "lora", ["to_q", "to_v"]),
]


@pytest.mark.parametrize(("layout", "algorithm", "targets"), LAYOUTS)
def test_a_unet_through_layouts(
    layout: str, algorithm: str, targets: object, tmp_path: Path
) -> None:
    model = small.unet()
    base = small.denoise(model)
    runtime.attach(
        model,
        algorithm,
        targets=targets,  # pyright: ignore[reportArgumentType]
        rank=None if algorithm == "full" else 3,
    )
    optimizer = torch.optim.Adam(runtime.trainable_parameters(model).values(), 1e-2)
    losses = []
    for _ in range(3):
        loss = (small.denoise(model) - 1).square().mean()
        loss.backward()
        runtime.check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    path = tmp_path / ("folder" if layout == "peft" else "file.safetensors")
    family = "sd1" if layout == "onetrainer" else None
    runtime.save(model, path, layout, architecture=family)
    wanted = small.denoise(model)
    again = small.unet()
    runtime.attach(again, path, architecture=family)
    assert float((wanted - base).detach().abs().max()) > 1e-3
    close(small.denoise(again), wanted, 1e-5)
    runtime.merge_and_detach(again)
    close(small.denoise(again), wanted, 1e-5)
    assert type(again) is type(small.unet())


class Pipeline:
    """What attach asks of a diffusers pipeline."""

    def __init__(self) -> None:
        self.components: dict[str, object] = {
            "unet": small.unet(),
            "text_encoder": small.clip(),
            "tokenizer": None,
        }

    def run(self) -> torch.Tensor:
        unet, text = self.components["unet"], self.components["text_encoder"]
        assert isinstance(unet, torch.nn.Module)
        assert isinstance(text, torch.nn.Module)
        hidden = text(small.tokens()).last_hidden_state
        return torch.cat([small.denoise(unet).flatten(), hidden.flatten()])  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_a_pipeline_gets_a_file_of_both_models(layout: str, tmp_path: Path) -> None:
    pipe = Pipeline()
    base = pipe.run()
    for name, targets in (("unet", ["to_q", "to_out.0"]), ("text_encoder", ["q_proj", "fc1"])):
        part = pipe.components[name]
        assert isinstance(part, torch.nn.Module)
        found = runtime.attach(part, "lora", targets=targets, rank=2, alpha=3.0)
        for adapter in found.modules.values():
            torch.nn.init.normal_(adapter.up)  # type: ignore[arg-type]
    wanted = pipe.run()
    path = tmp_path / ("folder" if layout == "peft" else "file.safetensors")
    runtime.save(pipe, path, layout, architecture="sd1")
    again = Pipeline()
    found = runtime.attach(again, path, architecture="sd1")
    assert {p.partition(":")[0] for p in found.modules} == {"unet", "text_encoder"}
    close(again.run(), wanted, 1e-5)
    runtime.set_strength(again, 0.0)
    close(again.run(), base, 1e-6)
    runtime.detach(again)
    alone = small.unet()
    with pytest.raises(UsageError, match="modules are not in the model, first 'text_encoder:"):
        runtime.attach(alone, path, architecture="sd1")
    found = runtime.attach(alone, path, architecture="sd1", unmatched="report")
    assert found.unmatched
    assert all(name.startswith("text_encoder:") for name in found.unmatched)
    close(small.denoise(alone).flatten(), wanted[: small.denoise(alone).numel()], 1e-5)


def test_files_made_for_inner_or_outer_models(tmp_path: Path) -> None:
    model = small.llama()
    found = runtime.attach(model, "lora", targets=["q_proj"], rank=2)
    for adapter in found.modules.values():
        torch.nn.init.normal_(adapter.up)  # type: ignore[arg-type]
    runtime.save(model, tmp_path / "outer")
    inner = small.llama().model
    runtime.attach(inner, tmp_path / "outer")
    x = small.tokens()
    close(inner(x).last_hidden_state, model.model(x).last_hidden_state, 1e-6)
    runtime.save(inner, tmp_path / "inner")
    outer = small.llama()
    runtime.attach(outer, tmp_path / "inner")
    close(outer(x).logits, model(x).logits, 1e-6)
