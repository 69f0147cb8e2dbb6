"""diffusers' Stable Diffusion pipelines read our files: outputs as with our merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftsurgery import convert, load_adapter
from tests.interop import models
from tests.interop.pipelines import (
    FAMILIES,
    SD,
    SDXL,
    WITHIN,
    Family,
    errors,
    loaded,
    random_parts,
    written,
)

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden"
MIXED, UNIFORM = (4, 1, 8), (3,)
ATTENTION = ("*.attn?.to_*", "*.self_attn.*")


@pytest.mark.parametrize("fold", [False, True], ids=["alpha", "folded"])
@pytest.mark.parametrize(
    ("family", "layout", "alphas", "only", "without"),
    [
        (SD, "diffusers", MIXED, ("*",), ()),
        (SD, "diffusers-dot", MIXED, ("*",), ()),
        (SD, "diffusers-old", MIXED, ATTENTION, ()),
        (SD, "kohya", UNIFORM, ("*",), ()),
        (SD, "kohya-hf", UNIFORM, ("*",), ()),
        (SDXL, "diffusers", MIXED, ("*",), ()),
        (SDXL, "diffusers-dot", MIXED, ("*",), ()),
        (SDXL, "diffusers-old", MIXED, ATTENTION, ()),
        (SDXL, "kohya", UNIFORM, ("*",), ()),
        (SDXL, "kohya-ldm", UNIFORM, ("*",), ()),
        (SDXL, "kohya-hf", UNIFORM, ("*",), ("unet:add_embedding.*",)),  # see test_diffusers_quirks
    ],
    ids=lambda value: (
        getattr(value, "architecture", value) if isinstance(value, (str, Family)) else ""
    ),
)
def test_every_layout(
    family, layout, alphas, only, without, fold, untouched, plain_output, random, tmp_path
) -> None:
    built = untouched(family.base)
    if (
        fold
    ):  # Kohya files whose alphas differ only load right when folded (see test_diffusers_quirks)
        alphas = MIXED
    parts = random_parts(family, built, random, alphas=alphas, only=only, without=without)
    adapter = models.adapter_of(family.architecture, parts)
    pipeline = loaded(family, written(adapter, layout, tmp_path, fold=fold))
    found = errors(family, pipeline, parts, built, plain_output)
    assert set(found) == set(family.modules)
    assert all(error < WITHIN for error in found.values()), found


@pytest.mark.parametrize(
    ("name", "architecture", "layouts"),
    [
        ("diffusers_sd_lora", "sd1", ("diffusers",)),
        ("diffusers_sdxl_lora", "sdxl", ("diffusers", "diffusers-dot")),
        ("diffusers_sd_dora", "sd1", ("diffusers",)),
        ("diffusers_sd_lora_as_kohya", "sd1", ("diffusers",)),
        ("lycoris_lora", "sd1", ("diffusers", "diffusers-dot")),
        ("lycoris_kohya_rslora", "sd1", ("diffusers",)),
    ],
)
def test_trained_adapters_from_elsewhere(
    name, architecture, layouts, untouched, plain_output, tmp_path
) -> None:
    """Kohya and LyCORIS files too: their rank-stabilised and convolution scales arrive through the
    metadata."""
    family = FAMILIES[architecture]
    source = GOLDEN / f"{name}.safetensors"
    adapter = load_adapter(source, architecture=architecture)
    parts = {component: adapter.of(component) for component in adapter.components}
    for layout in layouts:
        file = tmp_path / f"{layout}.safetensors"
        convert(source, file, to=layout, architecture=architecture)
        found = errors(family, loaded(family, file), parts, untouched(family.base), plain_output)
        assert all(error < WITHIN for error in found.values()), (layout, found)


def test_metadata_says_what_the_tensors_cannot(untouched, random, tmp_path: Path) -> None:
    """Without alpha in the tensors the metadata must name every scale, and no `text_model` (see
    peft_config.tail)."""
    parts = random_parts(SD, untouched(SD.base), random)
    written(models.adapter_of("sd1", parts), "diffusers", tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "diffusers.safetensors", "pt") as file:
        packed = json.loads(file.metadata()["lora_adapter_metadata"])
        keys = list(file.keys())
    assert any(key.startswith("text_encoder.text_model.encoder.") for key in keys)
    assert "text_model" not in json.dumps(packed)
    assert {name.partition(".")[0] for name in packed} == {"unet", "text_encoder"}


def test_no_metadata_when_nothing_needs_it(untouched, random, tmp_path: Path) -> None:
    parts = random_parts(SD, untouched(SD.base), random)
    from safetensors import safe_open

    written(models.adapter_of("sd1", parts), "diffusers", tmp_path, fold=True)
    with safe_open(tmp_path / "diffusers.safetensors", "pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()
