"""Spectral methods: the core space against dense SVDs of the whole matrices in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from peftsurgery.merge_methods import METHODS, Pair, Spectral
from peftsurgery.merge_methods.base import Number
from peftsurgery.merge_methods.core_space import core_space, principal
from tests.merge_methods import dense

NAMES = [m.name for m in METHODS.values() if isinstance(m, Spectral)]
WEIGHTS = (0.6, 1.1, 0.8)


def pair(seed: int, rows: int, columns: int, rank: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, columns, generator=generator, dtype=torch.float64),
    )


def pairs_of(*shape: int, ranks: Sequence[int] = (3, 5, 2)) -> list[Pair]:
    return [pair(i, shape[0], shape[1], r) for i, r in enumerate(ranks)]


def result(
    name: str, pairs: Sequence[Pair], weights: Sequence[float] = WEIGHTS, **options: Number
) -> Tensor:
    method = METHODS[name]
    assert isinstance(method, Spectral)
    u, v = method.run(pairs, weights[: len(pairs)], method.choose(options))
    return u @ v


def polar(matrix: Tensor) -> Tensor:
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qh


@pytest.mark.parametrize("shape", [(40, 23), (6, 50), (50, 6), (1, 9)])
def test_core_space_is_exact(shape: tuple[int, int]) -> None:
    pairs = pairs_of(*shape)
    for space in (core_space(pairs), principal(core_space(pairs))):
        for (u, v), core in zip(pairs, space.cores, strict=True):
            torch.testing.assert_close(space.left @ core @ space.right, u @ v)
        eye = torch.eye(space.left.shape[1], dtype=torch.float64)
        torch.testing.assert_close(space.left.T @ space.left, eye)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(40, 23), (6, 50), (50, 6)])
def test_factorization_does_not_matter(name: str, shape: tuple[int, int]) -> None:
    pairs = pairs_of(*shape)
    turned = []
    for i, (u, v) in enumerate(pairs):
        generator = torch.Generator().manual_seed(100 + i)
        turn = torch.randn(u.shape[1], u.shape[1], generator=generator, dtype=torch.float64)
        turned.append((u @ turn, torch.linalg.solve(turn, v)))
    expected = result(name, pairs)
    # the cores of core_ties and the blocks of knots are rounded to fp32 for their elements
    torch.testing.assert_close(result(name, turned), expected, rtol=1e-4, atol=1e-4)


def test_svd_is_the_sum() -> None:
    pairs = pairs_of(30, 20)
    expected = dense.summed([u @ v for u, v in pairs], WEIGHTS)
    torch.testing.assert_close(result("svd", pairs, scale=2.0), 2 * expected)


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_tsv(keep: float) -> None:
    pairs = pairs_of(40, 23, ranks=(4, 6, 3))
    lefts, spectra, rights = [], [], []
    for w, (u, v) in zip(WEIGHTS, pairs, strict=True):
        a, s, b = torch.linalg.svd(w * (u @ v), full_matrices=False)
        k = -int(-(keep or 1 / 3) * u.shape[1] // 1)
        lefts.append(a[:, :k])
        spectra.append(s[:k])
        rights.append(b[:k])
    expected = polar(torch.cat(lefts, 1)) * torch.cat(spectra) @ polar(torch.cat(rights, 0))
    torch.testing.assert_close(result("tsv", pairs, keep=keep), expected)


def test_tsv_of_one_is_itself() -> None:
    (u, v), *_ = pairs_of(12, 9)
    torch.testing.assert_close(result("tsv", [(u, v)], [1.0]), u @ v)


def test_iso_c_flattens_the_spectrum() -> None:
    pairs = pairs_of(40, 23)
    total = dense.summed([u @ v for u, v in pairs], WEIGHTS)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    expected = u[:, :10] @ vh[:10] * s[:10].mean()
    found = result("iso_c", pairs)
    torch.testing.assert_close(found, expected)
    values = torch.linalg.svdvals(found)[:10]
    assert float(values.max() - values.min()) < 1e-10


@pytest.mark.parametrize("common", [0.4, 0.8, 1.0])
def test_iso_cts(common: float) -> None:
    pairs = pairs_of(40, 23)
    deltas = [w * (u @ v) for w, (u, v) in zip(WEIGHTS, pairs, strict=True)]
    u, s, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    k = -int(-common * 10 // 1)
    own = (10 - k) // 3
    parts = [(u[:, :k], s[:k], vh[:k])]
    for delta in deltas:
        a, b, c = torch.linalg.svd(delta - u[:, :k] @ u[:, :k].T @ delta, full_matrices=False)
        parts.append((a[:, :own], b[:own], c[:own]))
    left = polar(torch.cat([p[0] for p in parts], 1))
    right = polar(torch.cat([p[2] for p in parts], 0))
    expected = left @ right * torch.cat([p[1] for p in parts]).mean()
    torch.testing.assert_close(result("iso_cts", pairs, common=common), expected)


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_knots(density: float) -> None:
    pairs = pairs_of(30, 12)
    joined = torch.cat([u @ v for u, v in pairs], 1)
    u, s, vh = torch.linalg.svd(joined, full_matrices=False)
    blocks = [b[:, :] for b in vh[:10].split(12, 1)]
    kept = [dense.top(b, int(density * b.numel())) for b in blocks]
    expected = u[:, :10] * s[:10] @ dense.elected(kept, WEIGHTS, "total", True)
    found = result("knots", pairs, density=density)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_core_ties() -> None:
    pairs = pairs_of(30, 12)
    deltas = [u @ v for u, v in pairs]
    left = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False).U[:, :10]
    right = torch.linalg.svd(torch.cat(deltas, 0), full_matrices=False).Vh[:10]
    cores = [left.T @ d @ right.T for d in deltas]
    kept = [dense.top(c, int(0.5 * c.numel())) for c in cores]
    expected = left @ dense.elected(kept, WEIGHTS, "total", True) @ right
    found = result("core_ties", pairs, density=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_duplicates_zeros_and_high_ranks(name: str) -> None:
    u, v = pair(0, 7, 5, 9)
    for pairs in (
        [(u, v), (u, v)],
        [(u, v), (0 * u, v)],
        [(0 * u, v), (0 * u, v)],
        [(1e-9 * u, v), (1e-9 * u, v)],
    ):
        assert bool(torch.isfinite(result(name, pairs)).all())
