"""Packed weights in memory, seen like those of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftsurgery.checkpoint import open_checkpoint, save
from peftsurgery.errors import UnsupportedError
from peftsurgery.quantizers import PackedCheckpoint, by_name, logical
from peftsurgery.quantizers.held import held


def packed(name: str, weight: Tensor, **options: object) -> dict[str, Tensor]:
    fresh = by_name(name).fresh("x.weight", tuple(weight.shape), "BF16", **options)
    parts = fresh.format.quantize(fresh, weight)
    return {fresh.outlines[role].name: tensor for role, tensor in parts.items()}


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(48, 64), (7, 33)])
def test_as_in_a_file(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    weight = torch.randn(shape)
    tensors = packed(name, weight)
    save(tmp_path / "x.safetensors", tensors, {})
    view = logical(open_checkpoint(tmp_path / "x.safetensors"))
    assert isinstance(view, PackedCheckpoint)
    filed, found = view.packed["x.weight"], held("a layer", tensors)
    assert found.shape == shape
    assert torch.equal(found.dequantize(), filed.dequantize())
    assert torch.equal(found.format.dequantize(found, 2, 5), found.dequantize()[2:5])
    for target in (weight + 0.3, found.dequantize()):
        one = found.format.quantize(found, target)
        other = filed.format.quantize(filed, target)
        assert {r: t.tolist() for r, t in one.items()} == {r: t.tolist() for r, t in other.items()}
    for role, tensor in found.format.quantize(found, found.dequantize()).items():
        assert torch.equal(tensor, tensors[found.outlines[role].name]), role


def test_what_makes_up_no_one_weight() -> None:
    tensors = packed("int8", torch.randn(4, 8))
    two = {**tensors, **{f"y.{name}": tensor for name, tensor in tensors.items()}}
    for wrong in (two, {"x.weight": torch.zeros(3)}):
        with pytest.raises(UnsupportedError, match=r"a layer: .* not one packed weight"):
            held("a layer", wrong)
