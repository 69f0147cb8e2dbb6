"""LyCORIS loads our files into its own modules; its forward pass is that of our merged weights.
(Its merge is no witness: it scales LoHa and LoKr twice.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lycoris import create_lycoris_from_weights
from torch import nn

from fixtures import bases, golden_lycoris
from peftsurgery import convert, load_adapter, save_adapter
from peftsurgery.algorithms import Full, LoHa, LoKr, WeightAdapter
from tests.interop import models

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden"
BASE, COMPONENT = "tiny_sd_pipeline", "unet"
WITHIN = 1e-5
RECIPES = {recipe.name: recipe for recipe in golden_lycoris._recipes()}
UNET_ONLY = [name for name, recipe in RECIPES.items() if not recipe.text]
# what create_lycoris_from_weights cannot rebuild from the tensors alone; see the last tests
BEYOND_ITS_GUESS = ("lycoris_dora_in", "lycoris_lokr_tucker")


def again(name: str, tmp_path: Path) -> Path:
    """The golden by way of ComfyUI's names, so that every key was taken apart and built again."""
    convert(
        GOLDEN / f"{name}.safetensors",
        tmp_path / "comfy.safetensors",
        to="comfy",
        architecture="sd1",
    )
    file = tmp_path / "lycoris.safetensors"
    convert(tmp_path / "comfy.safetensors", file, to="lycoris", architecture="sd1")
    return file


def attached(unet: nn.Module, file: Path, count: int) -> nn.Module:
    """The UNet with LyCORIS modules rebuilt from the file alone."""
    network, _ = create_lycoris_from_weights(1.0, str(file), unet)
    assert len(network.loras) == count
    network.eval()
    network.apply_to()
    return unet


@pytest.fixture
def fresh() -> Callable[[], nn.Module]:
    return lambda: models.base_parts(BASE)[COMPONENT]


@pytest.mark.parametrize("name", UNET_ONLY)
def test_load_weights_into_its_own_network(
    name: str, untouched, plain_output, tmp_path: Path
) -> None:
    modules = load_adapter(GOLDEN / f"{name}.safetensors", architecture="sd1").of(COMPONENT)
    pipeline = bases.tiny_sd_pipeline()
    network = golden_lycoris._network(RECIPES[name], pipeline, again(name, tmp_path))
    network.eval()
    expected = models.run_merged(untouched(BASE)[COMPONENT], modules)
    plain = plain_output(BASE, COMPONENT)
    assert models.distance(models.run(pipeline.unet), expected, plain) < WITHIN


@pytest.mark.parametrize("name", [n for n in UNET_ONLY if n not in BEYOND_ITS_GUESS])
def test_rebuild_from_the_file(name: str, fresh, untouched, plain_output, tmp_path: Path) -> None:
    modules = load_adapter(GOLDEN / f"{name}.safetensors", architecture="sd1").of(COMPONENT)
    unet = attached(fresh(), again(name, tmp_path), len(modules))
    expected = models.run_merged(untouched(BASE)[COMPONENT], modules)
    assert models.distance(models.run(unet), expected, plain_output(BASE, COMPONENT)) < WITHIN


@pytest.mark.parametrize("name", UNET_ONLY)
def test_read_what_it_writes(name: str, untouched, plain_output, tmp_path: Path) -> None:
    """Every tensor of its networks moved at random, saved by LyCORIS, read by us."""
    pipeline = bases.tiny_sd_pipeline()
    network = golden_lycoris._network(RECIPES[name], pipeline)
    random = models.generator(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    network.eval()
    file = tmp_path / "theirs.safetensors"
    network.save_weights(str(file), torch.float32, {})  # pyright: ignore[reportCallIssue]
    modules = load_adapter(file, architecture="sd1").of(COMPONENT)
    merged = models.run_merged(untouched(BASE)[COMPONENT], modules)
    plain = plain_output(BASE, COMPONENT)
    assert models.distance(merged, models.run(pipeline.unet), plain) < WITHIN


LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"  # 64 x 256
CONV = "down_blocks.1.resnets.0.conv1"


def _fresh_modules(unet: nn.Module, random: torch.Generator) -> dict[str, dict[str, WeightAdapter]]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    linear, conv = (models.weight_of(unet, path) for path in (LINEAR, CONV))
    (o, i), (co, ci, *k) = linear.shape, conv.shape
    loha = LoHa(normal(o, 3), normal(3, i), normal(o, 3) * 0.1, normal(3, i), scale=0.4)
    lokr = LoKr(w1=normal(8, 16), w2_a=normal(8, 2), w2_b=normal(2, 16) * 0.1, scale=1.5)
    whole = LoKr(w1=normal(8, 16) * 0.1, w2=normal(8, 16), scale=0.6)
    lora = models.lora_for(conv, 3, 0.7, random)
    dora = models.lora_for(linear, 3, 1.7, random).with_tensors(
        magnitude=normal(o).abs() + 0.5, magnitude_axis="out"
    )
    full = Full(diff=normal(co, ci, *k) * 0.05, bias=normal(co) * 0.1)
    return {
        "loha": {LINEAR: loha},
        "lokr": {LINEAR: lokr},
        "lokr_whole_with_a_scale": {LINEAR: whole},  # LyCORIS has no scale there: it must be folded
        "conv_and_dora": {CONV: lora, LINEAR: dora},
        "full_with_bias": {CONV: full},
        "mixed": {CONV: lora, LINEAR: lokr},
    }


KINDS = ("loha", "lokr", "lokr_whole_with_a_scale", "conv_and_dora", "full_with_bias", "mixed")


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_modules(kind: str, fresh, untouched, plain_output, random, tmp_path: Path) -> None:
    base = untouched(BASE)[COMPONENT]
    modules = _fresh_modules(base, random)[kind]
    file = tmp_path / "fresh.safetensors"
    save_adapter(models.adapter_of("sd1", {COMPONENT: modules}), file, layout="lycoris")
    unet = attached(fresh(), file, len(modules))
    expected = models.run_merged(base, modules)
    assert models.distance(models.run(unet), expected, plain_output(BASE, COMPONENT)) < WITHIN


def test_text_encoder_in_todays_names(untouched, plain_output, tmp_path: Path) -> None:
    """A LyCORIS file that wraps the text encoder, whose names have lost `text_model`: read, and
    written as Kohya's."""
    name, part = "lycoris_lora_text_encoder", "text_encoder"
    modules = load_adapter(GOLDEN / f"{name}.safetensors", architecture="sd1").of(part)
    pipeline = bases.tiny_sd_pipeline()
    golden_lycoris._network(RECIPES[name], pipeline, GOLDEN / f"{name}.safetensors").eval()
    expected = models.run_merged(untouched(BASE)[part], modules)
    plain = plain_output(BASE, part)
    assert models.distance(models.run(pipeline.text_encoder), expected, plain) < WITHIN
    file = tmp_path / "kohya.safetensors"
    convert(GOLDEN / f"{name}.safetensors", file, to="kohya", architecture="sd1")
    back = load_adapter(file, architecture="sd1").of(part)
    assert models.distance(models.run_merged(untouched(BASE)[part], back), expected, plain) < WITHIN


def test_kohya_network(untouched, plain_output, tmp_path: Path) -> None:
    """lycoris.kohya reads our Kohya file.

    Its own names for a text encoder have lost `text_model` with transformers 5.6, so that it finds
    no text encoder in any older file, nor in ours. Right: both spellings.
    """
    name = "lycoris_kohya_rslora"
    adapter = load_adapter(GOLDEN / f"{name}.safetensors", architecture="sd1")
    file = tmp_path / "kohya.safetensors"
    save_adapter(adapter, file, layout="kohya")
    pipeline = bases.tiny_sd_pipeline()
    network = golden_lycoris._network(RECIPES[name], pipeline, file)
    network.eval()
    expected = models.run_merged(untouched(BASE)[COMPONENT], adapter.of(COMPONENT))
    plain = plain_output(BASE, COMPONENT)
    assert models.distance(models.run(pipeline.unet), expected, plain) < WITHIN
    assert torch.equal(models.run(pipeline.text_encoder), plain_output(BASE, "text_encoder"))


# what LyCORIS 4.1.3 cannot rebuild from tensors alone ---------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        # it takes every dora_scale for per-output; right would be to look at its shape
        ("lycoris_dora_in", "broadcast shape"),
        # it takes w2_a [r, b] of a Tucker core for [b, r]; right would be the shape of t2
        ("lycoris_lokr_tucker", "has no attribute 'lokr_w2_a'"),
    ],
)
def test_what_it_refuses_to_rebuild(name: str, reason: str, fresh, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, AttributeError), match=reason):
        attached(fresh(), again(name, tmp_path), len(RECIPES[name].targets))
