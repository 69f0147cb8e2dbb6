"""GLoRA: joining, fitting, zero."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from peftsurgery.algorithms import GLoRA, LoRA
from peftsurgery.errors import CannotFuse
from tests.algorithms.cases import close, draw


def fresh(rng: Generator, o: int, i: int = 8, r: int = 3, **options: float) -> GLoRA:
    shapes = ((i, r), (r, i), (o, r), (r, i))
    return GLoRA(*(draw(rng, *s) for s in shapes), **options)  # type: ignore[arg-type]


def test_parts_with_the_same_inputs_join(rng: Generator) -> None:
    whole = fresh(rng, 9, scale=0.4)
    parts = [whole.rows(0, 4), whole.rows(4, 9)]
    joined = GLoRA.fuse(parts)
    weight = draw(rng, 9, 8)
    close(joined.merged(weight)[0], whole.merged(weight)[0])
    for others in ([whole, fresh(rng, 9)], [whole, 3], [whole, whole.with_tensors(scale=0.5)]):
        with pytest.raises(CannotFuse, match="one weight has one input"):
            GLoRA.fuse(others)
    with pytest.raises(CannotFuse, match="different b2"):
        GLoRA.fuse([whole, whole.with_tensors(b2=draw(rng, 3, 8))])


@pytest.mark.parametrize("rank", [None, 2, "energy:0.9"])
def test_a_fit_is_the_loras_on_any_base(rank: int | str | None, rng: Generator) -> None:
    source = LoRA(draw(rng, 9, 3), draw(rng, 3, 8), scale=0.7)
    fitted = GLoRA.fit(source, rank)
    wanted = LoRA.fit(source, rank).delta()
    for _ in range(2):
        close(fitted.delta(draw(rng, 9, 8)), wanted, 1e-5)


def test_zero_needs_a_zero_factor_in_both_halves(rng: Generator) -> None:
    adapter = fresh(rng, 9)
    half = adapter.with_tensors(a2=torch.zeros(3, 8))
    assert not half.is_zero()
    assert half.with_tensors(b1=torch.zeros(9, 3)).is_zero()
    assert adapter.with_tensors(scale=0.0).is_zero()
    assert not half.with_tensors(b1=torch.zeros(9, 3), bias=torch.ones(9)).is_zero()
