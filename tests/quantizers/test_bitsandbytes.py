"""NF4, FP4 and LLM.int8 against bitsandbytes itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import bitsandbytes.functional as oracle
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import Packed, PackedTensor, by_name, logical

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(96, 128), (33, 50), (7, 3), (1, 64), (130, 4096)]


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    return path


def packed_by_oracle(
    weight: Tensor, quant_type: str, *, nested: bool, storage: torch.dtype = torch.uint8
) -> tuple[dict[str, Tensor], Tensor]:
    """The file bitsandbytes writes, and what it reads back."""
    data, state = oracle.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    beside = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {NAME: data, **beside}, oracle.dequantize_4bit(data, state)


def opened(path: Path) -> PackedTensor:
    found = logical(open_checkpoint(path))[NAME]
    assert isinstance(found, PackedTensor)
    return found


def bytes_of(parts: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {role: bytes(as_bytes(part)) for role, part in parts.items()}


def stored(packed: Packed) -> dict[str, bytes]:
    return {role: bytes(part.read()) for role, part in packed.parts.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_files_of_bitsandbytes_are_read_to_the_bit(
    tmp_path: Path, shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    file, expected = packed_by_oracle(weight, quant_type, nested=nested)
    tensor = opened(write(tmp_path / "f.safetensors", file))
    assert torch.equal(tensor.torch().to(dtype), expected)
    assert (
        tensor.packed.native
        == {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    )
    rows = shape[0]
    for start, stop in ((0, rows), (rows // 3, rows // 2 + 1), (rows - 1, rows), (0, 1)):
        assert torch.equal(tensor.rows(start, stop).torch(), tensor.torch()[start:stop])
    packed = tensor.packed
    again = packed.format.quantize(packed, tensor.torch())
    assert bytes_of(again) == stored(packed)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.float16])
def test_any_storage_dtype_holds_the_codes(tmp_path: Path, storage: torch.dtype) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    file, expected = packed_by_oracle(weight, "nf4", nested=True, storage=storage)
    tensor = opened(write(tmp_path / "f.safetensors", file))
    assert torch.equal(tensor.torch(), expected)
    again = tensor.packed.format.quantize(tensor.packed, tensor.torch())
    assert bytes_of(again) == stored(tensor.packed)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_reads_what_is_packed_afresh(
    tmp_path: Path, shape: tuple[int, int], quant_type: str, nested: bool
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    format = by_name(quant_type)
    packed = format.fresh(NAME, shape, "F32", nested=nested)
    parts = format.quantize(packed, weight)
    for role, part in parts.items():
        assert tuple(part.shape) == packed.outlines[role].shape
    file = {packed.outlines[role].name: part for role, part in parts.items()}
    ours = opened(write(tmp_path / "f.safetensors", file)).torch()
    beside = {name.removeprefix(f"{NAME}."): part for name, part in file.items() if name != NAME}
    state = oracle.QuantState.from_dict(beside, device=torch.device("cpu"))
    assert torch.equal(oracle.dequantize_4bit(file[NAME], state), ours)
    theirs = packed_by_oracle(weight, quant_type, nested=nested)[1]
    assert float((ours - weight).norm()) <= 1.001 * float((theirs - weight).norm())
    if not nested:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(64, 128), (5, 7), (1, 300)])
def test_int8_is_read_and_written_as_bitsandbytes_does(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4)).half()
    codes, scale, _ = oracle.int8_vectorwise_quant(weight)
    module = NAME.removesuffix(".weight")
    file = {
        NAME: codes,
        f"{module}.SCB": scale,
        f"{module}.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    tensor = opened(write(tmp_path / "f.safetensors", file))
    assert torch.equal(tensor.torch(), oracle.int8_vectorwise_dequant(codes, scale))
    again = tensor.packed.format.quantize(tensor.packed, tensor.torch())
    assert bytes_of(again) == stored(tensor.packed)
    format = by_name("int8")
    fresh = format.quantize(format.fresh(NAME, shape, "F16"), weight.float())
    assert torch.equal(fresh["scale"], scale)
    assert int((fresh["weight"].int() - codes.int()).abs().max()) <= 1  # they halve in fp16
    step = scale[:, None] / 127
    error = (tensor.torch() - weight.float()).abs()
    assert bool((error <= 0.501 * step + 1e-3 * step).all())


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_unchanged_rows_keep_their_bytes_when_others_change(tmp_path: Path, name: str) -> None:
    random = torch.Generator().manual_seed(5)
    format = by_name(name)
    packed = format.fresh(NAME, (40, 256), "F32", **({} if name == "int8" else {"nested": True}))
    parts = format.quantize(packed, torch.randn(40, 256, generator=random))
    file = {packed.outlines[role].name: part for role, part in parts.items()}
    tensor = opened(write(tmp_path / "f.safetensors", file))
    weight = tensor.torch()
    moved = weight.clone()
    moved[7] += 0.05 * torch.randn(256, generator=random)
    again = format.quantize(tensor.packed, moved)
    path = write(tmp_path / "g.safetensors", {packed.outlines[r].name: p for r, p in again.items()})
    found = opened(path).torch()
    others = [row for row in range(40) if row != 7]
    assert torch.equal(found[others], weight[others])
    assert not torch.equal(found[7], weight[7])


@pytest.mark.parametrize("lost", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_missing_part_is_named(tmp_path: Path, lost: str) -> None:
    file, _ = packed_by_oracle(torch.randn(8, 64), "nf4", nested=True)
    del file[f"{NAME}.{lost}"]
    with pytest.raises(UsageError, match=rf"{lost}' is missing"):
        logical(open_checkpoint(write(tmp_path / "f.safetensors", file)))


def test_sizes_that_contradict_the_state_are_refused(tmp_path: Path) -> None:
    file, _ = packed_by_oracle(torch.randn(8, 64), "nf4", nested=False)
    file[NAME] = file[NAME][:-1]
    with pytest.raises(UsageError, match="holds 255 values"):
        logical(open_checkpoint(write(tmp_path / "f.safetensors", file)))


def test_the_order_of_a_gpu_kernel_is_refused(tmp_path: Path) -> None:
    module = NAME.removesuffix(".weight")
    file = {
        NAME: torch.zeros(4, 4, dtype=torch.int8),
        f"{module}.SCB": torch.ones(4),
        f"{module}.weight_format": torch.ones((), dtype=torch.uint8),
    }
    with pytest.raises(UnsupportedError, match="col32"):
        logical(open_checkpoint(write(tmp_path / "f.safetensors", file)))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_packed(name: str, value: float) -> None:
    format = by_name(name)
    weight = torch.zeros(4, 64)
    weight[1, 2] = value
    with pytest.raises(UsageError, match="NaN or infinity"):
        format.quantize(format.fresh(NAME, (4, 64), "F32"), weight)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_a_zero_matrix_stays_zero(tmp_path: Path, name: str) -> None:
    format = by_name(name)
    packed = format.fresh(NAME, (4, 64), "F32")
    parts = format.quantize(packed, torch.zeros(4, 64))
    file = {packed.outlines[role].name: part for role, part in parts.items()}
    assert not bool(opened(write(tmp_path / "f.safetensors", file)).torch().any())
