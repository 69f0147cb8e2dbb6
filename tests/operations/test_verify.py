"""verify: what it says of a checkpoint that is nearly, but not quite, base + adapters; and when
it cannot say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import LoRA
from peftsurgery.cli import main
from peftsurgery.errors import UsageError
from peftsurgery.operations.comparing import MANTISSA, compare, ulp
from peftsurgery.operations.verify import VerifyReport
from tests.operations.small_llm import SHAPES, write_adapter, write_folder

TYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case:
    """A base in one file, two adapters, and a place for merged files."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.bfloat16,
        size: float = 0.3,
        away_from_zero: bool = False,  # near zero units are small, and little is lost
    ) -> None:
        self.folder = folder
        self.base = write_folder(folder / "base", 31, dtype, shard_size=None)
        if away_from_zero:
            file = self.base / "model.safetensors"
            tensors = load_file(file)
            for name, value in tensors.items():
                if value.is_floating_point():
                    tensors[name] = torch.where(value < 0, -0.5, 0.5).to(dtype) + value
            save_file(tensors, file)
        self.a = write_adapter(folder / "a", 32, size=size)
        self.b = write_adapter(folder / "b", 33, size=size)

    def merged(self, *adapters: tuple[Path, float], **options: object) -> Path:
        out = self.folder / f"out{len(list(self.folder.iterdir()))}"
        ps.merge(self.base, adapters, out, **options)  # type: ignore[arg-type]
        return out / "model.safetensors"

    def verify(
        self, merged: Path, *adapters: tuple[Path, float], **options: object
    ) -> VerifyReport:
        return ps.verify(merged, self.base, adapters, **options)  # type: ignore[arg-type]


def edited(file: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(file)
    change(tensors)
    target = file.with_name("edited.safetensors")
    save_file(tensors, target)
    return target


def codes(report: VerifyReport) -> set[str]:
    return {finding.code for finding in report.findings if finding.level == "error"}


def said(report: VerifyReport) -> str:
    return "\n".join(f"{f.key or ''}: {f.message}" for f in report.findings)


# yes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", ["current", "base"])
@pytest.mark.parametrize("stored", TYPES, ids=str)
@pytest.mark.parametrize("written", ["keep", "fp32", "bf16"])
def test_our_own_merges(tmp_path: Path, stored: torch.dtype, written: str, relative: str) -> None:
    case = Case(tmp_path, stored)
    adapters = (case.a, 0.6), (case.b, -0.4)
    merged = case.merged(*adapters, dtype=written, relative_to=relative)
    report = case.verify(merged, *adapters, relative_to=relative)
    assert report.answer == "yes", str(report)
    assert not codes(report)
    assert len(report.modules) == 4 * len(SHAPES)
    if stored != torch.float32:
        assert report.summary["elements that differ from the nearest rounding"] == 0


def test_stochastic_rounding_is_within_a_unit(tmp_path: Path) -> None:
    case = Case(tmp_path)
    merged = case.merged((case.a, 1.0), rounding="stochastic", seed=4)
    report = case.verify(merged, (case.a, 1.0))
    assert report.answer == "yes", str(report)
    share = report.summary["elements that differ from the nearest rounding"]
    assert isinstance(share, float)
    assert 0.1 < share < 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tool_that_rounds_every_change_first(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two adapters, each ΔW rounded, each sum rounded: four roundings where one would do."""
    case = Case(tmp_path, dtype)

    def merge(tensors: dict[str, Tensor]) -> None:
        for adapter, strength in ((case.a, 0.6), (case.b, 0.9)):
            for path, module in ps.load_adapter(adapter).modules.items():
                name = f"{path.partition(':')[2]}.weight"
                tensors[name] = tensors[name] + (strength * module.delta()).to(dtype)

    merged = edited(case.base / "model.safetensors", merge)
    report = case.verify(merged, (case.a, 0.6), (case.b, 0.9))
    assert report.answer == "yes", str(report)
    assert float(report.summary["elements that differ from the nearest rounding"] or 0) > 0.05
    assert case.verify(merged, (case.a, 0.6), (case.b, 0.8)).answer == "no"


def test_another_sharding(tmp_path: Path) -> None:
    case = Case(tmp_path)
    file = case.merged((case.a, 1.0))
    save = load_file(file)
    from peftsurgery.checkpoint import save as write

    write(tmp_path / "sharded", save, shard_size=3000)
    assert case.verify(tmp_path / "sharded", (case.a, 1.0)).answer == "yes"


# no -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("asked", "found"), [(0.5, 0.25), (1.0, 0.97), (0.8, 1.6), (0.5, -0.5)])
def test_a_wrong_strength_is_named(
    tmp_path: Path, dtype: torch.dtype, asked: float, found: float
) -> None:
    case = Case(tmp_path, dtype)
    report = case.verify(case.merged((case.a, found)), (case.a, asked))
    assert report.answer == "no"
    assert report.exit_code == 1
    assert codes(report) == {"wrong-strength"}
    assert f"strength {found:g} instead of {asked:g} in 12 tensors" in said(report)
    assert report.strengths[str(case.a)] == pytest.approx(found, abs=2e-3)
    for row in report.modules:
        assert row["estimated strength"] == pytest.approx(found, abs=0.01)


def test_each_of_several_adapters_gets_its_strength(tmp_path: Path) -> None:
    case = Case(tmp_path)
    report = case.verify(case.merged((case.a, 0.5), (case.b, 0.3)), (case.a, 1.0), (case.b, 0.3))
    assert codes(report) == {"wrong-strength"}
    assert f"{case.a} looks like strength 0.5 instead of 1" in said(report)
    assert f"{case.b} looks" not in said(report)
    assert report.strengths == pytest.approx({str(case.a): 0.5, str(case.b): 0.3}, abs=0.01)
    report = case.verify(case.merged((case.a, 1.0)), (case.a, 1.0), (case.b, 0.3))
    assert codes(report) == {"not-merged"}
    assert f"{case.b} is not in 12 tensors" in said(report)
    assert f"{case.a} is not" not in said(report)


def test_a_forgotten_module_is_named(tmp_path: Path) -> None:
    case = Case(tmp_path)
    name = "model.layers.2.self_attn.v_proj.weight"
    original = load_file(case.base / "model.safetensors")[name]
    merged = edited(case.merged((case.a, 1.0)), lambda tensors: tensors.update({name: original}))
    report = case.verify(merged, (case.a, 1.0))
    assert codes(report) == {"not-merged"}
    assert f"1 tensors: {name}" in said(report)
    verdicts = {row["tensor"]: row["verdict"] for row in report.modules}
    assert verdicts.pop(name) == "no"
    assert set(verdicts.values()) == {"yes"}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_base_itself(tmp_path: Path, dtype: torch.dtype) -> None:
    case = Case(tmp_path, dtype)
    report = case.verify(case.base, (case.a, 1.0))
    assert report.answer == "no"
    assert codes(report) == {"not-merged"}
    assert report.strengths == {str(case.a): pytest.approx(0)}


def test_the_wrong_order_of_what_does_not_commute(tmp_path: Path) -> None:
    """DoRA behind LoRA is not LoRA behind DoRA."""
    case = Case(tmp_path)
    random = torch.Generator().manual_seed(34)
    found = {}
    for path, module in ps.load_adapter(case.b).modules.items():
        rows = module.shape[0]
        found[path] = LoRA(
            torch.randn(rows, 2, generator=random) / 9,
            torch.randn(2, module.shape[1], generator=random),
            magnitude=torch.rand(rows, generator=random) + 0.5,
            magnitude_axis="out",
        )
    dora = Adapter(found, "llm")
    out = tmp_path / "out"
    ps.merge(case.base, [(case.a, 0.7), (dora, 0.8)], out)
    assert ps.verify(out, case.base, [(case.a, 0.7), (dora, 0.8)]).answer == "yes"
    swapped = ps.verify(out, case.base, [(dora, 0.8), (case.a, 0.7)])
    assert swapped.answer == "no"
    assert (
        ps.verify(out, case.base, [(case.a, 0.7), (dora, 0.8)], relative_to="base").answer == "no"
    )


def test_something_else_is_not_called_a_strength(tmp_path: Path) -> None:
    case = Case(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        random = torch.Generator().manual_seed(35)
        tensors[name] = torch.randn(tensors[name].shape, generator=random).to(tensors[name].dtype)

    report = case.verify(edited(case.merged((case.a, 1.0)), spoil), (case.a, 1.0))
    assert codes(report) == {"other-values"}
    assert name in said(report)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.0, 0.31])
def test_one_spoilt_element_is_enough(tmp_path: Path, value: float) -> None:
    case = Case(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 5] = value

    report = case.verify(edited(case.merged((case.a, 1.0)), spoil), (case.a, 1.0))
    assert report.answer == "no"
    assert [row["tensor"] for row in report.modules if row["verdict"] == "no"] == [name]
    assert codes(report) == {"other-values"}
    assert name in said(report)


def test_untouched_missing_extra_and_reshaped_tensors(tmp_path: Path) -> None:
    case = Case(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        flat = tensors["lm_head.weight"].view(torch.int16)
        flat[7, 2] ^= 1
        del tensors["model.norm.weight"]
        del tensors["model.position_ids"]  # a buffer: nobody misses it
        tensors["model.extra.weight"] = torch.ones(3)
        name = "model.layers.0.self_attn.v_proj.weight"
        tensors[name] = tensors[name][:-1].clone()

    report = case.verify(edited(case.merged((case.a, 1.0)), spoil), (case.a, 1.0))
    assert report.answer == "no"
    found = {f.code: f.key for f in report.findings if f.level == "error"}
    assert found == {
        "changed": "lm_head.weight",
        "missing": "model.norm.weight",
        "extra": "model.extra.weight",
        "shape": "model.layers.0.self_attn.v_proj.weight",
    }


def test_a_touched_tensor_that_is_missing(tmp_path: Path) -> None:
    case = Case(tmp_path)
    name = "model.layers.3.mlp.down_proj.weight"
    merged = edited(case.merged((case.a, 1.0)), lambda tensors: tensors.pop(name))
    report = case.verify(merged, (case.a, 1.0))
    assert report.answer == "no"
    assert codes(report) == {"missing"}


# it cannot be decided -----------------------------------------------------------------------------


def test_a_change_that_rounding_swallows_cannot_be_decided(tmp_path: Path) -> None:
    """||ΔW|| is far below a unit of bfloat16: the merged file is the base, and says nothing."""
    case = Case(tmp_path, size=1e-5, away_from_zero=True)
    for merged in (case.merged((case.a, 1.0)), case.base / "model.safetensors"):
        report = case.verify(merged, (case.a, 1.0))
        assert (report.answer, report.exit_code, report.ok) == ("undecided", 3, False)
    whole = case.merged((case.a, 1.0), dtype="fp32")
    assert case.verify(whole, (case.a, 1.0)).answer == "yes"
    assert case.verify(whole, (case.a, 0.5)).answer == "no"


def test_a_change_that_rounding_nearly_swallows_is_decided_by_what_still_moves(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path, size=2e-3, away_from_zero=True)
    merged = case.merged((case.a, 1.0))
    report = case.verify(merged, (case.a, 1.0))
    assert report.answer == "yes", str(report)
    assert max(float(row["survival of ΔW"] or 0) for row in report.modules) < 0.9
    assert case.verify(case.base, (case.a, 1.0)).answer == "no"


def test_a_scale_that_belongs_to_nothing_and_integers(tmp_path: Path) -> None:
    case = Case(tmp_path)
    merged = edited(
        case.merged((case.a, 1.0)),
        lambda tensors: tensors.update(
            {"model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)}
        ),
    )
    report = case.verify(merged, (case.a, 1.0))
    assert report.answer == "no"
    assert [f.key for f in report.findings if f.code == "extra"]

    def as_integers(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    report = case.verify(edited(case.merged((case.a, 1.0)), as_integers), (case.a, 1.0))
    assert report.answer == "undecided"


# the command --------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    case = Case(tmp_path)
    merged = case.merged((case.a, 0.25))
    arguments = ["verify", str(merged), "--base", str(case.base), "--json", "-a"]
    yes = CliRunner().invoke(main, [*arguments, f"{case.a}=0.25"])
    assert yes.exit_code == 0, yes.output
    no = CliRunner().invoke(main, [*arguments, f"{case.a}=0.5"])
    assert no.exit_code == 1, no.output
    report = json.loads(no.stdout)
    assert report["exit_code"] == 1
    assert report["summary"]["is base + adapters"] == "no"
    assert any(
        "looks like strength 0.25 instead of 0.5" in f["message"] for f in report["findings"]
    )
    (tmp_path / "vague").mkdir()
    vague = Case(tmp_path / "vague", size=1e-5, away_from_zero=True)
    arguments = ["verify", str(vague.base), "--base", str(vague.base), "-a", str(vague.a)]
    undecided = CliRunner().invoke(main, arguments)
    assert undecided.exit_code == 3, undecided.output
    assert "cannot be decided" in undecided.output


def test_another_model_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    save_file({"weights": torch.ones(3)}, tmp_path / "other.safetensors")
    report_or_error: VerifyReport | UsageError
    try:
        report_or_error = case.verify(tmp_path / "other.safetensors", (case.a, 1.0))
    except UsageError as error:
        report_or_error = error
    if isinstance(report_or_error, VerifyReport):
        assert report_or_error.answer == "no"
        assert "missing" in codes(report_or_error)


# the comparison -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [n for n in MANTISSA if n != "F64"])
def test_ulp_is_the_distance_of_neighbours(dtype: str) -> None:
    from peftsurgery.checkpoint.dtypes import torch_dtype

    kind = torch_dtype(dtype)
    assert kind is not None
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kind.itemsize]
    random = torch.Generator().manual_seed(36)
    value = torch.randn(500, generator=random) * torch.tensor([1e-6, 1e-3, 1.0, 30.0]).repeat(125)
    low = value.abs().to(kind)
    high = (low.view(bits) + 1).view(kind)
    fine = torch.isfinite(high.float())
    expected = high.float() - low.float()
    assert torch.equal(ulp(low.float(), dtype)[fine], expected[fine])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_two_roundings_of_one_change_stay_within_the_tolerance(dtype: str) -> None:
    """Including results near zero, where |W + Δ| is far smaller than |W|."""
    from peftsurgery.checkpoint.dtypes import torch_dtype

    kind = torch_dtype(dtype)
    assert kind is not None
    random = torch.Generator().manual_seed(37)
    before = torch.randn(300, 40, generator=random).to(kind).float()
    delta = torch.randn(300, 40, generator=random)
    delta[:100] = -before[:100] * (1 + 1e-3 * torch.randn(100, 40, generator=random))
    exact = before + delta
    found = before.to(kind) + delta.to(kind)
    result = compare([before, exact], found, dtype)
    assert result.wrong == 0
    assert result.verdict == "yes"
    assert result.differing > 0 or dtype == "F32"
    units = 40 if dtype == "F32" else 3  # fp32 sums in another order are off by a few
    off = found + units * ulp(torch.maximum(before.abs(), delta.abs()), dtype).to(kind)
    assert compare([before, exact], off, dtype).verdict == "no"
