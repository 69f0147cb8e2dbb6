"""The tables against the converters of diffusers, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.utils import state_dict_utils

from peftsurgery import architectures
from peftsurgery.architectures import Component

from .listings import CASES, Case, shapes

Tensors = dict[str, torch.Tensor]
SDXL = {"layers_per_block": 2, "addition_embed_type": "text_time"}


def unet(tensors: Tensors, **config: object) -> Tensors:
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    return convert_ldm_unet_checkpoint(prefixed, config)


def clip(tensors: Tensors) -> Tensors:
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=1280))
    return convert_open_clip_checkpoint(model, tensors, prefix="")


CONVERTERS: dict[tuple[str, str, str], Callable[[Tensors], Tensors]] = {
    ("sd1", "unet", "ldm"): lambda tensors: unet(tensors, layers_per_block=2),
    ("sdxl", "unet", "ldm"): lambda tensors: unet(tensors, **SDXL),
    ("sdxl", "text_encoder_2", "openclip"): clip,
    ("flux", "transformer", "bfl"): convert_flux_transformer_checkpoint_to_diffusers,
}


def home_tensors(table: Component, column: str, tensors: Tensors) -> Tensors:
    """Base tensors of a vocabulary, brought home by the sites: operator, then row ranges."""
    found: Tensors = {}
    for name, value in tensors.items():
        site = table.tensor(column, name)
        assert site is not None, name
        if site.operator == "swap_halves":
            value = torch.cat(value.chunk(2)[::-1])
        elif site.operator == "transpose":
            value = value.T
        for part, (start, stop) in zip(site.parts, site.row_ranges(len(value)), strict=True):
            found[part] = value[start:stop]
    return found


@pytest.mark.parametrize(
    "case", [c for c in CASES if (c.architecture, c.component, c.column) in CONVERTERS], ids=str
)
def test_checkpoints_agree_with_diffusers(case: Case) -> None:
    tensors: Tensors = {}
    for name, shape in case.shapes().items():
        keep = 1280 if name == "text_projection" else 2
        tensors[name] = torch.rand(shape if len(shape) < 2 else (shape[0], keep))
    ours = home_tensors(case.table, case.column, tensors)
    theirs = CONVERTERS[case.architecture, case.component, case.column](dict(tensors))
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.parametrize(("architecture", "listing"), [("sd1", "sd15"), ("sdxl", "sdxl")])
def test_controlnet_names_agree_with_diffusers(architecture: str, listing: str) -> None:
    table = architectures.get(architecture).components["controlnet"]
    home = list(shapes(f"base__diffusers_{listing}_controlnet"))
    marks: Tensors = {}
    for i, name in enumerate(home):
        site = table.tensor_of("ldm", name)
        assert site is not None
        assert table.tensor("ldm", site.name) == site
        marks[site.name] = torch.tensor(i)
    assert len(marks) == len(home)
    theirs = state_dict_utils.convert_sai_sd_control_lora_state_dict_to_peft(marks)
    assert {home[int(mark)]: name for name, mark in theirs.items() if mark is not None} == {
        name: name for name in home
    }


def test_flux_adapter_rows_agree_with_diffusers() -> None:
    """Order, proportions and swapped halves on the rows of B of a published control adapter.

    diffusers swaps the halves of A of `adaLN_modulation` too, which is wrong; only B is compared.
    """
    table = architectures.get("flux").components["transformer"]
    adapter: Tensors = {}
    for name, shape in shapes("published__flux_control_lora_format").items():
        small = (2, 4) if "lora_A" in name else (shape[0], 2) if len(shape) == 2 else shape
        adapter[name] = torch.rand(small)
    theirs = lora_conversion_utils._convert_bfl_flux_control_lora_to_diffusers(dict(adapter))
    checked = 0
    for parameter in "weight", "bias":
        suffix = f".lora_B.{parameter}"
        weights = {
            name.removesuffix(suffix) + f".{parameter}": value
            for name, value in adapter.items()
            if name.endswith(suffix)
        }
        for name, value in home_tensors(table, "bfl", weights).items():
            module = name.removesuffix(f".{parameter}")
            assert torch.equal(theirs[f"transformer.{module}{suffix}"], value)
            checked += 1
    assert checked == 2 * (19 * 14 + 38 * 6 + 10)
