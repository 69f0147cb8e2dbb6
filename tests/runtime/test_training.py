"""Groups, counts, checks, averages, dropout, inits and exact resumes."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Generator, nn

from peftsurgery import runtime
from peftsurgery.algorithms import LoRA
from peftsurgery.errors import UnsupportedError, UsageError
from tests.algorithms.cases import close
from tests.runtime import small
from tests.runtime.models import WEIGHTS, Layers, ids, layers, scramble


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    loss = (model(x) - 1).square().mean() + torch.rand(()) * 0
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def test_lora_plus_groups(rng: Generator) -> None:
    model = layers(rng)
    runtime.attach(model, "lora", targets=WEIGHTS, rank=2, dora=True, bias="targets")
    groups = {
        str(g["name"]): g
        for g in runtime.param_groups(
            model, 1e-3, lora_plus_ratio=4, weight_decay=0.1, embedding_lr=1e-5
        )
    }
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "output": (4e-3, 0.1),
        "embedding": (1e-5, 0.1),
        "vector": (1e-3, 0.0),
        "other": (1e-3, 0.1),
    }
    every = [n for g in groups.values() for n in g["parameter_names"]]  # type: ignore[union-attr]
    assert sorted(every) == sorted(runtime.trainable_parameters(model))
    assert all(n.endswith(".up") for n in groups["output"]["parameter_names"])  # type: ignore[union-attr]
    assert len(torch.optim.AdamW(list(groups.values())).param_groups) == 4
    runtime.detach(model)
    with pytest.raises(UsageError, match="no adapter tensor requires a gradient"):
        runtime.param_groups(model, 1e-3)


def test_lora_plus_groups_are_pefts() -> None:
    """The same rate for every tensor; ours have one for embeddings only when asked."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    theirs = peft.get_peft_model(small.llama(), config)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.02
    )
    names = {id(p): n for n, p in theirs.named_parameters()}
    wanted = {
        names[id(p)].replace(".default", "").replace(".weight", ""): (g["lr"], g["weight_decay"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    model = small.llama()
    runtime.attach(model, "lora", targets=["q_proj", "embed_tokens"], rank=2)
    groups = runtime.param_groups(
        model, 1e-3, lora_plus_ratio=8.0, weight_decay=0.02, embedding_lr=1e-6
    )
    got = {}
    for group in groups:
        for name in group["parameter_names"]:  # type: ignore[union-attr]
            path, _, factor = name.partition(".adapters.default.")
            side = {"up": "B", "down": "A"}[factor]
            if path.endswith("embed_tokens"):  # PEFT's are of the transposed weight
                side = "embedding_" + {"A": "B", "B": "A"}[side]
            got[f"base_model.model.{path}.lora_{side}"] = group["lr"], group["weight_decay"]
    assert got == wanted
    assert {rate for rate, _ in got.values()} == {1e-3, 8e-3, 1e-6}


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix-tuning", "P_TUNING", "xlora", "poly"])
def test_methods_that_are_known_and_not_here(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match=f"'{name}' cannot be attached. .*PEFT|run"):
        runtime.attach(model, name, targets="0")
    with pytest.raises(UnsupportedError, match=f"'{name}' cannot be attached"):
        runtime.attach(model, {"0": name})
    assert type(model[0]) is nn.Linear


def test_check_gradients_names_what_was_not_reached(rng: Generator) -> None:
    model, x = layers(rng), ids(rng)
    runtime.attach(model, "lora", targets=["lin", "head"], rank=2)
    model.lin(model.embed(x)).sum().backward()
    with pytest.raises(UsageError, match="2 adapter tensors got no gradient, first 'head"):
        runtime.check_gradients(model)
    assert len(runtime.without_gradient(model)) == 2
    model(x).sum().backward()
    runtime.check_gradients(model)


def test_ema_follows_the_recurrence_and_is_applied_for_a_while(rng: Generator) -> None:
    model, x = layers(rng), ids(rng)
    found = runtime.attach(model, "lora", targets=WEIGHTS, rank=2)
    scramble(found, rng)
    ema = runtime.EMA(model, 0.5, warmup=False)
    name = "lin.adapters.default.up"
    wanted = model.get_parameter(name).detach().clone()
    for _ in range(3):
        scramble(found, rng)
        ema.update()
        wanted = 0.5 * wanted + 0.5 * model.get_parameter(name).detach()
    live, kept = model(x), model.get_parameter(name).detach().clone()
    with ema.applied():
        close(model.get_parameter(name), wanted, 1e-6)
        assert not torch.allclose(model(x), live)
    assert torch.equal(model.get_parameter(name), kept)
    assert torch.equal(model(x), live)


def test_dropouts(rng: Generator) -> None:
    model = nn.Sequential(nn.Linear(40, 50))
    x = torch.randn(3, 40, generator=rng)
    base = model(x).detach()
    found = runtime.attach(model, "lora", targets="0", rank=4, rank_dropout=0.5)
    scramble(found, rng)
    full = (model.eval()(x) - base).detach()
    model.train()
    dropped = (model(x) - base).detach()
    rows = (dropped.abs() < 1e-7).all(0)
    assert 5 < int(rows.sum()) < 45
    close(dropped[:, ~rows], full[:, ~rows], 1e-5)
    runtime.detach(model)
    found = runtime.attach(
        model, "lora", targets="0", rank=4, rank_dropout=0.5, rank_dropout_scale=True
    )
    scramble(found, rng)
    full = (model.eval()(x) - base).detach()
    dropped = (model.train()(x) - base).detach()
    rows = (dropped.abs() < 1e-7).all(0)
    close(dropped[:, ~rows] * float((~rows).float().mean()), full[:, ~rows], 1e-5)
    runtime.detach(model)
    found = runtime.attach(model, "lora", targets="0", rank=4, module_dropout=0.5)
    scramble(found, rng)
    full = model.eval()(x).detach()
    outcomes = {
        "base" if torch.equal(y, base) else "full" if torch.equal(y, full) else "other"
        for y in (model.train()(x).detach() for _ in range(40))
    }
    assert outcomes == {"base", "full"}
    runtime.detach(model)
    found = runtime.attach(model, "lora", targets="0", rank=4, dropout=0.5)
    scramble(found, rng)
    model.train()
    mean = torch.stack([model(x).detach() for _ in range(600)]).mean(0)
    close(mean, model.eval()(x).detach(), 0.15)
    runtime.detach(model)
    with pytest.raises(UsageError, match="defined for additive changes only"):
        runtime.attach(model, "set", targets="0", dropout=0.1)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "init", ["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
)
def test_inits_leave_the_output_and_save_as_plain_loras(
    init: str, rng: Generator, tmp_path: Path
) -> None:
    model, x = layers(rng), ids(rng)
    before = model(x).detach()
    found = runtime.attach(
        model, "lora", targets=WEIGHTS, rank=4, alpha=3.0, init=init, generator=rng
    )
    close(model(x), before, 1e-5)
    with runtime.disabled(model):
        assert torch.equal(model(x), before)
    optimizer = torch.optim.AdamW(runtime.trainable_parameters(model).values(), 1e-2)
    for _ in range(3):
        step(model, optimizer, x)
    after = model(x).detach()
    assert float((after - before).abs().max()) > 1e-3
    runtime.save(model, tmp_path / "a", "peft")
    again = layers(rng)
    again.load_state_dict(model.state_dict())
    loaded = runtime.attach(again, tmp_path / "a")
    close(again(x), after, 1e-4)
    mutating = init.startswith(("pissa", "olora"))
    assert loaded.modules["lin"].rank == (8 if mutating else 4)
    runtime.merge(model)
    close(model(x), after, 1e-4)
    if init == "pissa":
        lin = found.modules["lin"]
        kept = runtime.export(model, origin="keep").modules
        assert next(a for p, a in kept.items() if p.endswith("lin")).rank == lin.rank


@pytest.mark.parametrize("rank", [3, 20])
def test_pissa_and_olora_start_from_the_weight(rank: int, rng: Generator) -> None:
    for init in ("pissa", "pissa_niter_6", "olora"):
        model = nn.Sequential(nn.Linear(9, 7))
        found = runtime.attach(model, "lora", targets="0", rank=rank, init=init, generator=rng)
        adapter = found.modules["0"]
        assert isinstance(adapter, LoRA)
        linear = model[0]
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach()
        u, s, vh = torch.linalg.svd(weight)
        best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[: min(rank, 7)]
        if init == "olora":
            q, r = torch.linalg.qr(weight)
            best = q[:, :rank] @ r[:rank]
        close(adapter.delta(), best, 1e-3 if "niter" in init else 1e-4)


def test_eva_takes_the_principal_directions_of_the_inputs(rng: Generator) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))
    runtime.attach(model, "lora", targets=["0", "2"], rank=3)
    mixing = torch.randn(3, 12, generator=rng)
    data = torch.randn(200, 3, generator=rng) @ mixing
    before = model(data)
    runtime.init_from_data(model, lambda: [model(part) for part in data.split(50)])
    close(model(data), before, 1e-6)
    adapter = runtime.adapters(model)["0"]
    assert isinstance(adapter, LoRA)
    down = adapter.down.detach()
    close(down @ down.T, torch.eye(3), 1e-4)
    close(data @ down.T @ down, data, 1e-3)
    with pytest.raises(UsageError, match="'0', '2' saw no input"):
        runtime.init_from_data(model, lambda: None)


def resumable(rng: Generator) -> tuple[Layers, torch.optim.Optimizer]:
    model = layers(rng).train()
    runtime.attach(model, "lora", targets=["lin", "conv", "head"], rank=2, dropout=0.3)
    groups = runtime.param_groups(model, 1e-2)
    return model, torch.optim.AdamW(groups)  # type: ignore[arg-type]


def test_a_resume_is_exact(rng: Generator, tmp_path: Path) -> None:
    model, optimizer = resumable(rng)
    x = ids(rng)
    for _ in range(3):
        step(model, optimizer, x)
    runtime.save_state(model, tmp_path / "state.safetensors", optimizer, step=3, extra={"a": [1]})
    wanted = [step(model, optimizer, x) for _ in range(3)]
    other, fresh = resumable(rng)
    other.load_state_dict(model.state_dict())
    fresh.param_groups.reverse()
    assert runtime.load_state(other, tmp_path / "state.safetensors", fresh) == (3, {"a": [1]})
    assert [step(other, fresh, x) for _ in range(3)] == wanted
    smaller = layers(rng)
    runtime.attach(smaller, "lora", targets=["lin"], rank=2)
    with pytest.raises(UsageError, match=r"'conv.adapters.default.\w+' is not in the model"):
        runtime.load_state(smaller, tmp_path / "state.safetensors")
    bad = torch.optim.SGD(other.parameters(), 0.1)
    with pytest.raises(UsageError, match="that is no adapter's"):
        runtime.save_state(other, tmp_path / "b.safetensors", bad)
