"""compressed-tensors' 8-bit floats, against the package, and fbgemm_fp8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import by_name, logical
from tests.quantizers.packages import arguments, compress, decompress
from tests.quantizers.scaled import (
    check_opens,
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

CASES = {
    "tensor": arguments("tensor", 8),
    "channel": arguments("channel", 8),
    "block": arguments("block", 8, block_structure=[4, 8]),
    "group": arguments("group", 8, group_size=8),
    "mxfp8": arguments("group", 8, group_size=32, scale_dtype=torch.uint8),
}


def form_of(case: str) -> str:
    return "mxfp8-quantized" if case == "mxfp8" else "float-quantized"


def vendor(weight: Tensor, case: str) -> dict[str, Tensor]:
    """The package's scales for a weight, in the weight's dtype, and its codes."""
    if case == "tensor":
        low, high = torch.aminmax(weight)
    elif case == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif case == "block":
        down, across = 4, 8
        padding = (0, -weight.shape[1] % across, 0, -weight.shape[0] % down)
        tiles = torch.nn.functional.pad(weight, padding)
        tiles = tiles.unflatten(0, (-1, down)).unflatten(2, (-1, across))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    else:
        groups = weight.unflatten(1, (-1, 8 if case == "group" else 32))
        low, high = groups.amin(2), groups.amax(2)
    scale, _ = calculate_qparams(low, high, CASES[case])
    return compress(form_of(case), weight, scale.to(weight.dtype), CASES[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_decodes_as_the_package(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    weights = CASES[case]
    shapes = {"a": (10, 96), "b": (3, 64)} if case != "block" else {"a": (10, 30), "b": (4, 8)}
    tensors: dict[str, Tensor] = {"norm.weight": torch.ones(4)}
    wanted: dict[str, Tensor] = {}
    for i, (module, shape) in enumerate(shapes.items()):
        packed = vendor((heavy(*shape, seed=i) + 1e-3).to(dtype), case)
        wanted[f"{module}.weight"] = decompress(form_of(case), packed, weights)
        tensors |= {f"{module}.{name}": tensor for name, tensor in packed.items()}
        tensors[f"{module}.input_scale"] = torch.ones(1)
    group = {"targets": ["Linear"], "weights": weights.model_dump(mode="json")}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    checkpoint = file_of(tmp_path, tensors, config)
    view = seen(checkpoint)
    assert set(view) == {"norm.weight", *wanted}
    for name, values in wanted.items():
        assert torch.equal(view[name].torch().to(values.dtype), values), name
        assert view.packed[name].format.name == "fp8-compressed"
    check_unchanged(checkpoint)
    check_rows(checkpoint)


@pytest.mark.parametrize("native", ["F32", "BF16"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fresh_is_what_the_package_packs(tmp_path: Path, strategy: str, native: str) -> None:
    dtype = torch.float32 if native == "F32" else torch.bfloat16
    weight = (heavy(9, 20, seed=5) + 1e-3).to(dtype)
    packed = by_name("fp8-compressed").fresh("a.weight", (9, 20), native, strategy=strategy)
    mine = quantized(packed, weight.float())
    theirs = vendor(weight, strategy)
    if native == "F32":
        assert raw(mine["a.weight"]) == raw(theirs["weight"])
        assert raw(mine["a.weight_scale"]) == raw(theirs["weight_scale"])
    else:  # the package also divides in bf16
        scale = theirs["weight_scale"].float()
        assert torch.allclose(mine["a.weight_scale"].float(), scale, rtol=2**-7)
    weights = {"a.weight": weight.float(), "z.weight": torch.zeros(3, 4)}
    view = fresh(tmp_path, "fp8-compressed", weights, strategy=strategy)
    check_steps(view, weights, slack=2**-8)
    check_unchanged(view.stored)


@pytest.mark.parametrize("size", [1e-6, 1e8])
def test_fp16_scales_neither_vanish_nor_overflow(tmp_path: Path, size: float) -> None:
    weight = heavy(4, 12, seed=11)
    weight = weight / weight.abs().amax() * size
    packed = by_name("fp8-compressed").fresh("a.weight", (4, 12), "F16")
    view = seen(file_of(tmp_path, quantized(packed, weight)))
    scale = view.stored["a.weight_scale"].torch()
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    after = view["a.weight"].torch()
    assert float((after - weight).abs().amax()) < max(0.75 * size, size - 448 * 65504.0)
    assert float(after.abs().amax()) > 0.2 * size


def test_fbgemm(tmp_path: Path) -> None:
    weights = {"a.weight": heavy(6, 14, seed=6)}
    view = fresh(tmp_path, "fp8-fbgemm", weights)
    check_steps(view, weights, slack=1e-6)
    check_unchanged(view.stored)
    check_rows(view.stored)
    assert view.stored["a.weight_scale"].dtype == "F32"
    codes, scale = view.stored["a.weight"].torch(), view.stored["a.weight_scale"].torch()
    assert torch.equal(view["a.weight"].torch(), codes.float() * scale)
    experts = {"x.gate_up_proj": codes, "x.gate_up_proj_scale": scale}
    with pytest.raises(UnsupportedError, match="stacked experts packed by fbgemm_fp8"):
        logical(file_of(tmp_path / "x", experts, {"quant_method": "fbgemm_fp8"}))


def test_a_change_of_one_row_leaves_the_others(tmp_path: Path) -> None:
    stored = vendor(heavy(6, 40, seed=7) + 1e-3, "channel")
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    packed = seen(file_of(tmp_path, tensors)).packed["a.weight"]
    before = packed.dequantize()
    change = torch.zeros_like(before)
    change[4, 7] = 10 * before.abs().amax()
    made = quantized(packed, before + change)
    rows = [0, 1, 2, 3, 5]
    for name, tensor in made.items():
        assert raw(tensor[rows]) == raw(tensors[name][rows])
    assert made["a.weight_scale"][4] > tensors["a.weight_scale"][4]


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_transformers_opens_what_is_made(tmp_path: Path, strategy: str) -> None:
    check_opens(tmp_path, "fp8-compressed", strategy=strategy)


def test_refuses(tmp_path: Path) -> None:
    codes = heavy(7, 10, seed=9).to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.weight_scale": torch.ones(3)}
    with pytest.raises(UsageError, match=r"'a\.weight_scale' of shape \[3\] does not fit"):
        logical(file_of(tmp_path / "a", tensors))
    good = {"a.weight": codes, "a.weight_scale": torch.ones(7, 1)}
    for i, (other, message) in enumerate(
        (("pre_quant_scale", "pre_quant_scale"), ("weight_zero_point", "zero point"))
    ):
        checkpoint = file_of(tmp_path / f"b{i}", {**good, f"a.{other}": torch.ones(10)})
        with pytest.raises(UnsupportedError, match=message):
            logical(checkpoint)
    format = by_name("fp8-compressed")
    with pytest.raises(UnsupportedError, match=r"'c\.weight'"):
        format.fresh("c.weight", (4, 4, 3, 3), "F32")
    with pytest.raises(UsageError, match="strategy"):
        format.fresh("a.weight", (4, 4), "F32", strategy="block")
    with pytest.raises(UsageError, match="strategy"):
        by_name("fp8-fbgemm").fresh("a.weight", (4, 4), "F32", strategy="tensor")
    packed = seen(file_of(tmp_path / "good", good)).packed["a.weight"]
    with pytest.raises(UsageError, match="NaN"):
        quantized(packed, torch.full((7, 10), torch.nan))
