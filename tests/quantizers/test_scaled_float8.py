"""ComfyUI's scaled 8-bit floats and musubi-tuner's, against comfy-kitchen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import TensorCoreFP8Layout
from torch import Tensor

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import by_name, logical
from tests.quantizers.scaled import (
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

FLOATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def told(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def vendor(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """comfy-kitchen's codes, scale and fp32 values."""
    codes, params = TensorCoreFP8Layout.quantize(weight, dtype=dtype)
    return codes, params.scale, TensorCoreFP8Layout.dequantize(codes, params)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("spelling", ["tensor", "metadata", "marker"])
@pytest.mark.parametrize("form", FLOATS)
def test_decodes_as_comfy_kitchen(tmp_path: Path, form: str, spelling: str, prefix: str) -> None:
    dtype = FLOATS[form]
    tensors: dict[str, Tensor] = {f"{prefix}norm.weight": torch.ones(3)}
    wanted = {}
    layers = {}
    for i, shape in enumerate([(7, 12), (16, 5), (4, 3, 3, 3)]):
        module = f"{prefix}blocks.{i}.to_q"
        codes, scale, values = vendor(heavy(*shape, seed=i), dtype)
        wanted[f"{module}.weight"] = values
        tensors[f"{module}.weight"] = codes
        new = spelling != "marker"
        tensors[f"{module}.{'weight_scale' if new else 'scale_weight'}"] = scale
        tensors[f"{module}.{'input_scale' if new else 'scale_input'}"] = torch.tensor(0.5)
        layers[module] = {"format": form}
        if spelling == "tensor":
            tensors[f"{module}.comfy_quant"] = told({"format": form})
    metadata = None
    if spelling == "marker":
        tensors[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=dtype)
    if spelling == "metadata":
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    checkpoint = file_of(tmp_path, tensors, metadata=metadata)
    view = seen(checkpoint)
    assert set(view.packed) == set(wanted)
    for name, values in wanted.items():
        assert torch.equal(view[name].torch(), values)
        assert view.packed[name].format.name == "fp8-scaled"
    left = {f"{prefix}norm.weight"} | ({f"{prefix}scaled_fp8"} if spelling == "marker" else set())
    assert set(view) - set(view.packed) == left
    assert {name for name in view if by_name("fp8-scaled").marks(name)} == left - {
        f"{prefix}norm.weight"
    }
    check_unchanged(checkpoint)
    check_rows(checkpoint)


@pytest.mark.parametrize("shape", [(1,), (8, 1), (8, 3, 1)])
def test_decodes_musubi(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes = heavy(8, 12, seed=1).mul(100).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.01
    checkpoint = file_of(tmp_path, {"a.weight": codes, "a.scale_weight": scale})
    if len(shape) == 3:
        wanted = (codes.float().reshape(8, 3, 4) * scale).reshape(8, 12)
    else:
        wanted = codes.float() * scale
    assert torch.equal(seen(checkpoint)["a.weight"].torch(), wanted)
    check_unchanged(checkpoint)
    check_rows(checkpoint)


@pytest.mark.parametrize("spelling", ["comfy_quant", "scaled_fp8"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fresh(tmp_path: Path, dtype: str, spelling: str) -> None:
    weights = {
        "model.diffusion_model.a.weight": heavy(33, 17, seed=3),
        "model.diffusion_model.b.weight": torch.zeros(4, 4),
        "model.diffusion_model.c.weight": heavy(4, 2, 3, 3, seed=4) * 1e-20,
    }
    view = fresh(tmp_path, "fp8-scaled", weights, dtype=dtype, spelling=spelling)
    check_steps(view, weights, slack=1e-6)
    check_unchanged(open_checkpoint(tmp_path / "model.safetensors"))
    marker = "model.diffusion_model.scaled_fp8"
    assert (marker in view.stored) == (spelling == "scaled_fp8")
    if marker in view.stored:
        assert view.stored[marker].dtype == dtype
        assert view.stored[marker].shape == (0,)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        suffix = "weight_scale" if spelling == "comfy_quant" else "scale_weight"
        scale = view.stored[f"{module}.{suffix}"].torch()
        kind = torch.float8_e4m3fn if dtype == "F8_E4M3" else torch.float8_e5m2
        if weight.any():
            assert torch.equal(scale, weight.abs().amax() / torch.finfo(kind).max)
        if spelling == "comfy_quant":
            said = json.loads(bytes(view.stored[f"{module}.comfy_quant"].read()))
            assert FLOATS[said["format"]] == kind
            params = TensorCoreFP8Layout.Params(
                scale=scale, orig_dtype=torch.float32, orig_shape=weight.shape
            )
            loaded = TensorCoreFP8Layout.dequantize(view.stored[name].torch(), params)
            assert torch.equal(loaded, view[name].torch())


def test_the_scale_stays_until_a_change_needs_another(tmp_path: Path) -> None:
    codes, scale, _ = vendor(heavy(6, 40, seed=5), torch.float8_e4m3fn)
    checkpoint = file_of(tmp_path, {"a.weight": codes, "a.scale_weight": scale})
    packed = seen(checkpoint).packed["a.weight"]
    before = packed.dequantize()
    change = torch.zeros_like(before)
    change[1] = before.abs().amax() / 100
    stored = quantized(packed, before + change)
    assert raw(stored["a.scale_weight"]) == raw(scale)
    rows = [0, 2, 3, 4, 5]
    assert raw(stored["a.weight"][rows]) == raw(codes[rows])
    assert raw(stored["a.weight"][1]) != raw(codes[1])
    change[1, 0] = 40 * before.abs().amax()
    stored = quantized(packed, before + change)
    largest = (before + change).abs().amax()
    assert torch.equal(stored["a.scale_weight"], largest / 448)


def test_a_pipeline_names_its_layers_by_component(tmp_path: Path) -> None:
    codes, scale, values = vendor(heavy(4, 6, seed=6), torch.float8_e4m3fn)
    inner = {"layers": {"a": {"format": "float8_e4m3fn"}}}
    tensors = {"a.weight": codes, "a.weight_scale": scale}
    file_of(
        tmp_path / "transformer", tensors, metadata={"_quantization_metadata": json.dumps(inner)}
    )
    part = tmp_path / "transformer"
    (part / "model.safetensors").rename(part / "diffusion_pytorch_model.safetensors")
    (part / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "P", "transformer": ["diffusers", "T"]})
    )
    view = seen(open_checkpoint(tmp_path))
    assert view.packed["transformer:a.weight"].format.name == "fp8-scaled"
    assert torch.equal(view["transformer:a.weight"].torch(), values)


def test_refuses(tmp_path: Path) -> None:
    codes, scale, _ = vendor(heavy(4, 6, seed=7), torch.float8_e4m3fn)
    cases: list[tuple[type[Exception], str, dict[str, Tensor], dict[str, str] | None]] = [
        (
            UsageError,
            r"'a\.scale_weight' scales 'a\.weight', which is F32",
            {"a.scale_weight": scale, "a.weight": codes.float()},
            None,
        ),
        (
            UsageError,
            r"shape \[3, 1\] does not fit.*\[4, 6\]",
            {"a.scale_weight": torch.ones(3, 1), "a.weight": codes},
            None,
        ),
        (
            UnsupportedError,
            r"I32; expected",
            {"a.scale_weight": torch.ones(1, dtype=torch.int32), "a.weight": codes},
            None,
        ),
        (
            UsageError,
            r"weight_scale' is missing",
            {"a.weight": codes, "a.comfy_quant": told({"format": "float8_e4m3fn"})},
            None,
        ),
        (
            UnsupportedError,
            r"is F8_E4M3, but said to be float8_e5m2",
            {
                "a.weight": codes,
                "a.weight_scale": scale,
                "a.comfy_quant": told({"format": "float8_e5m2"}),
            },
            None,
        ),
        (
            UnsupportedError,
            r"'a' is packed by ComfyUI as 'convrot_w4a4'",
            {"a.weight": codes, "a.comfy_quant": told({"format": "convrot_w4a4"})},
            None,
        ),
        (UsageError, r"no JSON", {"a.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}, None),
        (UsageError, r"no JSON", {"a.weight": codes}, {"_quantization_metadata": "{"}),
        (UsageError, r"lacks 'layers'", {"a.weight": codes}, {"_quantization_metadata": "{}"}),
    ]
    for i, (error, message, tensors, metadata) in enumerate(cases):
        checkpoint = file_of(tmp_path / str(i), tensors, metadata=metadata)
        with pytest.raises(error, match=message):
            logical(checkpoint)
    format = by_name("fp8-scaled")
    with pytest.raises(UnsupportedError, match=r"'a\.bias'"):
        format.fresh("a.bias", (4,), "F32")
    with pytest.raises(UsageError, match="spelling"):
        format.fresh("a.weight", (4, 4), "F32", spelling="other")
