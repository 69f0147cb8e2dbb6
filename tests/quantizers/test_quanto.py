"""optimum-quanto files: parity with the package both ways, shapes, bytes, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
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
    viewed,
)

SHORT = ("qint4", "qint2")
KINDS = ("qint8", "qfloat8", "qfloat8_e5m2", *SHORT)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(48, 256), (7, 192), (5, 160), (9, 288), (33, 50), (130, 64), (3, 131), (11, 1)]


def made(
    model: nn.Module, kind: str, rng: torch.Generator, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the package's file, the weights they stand for)."""
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) + 0.3
    model.to(dtype)
    quantize(model, weights=qtypes[kind])
    freeze(model)
    dense = {
        f"{name}.weight": Tensor.dequantize(model.get_parameter(f"{name}.weight")).detach()
        for name in quantization_map(model)
    }
    return {name: part.detach() for name, part in model.state_dict().items()}, dense


def linear(
    shape: tuple[int, int], kind: str, rng: torch.Generator, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    tensors, dense = made(model, kind, rng, dtype)
    return tensors, dense["0.weight"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reads_what_the_package_packs(
    tmp_path: Path,
    rng: torch.Generator,
    shape: tuple[int, int],
    kind: str,
    dtype: torch.dtype,
) -> None:
    tensors, dense = linear(shape, kind, rng, dtype)
    packed = only(folder(tmp_path, tensors, None))
    assert packed.name == "0.weight"
    assert packed.shape == shape
    assert torch.equal(packed.dequantize().to(dtype), dense)
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qint8", "qfloat8", *SHORT])
def test_a_convolution_whose_rows_are_not_cut(
    tmp_path: Path, rng: torch.Generator, kind: str, dtype: torch.dtype
) -> None:
    tensors, dense = made(nn.Sequential(nn.Conv2d(5, 9, 3)), kind, rng, dtype)
    packed = only(folder(tmp_path, tensors, None))
    assert packed.shape == (9, 5, 3, 3)
    assert torch.equal(packed.dequantize().to(dtype), dense["0.weight"])
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("kind", SHORT)
def test_one_output(tmp_path: Path, rng: torch.Generator, kind: str) -> None:
    """The package then has a scale for each input, and the bits are known to the map alone."""
    tensors, dense = linear((1, 56), kind, rng, torch.float16)
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
def test_whole_zeros(tmp_path: Path, rng: torch.Generator, kind: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(12, 256, generator=rng) + 0.2).to(dtype)
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
@pytest.mark.parametrize("shape", [(48, 256), (7, 160), (33, 50), (12, 96)])
@pytest.mark.parametrize("kind", ["qint8", "qfloat8", *SHORT])
def test_the_package_reads_what_is_packed_afresh(
    tmp_path: Path, rng: torch.Generator, kind: str, shape: tuple[int, int], native: str
) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[native]
    format = by_name("quanto-fp8" if kind == "qfloat8" else "quanto")
    options = {} if kind == "qfloat8" else {"bits": int(kind[4:])}
    weight = torch.randn(shape, generator=rng).to(dtype).float() + 0.1
    weight[3], weight[4] = 0.25, 0
    outline = format.fresh("0.weight", shape, native, **options)
    tensors = as_stored(outline, format.quantize(outline, weight))
    tensors["0.bias"] = torch.zeros(shape[0], dtype=dtype)
    theirs, _ = linear(shape, kind, rng, dtype)
    assert {k: (v.dtype, v.shape) for k, v in tensors.items()} == {
        k: (v.dtype, v.shape) for k, v in theirs.items()
    }
    packed = only(folder(tmp_path, tensors, format.config(**options)))
    assert packed.format is format
    check_rows(packed)
    check_unchanged(packed)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=dtype))
    requantize(model, dict(tensors), {"0": {"weights": qtypes[kind].name, "activations": "none"}})
    dense = Tensor.dequantize(model.get_parameter("0.weight")).detach()
    assert torch.equal(packed.dequantize().to(dtype), dense)
    scale = packed.whole("scale").float()
    scale = scale.repeat_interleave(weight.numel() // scale.numel()).reshape(shape)
    loss = {"F32": 2**-22, "F16": 2**-11, "BF16": 2**-8}[native] * 2
    step = torch.maximum(weight.abs() / 8, scale / 512) if kind == "qfloat8" else scale
    levels = 2 ** int(kind[4:]) if "bits" in options else 1
    most = step * 0.5001 + loss * (weight.abs() + (scale * levels if kind in SHORT else 0))
    assert bool(((packed.dequantize() - weight).abs() <= most).all())


def test_diffusers_loads_a_model_packed_here(tmp_path: Path, rng: torch.Generator) -> None:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        cross_attention_dim=32,
        caption_channels=8,
        sample_size=4,
        norm_num_groups=4,
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
def test_a_merge_keeps_its_direction(tmp_path: Path, rng: torch.Generator, kind: str) -> None:
    tensors, _ = linear((24, 256), kind, rng, torch.float32)
    check_merged(only(folder(tmp_path, tensors, None)), rng)


class Heads(nn.Module):
    def __init__(self, layers: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, (rows, columns) in layers.items():
            setattr(self, name, nn.Linear(columns, rows, bias=False))


SIZES = {
    "llama": {
        **{"hidden_size": 256, "intermediate_size": 384, "vocab_size": 64},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 48},
    },
    "t5": {"d_model": 192, "d_ff": 320, "num_heads": 5, "d_kv": 64},
}
LAYERS = {
    "llama": {
        **{"q_proj": (384, 256), "k_proj": (96, 256), "v_proj": (96, 256), "o_proj": (256, 384)},
        **{"gate_proj": (384, 256), "up_proj": (384, 256), "down_proj": (256, 384)},
        **{"lm_head": (64, 256)},
    },
    "t5": {
        **{"q": (320, 192), "k": (320, 192), "v": (320, 192), "o": (192, 320)},
        **{"wi": (320, 192), "wi_0": (320, 192), "wi_1": (320, 192), "wo": (192, 320)},
    },
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("family", SIZES)
def test_shapes_of_layers_without_a_bias(
    tmp_path: Path, rng: torch.Generator, family: str, wrapped: bool
) -> None:
    tensors, dense = made(Heads(LAYERS[family]), "qint4", rng, torch.float16)
    checkpoint = folder(tmp_path, tensors, None)
    with pytest.raises(UnsupportedError, match=r"neither a bias nor config\.json"):
        viewed(checkpoint)
    config = {"text_config": SIZES[family]} if wrapped else SIZES[family]
    (tmp_path / "config.json").write_text(json.dumps(config))
    view = viewed(open_checkpoint(str(tmp_path)))
    assert {n: p.shape for n, p in view.packed.items()} == {
        f"{name}.weight": shape for name, shape in LAYERS[family].items()
    }
    for name, packed in view.packed.items():
        assert torch.equal(packed.dequantize().half(), dense[name])
    other = {key: 2 * size for key, size in SIZES[family].items()}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UnsupportedError, match=r"neither a bias nor config\.json"):
        viewed(open_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("name", ["conv_in", "patch_embed", "down.0.proj_in"])
def test_cut_rows_of_a_convolution_are_refused(
    tmp_path: Path, rng: torch.Generator, name: str
) -> None:
    tensors, _ = made(nn.Sequential(nn.Conv2d(32, 9, 3)), "qint4", rng, torch.float32)
    stored = {key.replace("0.", f"{name}.", 1): part for key, part in tensors.items()}
    folder(tmp_path, stored, None)
    (tmp_path / "config.json").write_text(json.dumps({"down_block_types": []}))
    with pytest.raises(UnsupportedError, match="convolution"):
        viewed(open_checkpoint(str(tmp_path)))


def test_two_groups_need_to_be_told_their_bits(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, dense = linear((2, 56), "qint2", rng, torch.float32)
    with pytest.raises(UsageError, match="neither int4 nor int2"):
        only(folder(tmp_path, tensors, None))
    for key in ("weights", "weights_dtype"):
        config = {"quant_method": "quanto", key: "int2"}
        packed = only(folder(tmp_path, tensors, config))
        assert torch.equal(packed.dequantize(), dense)
        check_unchanged(packed)


def test_components_of_a_pipeline(tmp_path: Path, rng: torch.Generator) -> None:
    model, tensors, dense = tmp_path / "pipe", *linear((1, 56), "qint4", rng, torch.float32)
    for name, kind in (("transformer", "int4"), ("other", "int2")):
        (model / name).mkdir(parents=True)
        save_file(tensors, model / name / "diffusion_pytorch_model.safetensors")
        config = {"quantization_config": {"quant_method": "quanto", "weights_dtype": kind}}
        (model / name / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "P", **{n: ["diffusers", "M"] for n in ("transformer", "other")}}
    (model / "model_index.json").write_text(json.dumps(index))
    view = viewed(open_checkpoint(str(model)))
    assert {n: p.fields["bits"] for n, p in view.packed.items()} == {
        "transformer:0.weight": 4,
        "other:0.weight": 2,
    }
    assert torch.equal(view["transformer:0.weight"].torch(), dense)


def test_damage_is_named(tmp_path: Path, rng: torch.Generator) -> None:
    whole, _ = linear((12, 256), "qint8", rng, torch.float32)
    short, _ = linear((12, 256), "qint4", rng, torch.float32)

    def refused(place: str, tensors: Mapping[str, Tensor], change: dict[str, Tensor | None]) -> str:
        new = {**tensors, **{f"0.{key}": part for key, part in change.items()}}
        stored = {key: part for key, part in new.items() if part is not None}
        with pytest.raises((UsageError, UnsupportedError)) as caught:
            only(folder(tmp_path / place, stored, None))
        return str(caught.value)

    assert "'0.weight._scale' is missing" in refused("a", whole, {"weight._scale": None})
    assert "one scale for each row" in refused("b", whole, {"weight._scale": torch.ones(11, 1)})
    assert "one scale for each row" in refused("c", whole, {"weight._scale": torch.ones(())})
    wide = torch.zeros(12, 256, dtype=torch.int16)
    assert "I16" in refused("d", whole, {"weight._data": wide})
    assert "'0.weight._shift' is missing" in refused("e", short, {"weight._shift": None})
    assert "shifts F32" in refused("f", short, {"weight._shift": torch.ones(3, 1)})
    assert "neither int4" in refused(
        "g", short, {"weight._data._data": torch.zeros(7, 128, dtype=torch.uint8)}
    )
    assert "neither a bias" in refused("h", short, {"bias": torch.zeros(7)})
    assert "one scale for each group" in refused(
        "i", short, {"weight._scale": torch.ones(24, 2), "weight._shift": torch.ones(24, 2)}
    )
    packed = only(folder(tmp_path / "j", short, None))
    holed = packed.dequantize().clone()
    holed[0, 0] = torch.nan
    with pytest.raises(UsageError, match="NaN"):
        packed.format.quantize(packed, holed)


def test_what_does_not_fit_is_named() -> None:
    for name in ("quanto", "quanto-fp8"):
        with pytest.raises(UnsupportedError, match=r"x\.weight"):
            by_name(name).fresh("x.weight", (8, 8, 3), "F16")
        with pytest.raises(UsageError, match="3 bits"):
            by_name(name).fresh("x.weight", (8, 64), "F16", bits=3)
    outline: Packed = by_name("quanto").fresh("x.weight", (8, 64), "F16", bits=4)
    with pytest.raises(UsageError, match="too large"):
        outline.format.quantize(outline, torch.arange(512.0).reshape(8, 64) * 1e4)


def test_the_weight_is_seen_and_its_parts_are_not(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, dense = linear((24, 256), "qint4", rng, torch.float32)
    view = logical(folder(tmp_path, tensors, None))
    assert sorted(view) == ["0.bias", "0.weight"]
    assert isinstance(view["0.weight"], PackedTensor)
    assert torch.equal(view["0.weight"].rows(3, 20).torch(), dense[3:20])
