"""inspect on checkpoints with packed weights, and on adapters with a packed base."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.operations.inspect import inspect
from peftsurgery.quantizers import FORMATS
from peftsurgery.reports.json import render
from tests.operations.packed_llm import SHAPES, state, write_lora, write_plain

torch.set_num_threads(1)
BITS = {"nf4": (4.4, 4.8), "int8": (8.1, 8.4), "fp8": (8.0, 8.0)}


@pytest.mark.parametrize("format", BITS)
def test_formats_bits_and_bytes(tmp_path: Path, format: str) -> None:
    write_plain(tmp_path / "plain", 1)
    ps.quantize(tmp_path / "plain", tmp_path / "packed", format=format)
    report = inspect(tmp_path / "packed")
    count = 2 * sum(math.prod(shape) for shape in SHAPES.values())
    (row,) = report.tables["formats"]
    assert (row["format"], row["weights"], row["parameters"]) == (format, 8, count)
    low, high = BITS[format]
    nested = 256 * 4 * 8 / (count / 8)  # bits of the second map of each small weight
    assert low <= float(row["bits per parameter"] or 0) <= high + nested
    plain = [t for t in state(tmp_path / "packed").values() if t.dtype == torch.bfloat16]
    (kind,) = report.tables["plain tensors"]
    assert (kind["dtype"], kind["tensors"]) == ("BF16", len(plain))
    assert kind["bytes"] == sum(2 * t.numel() for t in plain)
    total = open_checkpoint(tmp_path / "packed").nbytes
    assert int(row["bytes"] or 0) + int(kind["bytes"] or 0) == total
    assert len(report.modules) == 8
    data = json.loads(render(report))
    assert data["summary"]["packed weights"] == 8


def test_weights_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plain(tmp_path / "plain", 2)
    ps.quantize(tmp_path / "plain", tmp_path / "packed", format="nf4")
    for format in FORMATS:
        for method in ("grid", "dequantize"):
            monkeypatch.setattr(type(format), method, None)
    assert inspect(tmp_path / "packed").ok


def test_coverage_of_a_packed_base_is_that_of_its_weights(tmp_path: Path) -> None:
    base = write_plain(tmp_path / "plain", 3)
    lora = write_lora(tmp_path / "lora", 4, size=0.1, plain=base)
    plain = inspect(lora, base=base)
    for format in ("nf4", "int8"):
        ps.quantize(base, tmp_path / format, format=format)
        report = inspect(lora, base=tmp_path / format)
        assert report.ok
        assert report.tables["coverage"] == plain.tables["coverage"]


def test_neither_adapter_nor_packed_is_refused_as_before(tmp_path: Path) -> None:
    write_plain(tmp_path / "plain", 5)
    with pytest.raises(UsageError, match="plain weights"):
        inspect(tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    config["quantization_config"] = {"quant_method": "sorcery"}
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="sorcery"):
        inspect(tmp_path / "plain")


def test_an_adapter_of_eight_bit_floats_with_a_stray_key_is_no_checkpoint(tmp_path: Path) -> None:
    base = write_plain(tmp_path / "plain", 6)
    lora = write_lora(tmp_path / "lora", 7, size=0.1, plain=base)
    file = load_file(lora / "adapter_model.safetensors")
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in file.items()}
    save_file({**small, "stray.thing": torch.ones(3)}, lora / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"stray\.thing"):
        inspect(lora)
