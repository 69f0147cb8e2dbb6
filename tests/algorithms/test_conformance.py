"""The laws every algorithm keeps, on every layer and dtype."""

import math

import pytest
import torch
from torch import Generator, nn

from peftsurgery.algorithms import ALGORITHMS, Full, LoRA, Replace, WeightAdapter, norm
from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import UsageError
from tests.algorithms.cases import ALL, CASES, IDS, LAYERS, Case, close, draw
from tests.algorithms.map_cases import MAP_CASES
from tests.algorithms.sized_cases import SIZED

every = pytest.mark.parametrize(("case", "layer"), ALL, ids=IDS)


def expected(case: Case, adapter: WeightAdapter, shape: tuple[int, ...]) -> torch.Tensor:
    return case.formula(adapter, shape) * float(adapter.scale)


def test_the_registry_names_every_class() -> None:
    assert all(cls.algorithm == name for name, cls in ALGORITHMS.items())
    cases = {case.name.partition("-")[0] for case in (*CASES, *MAP_CASES, *SIZED)}
    assert cases | {"set"} == set(ALGORITHMS)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_delta_is_the_formula(case: Case, layer: str, dtype: torch.dtype, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, dtype)
    weight = draw(rng, *shape, dtype=dtype)
    wanted = expected(case, adapter, shape)
    delta = adapter.delta(weight)
    assert delta.dtype == torch.float32
    close(delta, wanted)
    close(adapter.delta(), wanted)
    assert adapter.shape == shape
    assert all(t.dtype == dtype for t in adapter.tensors().values())
    assert math.isclose(norm(adapter), float(wanted.norm()), rel_tol=1e-6)


@every
def test_tiles_are_rows_of_delta(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32)
    delta = adapter.delta().reshape(shape[0], -1)
    for start, stop in ((0, shape[0]), (0, 1), (1, 7), (5, 6), (4, shape[0])):
        close(adapter.tile(start, stop), delta[start:stop])
        out = draw(rng, stop - start, delta.shape[1])
        wanted = out + 0.75 * delta[start:stop]
        assert adapter.accumulate(out, start, stop, 0.75) is out
        close(out, wanted)
    for start, stop in ((-1, 2), (3, 3), (0, shape[0] + 1)):
        with pytest.raises(UsageError, match="rows"):
            adapter.tile(start, stop)


@every
def test_factors_multiply_to_delta(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32)
    factors = adapter.factors()
    delta = adapter.delta().reshape(shape[0], -1)
    if adapter.algorithm == "full":
        assert factors is None
    if factors is not None:
        assert factors[0].shape[1] < min(delta.shape)
        close(factors[0] @ factors[1], delta)
    u, s, vh = adapter.svd()
    close(u * s @ vh, delta, 1e-5)
    wanted = torch.linalg.svdvals(delta.double())
    close(s[: len(wanted)], wanted[: len(s)].float(), 1e-5)


@every
def test_merged_is_w_plus_strength_times_the_change(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32).with_tensors(bias=draw(rng, shape[0]))
    assert adapter.bias is not None
    weight, bias = draw(rng, *shape), draw(rng, shape[0])
    kept = weight.clone()
    change = expected(case, adapter, shape)
    for strength in (1.0, 0.3, -2.0):
        w, b = adapter.merged(weight, bias, strength)
        close(w, weight.double() + strength * change)
        assert b is not None
        close(b, bias + strength * adapter.bias)
    w, b = adapter.merged(weight, bias, 0)
    assert b is not None
    assert torch.equal(w, weight)
    assert torch.equal(b, bias)
    assert torch.equal(weight, kept), "the weight was written to"
    assert adapter.merged(weight, None, 0)[1] is None
    b = adapter.merged(weight, None, 2.0)[1]
    assert b is not None
    close(b, 2 * adapter.bias)
    low = weight.bfloat16()
    w, b = adapter.merged(low, bias.bfloat16(), 0)
    assert w.dtype == torch.float32
    assert torch.equal(w, low.float())
    close(adapter.merged(low)[0], low.double() + change)


@pytest.mark.parametrize(
    ("case", "layer"),
    [pair for pair in ALL if pair[1] != "norm"],
    ids=[name for name in IDS if not name.endswith("norm")],
)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_norms_of_the_sum(case: Case, layer: str, axis: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    magnitude = draw(rng, shape[0] if axis == "out" else shape[1]).abs() + 0.1
    plain = case.make(shape, rng, torch.float32)
    adapter = plain.with_tensors(magnitude=magnitude, magnitude_axis=axis)
    weight = draw(rng, *shape)
    full = weight.double() + expected(case, plain, shape)
    matrix = full.reshape(shape[0], shape[1], -1)
    scale = magnitude / matrix.square().sum((1, 2) if axis == "out" else (0, 2)).sqrt()
    wanted = matrix * (scale[:, None, None] if axis == "out" else scale[None, :, None])
    wanted = wanted.reshape(shape)
    assert not adapter.additive
    close(adapter.merged(weight)[0], wanted)
    close(adapter.merged(weight, strength=0.5)[0], (weight + wanted) / 2)
    assert torch.equal(adapter.merged(weight, strength=0)[0], weight)
    close(adapter.delta(weight), wanted - weight, 1e-5)
    assert adapter.factors() is None
    for call in (adapter.delta, lambda: adapter.tile(0, 1), lambda: norm(adapter)):
        with pytest.raises(UsageError, match="depends on the weight"):
            call()


def test_dora_of_a_zero_row_stays_finite(rng: Generator) -> None:
    up, down = draw(rng, 6, 2), draw(rng, 2, 5)
    up[3] = 0
    weight = draw(rng, 6, 5)
    weight[3] = 0
    adapter = LoRA(up, down, magnitude=torch.ones(6), magnitude_axis="out")
    merged = adapter.merged(weight)[0]
    assert bool(torch.isfinite(merged).all())
    assert torch.equal(merged[3], torch.zeros(5))
    close(merged.norm(dim=1), torch.tensor([1.0, 1, 1, 0, 1, 1]))


@pytest.mark.parametrize("layer", ["linear", "conv3x3", "norm"])
def test_replacement(layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    value, new_bias = draw(rng, *shape), draw(rng, shape[0])
    adapter = Replace(value.half(), bias=new_bias)
    weight, bias = draw(rng, *shape), draw(rng, shape[0])
    w, b = adapter.merged(weight, bias)
    assert b is not None
    assert torch.equal(w, value.half().float())
    assert torch.equal(b, new_bias)
    w, b = adapter.merged(weight, bias, 0.25)
    assert b is not None
    close(w, weight + 0.25 * (value.half() - weight))
    close(b, bias + 0.25 * (new_bias - bias))
    assert torch.equal(adapter.merged(weight, bias, 0)[0], weight)
    close(adapter.delta(weight), value.half() - weight)
    only_bias = Replace(bias=new_bias)
    assert torch.equal(only_bias.merged(weight, bias)[0], weight)
    assert float(only_bias.delta(weight).abs().max()) == 0


def test_replacement_by_a_larger_weight_needs_strength_one(rng: Generator) -> None:
    value, weight = draw(rng, 9, 4), draw(rng, 7, 4)
    assert torch.equal(Replace(value).merged(weight)[0], value)
    with pytest.raises(UsageError, match="does not fit"):
        Replace(value).merged(weight, strength=0.5)


def test_padding_extends_the_weight_with_zeros(rng: Generator) -> None:
    adapter = LoRA(draw(rng, 6, 2), draw(rng, 2, 8), padded_shape=(6, 8))
    weight = draw(rng, 6, 5)
    wanted = adapter.delta()
    wanted[:, :5] += weight
    close(adapter.merged(weight)[0], wanted)
    assert adapter.delta(weight).shape == (6, 8)
    with pytest.raises(UsageError, match="cannot be padded"):
        adapter.merged(draw(rng, 6, 9))


def test_a_bias_change_alone(rng: Generator) -> None:
    adapter = Full(bias=draw(rng, 6))
    weight, bias = draw(rng, 6, 3, 3), draw(rng, 6)
    w, b = adapter.merged(weight, bias)
    assert b is not None
    assert adapter.bias is not None
    assert torch.equal(w, weight)
    close(b, bias + adapter.bias)
    assert torch.equal(adapter.delta(weight), torch.zeros(6, 3, 3))
    assert not adapter.is_zero()
    assert adapter.with_tensors(bias=torch.zeros(6)).is_zero()


def test_a_conv1d_bias_runs_along_the_columns(rng: Generator) -> None:
    adapter = LoRA(draw(rng, 4, 2), draw(rng, 2, 6), bias=draw(rng, 6), stored="conv1d")
    b = adapter.merged(draw(rng, 4, 6), torch.zeros(6))[1]
    assert b is not None
    assert adapter.bias is not None
    close(b, adapter.bias)


@every
def test_zero_is_recognised(case: Case, layer: str, rng: Generator) -> None:
    adapter = case.make(LAYERS[layer], rng, torch.float16)
    assert not adapter.is_zero()
    assert adapter.with_tensors(scale=0.0).is_zero()
    name = next(iter(adapter.tensors()))
    empty = adapter.with_tensors(**{name: torch.zeros_like(adapter.tensors()[name])})
    assert empty.is_zero()
    assert float(empty.delta().abs().max()) == 0
    assert not empty.with_tensors(bias=draw(rng, LAYERS[layer][0])).is_zero()


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1, 1)])
@pytest.mark.parametrize("target", [(12, 10), (12, 10, 1), (12, 10, 1, 1)])
def test_a_1x1_kernel_is_a_matrix(
    shape: tuple[int, ...], target: tuple[int, ...], rng: Generator
) -> None:
    adapter = LoRA(draw(rng, 12, 3), draw(rng, 3, *shape[1:]))
    weight = draw(rng, *target)
    assert adapter.delta(weight).shape == target
    close(adapter.merged(weight)[0], weight + adapter.delta().reshape(target))


def test_storage_is_shared_and_parameters_are_frozen(rng: Generator) -> None:
    up, down = draw(rng, 6, 2).half(), draw(rng, 2, 5).half()
    adapter = LoRA(up, down, scale=0.5)
    assert adapter.up.data_ptr() == up.data_ptr()
    assert [p.requires_grad for p in adapter.parameters()] == [False, False]
    assert isinstance(adapter.up, nn.Parameter)
    assert (adapter.numel, adapter.nbytes) == (22, 44)
    other = adapter.with_tensors(scale=2.0)
    assert other.up is adapter.up
    assert (float(adapter.scale), float(other.scale)) == (0.5, 2.0)
    with pytest.raises(UsageError, match="closest: up"):
        adapter.with_tensors(upp=up)


@every
def test_strided_views_are_ordinary_tensors(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32)
    views = {n: t.detach().mT.contiguous().mT for n, t in adapter.tensors().items() if t.ndim > 1}
    other = adapter.with_tensors(**views)
    weight = draw(rng, *shape)
    if len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    kept = weight.clone()
    close(other.merged(weight)[0], adapter.merged(weight.contiguous())[0])
    assert torch.equal(weight, kept)
    close(other.tile(1, 5), adapter.tile(1, 5))
    factors = other.factors()
    if factors is not None:
        close(factors[0] @ factors[1], adapter.delta().reshape(shape[0], -1))


def test_trained_factors_receive_gradients(rng: Generator) -> None:
    up = nn.Parameter(draw(rng, 6, 2))
    adapter = LoRA(up, nn.Parameter(draw(rng, 2, 5)), scale=0.5)
    weight = draw(rng, 6, 5)
    merged = adapter.merged(weight)[0]
    merged.square().sum().backward()
    assert up.grad is not None
    close(up.grad, merged @ adapter.down.T, 1e-5)


def layer_of(name: str, groups: int = 1) -> Layer:
    if name in ("linear", "embedding"):
        return Layer(name)  # type: ignore[arg-type]
    kernel = LAYERS[name][2:]
    n = len(kernel)
    return Layer("conv", (2,) * n, (1,) * n, (1,) * n, groups, "zeros", kernel)


def input_of(name: str, rng: Generator) -> torch.Tensor:
    shape = LAYERS[name]
    if name == "embedding":
        return torch.randint(0, shape[0], (2, 5), generator=rng)
    if name == "linear":
        return draw(rng, 2, 3, shape[1])
    return draw(rng, 2, shape[1], *(7 for _ in shape[2:]))


@pytest.mark.parametrize(
    ("case", "layer"),
    [pair for pair in ALL if pair[1] != "norm"],
    ids=[name for name in IDS if not name.endswith("norm")],
)
def test_change_is_the_layer_with_delta(case: Case, layer: str, rng: Generator) -> None:
    adapter = case.make(LAYERS[layer], rng, torch.float32)
    assert adapter.side == "sum"
    described, x = layer_of(layer), input_of(layer, rng)
    delta = adapter.delta().reshape(LAYERS[layer])
    close(adapter.change(x, described), described.apply(x, delta), 1e-5)


def test_change_of_a_grouped_convolution(rng: Generator) -> None:
    layer = Layer("conv", (1,), (1,), (1,), 3, "circular", (3,))
    adapter = LoRA(draw(rng, 12, 2), draw(rng, 2, 4, 3), scale=0.5)
    x = draw(rng, 2, 12, 7)
    close(adapter.change(x, layer), layer.apply(x, adapter.delta()), 1e-5)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "full", "set"])
@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize("rank", [2, 40])
def test_a_fresh_adapter_changes_nothing(
    algorithm: str, layer: str, rank: int, rng: Generator
) -> None:
    weight = draw(rng, *LAYERS[layer])
    if weight.ndim == 1 and algorithm not in ("full", "set"):
        with pytest.raises(UsageError, match="no low-rank change"):
            ALGORITHMS[algorithm].init(weight, rank=rank)
        return
    stored = "embedding" if layer == "embedding" else "linear"
    adapter = ALGORITHMS[algorithm].init(weight, rank=rank, alpha=3.0, generator=rng, stored=stored)
    assert torch.equal(adapter.merged(weight)[0], weight)
    assert float(adapter.delta(weight).detach().abs().max()) == 0
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapter.parameters())
    if adapter.rank is not None:
        assert float(adapter.scale) == pytest.approx(3 / rank)
    adapter.merged(weight)[0].square().sum().backward()
    assert any(p.grad is not None for p in adapter.parameters())
    with pytest.raises(UsageError, match="has no option 'ranc'"):
        ALGORITHMS[algorithm].init(weight, rank=rank, ranc=2)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_fresh_tucker_forms_have_their_cores(algorithm: str, rng: Generator) -> None:
    adapter = ALGORITHMS[algorithm].init(
        draw(rng, 12, 10, 3, 3), rank=2, generator=rng, tucker=True
    )
    assert {"mid", "t1", "t2"} & set(adapter.tensors())
    assert adapter.shape == (12, 10, 3, 3)
    assert float(adapter.delta().detach().abs().max()) == 0


def test_the_scale_stays_fp32_when_a_model_is_cast(rng: Generator) -> None:
    adapter = LoRA(draw(rng, 6, 2), draw(rng, 2, 5), scale=1 / 3)
    adapter.to(torch.bfloat16)
    assert adapter.up.dtype == torch.bfloat16
    assert adapter.scale.dtype == torch.float32
    assert float(adapter.scale) == pytest.approx(1 / 3, abs=1e-8)
