"""Adapters that users published: each module name is found in its vocabulary."""

from __future__ import annotations

import re

import pytest

from peftsurgery import architectures
from peftsurgery.architectures import Site

from .listings import shapes

SUFFIX = re.compile(
    r"\.(lora_[AB]\.(weight|bias)|lora_(up|down)\.weight|alpha|(up|down)\.weight|lokr_w[12]|dora_scale)"
)


def module_names(listing: str, prefix: str) -> set[str]:
    names = shapes(listing)
    assert all(name.startswith(prefix) for name in names)
    assert all(SUFFIX.search(n) or n.endswith("_norm.scale") for n in names), listing
    found = {SUFFIX.sub("", n) for n in names if not n.endswith("_norm.scale")}
    return {name.removeprefix(prefix) for name in found}


@pytest.mark.parametrize(
    ("listing", "prefix", "column", "count"),
    [
        ("flux_lora_kohya_format", "lora_unet_", "bfl", 304),
        ("flux_lora_diffusers_format", "transformer.", "diffusers", 494),
        ("flux_lora_diffusers_base_model_format", "base_model.model.", "diffusers", 381),
        ("flux_lora_aitoolkit_format", "diffusion_model.", "bfl", 228),
        ("flux_control_lora_format", "", "bfl", 314),
        ("flux_lora_xlabs_format", "", "xlabs", 12),
    ],
)
def test_flux(listing: str, prefix: str, column: str, count: int) -> None:
    flux = architectures.get("flux")
    table = flux.components["transformer"]
    names = module_names(f"published__{listing}", prefix)
    look_up = table.site_flat if prefix.endswith("_") else table.site
    sites = {name: look_up(column, name) for name in names}
    assert [name for name, site in sites.items() if site is None] == []
    assert len(sites) == count
    paths = [path for site in sites.values() if site for path in site.parts]
    assert len(paths) == len(set(paths))
    assert not any(flux.misfit("transformer", path) for path in paths)


def test_flux_control_norms_are_parameters() -> None:
    table = architectures.get("flux").components["transformer"]
    scales = [n for n in shapes("published__flux_control_lora_format") if n.endswith(".scale")]
    assert len(scales) == 19 * 4 + 38 * 2
    for name in scales:
        site = table.tensor("bfl", name)
        assert site is not None
        assert site.parameter == "weight"
        assert table.site("bfl", name.removesuffix(".scale")) is not None


@pytest.mark.parametrize(
    ("listing", "prefix"),
    [
        ("published__anima_lora_kohya_format", "lora_unet_"),
        ("published__qwen_image_lora_kohya_format", "lora_unet_"),
    ],
)
def test_other_families_are_not_taken_for_flux(listing: str, prefix: str) -> None:
    flux = architectures.get("flux")
    table = flux.components["transformer"]
    for column in ("bfl", "diffusers"):
        sites = [table.site_flat(column, name) for name in module_names(listing, prefix)]
        assert None in sites, listing


def test_block_counts_and_pins_speak_against_a_family() -> None:
    flux, sdxl = architectures.get("flux"), architectures.get("sdxl")
    assert flux.misfit("transformer", "transformer_blocks.18.attn.to_q", 3072, 3072) is None
    assert "19 transformer_blocks" in str(flux.misfit("transformer", "transformer_blocks.19.ff"))
    assert "out 1536" in str(flux.misfit("transformer", "transformer_blocks.0.attn.to_q", 1536))
    block = "down_blocks.1.attentions.0.transformer_blocks"
    assert sdxl.misfit("unet", f"{block}.1.attn1.to_q") is None
    assert "2 down_blocks" in str(sdxl.misfit("unet", f"{block}.2.attn1.to_q"))
    assert "2048" in str(sdxl.misfit("unet", f"{block}.1.attn2.to_k", 640, 768))


def test_generic_takes_any_dotted_name() -> None:
    generic = architectures.get("generic")
    for name in module_names("published__qwen_image_lora_diffusers_format", ""):
        for component in generic.components.values():
            assert component.site(component.home, name) == Site(component.home, name, (name,))
            assert component.site_of(component.home, name) == component.site(component.home, name)
            assert component.site_flat(component.home, name.replace(".", "_")) is None
    table = generic.components["model"]
    assert table.site("hf", "a..b") is None
    assert table.site("hf", "") is None
    weight = table.tensor("hf", "x.1.weight")
    assert weight is not None
    assert (weight.parts, weight.parameter) == (("x.1.weight",), "weight")
    assert table.tensor_of("hf", "x.1.weight") == weight
