"""forward == the base run with the merged weights, for every algorithm and every ordered pair."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from peftsurgery import runtime
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import ALGORITHMS, Full
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.runtime.stack import base_weight
from tests.algorithms.cases import close
from tests.runtime.models import WEIGHTS, ids, layers, scramble

PLANS: dict[str, tuple[str, dict[str, object]]] = {
    "lora": ("lora", {"rank": 3, "alpha": 2.0}),
    "lora-tucker": ("lora", {"rank": 2, "tucker": True}),
    "loha": ("loha", {"rank": 2}),
    "loha-tucker": ("loha", {"rank": 2, "tucker": True}),
    "lokr": ("lokr", {"rank": 1, "alpha": 1.5}),
    "lokr-full": ("lokr", {"rank": 50}),
    "lokr-both": ("lokr", {"rank": 1, "decompose_both": True}),
    "lokr-tucker": ("lokr", {"rank": 1, "tucker": True}),
    "full": ("full", {}),
    "set": ("set", {}),
    "dora": ("lora", {"rank": 3, "dora": True}),
    "dora-in": ("lora", {"rank": 3, "dora": "in"}),
    "dora-loha": ("loha", {"rank": 2, "dora": True}),
    "dora-lokr": ("lokr", {"rank": 2, "dora": "in"}),
    "oft": ("oft", {"rank": 2}),
    "boft": ("boft", {"rank": 2}),
    "hra": ("hra", {"rank": 2}),
    "ia3": ("ia3", {}),
    "glora": ("glora", {"rank": 2}),
    "rslora-bias": ("lora", {"rank": 2, "rslora": True, "bias": "all"}),
}


def put(model: nn.Module, plan: str, name: str, rng: Generator) -> runtime.Attached:
    algorithm, options = PLANS[plan]
    found = runtime.attach(
        model,
        algorithm,
        targets=WEIGHTS,
        name=name,
        generator=rng,
        **options,  # type: ignore[arg-type]
    )
    return found


@pytest.mark.parametrize("plan", PLANS)
def test_a_fresh_adapter_leaves_the_output(plan: str, rng: Generator) -> None:
    model, x = layers(rng), ids(rng)
    before = model(x)
    put(model, plan, "default", rng)
    close(model(x), before, 1e-6)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(PLANS, [None, *PLANS])))
def test_forward_is_merged(first: str, second: str | None, rng: Generator) -> None:
    model, x = layers(rng), ids(rng)
    base = model(x)
    scramble(put(model, first, "one", rng), rng)
    runtime.set_strength(model, 0.7, "one")
    if second is not None:
        scramble(put(model, second, "two", rng), rng)
        runtime.set_strength(model, -0.6, "two")
    live = model(x)
    assert float((live - base).detach().abs().max()) > 1e-3
    runtime.merge(model)
    close(model(x), live, 2e-5)
    runtime.unmerge(model)
    assert torch.equal(model(x), live)


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_the_order_of_a_stack_is_the_composition(order: tuple[str, str], rng: Generator) -> None:
    model = nn.Linear(6, 8)
    first = runtime.attach(model, "lora", targets=_all, rank=2, dora=True, name="one")
    second = runtime.attach(model, "lora", targets=_all, rank=2, name="two")
    scramble(first, rng)
    scramble(second, rng)
    runtime.activate(model, order)
    weight, bias = model.weight, model.bias
    for name in order:
        weight, bias = runtime.adapters(model, name)[""].merged(weight, bias)
    x = torch.randn(4, 6, generator=rng)
    close(model(x), nn.functional.linear(x, weight, bias), 1e-5)


def _all(path: str, module: nn.Module) -> bool:
    return True


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_reach_every_tensor_and_equal_those_of_the_weight(
    plan: str, rng: Generator
) -> None:
    model, x = layers(rng), ids(rng)
    scramble(put(model, plan, "default", rng), rng)
    model(x).square().sum().backward()
    runtime.check_gradients(model)
    live = {n: p.grad for n, p in runtime.trainable_parameters(model).items()}
    model.zero_grad()
    # the same function through composed weights
    values: dict[str, torch.Tensor] = {}
    plain = copy.deepcopy(model)
    runtime.detach(plain)
    for path, adapter in runtime.adapters(model).items():
        if "@" in path:
            continue
        owner = plain.get_submodule(path)
        bias = getattr(owner, "bias", None)
        w, b = adapter.merged(base_weight(owner, "weight"), bias)
        values[f"{path}.weight"] = w
        if b is not None:
            values[f"{path}.bias"] = b
    torch.func.functional_call(plain, values, (x,), tie_weights=False).square().sum().backward()
    for name, parameter in runtime.trainable_parameters(model).items():
        got, wanted = live[name], parameter.grad
        assert got is not None
        assert wanted is not None
        if name.endswith("embed.adapters.default.up"):  # torch gives padding_idx no gradient
            got, wanted = got[1:], wanted[1:]
        elif "embed" in name:
            continue
        close(got, wanted, 1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_a_bf16_base_with_fp32_adapters(plan: str, rng: Generator) -> None:
    model, x = layers(rng).bfloat16(), ids(rng)
    scramble(put(model, plan, "default", rng), rng, 0.2)
    assert {p.dtype for p in runtime.adapter_parameters(model).values()} == {torch.float32}
    live = model(x)
    assert live.dtype == torch.bfloat16
    runtime.merge(model)
    close(model(x), live, 0.05)


def test_autocast_runs_in_the_low_dtype(rng: Generator) -> None:
    model, x = layers(rng), ids(rng)
    scramble(put(model, "lora", "default", rng), rng)
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    close(low, full, 0.05)
    low.float().sum().backward()
    runtime.check_gradients(model)


def test_rows_of_one_batch_have_their_own_adapters(rng: Generator) -> None:
    model, x = layers(rng), ids(rng, 4)
    scramble(put(model, "dora", "one", rng), rng)
    scramble(put(model, "lokr", "two", rng), rng)
    wanted = []
    for names in (["one"], ["two"], [], ["two", "one"]):
        runtime.activate(model, names)
        wanted.append(model(x))
    runtime.activate(model)
    with runtime.per_row(model, ["one", "two", None, ("two", "one")]):
        got = model(x)
        with pytest.raises(UsageError, match="4 rows have adapters"):
            model(x[:3])
    for row in range(4):
        close(got[row], wanted[row][row], 1e-5)
    model.train()
    with runtime.per_row(model, ["one", "two", "one", "two"]):
        model(x).sum().backward()
    runtime.check_gradients(model)


def test_an_embedding_with_max_norm_and_one_with_a_scale(rng: Generator) -> None:
    short = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0))
    scramble(runtime.attach(short, "lora", targets="0", rank=2), rng, 1.0)
    x = torch.arange(9)[None]
    assert float(short(x).detach().norm(dim=-1).max()) <= 1 + 1e-5
    live = short(x).detach()
    runtime.merge(short)
    close(short(x), live, 1e-5)

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * self.embed_scale

    large = nn.Sequential(Scaled(9, 4))
    for dora in (False, True):
        scramble(runtime.attach(large, "lora", targets="0", rank=2, dora=dora), rng)
        live = large(x).detach()
        runtime.merge(large)
        close(large(x), live, 1e-5)
        runtime.unmerge(large)
        runtime.detach(large)


@pytest.mark.parametrize("separate", [False, True])
def test_multihead_attention_and_bare_parameters(separate: bool, rng: Generator) -> None:
    kdim, vdim = (6, 10) if separate else (8, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=vdim).eval()
    x = torch.randn(2, 5, 8, generator=rng)
    k = torch.randn(2, 5, 6, generator=rng) if separate else x
    v = torch.randn(2, 5, 10, generator=rng) if separate else x
    base = attention(x, k, v)[0]
    found = runtime.attach(attention, "lora", targets="out_proj", rank=2)
    assert list(found.modules) == ["out_proj"]
    runtime.detach(attention)
    found = runtime.attach(attention, "lora", targets=_projection, rank=2, bias="targets")
    assert len(found.modules) == (4 if separate else 2)
    scramble(found, rng)
    live = attention(x, k, v)[0]
    assert float((live - base).detach().abs().max()) > 0.01
    runtime.merge(attention)
    close(attention(x, k, v)[0], live, 1e-5)
    runtime.unmerge(attention)
    attention(x, k, v)[0].sum().backward()
    runtime.check_gradients(attention)


def _projection(path: str, module: nn.Module) -> bool:
    return "proj" in path


def test_fused_transformer_layers_see_the_adapters(rng: Generator) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8, generator=rng)
    with torch.no_grad():
        base = layer(x)
        scramble(runtime.attach(layer, "lora", targets=["self_attn", "linear1"], rank=2), rng)
        live = layer(x)
        runtime.merge(layer)
        merged = layer(x)
    assert float((live - base).abs().max()) > 0.01
    close(merged, live, 1e-5)


class Experts(nn.Module):
    """Stacked weights without a layer of their own, as transformers 5 keeps experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.gate_up_proj)


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "full"])
def test_stacked_parameters(algorithm: str, rng: Generator, tmp_path: Path) -> None:
    model = nn.Sequential(Experts())
    plain = copy.deepcopy(model)
    x = torch.randn(2, 4, generator=rng)
    base = model(x)
    rank = None if algorithm == "full" else 2
    found = runtime.attach(model, algorithm, targets=["gate_up_proj"], rank=rank)
    close(model(x), base, 1e-6)
    scramble(found, rng)
    live = model(x)
    for n in range(3):
        adapter = found.modules["0.gate_up_proj" if rank is None else f"0.{n}.gate_up_proj"]
        change = adapter.delta()[n] if rank is None else adapter.delta()
        close((live - base)[:, n], x @ change.T, 1e-5)
    merged = copy.deepcopy(model)
    runtime.merge_and_detach(merged)
    close(merged(x), live, 1e-5)
    runtime.save(model, tmp_path / "file.safetensors", "lycoris")
    runtime.attach(plain, tmp_path / "file.safetensors")
    close(plain(x), live, 1e-5)
    live.sum().backward()
    runtime.check_gradients(model)
    with (
        pytest.raises(UnsupportedError, match="per row"),
        runtime.per_row(model, ["default", None]),
    ):
        model(x)


def test_norms_take_full_changes_and_refuse_factors(rng: Generator) -> None:
    model, x = layers(rng), ids(rng)
    found = runtime.attach(model, "full", targets="norm", bias="targets")
    assert isinstance(found.modules["norm"], Full)
    scramble(found, rng)
    live = model(x)
    runtime.merge(model)
    close(model(x), live, 1e-5)
    with pytest.raises(UsageError, match="norm: LoRA: a weight of shape"):
        runtime.attach(layers(rng), "lora", targets="norm", rank=2)


def test_a_quantized_linear_keeps_its_forward(rng: Generator) -> None:
    class Packed(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight.float() / 16, self.bias)

    layer = Packed(4, 3)
    codes = torch.randint(-8, 8, (3, 4), generator=rng, dtype=torch.int8)
    layer.weight = nn.Parameter(codes, requires_grad=False)  # type: ignore[assignment]
    x = torch.randn(2, 4, generator=rng)
    base = layer(x)
    lora = ALGORITHMS["lora"].init(torch.zeros(3, 4), rank=2, generator=rng)
    model = nn.Sequential(layer)
    adapter = Adapter({"transformer:0": lora}, "generic")
    found = runtime.attach(model, adapter, trainable=True)
    scramble(found, rng)
    live = found.modules["0"]
    close(model(x), base + x @ live.delta().T, 1e-5)
    with pytest.raises(UnsupportedError, match="packed in a way that live merging does not write"):
        runtime.merge(model)
    runtime.attach(model, "loha", targets="0", rank=2, name="fresh")
    with pytest.raises(UnsupportedError, match="holds torch"):
        runtime.attach(model, "lora", targets="0", rank=2, dora=True, name="dora")
