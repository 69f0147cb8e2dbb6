"""Every format that can be made: packed, merged into, unpacked, on one small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from peftsurgery.errors import CheckFailed
from peftsurgery.quantizers import FORMATS, PackedTensor, logical
from tests.operations.packed_llm import (
    deltas,
    share_kept,
    state,
    unpacked,
    write_lora,
    write_plain,
)

STACKED = ("mxfp4", "mxfp4-deepseek")  # of experts only; tested with their own files
NAMES = sorted(format.name for format in FORMATS if format.name not in STACKED)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    plain = write_plain(folder / "plain", 1)
    write_lora(folder / "lora", 2, size=0.01, plain=plain)
    return folder


@pytest.fixture(params=NAMES)
def packed(request: pytest.FixtureRequest, workshop: Path) -> Path:
    folder = workshop / request.param
    if not folder.exists():
        ps.quantize(workshop / "plain", folder, format=request.param)
    return folder


def test_a_small_change_survives_in_the_format_of_the_base(
    packed: Path, workshop: Path, tmp_path: Path
) -> None:
    report = ps.merge(packed, [(workshop / "lora", 1.0)], tmp_path / "out", verify="full")
    before, after = unpacked(packed), unpacked(tmp_path / "out")
    for name, delta in deltas(workshop / "lora").items():
        assert share_kept(before[name], after[name], delta) > 0.9
    assert report.survival > 0.95
    touched = [name.removesuffix("weight") for name in deltas(workshop / "lora")]
    old, new = state(packed), state(tmp_path / "out")
    for name, tensor in old.items():
        assert (tensor.dtype, tensor.shape) == (new[name].dtype, new[name].shape)
        if not any(name.startswith(weight) for weight in touched):
            both = (t.contiguous().view(torch.uint8) for t in (tensor, new[name]))
            assert torch.equal(*both) if tensor.ndim else bool(tensor == new[name])


def test_a_change_of_nothing_keeps_every_byte(packed: Path, workshop: Path, tmp_path: Path) -> None:
    """Requantizing what did not change is byte-equal: an adapter of zeros touches all it names."""
    zero = write_lora(tmp_path / "zero", 3, size=0.0, plain=workshop / "plain")
    ps.merge(packed, [(zero, 1.0)], tmp_path / "out")
    for file in packed.glob("*.safetensors"):
        old, new = ps.open_checkpoint(file), ps.open_checkpoint(tmp_path / "out" / file.name)
        for name, tensor in old.items():
            assert bytes(tensor.read()) == bytes(new[name].read()), name


def test_what_nearest_rounding_would_lose_is_told_before(
    packed: Path, workshop: Path, tmp_path: Path
) -> None:
    loras, out = [(workshop / "lora", 1.0)], tmp_path / "out"
    planned = ps.merge(packed, loras, out, rounding="nearest", min_survival=0.0, dry_run=True)
    rows = planned.tables["packed weights"]
    if min(float(str(row["nearest keeps"])) for row in rows) > 0.95:
        assert ps.merge(packed, loras, out, rounding="nearest").survival > 0.9
        return
    with pytest.raises(CheckFailed, match="expected to survive"):
        ps.merge(packed, loras, out, rounding="nearest", min_survival=0.96)
    assert not out.exists()


def test_unpacked_it_is_plain_and_says_nothing_of_packing(packed: Path, tmp_path: Path) -> None:
    ps.dequantize(packed, tmp_path / "out")
    again = logical(ps.open_checkpoint(tmp_path / "out"))
    assert not any(isinstance(tensor, PackedTensor) for tensor in again.values())
    before, after = unpacked(packed), state(tmp_path / "out")
    assert {name for name in before if "scaled_fp8" not in name} == after.keys()
    for name, tensor in after.items():
        assert torch.equal(before[name].to(tensor.dtype), tensor), name
    assert "quantiz" not in (tmp_path / "out/config.json").read_text()
