"""Merging into packed bases: what survives, what stays as it was, and every way out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from peftsurgery.checkpoint import save
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.operations import apply, merge_writing, requantizing
from peftsurgery.operations.apply import Settings
from peftsurgery.operations.inputs import open_inputs
from peftsurgery.operations.requant import parse
from peftsurgery.operations.requantizing import Order, Repacker
from tests.operations.packed_llm import (
    HIDDEN,
    LAYERS,
    deltas,
    share_kept,
    state,
    unpacked,
    write_lora,
    write_plain,
)

TOUCHED = {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(LAYERS)
    for name in ("self_attn.q_proj", "mlp.down_proj")
}


@pytest.fixture(params=["nf4", "fp4", "int8"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """tmp_path/plain and, of the format asked for, tmp_path/packed."""
    write_plain(tmp_path / "plain", 1)
    ps.quantize(tmp_path / "plain", tmp_path / "packed", format=request.param)
    return tmp_path / "packed"


@pytest.fixture
def nf4(tmp_path: Path) -> Path:
    write_plain(tmp_path / "plain", 1)
    ps.quantize(tmp_path / "plain", tmp_path / "packed", format="nf4")
    return tmp_path / "packed"


def adapter(folder: Path, size: float, name: str = "adapter") -> Path:
    return write_lora(folder / name, 2, size=size, plain=folder / "plain")


@pytest.mark.parametrize("size", [0.01, 0.1])
def test_the_change_survives_and_the_rest_keeps_its_bytes(
    packed: Path, tmp_path: Path, size: float
) -> None:
    lora = adapter(tmp_path, size)
    report = ps.merge(packed, [(lora, 1.0)], tmp_path / "out", verify="full")
    before, after = unpacked(packed), unpacked(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, delta in deltas(lora).items():
        assert share_kept(before[name], after[name], delta) > 0.9
    assert report.survival > 0.9
    old, new = state(packed), state(tmp_path / "out")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        weight = next((t for t in TOUCHED if name.startswith(t.removesuffix("weight"))), None)
        if weight is None:
            assert torch.equal(tensor, new[name]), name
        assert (tensor.dtype, tensor.shape) == (new[name].dtype, new[name].shape)
    assert (tmp_path / "out/config.json").read_bytes() == (packed / "config.json").read_bytes()


def test_reported_survival_is_that_of_the_file(packed: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.03)
    report = ps.merge(packed, [(lora, 1.0)], tmp_path / "out")
    before, after = unpacked(packed), unpacked(tmp_path / "out")
    kept = total = 0.0
    for name, delta in deltas(lora).items():
        share = share_kept(before[name], after[name], delta)
        assert report.touched[name] == pytest.approx(share, abs=1e-4)
        kept += share * float(delta.square().sum())
        total += float(delta.square().sum())
    assert report.survival == pytest.approx(kept / total, abs=1e-4)


def test_nearest_rounding_loses_a_small_change_and_says_so(nf4: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.01)
    with pytest.raises(CheckFailed, match="--rounding subspace keeps") as caught:
        ps.merge(nf4, [(lora, 1.0)], tmp_path / "out", rounding="nearest")
    for way in ("stochastic", "--requant dequant", "from-original", "residual"):
        assert way in str(caught.value)
    assert not (tmp_path / "out").exists()
    report = ps.merge(nf4, [(lora, 1.0)], tmp_path / "out", rounding="nearest", min_survival=0.0)
    assert report.survival < 0.1


def test_each_weight_gets_the_rounding_it_needs(nf4: Path, tmp_path: Path) -> None:
    large, small = adapter(tmp_path, 1.5, "large"), adapter(tmp_path, 0.01, "small")
    for lora, expected in ((large, "nearest"), (small, "subspace")):
        report = ps.merge(nf4, [(lora, 1.0)], dry_run=True, dst=tmp_path / "out")
        rows = report.tables["packed weights"]
        assert {row["rounding"] for row in rows} == {expected}
        assert {row["tensor"] for row in rows} == TOUCHED
    assert not (tmp_path / "out").exists()


def test_what_is_predicted_comes_true(packed: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.03)
    for rounding in ("nearest", "subspace", "stochastic"):
        report = ps.merge(
            packed,
            [(lora, 1.0)],
            tmp_path / rounding,
            rounding=rounding,
            min_survival=0.0,
        )
        for row in report.tables["packed weights"]:
            predicted = row[f"{rounding} keeps"]
            assert isinstance(predicted, float)
            assert report.touched[str(row["tensor"])] == pytest.approx(predicted, abs=0.1)


def test_dequantized_output_is_plain_everywhere(packed: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.02)
    ps.merge(packed, [(lora, 0.5)], tmp_path / "out", requant="dequant", verify="full")
    before, after = unpacked(packed), state(tmp_path / "out")
    assert before.keys() == after.keys()
    changes = deltas(lora)
    for name, tensor in after.items():
        wanted = before[name] + 0.5 * changes[name] if name in changes else before[name]
        assert tensor.dtype.is_floating_point
        rounded = wanted.to(tensor.dtype)
        wrong = (tensor != rounded).float().mean()
        assert float(wrong) < (1e-3 if name in changes else 1e-9)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)


def test_dequantize_is_that_without_an_adapter(packed: Path, tmp_path: Path) -> None:
    ps.dequantize(packed, tmp_path / "out", dtype="fp32")
    before, after = unpacked(packed), state(tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert before.keys() == after.keys()
    with pytest.raises(UsageError, match="no weight is packed"):
        ps.dequantize(tmp_path / "out", tmp_path / "again")


def test_packing_the_original_anew_is_nearest_to_what_was_trained(
    nf4: Path, tmp_path: Path
) -> None:
    lora = adapter(tmp_path, 0.05)
    plain = unpacked(tmp_path / "plain")
    errors: dict[str, float] = {}
    for mode in ("same", f"from-original:{tmp_path / 'plain'}"):
        out = tmp_path / mode[:4]
        report = ps.merge(nf4, [(lora, 1.0)], out, requant=mode, verify="full")
        assert report.survival > 0.9
        after = unpacked(out)
        errors[mode[:4]] = sum(
            float((after[n] - plain[n] - d).square().sum()) for n, d in deltas(lora).items()
        )
    assert errors["from"] < 0.8 * errors["same"]


def test_the_original_has_to_have_the_same_weights(nf4: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.05)
    other = tmp_path / "other"
    other.mkdir()
    tensors = {n: t[:, :64] for n, t in state(tmp_path / "plain").items() if t.ndim == 2}
    save(other / "model.safetensors", {n: t.clone() for n, t in tensors.items()})
    with pytest.raises((UsageError, CheckFailed), match="shape"):
        ps.merge(nf4, [(lora, 1.0)], tmp_path / "out", requant=f"from-original:{other}")


def test_a_residual_adapter_holds_what_rounding_lost(nf4: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.02)
    report = ps.merge(nf4, [(lora, 1.0)], tmp_path / "out", requant="residual:4")
    assert report.survival > 0.99
    before, after = unpacked(nf4), unpacked(tmp_path / "out")
    rest = deltas(tmp_path / "out-residual")
    for name, delta in deltas(lora).items():
        together = after[name] + rest[name]
        assert share_kept(before[name], together, delta) > 0.98
        lost = before[name] + delta - after[name]
        tail = torch.linalg.svdvals(lost.double())[4:].norm()
        assert float((lost - rest[name]).norm()) == pytest.approx(float(tail), rel=1e-3, abs=1e-4)
    (tmp_path / "new-residual").mkdir()
    with pytest.raises(UsageError, match="new-residual: exists"):
        ps.merge(nf4, [(lora, 1.0)], tmp_path / "new", requant="residual:4")


def test_gptq_rounding_minds_the_inputs_it_is_given(nf4: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.1)
    random = torch.Generator().manual_seed(3)
    inputs, grams = {}, {}
    for name, delta in deltas(lora).items():
        columns = delta.shape[1]
        mix = torch.randn(8, columns, generator=random)
        x = torch.randn(400, 8, generator=random) @ mix
        inputs[name] = x + 0.05 * torch.randn(400, columns, generator=random)
        grams[name.removesuffix(".weight")] = inputs[name].T @ inputs[name]
    save(tmp_path / "grams.safetensors", grams)
    errors = {}
    for rounding, gram in (("nearest", None), ("gptq", tmp_path / "grams.safetensors")):
        out = tmp_path / rounding
        ps.merge(nf4, [(lora, 1.0)], out, rounding=rounding, gram=gram, min_survival=0.0)
        before, after = unpacked(nf4), unpacked(out)
        errors[rounding] = sum(
            float((inputs[n] @ (before[n] + d - after[n]).T).square().sum())
            for n, d in deltas(lora).items()
        )
    assert errors["gptq"] < 0.3 * errors["nearest"]
    save(tmp_path / "none.safetensors", {"x": torch.eye(2)})
    with pytest.raises(UsageError, match="no Gram matrix"):
        ps.merge(
            nf4,
            [(lora, 1.0)],
            tmp_path / "no",
            rounding="gptq",
            gram=tmp_path / "none.safetensors",
        )


def test_a_merge_is_undone_to_the_bit(packed: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.1)
    for mode in ("same", "dequant"):
        out, back = tmp_path / f"{mode}-out", tmp_path / f"{mode}-back"
        undo = tmp_path / f"{mode}.undo.safetensors"
        ps.merge(packed, [(lora, 1.0)], out, requant=mode, undo=undo)
        ps.unmerge(out, undo, back)
        for file in packed.iterdir():
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name


def test_two_runs_write_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path, 0.02)
    for rounding in ("auto", "stochastic"):
        for run in ("a", "b"):
            ps.merge(
                packed,
                [(lora, 1.0)],
                tmp_path / f"{rounding}-{run}",
                rounding=rounding,
                seed=7,
                min_survival=0.5,
            )
        for file in (tmp_path / f"{rounding}-a").iterdir():
            other = tmp_path / f"{rounding}-b" / file.name
            assert other.read_bytes() == file.read_bytes(), file.name


def test_several_adapters_compose_before_one_rounding(nf4: Path, tmp_path: Path) -> None:
    one = write_lora(tmp_path / "one", 3, size=0.05, plain=tmp_path / "plain")
    two = write_lora(tmp_path / "two", 4, size=0.05, plain=tmp_path / "plain")
    ps.merge(nf4, [(one, 0.5), (two, -1.0)], tmp_path / "out")
    before, after = unpacked(nf4), unpacked(tmp_path / "out")
    first, second = deltas(one), deltas(two)
    for name in first:
        assert share_kept(before[name], after[name], 0.5 * first[name] - second[name]) > 0.9


@pytest.mark.parametrize("broken", ["codes", "scales"])
def test_a_damaged_output_is_noticed(
    nf4: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = adapter(tmp_path, 0.1)
    real = merge_writing.save

    def damaging(path: Path, *args: object, **more: object) -> tuple[Path, ...]:
        files = real(path, *args, **more)  # type: ignore[arg-type]
        opened = ps.open_checkpoint(path)
        name = "model.layers.0.self_attn.q_proj.weight"
        part = opened.get(name if broken == "codes" else f"{name}.absmax")
        if part is not None:
            with open(path, "r+b") as file:
                file.seek(part.begin + part.nbytes // 2)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 0x11]))
        return files

    monkeypatch.setattr(merge_writing, "save", damaging)
    with pytest.raises(CheckFailed, match="q_proj"):
        ps.merge(nf4, [(lora, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_that_this_merge_does_not_give_are_noticed(
    nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof computes codes again: here the writer packs a change twice as large."""
    lora = adapter(tmp_path, 0.1)
    real = requantizing.Repacker.whole

    def doubled(self: requantizing.Repacker, **more: bool) -> requantizing.Repacked:
        found = self.exact()
        assert found.change is not None
        twice = replace(found, wanted=found.wanted + found.change)
        self.exact = lambda **_: twice  # type: ignore[method-assign]
        return real(self, **more)

    monkeypatch.setattr(requantizing.Repacker, "whole", doubled)
    with pytest.raises(CheckFailed, match="rows"):
        ps.merge(nf4, [(lora, 1.0)], tmp_path / "out")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "subspace"])
def test_what_is_measured_on_some_rows_changes_no_codes(
    packed: Path, tmp_path: Path, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = adapter(tmp_path, 0.1)
    for module in (apply, requantizing):
        monkeypatch.setattr(module, "TILE", 20 * HIDDEN)
    target = open_inputs(packed, [(lora, 1.0)]).plan.targets[sorted(TOUCHED)[0]]
    settings = Settings(rounding=rounding)
    every, some = (
        Repacker(target, settings, Order(rounding, sample=sample)).whole() for sample in (1, 3)
    )
    assert every.parts.keys() == some.parts.keys()
    for role, part in every.parts.items():
        assert torch.equal(part, some.parts[role])
    assert some.survival.share == pytest.approx(every.survival.share, abs=0.15)
    assert some.survival.total == pytest.approx(every.survival.total, rel=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_place": True, "dst": None}, "merged into a new output only"),
        ({"dtype": "fp16"}, "--dtype is for --requant dequant"),
        ({"gram": "x.safetensors"}, "--gram is for"),
        ({"requant": "other"}, "is not known"),
        ({"requant": "residual:x"}, "rank of at least 1"),
        ({"requant": "residual"}, "is not known"),
        ({"requant": "from-original"}, "is not known"),
    ],
)
def test_options_without_meaning_are_refused(
    nf4: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    lora = adapter(tmp_path, 0.1)
    given = {"dst": tmp_path / "out", **options}
    with pytest.raises((UsageError, UnsupportedError), match=message):
        ps.merge(nf4, [(lora, 1.0)], **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"requant": "dequant"}, {"rounding": "subspace"}])
def test_a_plain_base_has_nothing_to_requantize(
    nf4: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    lora = adapter(tmp_path, 0.1)
    with pytest.raises(UsageError, match="no weight is packed"):
        ps.merge(tmp_path / "plain", [(lora, 1.0)], tmp_path / "out", **options)  # type: ignore[arg-type]


def test_nothing_but_same_and_dequant_has_no_value() -> None:
    assert parse("same").packs
    assert not parse("dequant").packs
    assert parse("from-original:a:b").original == "a:b"
    assert parse("residual:3").rank == 3


def test_an_adapter_of_the_packed_model_is_added_to_the_weights_it_saw(
    nf4: Path, tmp_path: Path
) -> None:
    """A plain base with --qlora-base packed:nf4 gives what the packed base dequantized gives."""
    lora, plain = adapter(tmp_path, 0.02), tmp_path / "plain"
    ps.merge(plain, [(lora, 1.0)], tmp_path / "seen", qlora_base="packed:nf4", verify="full")
    ps.merge(nf4, [(lora, 1.0)], tmp_path / "unpacked", requant="dequant")
    one, other = state(tmp_path / "seen"), state(tmp_path / "unpacked")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor != other[name]).float().mean()) < 1e-3, name
    ps.merge(plain, [(lora, 1.0)], tmp_path / "other")
    away = state(tmp_path / "other")
    assert any(not torch.equal(tensor, away[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("packed", {"qlora_base": "original"}, "from-original:BASE16"),
        ("packed", {"qlora_base": "packed:nf4"}, "is for a plain base"),
        ("packed", {"qlora_base": "other"}, "is not known"),
        ("packed", {"qlora_base": "original", "requant": "dequant"}, "exclude each other"),
        ("plain", {"qlora_base": "packed:nf5"}, "nf4"),
    ],
)
def test_what_the_adapter_was_trained_on_has_to_make_sense(
    nf4: Path, tmp_path: Path, base: str, options: dict[str, str], message: str
) -> None:
    lora = adapter(tmp_path, 0.02)
    with pytest.raises(UsageError, match=message):
        ps.merge(tmp_path / base, [(lora, 1.0)], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_original_goes_through_the_input_scales_of_awq(tmp_path: Path) -> None:
    """W_awq = W · diag(s): what is to be packed is (W + ΔW) · diag(s)."""
    plain = write_plain(tmp_path / "plain", 1, torch.float32)
    random = torch.Generator().manual_seed(5)
    scales, scaled = {}, {}
    for name, tensor in state(plain).items():
        if tensor.ndim == 2 and ".layers." in name:
            scales[name] = torch.rand(tensor.shape[1], generator=random) * 2 + 0.5
            tensor = tensor * scales[name]
        scaled[name] = tensor
    (tmp_path / "scaled").mkdir()
    save(tmp_path / "scaled/model.safetensors", scaled)
    (tmp_path / "scaled/config.json").write_text((plain / "config.json").read_text())
    ps.quantize(tmp_path / "scaled", tmp_path / "awq", format="awq")
    lora = adapter(tmp_path, 0.1)
    ps.merge(
        tmp_path / "awq",
        [(lora, 1.0)],
        tmp_path / "out",
        requant=f"from-original:{plain}",
        qlora_base="original",
        verify="full",
    )
    before, after = unpacked(tmp_path / "awq"), unpacked(tmp_path / "out")
    for name, delta in deltas(lora).items():
        assert share_kept(before[name], after[name], delta * scales[name]) > 0.9
        wanted = (state(plain)[name] + delta) * scales[name]
        assert float((after[name] - wanted).norm() / wanted.norm()) < 0.14
