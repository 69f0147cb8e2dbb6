"""difference and norm against dense fp64, and what they refuse."""

import math

import pytest
import torch
from torch import Generator

from peftsurgery.algorithms import Full, LoHa, LoRA, Replace, WeightAdapter, compare, difference
from peftsurgery.errors import UsageError
from tests.algorithms.cases import ALL, CASES, IDS, LAYERS, Case, draw

every = pytest.mark.parametrize(("case", "layer"), ALL, ids=IDS)


def dense(case: Case, adapter: WeightAdapter, shape: tuple[int, ...]) -> torch.Tensor:
    return case.formula(adapter, shape) * float(adapter.scale)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm()) / max(float(x.norm()), float(y.norm()))


@every
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
def test_perturbed_factors(case: Case, layer: str, noise: float, rng: Generator) -> None:
    shape = LAYERS[layer]
    a = case.make(shape, rng, torch.float64)
    moved = {n: t + noise * torch.randn(t.shape, generator=rng) for n, t in a.tensors().items()}
    b = a.with_tensors(**moved)
    wanted = relative(dense(case, a, shape), dense(case, b, shape))
    got = difference(a, b)
    if noise == 0:
        assert got == 0.0
    else:
        assert math.isclose(got, wanted, rel_tol=1e-5)
    assert math.isclose(difference(b, a), got, rel_tol=1e-9, abs_tol=1e-15)


@pytest.mark.parametrize("first", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("second", CASES, ids=lambda c: c.name)
def test_any_two_algorithms(first: Case, second: Case, rng: Generator) -> None:
    shape = LAYERS["conv3x3"]
    a, b = first.make(shape, rng, torch.float32), second.make(shape, rng, torch.float32)
    wanted = relative(dense(first, a, shape), dense(second, b, shape))
    assert math.isclose(difference(a, b), wanted, rel_tol=1e-6)
    full = Full(dense(first, a, shape))
    assert difference(a, full) < 1e-12


def test_tiles_cover_every_row(rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "TILE", 25)
    value = draw(rng, 11, 10)
    for row in range(11):
        other = value.clone()
        other[row, 3] += 1
        wanted = relative(value.double(), other.double())
        assert math.isclose(difference(Full(value), Full(other)), wanted, rel_tol=1e-9)


@pytest.mark.parametrize("gauge", [3.0, 1e3])
def test_the_same_product_in_other_factors(gauge: float, rng: Generator) -> None:
    """Large terms cancel: the result must stay at fp64 rounding, and see 1e-7 above it."""
    up, down = draw(rng, 40, 4).double(), draw(rng, 4, 30).double()
    mix = torch.linalg.qr(torch.randn(4, 4, generator=rng).double()).Q * gauge
    a = LoRA(up, down)
    b = LoRA(up @ mix, torch.linalg.inv(mix) @ down)
    assert difference(a, b) < 1e-12
    moved = LoRA(up @ mix * (1 + 1e-7), torch.linalg.inv(mix) @ down)
    assert math.isclose(difference(a, moved), 1e-7, rel_tol=1e-4)
    wider = LoRA(torch.cat([up, up], 1), torch.cat([down, -down / 2]) * 2)
    assert math.isclose(difference(a, wider), 0, abs_tol=1e-12)


def test_scale_moved_into_a_factor(rng: Generator) -> None:
    up, down = draw(rng, 40, 4).half(), draw(rng, 4, 30).half()
    a = LoRA(up, down, scale=0.5)
    assert difference(a, LoRA(up * 0.5, down)) == 0.0
    assert math.isclose(difference(a, LoRA(up, down, scale=1.0)), 0.5, rel_tol=1e-9)
    assert math.isclose(difference(a, LoRA(up, down, scale=-0.5)), 2.0, rel_tol=1e-9)


def test_trailing_ones_and_flattening_do_not_matter(rng: Generator) -> None:
    up, down = draw(rng, 8, 2), draw(rng, 2, 6)
    assert difference(LoRA(up, down), LoRA(up[..., None, None], down[..., None, None])) == 0.0
    conv = LoRA(draw(rng, 8, 2), draw(rng, 2, 6, 3, 3))
    assert difference(conv, Full(conv.delta().flatten(1).double())) < 1e-6
    with pytest.raises(UsageError, match="not of one weight"):
        difference(LoRA(up, down), LoRA(up, draw(rng, 2, 7)))
    with pytest.raises(UsageError, match="not of one weight"):
        difference(LoRA(up, down), LoRA(draw(rng, 6, 2), draw(rng, 2, 8)))


def test_zeros_nan_and_sharing(rng: Generator) -> None:
    up, down = draw(rng, 8, 2), draw(rng, 2, 6)
    zero = LoRA(torch.zeros(8, 2), down)
    assert difference(zero, Full(torch.zeros(8, 6))) == 0.0
    assert difference(zero, LoRA(up, down)) == 1.0
    bad = up.clone()
    bad[0, 0] = math.nan
    assert difference(LoRA(bad, down), LoRA(bad.clone(), down.clone())) == 0.0
    assert math.isnan(difference(LoRA(bad, down), LoRA(up, down)))
    assert math.isnan(difference(LoRA(up, down, bias=bad[:, 0]), LoRA(up, down, bias=up[:, 0])))
    fp8 = LoRA(up.to(torch.float8_e4m3fn), down.to(torch.float8_e4m3fn))
    assert difference(fp8, LoRA(fp8.up.float(), fp8.down.float())) == 0.0


def test_biases_and_magnitudes_count(rng: Generator) -> None:
    a = LoRA(draw(rng, 8, 2), draw(rng, 2, 6))
    bias = draw(rng, 8)
    assert difference(a.with_tensors(bias=bias), a) == 1.0
    assert difference(a.with_tensors(bias=torch.zeros(8)), a) == 0.0
    near = a.with_tensors(bias=bias * 1.25)
    assert math.isclose(difference(a.with_tensors(bias=bias), near), 0.2, rel_tol=1e-6)
    m = torch.rand(8, generator=rng) + 1
    m[5] = 4
    moved = m.clone()
    moved[5] = 5
    dora = a.with_tensors(magnitude=m, magnitude_axis="out")
    assert math.isclose(difference(dora, dora.with_tensors(magnitude=moved)), 0.2, rel_tol=1e-6)


def test_kinds_that_only_a_weight_could_compare(rng: Generator) -> None:
    a = LoRA(draw(rng, 6, 2), draw(rng, 2, 6))
    dora = a.with_tensors(magnitude=torch.ones(6), magnitude_axis="out")
    value = Replace(draw(rng, 6, 6))
    others: list[WeightAdapter] = [
        dora,
        dora.with_tensors(magnitude_axis="in"),
        value,
        a.with_tensors(padded_shape=(6, 6)),
        a.with_tensors(bias=draw(rng, 6), bias_is_value=True),
    ]
    for other in others:
        assert difference(a, other) == math.inf
    assert difference(dora, others[1]) == math.inf
    assert difference(dora, value) == math.inf
    both = value.with_tensors(bias=draw(rng, 6))
    assert difference(value, both) == math.inf
    assert difference(both, both.with_tensors(bias=2 * draw(rng, 6))) > 0.1
    moved = Replace(value.tensors()["weight"] * 2)
    assert math.isclose(difference(value, moved), 0.5, rel_tol=1e-6)


def test_dora_of_different_algorithms_compares_products(rng: Generator) -> None:
    halves = [draw(rng, 12, 1), draw(rng, 1, 12), torch.ones(12, 1), torch.ones(1, 12)]
    m = torch.ones(12)
    loha = LoHa(*halves, magnitude=m, magnitude_axis="out")
    lora = LoRA(halves[0], halves[1], magnitude=m, magnitude_axis="out")
    assert difference(loha, lora) < 1e-12


def matrix(adapter: LoRA) -> torch.Tensor:
    up, down = adapter.up.double().flatten(1), adapter.down.double().flatten(1)
    return float(adapter.scale) * up @ down


SHAPES = [(300, 200, 8, ()), (40, 50, 40, ()), (64, 3, 16, (3, 3)), (5, 6, 3, (1, 1))]


def lora(rng: Generator, o: int, i: int, r: int, kernel: tuple[int, ...]) -> LoRA:
    up = torch.randn(o, r, *[1] * len(kernel), generator=rng)
    down = torch.randn(r, i, *kernel, generator=rng)
    return LoRA((up * 0.01).half(), down.half(), scale=0.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_rounding_is_measured_in_fp32(
    shape: tuple, dtype: torch.dtype, rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = lora(rng, *shape)
    b = a.with_tensors(up=a.up.to(dtype), down=a.down.to(dtype))
    monkeypatch.delattr(compare, "low_rank_difference_norm")  # fp64 is not needed here
    monkeypatch.delattr(compare, "_thin")
    for x, y in ((a, b), (b, a)):
        assert math.isclose(difference(x, y), relative(matrix(x), matrix(y)), rel_tol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_1e7_is_told_from_0(shape: tuple, rng: Generator) -> None:
    """Below what fp32 can tell, and where its terms cancel, fp64 decides."""
    a = lora(rng, *shape)
    wide = a.with_tensors(up=a.up.float(), down=a.down.float())
    assert difference(a, wide) == 0.0
    moved = torch.where(torch.rand(a.up.shape, generator=rng) > 0.5, 1.0, 1.0 + 1.2e-7)
    fine = wide.with_tensors(up=wide.up * moved)
    wanted = relative(matrix(a), matrix(fine))
    assert 1e-8 < wanted < 2e-7
    for x in (a, wide):
        assert math.isclose(difference(x, fine), wanted, rel_tol=1e-3)
    other = wide.with_tensors(up=wide.up * 3, down=wide.down / 3)  # the same change, other factors
    wanted = relative(matrix(wide), matrix(other))
    assert wanted < 1e-7
    assert math.isclose(difference(wide, other), wanted, rel_tol=0.01)


def test_tiny_and_broken_factors_are_left_to_fp64(rng: Generator) -> None:
    a = lora(rng, 30, 20, 4, ())
    tiny = a.with_tensors(up=a.up.float() * 1e-30, down=a.down.float() * 1e-12)
    half = tiny.with_tensors(up=tiny.up * 0.5)
    assert math.isclose(difference(tiny, half), 0.5, rel_tol=1e-6)
    assert math.isclose(difference(a, a.with_tensors(up=-a.up)), 2.0, rel_tol=1e-3)
    assert difference(a.with_tensors(scale=0.0), a.with_tensors(scale=0.0, up=-a.up)) == 0.0
    broken = a.up.detach().clone()
    broken[3, 1] = math.nan
    assert math.isnan(difference(a, a.with_tensors(up=broken)))
    same = a.with_tensors(up=broken.float())
    assert math.isnan(difference(a.with_tensors(up=broken), same))
