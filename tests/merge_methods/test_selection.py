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


@pytest.mark.parametrize("columns", [1.0, 0.01])
def test_a_good_sample_saves_a_reading(columns: float) -> None:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(4096, 40, generator=generator).abs()
    numbers[:, 20:] *= columns
    readings = 0

    def read() -> tuple[torch.Tensor, ...]:
        nonlocal readings
        readings += 1
        return numbers.split(4)

    ranks = [1, 20, 50000, 120000, numbers.numel()]
    expected = numbers.flatten().sort(descending=True).values
    for rank in ranks:
        readings = 0
        found = largest(read, [rank], sample=lambda: numbers.split(4)[::8], count=numbers.numel())
        assert found == [float(expected[rank - 1])]
        assert readings == 1


@pytest.mark.parametrize("misleading", ["smaller", "larger", "zeros", "equal"])
def test_a_misleading_sample_is_found_out(misleading: str) -> None:
    generator = torch.Generator().manual_seed(4)
    numbers = torch.randn(300, 40, generator=generator).abs()
    sample = {
        "smaller": numbers * 1e-3,
        "larger": numbers * 1e3,
        "zeros": torch.zeros(7, 3),
        "equal": torch.full((30, 30), float(numbers.median())),
    }[misleading]
    expected = numbers.flatten().sort(descending=True).values
    for rank in (1, 17, 3600, 11999, 12000):
        found = largest(lambda: numbers.split(7), [rank], sample=lambda: [sample], count=12000)
        assert found == [float(expected[rank - 1])]
