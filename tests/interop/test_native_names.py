"""Our ComfyUI files through an independent reader, on native weights by independent formulas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftsurgery import architectures, convert, load_adapter
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import Full, LoHa, LoKr, Replace, WeightAdapter
from tests.interop import models, native_reader
from tests.interop.pipelines import FAMILIES, FLUX, SD, SDXL, Family, random_parts, written

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden"
PREFIX = {
    "transformer": "diffusion_model.",
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
COLUMN = {"transformer": "bfl", "unet": "ldm"}
WITHIN = 1e-6


def native(component: str, model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    if component == "transformer":
        return native_reader.flux_native(state, double=2, single=2)
    return (
        native_reader.unet_native(state)
        if component == "unet"
        else native_reader.clip_native(state)
    )


def by_the_tables(
    family: Family, component: str, model: nn.Module, values: Mapping[str, Tensor], name: str
) -> Tensor:
    """A native tensor put together from home weights as the architecture table says."""
    table = architectures.get(family.architecture).components[component]
    site = table.tensor(COLUMN.get(component, "hf"), name)
    assert site is not None
    parts = [values[models.here(model, part)] for part in site.parts]
    value = parts[0] if len(parts) == 1 else torch.cat(parts)
    if site.operator == "swap_halves":
        value = torch.cat(value.chunk(2)[::-1])
    return value


def check(family: Family, adapter: Adapter, file: Path, built: Mapping[str, nn.Module]) -> None:
    """Every changed native tensor agrees, and no other of our merged weights is changed."""
    tensors = load_file(file)
    assert all(key.startswith(tuple(PREFIX[c] for c in adapter.components)) for key in tensors)
    for component in adapter.components:
        model, modules = built[component], adapter.of(component)
        base = native(component, model)
        changed = native_reader.patched(base, tensors, PREFIX[component])
        assert changed
        values = {**model.state_dict(), **models.merged(model, modules)}
        for name, before in base.items():
            expected = by_the_tables(family, component, model, values, name)
            after = changed.get(name, before)
            assert after.shape == expected.shape, name
            error = torch.linalg.vector_norm(after - expected) / torch.linalg.vector_norm(expected)
            assert error < WITHIN, (name, float(error))


@pytest.mark.parametrize("layout", ["comfy", "onetrainer-comfy", "ai-toolkit"])
@pytest.mark.parametrize("family", [SD, SDXL, FLUX], ids=lambda family: family.architecture)
def test_loras(family: Family, layout: str, untouched, random, tmp_path: Path) -> None:
    """Unequal ranks and alphas everywhere, across the fused layers; ai-toolkit has no alpha, so it
    is folded."""
    built = untouched(family.base)
    parts = random_parts(family, built, random)
    adapter = models.adapter_of(family.architecture, parts)
    check(family, adapter, written(adapter, layout, tmp_path), built)


def test_partly_trained_fused_layers(untouched, random, tmp_path: Path) -> None:
    """Missing parts of qkv and linear1 stay as they are."""
    built = untouched(FLUX.base)
    only = ("*.attn.to_v", "*single*.proj_mlp", "*.attn.add_q_proj", "transformer:norm_out.linear")
    adapter = models.adapter_of("flux", random_parts(FLUX, built, random, only=only))
    check(FLUX, adapter, written(adapter, "comfy", tmp_path), built)


def test_other_algorithms_on_flux(untouched, random, tmp_path: Path) -> None:
    """DoRA through a fusion, products beside it, values, biases and the swapped halves."""
    model = untouched(FLUX.base)["transformer"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 0.3

    def dora(path: str) -> WeightAdapter:
        weight = models.weight_of(model, path)
        magnitude = normal(weight.shape[0]).abs() + 0.5
        return models.lora_for(weight, 2, 0.5, random).with_tensors(
            magnitude=magnitude, magnitude_axis="out"
        )

    block, single = "transformer_blocks.1", "single_transformer_blocks.0"
    o, i = models.weight_of(model, f"{block}.ff.net.2").shape
    modules: dict[str, WeightAdapter] = {
        **{path: dora(path) for path in (f"{block}.attn.{n}" for n in ("to_q", "to_k", "to_v"))},
        f"{block}.ff.net.2": LoHa(
            normal(o, 3), normal(3, i), normal(o, 3), normal(3, i), scale=2.0
        ),
        f"{single}.proj_out": LoKr(
            w1=normal(4, 8), w2_a=normal(8, 2), w2_b=normal(2, 20), scale=1.5
        ),
        f"{block}.attn.to_out.0": Full(diff=normal(32, 32), bias=normal(32)),
        "norm_out.linear": Full(diff=normal(64, 32), bias=normal(64)),
        f"{block}.attn.norm_q": Replace(weight=normal(16)),
        f"{single}.attn.norm_k": Replace(weight=normal(16)),
        f"{single}.attn.norm_q": Full(diff=normal(16)),
        "x_embedder": models.lora_for(models.weight_of(model, "x_embedder"), 2, 3.0, random),
    }
    adapter = models.adapter_of("flux", {"transformer": modules})
    check(FLUX, adapter, written(adapter, "comfy", tmp_path), untouched(FLUX.base))


def test_widened_embedder(untouched, random, tmp_path: Path) -> None:
    """FLUX control LoRAs: reshape_weight says that img_in is zero-padded first."""
    built = untouched(FLUX.base)
    wide = models.lora_for(torch.randn(32, 8, generator=random), 2, 1.0, random)
    modules: dict[str, WeightAdapter] = {"x_embedder": wide.with_tensors(padded_shape=(32, 8))}
    adapter = models.adapter_of("flux", {"transformer": modules})
    check(FLUX, adapter, written(adapter, "comfy", tmp_path), built)


@pytest.mark.parametrize(
    "name",
    [
        "lycoris_lora_tucker",
        "lycoris_loha",
        "lycoris_loha_tucker",
        "lycoris_lokr",
        "lycoris_lokr_full",
        "lycoris_lokr_tucker",
        "lycoris_dora_out",
        "lycoris_dora_in",
        "lycoris_full_norm",
        "lycoris_kohya_rslora",
        "diffusers_sd_lora",
        "diffusers_sdxl_lora",
        "diffusers_flux_lora",
    ],
)
def test_trained_adapters(name: str, untouched, tmp_path: Path) -> None:
    architecture = next((a for a in ("sdxl", "flux") if f"_{a}_" in name), "sd1")
    family, source = FAMILIES[architecture], GOLDEN / f"{name}.safetensors"
    file = tmp_path / "comfy.safetensors"
    convert(source, file, to="comfy", architecture=architecture)
    adapter = load_adapter(source, architecture=architecture)
    check(family, adapter, file, untouched(family.base))
