"""Rank rules against their definitions, written out by brute force, and against sd-scripts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.errors import UsageError
from peftsurgery.linalg import RankRule, kohya_rank, noise_floor

SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12).map(
    lambda values: sorted(values, reverse=True)
)


def meets(name: str, p: float, s: list[float], k: int) -> bool:
    kept, squares = math.fsum(s[:k]), math.fsum(v * v for v in s[:k])
    slack = 1 - 1e-9
    if name == "energy":
        return squares >= p * math.fsum(v * v for v in s) * slack
    if name == "fro":
        return math.sqrt(squares) >= p * math.sqrt(math.fsum(v * v for v in s)) * slack
    if name == "cumulative":
        return kept >= p * math.fsum(s) * slack
    return k == len(s) or s[k] < s[0] / p * (1 + 1e-9)


@settings(deadline=None, max_examples=150)
@given(s=SPECTRA, name=st.sampled_from(["energy", "fro", "cumulative"]), p=st.floats(0.01, 1))
def test_the_smallest_rank_that_meets_a_share(s: list[float], name: str, p: float) -> None:
    k = RankRule.parse(f"{name}:{p!r}").choose(s)
    assert meets(name, p, s, k)
    tight = [j for j in range(1, k) if meets(name, p * (1 + 1e-6), s, j)]
    assert not tight


@settings(deadline=None, max_examples=100)
@given(s=SPECTRA, p=st.floats(1.01, 1e6))
def test_ratio_keeps_what_is_not_too_small(s: list[float], p: float) -> None:
    k = RankRule.parse(f"ratio:{p!r}").choose(s)
    assert meets("ratio", p, s, k)
    assert s[k - 1] >= s[0] / p * (1 - 1e-9)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("3", 3),
        ("16", 6),
        ("min:4,ratio:2", 4),
        ("min:9,ratio:2", 6),
        ("max:2,energy:1", 2),
        ("max:5,min:3,1", 3),
        ("max:4", 4),
        ("energy:0.5,4", 4),
    ],
)
def test_bounds(rule: str, wanted: int) -> None:
    assert RankRule.parse(rule).choose([32.0, 16, 8, 4, 2, 1]) == wanted
    assert str(RankRule.parse(str(RankRule.parse(rule)))) == str(RankRule.parse(rule))


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ("min:5,max:4", "min:5 is above max:4"),
        ("min:0", "at least 1"),
        ("noise:2", "unknown rule 'noise'"),
        ("size:200MB", "resize-rank only"),
        ("ratio:0.9", "p > 1"),
        ("energy:nan", "0 < p <= 1"),
        ("energy:1.1", "0 < p <= 1"),
        ("", "whole number"),
        ("16,,", "whole number"),
        ("1" * 400, "whole number"),
        ("-3", "whole number"),
    ],
)
def test_wrong_rules_are_named(rule: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        RankRule.parse(rule)


@pytest.mark.parametrize("rule", ["4", "energy:0.9", "noise", "ratio:10", "cumulative:0.5"])
def test_spectra_that_are_none(rule: str) -> None:
    parsed = RankRule.parse(rule)
    for bad in ([], [math.nan, 1.0], [math.inf]):
        with pytest.raises(UsageError, match=r"empty|NaN or Inf"):
            parsed.choose(bad, (8, 8))
    assert parsed.choose([0.0] * 6, (8, 8)) in (1, 4)  # 4: asked for as a number


# the noise floor -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 300), (400, 120), (90, 500)])
@pytest.mark.parametrize("level", [1e-6, 1.0])
def test_noise_finds_the_signal_of_a_noisy_matrix(shape: tuple[int, int], level: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    o, n = shape
    noise = torch.randn(o, n, generator=generator, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(o, 5, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, 5, generator=generator, dtype=torch.float64))[0]
    signal = 4 * (math.sqrt(o) + math.sqrt(n)) * (u @ v.T)
    s = torch.linalg.svdvals(level * (signal + noise))
    assert RankRule.parse("noise").choose(s, shape) == 5
    assert RankRule.parse("noise,min:7").choose(s, shape) == 7
    edge = level * (math.sqrt(o) + math.sqrt(n))  # of the Marchenko-Pastur law
    assert edge < noise_floor(s, shape) < 2 * edge


def test_noise_of_a_lora_on_a_frame() -> None:
    """up = signal + noise on the rows of an orthogonal down: the values are those of up."""
    generator = torch.Generator().manual_seed(4)
    o, r, n = 500, 32, 400
    up = torch.randn(o, r, generator=generator, dtype=torch.float64)
    up[:, :3] += 60 * torch.linalg.qr(torch.randn(o, 3, generator=generator).double())[0]
    frame = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0].T
    s = torch.linalg.svdvals(up @ frame)[:r]
    assert RankRule.parse("noise").choose(s, (o, n)) == 3


def test_noise_needs_the_shape() -> None:
    with pytest.raises(UsageError, match="needs the shape"):
        RankRule.parse("noise").choose([2.0, 1.0])


# sd-scripts --------------------------------------------------------------------------------------


def sd_scripts(method: str, p: float, s: torch.Tensor, cap: int) -> int:
    """`rank_resize` of resize_lora.py (releases with the index one too high), on a dense S."""
    if method == "ratio":
        index = int(torch.sum(s > s[0] / p).item())
    elif method == "cumulative":
        index = int(torch.searchsorted(torch.cumsum(s, 0) / s.sum(), p)) + 1
    else:
        squares = s.pow(2)
        index = int(torch.searchsorted(torch.cumsum(squares, 0) / squares.sum(), p**2)) + 1
    index = max(1, min(index, len(s) - 1))
    rank = index + 1
    if s[0] <= 1e-6:
        rank = 1
    elif rank > cap:
        rank = cap
    return rank


@pytest.mark.parametrize(
    ("method", "p"), [("ratio", 3.3), ("ratio", 50.5), ("cumulative", 0.63), ("fro", 0.87)]
)
@pytest.mark.parametrize("shape", [(40, 24), (6, 30), (2, 9)])
def test_kohya_ranks_are_those_of_sd_scripts(method: str, p: float, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    for r, cap in itertools.product((1, 5, 12), (2, 100)):
        up = torch.randn(shape[0], r, generator=generator, dtype=torch.float64)
        down = torch.randn(r, shape[1], generator=generator, dtype=torch.float64)
        dense = torch.linalg.svdvals(up @ down)
        own = dense[: min(r, *shape)]
        rule = RankRule.parse(f"{method}:{p},max:{cap}")
        wanted = sd_scripts(method, p, dense, cap)
        assert kohya_rank(rule, own, shape) == min(wanted, len(own))


def test_kohya_takes_one_more_and_one_for_nothing() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 0.5])
    assert RankRule.parse("ratio:2.5").choose(s) == 2
    assert kohya_rank(RankRule.parse("ratio:2.5"), s, (9, 9)) == 3
    assert kohya_rank(RankRule.parse("fro:0.9"), s * 1e-7, (9, 9)) == 1
    for rule in ("energy:0.9", "noise", "min:2,fro:0.9", "fro:0.9,ratio:2", "max:3"):
        with pytest.raises(UsageError, match="kohya-compat"):
            kohya_rank(RankRule.parse(rule), s, (9, 9))
