"""combine on adapter files: ΔW of the result against sums computed from the files in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftsurgery
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import LoRA
from peftsurgery.codec import load_adapter as load
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.merge_methods import METHODS, Elementwise
from peftsurgery.operations.combine import combine as operation
from peftsurgery.operations.strengths import Strength
from tests.codec.build import read, write
from tests.codec.parts import Maker
from tests.merge_methods import dense

KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q"
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
HOME = "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
load_adapter = partial(load, architecture="sd1")  # the matrices are too small to tell sd1 from sd2
combine = partial(operation, architecture="sd1")
FIXED = {
    "density": {"dare_linear", "dare_ties", "della", "della_linear", "magnitude_prune"}
    | {"breadcrumbs", "breadcrumbs_ties"},
    "pairs": {"slerp"},
}


def lora(folder: Path, seed: int, rank: int, *, te: bool = True, dtype=torch.float32) -> Path:
    maker = Maker(seed, dtype=dtype)
    tensors = maker.lora(KEY, 40, 24, rank, alpha=3)
    if te:
        tensors |= maker.lora(TE, 32, 32, 2, alpha=1)
    return write(folder / f"lora{seed}.safetensors", tensors)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three LoRAs of unequal ranks; the second has no text encoder."""
    return [lora(tmp_path, 1, 4), lora(tmp_path, 2, 3, te=False), lora(tmp_path, 3, 7)]


def deltas(files: Sequence[Path], path: str) -> list[Tensor]:
    """ΔW of every file at one module, zero where it is missing."""
    adapters = [load_adapter(file) for file in files]
    shape = next(a.modules[path].shape for a in adapters if path in a.modules)
    zero = torch.zeros(shape, dtype=torch.float64)
    return [a.modules[path].delta().double() if path in a.modules else zero for a in adapters]


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def paths(files: Sequence[Path]) -> list[str]:
    return list(dict.fromkeys(p for f in files for p in load_adapter(f).modules))


# linear -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -0.3, 1.2), (0.0, 2.0, -1.0)])
@pytest.mark.parametrize("to", ["kohya", "peft", "diffusers", "comfy"])
def test_linear_is_the_exact_sum(
    files: list[Path], weights: tuple[float, ...], to: str, tmp_path: Path
) -> None:
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    report = combine(list(zip(files, weights, strict=True)), out, to=to)
    assert report.ok
    assert report.loss == 0
    found = load_adapter(out)
    for path in paths(files):
        expected = dense.summed(deltas(files, path), weights)
        assert gap(found.modules[path].delta(), expected) < 1e-6
    ranks = {path: module.rank for path, module in found.modules.items()}
    live = [r for r, w in zip((4, 3, 7), weights, strict=True) if w]
    assert ranks[HOME] == sum(live)


def test_scale_and_normalize(files: list[Path], tmp_path: Path) -> None:
    weights = (0.5, 0.25, 1.0)
    combine(
        list(zip(files, weights, strict=True)), tmp_path / "o.safetensors", scale=2.0,
        normalize=True,
    )  # fmt: skip
    found = load_adapter(tmp_path / "o.safetensors")
    for path in paths(files):
        expected = 2 * dense.summed(deltas(files, path), weights) / 1.75
        assert gap(found.modules[path].delta(), expected) < 1e-6


def test_recompression_is_the_truncated_svd(files: list[Path], tmp_path: Path) -> None:
    weights = (0.5, -0.3, 1.2)
    report = combine(
        list(zip(files, weights, strict=True)), tmp_path / "o.safetensors", rank="max:5"
    )
    found = load_adapter(tmp_path / "o.safetensors").modules[HOME]
    exact = dense.summed(deltas(files, HOME), weights)
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    assert gap(found.delta(), u[:, :5] * s[:5] @ vh[:5]) < 1e-5
    row = next(r for r in report.modules if r["module"] == HOME)
    assert row["rank"] == 5
    assert row["loss"] == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-4)
    assert row["norm"] == pytest.approx(float(exact.norm()), rel=1e-5)


def test_svd_takes_the_largest_rank(files: list[Path], tmp_path: Path) -> None:
    combine([(f, 1.0) for f in files], tmp_path / "o.safetensors", method="svd")
    assert load_adapter(tmp_path / "o.safetensors").modules[HOME].rank == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_one_adapter_is_itself(dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    source = lora(tmp_path, 5, 4, dtype=dtype)
    out = tmp_path / "out.safetensors"
    combine([(source, 1.0)], out, method=method)
    before, after = load_adapter(source), load_adapter(out)
    for path, module in before.modules.items():
        for name, tensor in module.tensors().items():
            assert torch.equal(tensor, after.modules[path].tensors()[name])
        assert float(module.scale) == float(after.modules[path].scale)


@pytest.mark.parametrize("name", list(METHODS))
def test_one_adapter_of_weight_one_is_itself_by_every_method(name: str, tmp_path: Path) -> None:
    source = lora(tmp_path, 6, 4)
    options: dict[str, Any] = {"density": 1.0} if name in FIXED["density"] else {}
    if name.startswith("breadcrumbs"):
        options["gamma"] = 0.0
    report = combine([(source, 1.0)], tmp_path / "o.safetensors", method=name, **options)
    found = load_adapter(tmp_path / "o.safetensors")
    for path in paths([source]):
        assert gap(found.modules[path].delta(), deltas([source], path)[0]) < 1e-5
    flat = name in ("iso_c", "iso_cts")
    assert any(f.code == "one-adapter" for f in report.findings) == flat


def test_duplicates_do_not_grow(tmp_path: Path) -> None:
    source = lora(tmp_path, 7, 4)
    combine([(source, 0.5), (source, 0.25)], tmp_path / "o.safetensors")
    found = load_adapter(tmp_path / "o.safetensors").modules[HOME]
    assert found.rank == 4
    assert gap(found.delta(), 0.75 * deltas([source], HOME)[0]) < 1e-6


def test_opposites_cancel(tmp_path: Path) -> None:
    source = lora(tmp_path, 7, 4)
    combine([(source, 1.0), (source, -1.0)], tmp_path / "o.safetensors")
    assert float(load_adapter(tmp_path / "o.safetensors").modules[HOME].delta().norm()) == 0


# element-wise and spectral ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if isinstance(m, Elementwise)])
def test_elementwise_results_are_fitted_and_the_loss_is_told(
    name: str, files: list[Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"density": 0.5} if name in FIXED["density"] else {}
    sources = [(f, 0.7) for f in files]
    report = combine(sources, tmp_path / "lora.safetensors", method=name, rank=6, **options)
    combine(
        sources, tmp_path / "full.safetensors", method=name, algorithm="full", to="comfy", **options
    )
    fitted = load_adapter(tmp_path / "lora.safetensors").modules[HOME]
    exact = load_adapter(tmp_path / "full.safetensors").modules[HOME].delta()
    s = torch.linalg.svdvals(exact.double())
    row = next(r for r in report.modules if r["module"] == HOME)
    assert fitted.rank == row["rank"] == 6
    tail = float(s[6:].norm() / s.norm())
    assert row["loss"] == pytest.approx(tail, rel=1e-3)
    assert gap(fitted.delta(), exact.double()) == pytest.approx(tail, rel=1e-3)
    assert 0 < report.loss < 1


def test_ties_of_files_is_ties_of_deltas(files: list[Path], tmp_path: Path) -> None:
    weights = (0.5, 0.3, 1.2)
    combine(
        list(zip(files, weights, strict=True)), tmp_path / "o.safetensors", method="ties",
        density=0.3, algorithm="full", to="comfy",
    )  # fmt: skip
    found = load_adapter(tmp_path / "o.safetensors")
    for path in paths(files):
        kept = [dense.top(d, int(0.3 * d.numel())) for d in deltas(files, path)]
        expected = dense.elected(kept, weights, "total", True)
        assert gap(found.modules[path].delta(), expected) < 1e-5


def test_slerp_with_a_module_of_one_adapter_only(files: list[Path], tmp_path: Path) -> None:
    combine([(files[0], 1.0), (files[1], 3.0)], tmp_path / "o.safetensors", method="slerp")
    found = load_adapter(tmp_path / "o.safetensors")
    a, b = deltas(files[:2], HOME)
    assert gap(found.modules[HOME].delta(), dense.slerp(a, b, 0.75)) < 1e-6
    te = next(p for p in found.modules if p.startswith("text_encoder"))
    assert gap(found.modules[te].delta(), 0.25 * deltas(files[:2], te)[0]) < 1e-6


def test_seeds_come_from_the_module(files: list[Path], tmp_path: Path) -> None:
    """The same numbers whatever else the files hold; others with another seed."""
    alone = [lora(tmp_path / "alone", seed, 4, te=False) for seed in (1, 2)]
    wide = [lora(tmp_path / "wide", seed, 4) for seed in (1, 2)]
    found = []
    for sources, seed in ((alone, 0), (wide, 0), (wide, 1)):
        out = tmp_path / f"{len(found)}.safetensors"
        combine(
            [(f, 1.0) for f in sources], out, method="dare_ties", density=0.5, seed=seed, rank=20
        )
        found.append(load_adapter(out).modules[HOME].delta())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# mixtures -----------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """A LoRA, a LoHa, a LoKr and a dense difference of one matrix and one convolution."""
    maker = Maker(11)
    conv = maker.lora(CONV, 12, 8, 3, alpha=2, kernel=(3, 3))
    diff = {f"{KEY}.diff": maker.draw(40, 24), f"{CONV}.diff": maker.draw(12, 8, 3, 3)}
    return [
        write(tmp_path / "lora.safetensors", maker.lora(KEY, 40, 24, 3, alpha=1) | conv),
        write(tmp_path / "loha.safetensors", maker.loha(KEY, 40, 24, 2, alpha=1)),
        write(tmp_path / "lokr.safetensors", maker.lokr(KEY, (4, 3), (10, 8), 2, alpha=2)),
        write(tmp_path / "full.safetensors", diff),
    ]


@pytest.mark.parametrize("count", [3, 4])
def test_mixed_algorithms_become_one(count: int, mixed: list[Path], tmp_path: Path) -> None:
    weights = (0.5, 0.3, -0.8, 1.0)[:count]
    sources = list(zip(mixed, weights, strict=False))
    combine(sources, tmp_path / "o.safetensors", to="kohya")
    found = load_adapter(tmp_path / "o.safetensors")
    for path in paths(mixed[:count]):
        expected = dense.summed(deltas(mixed[:count], path), weights)
        assert gap(found.modules[path].delta().reshape(expected.shape), expected) < 2e-6
    assert found.modules[HOME].algorithm == ("lora" if count == 3 else "full")


@pytest.mark.parametrize("name", ["knots", "tsv", "iso_c", "core_ties", "karcher", "ties"])
def test_dense_inputs_go_through_every_kind(name: str, mixed: list[Path], tmp_path: Path) -> None:
    combine([(f, 0.5) for f in mixed], tmp_path / "o.safetensors", method=name, to="kohya", rank=4)
    found = load_adapter(tmp_path / "o.safetensors").modules
    assert all(m.rank == 4 for p, m in found.items() if isinstance(m, LoRA))
    assert found[HOME].algorithm == "lora"


def test_lokr_result_states_its_loss(files: list[Path], tmp_path: Path) -> None:
    twice = [(files[1], 1.0), (files[1], 1.0)]
    report = combine(twice, tmp_path / "o.safetensors", algorithm="lokr")
    found = load_adapter(tmp_path / "o.safetensors").modules[HOME]
    assert found.algorithm == "lokr"
    exact = 2 * deltas(files[1:2], HOME)[0]
    row = next(r for r in report.modules if r["module"] == HOME)
    assert gap(found.delta(), exact) == pytest.approx(float(row["loss"] or 0), rel=1e-2)


def test_fused_and_split_modules_meet(tmp_path: Path) -> None:
    """A Kohya FLUX file fuses q, k and v; a diffusers file has them apart."""
    maker = Maker(1)
    fused = write(
        tmp_path / "kohya.safetensors",
        maker.lora("lora_unet_double_blocks_0_img_attn_qkv", 3 * 3072, 3072, 2, alpha=2)
        | maker.lora("lora_unet_single_blocks_0_linear2", 3072, 15360, 2, alpha=2),
    )
    ab = Maker(2, style="peft")
    name = "transformer.transformer_blocks.0.attn.to_{}"
    split = write(
        tmp_path / "diffusers.safetensors",
        ab.lora(name.format("q"), 3072, 3072, 3) | ab.lora(name.format("k"), 3072, 3072, 2),
    )
    operation([(fused, 0.5), (split, 2.0)], tmp_path / "o.safetensors", to="kohya")
    found = load(tmp_path / "o.safetensors")
    one, other = load(fused), load(split)
    for path, module in one.modules.items():
        expected = 0.5 * module.delta().double()
        if path in other.modules:
            expected += 2.0 * other.modules[path].delta().double()
        assert gap(found.modules[path].delta(), expected) < 1e-5


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_a_fused_weight_gets_one_rank(method: str, tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    files = [
        write(tmp_path / f"{s}.safetensors", Maker(s).lora(name, 3 * 3072, 3072, 2, alpha=2))
        for s in (1, 2)
    ]
    out = tmp_path / "o.safetensors"
    operation([(f, 0.5) for f in files], out, method=method, rank=3)
    assert read(out)[f"{name}.lora_down.weight"].shape == (3, 3072)
    if method == "svd":
        one, other = (load(f).modules for f in files)
        found = load(out).modules
        whole = torch.cat([0.5 * (one[p].delta() + other[p].delta()) for p in one])
        kept = torch.cat([found[p].delta() for p in one])
        s = torch.linalg.svdvals(whole @ whole.T[:, :64])  # rank 4: any 64 columns show it
        assert int((s > 1e-4 * s[0]).sum()) == 4
        assert int(torch.linalg.matrix_rank(kept[:, :64], rtol=1e-4)) == 3


# weights ------------------------------------------------------------------------------------------


def test_weights_per_component_and_pattern(files: list[Path], tmp_path: Path) -> None:
    strengths = [
        Strength(1.0, {"unet": 0.5, "text_encoder": -1.0}),
        Strength(2.0),
        Strength(1.0, patterns={"text_encoder:*": 3.0}),
    ]
    combine(list(zip(files, strengths, strict=True)), tmp_path / "o.safetensors")
    found = load_adapter(tmp_path / "o.safetensors")
    te = next(p for p in found.modules if p.startswith("text_encoder"))
    assert gap(found.modules[HOME].delta(), dense.summed(deltas(files, HOME), (0.5, 2, 0))) < 1e-6
    assert gap(found.modules[te].delta(), dense.summed(deltas(files, te), (-1, 2, 3))) < 1e-6
    with pytest.raises(UsageError, match="no component 'transformer'"):
        combine([(files[0], Strength(1.0, {"transformer": 1.0}))], tmp_path / "no.safetensors")


# what it writes -----------------------------------------------------------------------------------


def test_metadata_and_lineage(tmp_path: Path) -> None:
    from safetensors import safe_open

    sources = []
    for seed, steps in ((1, "10"), (2, "20")):
        tensors = Maker(seed).lora(KEY, 40, 24, 4, alpha=2)
        sources.append(
            write(
                tmp_path / f"{seed}.safetensors",
                tensors,
                ss_base_model_version="sd_v1",
                ss_steps=steps,
                ss_network_dim="4",
                ss_network_alpha="2",
                ss_network_module="networks.lora",
            )
        )
    out = tmp_path / "o.safetensors"
    report = combine([(sources[0], 0.5), (sources[1], -0.25)], out, method="linear", scale=2.0)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert "ss_steps" not in metadata
    assert '"ss_steps": "20"' in metadata["peftsurgery.training"]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "8")
    assert metadata["peftsurgery.operation"] == "combine"
    options = metadata["peftsurgery.options"].split()
    assert {"method=linear", "scale=2", "weights=1.safetensors=0.5,2.safetensors=-0.25"} <= set(
        options
    )
    assert metadata["peftsurgery.inputs"].count("sha256:") == 2
    assert len(report.inputs) == 2
    again = tmp_path / "again.safetensors"
    combine([(sources[0], 0.5), (sources[1], -0.25)], again, method="linear", scale=2.0)
    assert again.read_bytes() == out.read_bytes()


def test_public_name_and_adapters_in_memory(files: list[Path], tmp_path: Path) -> None:
    first: Adapter = load_adapter(files[0])
    count = len(first.modules)
    peftsurgery.combine([(first, 0.5), (files[2], 0.5)], tmp_path / "o.safetensors")
    assert len(first.modules) == count
    found = load_adapter(tmp_path / "o.safetensors").modules[HOME].delta()
    assert gap(found, dense.summed(deltas([files[0], files[2]], HOME), (0.5, 0.5))) < 1e-6


def test_dry_run_writes_nothing(files: list[Path], tmp_path: Path) -> None:
    report = combine([(f, 1.0) for f in files], tmp_path / "o.safetensors", dry_run=True)
    assert not (tmp_path / "o.safetensors").exists()
    assert report.summary["modules"] == 2
    row = next(r for r in report.modules if r["module"] == HOME)
    assert (row["from"], row["ranks"], row["shape"]) == (3, "4+3+7", "40x24")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_dtype(dtype: str, files: list[Path], tmp_path: Path) -> None:
    combine([(f, 1.0) for f in files], tmp_path / "o.safetensors", dtype=dtype)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    found = load_adapter(tmp_path / "o.safetensors")
    assert {t.dtype for m in found.modules.values() for t in m.tensors().values()} == {wanted}
    expected = dense.summed(deltas(files, HOME), (1, 1, 1))
    assert gap(found.modules[HOME].delta(), expected) < 4 * torch.finfo(wanted).eps


# refusals -----------------------------------------------------------------------------------------


def test_refusals(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    with pytest.raises(UsageError, match=r"method 'tie' is not known \(closest: ties"):
        combine([(files[0], 1.0)], out, method="tie")
    with pytest.raises(UsageError, match="no adapter given"):
        combine([], out)
    with pytest.raises(UsageError, match="is the input"):
        combine([(files[0], 1.0), (files[1], 1.0)], files[1], overwrite=True)
    with pytest.raises(UsageError, match="defined for 2 adapters, got 3"):
        combine([(f, 1.0) for f in files], out, method="slerp")
    with pytest.raises(UsageError, match="must not be negative"):
        combine([(files[0], -1.0), (files[1], 1.0)], out, method="karcher")
    with pytest.raises(UsageError, match="no meaning with --algorithm full"):
        combine([(files[0], 1.0)], out, algorithm="full", rank=3)
    out.write_bytes(b"kept")
    with pytest.raises(UsageError, match="Pass --overwrite"):
        combine([(files[0], 1.0)], out)
    assert out.read_bytes() == b"kept"
    combine([(files[0], 1.0)], out, overwrite=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "tsv"])
def test_nan_names_the_file_and_module(
    value: float, method: str, files: list[Path], tmp_path: Path
) -> None:
    tensors = Maker(1).lora(KEY, 40, 24, 2)
    tensors[f"{KEY}.lora_up.weight"][3, 1] = value
    bad = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(UsageError, match=r"bad.safetensors: unet:.*attn2.to_k: up holds NaN"):
        combine([(files[0], 1.0), (bad, 1.0)], tmp_path / "o.safetensors", method=method)
    assert not (tmp_path / "o.safetensors").exists()


def test_other_architecture_or_shape(files: list[Path], tmp_path: Path) -> None:
    flux = write(
        tmp_path / "flux.safetensors",
        Maker(1).lora("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072, 2, alpha=2),
    )
    sd1 = write(tmp_path / "sd1.safetensors", Maker(1).lora(KEY, 320, 768, 2))
    with pytest.raises(UnsupportedError, match=r"flux.safetensors: is for flux, and .* for sd1"):
        operation([(sd1, 1.0), (flux, 1.0)], tmp_path / "o.safetensors")
    wide = write(tmp_path / "wide.safetensors", Maker(1).lora(KEY, 44, 24, 2))
    with pytest.raises(UsageError, match=r"a weight \[40, 24\] and .*wide.* one of \[44, 24\]"):
        combine([(files[0], 1.0), (wide, 1.0)], tmp_path / "o.safetensors")


def test_zero_modules(tmp_path: Path) -> None:
    tensors = Maker(1).lora(KEY, 40, 24, 2)
    tensors[f"{KEY}.lora_up.weight"].zero_()
    zero = write(tmp_path / "zero.safetensors", tensors)
    for method in METHODS:
        options: dict[str, Any] = {"density": 0.5} if method in FIXED["density"] else {}
        out = tmp_path / f"{method}.safetensors"
        combine([(zero, 1.0), (zero, 1.0)], out, method=method, **options)
        assert float(load_adapter(out).modules[HOME].delta().norm()) == 0
    report = combine([(zero, 1.0)], tmp_path / "o.safetensors")
    assert any(f.code == "dead-modules" for f in report.findings)
