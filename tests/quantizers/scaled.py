"""Files of scaled floats for the tests, and what holds for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.quantizers import PackedCheckpoint, by_name, logical
from peftsurgery.quantizers.grids import Rounding, nearest
from peftsurgery.quantizers.packed import Packed

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def file_of(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object] | None = None,
    metadata: dict[str, str] | None = None,
) -> Checkpoint:
    """A folder with a model.safetensors and, when there is a quantization_config, a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file(
        {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        path,
        metadata,
    )
    if config is None:
        return open_checkpoint(path)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return open_checkpoint(folder)


def seen(checkpoint: Checkpoint) -> PackedCheckpoint:
    """The checkpoint through the formats; something has to be packed."""
    view = logical(checkpoint)
    assert isinstance(view, PackedCheckpoint)
    return view


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def quantized(packed: Packed, weight: Tensor, rounding: Rounding = nearest) -> dict[str, Tensor]:
    """Stored name -> tensor, checked against what was promised."""
    parts = packed.format.quantize(packed, weight, rounding)
    assert set(parts) == set(packed.outlines)
    for role, outline in packed.outlines.items():
        assert DTYPES[parts[role].dtype] == outline.dtype, role
        assert tuple(parts[role].shape) == outline.shape, role
    return {packed.outlines[role].name: tensor for role, tensor in parts.items()}


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Packing what was unpacked gives every byte of every part."""
    view = seen(checkpoint)
    for name, packed in view.packed.items():
        for stored, tensor in quantized(packed, view[name].torch()).items():
            assert raw(tensor) == bytes(checkpoint[stored].read()), stored


def check_rows(checkpoint: Checkpoint) -> None:
    """Rows are those of the whole, with one and with two dimensions taken as one."""
    view = seen(checkpoint)
    for name, packed in view.packed.items():
        whole = view[name].torch()
        assert tuple(whole.shape) == packed.shape == view[name].shape
        for lead in range(1, len(packed.shape)):
            tensor = view[name].flattened(lead)
            flat = whole.reshape(-1, *packed.shape[lead:])
            for start, stop in ((0, 1), (1, len(flat)), (len(flat) // 2, len(flat) // 2 + 1)):
                stop = min(stop, len(flat))
                assert torch.equal(tensor.rows(start, stop).torch(), flat[start:stop])


def fresh(
    folder: Path, name: str, weights: Mapping[str, Tensor], **options: object
) -> PackedCheckpoint:
    """Weights packed afresh, written and opened again."""
    format = by_name(name)
    tensors: dict[str, Tensor] = {}
    made = []
    for key, weight in weights.items():
        packed = format.fresh(key, tuple(weight.shape), "BF16", **options)
        tensors |= quantized(packed, weight)
        made.append(packed)
    tensors |= format.markers(made)
    view = seen(file_of(folder, tensors, format.config(**options)))
    assert {packed.format.name for packed in view.packed.values()} == {name}
    assert set(view.packed) == set(weights)
    return view


def check_steps(view: PackedCheckpoint, weights: Mapping[str, Tensor], slack: float = 0.0) -> None:
    """No weight is farther from what it was than half the way between its neighbours on the grid,
    or, at the end of the grid, than `slack` of the largest value.
    """
    for name, weight in weights.items():
        packed = view.packed[name]
        matrix = packed.format.to_matrix(packed, weight.float())
        grid, codes = packed.format.grid(packed, 0, packed.rows)
        lower, upper, _ = grid.book.between(grid.units(matrix))
        below, above = grid.values(lower), grid.values(upper)
        error = (grid.values(codes) - matrix).abs()
        half = (above - below).abs() / 2
        outside = (matrix > torch.maximum(above, below)) | (matrix < torch.minimum(above, below))
        bound = half * (1 + 1e-5) + outside * slack * matrix.abs() + 1e-38
        assert bool((error <= bound).all()), name


def heavy(*shape: int, seed: int) -> Tensor:
    """Values of several magnitudes, with zeros and a row of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) * 0.05
    weight = weight * torch.randn(*shape, generator=generator).exp()
    weight[torch.rand(*shape, generator=generator) < 0.05] = 0.0
    weight.reshape(-1, shape[-1])[-1] = 0.0
    return weight


def small_llama() -> LlamaForCausalLM:
    """One layer in bf16, weights drawn anew."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
    )
    return LlamaForCausalLM(config).bfloat16()


def check_opens(
    folder: Path, name: str, load: QuantizationConfigMixin | None = None, **options: object
) -> None:
    """transformers opens a model whose projections were packed afresh, with their values."""
    model, format = small_llama(), by_name(name)
    tensors = dict(model.state_dict())
    names = [key for key, tensor in tensors.items() if "proj" in key and tensor.ndim == 2]
    assert len(names) == 7
    for key in names:
        weight = tensors.pop(key)
        packed = format.fresh(key, tuple(weight.shape), "BF16", **options)
        tensors |= quantized(packed, weight.float())
    config = format.config(skip=["lm_head"], **options)
    file_of(folder, tensors, config, {"format": "pt"})
    model.config.quantization_config = config
    model.config.save_pretrained(folder)
    view = seen(open_checkpoint(folder))
    loaded = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=load
    )
    loaded(torch.tensor([[1, 2, 3]]))  # compressed-tensors decompresses now
    state = loaded.state_dict()
    for key in names:
        assert torch.equal(state[key], view[key].torch().bfloat16()), key
