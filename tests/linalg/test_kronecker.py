"""Nearest Kronecker products against the SVD of the rearranged matrix in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftsurgery.errors import UsageError
from peftsurgery.linalg.kronecker import (
    Kronecker,
    kronecker_choices,
    nearest_kronecker,
    splits,
)
from peftsurgery.linalg.randomized import DenseTiles

torch.set_num_threads(1)


def optimum(matrix: Tensor, a: int, c: int) -> float:
    """The relative error of the nearest product, by Van Loan's rearrangement."""
    rows, columns = matrix.shape
    turned = matrix.double().reshape(a, rows // a, c, columns // c).transpose(1, 2)
    values = torch.linalg.svdvals(turned.reshape(a * c, -1))
    return float(values[1:].norm() / values.norm())


def distance(matrix: Tensor, found: Kronecker) -> float:
    product = torch.kron(found.first.double(), found.second.double())
    return float((matrix.double() - product).norm() / matrix.double().norm())


@pytest.mark.parametrize(
    ("rows", "columns", "a", "c"),
    [
        (36, 60, 6, 5),
        (36, 60, 1, 12),
        (36, 60, 18, 1),
        (48, 35, 8, 7),
        (7, 11, 7, 11),
        (5, 9, 1, 1),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 100])
def test_dense_and_factors_reach_the_optimum(
    rows: int, columns: int, a: int, c: int, step: int, rng: torch.Generator
) -> None:
    up = torch.randn(rows, 5, generator=rng)
    down = torch.randn(5, columns, generator=rng)
    matrix = up @ down
    best = optimum(matrix, a, c)
    for source in (DenseTiles(matrix, step), (up, down)):
        found = nearest_kronecker(source, a, c)
        assert found.first.shape == (a, c)
        assert found.second.shape == (rows // a, columns // c)
        assert distance(matrix, found) <= best + 2e-4
        assert found.error**2 == pytest.approx(distance(matrix, found) ** 2, abs=1e-6)
        assert found.total == pytest.approx(float(matrix.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e12])
def test_a_kronecker_product_comes_back(scale: float, rng: torch.Generator) -> None:
    first = torch.randn(6, 4, generator=rng)
    second = torch.randn(5, 9, generator=rng) * scale
    matrix = torch.kron(first, second)
    assert distance(matrix, nearest_kronecker(DenseTiles(matrix, 8), 6, 4)) < 1e-6


def test_choices_are_all_splits_with_their_errors(rng: torch.Generator) -> None:
    up = torch.randn(12, 2, generator=rng)
    down = torch.randn(2, 18, generator=rng)
    matrix = up @ down
    found = kronecker_choices((up, down), unit=3)
    assert {(s.a, s.c) for s in found} == set(splits(12, 18, 3))
    assert len(found) == 6 * 4
    assert all(s.c in (1, 2, 3, 6) for s in found)
    for split in found:
        assert split.error == pytest.approx(optimum(matrix, split.a, split.c), abs=1e-3)
        assert split.parameters == split.a * split.c + (12 // split.a) * (18 // split.c)
    assert [s.error for s in found] == sorted(s.error for s in found)
    few = kronecker_choices((up, down), parameters=40, most=3)
    assert len(few) == 3
    assert all(s.parameters <= 40 for s in few)
    assert kronecker_choices((up, down), parameters=5) == []


def test_hostile(rng: torch.Generator) -> None:
    zero = nearest_kronecker(DenseTiles(torch.zeros(6, 8)), 2, 4)
    assert zero.error == 0
    assert float(zero.first.abs().max()) == float(zero.second.abs().max()) == 0
    bad = torch.ones(6, 8)
    bad[2, 2] = math.nan
    with pytest.raises(UsageError, match="NaN"):
        nearest_kronecker(DenseTiles(bad), 2, 4)
    with pytest.raises(UsageError, match="no 4x2 Kronecker factor"):
        nearest_kronecker(DenseTiles(torch.ones(6, 8)), 4, 2)
