"""LoRA.fit: exact without a rank, optimal with one, from every algorithm."""

import math

import pytest
import torch
from torch import Generator

from peftsurgery.algorithms import Full, LoRA, Replace, difference
from peftsurgery.errors import CannotFit, UsageError
from peftsurgery.linalg import RankRule
from tests.algorithms.cases import ALL, IDS, LAYERS, Case, close, draw

MATRICES = [pair for pair in ALL if pair[1] != "norm"]
every = pytest.mark.parametrize(
    ("case", "layer"), MATRICES, ids=[n for n in IDS if not n.endswith("norm")]
)


@every
def test_exact(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32).with_tensors(bias=draw(rng, shape[0]))
    fitted = LoRA.fit(adapter)
    close(fitted.delta(), adapter.delta(), 2e-6)
    assert fitted.shape == shape
    assert fitted.bias is adapter.bias
    factors = adapter.factors()
    assert fitted.rank == (factors[1].shape[0] if factors else min(adapter.matrix_shape))
    half = LoRA.fit(adapter, dtype=torch.float16)
    assert half.up.dtype == half.down.dtype == torch.float16
    close(half.delta(), adapter.delta(), 2e-3)


@every
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_truncation_error_is_the_tail(case: Case, layer: str, rank: int, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32)
    dense = adapter.delta().double().reshape(shape[0], -1)
    s = torch.linalg.svdvals(dense)
    wanted = float(s[rank:].norm() / s.norm())
    fitted = LoRA.fit(adapter, rank)
    error = float((fitted.delta().double().reshape(dense.shape) - dense).norm() / dense.norm())
    assert math.isclose(error, wanted, rel_tol=1e-4, abs_tol=2e-6)
    assert fitted.shape == shape
    if rank < len(s):
        assert fitted.rank == rank
    rows = fitted.up.flatten(1).norm(dim=0)
    close(rows, fitted.down.flatten(1).norm(dim=1), 1e-4)  # √S on both sides
    dense_fit = LoRA.fit(adapter.delta(), rank)
    assert dense_fit.shape == shape
    assert difference(dense_fit, fitted) < 1e-4 + (0 if wanted < 1e-6 else 1e-3)


def test_a_plain_lora_comes_back_as_it_is(rng: Generator) -> None:
    adapter = LoRA(draw(rng, 6, 2).half(), draw(rng, 2, 5).half(), scale=0.3)
    assert LoRA.fit(adapter) is adapter
    wide = LoRA.fit(adapter, dtype=torch.float32)
    assert float(wide.scale) == float(adapter.scale)
    assert difference(wide, adapter) == 0.0
    kernel = LoRA.fit(LoRA(draw(rng, 6, 2), draw(rng, 2, 18)), weight=draw(rng, 6, 2, 3, 3))
    assert kernel.down.shape == (2, 2, 3, 3)
    assert kernel.up.shape == (6, 2, 1, 1)


def test_rules(rng: Generator) -> None:
    q1, q2 = (torch.linalg.qr(draw(rng, 20, 4)).Q for _ in range(2))
    s = torch.tensor([8.0, 4.0, 2.0, 1.0])
    adapter = LoRA(q1 * s, q2.T.contiguous())
    for rule, rank in (("2", 2), ("ratio:4.1", 3), ("energy:0.9", 2), ("max:2,ratio:100", 2)):
        assert LoRA.fit(adapter, rule).rank == rank
        assert LoRA.fit(adapter.delta(), RankRule.parse(rule)).rank == rank


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_and_replacement_need_the_weight(axis: str, rng: Generator) -> None:
    weight = draw(rng, 8, 6, 3, 3)
    magnitude = torch.rand(8 if axis == "out" else 6, generator=rng)
    dora = LoRA(draw(rng, 8, 2), draw(rng, 2, 6, 3, 3)).with_tensors(
        magnitude=magnitude, magnitude_axis=axis
    )
    value = Replace(draw(rng, 8, 6, 3, 3), bias=draw(rng, 8))
    for adapter in (dora, value):
        fitted = LoRA.fit(adapter, weight=weight)
        assert fitted.magnitude is None
        assert fitted.shape == weight.shape
        close(fitted.merged(weight)[0], adapter.merged(weight)[0], 2e-6)
        assert LoRA.fit(adapter, 2, weight).rank == 2
        with pytest.raises(UsageError, match="depends on the weight"):
            LoRA.fit(adapter)
    fitted = LoRA.fit(value, weight=weight)
    assert fitted.bias is value.bias
    assert fitted.bias_is_value


def test_padding_is_carried(rng: Generator) -> None:
    adapter = Full(draw(rng, 6, 8), padded_shape=(6, 8))
    weight = draw(rng, 6, 5)
    fitted = LoRA.fit(adapter, weight=weight)
    close(fitted.merged(weight)[0], adapter.merged(weight)[0])


def test_numerically_low_rank_differences_are_found_low_rank(rng: Generator) -> None:
    product = draw(rng, 30, 3).double() @ draw(rng, 3, 20).double()
    assert LoRA.fit(product).rank == 3
    assert LoRA.fit(Full(product)).rank in (3, 20)  # the tile of a Full is rounded to fp32
    assert LoRA.fit(torch.zeros(5, 4)).rank == 1


def test_refusals(rng: Generator) -> None:
    with pytest.raises(CannotFit, match="full difference"):
        LoRA.fit(Full(draw(rng, 7)))
    with pytest.raises(CannotFit, match="full difference"):
        LoRA.fit(Full(bias=draw(rng, 7)))
    bad = draw(rng, 7, 2)
    bad[1, 1] = math.inf
    with pytest.raises(UsageError, match=r"LoRA\.up"):
        LoRA.fit(LoRA(bad, draw(rng, 2, 5)), 1)
    with pytest.raises(UsageError, match="NaN or Inf"):
        LoRA.fit(bad)
    with pytest.raises(UsageError, match="does not fit"):
        LoRA.fit(LoRA(draw(rng, 7, 2), draw(rng, 2, 5)), weight=draw(rng, 5, 7))
