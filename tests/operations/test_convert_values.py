"""Changes that look at the base weight: new values written as differences, DoRA baked in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.codec import load_adapter
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.operations.convert import convert
from tests.codec.build import gap, read, write
from tests.codec.parts import Maker

H = 48
DOUBLE = "double_blocks.0.img_attn."
BLOCK = "transformer:transformer_blocks.0.attn"
PARTS = [f"{BLOCK}.{n}" for n in ("to_q", "to_k", "to_v")]
M = Maker(31)
BASE = {
    f"{DOUBLE}qkv.weight": M.draw(3 * H, H),
    f"{DOUBLE}qkv.bias": M.draw(3 * H),
    f"{DOUBLE}proj.weight": M.draw(H, H),
    f"{DOUBLE}norm.query_norm.scale": M.draw(16),
    "final_layer.adaLN_modulation.1.weight": M.draw(2 * H, H),
}
COMFY = "diffusion_model."
VALUES = {
    f"{COMFY}{DOUBLE}qkv.set_weight": M.draw(3 * H, H),
    f"{COMFY}{DOUBLE}norm.query_norm.scale.set_weight": M.draw(16),
    **{k.replace("lora_unet_", COMFY): t for k, t in M.lora(f"{COMFY}{DOUBLE}proj", H, H).items()},
    f"{COMFY}{DOUBLE}qkv.bias.set_weight": M.draw(3 * H),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", BASE)


@pytest.fixture
def values(tmp_path: Path) -> Path:
    return write(tmp_path / "values.safetensors", VALUES)


def test_new_values_become_differences_where_a_layout_holds_only_these(
    base: Path, values: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(UnsupportedError, match=r"no keys for set.*--base CHECKPOINT writes it as"):
        convert(values, out, to="kohya", architecture="flux")
    report = convert(values, out, to="kohya", architecture="flux", base=base)
    noted = [f for f in report.findings if f.code == "values-as-differences"]
    assert len(noted) == 1
    assert "4 new values" in noted[0].message
    found = read(out)
    name = "lora_unet_double_blocks_0_img_attn_"
    wanted = VALUES[f"{COMFY}{DOUBLE}qkv.set_weight"] - BASE[f"{DOUBLE}qkv.weight"]
    assert gap(found[f"{name}qkv.diff"], wanted.double().numpy()) < 1e-7
    bias = VALUES[f"{COMFY}{DOUBLE}qkv.bias.set_weight"] - BASE[f"{DOUBLE}qkv.bias"]
    assert gap(found[f"{name}qkv.diff_b"], bias.double().numpy()) < 1e-7
    norm = VALUES[f"{COMFY}{DOUBLE}norm.query_norm.scale.set_weight"]
    norm = norm - BASE[f"{DOUBLE}norm.query_norm.scale"]
    assert gap(found[f"{name}norm_query_norm.w_norm"], norm.double().numpy()) < 1e-7


def test_merged_weights_are_the_values(base: Path, values: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    convert(values, out, to="kohya-hf", architecture="flux", base=base)
    adapter = load_adapter(out, architecture="flux")
    rows = [slice(n * H, (n + 1) * H) for n in range(3)]
    for path, part in zip(PARTS, rows, strict=True):
        weight, bias = adapter.modules[path].merged(
            BASE[f"{DOUBLE}qkv.weight"][part], BASE[f"{DOUBLE}qkv.bias"][part]
        )
        wanted = VALUES[f"{COMFY}{DOUBLE}qkv.set_weight"][part]
        assert gap(weight.double().numpy(), wanted.double().numpy()) < 1e-6
        assert bias is not None
        wanted = VALUES[f"{COMFY}{DOUBLE}qkv.bias.set_weight"][part]
        assert gap(bias.double().numpy(), wanted.double().numpy()) < 1e-6


def test_layouts_that_hold_values_keep_them(base: Path, values: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    report = convert(values, out, to="comfy", architecture="flux", base=base)
    assert "values-as-differences" not in [f.code for f in report.findings]
    found = read(out)
    assert all(np.array_equal(found[k], t.double().numpy()) for k, t in VALUES.items())


def test_a_value_of_another_shape_has_no_difference(base: Path, tmp_path: Path) -> None:
    tensors = {f"{COMFY}{DOUBLE}proj.set_weight": M.draw(H, 2 * H)}
    source = write(tmp_path / "in.safetensors", tensors)
    with pytest.raises(UnsupportedError, match=r"shape \[48, 96\] and the base \[48, 48\]"):
        convert(source, tmp_path / "o.safetensors", to="kohya", architecture="flux", base=base)


def test_dry_run_of_differences(base: Path, values: Path, tmp_path: Path) -> None:
    plan = convert(
        *(values, tmp_path / "o"), to="kohya", architecture="flux", base=base, dry_run=True
    )
    rows = {str(r["key"]): r["shape"] for r in plan.tables["plan"]}
    assert rows["lora_unet_double_blocks_0_img_attn_qkv.diff"] == "144x48"


# DoRA ------------------------------------------------------------------------------------------

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
FINAL = "lora_unet_final_layer_adaLN_modulation_1"


def baked(name: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> np.ndarray:
    """m (W + s BA) / ||W + s BA|| - W in fp64, norm over everything but the magnitude's axis."""
    w = weight.double().numpy()
    up, down, m = (
        tensors[f"{name}.{s}"].double().numpy()
        for s in ("lora_up.weight", "lora_down.weight", "dora_scale")
    )
    direction = w + up @ down
    norm = np.linalg.norm(direction, axis=1 if m.shape[1] == 1 else 0, keepdims=True)
    return m * direction / norm - w


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "bfl"])
@pytest.mark.parametrize("algorithm", ["lora", "full"])
def test_dora_is_baked_with_the_base(
    algorithm: str, layout: str, axis: str, base: Path, tmp_path: Path
) -> None:
    tensors = Maker(5).dora(QKV, 3 * H, H, axis)
    source, out = write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    if algorithm == "full" and layout != "kohya":
        with pytest.raises(UnsupportedError, match="no keys for full"):
            convert(source, out, to=layout, architecture="flux", base=base, algorithm="full")
        return
    with pytest.raises(UnsupportedError, match=r"depends on the base weight.*Pass --base"):
        convert(source, out, to=layout, architecture="flux", algorithm=algorithm)
    rank = "40" if algorithm == "lora" else None
    report = convert(
        *(source, out), to=layout, architecture="flux", base=base, algorithm=algorithm, rank=rank
    )
    adapter = load_adapter(out, architecture="flux")
    found = torch.cat([adapter.modules[p].delta() for p in PARTS]).double().numpy()
    wanted = baked(QKV, tensors, BASE[f"{DOUBLE}qkv.weight"])
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    loss = float(report.summary["largest loss of the fit"] or 0)
    assert error < 1e-6 if algorithm == "full" else error <= loss * 1.5 + 1e-6
    assert all(row["loss"] is not None for row in report.modules)


def test_per_input_dora_on_swapped_halves(base: Path, tmp_path: Path) -> None:
    tensors = Maker(5).dora(FINAL, 2 * H, H, "in")
    source, out = write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    convert(source, out, to="diffusers", architecture="flux", base=base, algorithm="lora")
    module = load_adapter(out, architecture="flux").modules["transformer:norm_out.linear"]
    wanted = baked(FINAL, tensors, BASE["final_layer.adaLN_modulation.1.weight"])
    swapped = np.concatenate([wanted[H:], wanted[:H]])
    assert gap(module.delta().double().numpy(), swapped) < 1e-5


def test_a_base_without_the_module_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", Maker(5).dora(QKV, 3 * H, H, "in"))
    wrong = {"double_blocks.1.img_attn.qkv.weight": M.draw(3 * H, H)}
    other = write(tmp_path / "b.safetensors", wrong)
    with pytest.raises(UsageError, match=r"has no weight for transformer:.*to_q.*closest"):
        convert(
            *(source, tmp_path / "o.safetensors"),
            to="diffusers",
            architecture="flux",
            base=other,
            algorithm="lora",
        )
