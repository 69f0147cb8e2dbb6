"""Whole numbers of compressed-tensors: parity with the library both ways, bytes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from transformers import CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

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
    row_words,
    viewed,
)

NAME = "model.layers.0.mlp.up_proj"
PACKED: type[BaseCompressor] = PackedQuantizationCompressor
PLAIN: type[BaseCompressor] = IntQuantizationCompressor
Made = tuple[dict[str, Tensor], dict[str, object], QuantizationScheme, Tensor]


def made(
    compressor: type[BaseCompressor],
    weight: Tensor,
    *,
    bits: int,
    strategy: str,
    group: int | None = None,
    symmetric: bool = True,
) -> Made:
    """(tensors, quantization_config, scheme, the weight they stand for), made by the library."""
    args = QuantizationArgs(
        num_bits=bits,
        type="int",  # pyright: ignore[reportArgumentType]
        strategy=strategy,  # pyright: ignore[reportArgumentType]
        group_size=group,
        symmetric=symmetric,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    if strategy == "tensor":
        least, greatest = (value.reshape(1) for value in weight.aminmax())
    else:
        wide = weight.unflatten(-1, (-1, group or weight.shape[-1]))
        least, greatest = wide.amin(-1), wide.amax(-1)
    scale, zero = calculate_qparams(least, greatest, args)
    state: dict[str, Tensor | None] = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    if not symmetric:
        state["weight_zero_point"] = zero
    state = compressor.compress(state, scheme)
    dense = compressor.decompress(state, scheme)["weight"]
    kind = "pack-quantized" if compressor is PACKED else "int-quantized"
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=kind)
    tensors = {f"{NAME}.{name}": tensor for name, tensor in state.items() if tensor is not None}
    assert dense is not None
    return tensors, config.model_dump(mode="json"), scheme, dense


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("strategy", "group"), [("group", 16), ("channel", None), ("tensor", None)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_reads_what_the_library_packs(
    tmp_path: Path,
    rng: torch.Generator,
    bits: int,
    strategy: str,
    group: int | None,
    symmetric: bool,
) -> None:
    dtype = torch.bfloat16 if bits % 2 else torch.float16
    weight = (torch.randn(37, 80, generator=rng) * 0.1).to(dtype)
    weight[5] = 0
    tensors, config, _, dense = made(
        PACKED, weight, bits=bits, strategy=strategy, group=group, symmetric=symmetric
    )
    packed = only(folder(tmp_path, tensors, config))
    assert packed.name == f"{NAME}.weight"
    assert packed.shape == (37, 80)
    assert torch.equal(packed.dequantize().to(dtype), dense)
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_reads_what_the_library_stores_as_bytes(
    tmp_path: Path, rng: torch.Generator, strategy: str, symmetric: bool
) -> None:
    weight = torch.randn(37, 45, generator=rng)
    tensors, config, _, dense = made(PLAIN, weight, bits=8, strategy=strategy, symmetric=symmetric)
    tensors[f"{NAME}.input_scale"] = torch.rand(1, generator=rng)
    packed = only(folder(tmp_path, tensors, config))
    assert torch.equal(packed.dequantize(), dense)
    check_rows(packed)
    check_unchanged(packed)
    if strategy == "channel":
        check_merged(packed, rng)


@pytest.mark.parametrize("compressor", [PACKED, PLAIN])
def test_symmetric_weights_with_zeros_stay_symmetric(
    tmp_path: Path, rng: torch.Generator, compressor: type[BaseCompressor]
) -> None:
    weight = torch.randn(24, 32, generator=rng)
    tensors, config, _, dense = made(compressor, weight, bits=8, strategy="channel")
    tensors[f"{NAME}.weight_zero_point"] = torch.zeros(24, 1, dtype=torch.int8)
    packed = only(folder(tmp_path, tensors, config))
    assert torch.equal(packed.dequantize(), dense)
    check_unchanged(packed)
    parts = packed.format.quantize(packed, dense.abs() * 3)
    assert not bool(parts["zero"].any())
    assert bool((parts["scale"] > packed.whole("scale")).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_merge_moves_nothing_else(tmp_path: Path, rng: torch.Generator, symmetric: bool) -> None:
    weight = torch.randn(37, 96, generator=rng)
    tensors, config, _, _ = made(
        PACKED, weight, bits=4, strategy="group", group=32, symmetric=symmetric
    )
    check_merged(only(folder(tmp_path, tensors, config)), rng)


@pytest.mark.parametrize("symmetric", [True, False])
def test_stacked_experts(tmp_path: Path, rng: torch.Generator, symmetric: bool) -> None:
    weight = torch.randn(3, 20, 64, generator=rng)
    tensors, config, _, dense = made(
        PACKED, weight, bits=4, strategy="group", group=32, symmetric=symmetric
    )
    packed = only(folder(tmp_path, tensors, config))
    assert packed.shape == (3, 20, 64)
    assert torch.equal(packed.dequantize(), dense)
    assert torch.equal(packed.format.dequantize(packed, 1, 3), dense[1:3])
    check_unchanged(packed)


def test_the_order_of_act_order_files(tmp_path: Path, rng: torch.Generator) -> None:
    weight = torch.randn(24, 64, generator=rng)
    tensors, config, _, dense = made(PACKED, weight, bits=4, strategy="group", group=16)
    # the file of a weight whose columns were sorted into groups, and put back after rounding
    order = torch.randperm(64, generator=rng)
    codes = torch.zeros(24, 64, dtype=torch.long)
    scale = tensors[f"{NAME}.weight_scale"].repeat_interleave(16, 1)
    codes[:, order] = (dense / scale).round().long() + 8
    tensors[f"{NAME}.weight_packed"] = row_words(codes, 4)
    places = torch.empty(64, dtype=torch.int32)
    places[order] = (torch.arange(64) // 16).int()
    tensors[f"{NAME}.weight_g_idx"] = places
    packed = only(folder(tmp_path, tensors, config))
    assert torch.allclose(packed.dequantize()[:, order], dense)
    check_rows(packed)
    check_unchanged(packed)
    check_merged(packed, rng)


@pytest.mark.parametrize("columns", [96, 64, 128])
@pytest.mark.parametrize(("bits", "per"), [(3, 10), (5, 6), (6, 5), (7, 4)])
def test_files_of_older_releases(
    tmp_path: Path, rng: torch.Generator, bits: int, per: int, columns: int
) -> None:
    weight = torch.randn(64, columns, generator=rng)
    tensors, config, _, dense = made(
        PACKED, weight, bits=bits, strategy="group", group=32, symmetric=False
    )
    half = 1 << (bits - 1)
    scale = tensors[f"{NAME}.weight_scale"]
    zero = torch.randint(-half, half, scale.shape, generator=rng)
    codes = torch.randint(0, 2 * half, weight.shape, generator=rng)
    dense = (codes - half - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)

    def whole_codes(rows: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % per))
        return row_words(rows.reshape(-1, per), bits).reshape(len(rows), -1)

    tensors[f"{NAME}.weight_packed"] = whole_codes(codes)
    tensors[f"{NAME}.weight_zero_point"] = whole_codes(zero.T + half).T
    packed = only(folder(tmp_path, tensors, config))
    assert torch.equal(packed.dequantize(), dense)
    check_rows(packed)
    check_unchanged(packed)


@pytest.mark.parametrize("native", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("pack-quantized", {"group": 32}),
        ("pack-quantized", {"group": 32, "symmetric": False}),
        ("pack-quantized", {"bits": 8, "group": -1}),
        ("pack-quantized", {"bits": 3, "group": -1, "symmetric": False}),
        ("int-quantized", {}),
    ],
)
def test_the_library_reads_what_is_packed_afresh(
    tmp_path: Path,
    rng: torch.Generator,
    format: str,
    options: dict[str, object],
    native: str,
) -> None:
    kind = by_name(format)
    weight = torch.randn(37, 64, generator=rng)
    weight[3] = 0
    weight[5] = weight[5].abs() + 1
    weight[7, 2] = 50
    outline = kind.fresh(f"{NAME}.weight", (37, 64), native, **options)
    config = kind.config(**options)
    assert config is not None
    packed = remade(tmp_path, outline, weight, config)
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    state = as_stored(packed, {role: packed.whole(role) for role in packed.parts})
    plain: dict[str, Tensor | None] = {}
    plain |= {name.removeprefix(f"{NAME}."): tensor for name, tensor in state.items()}
    library = PACKED if format == "pack-quantized" else PLAIN
    dense = library.decompress(plain, scheme)["weight"]
    assert dense is not None
    assert torch.equal(packed.dequantize().to(dense.dtype), dense)
    scale = packed.whole("scale").float()
    size = 8 if format == "int-quantized" else int(str(options.get("bits", 4)))
    loss = {"F32": 1e-6, "BF16": 2**-8, "F16": 2**-11}[native] * 2**size
    bound = scale.repeat_interleave(64 // scale.shape[1], 1) * (0.5 + loss)
    assert bool(((packed.dequantize() - weight).abs() <= bound).all())
    check_unchanged(packed)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("pack-quantized", {"group": 32}),
        ("pack-quantized", {"group": 32, "symmetric": False}),
        ("int-quantized", {}),
    ],
)
def test_transformers_runs_what_is_packed_afresh(
    tmp_path: Path, format: str, options: dict[str, object]
) -> None:
    small = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = LlamaForCausalLM(small)
    kind = by_name(format)
    stored: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            packed = kind.fresh(name, tuple(tensor.shape), "F32", **options)
            stored |= as_stored(packed, kind.quantize(packed, tensor))
        else:
            stored[name] = tensor
    view = viewed(folder(tmp_path, stored, kind.config(**options)))
    model.config.quantization_config = kind.config(**options)
    model.config.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    state = loaded.state_dict()
    for name in model.state_dict():
        assert torch.equal(state[name], view[name].torch()), name


@pytest.mark.parametrize("format", ["pack-quantized", "int-quantized"])
def test_shapes_that_do_not_fit_are_named(format: str) -> None:
    with pytest.raises(UnsupportedError, match=r"x\.weight"):
        by_name(format).fresh("x.weight", (8, 8, 3, 3), "F16")
    if format == "pack-quantized":
        with pytest.raises(UnsupportedError, match="128"):
            by_name(format).fresh("x.weight", (8, 100), "F16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "block"}}}}, "blocks"),
        ({"config_groups": {"a": {"weights": {"num_bits": 8}}}}, r"fit no number of bits.*\['8'\]"),
    ],
)
def test_what_would_be_misread_is_refused(
    tmp_path: Path, rng: torch.Generator, change: dict[str, object], message: str
) -> None:
    weight = torch.randn(32, 64, generator=rng)
    tensors, config, _, _ = made(PACKED, weight, bits=4, strategy="group", group=32)
    with pytest.raises(UnsupportedError, match=message):
        only(folder(tmp_path, tensors, config | change))


def test_damage_is_named(tmp_path: Path, rng: torch.Generator) -> None:
    weight = torch.randn(32, 64, generator=rng)
    tensors, config, _, _ = made(
        PACKED, weight, bits=4, strategy="group", group=32, symmetric=False
    )

    def refused(place: str, **change: Tensor | None) -> UsageError | UnsupportedError:
        new = dict(tensors)
        new |= {f"{NAME}.{name}": tensor for name, tensor in change.items() if tensor is not None}
        for name, tensor in change.items():
            if tensor is None:
                del new[f"{NAME}.{name}"]
        with pytest.raises((UsageError, UnsupportedError)) as caught:
            only(folder(tmp_path / place, new, config)).dequantize()
        return caught.value

    assert "weight_scale" in str(refused("a", weight_scale=None))
    assert "weight_shape" in str(refused("b", weight_shape=None))
    assert "weight_shape says [31, 64]" in str(refused("c", weight_shape=torch.tensor([31, 64])))
    assert "[32, 3]" in str(refused("d", weight_scale=torch.ones(32, 3)))
    assert "zero_point" in str(refused("e", weight_zero_point=torch.zeros(3, 2).int()))
    order = torch.full((64,), 2, dtype=torch.int32)
    assert "2 groups" in str(refused("f", weight_g_idx=order))
    packed = only(folder(tmp_path / "g", tensors, config))
    holed = packed.dequantize().clone()
    holed[0, 0] = torch.inf
    with pytest.raises(UsageError, match="infinity"):
        packed.format.quantize(packed, holed)
