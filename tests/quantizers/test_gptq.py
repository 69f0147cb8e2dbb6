"""GPTQ files: parity with a plain decoder, unchanged bytes, packing afresh, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import by_name
from peftsurgery.quantizers.rounding import feedback, feedback_factor
from tests.quantizers.integer_files import (
    again,
    check_merged,
    check_rows,
    check_unchanged,
    column_words,
    folder,
    only,
    remade,
    row_words,
    signed,
)

NAME = "model.layers.0.mlp.down_proj"
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def stored_zeros(zeros: Tensor, bits: int, version: int) -> Tensor:
    """qzeros of zeros (groups, outputs) in either version of the format."""
    if version == 2:
        return row_words(zeros, bits)
    if bits == 3:
        return row_words((zeros - 1) % 8, bits)
    rows = [[signed(word - ONES[bits]) for word in row] for row in row_words(zeros, bits).tolist()]
    return torch.tensor(rows, dtype=torch.int32)


def made(
    rng: torch.Generator,
    *,
    bits: int,
    version: int = 1,
    group: int = 32,
    act_order: bool = False,
    symmetric: bool = False,
    shape: tuple[int, int] = (64, 96),
    dtype: torch.dtype = torch.float16,
    least: int = 0,
) -> tuple[dict[str, Tensor], dict[str, object], Tensor]:
    """(tensors, quantization_config, the weight they stand for) made of random codes."""
    outputs, inputs = shape
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=rng)
    zeros = torch.randint(least, 1 << bits, (groups, outputs), generator=rng)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    scales = (torch.rand(groups, outputs, generator=rng) * 0.1 + 0.01).to(dtype)
    order = torch.arange(inputs) // size
    if act_order:
        order = order[torch.randperm(inputs, generator=rng)]
    weight = torch.empty(outputs, inputs)
    for i in range(inputs):
        place = int(order[i])
        weight[:, i] = (codes[i] - zeros[place]).to(dtype) * scales[place]
    tensors = {
        f"{NAME}.qweight": column_words(codes, bits),
        f"{NAME}.qzeros": stored_zeros(zeros, bits, version),
        f"{NAME}.scales": scales,
        f"{NAME}.g_idx": order.int(),
        f"{NAME}.bias": torch.randn(outputs, generator=rng).to(dtype),
    }
    config: dict[str, object] = {"quant_method": "gptq", "bits": bits, "group_size": group}
    config |= {"desc_act": act_order, "sym": symmetric}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return tensors, config, weight


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [32, -1, 96])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_decodes_and_keeps_its_bytes(
    tmp_path: Path, rng: torch.Generator, bits: int, version: int, group: int, act_order: bool
) -> None:
    tensors, config, weight = made(
        rng, bits=bits, version=version, group=group, act_order=act_order
    )
    checkpoint = folder(tmp_path, tensors, config)
    packed = only(checkpoint)
    assert packed.name == f"{NAME}.weight"
    assert packed.shape == (64, 96)
    assert torch.equal(packed.dequantize().half(), weight.half())
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_merges_into_codes_only(
    tmp_path: Path, rng: torch.Generator, bits: int, dtype: torch.dtype
) -> None:
    tensors, config, weight = made(rng, bits=bits, act_order=True, symmetric=True, dtype=dtype)
    packed = only(folder(tmp_path, tensors, config))
    assert torch.equal(packed.dequantize().to(dtype), weight.to(dtype))
    check_merged(packed, rng)


def test_a_file_without_g_idx_and_config_is_of_version_1(
    tmp_path: Path, rng: torch.Generator
) -> None:
    tensors, _, weight = made(rng, bits=4, group=48)
    del tensors[f"{NAME}.g_idx"]
    packed = only(folder(tmp_path, tensors, None))
    assert torch.equal(packed.dequantize().half(), weight.half())
    check_unchanged(packed)


def test_a_ragged_last_group(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, config, weight = made(rng, bits=4, group=64, version=2)
    packed = only(folder(tmp_path, tensors, config))
    assert torch.equal(packed.dequantize().half(), weight.half())
    check_unchanged(packed)


def test_only_a_group_left_by_more_than_half_a_step_gets_new_scales(
    tmp_path: Path, rng: torch.Generator
) -> None:
    tensors, config, weight = made(rng, bits=4, version=1)
    packed = only(folder(tmp_path, tensors, config))
    weight = packed.dequantize().clone()
    weight[7, 32:64] *= 3
    parts = packed.format.quantize(packed, weight)
    values = again(packed, parts)
    scales = packed.whole("scale")
    differing = (parts["scale"] != scales).nonzero().tolist()
    assert differing == [[1, 7]]
    near = torch.ones(64, 96, dtype=torch.bool)
    near[7, 32:64] = False
    assert torch.equal(values[near], weight[near])
    step = float(parts["scale"][1, 7])
    assert float((values - weight)[7, 32:64].abs().max()) <= step * 0.51


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_packs_afresh_within_half_a_step(
    tmp_path: Path, rng: torch.Generator, bits: int, group: int, symmetric: bool
) -> None:
    format = by_name("gptq")
    weight = torch.randn(96, 64, generator=rng)
    weight[3] = 0
    weight[5] = weight[5].abs() + 1
    weight[9, 2] = 40
    options = {"bits": bits, "group": group, "symmetric": symmetric}
    outline = format.fresh(f"{NAME}.weight", (96, 64), "F16", **options)
    config = format.config(**options)
    assert config is not None
    packed = remade(tmp_path, outline, weight, config)
    scale = (
        packed.whole("scale").float().T.repeat_interleave(64 // packed.whole("scale").shape[0], 1)
    )
    # the scale is rounded to fp16: 2^-11 of the code that lies farthest from zero
    bound = scale * (0.5 + (1 << bits) * 2**-11)
    assert bool(((packed.dequantize() - weight).abs() <= bound).all())
    check_unchanged(packed)


def test_gptq_rounding_beats_nearest_on_its_inputs(rng: torch.Generator) -> None:
    format = by_name("gptq")
    weight = torch.randn(32, 64, generator=rng)
    inputs = torch.randn(64, 16, generator=rng) @ torch.randn(16, 256, generator=rng)
    gram = inputs @ inputs.T + 0.01 * torch.eye(64)
    packed = format.fresh("x.weight", (32, 64), "F16", group=32)
    losses = []
    for rounding in (None, lambda w, grid, _: feedback(w, grid, feedback_factor(gram))):
        parts = format.quantize(packed, weight, *([rounding] if rounding else []))
        losses.append(float(((again(packed, parts) - weight) @ inputs).square().sum()))
    assert losses[1] < 0.7 * losses[0]


def test_skipped_modules_are_patterns_of_whole_names() -> None:
    config = by_name("gptq").config(skip=["lm_head", "model.layers.1.mlp.gate"])
    assert config is not None
    patterns = config["dynamic"]
    assert isinstance(patterns, dict)

    def left_alone(name: str) -> bool:
        return any(re.match(pattern.removeprefix("-:"), name) for pattern in patterns)

    assert left_alone("lm_head")
    assert left_alone("language_model.lm_head")
    assert left_alone("model.layers.1.mlp.gate")
    assert not left_alone("model.layers.1.mlp.gate_proj")
    assert not left_alone("model.layers.11.mlp.gate")


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (64, 64, 3)])
def test_shapes_that_do_not_fit_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match=r"x\.weight"):
        by_name("gptq").fresh("x.weight", shape, "F16", group=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"checkpoint_format": "new"}, "'new'"),
        ({"is_marlin_format": True}, "marlin"),
        ({"quant_method": "quip"}, "quip"),
    ],
)
def test_other_layouts_are_refused_by_name(
    tmp_path: Path, rng: torch.Generator, change: dict[str, object], message: str
) -> None:
    tensors, config, _ = made(rng, bits=4)
    with pytest.raises(UnsupportedError, match=message):
        only(folder(tmp_path, tensors, config | change))


@pytest.mark.parametrize(
    ("packing", "version"),
    [("auto_round:auto_gptq", 1), ("auto_round:gptqmodel", 2), ("auto_round", 2)],
)
def test_auto_round_names_both_versions(
    tmp_path: Path, rng: torch.Generator, packing: str, version: int
) -> None:
    tensors, config, weight = made(rng, bits=4, version=version)
    config = {"quant_method": "auto-round", "bits": 4, "packing_format": packing, "group_size": 32}
    packed = only(folder(tmp_path, tensors, config))
    assert torch.equal(packed.dequantize().half(), weight.half())


def test_zeros_of_the_other_version_are_refused(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, config, _ = made(rng, bits=4, version=2, symmetric=True)
    with pytest.raises(UnsupportedError, match="gptq_v2"):
        only(folder(tmp_path, tensors, config | {"checkpoint_format": "gptq"}))


def test_damage_is_named(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, config, weight = made(rng, bits=4, act_order=True)
    lacking = {name: tensor for name, tensor in tensors.items() if "qzeros" not in name}
    with pytest.raises(UsageError, match="qzeros"):
        only(folder(tmp_path / "a", lacking, config))
    narrow = tensors | {f"{NAME}.scales": tensors[f"{NAME}.scales"][:, :60]}
    with pytest.raises(UnsupportedError, match=r"\[3, 60\]"):
        only(folder(tmp_path / "b", narrow, config))
    wild = tensors | {f"{NAME}.g_idx": tensors[f"{NAME}.g_idx"] + 1}
    with pytest.raises(UsageError, match="group 3"):
        only(folder(tmp_path / "c", wild, config)).dequantize()
    short = tensors | {f"{NAME}.g_idx": tensors[f"{NAME}.g_idx"][:50]}
    with pytest.raises(UsageError, match="g_idx"):
        only(folder(tmp_path / "d", short, config))
    packed = only(folder(tmp_path / "e", tensors, config))
    weight = packed.dequantize().clone()
    weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="NaN"):
        packed.format.quantize(packed, weight)


def test_a_component_of_a_pipeline(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, config, weight = made(rng, bits=4, version=2)
    folder(tmp_path / "transformer", tensors, config)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "Pipeline", "transformer": ["diffusers", "Model"]})
    )
    packed = only(open_checkpoint(str(tmp_path)))
    assert packed.name == f"transformer:{NAME}.weight"
    assert torch.equal(packed.dequantize().half(), weight.half())
    check_unchanged(packed)


def test_transposed_models_are_refused(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, config, _ = made(rng, bits=4)
    folder(tmp_path, tensors, config)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"gpt2"'))
    with pytest.raises(UnsupportedError, match="gpt2"):
        only(open_checkpoint(str(tmp_path)))
