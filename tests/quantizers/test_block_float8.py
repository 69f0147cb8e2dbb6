"""Fine-grained 8-bit floats, against transformers' own packing and unpacking."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import (
    Fp8Dequantize,
    Fp8Quantize,
    _dequantize_fp8_weight,
)

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import by_name, logical
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

E4M3 = torch.float8_e4m3fn


def vendor(name: str, weight: Tensor, block: tuple[int, int], scale_fmt: str) -> dict[str, Tensor]:
    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    packer = Fp8Quantize(SimpleNamespace(quantization_config=config))
    return packer._quantize_one(name, weight)


def unpacked(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_decodes_what_transformers_packs(tmp_path: Path, scale_fmt: str, told: bool) -> None:
    tensors: dict[str, Tensor] = {"norm.weight": torch.ones(4)}
    weights = {
        "model.q_proj.weight": heavy(12, 24, seed=0),
        "model.k_proj.weight": heavy(4, 8, seed=1),
        "mlp.experts.gate_up_proj": heavy(3, 8, 16, seed=2),
    }
    for name, weight in weights.items():
        tensors |= vendor(name, weight, (4, 8), scale_fmt)
    config = {"quant_method": "fp8", "weight_block_size": [4, 8], "scale_fmt": scale_fmt}
    checkpoint = file_of(tmp_path, tensors, config if told else None)
    view = seen(checkpoint)
    assert set(view.packed) == set(weights)
    for name in weights:
        base = name.removesuffix(".weight")
        stored = f"{base}.weight_scale_inv" if base != name else f"{name}_scale_inv"
        for dtype in (torch.float32, torch.bfloat16):
            wanted = unpacked(tensors[name], tensors[stored], dtype)
            assert torch.equal(view[name].torch().to(dtype), wanted)
        assert view.packed[name].format.name == "fp8-block"
    check_unchanged(checkpoint)
    check_rows(checkpoint)


@pytest.mark.parametrize("told", [True, False])
def test_decodes_ragged_blocks(tmp_path: Path, told: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = heavy(130, 200, seed=3).mul(50).to(E4M3)
    scales = torch.rand(2, 2, generator=generator) + 0.01
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]} if told else None
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    if told:
        tensors |= {"b.weight": codes[:, :100], "b.weight_scale_inv": scales[:, :1]}
    checkpoint = file_of(tmp_path, tensors, config)
    if not told:  # 130 rows in two blocks could be 65 and 65
        assert seen(checkpoint)["a.weight"].shape == (130, 200)
    else:
        for name in ("a", "b"):
            wanted = _dequantize_fp8_weight(
                tensors[f"{name}.weight"],
                tensors[f"{name}.weight_scale_inv"],
                [128, 128],
                torch.float32,
            )
            assert torch.equal(seen(checkpoint)[f"{name}.weight"].torch(), wanted)
    check_unchanged(checkpoint)
    check_rows(checkpoint)


def test_decodes_other_names_and_single_scales(tmp_path: Path) -> None:
    codes = heavy(3, 6, 10, seed=4).mul(50).to(E4M3)
    one = torch.tensor(0.37)
    powers = torch.tensor([[120], [130]], dtype=torch.uint8)
    tensors = {
        "a.weight": codes[0],
        "a.weight_scale_inv": one,
        "a.activation_scale": torch.tensor(0.1),
        "b.weight": codes[1],
        "b.qscale_weight": one.reshape(1),
        "c.weight": codes[2],
        "c.scale": powers.view(torch.float8_e8m0fnu),
        "e.weight": codes[2],
        "e.scale": torch.tensor([[0.3], [0.4]]),
        "d.weight": codes[2],
        "d.weight_scale_inv": powers,
        "experts.down_proj": codes,
        "experts.down_proj_scale_inv": torch.tensor([1.0, 2.0, 0.3]).reshape(3, 1, 1),
        "experts.down_proj_activation_scale": torch.ones(3),
    }
    checkpoint = file_of(tmp_path, tensors)
    view = seen(checkpoint)
    assert set(view) == {*(f"{name}.weight" for name in "abcde"), "experts.down_proj"}
    assert torch.equal(view["e.weight"].torch(), unpacked(codes[2], tensors["e.scale"]))
    assert torch.equal(view["a.weight"].torch(), codes[0].float() * one)
    assert torch.equal(view["b.weight"].torch(), codes[1].float() * one)
    for name in ("c", "d"):
        wanted = unpacked(codes[2], powers)
        assert torch.equal(view[f"{name}.weight"].torch(), wanted)
    scales = tensors["experts.down_proj_scale_inv"]
    assert torch.equal(view["experts.down_proj"].torch(), unpacked(codes, scales))
    check_unchanged(checkpoint)
    check_rows(checkpoint)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fresh_is_what_transformers_packs(tmp_path: Path, ue8m0: bool) -> None:
    weights = {
        "a.weight": heavy(12, 24, seed=5),
        "z.weight": torch.zeros(4, 8),
        "experts.gate_up_proj": heavy(3, 8, 16, seed=6),
    }
    view = fresh(tmp_path, "fp8-block", weights, block=(4, 8), ue8m0=ue8m0)
    check_steps(view, weights, slack=1e-6)
    check_unchanged(view.stored)
    for name, weight in weights.items():
        made = vendor(name, weight, (4, 8), "ue8m0" if ue8m0 else "float")
        for stored, tensor in made.items():
            if stored == name:
                steps = view.stored[stored].torch().float() - tensor.float()
                share = steps.abs() / tensor.float().abs().clamp(min=2**-6)
                # the vendor multiplies by a rounded reciprocal, which moves ties
                assert float((share > 0).float().mean()) < 0.05
                assert float(share.max()) <= 0.126
            else:
                mine = view.stored[stored].torch().float()
                assert torch.allclose(mine, tensor.float(), rtol=1e-6)


def test_powers_of_two_stay_powers_of_two(tmp_path: Path) -> None:
    made = vendor("a.weight", heavy(8, 16, seed=7), (4, 8), "ue8m0")
    made["a.weight_scale_inv"] = made["a.weight_scale_inv"].float()
    packed = seen(file_of(tmp_path, made)).packed["a.weight"]
    before = packed.dequantize()
    change = torch.zeros_like(before)
    change[5, 3] = 3.3 * before.abs().amax()
    stored = quantized(packed, before + change)
    scales = stored["a.weight_scale_inv"]
    assert bool((torch.frexp(scales)[0] == 0.5).all())
    kept = torch.tensor([[0, 0], [0, 1]], dtype=torch.bool)
    kept[0] = True
    assert torch.equal(scales[kept], made["a.weight_scale_inv"][kept])
    assert scales[1, 0] > made["a.weight_scale_inv"][1, 0]
    assert raw(stored["a.weight"][:4]) == raw(made["a.weight"][:4])
    assert raw(stored["a.weight"][:, 8:]) == raw(made["a.weight"][:, 8:])


@pytest.mark.parametrize("block", [(8, 16), None])
def test_transformers_opens_what_is_made(tmp_path: Path, block: tuple[int, int] | None) -> None:
    load = FineGrainedFP8Config(dequantize=True)
    vars(load)["weight_block_size"] = block
    check_opens(tmp_path, "fp8-block", load, block=block)


def test_refuses(tmp_path: Path) -> None:
    codes = heavy(7, 10, seed=9).to(E4M3)
    cases: list[tuple[type[Exception], str, dict[str, Tensor]]] = [
        (UsageError, r"without a 'a\.weight'", {"a.weight_scale_inv": torch.ones(1, 1)}),
        (
            UsageError,
            r"without a 'a\.weight' of 8-bit",
            {"a.weight": codes.float(), "a.weight_scale_inv": torch.ones(1, 1)},
        ),
        (
            UsageError,
            r"shape \[3, 2\] does not fit 'a\.weight' of shape \[7, 10\]",
            {"a.weight": codes, "a.weight_scale_inv": torch.ones(3, 2)},
        ),
        (
            UnsupportedError,
            r"is I64; expected one of",
            {"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 1, dtype=torch.int64)},
        ),
        (
            UsageError,
            r"does not fit 'x\.up_proj'",
            {
                "x.up_proj": codes.reshape(7, 5, 2),
                "x.up_proj_scale_inv": torch.ones(5, 1, 1),
            },
        ),
    ]
    for i, (error, message, tensors) in enumerate(cases):
        checkpoint = file_of(tmp_path / str(i), tensors)
        with pytest.raises(error, match=message):
            logical(checkpoint)
    format = by_name("fp8-block")
    with pytest.raises(UnsupportedError, match=r"'a\.weight': \[130, 256\] is no whole number"):
        format.fresh("a.weight", (130, 256), "F32")
    with pytest.raises(UnsupportedError, match=r"'c\.weight'"):
        format.fresh("c.weight", (128, 128, 3, 3), "F32")
    with pytest.raises(UsageError, match="block size"):
        format.fresh("a.weight", (128, 128), "F32", block="big")
    packed = seen(
        file_of(tmp_path / "good", {"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 1)})
    ).packed["a.weight"]
    with pytest.raises(UsageError, match="NaN"):
        quantized(packed, torch.full((7, 10), torch.nan))
