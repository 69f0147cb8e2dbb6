"""AdaLoRA's budget and its allocator beside PEFT's; the regularisers; an exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Generator, nn

from peftsurgery import runtime
from peftsurgery.algorithms import HRA, AdaLoRA
from peftsurgery.errors import UsageError
from tests.algorithms.cases import close
from tests.runtime import small

TARGETS = ["q_proj", "down_proj"]


def theirs() -> Any:  # PEFT has no types for what its tuners hold
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=2,
        lora_alpha=5,
        orth_reg_weight=0.3,
        target_modules=TARGETS,
        tinit=2,
        tfinal=3,
        deltaT=2,
        total_step=12,
    )
    return peft.get_peft_model(small.llama(), config)


def ours(model: nn.Module) -> runtime.RankAllocator:
    return runtime.RankAllocator(
        model, target_rank=2, total=12, warmup=2, final=3, every=2, beta1=0.85, beta2=0.85
    )


def twin() -> tuple[Any, nn.Module]:
    """PEFT's model and ours with the same factors, none of them zero."""
    other, mine = theirs(), small.llama()
    found = runtime.attach(mine, "adalora", targets=TARGETS, rank=6, alpha=5.0)
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, adapter in found.modules.items():
            assert isinstance(adapter, AdaLoRA)
            layer = other.get_submodule(f"base_model.model.{path}")
            pairs = ((adapter.up, "lora_B"), (adapter.e, "lora_E"), (adapter.down, "lora_A"))
            for tensor, name in pairs:
                tensor.copy_(torch.randn(tensor.shape, generator=rng) * 0.1)
                getattr(layer, name)["default"].copy_(tensor)
    return other, mine


def test_budgets_are_pefts() -> None:
    allocator = theirs().base_model.rankallocator
    budget = runtime.Budget(allocator.init_bgt, allocator.target_bgt, 12, 2, 3, 2)
    for step in range(14):
        ranks, now = budget.at(step)
        wanted, masked = allocator.budget_schedule(step)
        assert ranks == wanted
        assert now == masked or step == 9  # PEFT forces that one from outside the schedule
    for wrong in ((4, 5, 12), (4, 0, 12), (4, 2, 3, 2, 1), (4, 2, 9, -1), (4, 2, 9, 0, 0, 0)):
        with pytest.raises(UsageError, match="budget"):
            runtime.Budget(*wrong)


def test_training_with_an_allocator_is_pefts_step_by_step() -> None:
    """Loss with its regulariser, importance, masks and weights, until the budget is final."""
    other, mine = twin()
    allocator = ours(mine)
    tuner = other.base_model
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        for model in (other, mine)
    ]
    masked = 0
    for step in range(1, 13):
        batch = small.tokens(step)
        wanted = tuner(batch, labels=batch).loss  # `other` would leave the regulariser out
        loss = mine(batch, labels=batch).loss + 0.3 * runtime.adalora_orthogonality(mine)
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
        for value, optimizer in zip((wanted, loss), optimizers, strict=True):
            value.backward()
            optimizer.step()
        tuner.update_and_allocate(step)
        kept = allocator.step(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        masked += kept is not None
        pattern = tuner.peft_config["default"].rank_pattern or {}
        for path, ranks in (kept or {}).items():
            assert pattern[f"{path}.lora_E.default"] == ranks.tolist()
        for path, adapter in runtime.adapters(mine).items():
            layer = other.get_submodule(f"base_model.model.{path}")
            for name, factor in (("lora_A", "down"), ("lora_B", "up"), ("lora_E", "e")):
                close(getattr(adapter, factor), getattr(layer, name)["default"], 1e-4)
    assert masked == 7
    assert sum(allocator.ranks().values()) == allocator.budget.target == 8
    assert len(set(allocator.ranks().values())) > 1


def test_of_equal_ranks_only_the_budget_is_kept(rng: Generator) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    found = runtime.attach(model, "adalora", targets=["0", "1"], rank=3)
    for adapter in found.modules.values():
        for tensor in adapter.parameters():
            nn.init.ones_(tensor)
            tensor.grad = torch.ones_like(tensor)
    allocator = runtime.RankAllocator(model, target_rank=1, total=2)
    allocator.step(1)
    kept = allocator.step(2)
    assert kept is not None
    assert kept["0"].tolist() == [True, True, False]
    assert kept["1"].tolist() == [False] * 3
    assert [int((a.tensors()["e"] != 0).sum()) for a in found.modules.values()] == [2, 0]


def test_an_allocator_says_what_it_misses() -> None:
    model = small.llama()
    runtime.attach(model, "lora", targets=TARGETS, rank=2)
    with pytest.raises(UsageError, match="no module of AdaLoRA"):
        runtime.RankAllocator(model, target_rank=1, total=5)
    with pytest.raises(UsageError, match="no module of HRA"):
        runtime.hra_orthogonality(model)
    runtime.detach(model)
    runtime.attach(model, "adalora", targets=TARGETS, rank=2)
    with pytest.raises(UsageError, match="target of 6 ranks and 4"):
        runtime.RankAllocator(model.model.layers[0], target_rank=3, total=5)
    allocator = runtime.RankAllocator(model, target_rank=1, total=5)
    with pytest.raises(UsageError, match="has no gradient; call step"):
        allocator.step(1)
    with pytest.raises(UsageError, match="no step came before it"):
        allocator.step(6)


def steps(model: nn.Module, allocator: runtime.RankAllocator, first: int, last: int) -> list[float]:
    optimizer = torch.optim.SGD(runtime.trainable_parameters(model).values(), 0.5)
    losses: list[float] = []
    for step in range(first, last):
        batch = small.tokens(step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("stop", [6, 11])
def test_a_resume_goes_on_exactly(stop: int, tmp_path: Path) -> None:
    _, model = twin()
    allocator = ours(model)
    steps(model, allocator, 1, stop)
    path = tmp_path / "state.safetensors"
    runtime.save_state(model, path, allocator=allocator, step=stop)
    wanted = steps(model, allocator, stop, 14)
    _, again = twin()
    fresh = ours(again)
    assert runtime.load_state(again, path, allocator=fresh)[0] == stop
    assert steps(again, fresh, stop, 14) == wanted
    assert fresh.ranks() == allocator.ranks()
    for one, other in zip(
        runtime.trainable_parameters(again).values(),
        runtime.trainable_parameters(model).values(),
        strict=True,
    ):
        assert torch.equal(one, other)
    longer = runtime.RankAllocator(again, target_rank=2, total=20)
    with pytest.raises(UsageError, match="the allocator's total was 12, here it is 20"):
        runtime.load_state(again, path, allocator=longer)
    runtime.save_state(model, tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="written without an allocator"):
        runtime.load_state(again, tmp_path / "bare.safetensors", allocator=fresh)


def test_reflections_are_pushed_apart(rng: Generator) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    found = runtime.attach(model, "hra", targets="0", rank=4, generator=rng)
    adapter = found.modules["0"]
    assert isinstance(adapter, HRA)
    u = adapter.u.detach().double()
    unit = u / u.norm(dim=0)
    wanted = (unit.T @ unit - torch.eye(4).double()).square().sum()
    close(runtime.hra_orthogonality(model).double(), wanted, 1e-5)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.05)
    with torch.no_grad():
        adapter.u.add_(torch.randn(6, 4, generator=rng) * 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        runtime.hra_orthogonality(model).backward()
        optimizer.step()
    assert float(runtime.hra_orthogonality(model).detach()) < 1e-3
    with torch.no_grad():
        adapter.u.copy_(torch.linalg.qr(adapter.u)[0] * 3)
    assert float(runtime.hra_orthogonality(model).detach()) < 1e-9
