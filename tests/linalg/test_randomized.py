"""Randomized SVD from row tiles against the dense one in fp64: error, exact accounting, hostile
matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from peftsurgery.errors import UsageError
from peftsurgery.linalg import randomized
from peftsurgery.linalg.randomized import DenseTiles, Truncated, randomized_svd

torch.set_num_threads(1)
SPECTRA = {
    "flat": lambda j: torch.ones_like(j),
    "slow": lambda j: j**-0.3,
    "1/j": lambda j: 1 / j,
    "1/j²": lambda j: j**-2.0,
    "exponential": lambda j: torch.exp(-j / 15),
    "step": lambda j: torch.where(j <= 30, 1.0, 0.2),
    "exponential, slow": lambda j: torch.exp(-j / 90),
    "exact low rank": lambda j: torch.where(j <= 13, 1 / j, 0.0),
}


@pytest.fixture(params=[False, True], ids=["fp32", "bf16 first"], autouse=True)
def _first_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that cannot multiply bfloat16, and as on one that can."""
    monkeypatch.setattr(randomized, "multiplies_bfloat16", lambda: request.param)


def with_spectrum(spectrum: Tensor, rows: int, columns: int, random: torch.Generator) -> Tensor:
    k = spectrum.numel()
    left = torch.linalg.qr(torch.randn(rows, k, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, k, generator=random, dtype=torch.float64)).Q
    return (left * spectrum) @ right.T


def residual(matrix: Tensor, found: Truncated) -> float:
    product = (found.u.double() * found.s.double()) @ found.vh.double()
    return float(torch.linalg.matrix_norm(matrix.double() - product))


def noisy(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """What bf16 makes of a fine-tune: a low rank, noise, and the rounding of both."""
    base = (torch.randn(rows, columns, generator=random) * 0.02).bfloat16()
    up, down = (torch.randn(n, 40, generator=random) for n in (rows, columns))
    moved = 1e-4 * up @ down.T + 2e-4 * torch.randn(rows, columns, generator=random)
    return (base.float() + moved).bfloat16().float() - base.float()


@pytest.mark.parametrize("kind", [*SPECTRA, "gaussian", "bf16"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(300, 211, 8), (190, 420, 24), (611, 700, 48), (500, 333, 1)]
)
def test_error_at_a_fixed_rank_is_near_the_optimum_and_within_the_bound(
    kind: str, rows: int, columns: int, rank: int, rng: torch.Generator
) -> None:
    if kind == "gaussian":
        matrix = torch.randn(rows, columns, generator=rng)
    elif kind == "bf16":
        matrix = noisy(rows, columns, rng)
    else:
        spectrum = SPECTRA[kind](torch.arange(1, min(rows, columns) + 1, dtype=torch.float64))
        matrix = with_spectrum(spectrum, rows, columns, rng).float()
    seed = int(torch.randint(1 << 30, (), generator=rng))
    found = randomized_svd(DenseTiles(matrix, 37), rank, dense=False, seed=seed)
    size = float(matrix.double().norm())
    optimum = float(torch.linalg.svdvals(matrix.double())[rank:].norm())
    rounding = 5e-6 * size  # of the least singular directions: fp32 eps times σ_1 / σ_k and a few
    assert found.s.numel() == rank
    assert residual(matrix, found) <= 1.005 * optimum + rounding
    assert residual(matrix, found) <= found.bound * optimum + rounding
    assert found.bound <= 1.005 or optimum < 1e-4 * size
    claimed = found.error * size
    assert claimed == pytest.approx(residual(matrix, found), rel=1e-3, abs=1e-3 * size)
    assert found.total == pytest.approx(float(matrix.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("rank", ["energy:0.4", "90", "max:70"])
def test_equal_singular_values_are_all_found(rank: str, rng: torch.Generator) -> None:
    """A Krylov space holds as many vectors of one eigenvalue as it began with."""
    spectrum = torch.where(torch.arange(400) < 80, 1.0, 0.05)
    matrix = with_spectrum(spectrum, 400, 500, rng).float()
    found = randomized_svd(DenseTiles(matrix), rank, dense=False)
    optimum = float(spectrum[found.s.numel() :].double().norm())
    assert residual(matrix, found) <= 1.005 * optimum
    if rank.startswith("energy"):
        share = 0.4 * float(spectrum.square().sum())
        assert found.s.numel() in (math.ceil(share), math.ceil(share) + 1)


@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (600, 600)])
def test_the_gram_matrix_gives_the_dense_svd(shape: tuple[int, int], rng: torch.Generator) -> None:
    spectrum = 10.0 ** -torch.linspace(0, 6, 300, dtype=torch.float64)
    matrix = with_spectrum(spectrum, *shape, rng).float()
    found = randomized_svd(DenseTiles(matrix, 41), "cumulative:0.999")
    exact = torch.linalg.svdvals(matrix.double())
    k = found.s.numel()
    assert k == int((exact.cumsum(0) < 0.999 * exact.sum()).sum()) + 1
    torch.testing.assert_close(found.s.double(), exact[:k], rtol=1e-4, atol=1e-6)
    assert residual(matrix, found) <= 1.0001 * float(exact[k:].norm()) + 1e-6
    eye = torch.eye(k)
    torch.testing.assert_close(found.u.T @ found.u, eye, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.vh @ found.vh.T, eye, rtol=0, atol=2e-3)
    assert found.bound == 1


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["slow", "1/j", "exponential"])
def test_energy_target_is_met_with_nearly_the_smallest_rank(
    kind: str, share: float, rng: torch.Generator
) -> None:
    spectrum = SPECTRA[kind](torch.arange(1, 321, dtype=torch.float64))
    matrix = with_spectrum(spectrum, 400, 320, rng).float()
    found = randomized_svd(DenseTiles(matrix, 64), f"energy:{share}")
    sums = spectrum.square().cumsum(0) / spectrum.square().sum()
    least = int((sums < share).sum()) + 1
    kept = 1 - residual(matrix, found) ** 2 / found.total
    assert kept >= share - 1e-5
    assert found.energy == pytest.approx(kept, abs=1e-5)
    assert least <= found.s.numel() <= least + 1 + least // 20


def test_a_cap_bounds_the_rank_and_the_energy_kept_is_still_exact(
    rng: torch.Generator,
) -> None:
    matrix = torch.randn(260, 330, generator=rng)
    found = randomized_svd(DenseTiles(matrix), "max:11,energy:0.999", dense=False)
    assert found.s.numel() == 11
    assert found.energy == pytest.approx(1 - residual(matrix, found) ** 2 / found.total, abs=1e-5)


def test_a_low_rank_matrix_comes_back_whole(rng: torch.Generator) -> None:
    up = torch.randn(250, 6, generator=rng)
    down = torch.randn(6, 400, generator=rng)
    for scale in (1.0, 1e-18, 1e15):
        matrix = scale * up @ down
        found = randomized_svd(DenseTiles(matrix), "energy:1", dense=None)
        assert residual(matrix, found) <= 2e-6 * float(matrix.double().norm())
        exact = torch.linalg.svdvals(matrix.double())[:6]
        torch.testing.assert_close(found.s[:6].double(), exact, rtol=1e-5, atol=0)
        fixed = randomized_svd(DenseTiles(matrix), 6, dense=False)
        assert residual(matrix, fixed) <= 2e-6 * float(matrix.double().norm())


@pytest.mark.parametrize("dense", [False, None])
def test_odd_matrices(dense: bool | None, rng: torch.Generator) -> None:
    zero = randomized_svd(DenseTiles(torch.zeros(130, 140)), 4, dense=dense)
    assert zero.energy == 1
    assert zero.error == 0
    assert float(zero.s.abs().max()) == 0
    assert bool(torch.isfinite(zero.u).all() & torch.isfinite(zero.vh).all())
    for shape in ((1, 200), (200, 1), (1, 1), (3, 150)):
        matrix = torch.randn(shape, generator=rng)
        found = randomized_svd(DenseTiles(matrix), 64, dense=dense)
        assert found.s.numel() == min(shape)
        assert residual(matrix, found) <= 1e-5 * float(matrix.norm())
    small = (torch.randn(150, 140, generator=rng) * 1e-7).half()
    found = randomized_svd(DenseTiles(small), 140, dense=dense)
    assert residual(small, found) <= 1e-5 * float(small.double().norm())
    twice = torch.randn(100, 160, generator=rng).repeat(2, 1)
    found = randomized_svd(DenseTiles(twice), 100, dense=dense)
    assert residual(twice, found) <= 1e-5 * float(twice.double().norm())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dense", [False, True])
def test_nan_is_named(value: float, dense: bool) -> None:
    matrix = torch.ones(120, 110)
    matrix[77, 5] = value
    with pytest.raises(UsageError, match="1 values are NaN or Inf, first in row 77"):
        randomized_svd(DenseTiles(matrix, 32), 3, dense=dense)


def test_same_seed_same_result(rng: torch.Generator) -> None:
    matrix = torch.randn(150, 170, generator=rng)
    runs = [randomized_svd(DenseTiles(matrix), 5, seed=s, dense=False) for s in (3, 3, 4)]
    assert torch.equal(runs[0].u, runs[1].u)
    assert not torch.equal(runs[0].u, runs[2].u)


@dataclass
class Counted:
    """Row tiles that count how often they are read."""

    matrix: Tensor
    readings: int = 0

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def tiles(self, into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        self.readings += 1
        yield from DenseTiles(self.matrix, step=20).tiles(into)


def test_few_readings_and_none_after_the_cap_is_reached(rng: torch.Generator) -> None:
    source = Counted(torch.randn(400, 300, generator=rng))
    randomized_svd(source, "max:16,energy:0.999")
    assert source.readings <= 8


@pytest.mark.parametrize("rank", ["11", "energy:0.5", "max:20,energy:0.9"])
def test_a_matrix_is_read_once_and_the_result_is_that_of_one_in_memory(
    rank: str, rng: torch.Generator
) -> None:
    source = Counted(noisy(260, 410, rng))
    found = randomized_svd(source, rank, dense=False)
    assert source.readings == 1
    again = randomized_svd(DenseTiles(source.matrix, 20), rank, dense=False)
    assert found.s.numel() == again.s.numel()
    torch.testing.assert_close(found.s, again.s, rtol=1e-4, atol=0)
    assert residual(source.matrix, found) == pytest.approx(residual(source.matrix, again), rel=1e-4)


def test_a_matrix_too_large_to_keep_is_read_for_every_block(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftsurgery.linalg.randomized.HELD", 1000)
    source = Counted(torch.randn(300, 400, generator=rng))
    found = randomized_svd(source, 9, dense=False)
    optimum = float(torch.linalg.svdvals(source.matrix.double())[9:].norm())
    assert 4 <= source.readings <= 10
    assert residual(source.matrix, found) <= 1.005 * optimum
