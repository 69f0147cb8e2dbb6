"""The short way of one adapter alone: the same values and gradients as the way through a stack, and
the same whether the weight is folded or not."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from peftsurgery import runtime
from peftsurgery.algorithms import WeightAdapter
from peftsurgery.runtime import single
from peftsurgery.runtime.controls import stacks
from peftsurgery.runtime.stack import Stack
from tests.algorithms.cases import close
from tests.runtime.models import ids, layers, scramble
from tests.runtime.test_forward import PLANS, put

FOLDING = ["lora", "loha", "lokr", "lokr-full", "lokr-both", "full", "dora", "dora-loha"]


def forward_and_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    found = runtime.trainable_parameters(model).items()
    return y.detach(), {n: p.grad.clone() for n, p in found if p.grad is not None}


def same(
    got: tuple[Tensor, dict[str, Tensor]],
    wanted: tuple[Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    close(got[0], wanted[0], tolerance)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in got[1].items():
        close(gradient, wanted[1][name], 20 * tolerance)


@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("plan", PLANS)
def test_it_equals_the_way_through_a_stack(plan: str, strength: float, rng: Generator) -> None:
    model, x = layers(rng), ids(rng)
    scramble(put(model, plan, "default", rng), rng)
    runtime.set_strength(model, strength)
    short = forward_and_gradients(model, x)
    used = [stack for stack in stacks(model).values() if stack.single is not None]
    assert used or plan == "rslora-bias"
    for stack in used:
        stack.single = None
    same(short, forward_and_gradients(model, x), 1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("plan", FOLDING)
def test_folding_changes_nothing(
    plan: str, strength: float, rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = layers(rng), ids(rng)
    scramble(put(model, plan, "default", rng), rng)
    runtime.set_strength(model, strength)
    found = [forward_and_gradients(model, x)]
    for stack in stacks(model).values():
        for entry in stack.entries:
            entry.joint = None
    for folds in (True, False):

        def forced(_: object, stack: Stack, *rest: object, folds: bool = folds) -> bool:
            return folds and stack.layer.kind != "embedding"

        monkeypatch.setattr(single, "_folds", forced)
        found.append(forward_and_gradients(model, x))
    same(found[0], found[1], 1e-5)
    same(found[1], found[2], 1e-5)


def test_what_is_folded(rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    added = WeightAdapter.added

    def counted(self: WeightAdapter, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        calls.append(tuple(weight.shape))
        return added(self, weight, strength)

    monkeypatch.setattr(WeightAdapter, "added", counted)
    for dtype, low, wanted in (
        (torch.float32, False, 1),
        (torch.bfloat16, False, 0),
        (torch.float32, True, 0),
    ):
        model = nn.Sequential(nn.Linear(6, 8).to(dtype))
        runtime.attach(model, "full", targets="0")
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(torch.randn(3, 6, generator=rng).to(dtype))
        assert len(calls) == wanted


def test_the_decision_follows_the_size_of_the_input(rng: Generator) -> None:
    model = nn.Sequential(nn.Linear(40, 48))
    found = runtime.attach(model, "loha", targets="0", rank=2, generator=rng)
    scramble(found, rng)
    adapter = found.modules["0"]
    sizes = [3, 20000]
    assert [adapter.folds(model[0].weight, n) for n in sizes] == [True, False]  # type: ignore
    w, b = adapter.merged(model[0].weight, model[0].bias)  # type: ignore[arg-type]
    for n in sizes:
        x = torch.randn(n, 40, generator=rng)
        close(model(x), nn.functional.linear(x, w, b), 1e-5)
    assert sorted(stacks(model)["0"].joining.values()) == [False, True]


def test_a_loha_is_never_dense_where_its_factors_are_thin(rng: Generator) -> None:
    model = nn.Sequential(nn.Linear(64, 72, bias=False))
    found = runtime.attach(model, "loha", targets="0", rank=2, generator=rng)
    scramble(found, rng)
    x = torch.randn(4000, 64, generator=rng)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    assert (72, 64) not in saved
