"""The laws of the algorithms whose new weight is a map of the old one, on every layer and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, nn

from peftsurgery.algorithms import (
    ALGORITHMS,
    BOFT,
    HRA,
    IA3,
    OFT,
    Full,
    GLoRA,
    HiRA,
    LoRA,
    RoAd,
    Tokens,
    WeightMap,
    difference,
)
from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import CannotFit, CannotFuse, CannotSplit, UsageError
from peftsurgery.linalg import cayley, cayley_neumann, gram_schmidt, skew_part
from tests.algorithms.cases import LAYERS, close, draw
from tests.algorithms.map_cases import MAP_IDS, MAPS, MapCase

every = pytest.mark.parametrize(("case", "layer"), MAPS, ids=MAP_IDS)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_map_is_the_formula(
    case: MapCase, layer: str, dtype: torch.dtype, rng: Generator
) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, dtype)
    weight, bias = draw(rng, *shape, dtype=dtype), draw(rng, shape[0])
    kept = weight.clone()
    wanted = case.formula(adapter, weight.double())
    assert not adapter.additive
    for strength in (1.0, 0.3, -2.0):
        found, new_bias = adapter.merged(weight, bias, strength)
        assert found.dtype == torch.float32
        close(found, weight.double() + strength * (wanted - weight.double()), 5e-6)
        assert new_bias is not None
        if isinstance(adapter, RoAd):  # rotated with the weight
            wanted_bias = case.formula(adapter, bias.double()[:, None])[:, 0]
            close(new_bias, bias + strength * (wanted_bias - bias), 5e-6)
        else:
            assert torch.equal(new_bias, bias)
    assert torch.equal(adapter.merged(weight, strength=0)[0], weight.float())
    close(adapter.delta(weight), wanted - weight.double(), 2e-5)
    assert torch.equal(weight, kept), "the weight was written to"
    assert all(t.dtype == dtype for t in adapter.tensors().values())
    for verb in (adapter.delta, lambda: adapter.tile(0, 1)):
        with pytest.raises(UsageError, match="depends on the weight"):
            verb()


@every
def test_strided_tensors_and_weights_are_ordinary(
    case: MapCase, layer: str, rng: Generator
) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32)
    views: dict[str, Any] = {
        n: t.detach().mT.contiguous().mT for n, t in adapter.tensors().items() if t.ndim > 1
    }
    weight = draw(rng, *shape)
    if len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    other = adapter.with_tensors(**views)
    close(other.merged(weight)[0], adapter.merged(weight.contiguous())[0])


@every
def test_rows_are_rows_of_the_result(case: MapCase, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32).on(shape)
    weight = draw(rng, *shape)
    whole = adapter.merged(weight)[0]
    cuts = [(0, 1), (1, 7), (5, 6), (0, shape[0])]
    if not adapter.row_wise:
        for start, stop in cuts[:3]:
            with pytest.raises(CannotSplit, match="mixes"):
                adapter.rows(start, stop)
        step = 2 if isinstance(adapter, OFT) else getattr(adapter, "span", 2)
        cuts = [(0, step), (step, 2 * step), (0, shape[0])]
    for start, stop in cuts:
        part = adapter.rows(start, stop)
        close(part.merged(weight[start:stop])[0], whole[start:stop], 5e-6)


@every
def test_split_and_joined_again_is_the_same(case: MapCase, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32).on(shape)
    half = shape[0] // 2
    if getattr(adapter, "span", 1) > 2:
        half = 4
    parts = [adapter.rows(0, half - half % 2), adapter.rows(half - half % 2, shape[0])]
    again = type(adapter).fuse(parts)
    weight = draw(rng, *shape)
    close(again.merged(weight)[0], adapter.merged(weight)[0], 5e-6)
    assert difference(again.on(shape), adapter) < 1e-6


def test_maps_of_inputs_join_only_when_they_are_one(rng: Generator) -> None:
    a, b = OFT(draw(rng, 3, 1), series=5), OFT(draw(rng, 3, 1), series=5)
    assert OFT.fuse([a, a.with_tensors()]) is a
    for parts in ([a, b], [a, 4], [a.on((4, 6)), b.on((4, 6))], [a.on((4, 6)), 4]):
        with pytest.raises(CannotFuse, match="one weight has one input"):
            OFT.fuse(parts)
    with pytest.raises(CannotFuse):
        OFT.fuse([a, a.with_tensors(half_last=False)])


def test_untouched_rows_beside_a_rotation_stay(rng: Generator) -> None:
    for part in (
        OFT(None, draw(rng, 2, 3, 3), acts_on="out", inverse=True),
        BOFT(draw(rng, 2, 3, 2, 2).repeat(1, 2, 1, 1), form="lycoris"),
        IA3(draw(rng, 6)),
    ):
        rows = part.shape[0]
        joined = type(part).fuse([rows, part, 2 * rows])
        weight = draw(rng, 4 * rows, 5)
        result = joined.merged(weight)[0]
        close(result[rows : 2 * rows], part.merged(weight[rows : 2 * rows])[0])
        close(result[:rows], weight[:rows])
        close(result[2 * rows :], weight[2 * rows :])


@every
def test_activations_equal_the_merged_weight(case: MapCase, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    adapter = case.make(shape, rng, torch.float32).on(shape)
    weight, bias = draw(rng, *shape), draw(rng, shape[0])
    kernel = shape[2:]
    n = len(kernel)
    described = Layer("conv", (1,) * n, (1,) * n, (1,) * n, 1, "zeros", kernel) if n else None
    described = described or Layer("linear")
    x = draw(rng, 2, shape[1], *[5] * n) if n else draw(rng, 2, 3, shape[1])
    wide = len(kernel) and adapter.algorithm in ("oft", "boft", "hra") and adapter.row_wise
    if wide or adapter.algorithm == "glora" or adapter.side == "weight":
        assert adapter.side == "weight"
        return
    for strength in (1.0, 0.4):
        new_weight, new_bias = adapter.merged(weight, bias, strength)
        wanted = described.apply(x, new_weight, new_bias)
        if adapter.side == "input":
            turned = adapter.turned(x, described, strength)
            close(described.apply(turned, weight, bias), wanted, 1e-5)
        elif adapter.side == "both":
            y = described.apply(x, weight, bias)
            inner = described.apply(adapter.turned(x, described, 1.0), weight, bias)
            full = adapter.mapped(inner, described, bias, 1.0)
            close(y + strength * (full - y), wanted, 1e-5)
        else:
            y = described.apply(x, weight, bias)
            close(adapter.mapped(y, described, bias, strength), wanted, 1e-5)


@every
def test_gradients_reach_every_tensor(case: MapCase, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    made = case.make(shape, rng, torch.float32)
    tensors: dict[str, Any] = {
        n: nn.Parameter(t.detach().clone()) for n, t in made.tensors().items()
    }
    adapter = made.with_tensors(**tensors)
    target = draw(rng, *shape)
    (adapter.merged(draw(rng, *shape))[0] * target).sum().backward()
    for name, tensor in adapter.tensors().items():
        assert tensor.grad is not None, name
        assert float(tensor.grad.abs().max()) > 0, name
        assert bool(torch.isfinite(tensor.grad).all()), name


@every
def test_a_lora_of_it_is_exact(case: MapCase, layer: str, rng: Generator) -> None:
    adapter, weight = case.make(LAYERS[layer], rng, torch.float32), draw(rng, *LAYERS[layer])
    close(LoRA.fit(adapter, None, weight).delta(weight), adapter.delta(weight), 1e-5)
    close(Full.fit(adapter, weight).delta(weight), adapter.delta(weight))
    if isinstance(adapter, WeightMap):
        assert type(adapter).fit(adapter) is adapter
        with pytest.raises(CannotFit, match="lora, full"):
            type(adapter).fit(LoRA(draw(rng, 12, 2), draw(rng, 2, 10)))


FRESH: list[tuple[str, dict[str, Any]]] = [
    ("oft", {"block_size": 2}),
    ("oft", {"rank": 2, "series": 0}),
    ("oft", {"block_size": 2, "shared": True}),
    ("oft", {"block_size": 4, "acts_on": "out", "rescaled": True, "constraint": 0.1}),
    ("boft", {"block_size": 2}),
    ("boft", {"block_size": 2, "form": "lycoris", "factors": 2}),
    ("hra", {"rank": 4}),
    ("ia3", {}),
    ("ia3", {"acts_on": "in"}),
    ("glora", {"rank": 3}),
    ("road", {"group": 2}),
    ("road", {"group": 6, "variant": 2}),
    ("road", {"group": 4, "variant": 4}),
    ("hira", {"rank": 3}),
    ("hira", {"rank": 40}),
]


@pytest.mark.parametrize(("algorithm", "options"), FRESH, ids=str)
@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv3x3"])
def test_a_fresh_map_changes_nothing(
    algorithm: str, options: dict[str, Any], layer: str, rng: Generator
) -> None:
    weight = draw(rng, *LAYERS[layer])
    adapter = ALGORITHMS[algorithm].init(weight, generator=rng, **options)
    delta = adapter.delta(weight).detach()
    if algorithm == "hra":  # pairs of reflections undo each other to rounding
        assert float(delta.abs().max()) < 1e-5
    else:
        assert float(delta.abs().max()) == 0
    assert adapter.is_zero()
    assert all(p.requires_grad for p in adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    target = draw(rng, *LAYERS[layer])
    (adapter.merged(weight)[0] * target).sum().backward()
    optimizer.step()
    assert not adapter.is_zero()
    assert float(adapter.delta(weight).detach().abs().max()) > 1e-5
    with pytest.raises(UsageError, match="no option 'ranc'"):
        ALGORITHMS[algorithm].init(weight, ranc=2, **options)


def test_what_cannot_be_started_says_so(rng: Generator) -> None:
    weight = draw(rng, 12, 10)
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("oft", {"block_size": 3}, "do not divide"),
        ("oft", {}, "either rank"),
        ("boft", {"block_size": 2, "factors": 3}, "a multiple of b"),
        ("hra", {"rank": 3}, "expected an even one"),
        ("glora", {}, "no rank-None start"),
    )
    for algorithm, options, message in cases:
        with pytest.raises(UsageError, match=message):
            ALGORITHMS[algorithm].init(weight, **options)


@every
def test_zero_is_recognised(case: MapCase, layer: str, rng: Generator) -> None:
    assert not case.make(LAYERS[layer], rng, torch.float16).is_zero()


def test_shapes_that_are_none_are_refused(rng: Generator) -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: OFT(draw(rng, 3, 4)), "whole b"),
        (lambda: OFT(draw(rng, 3, 3), shared=True), "one shared block"),
        (lambda: OFT(None, draw(rng, 3, 2, 3)), r"\(blocks, b, b\)"),
        (lambda: OFT(), "either a vector or blocks"),
        (lambda: OFT(draw(rng, 3, 3), None, draw(rng, 9)), "on outputs only"),
        (lambda: OFT(draw(rng, 3, 3), scale=0.5), "not scaled"),
        (lambda: OFT(draw(rng, 3, 3), magnitude=draw(rng, 4), magnitude_axis="out"), "DoRA"),
        (lambda: BOFT(draw(rng, 2, 3, 4, 4)), "a multiple of b"),
        (lambda: BOFT(draw(rng, 1, 3, 3, 3), form="lycoris"), "an even b"),
        (lambda: BOFT(draw(rng, 1, 2, 4, 4), draw(rng, 7), form="lycoris"), "8 values"),
        (lambda: HRA(draw(rng, 4)), r"\(in, reflections\)"),
        (lambda: IA3(draw(rng, 3, 2)), "one dimension"),
        (lambda: GLoRA(*(draw(rng, *s) for s in ((5, 2), (2, 5), (6, 2), (2, 4)))), r"\(4, 2\)"),
        (lambda: OFT(draw(rng, 3, 3)).on((4, 10)), "does not fit a weight"),
        (lambda: RoAd(draw(rng, 5), draw(rng, 5), variant=1, group=4), "whole groups of 4"),
        (lambda: RoAd(draw(rng, 4), draw(rng, 3), variant=2, group=2), r"RoAd\.radius"),
        (lambda: RoAd(draw(rng, 4), draw(rng, 4), variant=3, group=2), "variant 1, 2 or 4"),
        (lambda: RoAd(draw(rng, 4), draw(rng, 4), variant=2, group=2, bias=draw(rng, 4)), "bias"),
        (lambda: HiRA(draw(rng, 4, 2), draw(rng, 3, 5)), r"\(out, 3\)"),
        (lambda: Tokens(draw(rng, 2, 5), indices=(1,)), "a row per index"),
        (lambda: Tokens(draw(rng, 2, 5), indices=(1, 1)), "different numbers"),
        (lambda: Tokens(draw(rng, 2, 5), indices=(-1, 1)), "at least 0"),
        (lambda: Tokens(draw(rng, 1, 5), indices=(9,)).on((4, 5)), "Resize the base"),
        (lambda: Tokens(draw(rng, 1, 5), indices=(4,)).merged(draw(rng, 4, 5), None, 0.5), "use 1"),
    ]
    for build, message in wrong:
        with pytest.raises(UsageError, match=message):
            build()


def test_reflections_of_nothing_and_of_dependent_columns_stay_finite(rng: Generator) -> None:
    weight, u = draw(rng, 5, 8), draw(rng, 8, 4)
    u[:, 1] = 0
    close(HRA(u).merged(weight)[0], HRA(u[:, [0, 2, 3]]).merged(weight)[0])
    u[:, 1] = 3 * u[:, 0]
    orthogonal = HRA(u, orthogonal=True).merged(weight)[0]
    close(orthogonal, HRA(u[:, [0, 2, 3]], orthogonal=True).merged(weight)[0], 1e-5)
    many = gram_schmidt(draw(rng, 6, 9))  # more columns than dimensions
    close(many @ many.T, torch.eye(6), 1e-5)


def test_the_series_approaches_the_cayley_transform(rng: Generator) -> None:
    s = skew_part(0.05 * draw(rng, 3, 4, 4).double())
    exact = cayley(s)
    close(exact @ exact.mT, torch.eye(4).expand(3, 4, 4), 1e-12)
    errors = [float((cayley_neumann(s, n) - exact).norm()) for n in (2, 5, 9, 15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]
