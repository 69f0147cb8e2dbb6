"""resize-rank in every layout: fused weights, PEFT folders, DoRA, what is carried."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import Full, LoHa, LoKr, LoRA, WeightAdapter
from peftsurgery.codec import load_adapter, save_adapter
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.layouts import LAYOUT_NAMES
from peftsurgery.operations.resize_rank import resize_rank
from tests.codec.build import dense, gap, read, write
from tests.codec.parts import Maker

H = 48
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PROJ = "lora_unet_double_blocks_0_img_attn_proj"
BLOCK = "transformer:transformer_blocks.0.attn"
PARTS = [f"{BLOCK}.{n}" for n in ("to_q", "to_k", "to_v")]


def truncated(matrix: np.ndarray, k: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def flux(path: Path, *, shared: bool = False, rank: int = 6) -> Path:
    """q, k, v and the output projection of one FLUX block, in PEFT's layout."""
    maker = Maker(8)
    down = maker.draw(rank, H)
    modules: dict[str, WeightAdapter] = {
        p: LoRA(maker.draw(H, rank), down if shared else maker.draw(rank, H), scale=0.5)
        for p in [*PARTS, f"{BLOCK}.to_out.0"]
    }
    save_adapter(Adapter(modules, "flux"), path, layout="diffusers")
    return path


@pytest.mark.parametrize("shared", [False, True])
def test_a_fused_weight_is_resized_as_one(shared: bool, tmp_path: Path) -> None:
    source = flux(tmp_path / "in.safetensors", shared=shared)
    before = load_adapter(source, architecture="flux").modules
    whole = np.concatenate([dense(before[p]) for p in PARTS])
    report = resize_rank(
        source, tmp_path / "o.safetensors", rank=4, to="kohya", architecture="flux"
    )
    found = read(tmp_path / "o.safetensors")
    assert found[f"{QKV}.lora_down.weight"].shape == (4, H)
    assert found[f"{QKV}.lora_up.weight"].shape == (3 * H, 4)
    after = load_adapter(tmp_path / "o.safetensors", architecture="flux").modules
    fused = np.concatenate([dense(after[p]) for p in PARTS])
    assert gap(fused, truncated(whole, 4)) < 1e-5
    rows = {str(r["module"]): r for r in report.modules}
    error = np.linalg.norm(fused - whole) / np.linalg.norm(whole)
    assert rows[PARTS[1]]["frobenius_error"] == pytest.approx(error, abs=1e-5)
    assert report.summary["modules resized"] == 2
    apart = tmp_path / "apart.safetensors"
    resize_rank(tmp_path / "o.safetensors", apart, rank=2, to="diffusers", architecture="flux")
    split = load_adapter(apart, architecture="flux").modules
    for p in PARTS:
        assert gap(dense(split[p]), truncated(dense(after[p]), 2)) < 1e-5


def test_a_fused_file_stays_fused(tmp_path: Path) -> None:
    maker = Maker(4)
    source = write(
        tmp_path / "in.safetensors",
        maker.lora(QKV, 3 * H, H, 8, alpha=4) | maker.lora(PROJ, H, H, 8, alpha=4),
    )
    resize_rank(source, tmp_path / "o.safetensors", rank=3, architecture="flux")
    t, found = read(source), read(tmp_path / "o.safetensors")
    for name in (QKV, PROJ):
        product = [
            x[f"{name}.lora_up.weight"]
            @ x[f"{name}.lora_down.weight"]
            * float(x[f"{name}.alpha"])
            / x[f"{name}.lora_down.weight"].shape[0]
            for x in (t, found)
        ]
        assert found[f"{name}.lora_down.weight"].shape[0] == 3
        assert float(found[f"{name}.alpha"]) == 1.5
        assert gap(product[1], truncated(product[0], 3)) < 1e-5


@pytest.mark.parametrize("kinds", ["loha", "lokr", "mixed"])
def test_fused_weights_of_other_algorithms(kinds: str, tmp_path: Path) -> None:
    maker = Maker(9)
    makers = {
        "loha": lambda: LoHa(
            maker.draw(H, 2), maker.draw(2, H), maker.draw(H, 2), maker.draw(2, H)
        ),
        "lokr": lambda: LoKr(w1=maker.draw(4, 4), w2=maker.draw(12, 12)),
        "lora": lambda: LoRA(maker.draw(H, 3), maker.draw(3, H)),
    }
    order = ("loha", "lora", "lora") if kinds == "mixed" else (kinds,) * 3
    modules: dict[str, WeightAdapter] = {p: makers[k]() for p, k in zip(PARTS, order, strict=True)}
    source = tmp_path / "in"
    try:
        save_adapter(Adapter(dict(modules), "flux"), source, layout="comfy")
        path = source
    except UnsupportedError:
        path = tmp_path / "in.safetensors"
        save_adapter(Adapter(dict(modules), "flux"), path, layout="lycoris")
    resize_rank(path, tmp_path / "o.safetensors", rank=5, to="kohya", architecture="flux")
    after = load_adapter(tmp_path / "o.safetensors", architecture="flux").modules
    whole = np.concatenate([dense(m) for m in modules.values()])
    fused = np.concatenate([dense(after[p]) for p in PARTS])
    assert gap(fused, truncated(whole, 5)) < 1e-5


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_"
FITTING = (  # one of them can be written in any layout
    ("flux", "transformer", [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]),
    ("flux", "transformer", [f"transformer_blocks.0.attn.{x}" for x in ("to_out.0", "to_add_out")]),
    ("llm", "model", ["model.layers.0.self_attn.q_proj"]),
    ("sdxl", "unet", [ATTENTION + x for x in "qkv"]),
    ("sdxl", "controlnet", [ATTENTION + x for x in "qkv"]),
)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_every_layout(layout: str, tmp_path: Path) -> None:
    """Resized into the layout, read back, and once more within the layout."""
    suffix = "" if layout == "peft" else ".safetensors"
    source, family = tmp_path / f"in{suffix}", ""
    for family, component, names in FITTING:
        maker = Maker(6)
        modules: dict[str, WeightAdapter] = {
            f"{component}:{n}": LoRA(maker.draw(H, 6), maker.draw(6, H), scale=0.5) for n in names
        }
        try:
            save_adapter(Adapter(modules, family), source, layout=layout)
            break
        except UnsupportedError:
            continue
    assert source.exists()
    report = resize_rank(source, tmp_path / f"o{suffix}", rank=2, to=layout, architecture=family)
    again = load_adapter(tmp_path / f"o{suffix}", architecture=family).modules
    before = load_adapter(source, architecture=family).modules
    assert set(again) == set(before)
    total = sum(float((dense(again[p]) - dense(before[p])).__pow__(2).sum()) for p in before)
    norm = sum(float((dense(before[p]) ** 2).sum()) for p in before)
    assert total / norm == pytest.approx(1 - report.energy, abs=1e-5)


def test_a_peft_folder_gets_exact_patterns(tmp_path: Path) -> None:
    maker = Maker(6)
    modules: dict[str, WeightAdapter] = {}
    for n, size in enumerate((1e-2, 1.0, 3.0)):
        down = maker.draw(8, H) * torch.logspace(0, -n, 8)[:, None]
        modules[f"model:model.layers.{n}.self_attn.q_proj"] = LoRA(
            size * maker.draw(H, 8), down, scale=2.0
        )
    save_adapter(Adapter(modules, "llm"), tmp_path / "in", layout="peft")
    report = resize_rank(tmp_path / "in", tmp_path / "out", rank="energy:0.9")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {str(r["module"]): int(r["rank"] or 0) for r in report.modules}
    assert len(set(ranks.values())) > 1
    found = load_adapter(tmp_path / "out").modules
    assert {p: m.rank for p, m in found.items()} == ranks
    assert {float(m.scale) for m in found.values()} == {2.0}
    stated = [config["r"], *config["rank_pattern"].values()]
    assert sorted(set(stated)) == sorted(set(ranks.values()))
    with pytest.raises(UsageError, match="exists"):
        resize_rank(tmp_path / "in", tmp_path / "out", rank=2)
    with pytest.raises(UsageError, match="is the input"):
        resize_rank(tmp_path / "in", tmp_path / "in", rank=2, overwrite=True)


# DoRA -------------------------------------------------------------------------------------------


def merged(w: np.ndarray, delta: np.ndarray, m: np.ndarray, axis: int) -> np.ndarray:
    direction = w + delta
    return m * direction / np.linalg.norm(direction, axis=axis, keepdims=True)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("with_base", [False, True])
def test_dora_keeps_its_magnitude(axis: str, with_base: bool, tmp_path: Path) -> None:
    maker = Maker(7)
    tensors = maker.dora(PROJ, H, H, axis, 6) | maker.dora(QKV, 3 * H, H, axis, 6)
    source = write(tmp_path / "in.safetensors", tensors)
    weights = {
        "double_blocks.0.img_attn.qkv.weight": 4 * maker.draw(3 * H, H),
        "double_blocks.0.img_attn.proj.weight": 4 * maker.draw(H, H),
        "double_blocks.0.img_attn.norm.query_norm.scale": maker.draw(16),
        "final_layer.adaLN_modulation.1.weight": maker.draw(2 * H, H),
    }
    base = write(tmp_path / "base.safetensors", weights) if with_base else None
    out = tmp_path / "o.safetensors"
    report = resize_rank(source, out, rank=3, architecture="flux", base=base)
    found = read(out)
    assert (found[f"{PROJ}.dora_scale"] == tensors[f"{PROJ}.dora_scale"].double().numpy()).all()
    before = (
        tensors[f"{PROJ}.lora_up.weight"].double() @ tensors[f"{PROJ}.lora_down.weight"].double()
    )
    alpha = float(found.get(f"{PROJ}.alpha", np.array(3.0))) / 3
    after = alpha * found[f"{PROJ}.lora_up.weight"] @ found[f"{PROJ}.lora_down.weight"]
    assert gap(after, truncated(before.numpy(), 3)) < 1e-5
    rows = {str(r["module"]): r for r in report.modules}
    codes = [f.code for f in report.findings]
    assert ("dora-error-unknown" in codes) is not with_base
    if with_base:
        w = weights["double_blocks.0.img_attn.proj.weight"].double().numpy()
        m = tensors[f"{PROJ}.dora_scale"].double().numpy()
        side = 1 if axis == "out" else 0
        exact, near = merged(w, before.numpy(), m, side), merged(w, after, m, side)
        wanted = np.linalg.norm(near - exact) / np.linalg.norm(exact - w)
        assert rows[f"{BLOCK}.to_out.0"]["merged_error"] == pytest.approx(wanted, rel=1e-4)
        assert np.allclose(np.linalg.norm(near, axis=side), np.abs(m).reshape(-1))


# what is carried ----------------------------------------------------------------------------------


def test_full_differences_are_carried_unless_asked(tmp_path: Path) -> None:
    maker = Maker(5)
    modules: dict[str, WeightAdapter] = {
        f"{BLOCK}.to_q": LoRA(maker.draw(H, 6), maker.draw(6, H)),
        f"{BLOCK}.to_k": Full(maker.draw(H, H)),
        f"{BLOCK}.norm_q": Full(maker.draw(16)),
    }
    source, out = tmp_path / "in.safetensors", tmp_path / "o.safetensors"
    save_adapter(Adapter(modules, "flux"), source, layout="lycoris")
    report = resize_rank(source, out, rank=3, architecture="flux")
    after = load_adapter(out, architecture="flux").modules
    assert gap(dense(after[f"{BLOCK}.to_k"]), dense(modules[f"{BLOCK}.to_k"])) == 0
    assert after[f"{BLOCK}.to_q"].rank == 3
    assert [f.code for f in report.findings].count("carried") == 2
    resize_rank(source, out, rank=3, architecture="flux", algorithm="lora", overwrite=True)
    after = load_adapter(out, architecture="flux").modules
    wanted = truncated(dense(modules[f"{BLOCK}.to_k"]), 3)
    assert gap(dense(after[f"{BLOCK}.to_k"]), wanted) < 1e-5
    assert gap(dense(after[f"{BLOCK}.norm_q"]), dense(modules[f"{BLOCK}.norm_q"])) == 0


def test_nothing_to_resize(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_adapter(
        Adapter({f"{BLOCK}.to_k": Full(Maker(1).draw(H, H))}, "flux"), source, layout="lycoris"
    )
    with pytest.raises(UsageError, match="no module has a rank to change"):
        resize_rank(source, tmp_path / "o.safetensors", rank=3, architecture="flux")
