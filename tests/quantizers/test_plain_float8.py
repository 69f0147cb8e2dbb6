"""8-bit floats without scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.grids import Grid, keep_equal, nearest
from peftsurgery.quantizers.plain_float8 import PlainFloat8
from peftsurgery.quantizers.rounding import stochastic
from tests.quantizers.scaled import (
    DTYPES,
    check_rows,
    check_steps,
    check_unchanged,
    file_of,
    fresh,
    heavy,
    quantized,
    raw,
    seen,
)

FLOATS = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


@pytest.mark.parametrize("dtype", FLOATS)
def test_decodes_and_keeps_every_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[torch.isfinite(every.float())]
    tensors = {
        "a.weight": heavy(7, 13, seed=0).to(dtype),
        "conv.weight": heavy(5, 3, 3, 3, seed=1).to(dtype),
        "all.weight": finite[: len(finite) // 2 * 2].reshape(2, -1),
        "experts.gate_up_proj": heavy(3, 5, 8, seed=2).to(dtype),
        "norm.weight": torch.ones(4, dtype=dtype),
        "a.bias": torch.ones(7),
    }
    checkpoint = file_of(tmp_path, tensors)
    view = seen(checkpoint)
    assert set(view.packed) == set(tensors) - {"norm.weight", "a.bias"}
    for name in view.packed:
        assert torch.equal(view[name].torch(), tensors[name].float()), name
    check_unchanged(checkpoint)
    check_rows(checkpoint)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fresh_is_the_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"a.weight": heavy(9, 11, seed=3), "b.weight": heavy(4, 2, 3, 1, seed=4)}
    view = fresh(tmp_path, "fp8", weights, dtype=DTYPES[dtype])
    for name, weight in weights.items():
        assert torch.equal(view[name].torch(), weight.to(dtype).float())
    check_steps(view, weights)


def test_what_is_too_large_saturates(tmp_path: Path) -> None:
    view = fresh(tmp_path, "fp8", {"a.weight": torch.tensor([[1e9, -1e9, 449.0, 1e-9]])})
    assert view["a.weight"].torch().tolist() == [[448.0, -448.0, 448.0, 0.0]]


def test_a_change_of_one_row_leaves_the_others(tmp_path: Path) -> None:
    checkpoint = file_of(tmp_path, {"a.weight": heavy(6, 40, seed=5).to(torch.float8_e4m3fn)})
    packed = seen(checkpoint).packed["a.weight"]
    before = packed.dequantize()
    change = torch.zeros_like(before)
    change[2] = torch.randn(40, generator=torch.Generator().manual_seed(6)) * 0.1
    generator = torch.Generator().manual_seed(7)

    def drawn(weight: Tensor, grid: Grid, previous: Tensor | None) -> Tensor:
        assert previous is not None
        return keep_equal(stochastic(weight, grid, generator), previous, grid)

    rows = [0, 1, 3, 4, 5]
    for rounding in (nearest, drawn):
        stored = quantized(packed, before + change, rounding)["a.weight"]
        assert raw(stored[rows]) == raw(packed.whole("weight")[rows])
        error = (stored.float() - before - change).abs()
        assert bool((error <= (before + change).abs() / 8 + 2**-9).all())
        assert not torch.equal(stored.float(), before)


def test_scales_are_never_passed_over(tmp_path: Path) -> None:
    codes = torch.ones(2, 4).to(torch.float8_e4m3fn)
    for i, (weight, scale) in enumerate(
        (
            ("a.weight", "a.weight.scale"),
            ("x.up_proj", "x.up_proj_scale"),
            ("a.weight", "a.scale"),
        )
    ):
        checkpoint = file_of(tmp_path / str(i), {weight: codes, scale: torch.ones(1)})
        with pytest.raises(UnsupportedError, match=f"with a scale '{scale}'"):
            seen(checkpoint)
    config = {"quant_method": "fp8"}
    tensors = {"a.weight": codes, "b.weight": codes, "b.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(UsageError, match=r"'a\.weight' is of 8-bit floats, and config\.json"):
        seen(file_of(tmp_path / "missing", tensors, config))


def test_refuses(tmp_path: Path) -> None:
    checkpoint = file_of(tmp_path, {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)})
    packed = seen(checkpoint).packed["a.weight"]
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UsageError, match=r"a\.weight.*NaN or infinity"):
            quantized(packed, torch.tensor([[1.0, bad], [0.0, 0.0]]))
    with pytest.raises(UsageError, match="F8_E4M3FNUZ"):
        PlainFloat8().fresh("a.weight", (2, 2), "F32", dtype="F8_E9M9")
