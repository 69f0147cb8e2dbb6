"""verify where the base, the merged file or both are packed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.algorithms import LoRA
from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError
from peftsurgery.operations.comparing_packed import compare_packed
from peftsurgery.operations.plan import Edit, Target
from peftsurgery.quantizers import PackedTensor, logical
from tests.operations.packed_llm import HIDDEN, write_lora, write_plain

torch.set_num_threads(1)
FORMATS = ("nf4", "int8")


class Case:
    """A plain base, the same packed, and an adapter."""

    def __init__(self, folder: Path, seed: int, format: str, size: float) -> None:
        self.folder = folder
        self.plain = write_plain(folder / "plain", seed)
        self.packed = folder / "packed"
        ps.quantize(self.plain, self.packed, format=format)
        self.lora = write_lora(folder / "lora", seed + 1, size=size, plain=self.plain)
        self.count = 0

    def merged(self, strength: float = 1.0, base: Path | None = None, **options: object) -> Path:
        self.count += 1
        target = self.folder / f"merged{self.count}"
        ps.merge(base or self.packed, [(self.lora, strength)], target, **options)  # type: ignore
        return target

    def answer(self, merged: Path, strength: float = 1.0, base: Path | None = None) -> str:
        return self.report(merged, strength, base).answer

    def report(self, merged: Path, strength: float = 1.0, base: Path | None = None):
        return ps.verify(merged, base or self.packed, [(self.lora, strength)])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "subspace"])
def test_every_rounding_of_a_visible_change_is_base_and_adapter(
    tmp_path: Path, format: str, rounding: str
) -> None:
    case = Case(tmp_path, 3, format, 0.5)
    merged = case.merged(rounding=rounding)
    report = case.report(merged)
    assert report.answer == "yes", str(report)
    assert report.exit_code == 0
    for row in report.modules:
        assert row["estimated strength"] == pytest.approx(1, abs=0.03)
    assert case.answer(merged, 0.9) == "no"
    assert case.answer(merged, -1.0) == "no"
    assert case.answer(case.packed) == "no"  # nothing was merged


@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_strength_is_named(tmp_path: Path, format: str) -> None:
    case = Case(tmp_path, 5, format, 0.3)
    report = case.report(case.merged(0.5), 1.0)
    assert (report.answer, report.exit_code) == ("no", 1)
    assert report.strengths[str(case.lora)] == pytest.approx(0.5, abs=0.02)
    assert any(f.code == "wrong-strength" for f in report.findings)
    absent = case.report(case.packed)
    assert any(f.code == "not-merged" for f in absent.findings)


def test_a_small_change_kept_by_feedback_is_found_and_one_swallowed_is_undecided(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path, 7, "nf4", 0.01)
    kept = case.merged(rounding="subspace")
    assert case.answer(kept) == "yes"
    assert case.answer(kept, -1.0) == "no"
    swallowed = case.merged(rounding="nearest", min_survival=0.0)
    report = case.report(swallowed)
    assert (report.answer, report.exit_code) == ("undecided", 3)
    assert any("nearest values" in f.message for f in report.findings)
    assert case.answer(case.packed) != "yes"


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_say_little_alone_decide_together(tmp_path: Path, format: str) -> None:
    case = Case(tmp_path, 9, format, 0.004 if format == "nf4" else 5e-4)
    report = case.report(case.merged(rounding="stochastic", min_survival=0.0))
    assert "undecided" in {row["verdict"] for row in report.modules}, str(report)
    assert report.answer == "yes"
    assert any(f.code == "decided-together" for f in report.findings)


@pytest.mark.parametrize("format", FORMATS)
def test_a_plain_result_of_a_packed_base_is_replayed(tmp_path: Path, format: str) -> None:
    case = Case(tmp_path, 11, format, 0.05)
    for dtype in ("keep", "fp32"):
        merged = case.merged(requant="dequant", dtype=dtype)
        assert case.answer(merged) == "yes"
        assert case.answer(merged, 0.8) == "no"
    ps.dequantize(case.packed, tmp_path / "plain-again")
    assert case.answer(tmp_path / "plain-again") == "no"


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_result_of_a_plain_base(tmp_path: Path, format: str) -> None:
    case = Case(tmp_path, 13, format, 0.3)
    ps.quantize(case.merged(base=case.plain), tmp_path / "later", format=format)
    assert case.answer(tmp_path / "later", base=case.plain) == "yes"
    assert case.answer(tmp_path / "later", 0.5, base=case.plain) == "no"
    assert case.answer(case.packed, base=case.plain) == "no"
    other = "int8" if format == "nf4" else "nf4"  # packed otherwise than the base
    ps.quantize(case.merged(requant="dequant", dtype="fp32"), tmp_path / "other", format=other)
    assert case.answer(tmp_path / "other") == "yes"
    assert case.answer(tmp_path / "other", 0.5) == "no"


def edited(source: Path, target: Path, name: str, change) -> Path:
    """A copy of a folder with one stored tensor changed."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name].clone())
            save_file(tensors, file, {"format": "pt"})
    return target


@pytest.mark.parametrize("format", FORMATS)
def test_an_untouched_weight_keeps_its_bytes(tmp_path: Path, format: str) -> None:
    case = Case(tmp_path, 15, format, 0.3)
    name = "model.layers.0.mlp.up_proj.weight"

    def one_code(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[7] += 1
        return tensor

    report = case.report(edited(case.merged(), tmp_path / "edited", name, one_code))
    assert report.answer == "no"
    assert [f.key for f in report.findings if f.code == "changed"] == [name]


@pytest.mark.parametrize("format", FORMATS)
def test_a_touched_weight_must_be_what_the_merge_gives_everywhere(
    tmp_path: Path, format: str
) -> None:
    case = Case(tmp_path, 17, format, 0.3)
    name = "model.layers.1.self_attn.q_proj.weight"
    wrong = edited(case.merged(), tmp_path / "edited", name, lambda t: t.roll(1, 0))
    report = case.report(wrong)
    assert report.answer == "no"
    verdicts = {row["tensor"]: row["verdict"] for row in report.modules}
    assert [tensor for tensor, verdict in verdicts.items() if verdict == "no"] == [name]
    assert [f.key for f in report.findings if f.code == "far"] == [name]

    def one_row(tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.view(HIDDEN, -1)
        rows[5] = rows[5].flip(0)
        return tensor

    assert case.answer(edited(case.merged(), tmp_path / "row", name, one_row)) == "no"

    def one_far(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 11] = -127 if tensor[0, 11] > 0 else 127
        return tensor

    if format == "int8":
        one = edited(case.merged(), tmp_path / "one", name, one_far)
        assert case.answer(one) == "no"


def test_an_unknown_packing_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, 19, "nf4", 0.3)
    merged = case.merged(base=case.plain)
    config = json.loads((merged / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "sorcery"}
    (merged / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="sorcery") as caught:
        case.answer(merged, base=case.plain)
    assert caught.value.exit_code == 3


def test_two_adapters_in_a_packed_base(tmp_path: Path) -> None:
    case = Case(tmp_path, 23, "nf4", 0.3)
    other = write_lora(tmp_path / "other", 99, size=0.3, plain=case.plain)
    both = [(case.lora, 1.0), (other, 0.5)]
    ps.merge(case.packed, both, tmp_path / "both")
    assert ps.verify(tmp_path / "both", case.packed, both).answer == "yes"
    one = ps.verify(case.merged(), case.packed, both)
    assert one.answer == "no"
    assert one.strengths[str(other)] == pytest.approx(0, abs=0.05)
    assert one.strengths[str(case.lora)] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("format", [*FORMATS, "fp8"])
def test_packing_the_original_anew_is_base_and_adapter(tmp_path: Path, format: str) -> None:
    case = Case(tmp_path, 29, format, 0.2)
    merged = case.merged(requant=f"from-original:{case.plain}", min_survival=0.0)
    assert case.answer(merged) == "yes"
    assert case.answer(merged, base=case.plain) == "yes"
    assert case.answer(merged, 0.7) == "no"


def far_off(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and a change of rank 8 a tenth its size."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.02
    up, down = (torch.randn(*shape, generator=random) for shape in ((rows, 8), (8, columns)))
    change = up @ down
    return weight, change * (0.1 * weight.norm() / change.norm())


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "fp8"])
def test_the_strength_of_a_large_weight(tmp_path: Path, format: str) -> None:
    """Nearest values are a little shorter than what they stand for: no wrong strength."""
    weight, change = far_off(256, 1024, 31)
    name = "model.layers.0.mlp.up_proj.weight"
    plain, merged = tmp_path / "plain.safetensors", tmp_path / "merged.safetensors"
    save_file({name: weight}, plain)
    save_file({name: weight + change}, merged)
    ps.quantize(merged, tmp_path / "packed.safetensors", format=format)
    packed = logical(open_checkpoint(tmp_path / "packed.safetensors"))[name]
    assert isinstance(packed, PackedTensor)
    for strength, verdict in ((1.0, "yes"), (0.8, "no"), (1.3, "no"), (-1.0, "no")):
        edit = LoRA(*factors(change * strength))
        edits = [Edit(0, "model:model.layers.0.mlp.up_proj", edit, 1.0, 0, 256, 0, 256)]
        tensor = open_checkpoint(plain)[name]
        target = Target(name, tensor, tuple(tensor.shape), edits)
        result = compare_packed(target, packed.packed, "current")
        assert result.strength == pytest.approx(1 / strength, abs=0.03)
        assert result.verdict == verdict, strength


def factors(change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    return left[:, :8] * sizes[:8], right[:8]


def test_a_gguf_file_made_by_its_own_tool(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(37)
    weights = {n: torch.randn(64, 256, generator=random) * 0.05 for n in ("ffn_up", "ffn_gate")}
    down, up = torch.randn(4, 256, generator=random), torch.randn(64, 4, generator=random) * 0.01
    kind = gguf.GGMLQuantizationType.Q4_0

    def written(path: Path, change: torch.Tensor) -> Path:
        writer = gguf.GGUFWriter(path, "qwen2")
        for name, weight in weights.items():
            raw = gguf.quants.quantize(weight.numpy(), kind)
            if name == "ffn_up":
                stands = gguf.quants.dequantize(raw, kind)
                raw = gguf.quants.quantize(stands + change.numpy().astype(np.float32), kind)
            writer.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    base = written(tmp_path / "base.gguf", torch.zeros(64, 256))
    merged = written(tmp_path / "merged.gguf", up @ down)
    key = "base_model.model.model.layers.0.mlp.up_proj"
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(
        {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up},
        lora / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    assert ps.verify(merged, base, [(lora, 1.0)]).answer == "yes"
    assert ps.verify(merged, base, [(lora, 0.3)]).answer == "no"
    report = ps.extract(merged, base, tmp_path / "out", rank=10_000)
    assert [row["module"] for row in report.modules] == ["model:model.layers.0.mlp.up_proj"]
