"""optimum-quanto files: parity with the package both ways, shapes, bytes, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from optimum.quanto import (
    MaxOptimizer,
    WeightQBitsTensor,
    freeze,
    qtypes,
    quantization_map,
    quantize,
    requantize,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import Packed, PackedTensor, by_name, logical
from tests.quantizers.integer_files import (
    as_stored,
    check_merged,
    check_rows,
    check_unchanged,
    folder,
    only,
    remade,
    viewed,
)

SHORT = ("qint4", "qint2")
KINDS = ("qint8", "qfloat8", "qfloat8_e5m2", *SHORT)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(48, 256), (7, 192), (5, 160), (9, 288), (33, 50), (130, 64), (3, 131), (11, 1)]


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(torch.seed() % 2**31)


def made(
    model: nn.Module, kind: str, random: torch.Generator, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the package's file, the weights they stand for)."""
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) + 0.3
    model.to(dtype)
    quantize(model, weights=qtypes[kind])
    freeze(model)
    dense = {
        f"{name}.weight": model.get_submodule(name).weight.dequantize().detach()
        for name in quantization_map(model)
    }
    return {name: part.detach() for name, part in model.state_dict().items()}, dense


def linear(
    shape: tuple[int, int], kind: str, random: torch.Generator, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    tensors, dense = made(model, kind, random, dtype)
    return tensors, dense["0.weight"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reads_what_the_package_packs(
    tmp_path: Path,
    random: torch.Generator,
    shape: tuple[int, int],
    kind: str,
    dtype: torch.dtype,
) -> None:
    tensors, dense = linear(shape, kind, random, dtype)
    packed = only(folder(tmp_path, tensors, None))
    assert packed.name == "0.weight"
    assert packed.shape == shape
    assert torch.equal(packed.dequantize().to(dtype), dense)
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qint8", "qfloat8", *SHORT])
def test_a_convolution_whose_rows_are_not_cut(
    tmp_path: Path, random: torch.Generator, kind: str, dtype: torch.dtype
) -> None:
    tensors, dense = made(nn.Sequential(nn.Conv2d(5, 9, 3)), kind, random, dtype)
    packed = only(folder(tmp_path, tensors, None))
    assert packed.shape == (9, 5, 3, 3)
    assert torch.equal(packed.dequantize().to(dtype), dense["0.weight"])
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("kind", SHORT)
def test_one_output(tmp_path: Path, random: torch.Generator, kind: str) -> None:
    """The package then has a scale for each input, and the bits are known to the map alone."""
    tensors, dense = linear((1, 56), kind, random, torch.float16)
    with pytest.raises(UsageError, match="neither int4 nor int2"):
        only(folder(tmp_path, tensors, None))
    (tmp_path / "quanto_qmap.json").write_text(json.dumps({"0": {"weights": kind}}))
    packed = only(open_checkpoint(str(tmp_path)))
    assert packed.shape == (1, 56)
    assert torch.equal(packed.dequantize().half(), dense)
    check_unchanged(packed)
    moved = packed.format.quantize(packed, packed.dequantize() + 1)
    file = as_stored(packed, moved)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "quanto_qmap.json").write_text(json.dumps({"0": {"weights": kind}}))
    found = only(folder(tmp_path / "again", tensors | file, None))
    assert torch.allclose(found.dequantize(), packed.dequantize() + 1, rtol=2**-9)


@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_zeros(
    tmp_path: Path, random: torch.Generator, kind: str, dtype: torch.dtype
) -> None:
    weight = (torch.randn(12, 256, generator=random) + 0.2).to(dtype)
    scale, shift = MaxOptimizer()(weight, qtypes[kind], 0, 128, zeropoint=True)
    stored = WeightQBitsTensor.quantize(weight, qtypes[kind], 0, 128, scale, shift, False)
    tensors: dict[str, Tensor] = {"0.bias": torch.zeros(12)}
    stored.save_to_state_dict(tensors, "0.weight.", False)
    packed = only(folder(tmp_path, tensors, None))
    assert packed.outlines["shift"].dtype == "U8"
    assert torch.equal(packed.dequantize().to(dtype), stored.dequantize())
    check_rows(packed)
    check_unchanged(packed)
    doubled = packed.format.quantize(packed, 2 * packed.dequantize())
    assert doubled["shift"].dtype == torch.uint8
    assert torch.allclose(doubled["scale"].float(), 2 * packed.whole("scale").float(), rtol=0.5)


@pytest.mark.parametrize("native", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(40, 256), (7, 160), (33, 50), (12, 96)])
@pytest.mark.parametrize("kind", ["qint8", "qfloat8", *SHORT])
def test_the_package_reads_what_is_packed_afresh(
    tmp_path: Path, random: torch.Generator, kind: str, shape: tuple[int, int], native: str
) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[native]
    format = by_name("quanto-fp8" if kind == "qfloat8" else "quanto")
    options = {} if kind == "qfloat8" else {"bits": int(kind[4:])}
    weight = torch.randn(shape, generator=random).to(dtype).float() + 0.1
    weight[3], weight[4] = 0.25, 0
    outline = format.fresh("0.weight", shape, native, **options)
    tensors = as_stored(outline, format.quantize(outline, weight))
    tensors["0.bias"] = torch.zeros(shape[0], dtype=dtype)
    theirs, _ = linear(shape, kind, random, dtype)
    assert {k: (v.dtype, v.shape) for k, v in tensors.items()} == {
        k: (v.dtype, v.shape) for k, v in theirs.items()
    }
    packed = only(folder(tmp_path, tensors, format.config(**options)))
    assert packed.format is format
    check_rows(packed)
    check_unchanged(packed)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=dtype))
    requantize(model, dict(tensors), {"0": {"weights": qtypes[kind].name, "activations": "none"}})
    dense = model[0].weight.dequantize().detach()
    assert torch.equal(packed.dequantize().to(dtype), dense)
    scale = packed.whole("scale").float()
    scale = scale.repeat_interleave(weight.numel() // scale.numel()).reshape(shape)
    loss = {"F32": 2**-22, "F16": 2**-11, "BF16": 2**-8}[native] * 2
    step = torch.maximum(weight.abs() / 8, scale / 512) if kind == "qfloat8" else scale
    levels = 2 ** int(kind[4:]) if "bits" in options else 1
    most = step * 0.5001 + loss * (weight.abs() + (scale * levels if kind in SHORT else 0))
    assert bool(((packed.dequantize() - weight).abs() <= most).all())


def test_diffusers_loads_a_model_packed_here(tmp_path: Path, random: torch.Generator) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    model = PixArtTransformer2DModel(
        **sizes, cross_attention_dim=32, caption_channels=8, sample_size=4, norm_num_groups=4
    )
    model.save_pretrained(tmp_path / "plain")
    format = by_name("quanto")
    tensors: dict[str, Tensor] = {}
    names = []
    for name, weight in load_file(
        tmp_path / "plain" / "diffusion_pytorch_model.safetensors"
    ).items():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and weight.ndim == 2:
            outline = format.fresh(name, tuple(weight.shape), "F32")
            tensors |= as_stored(outline, format.quantize(outline, weight))
            names.append(name)
        else:
            tensors[name] = weight
    ours = tmp_path / "ours"
    ours.mkdir()
    save_file(tensors, ours / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = format.config()
    (ours / "config.json").write_text(json.dumps(config))
    view = viewed(open_checkpoint(str(ours)))
    loaded = PixArtTransformer2DModel.from_pretrained(ours)
    assert set(view.packed) == set(names)
    for name, packed in view.packed.items():
        assert torch.equal(packed.dequantize(), loaded.get_parameter(name).dequantize())


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", *SHORT])
def test_a_merge_keeps_its_direction(tmp_path: Path, random: torch.Generator, kind: str) -> None:
    tensors, _ = linear((24, 256), kind, random, torch.float32)
    check_merged(only(folder(tmp_path, tensors, None)), random)
