"""The k-th largest, exactly, whatever the tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.merge_methods.selection import largest


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(0, 2.0**127, width=32),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 7),
    st.data(),
)
def test_any_numbers(values: list[float], step: int, data: st.DataObject) -> None:
    numbers = torch.tensor(values, dtype=torch.float32)
    ranks = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=3))
    found = largest(lambda: numbers.split(step), ranks)
    expected = numbers.sort(descending=True).values
    assert found == [float(expected[rank - 1]) for rank in ranks]


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e30])
def test_neighbours_in_the_last_bit(scale: float) -> None:
    one = torch.tensor(scale, dtype=torch.float32)
    numbers = torch.stack([one, torch.nextafter(one, one * 2), torch.nextafter(one, one * 0), one])
    found = largest(lambda: [numbers], [1, 2, 3, 4])
    assert found == numbers.sort(descending=True).values.tolist()


def test_many_equal_ones() -> None:
    numbers = torch.full((1000,), 0.125)
    numbers[::10] = 0.0
    assert largest(lambda: numbers.split(77), [1, 900, 901, 1000]) == [0.125, 0.125, 0.0, 0.0]
