"""torchao files: parity with the package both ways, its loaders, bytes, refusals; of int4, whose
kernel needs a GPU, parity with a decoder that reads nibble by nibble.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig, config_from_dict
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerTensor,
    quantize_,
)
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import Packed, by_name
from peftsurgery.quantizers.torchao import TorchAO, TorchAOFloat8
from peftsurgery.quantizers.torchao_int4 import TorchAOInt4
from tests.quantizers.integer_files import (
    as_stored,
    check_merged,
    check_rows,
    check_unchanged,
    only,
    viewed,
)

NAME = "model.layers.0.mlp.up_proj"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009
CONFIGS: dict[str, AOBaseConfig] = {
    "int8": Int8WeightOnlyConfig(),
    "int8 tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "int8 groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int8 activations": Int8DynamicActivationInt8WeightConfig(),
    "int8 reduced": Int8DynamicActivationInt8WeightConfig(reduce_range=True),
    "float8": Float8WeightOnlyConfig(),
    "float8 e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    "float8 tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
    "intx activations": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=INT4, weight_granularity=PerGroup(32)
    ),
    "int4 zeros": IntxWeightOnlyConfig(
        weight_dtype=INT4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
    ),
    **{
        f"int{n}": IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{n}")) for n in range(1, 8)
    },
}


def written(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, path / "model.safetensors", dict(metadata))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def flattened(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    return flatten_tensor_state_dict(dict(state))  # pyright: ignore[reportArgumentType]


def made(
    config: AOBaseConfig, shape: tuple[int, int], dtype: torch.dtype, rng: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, str], Tensor]:
    """(tensors, metadata, the weight they stand for), made by the package."""
    layer = nn.Linear(shape[1], shape[0], bias=True, dtype=dtype)
    layer.weight.data = (torch.randn(shape, generator=rng) + 0.2).to(dtype)
    quantize_(layer, config)
    assert isinstance(layer.weight, torch.Tensor)
    dense = layer.weight.dequantize()
    state = {f"{NAME}.{name}": part.detach() for name, part in layer.state_dict().items()}
    return *flattened(state), dense.detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (7, 96), (1, 32)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_reads_what_the_package_packs(
    tmp_path: Path,
    rng: torch.Generator,
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    tensors, metadata, dense = made(CONFIGS[kind], shape, dtype, rng)
    packed = only(open_checkpoint(written(tmp_path, tensors, metadata)))
    assert packed.name == f"{NAME}.weight"
    assert packed.shape == shape
    assert packed.native == {"float32": "F32", "float16": "F16"}.get(str(dtype)[6:], "BF16")
    assert torch.equal(packed.dequantize().to(dtype), dense)
    check_rows(packed)
    check_unchanged(packed)


def refreshed(
    path: Path, name: str, weight: Tensor, native: str, **options: object
) -> tuple[Packed, dict[str, Tensor], dict[str, str]]:
    """(packed afresh and opened again, tensors, metadata)."""
    format = by_name(name)
    assert isinstance(format, (TorchAO, TorchAOInt4, TorchAOFloat8))
    outline = format.fresh(f"{NAME}.weight", tuple(weight.shape), native, **options)
    tensors = as_stored(outline, format.quantize(outline, weight))
    metadata = format.metadata([outline], [])
    packed = only(open_checkpoint(written(path, tensors, metadata)))
    assert packed.format is format
    assert packed.outlines == outline.outlines
    check_rows(packed)
    check_unchanged(packed)
    return packed, tensors, metadata


@pytest.mark.parametrize("native", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("torchao", "int8", {}),
        ("torchao", "int8 groups", {"group": 32}),
        ("torchao-fp8", "float8", {}),
    ],
)
def test_the_package_reads_what_is_packed_afresh(
    tmp_path: Path,
    rng: torch.Generator,
    name: str,
    kind: str,
    options: dict[str, object],
    native: str,
) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[native]
    tensors, metadata, _ = made(CONFIGS[kind], (40, 96), dtype, rng)
    weight = torch.randn(40, 96, generator=rng).to(dtype).float()
    weight[3], weight[4] = 0.25, 0
    packed, ours, told = refreshed(tmp_path, name, weight, native, **options)
    theirs = {key: part for key, part in tensors.items() if not key.endswith(".bias")}
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {
        k: (v.dtype, v.shape) for k, v in theirs.items()
    }
    assert json.loads(told[f"{NAME}.weight"]) == json.loads(metadata[f"{NAME}.weight"])
    state, left = unflatten_tensor_state_dict(dict(ours), told)
    assert not left
    dense = state[f"{NAME}.weight"].dequantize()
    assert torch.equal(packed.dequantize().to(dtype), dense)
    scale = packed.whole("scale").repeat_interleave(96 // packed.whole("scale").shape[1], 1)
    error = (packed.dequantize() - weight).abs()
    step = scale if name == "torchao" else torch.maximum(weight.abs() / 8, scale / 512)
    assert bool((error <= step * 0.5001).all())
    config = packed.format.config(**options)
    assert config is not None
    assert config_from_dict(config["quant_type"]["default"]) == CONFIGS[kind]  # pyright: ignore


def llama(path: Path, config: AOBaseConfig | None) -> LlamaForCausalLM:
    about = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        vocab_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(about)
    model.save_pretrained(path / "plain")
    if config is None:
        return model
    quantized = TorchAoConfig(config)
    model = LlamaForCausalLM.from_pretrained(path / "plain", quantization_config=quantized)
    model.save_pretrained(path / "packed", max_shard_size="40KB")
    return model


def test_a_sharded_folder_of_transformers(tmp_path: Path) -> None:
    model = llama(tmp_path, Int8WeightOnlyConfig())
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    assert len(checkpoint.files) > 1
    view = viewed(checkpoint)
    assert len(view.packed) == 7
    for name, packed in view.packed.items():
        dense = model.get_parameter(name).dequantize()
        assert torch.equal(packed.dequantize().to(dense.dtype), dense)
    assert not [name for name in view if "_weight_" in name]


def test_shards_that_say_of_themselves_alone(tmp_path: Path, rng: torch.Generator) -> None:
    weights: dict[str, str] = {}
    dense: dict[str, Tensor] = {}
    for shard, (kind, own) in enumerate((("int8", "a"), ("float8", "b"), ("int4 zeros", "c"))):
        tensors, metadata, found = made(CONFIGS[kind], (16, 64), torch.float32, rng)
        stored = {name.replace(NAME, own): part for name, part in tensors.items()}
        about = {name.replace(NAME, own): text for name, text in metadata.items()}
        save_file(stored, tmp_path / f"{shard}.safetensors", about)
        weights.update(dict.fromkeys(stored, f"{shard}.safetensors"))
        dense[f"{own}.weight"] = found
    index = {"metadata": {"total_size": 0}, "weight_map": weights}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    view = viewed(open_checkpoint(str(tmp_path / "model.safetensors.index.json")))
    assert {name: packed.format.name for name, packed in view.packed.items()} == {
        "a.weight": "torchao",
        "b.weight": "torchao-fp8",
        "c.weight": "torchao",
    }
    for name, weight in dense.items():
        assert torch.equal(view[name].torch(), weight)


@pytest.mark.parametrize("name", ["torchao", "torchao-fp8"])
def test_transformers_loads_a_model_packed_here(tmp_path: Path, name: str) -> None:
    llama(tmp_path, None)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    format = by_name(name)
    assert isinstance(format, (TorchAO, TorchAOFloat8))
    packed, tensors = [], {}
    for key, weight in plain.items():
        if key.endswith("_proj.weight"):
            packed.append(format.fresh(key, tuple(weight.shape), "F32"))
            tensors |= as_stored(packed[-1], format.quantize(packed[-1], weight))
        else:
            tensors[key] = weight
    metadata = format.metadata(packed, [key for key in plain if key in tensors])
    folder = written(tmp_path / "ours", tensors, {"format": "pt", **metadata})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = format.config()
    (folder / "config.json").write_text(json.dumps(config))
    view = viewed(open_checkpoint(str(folder)))
    model = LlamaForCausalLM.from_pretrained(folder)
    assert set(view.packed) == {item.name for item in packed}
    for key, item in view.packed.items():
        found = model.get_parameter(key)
        assert type(found).__name__ == json.loads(metadata[key])["_type"]
        assert torch.equal(item.dequantize().to(found.dtype), found.dequantize())


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_stacks_of_experts(tmp_path: Path, rng: torch.Generator, kind: str) -> None:
    experts = torch.randn(3, 8, 32, generator=rng)
    holder = nn.Module()
    holder.gate_up_proj = nn.Parameter(experts)
    quantize_(holder, FqnToConfig(OrderedDict(gate_up_proj=CONFIGS[kind])), filter_fn=None)
    packed_by_package = holder.gate_up_proj
    state = {"mlp.experts.gate_up_proj": packed_by_package.detach()}
    packed = only(open_checkpoint(written(tmp_path, *flattened(state))))
    assert packed.name == "mlp.experts.gate_up_proj"
    assert torch.equal(packed.dequantize(), packed_by_package.dequantize())
    check_rows(packed)
    check_unchanged(packed)
    check_merged(packed, rng)


@pytest.mark.parametrize("kind", ["int8", "int8 groups", "int4", "int4 zeros", "float8"])
def test_a_merge_keeps_its_direction(tmp_path: Path, rng: torch.Generator, kind: str) -> None:
    tensors, metadata, _ = made(CONFIGS[kind], (40, 64), torch.float32, rng)
    check_merged(only(open_checkpoint(written(tmp_path, tensors, metadata))), rng)


def by_nibbles(tensors: Mapping[str, Tensor], group: int) -> Tensor:
    """Int4Tensor read one code at a time."""
    codes, scale, zero = (
        tensors[f"{NAME}._weight_{part}"] for part in ("qdata", "scale", "zero_point")
    )
    dense = torch.zeros(codes.shape[0], codes.shape[1] * 2)
    for row, column in [(r, c) for r in range(dense.shape[0]) for c in range(dense.shape[1])]:
        byte = int(codes[row, column // 2]) & 255
        nibble = byte >> 4 if column % 2 else byte & 15
        code = nibble - 16 if nibble > 7 else nibble
        place = column // group, row
        dense[row, column] = scale[place].float() * code + zero[place].float()
    return dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "group"), [((9, 64), 32), ((4, 128), 64), ((1, 40), 32)])
def test_int4(
    tmp_path: Path,
    rng: torch.Generator,
    shape: tuple[int, int],
    group: int,
    dtype: torch.dtype,
) -> None:
    codes = torch.randint(-128, 128, (shape[0], shape[1] // 2), generator=rng)
    groups = (-(-shape[1] // group), shape[0])
    scale = torch.rand(groups, generator=rng).to(dtype) + 0.1
    zero = torch.randn(groups, generator=rng).to(dtype)
    size = torch.Size(shape)
    tensor = Int4Tensor(codes.to(torch.int8), scale, zero, [1, group], size)
    tensors, metadata = flattened({f"{NAME}.weight": tensor})
    packed = only(open_checkpoint(written(tmp_path, tensors, metadata)))
    assert packed.shape == shape
    assert torch.equal(packed.dequantize(), by_nibbles(tensors, group))
    check_rows(packed)
    check_unchanged(packed)
    check_merged(packed, rng)


@pytest.mark.parametrize("native", ["F16", "BF16"])
def test_int4_afresh(tmp_path: Path, rng: torch.Generator, native: str) -> None:
    weight = torch.randn(10, 96, generator=rng) + 0.5
    weight[3], weight[4] = 0.25, 0
    packed, tensors, metadata = refreshed(tmp_path, "torchao-int4", weight, native, group=32)
    assert torch.equal(packed.dequantize(), by_nibbles(tensors, 32))
    scale = packed.whole("scale").float().T.repeat_interleave(32, 1)
    loss = {"F16": 2**-11, "BF16": 2**-8}[native] * (weight.abs() + 16 * scale)
    assert bool(((packed.dequantize() - weight).abs() <= scale * 0.5001 + loss).all())
    state, left = unflatten_tensor_state_dict(dict(tensors), metadata)
    assert not left
    assert isinstance(state[f"{NAME}.weight"], Int4Tensor)
    config = packed.format.config(group=32)
    assert config is not None
    assert config_from_dict(config["quant_type"]["default"]).group_size == 32  # pyright: ignore


def test_symmetric_int4_stays_symmetric(tmp_path: Path, rng: torch.Generator) -> None:
    codes = torch.randint(-128, 128, (6, 32), generator=rng).to(torch.int8)
    scale = torch.rand(2, 6, generator=rng).bfloat16() + 0.1
    tensor = Int4Tensor(codes, scale, torch.zeros_like(scale), [1, 32], torch.Size((6, 64)))
    stored = flattened({f"{NAME}.weight": tensor})
    packed = only(open_checkpoint(written(tmp_path, *stored)))
    parts = packed.format.quantize(packed, 3 * packed.dequantize())
    assert not bool(parts["zero"].any())
    assert torch.allclose(parts["scale"].float(), 3 * scale.float(), rtol=0.15)


def test_damage_and_variants_are_named(tmp_path: Path, rng: torch.Generator) -> None:
    tensors, metadata, _ = made(CONFIGS["int8 groups"], (16, 64), torch.float32, rng)
    key = f"{NAME}.weight"
    told = json.loads(metadata[key])

    def refused(place: str, change: Mapping[str, Tensor | None], entry: object = told) -> str:
        new = {**tensors, **{f"{NAME}._weight_{part}": value for part, value in change.items()}}
        stored = {name: part for name, part in new.items() if part is not None}
        about = {**metadata, key: entry if isinstance(entry, str) else json.dumps(entry)}
        with pytest.raises((UsageError, UnsupportedError)) as caught:
            only(open_checkpoint(written(tmp_path / place, stored, about)))
        return str(caught.value)

    assert "_weight_scale is missing" in refused("a", {"scale": None})
    assert "do not fit" in refused("b", {"scale": torch.ones(16, 3)})
    assert "differ in shape" in refused("c", {"zero_point": torch.zeros(16, 1, dtype=torch.int8)})
    assert "F32" in refused("d", {"zero_point": torch.zeros(16, 2)})
    assert "scales F64" in refused("s", {"scale": torch.ones(16, 2, dtype=torch.float64)})
    assert "no JSON" in refused("e", {}, '{"_type": ')
    for number, entry in enumerate((["_type"], {**told, "_data": 3}, {"_data": {"_type": 1}})):
        assert "not as torchao writes" in refused(f"e{number}", {}, entry)
    assert "not as torchao" in refused("p", {}, {**told, "_tensor_data_names": [["qdata"]]})
    names = [*told["_tensor_data_names"], "act_pre_scale"]
    scaled = {**told, "_tensor_data_names": names}
    assert "AWQ or SmoothQuant" in refused("f", {"act_pre_scale": torch.ones(64)}, scaled)
    for kind, reason in (("Int4TilePackedTo4dTensor", "tinygemm"), ("MXTensor", "scales lie")):
        assert reason in refused(kind, {}, {**told, "_type": kind})
    assert "not known" in refused("g", {}, {**told, "_type": "NewTensor"})
    assert "does not say how" in refused("h", {}, {"_type": "Tensor"})
    data = {**told["_data"], "dtype": {"_type": "torch.dtype", "_data": "float64"}}
    assert "float64" in refused("i", {}, {**told, "_data": data})


def test_metadata_of_weights_that_are_no_longer_there(tmp_path: Path, rng: torch.Generator) -> None:
    _, metadata, dense = made(CONFIGS["int8"], (16, 64), torch.float32, rng)
    checkpoint = open_checkpoint(written(tmp_path, {f"{NAME}.weight": dense}, metadata))
    assert not list(by_name("torchao").find(checkpoint))


def test_what_does_not_fit_is_named() -> None:
    for name in ("torchao", "torchao-int4", "torchao-fp8"):
        with pytest.raises(UnsupportedError, match=r"x\.weight"):
            by_name(name).fresh("x.weight", (8, 8, 3), "F16")
    with pytest.raises(UnsupportedError, match="group, 48"):
        by_name("torchao-int4").fresh("x.weight", (8, 64), "F16", group=48)
    with pytest.raises(UsageError, match="3 bits"):
        by_name("torchao").fresh("x.weight", (8, 64), "F16", bits=3)
    outline = by_name("torchao-int4").fresh("x.weight", (8, 128), "F16")
    with pytest.raises(UsageError, match="NaN"):
        outline.format.quantize(outline, torch.full((8, 128), torch.nan))
    with pytest.raises(UsageError, match="too large"):
        outline.format.quantize(outline, torch.arange(1024.0).reshape(8, 128) * 1e6)
