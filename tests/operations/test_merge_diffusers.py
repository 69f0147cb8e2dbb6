"""Equality with diffusers: load_lora_weights + fuse_lora on tiny pipelines, and the outputs of the
merged folders.
"""

# transformers, peft and diffusers are typed loosely
# pyright: reportPrivateImportUsage=false, reportCallIssue=false
from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import peftsurgery as ps
from tests.interop.models import inputs
from tests.operations.merging import GOLDEN, plain_clip, saved

# Of the Kohya file only the UNet is compared: diffusers 0.42 loses its text encoder keys with
# transformers 5.
CASES = [
    ("tiny_sd_pipeline", "diffusers_sd_lora", 1.0),
    ("tiny_sd_pipeline", "diffusers_sd_lora_as_kohya", 0.8),
    ("tiny_sd_pipeline", "diffusers_sd_dora", 1.0),
    ("tiny_sdxl_pipeline", "diffusers_sdxl_lora", 0.6),
    ("tiny_flux_pipeline", "diffusers_flux_lora", 1.0),
]


@cache
def plain_weights(builder: str) -> dict[str, torch.Tensor]:
    return weights(DiffusionPipeline.from_pretrained(saved(builder)))


def weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        part = getattr(pipeline, name, None)
        if part is not None:
            found |= {f"{name}:{plain_clip(n)}": t.clone() for n, t in part.state_dict().items()}
    return found


@pytest.mark.parametrize(("builder", "golden", "strength"), CASES)
def test_weights_of_fuse_lora(tmp_path: Path, builder: str, golden: str, strength: float) -> None:
    base, file = saved(builder), GOLDEN / f"{golden}.safetensors"
    ps.merge(base, [(file, strength)], tmp_path / "out", verify="full")
    fused = DiffusionPipeline.from_pretrained(base)
    fused.load_lora_weights(str(file))
    fused.fuse_lora(lora_scale=strength)
    fused.unload_lora_weights()
    expected, plain = weights(fused), plain_weights(builder)
    result = DiffusionPipeline.from_pretrained(tmp_path / "out")
    found = weights(result)
    assert found.keys() == expected.keys()
    changed = 0
    for name, tensor in found.items():
        if golden.endswith("as_kohya") and not name.startswith("unet:"):
            continue
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=2e-6)
        changed += not torch.equal(tensor, plain[name])
    assert changed > 2
    model = getattr(result, "unet", None) or result.transformer
    other = getattr(fused, "unet", None) or fused.transformer
    with torch.no_grad():
        mine, theirs = model(**inputs(model)).sample, other(**inputs(other)).sample
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
