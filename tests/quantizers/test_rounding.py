"""Codebooks, grids, and the roundings that keep a change smaller than half a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftsurgery.errors import UsageError
from peftsurgery.quantizers.bitsandbytes4 import NF4_LEVELS
from peftsurgery.quantizers.books import Codebook, Float8, Integers
from peftsurgery.quantizers.grids import Grid, nearest
from peftsurgery.quantizers.packed import better_scales
from peftsurgery.quantizers.rounding import blocks, feedback, feedback_factor, stochastic, subspace

BOOKS = {
    "nf4": Codebook(torch.tensor(NF4_LEVELS)),
    "e2m1": Codebook(
        torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    ),
    "int8": Integers(-127, 127),
    "int4": Integers(0, 15),
    "shifted": Integers(-8, 7, 8),
    "e4m3": Float8(torch.float8_e4m3fn),
    "e5m2": Float8(torch.float8_e5m2),
}


@pytest.fixture(params=BOOKS)
def book(request: pytest.FixtureRequest) -> Codebook:
    return BOOKS[request.param]


def values_between(book: Codebook, count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    span = min(book.high, 500.0) - max(book.low, -500.0)
    return torch.rand(count, generator=random) * span * 1.1 + max(book.low, -500.0) - 0.05 * span


def test_the_nearest_level_is_found(book: Codebook) -> None:
    wanted = values_between(book, 5000, 1)
    found = book.values(book.nearest(wanted))
    finite = book.table[torch.isfinite(book.table)]
    best = (wanted[:, None] - finite).abs().amin(1)
    assert torch.equal((wanted - found).abs(), best)


def test_a_level_is_its_own_nearest(book: Codebook) -> None:
    assert torch.equal(book.values(book.nearest(book.levels)), book.levels)


def test_neighbours_hold_the_value_between_them(book: Codebook) -> None:
    wanted = values_between(book, 3000, 2)
    lower, upper, share = book.between(wanted)
    low, high = book.values(lower), book.values(upper)
    inside = (wanted >= book.low) & (wanted <= book.high)
    assert bool((low < high).all())
    exact = low.double() + share.double() * (high.double() - low.double())
    error = (exact - wanted.double()).abs()[inside]
    assert float(error.max()) < 1e-5 * max(abs(book.low), 1.0)
    assert bool(((share >= 0) & (share <= 1)).all())


def grid_for(rows: int, columns: int, group: int, seed: int) -> Grid:
    random = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    scale = torch.rand(rows, groups, generator=random) + 0.5
    zero = torch.randint(0, 15, (rows, groups), generator=random).float()
    return Grid(BOOKS["int4"], scale, zero, group=group)


@pytest.mark.parametrize("group", [0, 16, 10])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_quick_nearest_is_as_near_as_the_nearest(
    book: Codebook, group: int, shifted: bool
) -> None:
    random = torch.Generator().manual_seed(11)
    count = -(-48 // group) if group else 1
    scale = torch.rand(5, count, generator=random) + 0.5
    scale[2, 0] = 0.0
    zero = torch.randn(5, count, generator=random) if shifted else None
    grid = Grid(book, scale, zero, zero, group=group, factor=0.75)
    weight = grid.placed(values_between(book, 5 * 48, 10).reshape(5, 48))
    codes = torch.empty(weight.shape, dtype=book.dtype)
    given = torch.randn(5, 48, generator=random)
    errors = grid.errors(given, weight, codes)
    values = grid.values(codes)
    looked_up = book.values(codes).abs() * scale.max() * 2**-15
    if isinstance(book, Integers | Float8):  # which are not looked up
        looked_up.zero_()
    assert bool(((given - values - errors).abs() <= looked_up).all())
    assert torch.equal(grid.errors(given, weight), errors)
    best = (grid.values(grid.nearest(weight)) - weight).abs()
    span = (min(book.high, 500.0) - max(book.low, -500.0)) * float(scale.max())
    assert bool(((values - weight).abs() <= best + span / 4096).all())
    for start, stop in ((0, 16), (16, 48), (5, 37)):
        part = torch.empty(2, stop - start, dtype=book.dtype)
        columns, rows = slice(start, stop), slice(2, 4)
        found = grid.errors(given[rows, columns], weight[rows, columns], part, start, 2)
        assert torch.equal(part, codes[rows, columns])
        assert torch.equal(found, errors[rows, columns])


FLOATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@pytest.mark.parametrize("name", FLOATS)
def test_eight_bit_floats_are_those_of_torch(name: str) -> None:
    dtype = getattr(torch, name)
    book, every = Float8(dtype), torch.arange(256, dtype=torch.uint8)
    assert torch.equal(
        book.values(every).nan_to_num(7e7), every.view(dtype).float().nan_to_num(7e7)
    )
    few = every[torch.isfinite(book.table)]  # without a NaN they are found another way
    assert torch.equal(book.values(few), few.view(dtype).float())
    levels = book.levels
    between = torch.cat((levels, book.middles, book.middles.nextafter(levels[1:])))
    units = torch.cat((between, values_between(book, 4000, 5), torch.tensor([1e9, -1e9, -1e-30])))
    assert torch.equal(book.near(units.clone()), book.values(book.nearest(units)))
    codes = torch.empty(len(units), dtype=torch.uint8)
    values = book.near(units.clone(), codes)
    assert torch.equal(book.values(codes), values)
    lower, upper, share = book.between(units)
    low, high = book.values(lower), book.values(upper)
    place = torch.searchsorted(levels, low)
    assert torch.equal(levels[place], low)
    inside = (share > 0) & (share < 1)
    assert torch.equal(levels[place + 1][inside], high[inside])


def test_codes_of_one_value_are_alike() -> None:
    book = Codebook(torch.tensor([0.0, 1.0, -0.0, 1.0, torch.nan, torch.inf, torch.inf, 2.0]))
    codes = torch.arange(8, dtype=torch.uint8)
    found = book.alike(codes[:, None].expand(8, 8), codes.expand(8, 8).contiguous())
    same = [(0, 2), (2, 0), (1, 3), (3, 1), (0, 0), (2, 2), (1, 1), (3, 3)]
    assert sorted(map(tuple, found.nonzero().tolist())) == sorted(same)


def test_scales_change_only_where_that_rounds_better() -> None:
    random = torch.Generator().manual_seed(12)
    book = BOOKS["int8"]
    matrix = torch.randn(3000, 100, generator=random)  # of several pieces
    old = matrix.abs().amax(1) / 127
    matrix[7] *= 3
    matrix[9] = 0
    held = Grid(book, old[:, None]).values(torch.full((3000, 100), 100, dtype=torch.int8))
    matrix[11] = held[11]  # on its grid, and on that of the new scale
    new = matrix.abs().amax(1) / 127
    found = better_scales(matrix, old, new, old != new, lambda scale: Grid(book, scale))
    changed = (found != old).nonzero()[:, 0]
    assert changed.tolist() == [7]
    assert float(found[7]) == float(new[7])


@pytest.mark.parametrize(("columns", "group"), [(64, 16), (50, 16), (7, 1), (33, 64)])
def test_a_grid_in_parts_is_the_whole_grid(columns: int, group: int) -> None:
    grid = grid_for(6, columns, group, 3)
    codes = torch.randint(0, 16, (6, columns), dtype=torch.uint8)
    whole = grid.values(codes)
    for start in (0, 1, columns // 2):
        assert torch.equal(grid.values(codes[:, start:], start), whole[:, start:])
        assert torch.equal(grid.nearest(whole[:, start:], start), codes[:, start:])
    assert torch.equal(grid.rows(2, 5).values(codes[2:5]), whole[2:5])


def test_an_act_order_grid_takes_the_group_of_each_column() -> None:
    order = torch.randperm(24) // 8
    scale = torch.tensor([[1.0, 10.0, 100.0]])
    grid = Grid(BOOKS["int4"], scale, group=8, order=order)
    found = grid.values(torch.ones(2, 24, dtype=torch.uint8))
    assert torch.equal(found[0], scale[0][order])
    sums = grid.grouped(torch.ones(2, 24))
    assert torch.equal(sums, torch.full((2, 3), 8.0))


def test_nearest_keeps_codes_that_mean_the_same() -> None:
    grid = Grid(BOOKS["e2m1"], torch.tensor([[1.0], [0.0]]))
    before = torch.tensor([[0, 8, 3, 8], [5, 8, 2, 1]], dtype=torch.uint8)  # 8 is -0
    again = nearest(grid.values(before), grid, before)
    assert torch.equal(again, before)
    moved = grid.values(before).clone()
    moved[0, 0] = 2.9
    assert nearest(moved, grid, before)[0].tolist() == [5, 8, 3, 8]


def test_stochastic_rounding_is_right_on_average(book: Codebook) -> None:
    wanted = values_between(book, 60, 4).clamp(book.low, book.high)[None].repeat(4000, 1)
    grid = Grid(book, torch.tensor([[0.37]]))
    random = torch.Generator().manual_seed(5)
    found = grid.values(stochastic(wanted * 0.37, grid, random)) / 0.37
    lower, upper, _ = book.between(wanted[0])
    step = book.values(upper) - book.values(lower)
    assert bool(((found.mean(0) - wanted[0]).abs() < 0.05 * step + 1e-6).all())


def test_blocks_cover_all_columns_and_end_small() -> None:
    for columns in (1, 2, 3, 17, 64, 1000):
        found = blocks(columns)
        assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
        assert found[-1][1] == columns
        assert found[-1][1] - found[-1][0] <= 2


@pytest.mark.parametrize("book", ["nf4", "e4m3", "int4"])
def test_subspace_keeps_a_change_that_nearest_swallows(book: str) -> None:
    random = torch.Generator().manual_seed(6)
    weight = torch.randn(256, 512, generator=random)
    group = 64
    largest = weight.reshape(256, -1, group).abs().amax(2)
    if book == "int4":
        grid = Grid(BOOKS[book], largest / 7, torch.full_like(largest, 8.0), group=group)
    else:
        grid = Grid(BOOKS[book], largest / BOOKS[book].high, group=group)
    base = grid.values(grid.nearest(weight))
    down = torch.randn(4, 512, generator=random)
    change = torch.randn(256, 4, generator=random) @ down
    change *= 0.01 * base.norm() / change.norm()
    basis = torch.linalg.qr(down.T).Q
    kept = {}
    error = {}
    for name, codes in (
        ("nearest", grid.nearest(base + change)),
        ("subspace", subspace(base + change, grid, basis)),
        ("stochastic", stochastic(base + change, grid, random)),
    ):
        written = grid.values(codes)
        kept[name] = float(((written - base) * change).sum() / change.square().sum())
        error[name] = float((written - base - change).norm())
    assert kept["subspace"] > 0.95
    assert kept["nearest"] < (0.6 if book == "e4m3" else 0.1)
    assert error["subspace"] < error["stochastic"]


def test_subspace_in_one_direction_is_sigma_delta() -> None:
    """With V = 1/√n the sum of every row is kept: within a step of the smallest block."""
    random = torch.Generator().manual_seed(7)
    weight = torch.rand(20, 200, generator=random) * 0.9
    grid = Grid(BOOKS["int4"], torch.ones(1, 1))
    basis = torch.full((200, 1), 200**-0.5)
    written = grid.values(subspace(weight, grid, basis, 1e6))
    assert float((written - weight).sum(1).abs().max()) < 1.5
    assert float((grid.values(grid.nearest(weight)) - weight).sum(1).abs().max()) > 5


def test_feedback_with_any_gram_lowers_the_error_of_the_outputs() -> None:
    random = torch.Generator().manual_seed(8)
    inputs = torch.randn(400, 96, generator=random) @ torch.randn(96, 96, generator=random)
    weight = torch.randn(64, 96, generator=random)
    grid = Grid(BOOKS["int4"], weight.abs().amax(1, keepdim=True) / 7, torch.full((64, 1), 8.0))
    plain, fed = (
        float(((grid.values(codes) - weight) @ inputs.T).norm())
        for codes in (
            grid.nearest(weight),
            feedback(weight, grid, feedback_factor(inputs.T @ inputs)),
        )
    )
    assert fed < 0.7 * plain


def test_feedback_of_a_subspace_gram_agrees_with_subspace() -> None:
    """H = 1 + λVVᵀ given in full, one column at a time, loses as little as the low-rank form."""
    random = torch.Generator().manual_seed(9)
    weight = torch.randn(64, 128, generator=random)
    grid = Grid(BOOKS["int4"], weight.abs().amax(1, keepdim=True) / 7, torch.full((64, 1), 8.0))
    basis = torch.linalg.qr(torch.randn(128, 3, generator=random)).Q
    gram = torch.eye(128) + 1000 * basis @ basis.T
    both = (
        feedback(weight, grid, feedback_factor(gram, None, 1e-9)),
        subspace(weight, grid, basis),
    )
    first, second = (float(((grid.values(c) - weight) @ basis).norm()) for c in both)
    none = float(((grid.values(grid.nearest(weight)) - weight) @ basis).norm())
    assert first < 0.2 * none
    assert second < 1.5 * first


def test_wrong_sizes_are_refused() -> None:
    grid = Grid(BOOKS["int4"], torch.ones(1, 1))
    with pytest.raises(UsageError, match="columns"):
        subspace(torch.zeros(2, 5), grid, torch.zeros(4, 1))
    with pytest.raises(UsageError, match="positive definite"):
        feedback_factor(torch.diag(torch.tensor([1.0, -2.0, 5.0])))
    with pytest.raises(UsageError, match="not square"):
        feedback_factor(torch.zeros(2, 5))
    with pytest.raises(UsageError, match="columns"):
        feedback(torch.zeros(2, 5), grid, torch.eye(4))
