"""Adapters on packed layers: the base keeps its forward and its bytes, every algorithm is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery import runtime
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import ALGORITHMS, Replace
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.runtime.freezing import REORDERS
from peftsurgery.runtime.packed import dense_weight, is_packed
from tests.algorithms.cases import close
from tests.runtime import small
from tests.runtime.models import scramble
from tests.runtime.packed_layers import KINDS, Two, bits, inputs, plain_layer

LOSSY = {"int8": 2e-2}  # its own forward rounds the input too, and computes in fp16


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weight_is_what_the_layer_multiplies_with(kind: str, rng: Generator) -> None:
    model, x = Two(kind, rng).train(), inputs(rng)
    for layer in (model.first, model.second):
        assert is_packed(layer)
    before = bits(model)
    dense = dense_weight(model.first)
    same(bits(model), before)
    assert tuple(dense.shape) == (192, 64)
    assert type(dense) is torch.Tensor
    close(model.first(x), F.linear(x, dense.float(), model.first.bias), LOSSY.get(kind, 1e-4))


@pytest.mark.parametrize("kind", KINDS)
def test_training_beside_a_packed_base(kind: str, rng: Generator) -> None:
    model, x = Two(kind, rng), inputs(rng, 16)
    classes = {n: type(m) for n, m in model.named_modules()}
    wanted = torch.randn(16, 128, generator=rng)
    model.train()
    base, before = model(x).detach(), bits(model)
    found = runtime.attach(model, "lora", targets="all-linear", rank=4, generator=rng)
    assert set(found.modules) == {"first", "second"}
    assert torch.equal(model(x), base)
    optimizer = torch.optim.Adam(runtime.trainable_parameters(model).values(), 2e-2)
    losses: list[float] = []
    for _ in range(25):
        loss = F.mse_loss(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    own = {id(p) for p in runtime.trainable_parameters(model).values()}
    for name, parameter in model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.any())
        assert trained == (id(parameter) in own), name
    live = model(x).detach()
    first = found.modules["first"].delta()
    close(model.first(x), F.linear(x, dense_weight(model.first).float() + first, model.first.bias),
          LOSSY.get(kind, 1e-4))  # fmt: skip

    adapter = runtime.export(model)
    runtime.attach(model, "loha", targets=["first"], rank=2, name="other", generator=rng)
    close(model(x), live, 1e-6)
    runtime.set_strength(model, 0.0)
    close(model(x), base, 1e-6)
    runtime.set_strength(model, 1.0)
    with runtime.disabled(model):
        assert torch.equal(model(x), base)
    runtime.detach(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    same(bits(model), before)
    assert torch.equal(model(x), base)
    runtime.attach(model, adapter)
    close(model(x), live, 1e-6)


SIDES = {
    "lora": {"rank": 4},
    "dora": {"rank": 4, "dora": True},
    "dora of inputs": {"rank": 4, "dora": "in"},
    "hira": {"rank": 4},
    "glora": {"rank": 4},
    "oft": {"block_size": 8},
    "boft": {"block_size": 8, "factors": 2},
    "hra": {"rank": 4},
    "ia3": {},
    "full": {},
}


@pytest.mark.parametrize("kind", ["nf4 nested", "int8", "hqq", "torchao int8", "quanto int4"])
@pytest.mark.parametrize("algorithm", SIDES)
def test_every_side_is_exact(kind: str, algorithm: str, rng: Generator) -> None:
    model, x = Two(kind, rng).train(), inputs(rng)
    base = model(x).detach()
    before = bits(model)
    name = algorithm.split()[0].replace("dora", "lora")
    found = runtime.attach(
        model,
        name,
        targets="first",
        generator=rng,
        **SIDES[algorithm],  # type: ignore[arg-type]
    )
    tolerance = LOSSY.get(kind, 1e-4)
    close(model(x), base, tolerance)
    scramble(found, rng)
    dense = dense_weight(model.first).float()
    for strength in (1.0, 0.3):
        runtime.set_strength(model, strength)
        weight, bias = found.modules["first"].merged(dense, model.first.bias, strength)
        assert float((weight - dense).abs().max()) > 1e-3
        close(model.first(x), F.linear(x, weight, bias), tolerance)
    model(x).square().mean().backward()
    for name, parameter in found.modules["first"].named_parameters():
        assert parameter.grad is not None, name
    runtime.detach(model)
    same(bits(model), before)


def test_sides_in_order_on_one_packed_layer(rng: Generator) -> None:
    model, x = Two("nf4", rng), inputs(rng)
    weight = dense_weight(model.first)
    bias = model.first.bias
    for n, (name, options) in enumerate(SIDES.items()):
        kind = name.split()[0].replace("dora", "lora")
        found = runtime.attach(
            model,
            kind,
            targets="first",
            name=f"a{n}",
            generator=rng,
            **options,  # type: ignore[arg-type]
        )
        scramble(found, rng)
        weight, bias = found.modules["first"].merged(weight, bias, 1.0)
    close(model.first(x), F.linear(x, weight, bias), 2e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq", "gguf"])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian"])
def test_inits_that_look_at_the_weight(kind: str, init: str, rng: Generator) -> None:
    model, x = Two(kind, rng).train(), inputs(rng)
    base, dense = model(x).detach(), dense_weight(model.first).float()
    found = runtime.attach(model, "lora", targets="first", rank=4, init=init, generator=rng)
    close(model(x), base, 1e-4)
    if init == "pissa":
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        close(found.modules["first"].delta(), u[:, :4] * s[:4] @ vh[:4], 1e-3)


def test_layers_trained_whole(rng: Generator) -> None:
    model, x = Two("nf4 nested", rng), inputs(rng)
    base = model(x).detach()
    lora = {"targets": "second", "rank": 2, "modules_to_save": ["first"], "generator": rng}
    found = runtime.attach(model, "lora", **lora)  # type: ignore[arg-type]
    close(model(x), base, 1e-5)
    scramble(found, rng)
    whole = model.first.adapters["default"]  # type: ignore[index]
    assert isinstance(whole, Replace)
    assert whole.weight is not None
    close(model.first(x), F.linear(x, whole.weight, whole.bias), 1e-5)


def test_what_is_refused(rng: Generator) -> None:
    model = Two("nf4", rng)
    before = bits(model)
    with pytest.raises(UnsupportedError, match="LoftQ starts from the weight before"):
        runtime.attach(model, "lora", targets="first", rank=2, init="loftq")
    with pytest.raises(UsageError, match="names no layer"):
        runtime.attach(model, "lora", targets="absmax", rank=2)
    same(bits(model), before)
    assert type(model.first).__name__ == "Linear4bit"
    assert not hasattr(model.first, "adapters")
    raw = nn.Sequential(KINDS["nf4"](plain_layer(64, 32, rng)))
    raw[0].weight.quant_state = None  # type: ignore[union-attr]
    raw[0].quant_state = None  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="not quantized yet"):
        runtime.attach(raw, "lora", targets="0", rank=2, dora=True)


class Words(nn.Module):
    """A linear of a library that is not known here: int32 words and scales."""

    def __init__(self, dense: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = dense.shape
        self.register_buffer("qweight", torch.zeros(self.in_features // 8, self.out_features).int())
        self.dense = (dense,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense[0])


class Scaled(nn.Linear):
    """8-bit floats with one scale, which a forward of its own multiplies with."""

    def __init__(self, dense: torch.Tensor) -> None:
        super().__init__(dense.shape[1], dense.shape[0], bias=False)
        scale = dense.abs().max() / 448
        codes = (dense / scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = nn.Buffer(scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.float() * self.weight_scale_inv)


@pytest.mark.parametrize("layer", [Words, Scaled])
def test_layers_of_libraries_that_are_not_known(layer: type[nn.Module], rng: Generator) -> None:
    model = nn.Sequential(layer(torch.randn(24, 16, generator=rng)))
    x = torch.randn(3, 16, generator=rng)
    base = model(x)
    for algorithm, options in (
        ("lora", {"dora": True, "rank": 2}),
        ("lora", {"init": "pissa", "rank": 2}),
        (Replace, {}),
    ):
        with pytest.raises(UnsupportedError, match="what it stands for is not known"):
            runtime.attach(model, algorithm, targets="all-linear", **options)  # type: ignore[arg-type]
    found = runtime.attach(model, "lora", targets="all-linear", rank=4, name="new")
    scramble(found, rng)
    close(model(x), base + x @ found.modules["0"].delta().T, 1e-5)
    with pytest.raises(UnsupportedError, match="merge the files instead"):
        runtime.merge(model)
    runtime.detach(model)
    assert torch.equal(model(x), base)
    lora = ALGORITHMS["lora"].init(torch.zeros(16, 24), rank=2, generator=rng)
    with pytest.raises(UsageError, match="transformer:0"):
        runtime.attach(model, Adapter({"transformer:0": lora}, "generic"))


def test_a_base_in_an_order_without_gradients(rng: Generator) -> None:
    """bitsandbytes re-orders 4-bit weights at the first call in eval mode on some CPUs."""
    model, x = Two("nf4", rng).eval(), inputs(rng)
    for layer in (model.first, model.second):
        setattr(layer, REORDERS, True)
    before = bits(model)
    runtime.attach(model, "lora", targets="second", rank=2, generator=rng)
    with torch.no_grad():
        model(x)
    same(bits(model), before)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    runtime.delete(model)
    assert getattr(model.first, REORDERS) is True
    assert getattr(model.second, REORDERS) is True
    state = getattr(model.second.weight, "quant_state")  # noqa: B009
    state.packing_format_for_cpu = True  # as that call leaves it
    for call in (
        lambda: runtime.attach(model, "lora", targets="first", rank=2),
        lambda: runtime.attach(model, "lora", targets="second", rank=2, dora=True, trainable=False),
    ):
        with pytest.raises(UnsupportedError, match="has re-ordered its weight"):
            call()
    runtime.attach(model, "lora", targets="second", rank=2, trainable=False)
    with pytest.raises(UnsupportedError, match="has re-ordered its weight"):
        runtime.merge(model)


@pytest.mark.parametrize("called", [False, True])
def test_compressed_tensors_decompress_at_the_first_call(
    called: bool, tmp_path: Path, rng: Generator
) -> None:
    small.llama().save_pretrained(tmp_path / "plain")
    ps.quantize(tmp_path / "plain", tmp_path / "packed", format="int-quantized")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    x = small.tokens()
    base = other(x).logits.detach()
    if called:
        model(x)
    else:
        with pytest.raises(UnsupportedError, match=r"Linear.weight holds torch.int8"):
            runtime.attach(model, "lora", targets="q_proj", rank=2, dora=True)
    targets = ["q_proj", "down_proj"] if called else ["q_proj", "down_proj", "lm_head"]
    found = runtime.attach(model, "lora", targets=targets, rank=2, generator=rng)
    close(model(x).logits, base, 1e-6)
    scramble(found, rng)
    live = model(x).logits.detach()
    assert float((live - base).abs().max()) > 0.01
    runtime.merge(model)
    close(model(x).logits, live, 1e-4)
    runtime.unmerge(model)
    runtime.detach(model)
    close(model(x).logits, base, 1e-6)
