"""linear, slerp and karcher from inner products, against the dense formulas."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from peftsurgery.errors import UsageError
from peftsurgery.merge_methods import METHODS, Coefficients
from peftsurgery.merge_methods.base import Number
from tests.merge_methods import dense


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def result(
    name: str, deltas: Sequence[Tensor], weights: Sequence[float], **options: Number
) -> Tensor:
    method = METHODS[name]
    assert isinstance(method, Coefficients)
    flat = torch.stack([d.flatten() for d in deltas])
    gram = flat @ flat.T
    numbers = method.run(gram, weights, sum(weights), method.choose(options))
    return dense.summed(deltas, numbers)


def test_linear() -> None:
    deltas = [normal(i, 7, 5) for i in range(3)]
    torch.testing.assert_close(
        result("linear", deltas, [1.0, -2.0, 0.5], scale=3.0),
        3 * dense.summed(deltas, [1.0, -2.0, 0.5]),
    )
    torch.testing.assert_close(
        result("linear", deltas, [1.0, 2.0, 0.5], normalize=True),
        dense.summed(deltas, [1.0, 2.0, 0.5], normalize=True),
    )


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.1), (1.0, 3.0), (1.0, 0.0)])
@pytest.mark.parametrize("mix", [0.0, 0.9, -0.9, 1.0])
def test_slerp(weights: tuple[float, float], mix: float) -> None:
    a = normal(0, 9, 4)
    b = 3 * (mix * a + (1 - abs(mix)) * normal(1, 9, 4))
    t = weights[1] / sum(weights)
    torch.testing.assert_close(result("slerp", [a, b], weights), dense.slerp(a, b, t))


def test_slerp_with_a_zero_change_is_the_line() -> None:
    a = normal(0, 9, 4)
    torch.testing.assert_close(result("slerp", [a, 0 * a], [1.0, 3.0]), 0.25 * a)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_karcher(count: int) -> None:
    deltas = [normal(i, 6, 8) * (i + 1) for i in range(count)]
    weights = [1.0, 0.3, 2.0, 0.7, 1.1][:count]
    expected = dense.karcher(deltas, weights)
    torch.testing.assert_close(result("karcher", deltas, weights), expected, rtol=1e-8, atol=1e-8)


def test_karcher_of_two_is_halfway_on_the_arc() -> None:
    a, b = normal(0, 5, 5), normal(1, 5, 5)
    a, b = a / a.norm(), b / b.norm()
    torch.testing.assert_close(
        result("karcher", [a, b], [1.0, 1.0]), dense.slerp(a, b, 0.5), rtol=1e-7, atol=1e-8
    )


def test_karcher_of_hostile_directions() -> None:
    a = normal(0, 5, 5)
    assert float(result("karcher", [a, a, a], [1.0, 2.0, 0.5]).sub(a).norm()) < 1e-9
    opposite = result("karcher", [a, -a], [1.0, 1.0])
    assert bool(torch.isfinite(opposite).all())
    zero = result("karcher", [0 * a, 0 * a], [1.0, 1.0])
    assert float(zero.norm()) == 0
    with_zero = result("karcher", [a, 0 * a], [1.0, 1.0])
    torch.testing.assert_close(with_zero, 0.5 * a)


@pytest.mark.parametrize("name", ["linear", "slerp", "karcher"])
def test_one_adapter_of_weight_one_is_itself(name: str) -> None:
    a = normal(4, 6, 3)
    torch.testing.assert_close(result(name, [a], [1.0]), a)


def test_weights_are_checked() -> None:
    with pytest.raises(UsageError, match="defined for 2 adapters, got 3"):
        METHODS["slerp"].check_weights([1.0, 1.0, 1.0])
    with pytest.raises(UsageError, match="must not be negative, got -1"):
        METHODS["karcher"].check_weights([1.0, -1.0])
