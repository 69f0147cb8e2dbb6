"""HQQ files: parity with the hqq package both ways, bytes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import by_name
from tests.quantizers.integer_files import (
    as_stored,
    check_merged,
    check_rows,
    check_unchanged,
    folder,
    only,
    remade,
)

NAME = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, object] = {"quant_method": "hqq", "quant_config": {}, "skip_modules": []}


def made(
    weight: Tensor, *, bits: float, group: int, axis: int, dtype: torch.dtype, floats: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, the weight they stand for), made by the package."""
    config = BaseQuantizeConfig(
        nbits=bits,  # pyright: ignore[reportArgumentType]
        group_size=group,
        axis=axis,
        view_as_float=floats,
    )
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight.clone()
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    tensors = {
        f"{NAME}.{key}": part.detach()
        for key, part in layer.state_dict().items()
        if part is not None
    }
    dense = layer.dequantize()
    assert dense is not None
    return tensors, dense.detach()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_reads_what_the_package_packs(
    tmp_path: Path, rng: torch.Generator, bits: float, axis: int
) -> None:
    weight = torch.randn(40, 64, generator=rng)
    tensors, dense = made(weight, bits=bits, group=16, axis=axis, dtype=torch.float32)
    packed = only(folder(tmp_path, tensors, CONFIG))
    assert packed.name == f"{NAME}.weight"
    assert torch.equal(packed.dequantize(), dense)
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(48, 40), (20, 96)])
def test_groups_that_cross_rows(
    tmp_path: Path, rng: torch.Generator, shape: tuple[int, int], axis: int
) -> None:
    weight = torch.randn(shape, generator=rng)
    tensors, dense = made(weight, bits=4, group=64, axis=axis, dtype=torch.float32)
    packed = only(folder(tmp_path, tensors, CONFIG))
    assert torch.equal(packed.dequantize(), dense)
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_differs_by_the_rounding_of_its_steps_alone(
    tmp_path: Path, rng: torch.Generator, dtype: torch.dtype, floats: bool
) -> None:
    weight = torch.randn(32, 64, generator=rng)
    tensors, dense = made(weight, bits=4, group=16, axis=1, dtype=dtype, floats=floats)
    packed = only(folder(tmp_path, tensors, CONFIG))
    scale = packed.whole("scale").float().reshape(32, 4).repeat_interleave(16, 1)
    step = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    bound = scale * 16 * step * 2
    assert bool(((packed.dequantize() - dense.float()).abs() <= bound).all())
    check_unchanged(packed)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_merge_keeps_its_direction(tmp_path: Path, rng: torch.Generator, axis: int) -> None:
    tensors, _ = made(
        torch.randn(40, 64, generator=rng), bits=4, group=16, axis=axis, dtype=torch.float32
    )
    packed = only(folder(tmp_path, tensors, CONFIG))
    if axis == 1:
        check_merged(packed, rng)
        return
    weight = packed.dequantize().clone()
    weight[3, 5] += 10  # its group runs over rows 3, 3 + 40 / 16 …: no other may move
    found = again_of(tmp_path / "again", packed.format.quantize(packed, weight), tensors)
    moved = (found != packed.dequantize()).nonzero()
    places = moved[:, 0] * 64 + moved[:, 1]
    assert set((places % (40 * 64 // 16)).tolist()) == {(3 * 64 + 5) % (40 * 64 // 16)}


def again_of(path: Path, parts: dict[str, Tensor], tensors: dict[str, Tensor]) -> Tensor:
    stored = {f"{NAME}.{'W_q' if role == 'weight' else role}": part for role, part in parts.items()}
    return only(folder(path, tensors | stored, CONFIG)).dequantize()


@pytest.mark.parametrize("native", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("bits", "axis"), [(8, 1), (4, 1), (4, 0), (3, 1), (3, 0), (2, 1), (1, 0)])
def test_the_package_reads_what_is_packed_afresh(
    tmp_path: Path, rng: torch.Generator, bits: int, axis: int, native: str
) -> None:
    format = by_name("hqq")
    weight = torch.randn(48, 64, generator=rng)
    weight[3] = 0.25
    options: dict[str, object] = {"bits": bits, "axis": axis, "group": 16, "optimize": False}
    outline = format.fresh(f"{NAME}.weight", (48, 64), native, **options)
    config = format.config(**options)
    assert config is not None
    packed = remade(tmp_path, outline, weight, config)
    parts = {role: packed.whole(role) for role in packed.parts}
    state = as_stored(packed, parts)
    dtype = packed.whole("scale").dtype
    settings = {"offload_meta": False}
    layer = HQQLinear(None, settings, compute_dtype=dtype, device="cpu", initialize=False)
    layer.load_state_dict({key.removeprefix(f"{NAME}."): part for key, part in state.items()})
    dense = layer.dequantize()
    assert dense is not None
    loss = {"F32": 0.0, "BF16": 2**-8, "F16": 2**-11}[native] * 2**bits * 2
    place = torch.arange(48 * 64)
    place = place // 16 if axis == 1 else place % (48 * 64 // 16)
    scale = packed.whole("scale").float().reshape(-1)[place].reshape(48, 64)
    values = packed.dequantize()
    assert bool(((values - dense.float()).abs() <= scale * loss).all())
    assert bool(((values - weight).abs() <= scale * (0.5 + loss + 1e-4)).all())
    check_unchanged(packed)


@pytest.mark.parametrize(("bits", "axis"), [(4, 1), (3, 0), (2, 1)])
def test_the_zeros_are_those_of_the_package(
    tmp_path: Path, rng: torch.Generator, bits: int, axis: int
) -> None:
    weight = torch.randn(48, 64, generator=rng)
    weight[::7, ::5] *= 4
    tensors, dense = made(weight, bits=bits, group=32, axis=axis, dtype=torch.float32)
    format = by_name("hqq")
    options = {"bits": bits, "axis": axis, "group": 32}
    outline = format.fresh(f"{NAME}.weight", (48, 64), "F32", **options)
    packed = remade(tmp_path, outline, weight, CONFIG)
    assert torch.allclose(packed.whole("scale"), tensors[f"{NAME}.scale"])

    def error(values: Tensor) -> float:
        return float((values - weight).abs().pow(0.7).mean())

    plain = format.fresh(f"{NAME}.weight", (48, 64), "F32", **options, optimize=False)
    unfitted = remade(tmp_path / "plain", plain, weight, CONFIG)
    assert error(packed.dequantize()) < error(unfitted.dequantize())
    if bits != 4:  # there the package rounds its first zeros
        assert torch.allclose(packed.whole("zero"), tensors[f"{NAME}.zero"], atol=1e-4)
    else:
        assert error(packed.dequantize()) < 1.05 * error(dense)


def test_damage_and_variants_are_named(tmp_path: Path, rng: torch.Generator) -> None:
    weight = torch.randn(32, 64, generator=rng)
    tensors, _ = made(weight, bits=4, group=16, axis=1, dtype=torch.float32)

    def refused(place: str, change: dict[str, Tensor | None]) -> str:
        new = {**tensors, **{f"{NAME}.{key}": part for key, part in change.items()}}
        stored = {key: part for key, part in new.items() if part is not None}
        with pytest.raises((UsageError, UnsupportedError)) as caught:
            only(folder(tmp_path / place, stored, CONFIG))
        return str(caught.value)

    one = torch.tensor(1, dtype=torch.uint8)
    assert "zero_scale" in refused("a", {"zero_scale": torch.zeros(2, 3)})
    assert "quant_zero" in refused("b", {"quant_zero": one})
    assert "channel_wise" in refused("c", {"channel_wise": one * 0})
    assert "'6bit'" in refused("d", {"packing": torch.tensor(list(b"6bit"), dtype=torch.uint8)})
    assert "axis 2" in refused("e", {"axis": torch.tensor(2)})
    assert "scale" in refused("f", {"scale": None})
    assert "groups of 24" in refused("g", {"group_size": torch.tensor(24)})
    assert "[31, 64]" in refused("h", {"shape": torch.tensor([31, 64])})
    packed = only(folder(tmp_path / "i", tensors, CONFIG))
    holed = packed.dequantize().clone()
    holed[0, 0] = torch.nan
    with pytest.raises(UsageError, match="NaN"):
        packed.format.quantize(packed, holed)


def test_skipped_modules_are_named_for_all_layers_at_once() -> None:
    skip = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    config = by_name("hqq").config(skip=skip)
    assert config is not None
    assert config["skip_modules"] == ["lm_head", "mlp.gate"]


def test_what_does_not_fit_is_named(rng: torch.Generator) -> None:
    format = by_name("hqq")
    with pytest.raises(UnsupportedError, match=r"x\.weight"):
        format.fresh("x.weight", (8, 8, 3), "F16")
    with pytest.raises(UnsupportedError, match="groups of 64"):
        format.fresh("x.weight", (7, 30), "F16")
    with pytest.raises(UsageError, match="7 bits"):
        format.fresh("x.weight", (64, 64), "F16", bits=7)
    packed = format.fresh("x.weight", (8, 64), "F16")
    with pytest.raises(UsageError, match="too large"):
        format.quantize(packed, 1e7 + torch.randn(8, 64, generator=rng) * 10)
