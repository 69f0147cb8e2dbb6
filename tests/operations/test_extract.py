"""extract on a small language model: what comes out of a fine-tune, and what is said about it."""

# pyright: reportArgumentType=false
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.cli import main
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from tests.operations import small_llm
from tests.operations.merging import state
from tests.operations.tuning import everywhere, low_rank, tuned_copy

torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small_llm.write_folder(tmp_path / "base", 1)


def deltas(tuned: Path, base: Path) -> dict[str, torch.Tensor]:
    """TUNED - BASE of every tensor that differs, in fp64."""
    before, after = state(base), state(tuned)
    assert before.keys() == after.keys()
    return {
        name: after[name].double() - before[name].double()
        for name in before
        if not torch.equal(before[name], after[name])
    }


def held(adapter: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    """Path without component -> ΔW in fp64."""
    modules = ps.load_adapter(adapter, base=base).modules
    return {path.partition(":")[2]: m.delta().double() for path, m in modules.items() if m.additive}


# the values ---------------------------------------------------------------------------------------


def test_a_merged_lora_comes_back_at_its_rank(tmp_path: Path, base: Path) -> None:
    adapter = small_llm.write_adapter(tmp_path / "lora", 2)
    ps.merge(base, [(adapter, 1.0)], tmp_path / "merged")
    report = ps.extract(tmp_path / "merged", base, tmp_path / "out", rank=4)
    assert report.ok
    original, found = held(adapter), held(tmp_path / "out")
    assert found.keys() == original.keys()
    for path, delta in found.items():
        gap = float((delta - original[path]).norm() / original[path].norm())
        assert gap < 0.02, path  # the merged weights are bf16
    metadata = ps.open_checkpoint(tmp_path / "out").metadata
    assert metadata["peftsurgery.operation"] == "extract"
    assert "rank=4" in metadata["peftsurgery.options"]
    assert metadata["peftsurgery.inputs"].count("sha256:") == len(report.inputs) > 2
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_merges_back_to_the_tuned_model(tmp_path: Path, dtype: torch.dtype) -> None:
    base = small_llm.write_folder(tmp_path / "base", 3, dtype)
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(4))
    report = ps.extract(tuned, base, tmp_path / "out", rank=1000, dtype="fp32")
    assert report.loss < 1e-6
    ps.merge(base, [(tmp_path / "out", 1.0)], tmp_path / "merged")
    merged, wanted = state(tmp_path / "merged"), state(tuned)
    for name, tensor in wanted.items():
        limit = 2 * torch.finfo(dtype).eps if tensor.is_floating_point() else 0
        gap = (merged[name].double() - tensor.double()).abs().max()
        assert float(gap) <= limit * max(float(tensor.abs().max()), 1.0), name


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_the_report_states_the_true_loss(
    tmp_path: Path, base: Path, rank: int, algorithm: str
) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(5))
    to = "lycoris"
    report = ps.extract(
        tuned, base, tmp_path / "a.safetensors", rank=rank, algorithm=algorithm, to=to
    )
    changes = deltas(tuned, base)
    found = held(tmp_path / "a.safetensors", base)
    gone = whole = 0.0
    assert {f"{path}.weight" for path in found} == changes.keys()
    for row in report.modules:
        path = str(row["module"]).partition(":")[2]
        delta = changes[f"{path}.weight"]
        gap = delta - found[path].reshape(delta.shape)
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row["loss"] == pytest.approx(float(gap.norm() / delta.norm()), rel=1e-4, abs=1e-6)
        assert row["energy"] == pytest.approx(1 - float(row["loss"]) ** 2, abs=1e-9)
        gone, whole = gone + float(gap.norm()) ** 2, whole + float(delta.norm()) ** 2
    assert report.loss == pytest.approx(math.sqrt(gone / whole), rel=1e-4)
    assert report.energy == pytest.approx(1 - gone / whole, rel=1e-6)


def test_dense_svd_in_fp64_gives_the_same_truncation(tmp_path: Path, base: Path) -> None:
    """The formula of sd-scripts' extract_lora_from_models.py without its clamp: SVD of the
    difference, U √S and √S Vh here where it has U S and Vh; the product is compared.
    """
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(6))
    ps.extract(tuned, base, tmp_path / "out", rank=3, dtype="fp32", exclude=["*norm"])
    found = held(tmp_path / "out")
    for name, delta in deltas(tuned, base).items():
        if delta.ndim < 2:
            continue
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        expected = (u[:, :3] * s[:3]) @ vh[:3]
        gap = (found[name.removesuffix(".weight")] - expected).norm() / expected.norm()
        assert float(gap) < 1e-4, name


def test_energy_rule_of_each_weight(tmp_path: Path, base: Path) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(7))
    report = ps.extract(tuned, base, tmp_path / "out", rank="energy:0.8", dtype="fp32")
    changes = deltas(tuned, base)
    for row in report.modules:
        if row["algorithm"] != "lora":
            continue
        s = torch.linalg.svdvals(changes[str(row["module"]).partition(":")[2] + ".weight"])
        sums = s.square().cumsum(0) / s.square().sum()
        assert row["rank"] == int((sums < 0.8).sum()) + 1
        assert float(row["energy"]) >= 0.8 - 1e-6


def test_number_types_may_differ(tmp_path: Path) -> None:
    base = small_llm.write_folder(tmp_path / "base", 8, torch.float32)
    half = tmp_path / "half"
    tuned_copy(base, half, lambda *_: None)
    for file in half.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, file)
    with pytest.raises(CheckFailed, match="nothing differs"):  # the same but for rounding
        ps.extract(half, base, tmp_path / "out", rank=4)
    one = "model.layers.1.mlp.down_proj.weight"
    for file in half.glob("*.safetensors"):
        tensors = load_file(file)
        if one in tensors:
            tensors[one] = tensors[one] + 0.125
            save_file(tensors, file)
    report = ps.extract(half, base, tmp_path / "out", rank="energy:0.999999", dtype="fp32")
    assert [row["module"] for row in report.modules] == ["model:" + one.removesuffix(".weight")]
    expected = state(half)[one].double() - state(base)[one].double()
    found = held(tmp_path / "out")[one.removesuffix(".weight")]
    assert float((found - expected).norm() / expected.norm()) < 2e-3


# what is extracted --------------------------------------------------------------------------------


def test_targets_exclude_and_their_mistakes(tmp_path: Path, base: Path) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(9))
    report = ps.extract(
        tuned,
        base,
        tmp_path / "out",
        rank=2,
        targets=["q_proj", "model.layers.1.*"],
        exclude=["*norm"],
    )
    paths = {str(row["module"]).partition(":")[2] for row in report.modules}
    assert paths == {f"model.layers.{n}.self_attn.q_proj" for n in range(4)} | {
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    }
    for option in ({"targets": ["k_proj"]}, {"exclude": ["layers.9"]}, {"only": ["unet"]}):
        with pytest.raises(UsageError, match=r"no such component|matches no module"):
            ps.extract(tuned, base, tmp_path / "no", rank=2, **option)


def test_nothing_differs(tmp_path: Path, base: Path) -> None:
    copy = tuned_copy(base, tmp_path / "tuned", lambda *_: None)
    with pytest.raises(CheckFailed, match="nothing differs"):
        ps.extract(copy, base, tmp_path / "out", rank=2)
    result = CliRunner().invoke(
        main, ["extract", str(copy), str(base), "-o", str(tmp_path / "out"), "--rank", "2"]
    )
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.2.self_attn.q_proj.weight", "model.norm.weight"])
def test_nan_is_named(tmp_path: Path, base: Path, value: float, name: str) -> None:
    def change(key: str, weight: torch.Tensor) -> torch.Tensor | None:
        if key != name:
            return None
        added = torch.zeros(weight.shape)
        added.view(-1)[5] = value
        return added

    tuned = tuned_copy(base, tmp_path / "tuned", change)
    with pytest.raises(CheckFailed, match=f"TUNED: '{name}' holds 1 values that are NaN or Inf"):
        ps.extract(tuned, base, tmp_path / "a.safetensors", rank=2, to="lycoris")
    assert not (tmp_path / "a.safetensors").exists()


def test_norms_as_the_layout_holds_them(tmp_path: Path, base: Path) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(10))
    ps.extract(tuned, base, tmp_path / "peft", rank=2)
    kinds = {p: m.algorithm for p, m in ps.load_adapter(tmp_path / "peft").modules.items()}
    assert kinds["model:model.norm"] == "set"
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert "model.norm" in config["modules_to_save"]
    ps.extract(tuned, base, tmp_path / "l.safetensors", rank=2, to="lycoris")
    loaded = ps.load_adapter(tmp_path / "l.safetensors", base=base)
    assert loaded.modules["model:model.norm"].algorithm == "full"
    assert "lycoris_model_norm.w_norm" in load_file(tmp_path / "l.safetensors")


def test_tensors_without_a_place_are_named(tmp_path: Path, base: Path) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", low_rank(11))
    file = next(f for f in tuned.glob("*.safetensors") if "model.position_ids" in load_file(f))
    tensors = load_file(file)
    tensors["model.position_ids"] = tensors["model.position_ids"] + 1
    save_file(tensors, file)
    with pytest.raises(
        UnsupportedError, match=r"1 tensors differ.*\n.*position_ids: stored as I64"
    ):
        ps.extract(tuned, base, tmp_path / "out", rank=2)
    report = ps.extract(tuned, base, tmp_path / "out", rank=2, exclude=["model"])
    assert report.summary["left out on request"] == 1


def test_a_layout_without_the_algorithm_is_refused_before_the_work(
    tmp_path: Path, base: Path
) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(12))
    seen: list[str] = []
    for options, message in (
        ({"algorithm": "full", "to": "peft"}, "no keys for full"),
        ({"rank": 2, "to": "kohya"}, "no prefix for a language model"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            ps.extract(
                tuned,
                base,
                tmp_path / "out",
                **options,
                progress=lambda done, total, label="": seen.append(label),
            )
    assert set(seen) <= {"comparing"}
    for options in ({}, {"algorithm": "full", "rank": 3}, {"rank": "size:3MB"}, {"rank": 0}):
        with pytest.raises(UsageError, match="rank"):
            ps.extract(tuned, base, tmp_path / "out", **options)


# the command --------------------------------------------------------------------------------------


def test_dry_run_reads_headers_only(tmp_path: Path, base: Path) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(13))
    report = ps.extract(tuned, base, tmp_path / "out", rank=4, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert len(report.tables["pairs"]) == 4 * 4 + 3
    planned = report.summary["bytes written"]
    done = ps.extract(tuned, base, tmp_path / "out", rank=4)
    assert done.summary["bytes written"] == planned
    for shard in tuned.glob("*.safetensors"):  # the values play no part
        size = int.from_bytes(shard.read_bytes()[:8], "little") + 8
        content = shard.read_bytes()
        shard.write_bytes(content[:size] + b"\xff" * (len(content) - size))
    again = ps.extract(tuned, base, tmp_path / "dry", rank=4, dry_run=True)
    assert again.tables == report.tables


def test_overwrite_and_output(tmp_path: Path, base: Path) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", low_rank(14))
    arguments = ["extract", str(tuned), str(base), "-o", str(tmp_path / "out"), "--rank", "max:3"]
    first = CliRunner().invoke(main, [*arguments, "--json"])
    assert first.exit_code == 0, first.output
    shown = json.loads(first.stdout)
    assert shown["summary"]["energy kept"] > 0.99
    assert len(shown["inputs"]) > 2
    assert CliRunner().invoke(main, arguments).exit_code == 2
    assert CliRunner().invoke(main, [*arguments, "--overwrite"]).exit_code == 0
    onto = CliRunner().invoke(
        main, ["extract", str(tuned), str(base), "-o", str(base), "--rank", "3"]
    )
    assert onto.exit_code == 2


def test_same_input_same_bytes(tmp_path: Path, base: Path) -> None:
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(15))
    for name in ("one", "two"):
        ps.extract(tuned, base, tmp_path / f"{name}.safetensors", rank=2, to="lycoris")
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()


def test_lokr_of_the_most_exact_cut(tmp_path: Path, base: Path) -> None:
    """Changes that are Kronecker products of another cut than the near-square one, with as many
    numbers."""
    cuts = {(24, 24): (2, 8), (12, 24): (2, 6), (24, 40): (2, 10)}
    random = torch.Generator().manual_seed(16)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if "_proj" not in name:
            return None
        a, c = cuts[tuple(weight.shape)]
        sides = weight.shape[0] // a, weight.shape[1] // c
        first = torch.randn(a, c, generator=random)
        return torch.kron(first, torch.randn(sides, generator=random) / 4)

    tuned = tuned_copy(base, tmp_path / "tuned", change)
    loss = {}
    for factor in (-1, None):
        out = tmp_path / f"{factor}.safetensors"
        report = ps.extract(
            tuned, base, out, algorithm="lokr", factor=factor, to="lycoris", dtype="fp32"
        )
        loss[factor] = report.loss
        found = held(out, base)
        gone = sum(
            float((delta - found[name.removesuffix(".weight")]).square().sum())
            for name, delta in deltas(tuned, base).items()
        )
        whole = sum(float(delta.square().sum()) for delta in deltas(tuned, base).values())
        assert report.loss == pytest.approx(math.sqrt(gone / whole), rel=1e-4, abs=1e-6)
    assert loss[-1] > 0.3
    assert loss[None] < 0.02  # the weights are bf16
    with pytest.raises(UnsupportedError, match="--factor auto"):
        ps.extract(tuned, base, tmp_path / "peft", algorithm="lokr", factor=None, to="peft")
    arguments = ["extract", str(tuned), str(base), "-o", str(tmp_path / "c.safetensors")]
    arguments += ["--algorithm", "lokr", "--to", "lycoris", "--dtype", "fp32", "--factor"]
    assert CliRunner().invoke(main, [*arguments, "0"]).exit_code == 2
    assert CliRunner().invoke(main, [*arguments, "auto"]).exit_code == 0
    again = held(tmp_path / "c.safetensors", base)
    assert all(torch.equal(delta, found[path]) for path, delta in again.items())
