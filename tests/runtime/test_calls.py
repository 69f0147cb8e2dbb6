"""How many operations torch runs for one layer's forward and backward: at small sizes the calls are
what a step costs. Counted, and the same on every machine.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftsurgery import runtime
from peftsurgery.algorithms import WeightAdapter
from tests.algorithms.cases import close

from .models import scramble


class Counting(TorchDispatchMode):
    """Counts operations that are more than another look at the same memory, and their results of
    one size."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            self.sizes.append(result.numel() if isinstance(result, Tensor) else 0)
        return result


def made(
    algorithm: str, rng: Generator, options: dict[str, object], width: int = 24
) -> tuple[nn.Module, WeightAdapter]:
    model = nn.Sequential(nn.Linear(16, width, bias=False))
    found = runtime.attach(model, algorithm, targets="0", **options)  # type: ignore[arg-type]
    scramble(found, rng, 0.1)
    return model, found.modules["0"]


# a bare linear layer makes 5: two products, the sum, its gradient and the one kept at x
LIMITS: dict[str, tuple[dict[str, object], int]] = {
    "ia3": ({}, 11),
    "lora": ({"rank": 4}, 19),
    "vera": ({"rank": 4}, 24),
    "miss": ({"rank": 4}, 14),
    "shira": ({"rank": 4}, 10),
    "fourierft": ({"frequencies": 8}, 18),
    "hira": ({"rank": 4}, 14),
    "loha": ({"rank": 4}, 20),
    "lokr": ({"rank": 4}, 16),
    "hra": ({"rank": 4}, 40),
    "boft": ({"block_size": 4}, 37),
}


@pytest.mark.parametrize("algorithm", LIMITS)
def test_operations_of_a_step(algorithm: str, rng: Generator) -> None:
    options, limit = LIMITS[algorithm]
    model, _ = made(algorithm, rng, options)
    x = torch.randn(2, 8, 16, generator=rng, requires_grad=True)
    model(x).sum().backward()  # what is kept from call to call is made once
    model.zero_grad()
    x.grad = None
    with Counting() as counting:
        model(x).sum().backward()
    assert counting.count <= limit


def test_a_sparse_change_is_one_copy_of_the_weight_and_its_gradient(rng: Generator) -> None:
    model, _ = made("shira", rng, {"rank": 2}, 40)
    x = torch.randn(64, 16, generator=rng)
    model(x).sum().backward()
    with Counting() as counting:
        model(x).sum().backward()
    assert counting.sizes.count(640) == 2  # W + ΔW, and the product that is its gradient


def test_a_scale_of_one_is_not_multiplied_until_it_changes(rng: Generator) -> None:
    model, adapter = made("miss", rng, {"rank": 4})
    x = torch.randn(3, 16, generator=rng)
    at_one = model(x) - nn.functional.linear(x, model[0].weight)  # type: ignore[index, arg-type]
    assert adapter.scaled(adapter.block) is adapter.block  # type: ignore[arg-type]
    twin = copy.deepcopy(adapter).double().float()
    assert twin.scaled(twin.block) is twin.block  # type: ignore[arg-type]
    adapter.scale.fill_(-1.5)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(adapter)))
    close(twin.scaled(twin.block), -1.5 * adapter.block, 1e-6)  # type: ignore[operator]
    scaled = model(x) - nn.functional.linear(x, model[0].weight)  # type: ignore[index, arg-type]
    close(scaled, -1.5 * at_one, 1e-5)


def test_kept_tensors_made_in_inference_mode_serve_training(rng: Generator) -> None:
    plans: dict[str, dict[str, object]] = {"fourierft": {"frequencies": 7}, "shira": {"rank": 2}}
    for algorithm, options in plans.items():
        model, adapter = made(algorithm, rng, options, 23)  # a shape no other test has
        x = torch.randn(2, 16, generator=rng)
        with torch.inference_mode():
            before = model(x).clone()
        y = model(x)
        y.sum().backward()
        close(y.detach(), before, 1e-6)
        assert all(p.grad is not None for p in adapter.parameters())
