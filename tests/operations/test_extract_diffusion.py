"""extract on diffusion checkpoints: vocabularies, fused projections, convolutions, layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from peftsurgery.errors import UnsupportedError
from tests.operations.merging import (
    flux_single,
    saved,
    sdxl_from_single,
    sdxl_single,
    state,
)
from tests.operations.tuning import Change, everywhere, low_rank, tuned_copy

torch.set_num_threads(1)


def gap(merged: Path, tuned: Path) -> float:
    """Largest relative distance of two checkpoints of the same names."""
    after, wanted = state(merged), state(tuned)
    assert after.keys() == wanted.keys()
    return max(
        float((after[n] - t).double().norm() / t.double().norm().clamp_min(1e-9))
        for n, t in wanted.items()
        if t.is_floating_point()
    )


def within(change: Change, *parts: str) -> Change:
    """The change of the tensors whose names hold one of `parts`, and of no other."""
    return lambda name, weight: change(name, weight) if any(p in name for p in parts) else None


@pytest.mark.parametrize("layout", ["kohya-ldm", "diffusers", "peft"])
def test_sdxl_in_two_vocabularies(tmp_path: Path, layout: str) -> None:
    """TUNED a diffusers folder, BASE the release's single file: fused, transposed and renamed."""
    change, least = low_rank(1), 700
    if layout != "kohya-ldm":  # one block of each kind, and the text encoders whole
        parts = "down_blocks.1.", "mid_block.", "conv_", "embed", "text_model", "text_projection"
        change, least = within(change, *parts), 150
    tuned = tuned_copy(saved("tiny_sdxl_pipeline"), tmp_path / "tuned", change)
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    report = ps.extract(
        tuned, sdxl_single(), out, rank=2, to=layout, exclude=["*embedding", "layers.1.*"]
    )
    assert report.loss < 1e-6
    assert len(report.modules) > least
    ps.merge(saved("tiny_sdxl_pipeline"), [(out, 1.0)], tmp_path / "merged")
    after, wanted = state(tmp_path / "merged"), state(tuned)
    before = state(saved("tiny_sdxl_pipeline"))
    for name, tensor in wanted.items():
        left_out = "embedding" in name or ".layers.1." in name
        expected = before[name] if left_out and "unet" not in name else tensor
        if "embedding" not in name:
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["lora", "full"])
@pytest.mark.parametrize("builder", ["tiny_sd_pipeline", "tiny_flux_pipeline"])
def test_norms_and_biases_in_comfy_and_kohya(tmp_path: Path, builder: str, algorithm: str) -> None:
    base = saved(builder)
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(2))
    rank = 10_000 if algorithm == "lora" else None
    out = tmp_path / "out.safetensors"
    report = ps.extract(tuned, base, out, rank=rank, algorithm=algorithm, to="comfy")
    assert report.loss < 1e-6
    ps.merge(base, [(out, 1.0)], tmp_path / "merged")
    assert gap(tmp_path / "merged", tuned) < 1e-6


def test_convolutions_stay_convolutions(tmp_path: Path) -> None:
    base = saved("tiny_sd_pipeline")
    tuned = tuned_copy(base, tmp_path / "tuned", low_rank(3))
    out = tmp_path / "out.safetensors"
    ps.extract(tuned, base, out, rank=2, to="kohya", only=["unet"])
    tensors = state(out)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    weight = state(base)["unet:down_blocks.0.resnets.0.conv1.weight"]
    assert tensors[f"{name}.lora_down.weight"].shape == (2, *weight.shape[1:])
    assert tensors[f"{name}.lora_up.weight"].shape == (weight.shape[0], 2, 1, 1)


def test_fused_projections_are_projected_together(tmp_path: Path) -> None:
    """`--rank 2` of a layout with fused q, k and v is rank 2 of the fused weight."""
    base = saved("tiny_flux_pipeline")
    change = everywhere(4)
    tuned = tuned_copy(base, tmp_path / "tuned", lambda n, w: change(n, w) if w.ndim > 1 else None)
    out = tmp_path / "out.safetensors"
    report = ps.extract(tuned, flux_single(), out, rank=2, to="kohya", only=["transformer"])
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = state(out)
    assert tensors[f"{key}.lora_down.weight"].shape[0] == 2
    before, after = state(base), state(tuned)
    names = [f"transformer:transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    delta = torch.cat([after[n].double() - before[n].double() for n in names])
    values = torch.linalg.svdvals(delta)
    found = tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()
    error = float((delta - found).norm() / values[2:].norm())
    assert error == pytest.approx(1, abs=1e-3)
    rows = {str(row["module"]): row for row in report.modules}
    part = rows["transformer:transformer_blocks.0.attn.to_k"]
    height = delta.shape[0] // 3
    gone = (delta - found)[height : 2 * height].norm() / delta[height : 2 * height].norm()
    assert part["loss"] == pytest.approx(float(gone), rel=1e-4)


def test_lokr_on_fused_projections_merges_back(tmp_path: Path) -> None:
    base = saved("tiny_flux_pipeline")
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(5))
    out = tmp_path / "out.safetensors"
    report = ps.extract(
        tuned, base, out, algorithm="lokr", to="comfy", only=["transformer"], exclude=["norm_*"]
    )
    ps.merge(base, [(out, 1.0)], tmp_path / "merged")
    before, after, wanted = state(base), state(tmp_path / "merged"), state(tuned)
    inside = [n for n in before if n.startswith("transformer:") and ".norm_" not in n]
    inside = [n for n in inside if not n.split(":")[1].startswith("norm_")]
    gone = sum(float((after[n] - wanted[n]).double().square().sum()) for n in inside)
    whole = sum(float((before[n] - wanted[n]).double().square().sum()) for n in inside)
    assert report.loss == pytest.approx((gone / whole) ** 0.5, rel=1e-3)


def test_what_a_layout_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    base = saved("tiny_sd_pipeline")
    tuned = tuned_copy(base, tmp_path / "tuned", everywhere(6))
    with pytest.raises(UnsupportedError, match="cannot be written as onetrainer-comfy") as caught:
        ps.extract(tuned, base, tmp_path / "a.safetensors", rank=2, to="onetrainer-comfy")
    assert "--exclude PATTERN" in str(caught.value)
    assert "--drop" not in str(caught.value)
    assert not (tmp_path / "a.safetensors").exists()


def test_single_files_and_their_own_vae(tmp_path: Path) -> None:
    parts = "input_blocks.0.", "input_blocks.4.", "input_blocks.6.", "middle_block.", "embed"
    change = within(low_rank(7), *parts, "output_blocks.8.", "conditioner")
    tuned = tuned_copy(sdxl_single(), tmp_path / "tuned.safetensors", change)
    out = tmp_path / "out.safetensors"
    report = ps.extract(
        tuned, sdxl_single(), out, rank="energy:0.999", to="kohya-ldm", only=["unet"]
    )
    assert len(report.modules) > 100
    assert all(row["rank"] == 2 for row in report.modules if row["algorithm"] == "lora")
    ps.merge(sdxl_single(), [(out, 1.0)], tmp_path / "merged.safetensors")
    after, wanted = sdxl_from_single(tmp_path / "merged.safetensors"), sdxl_from_single(tuned)
    for name, tensor in wanted.items():
        if name.startswith("unet:"):
            torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-5)
