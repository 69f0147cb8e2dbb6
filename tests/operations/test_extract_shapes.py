"""extract where a weight is stored otherwise, or has another shape: stacked experts, a widened
first convolution."""

# transformers is typed loosely
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.errors import UnsupportedError
from tests.operations.merging import saved, state
from tests.operations.test_merge_experts import built, gpt_oss, mixtral, qwen
from tests.operations.tuning import tuned_copy

torch.set_num_threads(1)


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_stacked_experts_come_back(tmp_path: Path, make: object, rng: torch.Generator) -> None:
    """Whichever way transformers stores them: a LoRA on every expert, merged to TUNED again."""
    model = built(make)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" not in name:
                continue
            up = torch.randn(*weight.shape[:-1], 2, generator=rng)
            down = torch.randn(*weight.shape[:-2], 2, weight.shape[-1], generator=rng)
            weight += 0.02 * up @ down
    model.save_pretrained(tmp_path / "tuned")
    report = ps.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4)
    assert report.loss < 1e-5
    assert all(row["rank"] == 4 for row in report.modules)
    ps.merge(tmp_path / "base", [(tmp_path / "out", 1.0)], tmp_path / "merged")
    before, after, wanted = (state(tmp_path / n) for n in ("base", "merged", "tuned"))
    changed = [name for name in wanted if not torch.equal(before[name], wanted[name])]
    assert changed
    for name, weight in wanted.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-5)


def test_stacks_stored_turned_come_back(tmp_path: Path, rng: torch.Generator) -> None:
    """GPT-OSS keeps its experts as (experts, in, out); biases of experts have no place."""
    model = built(gpt_oss)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" in name and weight.ndim == 3:
                up = torch.randn(*weight.shape[:-1], 2, generator=rng)
                down = torch.randn(*weight.shape[:-2], 2, weight.shape[-1], generator=rng)
                weight += 0.02 * up @ down
        model.save_pretrained(tmp_path / "tuned")
        for name, weight in model.named_parameters():
            if name.endswith("down_proj_bias"):
                weight += 1
    model.save_pretrained(tmp_path / "biased")
    report = ps.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4)
    assert report.loss < 1e-5
    ps.merge(tmp_path / "base", [(tmp_path / "out", 1.0)], tmp_path / "merged")
    after, wanted = state(tmp_path / "merged"), state(tmp_path / "tuned")
    for name, weight in wanted.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match=r"experts\.down_proj_bias: a parameter outside"):
        ps.extract(tmp_path / "biased", tmp_path / "base", tmp_path / "no", rank=4)


def test_a_widened_first_convolution_is_a_new_value_or_refused(tmp_path: Path) -> None:
    """As of inpainting models, of 9 channels where the base has 4."""
    base = saved("tiny_sd_pipeline")
    tuned = tuned_copy(base, tmp_path / "tuned", lambda *_: None)
    file = next((tuned / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    weight = tensors["conv_in.weight"]
    more = torch.randn(weight.shape[0], 5, *weight.shape[2:])
    tensors["conv_in.weight"] = torch.cat([weight, more], 1)
    save_file(tensors, file)
    out = tmp_path / "out.safetensors"
    report = ps.extract(tuned, base, out, rank=2, to="comfy", only=["unet"])
    (found,) = [f for f in report.findings if f.code == "new-shape"]
    assert "conv_in" in str(found.key)
    assert "[32, 9, 3, 3]" in found.message
    modules = ps.load_adapter(out, architecture="sd1").modules
    assert list(modules) == ["unet:conv_in"]
    new = modules["unet:conv_in"].tensors()["weight"]
    torch.testing.assert_close(new.float(), tensors["conv_in.weight"].float())
    for layout in ("kohya", "lycoris", "diffusers"):
        with pytest.raises(UnsupportedError, match="unet:conv_in: cannot be written as"):
            ps.extract(tuned, base, tmp_path / "no.safetensors", rank=2, to=layout, only=["unet"])
