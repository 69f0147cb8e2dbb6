"""NF4 against its definition and against golden bytes; LoftQ as a start, restored to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from peftsurgery import runtime
from peftsurgery.algorithms import LoRA
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.bitsandbytes4 import NF4_LEVELS
from peftsurgery.runtime.quantized_start import loftq, nf4
from tests.algorithms.cases import close
from tests.runtime import small
from tests.runtime.models import ids, layers


def test_levels_are_quantiles_of_a_normal_distribution() -> None:
    p = 0.9677083
    above = torch.special.ndtri(torch.linspace(p, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(p, 0.5, 8, dtype=torch.float64)[:-1])
    wanted = torch.cat([below, torch.zeros(1).double(), above.flip(0)]) / above[0]
    close(torch.tensor(NF4_LEVELS), wanted, 1e-6)


@pytest.mark.parametrize("shape", [(64, 128), (7, 64), (33, 65), (5, 3), (1, 1)])
def test_every_weight_goes_to_the_nearest_level(shape: tuple[int, ...], rng: Generator) -> None:
    weight = torch.randn(shape, generator=rng) * 3
    weight.view(-1)[64:128] = 0
    got = nf4(weight)
    for start in range(0, weight.numel(), 64):
        block = weight.reshape(-1)[start : start + 64]
        top = block.abs().max()
        choices = torch.tensor(NF4_LEVELS) * top
        nearest = (block[:, None] - choices).abs().min(1).values
        error = (block - got.reshape(-1)[start : start + 64]).abs()
        close(error.double().sum(), nearest.double().sum(), 1e-5)
    assert torch.equal(nf4(got), got)
    half = weight.bfloat16()
    assert torch.equal(nf4(half), nf4(half.float()))


def test_what_nf4_refuses() -> None:
    for bad in (torch.nan, -torch.inf):
        with pytest.raises(UsageError, match="NaN or infinity"):
            nf4(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 40])
def test_loftq_alternates(rank: int, dtype: torch.dtype, rng: Generator) -> None:
    weight = torch.randn(20, 30, generator=rng).to(dtype)
    exact = weight.float()
    low, errors = torch.zeros(20, 30), []
    for steps in (1, 2, 3):
        wanted = nf4(exact - low).to(dtype)
        u, s, vh = torch.linalg.svd(exact - wanted.float(), full_matrices=False)
        found, (left, middle, right) = loftq(weight, rank, steps)
        close(found, wanted, 1e-2 if steps > 1 else 0.0)  # a rounding may cross a threshold
        got = left @ torch.diag(middle) @ right
        if steps == 1:
            close(got, u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank], 1e-4)
        low = (left * middle) @ right
        errors.append(float((exact - found.float() - got).norm()))
    assert errors[0] < float((exact - nf4(exact)).norm())
    assert errors[-1] < errors[0] or rank == 40


@pytest.mark.parametrize("init", ["loftq", "loftq_niter_4"])
def test_a_model_on_a_quantized_base(init: str, tmp_path: Path) -> None:
    model, x = small.llama(), small.tokens()
    before = model(x).logits.detach()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    targets = ["q_proj", "down_proj"]
    found = runtime.attach(model, "lora", targets=targets, rank=6, alpha=3.0, init=init)
    started = model(x).logits.detach()
    with runtime.disabled(model):
        bare = model(x).logits.detach()
    assert float((started - before).norm()) < 0.8 * float((bare - before).norm())
    path = "model.layers.1.mlp.down_proj"
    adapter = found.modules[path]
    assert isinstance(adapter, LoRA)
    quantized = model.get_submodule(path).weight.detach().clone()  # type: ignore[union-attr, operator]
    if init == "loftq":
        assert torch.equal(quantized, nf4(state[f"{path}.weight"]))
    _, (u, s, vh) = loftq(state[f"{path}.weight"], 6, 4 if init.endswith("4") else 1)
    close(adapter.delta(), u @ torch.diag(s) @ vh, 1e-4)
    optimizer = torch.optim.Adam(runtime.trainable_parameters(model).values(), 1e-2)
    model(x, labels=x).loss.backward()
    optimizer.step()
    wanted = model(x).logits.detach()
    assert float((wanted - started).abs().max()) > 1e-3
    # an ordinary LoRA, for the base that the state dict holds
    runtime.save(model, tmp_path / "a")
    again = small.llama()
    again.load_state_dict(model.state_dict())
    loaded = runtime.attach(again, tmp_path / "a")
    assert loaded.modules[path].rank == 6
    close(again(x).logits, wanted, 1e-5)
    runtime.merge(model)
    close(model(x).logits, wanted, 1e-5)
    runtime.unmerge(model)
    assert torch.equal(model.get_submodule(path).weight, quantized)  # type: ignore[arg-type]
    runtime.detach(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    runtime.attach(model, "lora", targets=targets, rank=6, init=init)
    merged = model(x).logits.detach()
    runtime.merge_and_detach(model)
    close(model(x).logits, merged, 1e-5)


def test_what_a_quantized_start_refuses(rng: Generator) -> None:
    model = layers(rng)
    weight = model.lin.weight.detach().clone()
    for targets, error in (
        (["lin", "head"], "tied to another module's"),
        (["lin", "conv"], "expected a matrix"),
    ):
        with pytest.raises((UsageError, UnsupportedError), match=error):
            runtime.attach(model, "lora", targets=targets, rank=2, init="loftq")
        assert type(model.lin) is nn.Linear
    assert torch.equal(model.lin.weight, weight)
    with pytest.raises(UsageError, match="not defined with DoRA"):
        runtime.attach(model, "lora", targets="lin", rank=2, init="loftq", dora=True)
    with pytest.raises(UsageError, match=r"expected one of .*loftq_niter_N"):
        runtime.attach(model, "lora", targets="lin", rank=2, init="loftq_niter_x")
    runtime.attach(model, "lora", targets="lin", rank=2, init="loftq", name="a")
    with pytest.raises(UsageError, match="'a' has replaced its weight"):
        runtime.attach(model, "lora", targets="lin", rank=2, init="loftq", name="b")
    runtime.attach(model, "lora", targets="lin", rank=2, name="b")
    assert not torch.equal(model.lin.weight, weight)
    runtime.delete(model, "a")
    assert torch.equal(model.lin.weight, weight)
    model(ids(rng))
