"""VeRA, FourierFT, C3A, MiSS, SHiRA and AdaLoRA: sizes that come from the weight, what is refused,
differences, drawn projections, starts and fits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, nn

from peftsurgery.algorithms import (
    ALGORITHMS,
    C3A,
    AdaLoRA,
    Bat,
    FourierFT,
    Full,
    MiSS,
    SHiRA,
    VeRA,
    WeightAdapter,
    difference,
    norm,
    swap_halves,
)
from peftsurgery.algorithms.adalora import adalora_scale
from peftsurgery.algorithms.vera import drawn
from peftsurgery.errors import CannotFit, CannotSplit, UsageError
from tests.algorithms.cases import LAYERS, close, draw, get

# --- sizes ----------------------------------------------------------------------------------------


def test_sizes_that_only_the_weight_tells(rng: Generator) -> None:
    for adapter, shape in (
        (FourierFT(draw(rng, 5)), (0, 0)),
        (SHiRA(draw(rng, 2), torch.tensor([[0, 1], [2, 3]])), (0, 0)),
        (MiSS(draw(rng, 2, 6)), (6, 0)),
        (MiSS(draw(rng, 2, 6), mini=True), (0, 0)),
        (VeRA(draw(rng, 6), draw(rng, 2), draw(rng, 2, 9), draw(rng, 8, 2)), (6, 0)),
    ):
        assert adapter.shape == shape
        assert not adapter.additive
        assert adapter.factors() is None
        verbs: list[tuple[Any, tuple[Any, ...]]] = [
            (adapter.delta, ()),
            (adapter.svd, ()),
            (adapter.tile, (0, 1)),
            (norm, (adapter,)),
        ]
        for verb, arguments in verbs:
            with pytest.raises(UsageError, match="depends on the weight"):
                verb(*arguments)
        if not shape[0]:
            with pytest.raises(CannotSplit, match="how many rows"):
                adapter.rows(0, 2)
            with pytest.raises(CannotSplit, match="how many rows"):
                swap_halves(adapter)
        assert adapter.on((6, 8)).additive
        assert adapter.on((6, 8)).on((6, 8)).shape == (6, 8)
        close(adapter.delta(draw(rng, 6, 8)), adapter.on((6, 8)).delta())


def test_weights_that_cannot_be_changed_are_refused(rng: Generator) -> None:
    wrong: list[tuple[WeightAdapter, tuple[int, ...]]] = [
        (FourierFT(draw(rng, 25)), (4, 6)),
        (SHiRA(draw(rng, 2), torch.tensor([[0, 7], [2, 3]])), (7, 5)),
        (SHiRA(draw(rng, 2), torch.tensor([[0, 1], [2, 5]])), (7, 5)),
        (MiSS(draw(rng, 2, 6)), (5, 4)),
        (MiSS(draw(rng, 2, 6), mini=True), (9, 4)),
        (VeRA(draw(rng, 6), draw(rng, 2), draw(rng, 2, 9), draw(rng, 8, 2)), (6, 10)),
        (VeRA(draw(rng, 6), draw(rng, 2), draw(rng, 2, 9), draw(rng, 8, 2)), (7, 4)),
        (Bat(draw(rng, 3, 2, 2)), (6, 5)),
        (FourierFT(draw(rng, 2)), (4,)),
    ]
    for adapter, shape in wrong:
        with pytest.raises(UsageError, match="does not fit a weight"):
            adapter.on(shape)
        with pytest.raises(UsageError, match="does not fit a weight"):
            adapter.merged(draw(rng, *shape))


def test_shapes_that_are_none_are_refused(rng: Generator) -> None:
    vectors = draw(rng, 6), draw(rng, 2)
    wrong: list[tuple[Any, str]] = [
        (lambda: AdaLoRA(draw(rng, 4, 2), draw(rng, 3, 1), draw(rng, 2, 5)), r"\(2, 1\)"),
        (lambda: AdaLoRA(draw(rng, 4, 3), draw(rng, 2, 1), draw(rng, 2, 5)), r"\(out, 2\)"),
        (lambda: VeRA(*vectors), "neither projections nor the seed"),
        (lambda: VeRA(*vectors, draw(rng, 1, 5), draw(rng, 6, 2)), r"\(2, inputs\)"),
        (lambda: VeRA(*vectors, draw(rng, 2, 5), draw(rng, 5, 2)), "at least 6"),
        (lambda: VeRA(draw(rng, 6, 1), draw(rng, 2), seed=0), "a vector"),
        (lambda: FourierFT(draw(rng, 6, 1)), r"expected \(n,\)"),
        (lambda: C3A(draw(rng, 6, 1)), "in / b"),
        (lambda: MiSS(draw(rng, 6)), r"\(rank, outputs\)"),
        (lambda: Bat(draw(rng, 6, 2, 3)), "r, r"),
        (lambda: SHiRA(draw(rng, 6), torch.zeros(2, 5).int()), r"\(2, 6\)"),
        (lambda: SHiRA(draw(rng, 2), torch.tensor([[0, -1], [0, 0]])), "negative place"),
    ]
    for build, message in wrong:
        with pytest.raises(UsageError, match=message):
            build()


def test_differences_of_changes_without_a_size(rng: Generator) -> None:
    vera = VeRA(draw(rng, 6), draw(rng, 2), seed=4, widest=(8, 0))
    sparse = SHiRA(draw(rng, 2), torch.tensor([[0, 1], [2, 3]]))
    pairs: list[tuple[WeightAdapter, WeightAdapter]] = [
        (FourierFT(draw(rng, 5)), FourierFT(draw(rng, 5))),
        (sparse, sparse),
        (MiSS(draw(rng, 2, 6), mini=True), MiSS(draw(rng, 2, 6), mini=True)),
        (vera, vera.with_tensors(lambda_d=draw(rng, 2))),
    ]
    for a, b in pairs:
        name = a.fields[0]
        copy = a.with_tensors(**{name: a.tensors()[name].clone()})
        assert difference(a, copy) == 0
        low = a.with_tensors(**{n: t.bfloat16() for n, t in a.tensors().items()})
        assert 0 < difference(a, low) < 0.02
        assert difference(a, b) > 0.1 or a is b
    first = pairs[0][0]
    assert difference(first, first.with_tensors(seed=778)) > 0.1
    shira = pairs[1][0]
    moved = shira.with_tensors(indices=torch.tensor([[0, 1], [2, 2]]))
    assert difference(shira, moved) > 0.1
    placed = shira.on((3, 5))
    assert difference(shira, Full(placed.delta())) == 0
    assert difference(Full(placed.delta() + 1), shira) > 0.1
    settled = vera.with_tensors(widest=(8, 12)).on((6, 10))
    assert difference(vera, settled) == difference(settled, vera) == 0
    with pytest.raises(UsageError, match="give the base"):
        vera.delta(draw(rng, 6, 10))


# --- VeRA's projections ---------------------------------------------------------------------------


def test_drawn_projections_are_frozen_shared_and_keep_their_dtype(rng: Generator) -> None:
    a = VeRA(draw(rng, 6), draw(rng, 3), seed=5, widest=(8, 7), sized=(6, 7))
    b = VeRA(draw(rng, 8), draw(rng, 3), seed=5, widest=(8, 7), sized=(8, 5))
    assert a.down is b.down
    assert "down" not in a.tensors()
    there = [m.with_tensors().to("meta") for m in (a, b)]
    assert there[0].down is there[1].down
    before = a.delta()
    a.to(torch.bfloat16)
    assert a.lambda_b.dtype == torch.bfloat16
    assert a.down is not None
    assert a.down.dtype == torch.float32
    close(a.delta(), before, 0.02)
    generator = Generator().manual_seed(5)
    down, up = torch.empty(3, 7), torch.empty(8, 3)
    for tensor in (down, up):  # torch's own initialisation
        nn.init.kaiming_uniform_(tensor, generator=generator)
    found = drawn(5, 3, 8, 7)
    assert torch.equal(found[0], down)
    assert torch.equal(found[1], up)


# --- starts and fits ------------------------------------------------------------------------------

FRESH: list[tuple[str, dict[str, Any]]] = [
    ("adalora", {"rank": 3, "alpha": 4.0}),
    ("adalora", {"rank": 40}),
    ("vera", {"rank": 4, "seed": 3}),
    ("vera", {"rank": 4, "widest": (20, 100)}),
    ("fourierft", {"frequencies": 9}),
    ("fourierft", {}),
    ("c3a", {"block_size": 2}),
    ("miss", {"rank": 4}),
    ("miss", {"rank": 4, "mini": 3}),
    ("bat", {"rank": 2}),
    ("shira", {"count": 20}),
]


@pytest.mark.parametrize(("algorithm", "options"), FRESH, ids=str)
@pytest.mark.parametrize("layer", ["linear", "conv3x3", "embedding"])
def test_a_fresh_adapter_changes_nothing(
    algorithm: str, options: dict[str, Any], layer: str, rng: Generator
) -> None:
    weight = draw(rng, *LAYERS[layer])
    if algorithm == "miss" and options.get("mini") and layer == "embedding":
        options = {**options, "mini": 7}
    adapter = ALGORITHMS[algorithm].init(weight, generator=rng, **options)
    assert torch.equal(adapter.merged(weight)[0], weight)
    assert adapter.is_zero()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    (adapter.merged(weight)[0] * draw(rng, *weight.shape)).sum().backward()
    optimizer.step()
    assert not adapter.is_zero()
    assert not torch.equal(adapter.merged(weight)[0], weight)
    with pytest.raises(UsageError, match="no option 'ranc'"):
        ALGORITHMS[algorithm].init(weight, ranc=2, **options)


def test_shira_of_a_rank_has_as_many_numbers_as_a_lora(rng: Generator) -> None:
    weight = draw(rng, 12, 10)
    adapter = SHiRA.init(weight, rank=2, generator=rng)
    assert adapter.numel == 2 * (12 + 10)
    assert len({tuple(p) for p in adapter.indices.T.tolist()}) == 44
    again = SHiRA.init(weight, rank=2, generator=torch.Generator().manual_seed(1))
    other = SHiRA.init(weight, rank=2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.indices, other.indices)


def test_what_cannot_be_started_says_so(rng: Generator) -> None:
    weight = draw(rng, 12, 10)
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("adalora", {}, "got rank None"),
        ("c3a", {}, "give block_size"),
        ("c3a", {"block_size": 3}, "do not divide"),
        ("miss", {"rank": 11}, "do not fit"),
        ("miss", {"rank": 2, "mini": 5}, "do not fit"),
        ("bat", {"rank": 4}, "does not divide"),
        ("shira", {"rank": 6}, "132 places"),
        ("shira", {}, "0 places"),
        ("fourierft", {"frequencies": 121}, "does not fit"),
        ("vera", {}, "got rank None"),
    )
    for algorithm, options, message in cases:
        with pytest.raises(UsageError, match=message):
            ALGORITHMS[algorithm].init(weight, **options)


def test_the_scale_of_adalora_is_that_of_its_first_rank(rng: Generator) -> None:
    adapter = AdaLoRA.init(draw(rng, 6, 5), rank=4, alpha=6.0, generator=rng)
    assert float(adapter.scale) == pytest.approx(6 / (4 + 1e-5), rel=1e-6)
    assert adalora_scale(0, 4) == pytest.approx(4 / (4 + 1e-5))
    assert adalora_scale(-3, 4) == adalora_scale(0, 4)


def test_fits_are_the_nearest_of_their_kind(rng: Generator) -> None:
    delta = draw(rng, 12, 10)
    exact = AdaLoRA.fit(delta)
    close(exact.delta(), delta, 1e-5)
    s = torch.linalg.svdvals(delta.double())
    cut = AdaLoRA.fit(delta, 3)
    assert cut.rank == 3
    error = float((cut.delta() - delta).norm() / delta.norm())
    assert math.isclose(error, float(s[3:].norm() / s.norm()), rel_tol=1e-4)
    close(get(cut, "e").reshape(-1), s[:3], 1e-5)

    sparse = SHiRA.fit(delta, 7)
    assert int((sparse.delta() != 0).sum()) == 7
    smallest = float(sparse.values.detach().abs().min())
    assert smallest >= float((delta - sparse.delta()).abs().max())

    for made in (C3A(draw(rng, 6, 5, 2), scale=0.3), MiSS(draw(rng, 4, 12), sized=(12, 10))):
        option = 2 if isinstance(made, C3A) else 4
        again = type(made).fit(made, option)
        close(again.delta(), made.delta(), 1e-5)
        fitted = type(made).fit(delta, option)
        residual = delta - fitted.delta()
        for _ in range(5):  # orthogonal to every change of the kind
            name = made.fields[0]
            trial = made.with_tensors(**{name: draw(rng, *made.tensors()[name].shape)}).delta()
            assert abs(float((residual * trial).sum())) < 1e-3
    for kind in (VeRA, FourierFT):
        with pytest.raises(CannotFit, match="lora, lokr, full"):
            kind.fit(delta)
    with pytest.raises(UsageError, match="do not divide"):
        C3A.fit(delta, 5)
