"""The laws of VeRA, FourierFT, C3A, MiSS, SHiRA and AdaLoRA: formulas, activations, gradients and
rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, nn

from peftsurgery.algorithms import (
    C3A,
    FourierFT,
    Full,
    LoRA,
    MiSS,
    SHiRA,
    SizedChange,
    VeRA,
    WeightAdapter,
    difference,
    norm,
    swap_halves,
)
from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import CannotFuse, CannotSplit
from tests.algorithms.cases import LAYERS, Case, close, draw, get
from tests.algorithms.sized_cases import SIZED, SIZED_ALL, SIZED_IDS

every = pytest.mark.parametrize(("case", "layer"), SIZED_ALL, ids=SIZED_IDS)


def expected(case: Case, adapter: WeightAdapter, shape: tuple[int, ...]) -> torch.Tensor:
    return case.formula(adapter, shape) * float(adapter.scale)


def unsized(adapter: WeightAdapter) -> WeightAdapter:
    return adapter.with_tensors(sized=None) if isinstance(adapter, SizedChange) else adapter


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_delta_is_the_formula(case: Case, layer: str, dtype: torch.dtype, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, dtype)
    wanted = expected(case, adapter, shape)
    weight, bias = draw(rng, *shape, dtype=dtype), draw(rng, shape[0])
    kept = weight.clone()
    for known in (adapter, unsized(adapter)):
        delta = known.delta(weight)
        assert delta.dtype == torch.float32
        assert delta.shape == shape
        close(delta, wanted)
        for strength in (1.0, 0.3, -2.0):
            found, new_bias = known.merged(weight, bias, strength)
            close(found, weight.double() + strength * wanted)
            assert new_bias is not None
            assert torch.equal(new_bias, bias)
        assert torch.equal(known.merged(weight, strength=0)[0], weight.float())
        assert not known.is_zero()
        assert known.with_tensors(scale=0.0).is_zero()
    assert torch.equal(weight, kept), "the weight was written to"
    close(adapter.delta().reshape(shape), wanted)
    assert math.isclose(norm(adapter), float(wanted.norm()), rel_tol=1e-6)
    assert all(t.dtype == dtype for t in adapter.tensors().values())
    wide = adapter.delta().flatten(1)
    for start, stop in ((0, shape[0]), (0, 1), (1, 7), (5, 6)):
        close(adapter.tile(start, stop), wide[start:stop])
    factors = adapter.factors()
    if factors is not None:
        assert factors[0].shape[1] < min(wide.shape)
        close(factors[0] @ factors[1], wide)
    assert (factors is None) == (case.name not in FACTORED or factors is None)


FACTORED = ("vera", "vera-drawn", "fourierft-few", "miss", "miss-wide", "miss-mini")


@pytest.mark.parametrize("case", SIZED, ids=lambda c: c.name)
def test_factors_exist_where_the_rank_is_low(case: Case, rng: Generator) -> None:
    adapter = case.make(LAYERS["linear"], rng, torch.float32)
    assert (adapter.factors() is not None) == (case.name in FACTORED)
    shape = (12, 10)
    fitted = LoRA.fit(adapter)
    close(fitted.delta(), adapter.delta(), 5e-6)
    weight = draw(rng, *shape)
    close(LoRA.fit(unsized(adapter), None, weight).delta(), adapter.delta(), 5e-6)
    close(Full.fit(unsized(adapter), weight).delta(), adapter.delta())
    s = torch.linalg.svdvals(adapter.delta().double())
    gap = (LoRA.fit(adapter, 2).delta().double() - adapter.delta().double()).norm() / s.norm()
    assert math.isclose(float(gap), float(s[2:].norm() / s.norm()), rel_tol=1e-4, abs_tol=2e-6)


@every
def test_change_is_the_layer_with_delta(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32)
    assert adapter.side == "sum"
    n = len(shape) - 2
    described = Layer("conv", (1,) * n, (1,) * n, (1,) * n, 1, "zeros", shape[2:])
    if not n:
        described = Layer("embedding" if layer == "embedding" else "linear")
    x = draw(rng, 2, shape[1], *[5] * n) if n else draw(rng, 2, 3, shape[1])
    if layer == "embedding":
        x = torch.randint(0, shape[0], (2, 5), generator=rng)
    close(adapter.change(x, described), described.apply(x, adapter.delta().reshape(shape)), 1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda r: VeRA(draw(r, 9), draw(r, 3), draw(r, 3, 12), draw(r, 11, 3), scale=0.7),
        lambda r: FourierFT(draw(r, 7), scale=40.0),
    ],
    ids=["vera", "fourierft"],
)
def test_a_transposed_layer_gets_the_transpose(make: Any, rng: Generator) -> None:
    adapter = make(rng)
    straight, turned = adapter.on((9, 10)), adapter.with_tensors(stored="conv1d").on((10, 9))
    close(turned.delta(), straight.delta().T)
    close(turned.tile(2, 7), straight.delta().T[2:7])
    factors = turned.factors()
    if factors is not None:
        close(factors[0] @ factors[1], turned.delta())
    x = draw(rng, 2, 3, 10)
    layer = Layer("hf_conv1d")
    close(turned.change(x, layer), layer.apply(x, turned.delta()), 1e-5)


def test_shira_adds_where_positions_are_few_and_multiplies_where_they_are_many(
    rng: Generator,
) -> None:
    places = torch.tensor([[0, 4, 4, 2], [1, 0, 0, 5]])
    adapter = SHiRA(nn.Parameter(draw(rng, 4)), places, scale=0.5).on((5, 6))
    values = get(adapter, "values")
    assert float(adapter.delta()[4, 0].detach()) == pytest.approx(float(values[1:3].sum()) / 2)
    for count in (1, 3, 200):
        x = draw(rng, count, 6)
        adapter.values.grad = None
        y = adapter.change(x, Layer("linear"))
        close(y, x @ adapter.delta().T, 1e-5)
        target = draw(rng, count, 5)
        (y * target).sum().backward()
        assert adapter.values.grad is not None
        wanted = 0.5 * (target.T @ x)[places[0], places[1]]
        close(adapter.values.grad, wanted, 1e-5)


@every
def test_gradients_reach_every_tensor(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    made = case.make(shape, rng, torch.float32)
    for path in ("merged", "change"):
        tensors: dict[str, Any] = {
            n: nn.Parameter(t.detach().clone()) for n, t in made.tensors().items()
        }
        adapter = made.with_tensors(**tensors)
        if path == "merged":
            result = adapter.merged(draw(rng, *shape))[0]
        elif layer == "linear":
            result = adapter.change(draw(rng, 7, shape[1]), Layer("linear"))
        else:
            continue
        (result * draw(rng, *result.shape)).sum().backward()
        for name, tensor in adapter.tensors().items():
            assert tensor.grad is not None, name
            assert float(tensor.grad.abs().max()) > 0, name
        assert not any(b.requires_grad for b in adapter.buffers())


@pytest.mark.parametrize("blocks", [(3, 2, 5), (1, 3, 4), (2, 2, 1)])
def test_gradients_of_c3a_are_right(blocks: tuple[int, int, int], rng: Generator) -> None:
    kernel = draw(rng, *blocks, dtype=torch.float64)
    own = C3A(nn.Parameter(kernel), scale=0.7)
    x = draw(rng, 2, 3, blocks[1] * blocks[2], dtype=torch.float64).requires_grad_()

    def change(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        own._parameters["kernel"] = kernel  # type: ignore[assignment]
        return own.change(x, Layer("linear"))

    assert torch.autograd.gradcheck(change, (x, kernel.requires_grad_()), atol=1e-6)


def test_c3a_keeps_its_input_and_its_kernel(rng: Generator) -> None:
    own = C3A(nn.Parameter(draw(rng, 3, 2, 4)))
    x, kept = draw(rng, 5, 8).requires_grad_(), set[int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = own.change(x, Layer("linear"))
    mine = {t.untyped_storage().data_ptr() for t in (x, own.kernel, own.scale)}
    assert kept <= mine
    assert y.requires_grad


# --- rows -----------------------------------------------------------------------------------------


@every
def test_rows_are_exact_or_refused(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32).with_tensors(bias=draw(rng, shape[0]))
    delta = adapter.delta().reshape(shape)
    if case.name.startswith("fourierft"):
        with pytest.raises(CannotSplit, match="every frequency"):
            adapter.rows(0, shape[0] // 2)
        with pytest.raises(CannotFuse, match="not the spectrum of one"):
            type(adapter).fuse([adapter, 4])
        return
    step = 2
    parts = [adapter.rows(0, step), adapter.rows(step, shape[0])]
    for part, rows in zip(parts, (delta[:step], delta[step:]), strict=True):
        assert type(part) is type(adapter)
        close(part.delta().reshape(rows.shape), rows)
    again = type(adapter).fuse(parts)
    close(again.delta().reshape(shape), delta)
    assert difference(again, adapter) < 1e-12
    assert again.bias is not None
    assert adapter.bias is not None
    assert torch.equal(again.bias, adapter.bias)
    joined = type(adapter).fuse([4, adapter, 2])
    wanted = torch.cat([torch.zeros(4, *shape[1:]), delta, torch.zeros(2, *shape[1:])])
    close(joined.delta().reshape(wanted.shape), wanted)
    half = shape[0] // 2
    if case.name != "c3a" or half % 2 == 0:
        close(swap_halves(adapter).delta().reshape(shape), delta.roll(half, 0))
    if case.name == "c3a":
        with pytest.raises(CannotSplit, match="in two"):
            adapter.rows(1, 4)
        with pytest.raises(CannotFuse, match="no whole C3A blocks"):
            C3A.fuse([adapter, 3])
    else:
        close(adapter.rows(1, 4).delta().reshape(3, *shape[1:]), delta[1:4])


def test_parts_that_differ_are_refused_with_the_reason(rng: Generator) -> None:
    down, up = draw(rng, 2, 6), draw(rng, 8, 2)
    vera = VeRA(draw(rng, 4), draw(rng, 2), down, up, sized=(4, 6))
    other = vera.with_tensors(lambda_d=draw(rng, 2))
    miss, fewer = MiSS(draw(rng, 2, 4), sized=(4, 6)), MiSS(draw(rng, 3, 4), sized=(4, 6))
    c3a, smaller = C3A(draw(rng, 2, 3, 2)), C3A(draw(rng, 4, 6, 1))
    cases: list[tuple[list[Any], str]] = [
        ([vera, other], "different vectors"),
        ([miss, fewer], "different ranks"),
        ([c3a, smaller], "different sizes"),
        ([MiSS(draw(rng, 2, 4), mini=True), 3], "how many rows"),
        ([FourierFT(draw(rng, 3)), 3], "how many rows"),
    ]
    for parts, reason in cases:
        with pytest.raises(CannotFuse, match=reason):
            type(parts[0]).fuse(parts)
    scaled = MiSS.fuse([miss, miss.with_tensors(scale=3.0)])
    close(scaled.delta(), torch.cat([miss.delta(), 3 * miss.delta()]))
    same = vera.with_tensors(lambda_b=draw(rng, 4), scale=0.5)
    close(VeRA.fuse([vera, same]).delta(), torch.cat([vera.delta(), same.delta()]))
    minis = MiSS(draw(rng, 2, 4), mini=True, sized=(8, 6))
    assert MiSS.fuse([minis, minis]).tensors()["block"].shape == (2, 4)


def test_rows_without_a_place_are_an_empty_shira(rng: Generator) -> None:
    adapter = SHiRA(draw(rng, 2), torch.tensor([[0, 1], [2, 3]]), sized=(6, 5))
    empty = adapter.rows(3, 6)
    assert empty.is_zero()
    assert float(empty.delta().abs().max()) == 0
    assert empty.shape == (3, 5)
