"""Core SVDs, rank rules, norms and factorisations against dense fp64."""

import math

import pytest
import torch
from lycoris.functional import factorization as lycoris_factorization
from peft.tuners.lokr.layer import factorization as peft_factorization
from torch import Generator, Tensor

from peftsurgery.errors import UsageError
from peftsurgery.linalg import (
    RankRule,
    core_svd,
    dense_svd,
    factorization,
    khatri_rao,
    kron_svd,
    low_rank_difference_norm,
    low_rank_norm,
    low_rank_sum_norm,
)


def draw(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


def check_svd(
    triplet: tuple[Tensor, Tensor, Tensor], dense: Tensor, tolerance: float = 3e-6
) -> None:
    u, s, vh = (t.double() for t in triplet)
    scale = max(float(torch.linalg.matrix_norm(dense, 2)), 1e-30)
    wanted = torch.linalg.svdvals(dense)
    k = min(len(s), len(wanted))
    assert float((s[:k] - wanted[:k]).abs().max()) <= tolerance * scale
    assert bool((s[:-1] >= s[1:]).all())
    assert float(((u * s) @ vh - dense).norm()) <= tolerance * scale * math.sqrt(k)
    solid = s > 1e-5 * scale
    for q in (u[:, solid], vh[solid].T):
        eye = torch.eye(q.shape[1], dtype=torch.float64)
        assert float((q.T @ q - eye).abs().max()) < 1e-5


SHAPES = [(30, 4, 20), (7, 12, 5), (1, 3, 9), (9, 3, 1), (16, 16, 16), (5, 1, 40), (300, 8, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_core_svd_is_the_svd_of_the_product(
    shape: tuple[int, int, int], dtype: torch.dtype, rng: Generator
) -> None:
    o, r, n = shape
    up, down = draw(rng, o, r).to(dtype), draw(rng, r, n).to(dtype)
    triplet = core_svd(up, down)
    assert {t.dtype for t in triplet} == {torch.float32}
    check_svd(triplet, up.double() @ down.double())
    assert len(triplet[1]) == min(o, r, n)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12, math.inf])
def test_core_svd_of_ill_conditioned_factors(condition: float, rng: Generator) -> None:
    up, down = draw(rng, 40, 6), draw(rng, 6, 30)
    up[:, 5] = up[:, 4] + up[:, 5] / condition
    down[2] = down[3] + down[2] / condition
    check_svd(core_svd(up, down), up.double() @ down.double())
    check_svd(core_svd(up * 1e-20, down * 1e15), (up * 1e-20).double() @ (down * 1e15).double())


def test_core_svd_of_zeros(rng: Generator) -> None:
    for up, down in ((torch.zeros(6, 2), draw(rng, 2, 5)), (torch.zeros(6, 2), torch.zeros(2, 5))):
        u, s, vh = core_svd(up, down)
        assert float(s.abs().max()) == 0
        assert bool(torch.isfinite(u).all() and torch.isfinite(vh).all())


def test_core_svd_truncates_optimally(rng: Generator) -> None:
    up, down = draw(rng, 40, 6), draw(rng, 6, 30)
    dense = up.double() @ down.double()
    tail = torch.linalg.svdvals(dense)[3:].norm()
    u, s, vh = core_svd(up, down, RankRule.parse(3))
    assert s.numel() == 3
    error = ((u * s) @ vh - dense).norm()
    assert math.isclose(float(error), float(tail), rel_tol=1e-5)


def test_non_finite_input_is_named(rng: Generator) -> None:
    up, down = draw(rng, 6, 2), draw(rng, 2, 5)
    down[0, 3] = math.nan
    with pytest.raises(UsageError, match="down: 1 of 10"):
        core_svd(up, down)
    up[1] = math.inf
    with pytest.raises(UsageError, match="up: 2 of 12"):
        core_svd(up, down)
    with pytest.raises(UsageError, match="matrix: 1 of 10"):
        dense_svd(down)
    with pytest.raises(UsageError, match="do not multiply"):
        core_svd(up, up)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 8), (1100, 960)], ids=str)
def test_dense_svd(shape: tuple[int, int], rng: Generator) -> None:
    matrix = draw(rng, *shape)
    check_svd(dense_svd(matrix), matrix.double(), 1e-5)
    assert dense_svd(matrix, RankRule.parse(1))[1].numel() == 1


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_dense_svd_falls_back_when_lapack_gives_up(
    shape: tuple[int, int], rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]

    monkeypatch.setattr(torch.linalg, "svd", fail)
    matrix = draw(rng, *shape)
    u, s, vh = dense_svd(matrix)
    assert float(((u * s) @ vh - matrix).norm() / matrix.norm()) < 1e-5
    close = torch.linalg.svdvals(matrix.double())
    assert float((s - close).abs().max() / close[0]) < 1e-6
    assert bool(torch.isfinite(dense_svd(torch.zeros(shape))[0]).all())


@pytest.mark.parametrize("shapes", [((4, 3), (5, 6)), ((1, 2), (7, 3))], ids=str)
def test_kron_svd(shapes: tuple[tuple[int, int], tuple[int, int]], rng: Generator) -> None:
    a, b = (draw(rng, *s) for s in shapes)
    dense = torch.kron(a, b).double()
    check_svd(kron_svd(dense_svd(a), dense_svd(b)), dense)
    u, s, vh = kron_svd(dense_svd(a), dense_svd(b), RankRule.parse(2))
    error = float(((u * s) @ vh - dense).norm())
    assert math.isclose(error, float(torch.linalg.svdvals(dense)[2:].norm()), rel_tol=1e-4)


def test_khatri_rao(rng: Generator) -> None:
    a1, b1, a2, b2 = draw(rng, 6, 2), draw(rng, 2, 5), draw(rng, 6, 3), draw(rng, 3, 5)
    u, v = khatri_rao(a1, b1, a2, b2)
    assert (u.shape, v.shape) == ((6, 6), (6, 5))
    assert torch.allclose(u @ v, (a1 @ b1) * (a2 @ b2), atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e-10])
def test_low_rank_difference_of_neighbours(scale: float, rng: Generator) -> None:
    up, down = draw(rng, 50, 6).double(), draw(rng, 6, 40).double()
    up2, down2 = up + scale * draw(rng, 50, 6), down + scale * draw(rng, 6, 40)
    wanted = float((up2 @ down2 - up @ down).norm())
    got = low_rank_difference_norm(up, down, up2, down2)
    assert math.isclose(got, wanted, rel_tol=1e-4)
    other = low_rank_difference_norm(
        up, down, torch.cat([up2, up2], 1), torch.cat([down2, down2]) / 2
    )
    assert math.isclose(other, wanted, rel_tol=1e-3)
    assert low_rank_difference_norm(up, down, up, down) == 0.0
    assert math.isclose(low_rank_norm(up, down), float((up @ down).norm()), rel_tol=1e-12)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 5, 8, 12, 16, 31, 64, 100])
def test_factorization_is_lycoris_and_peft(factor: int) -> None:
    for dimension in (*range(1, 400), 640, 768, 1280, 2048, 3072, 5120, 11008, 12288, 30522):
        m, n = factorization(dimension, factor)
        assert m * n == dimension
        assert (m, n) == lycoris_factorization(dimension, factor)
        unordered = factorization(dimension, factor, ordered=False)
        assert unordered == peft_factorization(dimension, factor)


# --- rank rules -----------------------------------------------------------------------------------

S = [8.0, 4.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        ("3", 3),
        ("99", 5),
        (7, 5),
        ("energy:0.5", 1),
        ("energy:0.75", 1),  # 64 / 85 = 0.753
        ("energy:0.76", 2),
        ("energy:1", 4),
        ("fro:0.86", 1),  # sqrt(64 / 85) = 0.868
        ("fro:0.87", 2),
        ("cumulative:0.8", 2),  # 12 / 15
        ("cumulative:0.81", 3),
        ("cumulative:1.0", 4),
        ("ratio:2", 2),
        ("ratio:1.9", 1),
        ("ratio:8", 4),
        ("ratio:1e9", 4),
        ("max:2", 2),
        ("max:64,energy:0.99", 4),
        ("max:3 , energy:0.99", 3),
        ("energy:0.76,ratio:4", 3),
        ("2,max:1", 1),
    ],
)
def test_rank_rules(rule: str | int, rank: int) -> None:
    parsed = RankRule.parse(rule)
    assert parsed.choose(S) == rank
    assert RankRule.parse(str(parsed)) == parsed
    assert RankRule.parse(parsed) is parsed


def test_rank_rules_of_flat_and_zero_spectra() -> None:
    for count in range(1, 11):
        assert RankRule.parse(f"energy:{count / 10}").choose([1.0] * 10) == count
        assert RankRule.parse(f"cumulative:{count / 10}").choose([3.0] * 10) == count
    for rule in ("energy:0.9", "fro:1", "cumulative:0.5", "ratio:5"):
        assert RankRule.parse(rule).choose(torch.zeros(4)) == 1


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "whole number"),
        ("0", "whole number"),
        ("-4", "whole number"),
        ("1.5", "whole number"),
        ("max:0", "whole number"),
        ("ratio:0.9", "needs p > 1"),
        ("ratio:1", "needs p > 1"),
        ("ratio:inf", "needs p > 1"),
        ("energy:0", "0 < p <= 1"),
        ("energy:1.01", "0 < p <= 1"),
        ("fro:nan", "0 < p <= 1"),
        ("energy:much", "not a number"),
        ("enrgy:0.9", "unknown rule 'enrgy'"),
        ("16,,energy:0.9", "whole number"),
    ],
)
def test_wrong_rank_rules(rule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RankRule.parse(rule)


def test_spectra_that_cannot_be_judged() -> None:
    with pytest.raises(UsageError, match="empty"):
        RankRule.parse("3").choose([])
    with pytest.raises(UsageError, match="NaN"):
        RankRule.parse("3").choose([math.nan])


@pytest.mark.parametrize("cancel", [0.0, 1.0 - 1e-5])
def test_rough_norm(cancel: float, rng: Generator) -> None:
    up = torch.randn(80, 5, generator=rng)
    down = torch.randn(5, 60, generator=rng)
    left, right = torch.cat([up, -cancel * up], 1), torch.cat([down, down])
    exact = float(torch.linalg.norm(left.double() @ right.double()))
    assert low_rank_norm(left, right, rough=True) == pytest.approx(exact, rel=1e-4)


def test_norm_of_a_sum_of_products() -> None:
    generator = Generator().manual_seed(8)
    shapes = (3, 1, 7)
    pairs = [
        (torch.randn(40, r, generator=generator), torch.randn(r, 25, generator=generator))
        for r in shapes
    ]
    dense = sum((u.double() @ v.double() for u, v in pairs), torch.zeros(40, 25).double())
    assert low_rank_sum_norm(pairs) == pytest.approx(float(dense.norm()), rel=1e-5)
    assert low_rank_sum_norm([]) == 0.0
    u, v = pairs[0]
    assert low_rank_sum_norm([(u, v), (-u, v)]) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(low_rank_sum_norm([(u * math.nan, v)]))


@pytest.mark.parametrize("rank", [63, 64, 65, 130])
def test_gram_panels(rank: int) -> None:
    generator = Generator().manual_seed(rank)
    up = torch.randn(1100, rank, generator=generator).bfloat16()
    down = torch.randn(rank, 300, generator=generator).half()
    u, s, vh = core_svd(up, down)
    dense = up.double() @ down.double()
    torch.testing.assert_close(s.double(), torch.linalg.svdvals(dense)[:rank], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(((u * s) @ vh).double(), dense, rtol=1e-4, atol=1e-3)
