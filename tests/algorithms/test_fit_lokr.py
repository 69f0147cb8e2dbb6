"""ΔW to LoKr: the nearest product whatever the source, kernels, ranks, choice of the cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftsurgery.algorithms import Full, LoHa, LoKr, LoRA, Replace, WeightAdapter
from peftsurgery.errors import CannotFit, UsageError
from tests.linalg.test_kronecker import optimum

torch.set_num_threads(1)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def sources(random: torch.Generator) -> dict[str, WeightAdapter]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    up, down = normal(24, 3, 1, 1), normal(3, 10, 3, 3)
    return {
        "lora": LoRA(normal(24, 3), normal(3, 35), scale=0.5, bias=normal(24)),
        "conv": LoRA(up, down, scale=2.0),
        "loha": LoHa(normal(24, 2), normal(2, 30), normal(24, 2), normal(2, 30)),
        "full": Full(normal(24, 15, 3)),
    }


@pytest.mark.parametrize("kind", ["lora", "conv", "loha", "full"])
@pytest.mark.parametrize("factor", [-1, 3, 4])
def test_nearest_product(kind: str, factor: int, rng: torch.Generator) -> None:
    source = sources(rng)[kind]
    delta = source.delta()
    fitted = LoKr.fit(source, factor=factor)
    assert fitted.shape == source.shape
    a, c = fitted.tensors()["w1"].shape
    best = optimum(delta.reshape(24, -1), a, c)
    assert relative(fitted.delta(), delta) == pytest.approx(best, abs=5e-4)
    if source.bias is not None:
        assert fitted.bias is not None
        assert torch.equal(fitted.bias, source.bias)


def test_a_lokr_comes_back_through_its_delta(rng: torch.Generator) -> None:
    first = torch.randn(4, 3, generator=rng)
    second = torch.randn(6, 5, 3, 3, generator=rng)
    exact = LoKr(first, w2=second, scale=0.7)
    assert LoKr.fit(exact) is exact
    again = LoKr.fit(exact.delta(), factor=4)
    assert again.shape == (24, 15, 3, 3)
    assert again.tensors()["w1"].shape == (4, 3)  # 15 is no multiple of 4: the nearest below
    assert relative(again.delta(), exact.delta()) < 1e-6


def test_rank_truncates_the_second_factor_at_best(rng: torch.Generator) -> None:
    delta = torch.randn(32, 48, 3, 3, generator=rng)
    whole = LoKr.fit(delta)
    low = LoKr.fit(delta, 2)
    assert low.rank == 2
    assert low.shape == whole.shape == (32, 48, 3, 3)
    second = whole.tensors()["w2"].flatten(1).double()
    tail = float(torch.linalg.svdvals(second)[2:].norm() / second.norm())
    assert relative(low.delta(), whole.delta()) == pytest.approx(tail, rel=1e-3)
    assert LoKr.fit(delta, 4).rank is None  # half of w2's longer side: kept whole
    assert LoKr.fit(delta, "energy:0.2").rank is not None


def test_the_most_exact_cut_is_chosen_within_the_size_of_the_source(
    rng: torch.Generator,
) -> None:
    source = LoRA(torch.randn(24, 2, generator=rng), torch.randn(2, 36, generator=rng))
    best = LoKr.fit(source, factor=None)
    assert best.numel <= max(source.numel, LoKr.fit(source).numel)
    ours, usual = (relative(x.delta(), source.delta()) for x in (best, LoKr.fit(source)))
    assert ours <= usual + 1e-3


def test_dtype_weight_and_refusals(rng: torch.Generator) -> None:
    delta = torch.randn(12, 20, generator=rng)
    fitted = LoKr.fit(delta, dtype=torch.bfloat16)
    assert {t.dtype for t in fitted.tensors().values()} == {torch.bfloat16}
    base = torch.randn(12, 20, generator=rng)
    value = Replace(base + delta)
    assert relative(LoKr.fit(value, weight=base).delta(), LoKr.fit(delta).delta()) < 1e-2
    with pytest.raises(UsageError, match="depends on the weight"):
        LoKr.fit(value)
    with pytest.raises(CannotFit):
        LoKr.fit(torch.randn(7))
    delta[3, 4] = float("nan")
    with pytest.raises(UsageError, match=r"Full\.diff: NaN"):
        LoKr.fit(Full(delta))
    with pytest.raises(UsageError, match="NaN"):
        LoKr.fit(delta)


def test_full_fit_is_exact(rng: torch.Generator) -> None:
    source = sources(rng)["conv"]
    assert torch.equal(Full.fit(source).delta(), source.delta())
    assert Full.fit(torch.ones(3, 2), dtype=torch.float16).tensors()["diff"].dtype == torch.float16
