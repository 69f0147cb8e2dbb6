"""Our files through diffusers' `load_lora_weights`, measured component by component."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from fixtures import bases
from peftsurgery import save_adapter
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import WeightAdapter
from tests.interop import models

WITHIN = 1e-4
Parts = dict[str, dict[str, WeightAdapter]]


class Loading(Protocol):
    """What every diffusers pipeline with a LoRA loader has."""

    def load_lora_weights(self, folder: str, *, weight_name: str) -> None: ...


@dataclass(frozen=True)
class Family:
    """A tiny pipeline, its architecture, and a selection of modules with every kind of name."""

    architecture: str
    base: str
    modules: Mapping[str, Sequence[str]]  # component -> patterns on home names


TEXT = ("*.self_attn.*", "*.fc1", "*.fc2")
SD = Family(
    "sd1",
    "tiny_sd_pipeline",
    {
        "unet": (
            "conv_in",
            "conv_out",
            "time_embedding.linear_*",
            "down_blocks.0.resnets.1.*",
            "down_blocks.1.resnets.0.*",
            "down_blocks.1.attentions.0.*",
            "down_blocks.2.downsamplers.0.conv",
            "mid_block.resnets.1.conv1",
            "up_blocks.0.upsamplers.0.conv",
            "up_blocks.2.attentions.1.transformer_blocks.0.attn2.*",
        ),
        "text_encoder": TEXT,
    },
)
SDXL = Family(
    "sdxl",
    "tiny_sdxl_pipeline",
    {
        "unet": (
            *SD.modules["unet"][:5],
            "add_embedding.linear_*",
            "down_blocks.1.attentions.1.proj_*",
            "down_blocks.2.attentions.0.transformer_blocks.9.*",
            "down_blocks.1.downsamplers.0.conv",
            "mid_block.resnets.0.*",
            "mid_block.attentions.0.transformer_blocks.3.attn1.*",
            "up_blocks.0.upsamplers.0.conv",
            "up_blocks.1.attentions.2.transformer_blocks.1.ff.*",
            "up_blocks.1.upsamplers.0.conv",
            "up_blocks.2.resnets.2.conv_shortcut",
        ),
        "text_encoder": TEXT,
        "text_encoder_2": (*TEXT, "text_projection"),
    },
)
FLUX = Family("flux", "tiny_flux_pipeline", {"transformer": ("*",), "text_encoder": TEXT})
FAMILIES = {family.architecture: family for family in (SD, SDXL, FLUX)}


def random_parts(
    family: Family,
    built: Mapping[str, nn.Module],
    random: torch.Generator,
    *,
    alphas: Sequence[float] = (4, 1, 8),
    ranks: Sequence[int] = (4, 2, 3),
    only: Sequence[str] = ("*",),
    without: Sequence[str] = (),
) -> Parts:
    """Fresh LoRAs on the family's selection as far as `only` and `without` (patterns on
    `component:path`) allow."""

    def wanted(full: str) -> bool:
        return any(fnmatch.fnmatchcase(full, p) for p in only) and not any(
            fnmatch.fnmatchcase(full, p) for p in without
        )

    parts: Parts = {}
    for component, patterns in family.modules.items():
        found = {
            path: layer
            for path, layer in models.layers(built[component], *patterns).items()
            if not isinstance(layer, nn.Embedding) and wanted(f"{component}:{path}")
        }
        if found:
            parts[component] = models.random_loras(found, random, ranks=ranks, alphas=alphas)
    return parts


def loaded(family: Family, file: Path) -> DiffusionPipeline:
    """A fresh pipeline with the file loaded by diffusers."""
    pipeline = bases.BUILDERS[family.base]()
    loading: Loading = pipeline
    loading.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipeline


def errors(
    family: Family,
    pipeline: DiffusionPipeline,
    parts: Mapping[str, models.Modules],
    built: Mapping[str, nn.Module],
    plain: Callable[[str, str], Tensor],
) -> dict[str, float]:
    """Component -> distance of the pipeline's output from that of our merged weights."""
    return {
        component: models.distance(
            models.run(getattr(pipeline, component)),
            models.run_merged(built[component], modules),
            plain(family.base, component),
        )
        for component, modules in parts.items()
    }


def written(adapter: Adapter, layout: str, folder: Path, *, fold: bool = False) -> Path:
    """The adapter as a file of that layout."""
    file = folder / f"{layout}.safetensors"
    save_adapter(adapter, file, layout=layout, fold_alpha=fold)
    return file
