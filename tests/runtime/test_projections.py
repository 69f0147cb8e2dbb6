"""AdaLoRA, VeRA, FourierFT, C3A, MiSS, Bat and SHiRA on live layers: forward == merged, what
trains, and files whose projections or sizes only the model tells."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, nn

from peftsurgery import runtime, save_adapter
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import FourierFT, MiSS, SHiRA, VeRA, WeightAdapter
from tests.algorithms.cases import close, draw

PLANS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 3, "alpha": 2.0},
    "vera": {"rank": 4, "widest": (20, 20)},
    "fourierft": {"frequencies": 11},
    "c3a": {"block_size": 4},
    "miss": {"rank": 5},
    "bat": {"rank": 4},
    "shira": {"rank": 1},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def model(rng: Generator) -> Block:
    block = Block()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(draw(rng, *parameter.shape))
    return block


def shaken(model: nn.Module, rng: Generator) -> None:
    with torch.no_grad():
        for parameter in runtime.trainable_parameters(model).values():
            parameter.add_(0.3 * draw(rng, *parameter.shape).to(parameter))


@pytest.mark.parametrize("algorithm", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_the_base_with_merged_weights(
    algorithm: str, dtype: torch.dtype, model: Block, rng: Generator
) -> None:
    model.to(dtype)
    x = draw(rng, 2, 3, 12).to(dtype)
    before = model(x)
    runtime.attach(model, algorithm, targets=["first", "second"], generator=rng, **PLANS[algorithm])
    close(model(x), before, 1e-6 if dtype == torch.float32 else 1e-2)
    shaken(model, rng)
    moved = model(x)
    assert float((moved - before).detach().abs().max()) > 0.01
    moved.float().square().sum().backward()
    grads = [p.grad for p in runtime.trainable_parameters(model).values()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)
    assert any(float(g.abs().max()) > 0 for g in grads if g is not None)
    merged = copy.deepcopy(model)
    runtime.merge(merged)
    close(merged(x), moved, 1e-5 if dtype == torch.float32 else 5e-2)


def test_what_is_frozen_does_not_train_and_is_moved_along(model: Block, rng: Generator) -> None:
    runtime.attach(
        model, "vera", targets=["first", "second"], generator=rng, rank=4, widest=(20, 20)
    )
    assert sum(p.numel() for p in runtime.trainable_parameters(model).values()) == 20 + 12 + 2 * 4
    names = [n for n, _ in model.named_buffers() if n.endswith(("down", "up"))]
    assert len(names) == 2  # both layers hold the same
    model.to(torch.float64)
    assert {b.dtype for n, b in model.named_buffers() if n in names} == {torch.float32}
    x = draw(rng, 2, 12).double()
    assert model(x).dtype == torch.float64


@pytest.mark.parametrize("saved", [False, True])
def test_files_find_their_sizes_on_the_model(
    saved: bool, model: Block, tmp_path: Path, rng: Generator
) -> None:
    places = torch.stack([torch.arange(12), torch.arange(12)])
    pairs: list[tuple[WeightAdapter, WeightAdapter]] = [
        (FourierFT(draw(rng, 9), scale=40.0), FourierFT(draw(rng, 5), scale=40.0)),
        (MiSS(draw(rng, 5, 4), mini=True), MiSS(draw(rng, 5, 4), mini=True)),
        (
            VeRA(draw(rng, 20), draw(rng, 3), seed=9, widest=(20, 0)),
            VeRA(draw(rng, 12), draw(rng, 3), seed=9, widest=(20, 0)),
        ),
    ]
    if not saved:
        pairs.append((SHiRA(draw(rng, 12), places), SHiRA(draw(rng, 12), places)))
    x = draw(rng, 2, 3, 12)
    for first, second in pairs:
        adapter = Adapter({"transformer:first": first, "transformer:second": second}, "generic")
        source: Adapter | Path = adapter
        if saved:
            source = tmp_path / first.algorithm
            save_adapter(adapter, source, layout="peft")
        live = copy.deepcopy(model)
        options: dict[str, Any] = {"architecture": "generic"} if saved else {}
        runtime.attach(live, source, **options)
        wanted = copy.deepcopy(model)
        for name, change in (("first", first), ("second", second)):
            weight = wanted.get_submodule(name).weight
            if isinstance(change, VeRA):
                change = change.with_tensors(widest=(20, 20))
            weight.data = change.merged(weight.detach())[0].detach()  # type: ignore[union-attr]
        close(live(x), wanted(x), 1e-5)
        assert first.tensors().keys() == adapter.modules["transformer:first"].tensors().keys()
        assert adapter.modules["transformer:first"] is first  # the caller's adapter stays as it was
