"""AWQ files: parity with a plain decoder, unchanged bytes, and the scales of the inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import by_name
from peftsurgery.quantizers.awq import (
    input_scales_of_layer,
    input_scales_of_linear,
    input_scales_of_norm,
)
from tests.quantizers.integer_files import (
    again,
    check_merged,
    check_rows,
    check_unchanged,
    folder,
    only,
    remade,
    row_words,
)

NAME = "model.layers.0.self_attn.o_proj"
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
CONFIG: dict[str, object] = {"quant_method": "awq", "bits": 4, "group_size": 16}
CONFIG |= {"zero_point": True, "version": "gemm"}


def interleaved(codes: Tensor) -> Tensor:
    """Rows of codes as AWQ's words."""
    columns = [8 * (place // 8) + NIBBLES[place % 8] for place in range(codes.shape[1])]
    return row_words(codes[:, columns], 4)


def made(
    rng: torch.Generator, shape: tuple[int, int] = (40, 48)
) -> tuple[dict[str, Tensor], Tensor]:
    outputs, inputs = shape
    codes = torch.randint(0, 16, (inputs, outputs), generator=rng)
    zeros = torch.randint(0, 16, (inputs // 16, outputs), generator=rng)
    scales = (torch.rand(inputs // 16, outputs, generator=rng) * 0.1 + 0.01).half()
    weight = torch.empty(outputs, inputs)
    for i in range(inputs):
        weight[:, i] = (codes[i] - zeros[i // 16]).half() * scales[i // 16]
    tensors = {
        f"{NAME}.qweight": interleaved(codes),
        f"{NAME}.qzeros": interleaved(zeros),
        f"{NAME}.scales": scales,
    }
    return tensors, weight


@pytest.mark.parametrize("config", [CONFIG, None])
def test_decodes_and_keeps_its_bytes(
    tmp_path: Path, rng: torch.Generator, config: dict[str, object] | None
) -> None:
    tensors, weight = made(rng)
    packed = only(folder(tmp_path, tensors, config))
    assert packed.format.name == "awq"
    assert torch.equal(packed.dequantize().half(), weight.half())
    check_rows(packed)
    check_unchanged(packed)
    check_merged(packed, rng)


def test_packs_afresh_within_half_a_step(tmp_path: Path, rng: torch.Generator) -> None:
    format = by_name("awq")
    weight = torch.randn(40, 48, generator=rng)
    weight[3] = 0
    weight[7] = weight[7].abs() + 1
    config = format.config(group=16)
    assert config is not None
    outline = format.fresh(f"{NAME}.weight", (40, 48), "F16", group=16)
    packed = remade(tmp_path, outline, weight, config)
    scale = packed.whole("scale").float().T.repeat_interleave(16, 1)
    bound = scale * (0.5 + 16 * 2**-11)
    assert bool(((packed.dequantize() - weight).abs() <= bound).all())
    check_unchanged(packed)
    parts = packed.format.quantize(packed, weight)
    assert torch.equal(again(packed, parts), packed.dequantize())


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "exllama", "llm-awq"])
def test_other_layouts_are_refused_by_name(
    tmp_path: Path, rng: torch.Generator, version: str
) -> None:
    tensors, _ = made(rng)
    with pytest.raises(UnsupportedError, match=version):
        only(folder(tmp_path, tensors, CONFIG | {"version": version}))


def test_damage_is_named(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, _ = made(rng)
    lacking = {name: tensor for name, tensor in tensors.items() if "scales" not in name}
    with pytest.raises(UsageError, match="scales"):
        only(folder(tmp_path / "a", lacking, CONFIG))
    with pytest.raises(UnsupportedError, match="3 bits"):
        only(folder(tmp_path / "b", tensors, CONFIG | {"bits": 3}))
    short = tensors | {f"{NAME}.qzeros": tensors[f"{NAME}.qzeros"][:, :3]}
    with pytest.raises(UnsupportedError, match="qzeros"):
        only(folder(tmp_path / "c", short, CONFIG))
    uneven = tensors | {f"{NAME}.qweight": tensors[f"{NAME}.qweight"][:30]}
    with pytest.raises(UsageError, match="30 inputs"):
        only(folder(tmp_path / "d", uneven, CONFIG))
    narrow = tensors | {f"{NAME}.qweight": tensors[f"{NAME}.qweight"].to(torch.int16)}
    with pytest.raises(UnsupportedError, match="int32"):
        only(folder(tmp_path / "e", narrow, CONFIG))


def rounded(weight: Tensor) -> Tensor:
    """Plain 4-bit rounding of rows in groups of 16."""
    groups = weight.reshape(len(weight), -1, 16)
    step = groups.abs().amax(2, keepdim=True) / 7.5
    return ((groups / step).round().clamp(-8, 7) * step).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_scales_behind_a_norm(rng: torch.Generator, offset: float, dtype: torch.dtype) -> None:
    gain = torch.rand(64, generator=rng) + 0.3
    gain[::3] *= -1
    gain[5] = 0
    norm = (gain - offset).to(dtype)
    scales = torch.rand(64, generator=rng) * 3 + 0.2
    scaled = ((norm.float() + offset) / scales - offset).to(dtype)
    found = input_scales_of_norm(norm, scaled, offset=offset)
    error = (found / scales - 1).abs()
    error[5] = 0
    assert float(error.max()) < (0.02 if dtype == torch.float16 else 0.15)
    assert float(found[5]) == 1


def test_scales_behind_a_linear_layer(rng: torch.Generator) -> None:
    weight = torch.randn(48, 256, generator=rng)
    weight[4] = 0
    inputs = torch.rand(256, generator=rng) * 3 + 0.2
    scales = torch.rand(48, generator=rng) * 3 + 0.2
    scaled = rounded(weight * inputs / scales[:, None])
    found = input_scales_of_linear(weight, scaled, inputs=inputs)
    assert float(found[4]) == 1
    keep = torch.arange(48) != 4
    assert float((found / scales - 1).abs()[keep].max()) < 0.05
    plain = input_scales_of_linear(weight, rounded(weight / scales[:, None]))
    assert float((plain / scales - 1).abs()[keep].max()) < 0.05


def test_scales_from_the_layer_itself(rng: torch.Generator) -> None:
    weight = torch.randn(512, 64, generator=rng)
    scales = torch.rand(64, generator=rng) * 3 + 0.5
    found = input_scales_of_layer(weight, rounded(weight * scales))
    assert float((found / scales - 1).abs().max()) < 0.05


def test_a_change_turned_into_awq_gives_the_outputs_of_the_tuned_model(
    rng: torch.Generator,
) -> None:
    """(W·diag(s) + B·A·diag(s)) (x / s) = (W + B·A) x, with s found from the norm alone."""
    norm, x = torch.rand(64, generator=rng) + 0.5, torch.randn(64, 7, generator=rng)
    weight, scales = torch.randn(32, 64, generator=rng), torch.rand(64, generator=rng) + 0.5
    change = torch.randn(32, 3, generator=rng) @ torch.randn(3, 64, generator=rng)
    found = input_scales_of_norm(norm, norm / scales)
    wanted = (weight + change) @ (norm[:, None] * x)
    got = (weight * scales + change * found) @ ((norm / scales)[:, None] * x)
    assert torch.allclose(got, wanted, atol=1e-3)


def test_weights_that_do_not_belong_together_are_refused(rng: torch.Generator) -> None:
    one, other = torch.randn(2, 32, 64, generator=rng)
    with pytest.raises(UsageError, match="belong together"):
        input_scales_of_linear(one, other)
    with pytest.raises(UsageError, match="belong together"):
        input_scales_of_layer(one, other)
    with pytest.raises(UsageError, match="greater than 0"):
        input_scales_of_norm(one[0], -one[0])
    with pytest.raises(UsageError, match="shapes"):
        input_scales_of_norm(one[0], one[0, :5])
    holed = one.clone()
    holed[0, 0] = torch.nan
    with pytest.raises(UsageError, match="AWQ's input scales"):
        input_scales_of_linear(one, holed)
