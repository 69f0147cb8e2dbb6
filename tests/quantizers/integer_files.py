"""Files of whole-number formats, packed bit by bit in plain Python, and what every format of them
has to hold: unchanged bytes, rows like the whole, a merge that leaves its neighbours alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.quantizers import Packed, PackedCheckpoint, logical, nearest
from peftsurgery.quantizers.grids import Grid, Rounding
from peftsurgery.quantizers.rounding import subspace

torch.set_num_threads(1)


def to_words(codes: Sequence[int], bits: int) -> list[int]:
    """A stream of codes, lowest bits first, cut into signed 32-bit words."""
    stream = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [signed(stream >> (32 * k)) for k in range(count)]


def signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def column_words(codes: Tensor, bits: int) -> Tensor:
    """Every column of codes (n, columns) as words, (words, columns) int32."""
    columns = [to_words(column, bits) for column in codes.T.tolist()]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def row_words(codes: Tensor, bits: int) -> Tensor:
    """Every row of codes (rows, n) as words."""
    return torch.tensor([to_words(row, bits) for row in codes.tolist()], dtype=torch.int32)


def folder(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object] | None
) -> Checkpoint:
    """A model folder as transformers writes it, opened."""
    path.mkdir(parents=True, exist_ok=True)
    about: dict[str, object] = {"model_type": "llama"}
    if config is not None:
        about["quantization_config"] = dict(config)
    (path / "config.json").write_text(json.dumps(about))
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    return open_checkpoint(str(path))


def viewed(checkpoint: Checkpoint) -> PackedCheckpoint:
    view = logical(checkpoint)
    assert isinstance(view, PackedCheckpoint)
    return view


def only(checkpoint: Checkpoint) -> Packed:
    """The one packed weight of a checkpoint."""
    (packed,) = viewed(checkpoint).packed.values()
    return packed


def as_stored(packed: Packed, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts under the names they have in a file; dtypes and shapes are the outlines'."""
    assert set(parts) == set(packed.outlines)
    for role, outline in packed.outlines.items():
        assert tuple(parts[role].shape) == outline.shape, role
    return {outline.name: parts[role] for role, outline in packed.outlines.items()}


def remade(path: Path, packed: Packed, weight: Tensor, config: Mapping[str, object]) -> Packed:
    """The weight quantized, written and opened again."""
    parts = as_stored(packed, packed.format.quantize(packed, weight))
    found = only(folder(path, parts, config))
    for role, outline in packed.outlines.items():
        assert found.outlines[role] == outline
    return found


def check_unchanged(packed: Packed) -> None:
    """What is packed again without a change has the bytes it had, every part of it."""
    parts = packed.format.quantize(packed, packed.dequantize())
    assert set(parts) == set(packed.parts)
    for role, part in packed.parts.items():
        new, old = parts[role].contiguous().reshape(-1), part.torch().reshape(-1)
        assert new.dtype == old.dtype, role
        assert torch.equal(new.view(torch.uint8), old.view(torch.uint8)), role


def check_rows(packed: Packed) -> None:
    """Rows read alone are those of the whole."""
    whole = packed.dequantize()
    count = packed.shape[0]
    for start, stop in ((0, 1), (count - 1, count), (count // 3, count // 3 + 5), (0, count)):
        part = packed.format.dequantize(packed, start, min(stop, count))
        assert torch.equal(part, whole[start:stop])


def check_merged(packed: Packed, rng: torch.Generator) -> None:
    """A small change of one row moves that row alone, and `subspace` keeps more of it than
    `nearest` does over several changes, which it would not if either took another grid.
    """
    weight = packed.dequantize().reshape(packed.rows, packed.columns)
    row = packed.rows // 2
    lost = {"nearest": 0.0, "subspace": 0.0}
    draws = 8
    for _ in range(draws):
        down = torch.randn(2, packed.columns, generator=rng)
        delta = torch.zeros_like(weight)
        change = torch.randn(2, generator=rng) @ down
        delta[row] = change * (0.1 * weight[row].norm() / change.norm())
        basis = torch.linalg.qr(down.T).Q
        target = (weight + delta).reshape(packed.shape)
        for name, rounding in (("nearest", nearest), ("subspace", fed_back(basis))):
            parts = packed.format.quantize(packed, target, rounding)
            assert set(parts) == set(packed.outlines)
            lost[name] += kept_apart(packed, parts, weight, row, delta, basis) / draws
    assert lost["subspace"] < max(lost["nearest"], 0.05)
    assert lost["subspace"] < 0.5


def fed_back(basis: Tensor) -> Rounding:
    def rounding(matrix: Tensor, grid: Grid, previous: Tensor | None) -> Tensor:
        return subspace(matrix, grid, basis)

    return rounding


def kept_apart(
    packed: Packed,
    parts: Mapping[str, Tensor],
    weight: Tensor,
    row: int,
    delta: Tensor,
    basis: Tensor,
) -> float:
    """The share of the change in one row that is lost in its own directions; no other row moved."""
    values = again(packed, parts).reshape(weight.shape)
    others = torch.arange(len(weight)) != row
    assert torch.equal(values[others], weight[others])
    error = values[row] - weight[row] - delta[row]
    return float((error @ basis).norm() / (delta[row] @ basis).norm())


def again(packed: Packed, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight that new parts stand for, read through a file."""
    names = {role: outline.name.replace(":", ".") for role, outline in packed.outlines.items()}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "again.safetensors"
        save_file({names[role]: part.contiguous() for role, part in parts.items()}, file)
        stored = open_checkpoint(str(file))
        lazy = {role: stored[name] for role, name in names.items()}
        return packed.with_parts(lazy).dequantize().clone()
