"""resize-rank against dense SVDs in fp64: every algorithm, every rule, budgets, Gram matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from peftsurgery.codec import load_adapter
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.operations.resize_rank import ResizeReport, resize_rank
from tests.codec.build import dense, gap, read, write
from tests.codec.parts import Maker

ATTENTION = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
PROJECTION = "lora_unet_down_blocks_1_attentions_0_proj_in"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
HOME = {
    ATTENTION: "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    PROJECTION: "unet:down_blocks.1.attentions.0.proj_in",
    CONV: "unet:down_blocks.0.resnets.0.conv1",
}
Tensors = dict[str, torch.Tensor]


def truncated(matrix: np.ndarray, k: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def tucker(maker: Maker, name: str, out: int, into: int, rank: int) -> Tensors:
    return {
        f"{name}.lora_up.weight": maker.draw(out, rank, 1, 1),
        f"{name}.lora_down.weight": maker.draw(rank, into, 1, 1),
        f"{name}.lora_mid.weight": maker.draw(rank, rank, 3, 3),
        f"{name}.alpha": torch.tensor(3.0),
    }


def tensors_of(kind: str, maker: Maker) -> Tensors:
    if kind == "lora":
        return maker.lora(ATTENTION, 24, 40, 9, alpha=4)
    if kind == "lora above its sides":
        return maker.lora(ATTENTION, 5, 40, 12, alpha=4)
    if kind == "conv":
        return maker.lora(CONV, 20, 6, 8, alpha=2, kernel=(3, 3))
    if kind == "tucker":
        return tucker(maker, CONV, 20, 6, 4)
    if kind == "loha":
        return maker.loha(ATTENTION, 24, 40, 3, alpha=2)
    if kind == "loha of full rank":
        return maker.loha(ATTENTION, 10, 12, 4, alpha=2)
    if kind == "lokr":
        return maker.lokr(ATTENTION, (3, 4), (8, 10), 2, alpha=1)
    return maker.lokr(ATTENTION, (3, 4), (8, 10), None)  # "lokr of full rank"


KINDS = (
    "lora",
    "lora above its sides",
    "conv",
    "tucker",
    "loha",
    "loha of full rank",
    "lokr",
    "lokr of full rank",
)


def run(
    source: Path, out: Path, rank: str | int, **options: object
) -> tuple[ResizeReport, dict[str, np.ndarray]]:
    settings: dict = {"rank": rank, "architecture": "sd1", "overwrite": True, **options}
    report = resize_rank(source, out, **settings)
    found = load_adapter(out, architecture="sd1").modules
    return report, {path: dense(module) for path, module in found.items()}


# the optimal truncation -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_algorithm_is_truncated_as_its_dense_matrix(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    maker = Maker(len(kind), dtype=dtype)
    source = write(tmp_path / "in.safetensors", tensors_of(kind, maker))
    before = load_adapter(source, architecture="sd1").modules
    (path, module) = next(iter(before.items()))
    matrix = dense(module)
    spectrum = np.linalg.svd(matrix, compute_uv=False)
    eps = float(torch.finfo(dtype).eps)
    count = int((spectrum > 1e-9 * spectrum[0]).sum())
    for k in sorted({1, 2, count // 2, count, count + 3}):
        report, after = run(source, tmp_path / "o.safetensors", k)
        wanted = truncated(matrix, k)
        assert gap(after[path], wanted) < 4 * eps + 2e-6
        (row,) = report.modules
        assert row["rank"] == min(k, count, *matrix.shape)
        tail = math.sqrt((spectrum[k:] ** 2).sum() / (spectrum**2).sum())
        assert row["frobenius_error"] == pytest.approx(tail, abs=4 * eps + 2e-6)
        assert row["energy"] == pytest.approx(1 - tail**2, abs=1e-5)
        following = spectrum[k] if k < count else 0.0
        assert row["spectral_error"] == pytest.approx(following / spectrum[0], abs=1e-5)
        measured = np.linalg.norm(after[path] - matrix) / np.linalg.norm(matrix)
        assert row["frobenius_error"] == pytest.approx(measured, abs=1e-5)
        written = load_adapter(tmp_path / "o.safetensors", architecture="sd1").modules[path]
        assert written.algorithm == "lora"
        assert {t.dtype for t in written.tensors().values()} == {dtype}


@pytest.mark.parametrize("rule", ["energy:0.8", "fro:0.8", "cumulative:0.7", "ratio:2", "min:3,1"])
def test_rules_decide_for_each_module(rule: str, tmp_path: Path) -> None:
    from peftsurgery.linalg import RankRule

    maker = Maker(3)
    tensors = maker.lora(ATTENTION, 24, 40, 9, alpha=4) | maker.lora(PROJECTION, 30, 30, 12)
    source = write(tmp_path / "in.safetensors", tensors)
    before = load_adapter(source, architecture="sd1").modules
    report, after = run(source, tmp_path / "o.safetensors", rule)
    for row in report.modules:
        path = str(row["module"])
        spectrum = np.linalg.svd(dense(before[path]), compute_uv=False)[: before[path].rank]
        k = RankRule.parse(rule).choose(torch.from_numpy(spectrum))
        assert row["rank"] == k
        assert gap(after[path], truncated(dense(before[path]), k)) < 1e-5


def test_convolutions_have_a_rule_of_their_own(tmp_path: Path) -> None:
    maker = Maker(3)
    tensors = (
        maker.lora(ATTENTION, 24, 40, 9)
        | maker.lora(CONV, 20, 6, 8, kernel=(3, 3))
        | maker.lora(PROJECTION, 24, 24, 7, kernel=(1, 1))
    )
    source = write(tmp_path / "in.safetensors", tensors)
    report, _ = run(source, tmp_path / "o.safetensors", 4, conv_rank=2)
    ranks = {str(row["module"]): row["rank"] for row in report.modules}
    assert ranks == {HOME[ATTENTION]: 4, HOME[CONV]: 2, HOME[PROJECTION]: 4}
    shapes = {k: t.shape for k, t in read(tmp_path / "o.safetensors").items()}
    assert shapes[f"{CONV}.lora_down.weight"] == (2, 6, 3, 3)
    assert shapes[f"{CONV}.lora_up.weight"] == (20, 2, 1, 1)
    assert shapes[f"{PROJECTION}.lora_down.weight"] == (4, 24, 1, 1)


# what is kept ---------------------------------------------------------------------------------


def test_scale_stays_and_metadata_follows(tmp_path: Path) -> None:
    maker = Maker(3)
    tensors = maker.lora(ATTENTION, 24, 40, 8, alpha=2) | maker.lora(PROJECTION, 30, 30, 8, alpha=2)
    source = write(
        tmp_path / "in.safetensors",
        tensors,
        ss_network_module="networks.lora",
        ss_network_dim="8",
        ss_network_alpha="2.0",
        ss_base_model_version="sd_v1",
        sshs_model_hash="0" * 64,
    )
    out = tmp_path / "o.safetensors"
    run(source, out, 4)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
        assert float(file.get_tensor(f"{ATTENTION}.alpha")) == 1.0
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "1")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["sshs_model_hash"] != "0" * 64
    assert metadata["peftsurgery.operation"] == "resize-rank"
    assert "rank=4" in metadata["peftsurgery.options"]
    run(source, out, "energy:0.7")
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    adapter = load_adapter(out, architecture="sd1")
    assert {float(m.scale) for m in adapter.modules.values()} == {0.25}
    if len({m.rank for m in adapter.modules.values()}) > 1:
        assert metadata["ss_network_dim"] == "Dynamic"


def test_a_rank_that_is_not_reached_changes_no_bit(tmp_path: Path) -> None:
    tensors = Maker(3, dtype=torch.float16).lora(ATTENTION, 24, 40, 4, alpha=3)
    source = write(tmp_path / "in.safetensors", tensors)
    report, _ = run(source, tmp_path / "o.safetensors", 16)
    after = read(tmp_path / "o.safetensors")
    assert {k: t.tolist() for k, t in after.items()} == {
        k: t.double().numpy().tolist() for k, t in tensors.items()
    }
    assert report.modules[0]["rank"] == 4
    assert report.energy == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    maker = Maker(3, dtype=dtype)
    tensors = maker.lora(ATTENTION, 24, 40, 4, alpha=3) | maker.lora(PROJECTION, 9, 9, 12, alpha=3)
    tensors |= maker.lora(CONV, 20, 6, 3, kernel=(3, 3))
    source = write(tmp_path / "in.safetensors", tensors)
    before = load_adapter(source, architecture="sd1").modules
    report, after = run(source, tmp_path / "o.safetensors", 16, pad=True)
    assert {row["rank"] for row in report.modules} == {16}
    modules = load_adapter(tmp_path / "o.safetensors", architecture="sd1").modules
    assert {m.rank for m in modules.values()} == {16}
    for path, module in before.items():
        assert float(modules[path].scale) == float(module.scale)
        assert (after[path] == dense(module)).all() or path == HOME[PROJECTION]
        assert gap(after[path], dense(module)) < 4 * torch.finfo(dtype).eps
    report, _ = run(source, tmp_path / "o.safetensors", "energy:0.9,max:6", pad=True)
    assert len({row["rank"] for row in report.modules}) == 1
    report, _ = run(source, tmp_path / "o.safetensors", 5, conv_rank=4, pad=True)
    ranks = {str(row["module"]): row["rank"] for row in report.modules}
    assert ranks == {HOME[ATTENTION]: 5, HOME[PROJECTION]: 5, HOME[CONV]: 4}


def test_a_lokr_is_kept_when_asked(tmp_path: Path) -> None:
    tensors = Maker(3).lokr(ATTENTION, (3, 4), (12, 10), 6, alpha=3)
    source = write(tmp_path / "in.safetensors", tensors)
    report, after = run(source, tmp_path / "o.safetensors", 2, algorithm="keep")
    module = load_adapter(tmp_path / "o.safetensors", architecture="sd1").modules[HOME[ATTENTION]]
    assert module.algorithm == "lokr"
    t = {k.removeprefix(f"{ATTENTION}.lokr_"): v.double().numpy() for k, v in tensors.items()}
    w2 = t["w2_a"] @ t["w2_b"]
    wanted = 0.5 * np.kron(t["w1"], truncated(w2, 2))
    assert gap(after[HOME[ATTENTION]], wanted) < 1e-5
    whole = 0.5 * np.kron(t["w1"], w2)
    error = np.linalg.norm(whole - wanted) / np.linalg.norm(whole)
    assert report.modules[0]["frobenius_error"] == pytest.approx(error, abs=1e-5)
    assert (report.modules[0]["old_rank"], report.modules[0]["rank"]) == (6, 2)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("loha", "loha cannot be resized and kept"),
        ("lokr of full rank", "a whole w2 has no rank"),
        ("tucker", "Tucker LoRA has two ranks"),
    ],
)
def test_what_cannot_be_kept_is_named(kind: str, match: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", tensors_of(kind, Maker(1)))
    with pytest.raises(UnsupportedError, match=rf"unet:.*{match}"):
        run(source, tmp_path / "o.safetensors", 2, algorithm="keep")
    assert not (tmp_path / "o.safetensors").exists()


# budgets ----------------------------------------------------------------------------------------


def many(maker: Maker) -> Tensors:
    tensors: Tensors = {}
    for block, size in ((1, 40), (2, 80)):
        for layer in ("attn1_to_q", "attn1_to_v", "attn2_to_k", "attn2_to_out_0"):
            name = f"lora_unet_down_blocks_{block}_attentions_0_transformer_blocks_0_{layer}"
            found = maker.lora(name, size, size + 8, 12, alpha=6)
            found[f"{name}.lora_up.weight"] *= 10.0 ** -len(tensors) / 4 + 0.05
            tensors |= found
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_size_is_kept_to_and_used(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", many(Maker(5, dtype=dtype)))
    out = tmp_path / "o.safetensors"
    whole = source.stat().st_size
    energies = []
    for budget in (whole * 2 // 3, whole * 5 // 6, whole + 20_000):
        report, _ = run(source, out, f"size:{budget}B")
        size = out.stat().st_size
        assert size <= budget
        assert size >= min(budget - 3_000, whole - 2_000)
        energies.append(report.energy)
    assert energies[0] < energies[1] < energies[2]
    assert energies[2] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(UsageError, match=r"size:3000B: the smallest that works is size:(\d+)B"):
        run(source, out, "size:3000B")


def test_a_total_rank_is_spent_where_it_counts(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", many(Maker(5)))
    before = load_adapter(source, architecture="sd1").modules
    spectra = {
        p: np.linalg.svd(dense(m), compute_uv=False)[: m.rank or 0] for p, m in before.items()
    }
    report, _ = run(source, tmp_path / "o.safetensors", "total-rank:40")
    ranks = {str(row["module"]): int(row["rank"] or 0) for row in report.modules}
    assert sum(ranks.values()) == 40
    first = sum(float(s[0] ** 2) for s in spectra.values())
    rest = np.sort(np.concatenate([s[1:] ** 2 for s in spectra.values()]))[::-1]
    total = sum(float((s**2).sum()) for s in spectra.values())
    wanted = (first + rest[: 40 - len(spectra)].sum()) / total
    assert report.energy == pytest.approx(wanted, rel=1e-6)
    report, _ = run(source, tmp_path / "o.safetensors", "total-rank:40,max:6,min:2")
    chosen = [int(row["rank"] or 0) for row in report.modules]
    assert sum(chosen) == 40
    assert min(chosen) >= 2
    assert max(chosen) <= 6


def test_dry_run_prints_the_curve_and_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", many(Maker(5)))
    out = tmp_path / "o.safetensors"
    plan = resize_rank(source, out, rank="energy:0.9", architecture="sd1", dry_run=True)
    assert not out.exists()
    curve = plan.tables["curve"]
    assert [row["rank"] for row in curve] == [1, 2, 4, 8, 12]
    assert float(curve[-1]["energy, same rank"] or 0) == pytest.approx(1.0)
    for row in curve:
        assert float(row["energy, budget of that size"] or 0) >= float(
            row["energy, same rank"] or 0
        ) * (1 - 1e-9)
        report, _ = run(source, out, int(row["rank"] or 0))
        assert report.energy == pytest.approx(row["energy, same rank"], rel=1e-5)
        assert out.stat().st_size <= int(row["bytes"] or 0) <= out.stat().st_size + 5_000
    report, _ = run(source, out, "energy:0.9")
    assert [row["rank"] for row in report.modules] == [row["rank"] for row in plan.modules]
    assert report.energy == pytest.approx(plan.energy, rel=1e-5)
    json.dumps(plan.to_dict())


# Gram matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [ATTENTION, HOME[ATTENTION], HOME[ATTENTION].partition(":")[2]])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("kind", ["lora", "loha of full rank"])
def test_activations_decide(kind: str, diagonal: bool, name: str, tmp_path: Path) -> None:
    maker = Maker(2)
    source = write(tmp_path / "in.safetensors", tensors_of(kind, maker))
    matrix = dense(load_adapter(source, architecture="sd1").modules[HOME[ATTENTION]])
    n = matrix.shape[1]
    x = maker.draw(3 * n, n) * torch.logspace(0, -2, n)
    gram = x.T @ x
    given = gram.diagonal().clone() if diagonal else gram
    file = write(tmp_path / "g.safetensors", {name: given, "elsewhere.weight": torch.eye(3)})
    report, after = run(source, tmp_path / "o.safetensors", 3, gram=file)
    values, vectors = np.linalg.eigh((torch.diag(given) if diagonal else given).double().numpy())
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    spectrum = np.linalg.svd(matrix @ root, compute_uv=False)
    best = math.sqrt((spectrum[3:] ** 2).sum() / (spectrum**2).sum())
    (row,) = report.modules
    assert row["weighted_error"] == pytest.approx(best, abs=1e-5)
    found = np.linalg.norm((after[HOME[ATTENTION]] - matrix) @ root) / np.linalg.norm(spectrum)
    assert found == pytest.approx(best, abs=1e-5)
    plain = np.linalg.norm((truncated(matrix, 3) - matrix) @ root) / np.linalg.norm(spectrum)
    assert found < plain * 0.999
    measured = np.linalg.norm(after[HOME[ATTENTION]] - matrix) / np.linalg.norm(matrix)
    assert row["frobenius_error"] == pytest.approx(measured, abs=1e-5)
    top = np.linalg.norm(after[HOME[ATTENTION]] - matrix, 2) / np.linalg.norm(matrix, 2)
    assert row["spectral_error"] == pytest.approx(top, abs=1e-5)
    assert "gram-unused" in [f.code for f in report.findings]


def test_a_gram_matrix_of_a_convolution_and_a_wrong_one(tmp_path: Path) -> None:
    maker = Maker(2)
    source = write(tmp_path / "in.safetensors", tensors_of("conv", maker))
    x = maker.draw(90, 54)
    file = write(tmp_path / "g.safetensors", {CONV: x.T @ x})
    report, _ = run(source, tmp_path / "o.safetensors", 3, gram=file)
    assert float(report.modules[0]["weighted_error"] or 0) > 0
    wrong = write(tmp_path / "w.safetensors", {CONV: torch.eye(6)})
    with pytest.raises(UsageError, match=r"unet:.*conv1: Gram matrix: shape \(6, 6\)"):
        run(source, tmp_path / "o.safetensors", 3, gram=wrong)
    oblong = write(tmp_path / "v.safetensors", {CONV: torch.ones(3, 4)})
    with pytest.raises(UsageError, match="has shape"):
        run(source, tmp_path / "o.safetensors", 3, gram=oblong)
