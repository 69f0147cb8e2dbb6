"""Scales shared by tiles, against a loop over the weights."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.tiles import Tiles, tiled

SIDES = st.integers(1, 9)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**31))
def test_tiles(stack: int, rows: int, columns: int, height: int, width: int, seed: int) -> None:
    tiles = Tiles(stack, rows, columns, height, width)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(stack * rows, columns, generator=generator)
    scales = torch.rand(stack * tiles.down, tiles.across, generator=generator) + 0.1
    largest = torch.zeros_like(scales)
    error = torch.zeros_like(scales)
    unit = torch.empty_like(matrix)
    for row in range(stack * rows):
        for column in range(columns):
            down = row // rows * tiles.down + row % rows // height
            place = (down, column // width)
            weight, unit[row, column] = matrix[row, column], scales[place]
            largest[place] = max(largest[place], weight.abs())
            level = (weight / scales[place]).round().clamp(-3, 3)
            error[place] += (level * scales[place] - weight) ** 2
    assert torch.equal(tiles.largest(matrix), largest)
    grid = Grid(Integers(-3, 3), tiles.spread(scales, 0, stack * rows), group=width)
    assert torch.allclose(tiles.error(matrix, grid), error, rtol=1e-4, atol=1e-6)
    only = torch.rand(error.shape, generator=generator) < 0.3
    some = tiles.error(matrix, grid, only)
    assert torch.allclose(some[only], error[only], rtol=1e-4, atol=1e-6)
    assert not bool(some[~only.any(1)].any())
    ones = torch.ones(1, columns, dtype=torch.int8)
    for start in range(stack * rows):
        window = Grid(Integers(-3, 3), tiles.spread(scales, start, start + 1), group=width)
        assert torch.equal(window.values(ones)[0], unit[start])


def sides(found: Tiles | None) -> tuple[int, ...] | None:
    return found and (found.stack, found.rows, found.columns, found.height, found.width)


# shape, that of its scales, stacked, block -> stack, rows, columns, height, width
SHAPES: list[
    tuple[tuple[int, ...], tuple[int, ...], bool, tuple[int, int] | None, tuple[int, ...] | None]
] = [
    ((6, 8), (), False, None, (1, 6, 8, 6, 8)),
    ((6, 8), (1,), False, None, (1, 6, 8, 6, 8)),
    ((6, 8), (6,), False, None, (1, 6, 8, 1, 8)),
    ((6, 8), (6, 1), False, None, (1, 6, 8, 1, 8)),
    ((6, 8), (6, 2, 1), False, None, (1, 6, 8, 1, 4)),
    ((6, 8), (3, 2), False, None, (1, 6, 8, 2, 4)),
    ((130, 300), (2, 3), False, None, (1, 130, 300, 65, 100)),
    ((130, 300), (2, 3), False, (128, 128), (1, 130, 300, 128, 128)),
    ((131, 300), (2, 3), False, None, (1, 131, 300, 128, 100)),
    ((130, 300), (5, 4), False, (128, 128), (1, 130, 300, 26, 75)),
    ((6, 8, 3, 3), (6, 1, 1, 1), False, None, (1, 6, 72, 1, 72)),
    ((6, 8, 3, 3), (6, 8), False, None, None),
    ((2, 6, 8), (2, 3, 2), True, None, (2, 6, 8, 2, 4)),
    ((2, 6, 8), (2,), True, None, (2, 6, 8, 6, 8)),
    ((2, 6, 8), (1,), True, None, (1, 12, 8, 12, 8)),
    ((2, 6, 8), (3, 1, 1), True, None, None),
    ((6, 8), (4, 8), False, None, None),
    ((6, 8), (7, 1), False, None, None),
    ((6, 8), (0, 1), False, None, None),
    ((6, 8), (1, 2, 3, 4), False, None, None),
]


def test_shapes_of_scales() -> None:
    for shape, scales, stacked, block, wanted in SHAPES:
        found = tiled(shape, scales, stacked=stacked, block=block)
        assert sides(found) == wanted, (shape, scales, stacked, block)
