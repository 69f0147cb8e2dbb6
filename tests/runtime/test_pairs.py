"""forward == merged for every ordered pair of algorithms of the registry on one layer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Generator, Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftsurgery import runtime
from peftsurgery.errors import UnsupportedError, UsageError
from tests.algorithms.cases import close
from tests.algorithms.starts import STARTS
from tests.runtime.models import scramble

LAYERS = ("linear", "hf_conv1d", "conv", "grouped", "point", "embedding")
NOT_ON = {  # algorithms that have no meaning on such a layer and say so
    "hf_conv1d": {"road", "road-4"},
    "conv": {"delora", "tokens"},
    "grouped": {"delora", "tokens"},
    "point": {"delora", "tokens"},
    "embedding": {"road", "road-4"},
    "linear": set(),
}


def built(kind: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A layer of 8 inputs and 12 outputs with a bias (12 rows of 8 for an embedding), and an
    input of it."""
    rng = Generator().manual_seed(11)
    layer: nn.Module
    if kind == "embedding":
        layer, x = nn.Embedding(12, 8), torch.randint(0, 12, (3, 5), generator=rng)
    elif kind == "linear":
        layer, x = nn.Linear(8, 12), torch.randn(3, 8, generator=rng)
    elif kind == "hf_conv1d":
        layer, x = Conv1D(12, 8), torch.randn(3, 8, generator=rng)
    else:
        size, groups = (1, 1) if kind == "point" else (3, 2 if kind == "grouped" else 1)
        layer = nn.Conv2d(8, 12, size, padding=size // 2, groups=groups, stride=2)
        x = torch.randn(2, 8, 5, 4, generator=rng)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    return layer.to(dtype).eval(), x.to(dtype) if x.is_floating_point() else x


def put(layer: nn.Module, start: str, name: str, strength: float) -> None:
    algorithm, options = STARTS[start]
    rng = Generator().manual_seed(sum(map(ord, start + name)))
    found = runtime.attach(
        layer,
        algorithm,
        targets=lambda path, module: True,
        name=name,
        generator=rng,
        **options,
    )
    scramble(found, rng, 0.3)
    runtime.set_strength(layer, strength, name)


@functools.cache
def refusal(start: str, kind: str) -> str | None:
    """Why this algorithm does not start on such a layer."""
    try:
        put(built(kind, torch.float32)[0], start, "one", 1.0)
    except (UsageError, UnsupportedError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", LAYERS)
def test_what_does_not_start_says_so(kind: str) -> None:
    assert {start for start in STARTS if refusal(start, kind) is not None} == NOT_ON[kind]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("first", STARTS)
def test_forward_is_merged(first: str, kind: str) -> None:
    if first in NOT_ON[kind]:
        assert refusal(first, kind)
        return
    for second in set(STARTS) - NOT_ON[kind]:
        layer, x = built(kind, torch.float32)
        base = layer(x)
        put(layer, first, "one", 0.7)
        put(layer, second, "two", -0.6)
        live = layer(x)
        assert float((live - base).detach().norm() / base.detach().norm()) > 1e-3, second
        runtime.merge(layer)
        try:
            close(layer(x), live, 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{first}, then {second}: {error}") from error
        runtime.unmerge(layer)
        assert torch.equal(layer(x), live), second


@pytest.mark.parametrize("first", STARTS)
def test_forward_is_merged_on_a_bf16_base(first: str) -> None:
    """To the rounding of the merged weight and of the two outputs."""
    for second in set(STARTS) - NOT_ON["linear"]:
        layer, x = built("linear", torch.bfloat16)
        put(layer, first, "one", 0.7)
        put(layer, second, "two", -0.6)
        live = layer(x)
        assert live.dtype == torch.bfloat16
        runtime.merge(layer)
        try:
            close(layer(x), live, 2e-2)
        except AssertionError as error:
            raise AssertionError(f"{first}, then {second}: {error}") from error
