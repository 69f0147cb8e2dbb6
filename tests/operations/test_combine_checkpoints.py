"""combine on whole checkpoints: the dense formulas on every tensor, files and names of the base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from peftsurgery.checkpoint import save
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.merge_methods import METHODS, Elementwise, Spectral
from peftsurgery.operations import combine_checkpoints as module
from peftsurgery.operations import combine_tensors
from peftsurgery.operations.combine import combine
from peftsurgery.operations.strengths import Strength
from tests.codec.build import write
from tests.codec.parts import Maker
from tests.merge_methods import dense

Tensors = dict[str, Tensor]
SHAPES = {"model.layers.0.q_proj.weight": (24, 16), "model.layers.1.q_proj.weight": (16, 24)} | {
    "model.norm.weight": (16,), "model.conv.weight": (6, 4, 3, 3), "model.scalar": ()
}  # fmt: skip
WHOLE = [n for n, m in METHODS.items() if not isinstance(m, Spectral)]


def state(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    return {**found, "model.ids": torch.arange(5)}


def tuned(base: Tensors, seed: int) -> Tensors:
    other = state(seed)
    return {
        n: (t + 0.1 * other[n]).to(t.dtype) if t.is_floating_point() else t for n, t in base.items()
    }


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    base = state(0)
    paths = [write(tmp_path / f"t{i}.safetensors", tuned(base, i)) for i in (1, 2, 3)]
    return write(tmp_path / "base.safetensors", base), paths


def changes(base: Path, files: Sequence[Path], name: str) -> list[Tensor]:
    origin = load_file(base)[name].double()
    return [(load_file(f)[name].double() - origin).reshape(len(origin) if origin.ndim else 1, -1)
            for f in files]  # fmt: skip


def expected(name: str, deltas: list[Tensor], weights: Sequence[float]) -> Tensor:
    if name == "ties":
        kept = [dense.top(d, max(1, int(0.5 * d.numel()))) for d in deltas]
        return dense.elected(kept, weights, "total", True)
    if name == "magnitude_prune":
        kept = [dense.top(d, max(1, int(0.5 * d.numel()))) for d in deltas]
        return dense.summed(kept, weights)
    if name == "sce":
        return dense.sce([w * d for w, d in zip(weights, deltas, strict=True)], 1.0)
    if name == "karcher":
        return dense.karcher(deltas, weights)
    return dense.summed(deltas, weights)


def assert_moved(found: Tensor, before: Tensor, change: Tensor, rtol: float, atol: float) -> None:
    """found = before + change, to rounding."""
    expected = before.double() + change.reshape(before.shape)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["linear", "ties", "magnitude_prune", "sce", "karcher"])
def test_formulas_on_every_tensor(
    name: str, models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, files = models
    weights = (0.5, 0.3, 0.9)
    density = 0.5 if name in ("ties", "magnitude_prune") else None
    out = tmp_path / "out.safetensors"
    report = combine(
        list(zip(files, weights, strict=True)), out, base=base, method=name, density=density
    )
    found, origin = load_file(out), load_file(base)
    for key, before in origin.items():
        if not before.is_floating_point():
            assert torch.equal(found[key], before)
            continue
        if name == "karcher" and before.ndim == 0:
            continue  # two opposite points have no mean on the sphere
        change = expected(name, changes(base, files, key), weights)
        assert_moved(found[key], before, change, rtol=1e-5, atol=2e-6)
    assert report.summary["tensors changed"] == len(SHAPES)


SPECTRAL = [n for n, m in METHODS.items() if isinstance(m, Spectral)]


@pytest.mark.parametrize("name", SPECTRAL)
def test_methods_on_singular_vectors(
    name: str, models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Of whole changes as of changes that are products; vectors are summed."""
    base, files = models
    weights = (0.5, 0.3, 0.9)
    method = METHODS[name]
    assert isinstance(method, Spectral)
    out = tmp_path / "out.safetensors"
    report = combine(list(zip(files, weights, strict=True)), out, base=base, method=name, scale=0.7)
    found, origin = load_file(out), load_file(base)
    for key, before in origin.items():
        if not before.is_floating_point():
            continue
        deltas = changes(base, files, key)
        if min(deltas[0].shape) == 1:
            change = 0.7 * dense.summed(deltas, weights)
        else:
            pairs = [cut_in_two(delta) for delta in deltas]
            left, right = method.run(pairs, weights, method.choose({"scale": 0.7}))
            change = left @ right
        assert_moved(found[key], before, change, rtol=1e-4, atol=2e-5)
    assert report.summary["tensors changed"] == len(SHAPES)


def cut_in_two(matrix: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u * s, vh


def test_tsv_and_iso_c_by_their_formulas(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Full rank: each of two changes is cut at half of its smaller side."""
    base, files = models
    key = "model.layers.0.q_proj.weight"
    deltas = changes(base, files[:2], key)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    polar = [
        p @ q
        for p, _, q in (
            torch.linalg.svd(torch.cat(side, axis), full_matrices=False)
            for side, axis in (
                ([u[:, :8] for u, _, _ in parts], 1),
                ([vh[:8] for _, _, vh in parts], 0),
            )
        )
    ]
    tsv = polar[0] * torch.cat([s[:8] for _, s, _ in parts]) @ polar[1]
    u, s, vh = torch.linalg.svd(deltas[0] + deltas[1], full_matrices=False)
    for name, change in (("tsv", tsv), ("iso_c", s.mean() * u @ vh)):
        out = tmp_path / f"{name}.safetensors"
        combine([(file, 1.0) for file in files[:2]], out, base=base, method=name)
        expected = load_file(base)[key].double() + change
        torch.testing.assert_close(load_file(out)[key].double(), expected, rtol=1e-4, atol=2e-5)


def test_one_fine_tune_has_no_common_space(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, files = models
    out = tmp_path / "out.safetensors"
    report = combine([(files[0], 0.5)], out, base=base, method="iso_c")
    assert [finding.code for finding in report.findings] == ["one-adapter"]
    key = "model.conv.weight"
    (delta,) = changes(base, files[:1], key)
    expected = load_file(base)[key].double() + 0.5 * delta.reshape(6, 4, 3, 3)
    torch.testing.assert_close(load_file(out)[key].double(), expected, rtol=1e-5, atol=2e-6)


def test_a_matrix_that_one_fine_tune_left_alone(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, files = models
    key = "model.layers.0.q_proj.weight"
    same = changed(tmp_path / "same.safetensors", files[1], {key: load_file(base)[key]})
    out = tmp_path / "out.safetensors"
    combine([(files[0], 1.0), (same, 1.0)], out, base=base, method="tsv")
    found, one = load_file(out)[key], load_file(files[0])[key]
    torch.testing.assert_close(found, one, rtol=1e-4, atol=2e-5)


def test_slerp(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, files = models
    out = tmp_path / "out.safetensors"
    combine([(files[0], 1.0), (files[1], 3.0)], out, base=base, method="slerp")
    key = "model.layers.0.q_proj.weight"
    one, other = changes(base, files[:2], key)
    change = dense.slerp(one, other, 0.75)
    torch.testing.assert_close(load_file(out)[key].double(), load_file(base)[key] + change,
                               rtol=1e-5, atol=2e-6)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WHOLE)
def test_one_fine_tune_of_weight_one_is_itself(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    origin = state(0, dtype)
    base = write(tmp_path / "base.safetensors", origin)
    one = write(tmp_path / "one.safetensors", tuned(origin, 1))
    options: dict[str, Any] = {}
    if isinstance(METHODS[name], Elementwise):
        options["density"] = 1.0
    if name.startswith("breadcrumbs"):
        options["gamma"] = 0.0
    out = tmp_path / "out.safetensors"
    report = combine([(one, 1.0)], out, base=base, method=name, **options)
    found = load_file(out)
    for key, tensor in load_file(one).items():
        assert torch.equal(found[key], tensor), key
    survival = report.summary["survival of the change"]
    assert isinstance(survival, float)
    assert survival == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", WHOLE)
def test_tiles_and_order_do_not_matter(
    name: str, models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, files = models
    sources = [(f, 0.5) for f in files[: 2 if name == "slerp" else 3]]
    needed = any(o.name == "density" and o.default is None for o in METHODS[name].options)
    options: dict[str, Any] = {"density": 0.5} if needed else {}
    combine(sources, tmp_path / "a.safetensors", base=base, method=name, **options)
    original = combine_tensors.Stack

    def small(*args: object, **kwargs: object) -> object:
        return original(*args, **kwargs, tile=40)  # type: ignore[arg-type]

    monkeypatch.setattr(combine_tensors, "Stack", small)
    combine(sources, tmp_path / "b.safetensors", base=base, method=name, **options)
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-6, atol=1e-7)


def test_an_unchanged_model_keeps_its_bytes(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, _ = models
    origin = load_file(base)
    origin["model.norm.weight"][0] = -0.0
    base = write(tmp_path / "zero.safetensors", origin)
    report = combine([(base, 0.7), (base, -3.0)], tmp_path / "o.safetensors", base=base)
    found = load_file(tmp_path / "o.safetensors")
    for key, tensor in origin.items():
        assert tensor.numpy().tobytes() == found[key].numpy().tobytes()
    assert report.summary["tensors changed"] == 0


def test_shards_side_files_and_metadata(tmp_path: Path) -> None:
    origin = state(0)
    base = tmp_path / "base"
    base.mkdir()
    save(base, origin, {"format": "pt"}, shard_size=2000)
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / "tokenizer.json").write_text("{}")
    assert len(list(base.glob("*.safetensors"))) > 1
    one = write(tmp_path / "one.safetensors", tuned(origin, 1))
    other = tmp_path / "other"
    save(other, tuned(origin, 2), {"format": "pt"}, shard_size=3000)
    out = tmp_path / "out"
    report = combine([(one, 0.5), (other, 0.5)], out, base=base, method="dare_ties", density=0.5)
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(origin)
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        metadata = file.metadata()
    assert "method=dare_ties density=0.5" in metadata["peftsurgery.options"]
    assert "seed=0" in metadata["peftsurgery.options"]
    assert "one.safetensors=0.5" in metadata["peftsurgery.checkpoints"]
    assert len(report.inputs) >= 4
    again = tmp_path / "again"
    combine([(one, 0.5), (other, 0.5)], again, base=base, method="dare_ties", density=0.5)
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_weights_by_pattern_and_other_dtypes(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, files = models
    strength = Strength(1.0, patterns={"model.layers.0.*": 0.5})
    combine([(files[0], strength)], tmp_path / "o.safetensors", base=base, dtype="bf16")
    found, origin, one = (load_file(f) for f in (tmp_path / "o.safetensors", base, files[0]))
    first, second = "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"
    assert found[first].dtype == torch.bfloat16
    assert torch.equal(found[second], origin[second].bfloat16())
    half = origin[first] + 0.5 * (one[first] - origin[first])
    assert float((found[first].float() - half).abs().max()) < 0.02


def test_dry_run(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, files = models
    report = combine([(files[0], 1.0)], tmp_path / "o.safetensors", base=base, dry_run=True)
    assert report.summary["tensors combined"] == len(SHAPES)
    assert not (tmp_path / "o.safetensors").exists()


# refusals -----------------------------------------------------------------------------------------


def changed(path: Path, source: Path, change: Mapping[str, Tensor | None]) -> Path:
    tensors = load_file(source) | {k: v for k, v in change.items() if v is not None}
    return write(path, {k: v for k, v in tensors.items() if change.get(k, v) is not None})


def test_refusals(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, files = models
    out = tmp_path / "o.safetensors"
    norm = "model.norm.weight"
    with pytest.raises(UsageError, match=r"t1.safetensors: is a whole checkpoint. Pass --base"):
        combine([(files[0], 1.0)], out)
    with pytest.raises(UsageError, match="--rank is for adapters"):
        combine([(files[0], 1.0)], out, base=base, rank=4)
    lora = write(
        tmp_path / "lora.safetensors",
        Maker(1).lora("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072, 2, alpha=2),
    )
    with pytest.raises(UsageError, match=r"t1.safetensors is a whole .*lora.safetensors an adapt"):
        combine([(lora, 1.0), (files[0], 1.0)], out, base=base)
    fewer = changed(tmp_path / "fewer.safetensors", files[0], {norm: None})
    with pytest.raises(UsageError, match=r"fewer.safetensors: has no tensor 'model.norm.weight'"):
        combine([(fewer, 1.0)], out, base=base)
    more = changed(tmp_path / "more.safetensors", files[0], {"model.norm.bias": torch.ones(2)})
    with pytest.raises(UsageError, match=r"base.safetensors: has no tensor 'model.norm.bias'"):
        combine([(more, 1.0)], out, base=base)
    grown = changed(tmp_path / "grown.safetensors", files[0], {norm: torch.ones(17)})
    with pytest.raises(UsageError, match=r"has shape \[17\], the base \[16\]"):
        combine([(grown, 1.0)], out, base=base)
    ids = changed(tmp_path / "ids.safetensors", files[0], {"model.ids": torch.arange(5) + 1})
    with pytest.raises(UnsupportedError, match=r"'model.ids' is I64 and differs"):
        combine([(ids, 1.0)], out, base=base)
    nan = changed(tmp_path / "nan.safetensors", files[0], {norm: torch.full((16,), float("nan"))})
    with pytest.raises(UsageError, match=r"nan.safetensors: 'model.norm.weight'.*NaN"):
        combine([(nan, 1.0)], out, base=base)
    with pytest.raises(UsageError, match="is the base itself"):
        combine([(files[0], 1.0)], base, base=base, overwrite=True)
    with pytest.raises(UsageError, match="is an input"):
        combine([(files[0], 1.0)], files[0], base=base, overwrite=True)
    with pytest.raises(CheckFailed, match="does not fit F16"):
        combine([(files[0], 1e7)], out, base=base, dtype="fp16")
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_proof_can_fail(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, files = models
    original = module._write

    def wrong(job: combine_tensors.Job, staged: Path, progress: object) -> None:
        original(job, staged, None)
        raw = bytearray(staged.read_bytes())
        raw[-300] ^= 0x40
        staged.write_bytes(raw)

    monkeypatch.setattr(module, "_write", wrong)
    with pytest.raises(CheckFailed, match="1 tensors differ"):
        combine([(files[0], 1.0)], tmp_path / "o.safetensors", base=base)
    assert not (tmp_path / "o.safetensors").exists()
