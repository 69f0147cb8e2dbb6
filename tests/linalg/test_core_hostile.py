"""Core SVDs where factors are ill-conditioned, deficient, tiny or huge; weighted truncations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftsurgery.errors import UsageError
from peftsurgery.linalg import RankRule, core_svd, truncation_gap, weighted_core


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(m: int, r: int, condition: float, seed: int = 1) -> Tensor:
    """(m, r) with singular values from 1 down to 1 / condition."""
    u, v = torch.linalg.qr(draw(m, r, seed=seed))[0], torch.linalg.qr(draw(r, r, seed=seed + 1))[0]
    return (u * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r).double()) @ v


@pytest.mark.parametrize("up_condition", [1e1, 1e5, 1e6, 1e9, 1e14])
@pytest.mark.parametrize("down_condition", [1e1, 1e6, 1e12])
def test_any_condition_gives_the_singular_values(
    up_condition: float, down_condition: float
) -> None:
    up = conditioned(90, 12, up_condition)
    down = conditioned(70, 12, down_condition, seed=5).T.contiguous()
    u, s, vh = (t.double() for t in core_svd(up, down))
    wanted = torch.linalg.svdvals(up @ down)[:12]
    assert float((s - wanted).abs().max()) <= 1e-6 * float(wanted[0])
    for q in (u, vh.T):
        assert float((q.T @ q - torch.eye(12, dtype=torch.float64)).abs().max()) < 1e-5
    assert float(((u * s) @ vh - up @ down).norm()) <= 2e-6 * float(wanted[0])


@pytest.mark.parametrize("up_condition", [1e1, 1e3, 1e6, 1e14])
@pytest.mark.parametrize("down_condition", [1e1, 1e6, 1e12])
@pytest.mark.parametrize("cancelling", [0.0, 1e-3, 1e-6])
def test_the_kept_part_is_that_of_the_whole(
    up_condition: float, down_condition: float, cancelling: float
) -> None:
    up = conditioned(90, 12, up_condition)
    down = conditioned(70, 12, down_condition, seed=5).T.contiguous()
    if cancelling:  # up₁ down₁ - up₁ (down₁ + little)
        small = draw(90, 12, seed=9) * cancelling * float(up.norm()) / 30
        up, down = torch.cat([up, small - up], 1), torch.cat([down, down])
    u, s, vh = (t.double() for t in core_svd(up, down, RankRule.parse("ratio:30")))
    whole = torch.linalg.svd(up @ down, full_matrices=False)
    k = s.numel()
    assert k == RankRule.parse("ratio:30").choose(whole.S)
    assert float(((s - whole.S[:k]) / whole.S[:k]).abs().max()) < 1e-5
    for q in (u, vh.T):
        assert float((q.T @ q - torch.eye(k, dtype=torch.float64)).abs().max()) < 1e-5
    best = float(whole.S[k:].square().sum()) ** 0.5
    error = float(((u * s) @ vh - up @ down).norm())
    assert error <= best + 5e-6 * float(whole.S[0])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-7, 1e10, 1e18])
def test_scales_do_not_matter(scale: float) -> None:
    up, down = (draw(40, 6) * scale).float(), draw(6, 30, seed=3).float()
    s = core_svd(up, down)[1].double()
    wanted = torch.linalg.svdvals(up.double() @ down.double())[:6]
    assert float(((s - wanted) / wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["zero", "dead", "twin", "row", "column", "wide"])
def test_deficient_factors(kind: str) -> None:
    up, down = draw(30, 8), draw(8, 20, seed=2)
    if kind == "zero":
        up = up * 0
    elif kind == "dead":
        up[:, 3:6] = 0
    elif kind == "twin":
        up[:, 4:], down[2] = up[:, :4], down[3]
    elif kind == "row":
        up = up[:1]
    elif kind == "column":
        down = down[:, :1]
    else:
        up, down = draw(5, 40), draw(40, 7, seed=2)
    dense = up @ down
    u, s, vh = (t.double() for t in core_svd(up.float(), down.float()))
    top = max(float(torch.linalg.matrix_norm(dense, 2)), 1.0)
    assert float(((u * s) @ vh - dense).norm()) <= 2e-6 * top
    assert len(s) == min(up.shape[0], up.shape[1], down.shape[1])
    assert bool(torch.isfinite(u).all() & torch.isfinite(vh).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["up", "down"])
def test_nan_and_inf_are_named(side: str, bad: float) -> None:
    factors = {"up": draw(9, 3), "down": draw(3, 7)}
    factors[side][1, 2] = bad
    with pytest.raises(UsageError, match=rf"{side}: 1 of \d+ values are NaN or Inf"):
        core_svd(factors["up"], factors["down"])


def test_large_finite_values_are_not_taken_for_inf() -> None:
    up = torch.full((50, 1), 3e38)
    assert float(core_svd(up, torch.full((1, 4), 1e-38))[1][0]) == pytest.approx(
        3 * 200**0.5, rel=1e-5
    )


# weighted ---------------------------------------------------------------------------------------


def gram_of(n: int, samples: int, seed: int = 9) -> Tensor:
    x = draw(samples, n, seed=seed) * torch.logspace(0, -2, n).double()
    return x.T @ x


@pytest.mark.parametrize("shape", [(40, 9, 24), (6, 9, 30), (30, 12, 5), (1, 3, 8)])
@pytest.mark.parametrize("kind", ["full", "singular", "diagonal"])
@pytest.mark.parametrize("k", [1, 3])
def test_weighted_truncation_is_optimal(shape: tuple[int, int, int], kind: str, k: int) -> None:
    o, r, n = shape
    up, down = draw(o, r), draw(r, n, seed=2)
    gram = gram_of(n, 3 if kind == "singular" else 4 * n)
    given = gram.diagonal() if kind == "diagonal" else gram
    full = torch.diag(given) if kind == "diagonal" else gram
    left, right, s = weighted_core(up.float(), down.float(), given, RankRule.parse(k))
    values, vectors = torch.linalg.eigh(full)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    spectrum = torch.linalg.svdvals(up @ down @ root)
    count = min(len(s), len(spectrum))
    assert float((s[:count] - spectrum[:count]).abs().max()) <= 1e-5 * float(spectrum[0])
    error = float(((up @ down - left.double() @ right.double()) @ root).norm())
    wanted = float(spectrum[left.shape[1] :].square().sum().sqrt())
    assert error == pytest.approx(wanted, abs=3e-6 * float(spectrum.norm()))
    assert left.shape == (o, min(k, o, r)) or kind == "singular"


@pytest.mark.parametrize(
    ("gram", "match"),
    [
        (torch.ones(4), r"\(5, 5\) or its diagonal"),
        (-torch.eye(5), "negative eigenvalues"),
        (torch.full((5,), float("nan")), "gram: 5 of 5"),
    ],
)
def test_wrong_gram_matrices(gram: Tensor, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        weighted_core(draw(6, 2), draw(2, 5), gram)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05, 0.5])
def test_truncation_gap(size: float) -> None:
    up, down = draw(50, 8), draw(8, 30, seed=1)
    x, y = up[:, :5] * (1 + size), down[:5]
    if size < 0.1:
        x, y = up * (1 + size), down
    square = float((up @ down).square().sum())
    wanted = float((up @ down - x @ y).norm())
    assert truncation_gap(square, up, down, x, y) == pytest.approx(wanted, abs=1e-5 * square**0.5)
