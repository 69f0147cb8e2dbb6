"""NVFP4 against compressed-tensors, comfy-kitchen, and a plain reading of ModelOpt's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import TensorCoreNVFP4Layout
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
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

FORM = "nvfp4-pack-quantized"
WEIGHTS = arguments("tensor_group", 4, group_size=16, scale_dtype=torch.float8_e4m3fn)
NAMES = ("nvfp4", "nvfp4-modelopt", "nvfp4-comfy")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def compressed(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.unflatten(1, (-1, 16))
    whole = generate_gparam(weight.amin(), weight.amax())
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), WEIGHTS, whole)
    return compress(FORM, weight, scale, WEIGHTS, whole)


def modelopt(weight: Tensor) -> dict[str, Tensor]:
    """Codes at random: any byte may stand there."""
    generator = torch.Generator().manual_seed(weight.numel())
    rows, columns = weight.shape
    scales = torch.randint(1, 0x7F, (rows, columns // 16), generator=generator)
    return {
        "weight": torch.randint(0, 256, (rows, columns // 2), generator=generator).byte(),
        "weight_scale": scales.byte().view(torch.float8_e4m3fn),
        "weight_scale_2": torch.rand((), generator=generator) / 448,
        "input_scale": torch.tensor(0.25),
    }


def comfy(weight: Tensor) -> dict[str, Tensor]:
    codes, params = TensorCoreNVFP4Layout.quantize(weight)
    told = json.dumps({"format": "nvfp4"}).encode()
    return {
        "weight": codes,
        "weight_scale": params.block_scale,
        "weight_scale_2": params.scale,
        "comfy_quant": torch.tensor(list(told), dtype=torch.uint8),
    }


def by_loop(parts: dict[str, Tensor]) -> Tensor:
    """ModelOpt's weight, value by value."""
    codes, scales = parts["weight"], parts["weight_scale"].float()
    found = torch.zeros(codes.shape[0], codes.shape[1] * 2)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            byte = int(codes[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            level = E2M1[code & 7] * (-1.0 if code & 8 else 1.0)
            unit = scales[row, column // 16] * parts["weight_scale_2"]
            found[row, column] = torch.tensor(level) * unit
    return found


def of(module: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}


def test_decodes_as_compressed_tensors(tmp_path: Path) -> None:
    theirs = {"a": compressed(heavy(5, 48, seed=0)), "b": compressed(heavy(3, 16, seed=1))}
    tensors = {"norm.weight": torch.ones(2)}
    for module, parts in theirs.items():
        tensors |= of(module, {**parts, "input_global_scale": torch.ones(1)})
    checkpoint = file_of(tmp_path, tensors)
    view = seen(checkpoint)
    assert set(view) == {"a.weight", "b.weight", "norm.weight"}
    for module, parts in theirs.items():
        wanted = decompress(FORM, parts, WEIGHTS)
        assert torch.equal(view[f"{module}.weight"].torch().to(wanted.dtype), wanted)
        assert view.packed[f"{module}.weight"].format.name == "nvfp4"
    check_unchanged(checkpoint)
    check_rows(checkpoint)


def test_decodes_modelopt(tmp_path: Path) -> None:
    parts = modelopt(heavy(4, 48, seed=2))
    checkpoint = file_of(tmp_path, of("a", parts), {"quant_method": "modelopt"})
    view = seen(checkpoint)
    assert set(view) == {"a.weight"}
    assert view.packed["a.weight"].format.name == "nvfp4-modelopt"
    assert torch.equal(view["a.weight"].torch(), by_loop(parts))
    check_unchanged(checkpoint)
    check_rows(checkpoint)


@pytest.mark.parametrize("shape", [(16, 16), (144, 80), (32, 144)])
def test_decodes_as_comfy_kitchen(tmp_path: Path, shape: tuple[int, int]) -> None:
    weight = heavy(*shape, seed=3)
    parts = comfy(weight)
    checkpoint = file_of(tmp_path, of("a", parts))
    view = seen(checkpoint)
    assert view.packed["a.weight"].format.name == "nvfp4-comfy"
    params = TensorCoreNVFP4Layout.Params(
        scale=parts["weight_scale_2"],
        orig_dtype=torch.float32,
        orig_shape=shape,
        block_scale=parts["weight_scale"],
    )
    wanted = TensorCoreNVFP4Layout.dequantize(parts["weight"], params)
    assert torch.equal(view["a.weight"].torch(), wanted)
    check_unchanged(checkpoint)
    check_rows(checkpoint)
    mine = quantized(by_name("nvfp4-comfy").fresh("a.weight", shape, "BF16"), weight)
    theirs = of("a", parts)
    assert torch.equal(mine["a.weight_scale_2"], theirs["a.weight_scale_2"])
    assert raw(mine["a.weight_scale"]) == raw(theirs["a.weight_scale"])
    assert float((mine["a.weight"] != theirs["a.weight"]).float().mean()) < 0.01  # signs of zero


def test_fresh_is_what_compressed_tensors_packs() -> None:
    weight = heavy(9, 96, seed=4) + 1e-3
    mine = quantized(by_name("nvfp4").fresh("a.weight", (9, 96), "BF16"), weight)
    for name, tensor in of("a", compressed(weight)).items():
        assert raw(mine[name]) == raw(tensor), name


@pytest.mark.parametrize("name", NAMES)
def test_fresh(tmp_path: Path, name: str) -> None:
    weights = {
        "a.weight": heavy(16, 96, seed=5),
        "z.weight": torch.zeros(16, 32),
        "small.weight": heavy(32, 16, seed=6) * 1e-18,
    }
    view = fresh(tmp_path, name, weights)
    check_steps(view, weights, slack=0.07)
    check_unchanged(view.stored)
    check_rows(view.stored)


@pytest.mark.parametrize("name", NAMES)
def test_changes_keep_what_they_do_not_touch(tmp_path: Path, name: str) -> None:
    view = fresh(tmp_path, name, {"a.weight": heavy(16, 96, seed=7)})
    packed = view.packed["a.weight"]
    before = packed.dequantize()
    change = torch.zeros_like(before)
    change[3, :16] = before[3].abs().amax() * torch.linspace(-1, 1, 16)
    made = quantized(packed, before + change)
    whole = packed.outlines["whole"].name
    assert raw(made[whole]) == bytes(view.stored[whole].read())
    after = seen(file_of(tmp_path / "after", {**made})).packed["a.weight"].dequantize()
    same = torch.ones_like(before, dtype=torch.bool)
    same[3, :16] = False
    assert torch.equal(after[same], before[same])
    unit = (before + change)[3, :16].abs().amax() / 6
    assert float((after - before - change)[3, :16].abs().amax()) < 1.1 * float(unit)
    # beyond what the one scale for all allows: everything else keeps its value, not its bytes
    change[3, 0] = 5 * before.abs().amax()
    made = quantized(packed, before + change)
    after = seen(file_of(tmp_path / "large", {**made})).packed["a.weight"].dequantize()
    assert raw(made[whole]) != bytes(view.stored[whole].read())
    grid, _ = packed.format.grid(packed, 0, packed.rows)
    coarse = same & (grid.scale.repeat_interleave(16, 1) > grid.scale.amax() / 1000)
    assert torch.equal(after[coarse], before[coarse])
    assert abs(float(after[3, 0] / (before + change)[3, 0]) - 1) < 0.07


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES[:2])
def test_a_broken_scale_for_all_is_made_anew(tmp_path: Path, name: str, value: float) -> None:
    view = fresh(tmp_path / "good", name, {"a.weight": heavy(4, 32, seed=8)})
    packed = view.packed["a.weight"]
    tensors = {stored: view.stored[stored].torch() for stored in view.stored}
    whole = packed.outlines["whole"].name
    tensors[whole] = torch.full_like(tensors[whole], value)
    broken = seen(file_of(tmp_path / "bad", tensors)).packed["a.weight"]
    wanted = heavy(4, 32, seed=9)
    made = quantized(broken, wanted)
    after = seen(file_of(tmp_path / "after", made))
    check_steps(after, {"a.weight": wanted}, slack=0.07)


def test_transformers_opens_compressed_tensors(tmp_path: Path) -> None:
    check_opens(tmp_path, "nvfp4")


def test_refuses(tmp_path: Path) -> None:
    good = of("a", compressed(heavy(4, 32, seed=10)))
    other = of("a", modelopt(heavy(4, 32, seed=11)))
    without = {key: tensor for key, tensor in good.items() if key != "a.weight_packed"}
    cases: list[tuple[type[Exception], str, dict[str, Tensor]]] = [
        (UsageError, r"'a\.weight_packed' is missing", without),
        (
            UsageError,
            r"a weight of \[4, 32\] has F8_E4M3 of shape \[4, 2\]",
            {**good, "a.weight_scale": good["a.weight_scale"][:, :1]},
        ),
        (
            UsageError,
            r"expected one fp32 number",
            {**other, "a.weight_scale_2": torch.ones(4)},
        ),
        (
            UnsupportedError,
            r"expected bytes",
            {**other, "a.weight": torch.zeros(4, 16, dtype=torch.int8)},
        ),
        (UnsupportedError, r"pre_quant_scale", {**other, "a.pre_quant_scale": torch.ones(32)}),
    ]
    for i, (error, message, tensors) in enumerate(cases):
        checkpoint = file_of(tmp_path / str(i), tensors)
        with pytest.raises(error, match=message):
            logical(checkpoint)
    for name in NAMES:
        with pytest.raises(UnsupportedError, match="multiple of 16"):
            by_name(name).fresh("a.weight", (16, 40), "F32")
        with pytest.raises(UnsupportedError, match=r"'x'"):
            by_name(name).fresh("x", (16, 32), "F32")
    with pytest.raises(UnsupportedError, match="multiple of 16 outputs"):
        by_name("nvfp4-comfy").fresh("a.weight", (8, 32), "F32")
    packed = seen(file_of(tmp_path / "good", good)).packed["a.weight"]
    with pytest.raises(UsageError, match="NaN"):
        quantized(packed, torch.full((4, 32), torch.nan))
