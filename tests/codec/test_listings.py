"""Every published FLUX listing and full SD adapters, from their layout to every other and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.adapter import Adapter
from peftsurgery.codec import load_adapter
from peftsurgery.errors import UnsupportedError
from peftsurgery.layouts import LAYOUT_NAMES
from peftsurgery.operations.convert import convert
from tests.codec.build import (
    FULL_KOHYA,
    filled,
    full_kohya,
    gap,
    narrowed,
    probe,
    shapes_of,
    thinned,
    write,
)
from tests.codec.raw import products

ROUNDING = 4e-7
ONLY_SD = {"diffusers-old"}
ONLY_FLUX = {"bfl", "fal-kontext", "xlabs"}
WITHOUT_VALUES = {
    *("diffusers-dot", "kohya", "kohya-ldm", "kohya-hf", "lycoris", "ai-toolkit", "onetrainer"),
    *("onetrainer-kohya", "onetrainer-original", "onetrainer-comfy", "fal-kontext", "xlabs"),
}
CONTROLNETS = {"sai-control-lora"}

# listing -> (its own layout, layouts that cannot hold it)
FLUX = {
    "flux_control_lora": ("bfl", ONLY_SD | CONTROLNETS | WITHOUT_VALUES),
    "flux_lora_aitoolkit": ("ai-toolkit", ONLY_SD | CONTROLNETS | {"xlabs"}),
    "flux_lora_diffusers_base_model": ("peft", ONLY_SD | CONTROLNETS | {"xlabs"}),
    "flux_lora_diffusers": ("diffusers", ONLY_SD | CONTROLNETS | {"xlabs"}),
    "flux_lora_kohya": ("kohya", ONLY_SD | CONTROLNETS | {"xlabs"}),
    "flux_lora_xlabs": ("xlabs", ONLY_SD | CONTROLNETS),
}
SD_REFUSED = ONLY_FLUX | CONTROLNETS | {"diffusers-old", "lycoris", "onetrainer-original"}


def target(folder: Path, layout: str) -> Path:
    """Where a conversion to `layout` goes."""
    return folder / (f"to-{layout}" + ("" if layout == "peft" else ".safetensors"))


def assert_same(first: Adapter, second: Adapter) -> None:
    """ΔW of every module agrees on random inputs, and no module is missing or new."""
    missing = [p for p, m in first.modules.items() if p not in second.modules and not m.is_zero()]
    assert not missing
    assert set(second.modules) <= set(first.modules)
    generator = np.random.default_rng(7)
    for path, module in second.modules.items():
        vectors = generator.standard_normal((module.matrix_shape[1], 2))
        assert gap(probe(first.modules[path], vectors), probe(module, vectors)) < ROUNDING, path


def flux_file(folder: Path, name: str, *, real: bool = False, blocks: int | None = None) -> Path:
    """A listing filled with numbers: at the real sizes, or 64 times narrower; `blocks` of each
    kind.
    """
    shapes = thinned(shapes_of(f"published__{name}_format"), 2)
    if not real:
        shapes = narrowed(shapes, 64)
    if blocks is not None:
        shapes = {k: s for k, s in shapes.items() if _block(k) < blocks}
    dtype = torch.float16 if real else torch.float32
    return write(folder / f"{name}.safetensors", filled(shapes, seed=len(name), dtype=dtype))


def _block(key: str) -> int:
    words = key.replace(".", "_").split("_")
    at = next((i for i, w in enumerate(words) if w == "blocks"), None)
    return -1 if at is None else int(words[at + 1])


@pytest.mark.parametrize("name", FLUX)
def test_at_real_sizes_detection_needs_no_hint_and_the_way_back_is_exact(
    name: str, tmp_path: Path
) -> None:
    own, _ = FLUX[name]
    source = flux_file(tmp_path, name, real=True)
    other = "diffusers" if own not in ("diffusers", "peft") else "comfy"
    there, back = target(tmp_path, other), target(tmp_path, own)
    report = convert(source, there, to=other)
    assert report.summary["architecture"] == "flux"
    assert report.summary["from"] == own
    convert(there, back, to=own)
    before, after = products(source, sample=6), products(back, sample=6)
    assert before.keys() == after.keys()
    for module in before:
        assert gap(before[module], after[module]) < ROUNDING, module


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("name", FLUX)
def test_flux_listings_go_to_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    refused = FLUX[name][1]
    source, there = flux_file(tmp_path, name), target(tmp_path, layout)
    if layout in refused:
        with pytest.raises(UnsupportedError, match=rf"transformer:.*cannot be written as {layout}"):
            convert(source, there, to=layout, architecture="flux")
        assert not there.exists()
        return
    report = convert(source, there, to=layout, architecture="flux")
    assert report.ok
    assert report.largest_error < ROUNDING
    first = load_adapter(source, architecture="flux")
    assert len(report.modules) == len(first.modules)
    assert_same(first, load_adapter(there, architecture="flux"))


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("name", FLUX)
def test_there_and_back_gives_the_keys_and_products_of_the_file(
    name: str, layout: str, tmp_path: Path
) -> None:
    """Judged on the raw files alone: the same keys, the same up @ down * alpha / rank."""
    own, refused = FLUX[name]
    if layout in refused:
        assert layout not in own
        return
    source = flux_file(tmp_path, name, blocks=2)
    there, back = target(tmp_path, layout), target(tmp_path / "back", own)
    convert(source, there, to=layout, architecture="flux")
    convert(there, back, to=own, architecture="flux")
    before, after = products(source), products(back)
    assert before.keys() == after.keys()
    for module in before:
        assert gap(before[module], after[module]) < ROUNDING, module


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("style", FULL_KOHYA)
def test_full_kohya_adapters_go_to_every_layout(style: str, layout: str, tmp_path: Path) -> None:
    """Every linear and convolution of the UNet and of all text encoders, in both naming styles."""
    architecture = style.split()[0]
    source = write(tmp_path / "full.safetensors", filled(full_kohya(style), seed=3))
    there = target(tmp_path, layout)
    if layout in SD_REFUSED:
        with pytest.raises(UnsupportedError, match=f"cannot be written as {layout}"):
            convert(source, there, to=layout, architecture=architecture)
        return
    report = convert(source, there, to=layout, architecture=architecture)
    assert report.largest_error < ROUNDING
    first = load_adapter(source, architecture=architecture)
    assert len(report.modules) == len(full_kohya(style)) // 3
    assert_same(first, load_adapter(there, architecture=architecture))


@pytest.mark.parametrize("style", FULL_KOHYA)
def test_full_kohya_comes_back_at_real_sizes(style: str, tmp_path: Path) -> None:
    shapes = full_kohya(style, rank=1, divisor=1)
    source = write(tmp_path / "full.safetensors", filled(shapes, dtype=torch.float16))
    own = "kohya-ldm" if style.endswith("ldm") else "kohya-hf"
    there, back = target(tmp_path, "diffusers"), target(tmp_path, own)
    assert convert(source, there, to="diffusers").summary["architecture"] == style.split()[0]
    convert(there, back, to=own)
    before, after = products(source, sample=6), products(back, sample=6)
    assert before.keys() == after.keys()
    assert len(before) == len(shapes) // 3
    for module in before:
        assert gap(before[module], after[module]) < ROUNDING, module


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_one_component_at_a_time_goes_to_lycoris(component: str, tmp_path: Path) -> None:
    source = write(tmp_path / "full.safetensors", filled(full_kohya("sdxl hf", rank=1)))
    there = target(tmp_path, "lycoris")
    convert(source, there, to="lycoris", only=[component], architecture="sdxl")
    assert all(key.startswith("lycoris_") for key in products(there))
