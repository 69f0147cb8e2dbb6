"""Splitting and joining along the output rows: exact, sharing what can be shared, or refused."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from peftsurgery.algorithms import (
    Full,
    LoHa,
    LoKr,
    LoRA,
    Replace,
    WeightAdapter,
    difference,
    split_blocks,
    swap_halves,
)
from peftsurgery.errors import CannotFuse, CannotSplit, UsageError
from tests.algorithms.cases import ALL, IDS, LAYERS, Case, close, draw

OWN = [n for n, (case, _) in enumerate(ALL) if case.name != "delora"]  # its parts are LoRAs
every = pytest.mark.parametrize(("case", "layer"), [ALL[n] for n in OWN], ids=[IDS[n] for n in OWN])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def stack(*deltas: Tensor) -> Tensor:
    return torch.cat(deltas)


def fused(parts: list[WeightAdapter | int]) -> WeightAdapter:
    first = next(p for p in parts if not isinstance(p, int))
    return type(first).fuse(parts)


# --- every algorithm ------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_then_fuse_is_the_identity(
    case: Case, layer: str, dtype: torch.dtype, rng: Generator
) -> None:
    shape = LAYERS[layer]
    half = shape[0] // 2
    adapter = case.make(shape, rng, dtype).with_tensors(bias=draw(rng, shape[0]))
    delta = adapter.delta()
    parts = [adapter.rows(0, half), adapter.rows(half, shape[0])]
    for part, rows in zip(parts, (delta[:half], delta[half:]), strict=True):
        assert type(part) is type(adapter)
        close(part.delta(), rows)
    joined = fused(list(parts))
    assert torch.equal(joined.delta(), delta)
    assert joined.rank == adapter.rank
    assert joined.bias is not None
    assert adapter.bias is not None
    assert torch.equal(joined.bias, adapter.bias)
    assert difference(joined, adapter) == 0.0
    assert adapter.rows(0, shape[0]) is adapter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_delora_are_loras_of_the_same_change(dtype: torch.dtype, rng: Generator) -> None:
    """Its norms run over all rows: neither a range of them nor a fusion has one norm again."""
    (make,) = {case.make for case, _ in ALL if case.name == "delora"}
    whole = make((12, 10), rng, dtype).with_tensors(bias=draw(rng, 12))
    parts = [whole.rows(0, 5), whole.rows(5, 12)]
    assert [type(part) for part in parts] == [LoRA, LoRA]
    close(stack(*(part.delta() for part in parts)), whole.delta())
    other = make((4, 10), rng, dtype).with_tensors(bias=draw(rng, 4))
    joined = type(whole).fuse([whole, 3, other])
    assert isinstance(joined, LoRA)
    close(joined.delta(), stack(whole.delta(), torch.zeros(3, 10), other.delta()))
    assert joined.bias is not None
    assert whole.bias is not None
    assert torch.equal(joined.bias[:12], whole.bias)


@every
def test_swap_halves_twice_is_the_identity(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    half = shape[0] // 2
    adapter = case.make(shape, rng, torch.bfloat16).with_tensors(bias=draw(rng, shape[0]))
    once = swap_halves(adapter)
    assert torch.equal(once.delta(), adapter.delta().roll(half, 0))
    assert once.bias is not None
    assert adapter.bias is not None
    assert torch.equal(once.bias, adapter.bias.roll(half))
    assert once.rank == adapter.rank
    assert difference(swap_halves(once), adapter) == 0.0


@every
def test_missing_parts_are_untouched_rows(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    if case.name.startswith("lokr"):
        return  # its own test below
    adapter = case.make(shape, rng, torch.float16).with_tensors(bias=draw(rng, shape[0]))
    joined = fused([3, adapter, 5])
    wanted = torch.zeros(shape[0] + 8, *shape[1:])
    wanted[3:-5] = adapter.delta()
    assert torch.equal(joined.delta(), wanted)
    assert joined.bias is not None
    assert float(joined.bias[:3].abs().sum() + joined.bias[-5:].abs().sum()) == 0
    assert joined.rank == adapter.rank


@every
def test_unrelated_parts_of_any_scale(case: Case, layer: str, rng: Generator) -> None:
    if case.name.startswith("lokr"):
        return
    shape = LAYERS[layer]
    parts: list[WeightAdapter] = []
    for rows, scale in ((shape[0], 0.0), (4, 0.5), (6, 4.0), (2, -0.3)):
        part = case.make((rows, *shape[1:]), rng, torch.float32)
        parts.append(part.with_tensors(scale=scale))
    joined = fused([parts[0], parts[1], 2, parts[2], parts[3]])
    gap = torch.zeros(2, *shape[1:])
    close(
        joined.delta(),
        stack(*(p.delta() for p in parts[:2]), gap, *(p.delta() for p in parts[2:])),
        1e-6,
    )
    assert float(joined.scale) == 0.5
    if joined.rank is not None:
        assert joined.rank == sum(p.rank or 0 for p in parts)


@every
def test_dora_per_output_moves_with_its_rows(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    if layer == "norm":
        return
    half = shape[0] // 2
    magnitude = draw(rng, shape[0]).abs()
    adapter = case.make(shape, rng, torch.float32)
    adapter = adapter.with_tensors(magnitude=magnitude, magnitude_axis="out")
    weight = draw(rng, *shape)
    merged = adapter.merged(weight)[0]
    parts = [adapter.rows(0, half), adapter.rows(half, shape[0])]
    close(stack(parts[0].merged(weight[:half])[0], parts[1].merged(weight[half:])[0]), merged)
    assert torch.equal(fused(list(parts)).merged(weight)[0], merged)
    close(swap_halves(adapter).merged(weight.roll(half, 0))[0], merged.roll(half, 0))
    with pytest.raises(CannotFuse, match="untouched rows"):
        fused([adapter, shape[0]])
    with pytest.raises(CannotFuse, match="magnitude"):
        fused([adapter, adapter.with_tensors(magnitude=None, magnitude_axis=None)])


@every
def test_dora_per_input_stays_whole(case: Case, layer: str, rng: Generator) -> None:
    shape = LAYERS[layer]
    if layer == "norm":
        return
    adapter = case.make(shape, rng, torch.float32)
    adapter = adapter.with_tensors(magnitude=draw(rng, shape[1]).abs(), magnitude_axis="in")
    with pytest.raises(CannotSplit, match="per-input DoRA"):
        adapter.rows(0, 2)
    with pytest.raises(CannotFuse, match="per-output"):
        fused([adapter, adapter])
    weight = draw(rng, *shape)
    half = shape[0] // 2
    swapped = swap_halves(adapter)
    close(swapped.merged(weight.roll(half, 0))[0], adapter.merged(weight)[0].roll(half, 0))


# --- LoRA -----------------------------------------------------------------------------------------


def test_a_split_shares_down_and_a_fusion_finds_it_again(rng: Generator) -> None:
    adapter = LoRA(draw(rng, 12, 3), draw(rng, 3, 5), scale=0.5)
    parts = [adapter.rows(n, n + 4) for n in (0, 4, 8)]
    assert all(isinstance(p, LoRA) and p.down is adapter.down for p in parts)
    assert parts[1].tensors()["up"].data_ptr() == adapter.up[4:].data_ptr()
    copies = [p.with_tensors(down=adapter.down.detach().clone()) for p in parts]
    joined = LoRA.fuse([copies[0], 4, copies[2]])
    assert joined.rank == 3
    wanted = adapter.delta()
    wanted[4:8] = 0
    assert torch.equal(joined.delta(), wanted)


def test_parts_that_share_down_in_pairs(rng: Generator) -> None:
    down, other = draw(rng, 3, 5), draw(rng, 2, 5)
    ups = [draw(rng, 4, 3), draw(rng, 4, 2), draw(rng, 4, 3)]
    parts: list[WeightAdapter | int] = [
        LoRA(ups[0], down, scale=0.7),
        LoRA(ups[1], other, scale=1.4),
        LoRA(ups[2], down.clone(), scale=0.35),
    ]
    joined = LoRA.fuse(parts)
    assert joined.rank == 5
    close(joined.delta(), stack(*(p.delta() for p in parts if not isinstance(p, int))))


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_mixed_dtypes_are_promoted_without_loss(
    first: torch.dtype, second: torch.dtype, wanted: torch.dtype, rng: Generator
) -> None:
    a = LoRA(draw(rng, 4, 2, dtype=first), draw(rng, 2, 5, dtype=first), scale=2.0)
    b = LoRA(draw(rng, 6, 3, dtype=second), draw(rng, 3, 5, dtype=second), scale=0.5)
    joined = LoRA.fuse([a, b])
    assert {t.dtype for t in joined.tensors().values()} == {wanted}
    assert torch.equal(joined.delta(), stack(a.delta(), b.delta()))


def test_a_scale_ratio_that_overflows_stays_in_fp32(rng: Generator) -> None:
    a = LoRA(draw(rng, 4, 2).half(), draw(rng, 2, 5).half(), scale=1e-4)
    b = LoRA(draw(rng, 4, 2).half() * 100, draw(rng, 2, 5).half(), scale=1.0)
    joined = LoRA.fuse([a, b])
    close(joined.delta(), stack(a.delta(), b.delta()))


def test_up_of_either_dimensionality(rng: Generator) -> None:
    a = LoRA(draw(rng, 4, 2), draw(rng, 2, 5, 3, 3))
    b = LoRA(draw(rng, 4, 3, 1, 1), draw(rng, 3, 5, 3, 3))
    c, d = (
        LoRA(draw(rng, 4, 2, 1, 1), draw(rng, 2, 5, 1, 1)),
        LoRA(draw(rng, 4, 2), draw(rng, 2, 5)),
    )
    for parts in ((a, b), (b, a), (c, d), (d, c)):
        joined = LoRA.fuse(parts)
        close(joined.delta().flatten(1), stack(*(p.delta().flatten(1) for p in parts)))


def test_split_blocks_undoes_a_block_diagonal_fusion(rng: Generator) -> None:
    parts = [
        LoRA(draw(rng, 4, r, 1, 1), draw(rng, r, 5, 3, 3), scale=0.5).with_tensors(
            bias=draw(rng, 4)
        )
        for r in (2, 1, 3)
    ]
    joined = LoRA.fuse(parts)
    split = [joined.rows(n, n + 4) for n in (0, 4, 8)]
    assert [p.rank for p in split] == [6, 6, 6]
    back = split_blocks([p for p in split if isinstance(p, LoRA)])
    assert [p.rank for p in back] == [2, 1, 3]
    for before, after in zip(parts, back, strict=True):
        assert difference(before, after) == 0.0
        assert after.down.data_ptr() != before.down.data_ptr()


def test_split_blocks_in_the_tucker_form(rng: Generator) -> None:
    parts = [
        LoRA(draw(rng, 4, m, 1, 1), draw(rng, n, 5, 1, 1), draw(rng, m, n, 3, 3), scale=2.0)
        for m, n in ((2, 3), (1, 2))
    ]
    joined = LoRA.fuse(parts)
    close(joined.delta(), stack(*(p.delta() for p in parts)))
    halves = [joined.rows(0, 4), joined.rows(4, 8)]
    back = split_blocks([p for p in halves if isinstance(p, LoRA)])
    assert [difference(p, q) for p, q in zip(parts, back, strict=True)] == [0.0, 0.0]


def test_split_blocks_leaves_dense_patterns_alone(rng: Generator) -> None:
    adapter = LoRA(draw(rng, 8, 3), draw(rng, 3, 5))
    halves = [adapter.rows(0, 4), adapter.rows(4, 8)]
    parts = [p for p in halves if isinstance(p, LoRA)]
    assert split_blocks(parts) == parts
    up = adapter.up.detach().clone()
    up[:4, 2] = 0  # overlapping in 0 and 1
    up[4:, 0] = 0
    parts = [LoRA(up[:4], adapter.down), LoRA(up[4:], adapter.down)]
    assert split_blocks(parts) == parts
    up[4:, 1] = 0
    up[:4, 1] = 0  # column 1 used by nobody
    parts = [LoRA(up[:4], adapter.down), LoRA(up[4:], adapter.down)]
    assert split_blocks(parts) == parts
    assert [p.compact().rank for p in parts] == [1, 1]
    assert [difference(p, p.compact()) for p in parts] == [0.0, 0.0]
    unrelated = [LoRA(up[:4], adapter.down), LoRA(up[4:], draw(rng, 3, 5))]
    assert split_blocks(unrelated) == unrelated


def test_compact_keeps_one_index_of_a_zero_adapter(rng: Generator) -> None:
    adapter = LoRA(torch.zeros(4, 3), draw(rng, 3, 5), scale=0.25)
    small = adapter.compact()
    assert small.rank == 1
    assert float(small.scale) == 0.25
    assert small.is_zero()


# --- LoHa, LoKr -----------------------------------------------------------------------------------


def test_loha_shares_its_input_side(rng: Generator) -> None:
    adapter = LoHa(draw(rng, 8, 2), draw(rng, 2, 5), draw(rng, 8, 2), draw(rng, 2, 5))
    part = adapter.rows(2, 5)
    assert isinstance(part, LoHa)
    assert part.w1_b is adapter.w1_b
    assert LoHa.fuse([adapter.rows(0, 2), 3, adapter.rows(5, 8)]).rank == 2


def lokr(rng: Generator, **changes: tuple[int, ...]) -> LoKr:
    shapes = {"w1": (4, 2), "w2": (3, 5)} | changes
    tensors: dict[str, Any] = {n: draw(rng, *s) for n, s in shapes.items() if s}
    return LoKr(**tensors, scale=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"w1": (), "w1_a": (4, 1), "w1_b": (1, 2)},
        {"w2": (), "w2_a": (3, 1), "w2_b": (1, 5)},
        {"w2": (), "w2_a": (2, 3), "w2_b": (2, 5), "t2": (2, 2, 3, 3)},
        {"w2": (3, 5, 3, 3)},
    ],
    ids=["full", "low w1", "low w2", "tucker", "conv"],
)
def test_lokr_rows(changes: dict[str, tuple[int, ...]], rng: Generator) -> None:
    adapter = lokr(rng, **changes)
    delta = adapter.delta()
    for start, stop in ((0, 3), (3, 9), (6, 12), (3, 4), (7, 9), (10, 11)):
        close(adapter.rows(start, stop).delta(), delta[start:stop])
    for start, stop in ((0, 4), (1, 5), (2, 12), (5, 7)):
        with pytest.raises(CannotSplit, match="blocks of 3 rows"):
            adapter.rows(start, stop)
    inside = [adapter.rows(3, 4), adapter.rows(4, 6)]
    close(LoKr.fuse(inside).delta(), delta[3:6])
    parts = [adapter.rows(0, 6), 3, adapter.rows(9, 12)]
    wanted = delta.clone()
    wanted[6:9] = 0
    assert torch.equal(LoKr.fuse(parts).delta(), wanted)
    louder = adapter.with_tensors(scale=1.5)
    close(LoKr.fuse([adapter, louder]).delta(), stack(delta, 3 * delta))


def test_lokr_joins_low_rank_first_factors(rng: Generator) -> None:
    w2 = draw(rng, 3, 5)
    parts = [LoKr(w1_a=draw(rng, 2, 1), w1_b=draw(rng, 1, 2), w2=w2) for _ in range(2)]
    close(LoKr.fuse(parts).delta(), stack(*(p.delta() for p in parts)))


def test_lokr_refusals(rng: Generator) -> None:
    adapter = lokr(rng)
    with pytest.raises(CannotFuse, match="--algorithm lora"):
        LoKr.fuse([adapter, lokr(rng)])
    with pytest.raises(CannotFuse, match="no multiple"):
        LoKr.fuse([adapter, 4])
    odd = LoKr(w1=draw(rng, 3, 2), w2=draw(rng, 2, 5))
    with pytest.raises(CannotSplit):
        swap_halves(odd)


# --- full, set, refusals --------------------------------------------------------------------------


def test_full_joins_bias_only_parts(rng: Generator) -> None:
    parts = [Full(draw(rng, 4, 3), scale=0.5, bias=draw(rng, 4)), Full(bias=draw(rng, 2))]
    joined = Full.fuse(parts)
    assert joined.bias is not None
    assert parts[0].bias is not None
    assert parts[1].bias is not None
    close(joined.delta(), stack(parts[0].delta(), torch.zeros(2, 3)))
    assert torch.equal(joined.bias, stack(parts[0].bias, parts[1].bias))
    bare = Full.fuse([Full(bias=draw(rng, 2)), 3])
    assert bare.bias is not None
    assert bare.bias.shape == (5,)


def test_values_need_every_part(rng: Generator) -> None:
    value = Replace(draw(rng, 4, 3), bias=draw(rng, 4))
    joined = Replace.fuse([value.rows(0, 1), value.rows(1, 4)])
    assert difference(joined, value) == 0.0
    with pytest.raises(CannotFuse, match="bias value"):
        Replace.fuse([value, 2])
    with pytest.raises(CannotFuse, match="untouched rows"):
        Replace.fuse([value.with_tensors(bias=None), 2])
    assert difference(swap_halves(swap_halves(value)), value) == 0.0


def test_refusals_name_the_reason(rng: Generator) -> None:
    plain = LoRA(draw(rng, 4, 2), draw(rng, 2, 5))
    with pytest.raises(CannotFuse, match="nothing to join"):
        LoRA.fuse([3, 4])
    with pytest.raises(CannotFuse, match="input sides"):
        LoRA.fuse([plain, LoRA(draw(rng, 4, 2), draw(rng, 2, 6))])
    with pytest.raises(CannotFuse, match="Full"):
        LoRA.fuse([plain, Full(draw(rng, 4, 5))])
    with pytest.raises(CannotFuse, match="pad"):
        LoRA.fuse([plain, plain.with_tensors(padded_shape=(4, 5))])
    kinds = [plain.with_tensors(bias=draw(rng, 4), bias_is_value=v) for v in (True, False)]
    with pytest.raises(CannotFuse, match="bias delta"):
        LoRA.fuse(kinds)
    with pytest.raises(CannotFuse, match="Tucker"):
        LoRA.fuse([plain, plain.with_tensors(mid=draw(rng, 2, 2))])
    with pytest.raises(UsageError, match="0 rows"):
        LoRA.fuse([plain, 0])
    with pytest.raises(CannotSplit, match="no halves"):
        swap_halves(LoRA(draw(rng, 5, 2), draw(rng, 2, 5)))
    conv1d = plain.with_tensors(stored="conv1d", bias=draw(rng, 5))
    with pytest.raises(CannotSplit, match="Conv1D"):
        conv1d.rows(0, 2)
    with pytest.raises(CannotFuse, match="Conv1D"):
        LoRA.fuse([conv1d, conv1d])
    with pytest.raises(UsageError, match="rows 2:9"):
        plain.rows(2, 9)


def test_carried_attributes(rng: Generator) -> None:
    adapter = LoRA(draw(rng, 6, 2), draw(rng, 2, 5), padded_shape=(6, 5), stored="embedding")
    parts = [adapter.rows(0, 2), adapter.rows(2, 6)]
    assert [(p.padded_shape, p.stored) for p in parts] == [
        ((2, 5), "embedding"),
        ((4, 5), "embedding"),
    ]
    joined = LoRA.fuse(parts)
    assert (joined.padded_shape, joined.stored) == ((6, 5), "embedding")


def test_rows_of_one_tensor_are_joined_without_a_copy(rng: Generator) -> None:
    whole = LoRA(torch.randn(12, 3, generator=rng), torch.randn(3, 5, generator=rng))
    parts = [whole.rows(a, b) for a, b in ((0, 4), (4, 5), (5, 12))]
    again = LoRA.fuse(parts)
    assert again.tensors()["up"].data_ptr() == whole.up.data_ptr()
    assert torch.equal(again.delta(), whole.delta())
    for order in ([1, 0, 2], [0, 2], [0, 1, 1, 2]):
        some = [parts[n] for n in order]
        joined = LoRA.fuse(some)
        assert torch.equal(joined.delta(), torch.cat([p.delta() for p in some]))
    apart = LoRA.fuse([parts[0], 1, parts[2]])
    assert torch.equal(
        apart.delta(), torch.cat([parts[0].delta(), torch.zeros(1, 5), parts[2].delta()])
    )


def test_split_blocks_looks_beyond_the_first_rows(rng: Generator) -> None:
    down = torch.randn(4, 5, generator=rng)
    late = torch.zeros(30, 4)
    late[29, 2] = 1.0  # the only row that uses a rank index of the other part
    early = torch.zeros(30, 4)
    early[:, 2] = 1.0
    early[:, 0] = 1.0
    shared = [LoRA(early, down), LoRA(late, down)]
    assert split_blocks(shared) == shared
    early[:, 2] = 0
    late[3, 1] = late[4, 3] = 1.0
    ranks = [p.rank for p in split_blocks([LoRA(early, down), LoRA(late, down)])]
    assert ranks == [1, 3]
