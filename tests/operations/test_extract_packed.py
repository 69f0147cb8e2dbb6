"""extract where TUNED, BASE or both are packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from peftsurgery.checkpoint import save
from peftsurgery.errors import CheckFailed
from tests.operations.packed_llm import deltas, state, unpacked, write_lora, write_plain

torch.set_num_threads(1)
FORMATS = ("nf4", "int8")
ALL = 10_000  # a rank that every weight is below


def held(adapter: Path) -> dict[str, torch.Tensor]:
    """Weight name -> ΔW of a written adapter."""
    modules = ps.load_adapter(adapter).modules
    return {f"{path.partition(':')[2]}.weight": m.delta().float() for path, m in modules.items()}


def pair(tmp_path: Path, seed: int, size: float = 0.5) -> tuple[Path, Path, Path]:
    """(base, tuned, adapter), plain: tuned = base + adapter."""
    base = write_plain(tmp_path / "base", seed)
    lora = write_lora(tmp_path / "lora", seed + 1, size=size, plain=base)
    ps.merge(base, [(lora, 1.0)], tmp_path / "tuned")
    return base, tmp_path / "tuned", lora


@pytest.mark.parametrize("format", FORMATS)
def test_both_packed_gives_the_difference_of_what_they_stand_for(
    tmp_path: Path, format: str
) -> None:
    base, tuned, lora = pair(tmp_path, 11)
    for side in (base, tuned):
        ps.quantize(side, tmp_path / f"{side.name}-packed", format=format)
    before, after = (unpacked(tmp_path / f"{name}-packed") for name in ("base", "tuned"))
    report = ps.extract(
        tmp_path / "tuned-packed", tmp_path / "base-packed", tmp_path / "out",
        rank=ALL, dtype="fp32",
    )  # fmt: skip
    found = held(tmp_path / "out")
    assert found.keys() == deltas(lora).keys()  # what has the same bytes is not in it
    for name, delta in found.items():
        torch.testing.assert_close(delta, after[name] - before[name], rtol=1e-4, atol=1e-6)
    codes = {finding.code: finding for finding in report.findings}
    assert codes["quantization-error"].level == "info"
    assert report.summary["unpacked of BASE"] == report.summary["unpacked of TUNED"]
    assert str(report.summary["unpacked of BASE"]).startswith("8 weights of bitsandbytes")


@pytest.mark.parametrize("format", FORMATS)
def test_a_base_packed_alone_leaves_its_error_in_the_delta_and_that_is_said(
    tmp_path: Path, format: str
) -> None:
    base, tuned, _ = pair(tmp_path, 21)
    ps.quantize(base, tmp_path / "packed", format=format)
    report = ps.extract(tuned, tmp_path / "packed", tmp_path / "out", rank=ALL)
    before, after = unpacked(tmp_path / "packed"), unpacked(tuned)
    found = held(tmp_path / "out")
    assert len(found) == 8  # untuned weights differ by the error of the packing
    for name, delta in found.items():
        torch.testing.assert_close(delta, after[name] - before[name], rtol=2e-2, atol=1e-3)
    finding = next(f for f in report.findings if f.code == "quantization-error")
    assert finding.level == "warning"
    assert "packed in BASE only" in finding.message
    assert finding.remedy is not None
    assert "unquantized BASE" in finding.remedy
    assert {t.dtype for t in state(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("format", FORMATS)
def test_merged_into_a_packed_base_and_dequantized_comes_back(tmp_path: Path, format: str) -> None:
    base = write_plain(tmp_path / "base", 31)
    lora = write_lora(tmp_path / "lora", 32, size=0.5, plain=base)
    ps.quantize(base, tmp_path / "packed", format=format)
    ps.merge(tmp_path / "packed", [(lora, 1.0)], tmp_path / "tuned", requant="dequant")
    report = ps.extract(
        tmp_path / "tuned", tmp_path / "packed", tmp_path / "out", rank=4, dtype="fp32"
    )
    wanted, found = deltas(lora), held(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        assert float((delta - wanted[name]).norm() / wanted[name].norm()) < 0.02, name
    assert report.loss < 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_differs_between_equal_bytes(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_plain(tmp_path / "base", 41)
    for name in ("one", "two"):
        ps.quantize(base, tmp_path / name, format=format)

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("unpacked although the bytes are equal")

    monkeypatch.setattr("peftsurgery.quantizers.packed.Format.dequantize", refuse)
    with pytest.raises(CheckFailed, match="nothing differs"):
        ps.extract(tmp_path / "one", tmp_path / "two", tmp_path / "out", rank=4)


def test_the_dequantized_base_is_the_packed_one(tmp_path: Path) -> None:
    base = write_plain(tmp_path / "base", 51)
    ps.quantize(base, tmp_path / "packed", format="nf4")
    ps.dequantize(tmp_path / "packed", tmp_path / "plain")
    with pytest.raises(CheckFailed, match="nothing differs"):
        ps.extract(tmp_path / "plain", tmp_path / "packed", tmp_path / "out", rank=4)


def test_keep_writes_the_native_type_of_a_packed_tuned(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, 61)
    ps.quantize(tuned, tmp_path / "packed", format="nf4")
    ps.extract(tmp_path / "packed", base, tmp_path / "out", rank=3)
    assert {t.dtype for t in state(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_eight_bit_floats(tmp_path: Path, kind: torch.dtype) -> None:
    base = write_plain(tmp_path / "base", 71)
    before = {name: tensor.to(kind) for name, tensor in state(base).items()}
    after = dict(before)
    changed = "model.layers.1.mlp.up_proj.weight"
    random = torch.Generator().manual_seed(72)
    noise = torch.randn(before[changed].shape, generator=random) * 0.05
    after[changed] = (before[changed].float() + noise).to(kind)
    for name, tensors in (("one", before), ("two", after)):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "model.safetensors", tensors)
    ps.extract(tmp_path / "two", tmp_path / "one", tmp_path / "out", rank=ALL, dtype="fp32")
    found = held(tmp_path / "out")
    assert found.keys() == {changed}
    wanted = after[changed].float() - before[changed].float()
    torch.testing.assert_close(found[changed], wanted, rtol=1e-4, atol=1e-6)


def test_a_marker_of_the_file_is_no_weight(tmp_path: Path) -> None:
    base = write_plain(tmp_path / "base", 81)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state(base).items():
        tensors[name] = tensor
        if "proj" in name:
            scale = tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale
    tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    (tmp_path / "packed").mkdir()
    save(tmp_path / "packed/model.safetensors", tensors)
    for number, (one, two) in enumerate(((tmp_path / "packed", base), (base, tmp_path / "packed"))):
        report = ps.extract(one, two, tmp_path / f"out{number}", rank=2)
        assert len(report.modules) == 8
        assert [f.code for f in report.findings] == ["quantization-error"]
