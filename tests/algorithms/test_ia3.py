"""(IA)³: the bias, the stored orientation, the two conventions."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from peftsurgery.algorithms import IA3, difference
from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import CannotFuse, UsageError
from tests.algorithms.cases import close, draw


@pytest.mark.parametrize("strength", [1.0, 0.25, 0.0, -1.5])
def test_factors_of_outputs_reach_the_bias_where_the_convention_says_so(
    strength: float, rng: Generator
) -> None:
    weight, bias, factors = draw(rng, 6, 5), draw(rng, 6), draw(rng, 6, 1)
    peft = IA3(factors, on_bias=True)
    lycoris = IA3(factors.reshape(-1) - 1, centred=True)
    new_weight, new_bias = peft.merged(weight, bias, strength)
    assert new_bias is not None
    close(new_bias, bias * (1 + strength * (factors.reshape(-1) - 1)))
    other_weight, other_bias = lycoris.merged(weight, bias, strength)
    close(other_weight, new_weight)
    assert other_bias is not None
    assert torch.equal(other_bias, bias)
    assert peft.merged(weight, None, strength)[1] is None
    assert difference(peft, lycoris) == 1.0  # the bias is theirs alone
    plain = peft.with_tensors(on_bias=False)
    assert difference(plain, lycoris) < 1e-6


def test_a_bias_change_of_its_own_beside_a_scaled_bias_is_refused(rng: Generator) -> None:
    with pytest.raises(UsageError, match="has no change of its own"):
        IA3(draw(rng, 6, 1), on_bias=True, bias=draw(rng, 6))


@pytest.mark.parametrize("acts_on", ["out", "in"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_transposed_layer_exchanges_the_sides(
    acts_on: str, strength: float, rng: Generator
) -> None:
    """A transformers Conv1D: y = x W + b, W (i, o)."""
    weight, bias, x = draw(rng, 5, 6), draw(rng, 6), draw(rng, 2, 3, 5)
    scales_outputs = acts_on == "in"
    factors = draw(rng, 6 if scales_outputs else 5)
    adapter = IA3(factors, acts_on=acts_on, on_bias=scales_outputs, stored="conv1d")  # type: ignore[arg-type]
    assert adapter.side == ("output" if scales_outputs else "input")
    layer = Layer("hf_conv1d")
    new_weight, new_bias = adapter.merged(weight, bias, strength)
    wanted = layer.apply(x, new_weight, new_bias)
    if scales_outputs:
        found = adapter.mapped(layer.apply(x, weight, bias), layer, bias, strength)
    else:
        found = layer.apply(adapter.turned(x, layer, strength), weight, bias)
    close(found, wanted, 1e-5)


def test_parts_join_in_one_convention_only(rng: Generator) -> None:
    a, b = draw(rng, 4, 1), draw(rng, 3, 1)
    joined = IA3.fuse([IA3(a), 2, IA3(b.half())])
    weight = draw(rng, 9, 5)
    wanted = torch.cat([weight[:4] * a, weight[4:6], weight[6:] * b.half()])
    close(joined.merged(weight)[0], wanted)
    with pytest.raises(CannotFuse, match="different conventions"):
        IA3.fuse([IA3(a), IA3(b, centred=True)])
    with pytest.raises(CannotFuse, match="beside untouched rows"):
        IA3.fuse([IA3(a, centred=True), 2])
