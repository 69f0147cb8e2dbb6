"""Element-wise methods against the dense formulas, at any tile size, and their random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peftsurgery.errors import UsageError
from peftsurgery.merge_methods import METHODS, Elementwise, Stack
from peftsurgery.merge_methods.base import Number
from peftsurgery.merge_methods.sparsify import uniform
from tests.merge_methods import dense

SHAPES = [(31, 17), (1, 40), (40, 1), (8, 8)]
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack_of(
    deltas: Sequence[Tensor], weights: Sequence[float], *, tile: int = 1 << 20, seed: int = 0
) -> Stack:
    rows, columns = deltas[0].shape
    return Stack(
        "some.path",
        (rows, columns),
        tuple(range(len(deltas))),
        tuple(weights),
        sum(weights),
        lambda i, a, b: deltas[i][a:b].clone(),
        seed,
        tile,
    )


def result(
    name: str, deltas: Sequence[Tensor], weights: Sequence[float], *, tile: int = 1 << 20,
    seed: int = 0, **options: Number
) -> Tensor:  # fmt: skip
    method = METHODS[name]
    assert isinstance(method, Elementwise)
    stack = stack_of(deltas, weights, tile=tile, seed=seed)
    return stack.dense(method.run(stack, method.choose(options)))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["total", "frequency"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.37])
def test_ties(shape: tuple[int, int], mode: str, normalize: bool, density: float) -> None:
    deltas = [normal(seed, *shape) for seed in range(3)]
    weights = [0.5, 1.3, 0.8]
    kept = [dense.top(d.double(), int(density * d.numel())) for d in deltas]
    expected = 1.7 * dense.elected(kept, weights, mode, normalize)
    found = result(
        "ties", deltas, weights, tile=64, density=density, majority_sign=mode,
        normalize=normalize, scale=1.7,
    )  # fmt: skip
    close(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
def test_breadcrumbs_keeps_the_middle(shape: tuple[int, int], gamma: float) -> None:
    deltas = [normal(seed, *shape) for seed in range(2)]
    kept = [dense.band(d.double(), 0.6, gamma) for d in deltas]
    assert all(0 < int((k != 0).sum()) < k.numel() for k in kept)
    found = result("breadcrumbs", deltas, [1.0, -0.5], tile=50, density=0.6, gamma=gamma)
    close(found, dense.summed(kept, [1.0, -0.5]))
    found = result("breadcrumbs_ties", deltas, [1.0, 0.5], density=0.6, gamma=gamma)
    close(found, dense.elected(kept, [1.0, 0.5], "total", False))


def test_magnitude_prune_is_topk_then_a_sum() -> None:
    deltas = [normal(seed, 23, 11) for seed in range(2)]
    kept = [dense.top(d.double(), int(0.2 * d.numel())) for d in deltas]
    found = result("magnitude_prune", deltas, [2.0, -1.0], density=0.2)
    close(found, dense.summed(kept, [2.0, -1.0]))
    found = result("magnitude_prune", deltas, [2.0, 1.0], density=0.2, normalize=True)
    close(found, dense.summed(kept, [2.0, 1.0], normalize=True))


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("tile", [1, 100, 1 << 20])
def test_sce(density: float, tile: int) -> None:
    deltas = [normal(seed, 29, 13) * (seed + 1) for seed in range(3)]
    found = result("sce", deltas, [1.0, 1.0, 1.0], tile=tile, density=density)
    close(found, dense.sce([d.double() for d in deltas], density))


def test_sce_weights_scale_the_changes() -> None:
    deltas = [normal(seed, 9, 8) for seed in range(2)]
    found = result("sce", deltas, [0.5, -2.0], density=0.5)
    close(found, dense.sce([0.5 * deltas[0].double(), -2.0 * deltas[1].double()], 0.5))


def test_negative_weights_vote_and_add_with_their_sign() -> None:
    a, b = torch.tensor([[1.0, 1.0, -1.0, 0.0]]), torch.tensor([[3.0, -0.5, 1.0, 2.0]])
    found = result("ties", [a, b], [1.0, -0.5])
    # y = a, -b/2: (1, -1.5) (1, .25) (-1, -.5) (0, -1); divided by the |w| that agree
    close(found, torch.tensor([[-1.5 / 0.5, 1.25 / 1.5, -1.5 / 1.5, -1.0 / 0.5]]))
    assert result("ties", [b], [-1.0]).equal(-b)


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if isinstance(m, Elementwise)])
def test_one_adapter_of_weight_one_is_itself(name: str) -> None:
    delta = normal(3, 12, 7)
    options: dict[str, Any] = {"density": 1.0}
    if name.startswith("breadcrumbs"):
        options["gamma"] = 0.0
    torch.testing.assert_close(result(name, [delta], [1.0], **options), delta)


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if isinstance(m, Elementwise)])
@pytest.mark.parametrize("tile", [1, 37, 200])
def test_tiles_do_not_matter(name: str, tile: int) -> None:
    deltas = [normal(seed, 33, 19) for seed in range(3)]
    whole = result(name, deltas, [1.0, 0.5, 0.3], density=0.5)
    assert torch.equal(result(name, deltas, [1.0, 0.5, 0.3], density=0.5, tile=tile), whole)


@pytest.mark.parametrize("name", RANDOM)
def test_seeds(name: str) -> None:
    assert METHODS[name].random
    deltas = [normal(seed, 33, 19) for seed in range(2)]
    first = result(name, deltas, [1.0, 0.5], density=0.5, seed=7)
    assert torch.equal(result(name, deltas, [1.0, 0.5], density=0.5, seed=7), first)
    assert not torch.equal(result(name, deltas, [1.0, 0.5], density=0.5, seed=8), first)


def test_dare_keeps_the_mean_and_drops_the_share() -> None:
    delta = torch.ones(200, 300)
    found = result("dare_linear", [delta], [1.0], density=0.25)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    plain = result("dare_linear", [delta], [1.0], density=0.25, rescale=False)
    assert set(plain.unique().tolist()) == {0.0, 1.0}
    two = result("dare_linear", [delta, delta], [1.0, -1.0], density=0.25)
    assert bool((two != 0).any())  # each adapter has masks of its own


def test_della_follows_the_magnitudes() -> None:
    row = torch.arange(1, 41, dtype=torch.float32)[torch.randperm(40)]
    row *= torch.tensor([1.0, -1.0]).repeat(20)
    delta = row.repeat(4000, 1)
    found = result("della_linear", [delta], [1.0], density=0.5, epsilon=0.4)
    chance = dense.keep_probabilities(row[None].double(), 0.5, 0.4)[0]
    kept = (found != 0).double().mean(0)
    assert float((kept - chance).abs().max()) < 0.05
    assert float(chance.max() - chance.min()) == pytest.approx(0.8)
    value = found.abs().max(0).values.double()
    torch.testing.assert_close(value, row.abs().double() / chance, rtol=1e-5, atol=0)


def test_uniform_numbers_can_start_anywhere() -> None:
    whole = uniform(99, 0, 1000)
    for first in (0, 1, 7, 8, 9, 333):
        assert torch.equal(uniform(99, first, 100), whole[first : first + 100])
    assert not torch.equal(uniform(100, 0, 1000), whole)
    assert abs(float(np.mean(whole.numpy())) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dare_linear", {}, "needs density"),
        ("linear", {"density": 0.5}, "linear: has no option 'density'"),
        ("ties", {"epsilon": 0.1}, "has no option 'epsilon'"),
        ("ties", {"density": 0.0}, "expected 0 < density <= 1"),
        ("ties", {"density": float("nan")}, "density is nan"),
        ("ties", {"majority_sign": "most"}, "Expected one of: total, frequency"),
        ("ties", {"scale": float("inf")}, "a finite number"),
        ("iso_cts", {"common": 1.5}, "common is 1.5"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Number], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        METHODS[name].choose(options)


def test_della_probabilities_stay_probabilities() -> None:
    with pytest.raises(UsageError, match="Lower epsilon"):
        result("della", [normal(0, 4, 4)], [1.0], density=0.1)
