"""Budgets against every possible allocation."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.errors import UsageError
from peftsurgery.linalg import Budget, RankRule, allocate

VALUES = st.lists(st.floats(0, 100), min_size=1, max_size=4).map(lambda v: sorted(v, reverse=True))


def kept(spectra: list[torch.Tensor], ranks: tuple[int, ...] | list[int]) -> float:
    return sum(float(s[:k].square().sum()) for s, k in zip(spectra, ranks, strict=True))


def feasible(
    spectra: list[torch.Tensor], costs: list[int], amount: int, least: list[int]
) -> list[tuple[int, ...]]:
    choices = itertools.product(
        *(range(low, len(s) + 1) for low, s in zip(least, spectra, strict=True))
    )
    return [k for k in choices if sum(a * b for a, b in zip(k, costs, strict=True)) <= amount]


@settings(deadline=None, max_examples=120)
@given(data=st.lists(VALUES, min_size=1, max_size=4), amount=st.integers(4, 16))
def test_with_equal_costs_nothing_keeps_more(data: list[list[float]], amount: int) -> None:
    spectra = [torch.tensor(v, dtype=torch.float64) for v in data]
    ones = [1] * len(data)
    most = [len(v) for v in data]
    ranks = allocate(spectra, ones, amount, least=ones, most=most)
    assert sum(ranks) <= amount
    best = max(kept(spectra, k) for k in feasible(spectra, ones, amount, ones))
    assert kept(spectra, ranks) >= best * (1 - 1e-12)


@settings(deadline=None, max_examples=120)
@given(
    data=st.lists(st.tuples(VALUES, st.integers(1, 9)), min_size=1, max_size=4),
    extra=st.integers(0, 60),
)
def test_with_unequal_costs_at_most_one_value_is_missed(
    data: list[tuple[list[float], int]], extra: int
) -> None:
    spectra = [torch.tensor(v, dtype=torch.float64) for v, _ in data]
    costs = [c for _, c in data]
    least = [1] * len(data)
    amount = sum(costs) + extra
    most = [len(v) for v, _ in data]
    ranks = allocate(spectra, costs, amount, least=least, most=most)
    assert sum(a * b for a, b in zip(ranks, costs, strict=True)) <= amount
    best = max(kept(spectra, k) for k in feasible(spectra, costs, amount, least))
    missed = max(
        (float(s[k]) ** 2 for s, k in zip(spectra, ranks, strict=True) if k < len(s)), default=0.0
    )
    assert kept(spectra, ranks) + missed >= best * (1 - 1e-12)


def test_least_and_most_hold() -> None:
    spectra = [torch.tensor([9.0, 8, 7]), torch.tensor([1.0, 0.5, 0.1]), torch.zeros(3)]
    assert allocate(spectra, [1, 1, 1], 9, least=[1, 2, 1], most=[2, 3, 3]) == [2, 3, 1]
    with pytest.raises(UsageError, match="below the 4"):
        allocate(spectra, [1, 1, 1], 3, least=[1, 2, 1], most=[3, 3, 3])
    with pytest.raises(UsageError, match="one cost"):
        allocate(spectra, [1, 1], 3, least=[1, 2, 1], most=[3, 3, 3])


@pytest.mark.parametrize(
    ("text", "kind", "amount", "rest"),
    [
        ("size:200MB", "size", 200_000_000, ""),
        ("size:1.5GiB", "size", 3 << 29, ""),
        ("max:64,size:4096", "size", 4096, "max:64"),
        ("total-rank:77,energy:0.9,min:2", "total-rank", 77, "min:2,energy:0.9"),
    ],
)
def test_budgets_are_read(text: str, kind: str, amount: int, rest: str) -> None:
    budget, rule = Budget.split(text)
    assert budget is not None
    assert (budget.kind, budget.amount) == (kind, amount)
    assert str(rule) == rest
    assert Budget.split("16") == (None, RankRule.parse("16"))


@pytest.mark.parametrize(
    "text",
    ["size:", "size:MB", "size:-4MB", "size:0", "total-rank:x", "total-rank:0", "size:1,size:2"],
)
def test_wrong_budgets_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="rank rule"):
        Budget.split(text)
