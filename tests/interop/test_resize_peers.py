"""resize-rank against PEFT's convert_to_lora, and its folders in PEFT's own loader and forward."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, convert_to_lora, get_peft_model
from torch import Tensor, nn

from fixtures import bases
from peftsurgery import load_adapter, resize_rank
from tests.interop import models
from tests.interop.test_peft_folders import WITHIN, attached

TARGETS = ["q_proj", "o_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(r=8, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False),
    "rslora": LoraConfig(
        r=8, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False, use_rslora=True
    ),
    "patterns": LoraConfig(
        r=8,
        lora_alpha=4,
        target_modules=TARGETS,
        init_lora_weights=False,
        rank_pattern={"layers.0.self_attn.q_proj": 5},
        alpha_pattern={"down_proj": 9},
    ),
    "loha": LoHaConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False),
    "loha of full rank": LoHaConfig(r=12, alpha=2, target_modules=TARGETS, init_weights=False),
    "lokr": LoKrConfig(r=4, alpha=2, target_modules=TARGETS, init_weights=False),
    "lokr decomposed": LoKrConfig(
        r=1, alpha=2, target_modules=TARGETS, init_weights=False, decompose_both=True
    ),
}


def written(config: PeftConfig, folder: Path) -> nn.Module:
    torch.manual_seed(5)
    model = get_peft_model(bases.tiny_llama(), config)
    model.save_pretrained(str(folder))
    return model


def changes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module -> B A in fp64 of what convert_to_lora returns, whose scale is 1."""
    found = {}
    for key, down in state.items():
        if ".lora_A" in key:
            up = state[key.replace(".lora_A", ".lora_B")]
            name = key.partition(".lora_A")[0].removeprefix("base_model.model.")
            found[name] = up.double() @ down.double()
    return found


@pytest.mark.parametrize("rank", [1, 3, 7, 0.6, 0.95])
@pytest.mark.parametrize("kind", CONFIGS)
def test_convert_to_lora_of_peft(kind: str, rank: float, tmp_path: Path) -> None:
    model = written(CONFIGS[kind], tmp_path / "in")
    theirs = changes(convert_to_lora(model, rank)[1])
    rule = f"{rank}" if isinstance(rank, int) else f"energy:{rank}"
    resize_rank(tmp_path / "in", tmp_path / "out", rank=rule)
    ours = load_adapter(tmp_path / "out").modules
    assert {p.removeprefix("model:") for p in ours} == set(theirs)
    before = load_adapter(tmp_path / "in").modules
    for path, module in ours.items():
        wanted, exact = theirs[path.removeprefix("model:")], before[path].delta().double()
        found = module.delta().double()
        # PEFT's fp32 SVD turns nearly equal singular vectors into each other: same error, to 1e-6
        assert float((found - wanted).norm() / wanted.norm()) < 1e-3, path
        lost, theirs_lost = float((found - exact).norm()), float((wanted - exact).norm())
        assert lost <= theirs_lost * (1 + 1e-6) + 1e-6 * float(exact.norm())
        assert theirs_lost == pytest.approx(lost, abs=1e-5 * float(exact.norm()))


@pytest.mark.parametrize("rule", ["2", "energy:0.7", "total-rank:20", "12"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_runs_what_was_written(kind: str, rule: str, tmp_path: Path) -> None:
    written(CONFIGS[kind], tmp_path / "in")
    pad = rule == "12"
    report = resize_rank(tmp_path / "in", tmp_path / "out", rank=rule, pad=pad)
    ours = load_adapter(tmp_path / "out").modules
    if pad:
        assert {row["rank"] for row in report.modules} == {12}
    base = bases.tiny_llama()
    plain = models.run(base)
    expected = models.run_merged(base, {p.removeprefix("model:"): m for p, m in ours.items()})
    model = attached(bases.tiny_llama(), tmp_path / "out")
    assert models.distance(models.run(model), expected, plain) < WITHIN
    before = load_adapter(tmp_path / "in").modules
    lost = sum(float((ours[p].delta() - m.delta()).square().sum()) for p, m in before.items())
    whole = sum(float(m.delta().square().sum()) for m in before.values())
    assert math.sqrt(lost / whole) == pytest.approx(
        math.sqrt(max(1 - report.energy, 0.0)), abs=2e-3
    )
