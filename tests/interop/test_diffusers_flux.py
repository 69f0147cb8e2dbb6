"""diffusers' FLUX pipeline reads our files: on the tiny transformer by outputs, at full width by
ΔW.

diffusers' converters have 3072 channels, 19 and 38 blocks written into them, so fused layers and
whole-file readers are checked on adapters of the published shapes, through `lora_state_dict` and
without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from peftsurgery import save_adapter
from peftsurgery.algorithms import LoRA, Replace, WeightAdapter, difference
from tests.interop import models
from tests.interop.pipelines import FLUX, WITHIN, errors, loaded, random_parts, written

BLOCKS = ("transformer:*transformer_blocks.*", "text_encoder:*")
FUSED_SINGLE = (
    "transformer:single_*.attn.*",
    "transformer:single_*.proj_mlp",
)  # 3072 is written into the reader
ATTENTION = (
    *(f"transformer:transformer_blocks.*.attn.{name}" for name in ("to_*", "add_*_proj")),
    "transformer:single_*.attn.*",
    "transformer:single_*.proj_out",
)
FLAT = {"only": BLOCKS, "without": FUSED_SINGLE}


@pytest.mark.parametrize("fold", [False, True], ids=["alpha", "folded"])
@pytest.mark.parametrize(
    ("layout", "choice"),
    [
        ("diffusers", {}),
        ("diffusers-dot", {}),
        ("kohya", FLAT),
        ("kohya-ldm", FLAT),
        ("comfy", FLAT),
        ("xlabs", {"only": ATTENTION}),
    ],
)
def test_tiny_pipeline(
    layout, choice, fold, untouched, plain_output, random, tmp_path: Path
) -> None:
    built = untouched(FLUX.base)
    parts = random_parts(FLUX, built, random, **choice)
    file = written(models.adapter_of("flux", parts), layout, tmp_path, fold=fold)
    found = errors(FLUX, loaded(FLUX, file), parts, built, plain_output)
    assert all(error < WITHIN for error in found.values()), found


# at full width ------------------------------------------------------------------------------------

Shapes = Callable[[int, int], dict[str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    """(double blocks, single blocks) -> parameter name -> shape of FLUX.1-dev with that many."""

    def get(double: int, single: int) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = FluxTransformer2DModel(
                num_layers=double, num_single_layers=single, guidance_embeds=True
            )
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    return get


def full_width(
    shapes: Mapping[str, tuple[int, ...]],
    random: torch.Generator,
    *,
    rank: int = 2,
    scale: float = 1.0,
) -> dict[str, WeightAdapter]:
    """A random LoRA on every linear layer of the published shapes."""
    result: dict[str, WeightAdapter] = {}
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2:
            up = torch.randn(shape[0], rank, generator=random)
            down = torch.randn(rank, shape[1], generator=random)
            result[name.removesuffix(".weight")] = LoRA(up=up, down=down, scale=scale)
    return result


def read_by_diffusers(file: Path) -> dict[str, Tensor]:
    """The file as diffusers renames it, before it looks at any model."""
    state = FluxPipeline.lora_state_dict(str(file.parent), weight_name=file.name)
    assert isinstance(state, dict)
    return state


def theirs(state: Mapping[str, Tensor], path: str, prefix: str = "transformer.") -> LoRA:
    """diffusers' factors of one module; it takes alpha = rank for them."""
    return LoRA(
        up=state[f"{prefix}{path}.lora_B.weight"], down=state[f"{prefix}{path}.lora_A.weight"]
    )


def compare(state: Mapping[str, Tensor], modules: Mapping[str, WeightAdapter]) -> None:
    """Every module has our ΔW, and there is no other."""
    assert {key.split(".lora_")[0] for key in state if "lora_" in key} == {
        f"transformer.{m}" for m in modules
    }
    found = {path: difference(module, theirs(state, path)) for path, module in modules.items()}
    assert all(error < 1e-5 for error in found.values()), max(
        found.items(), key=lambda item: item[1]
    )


def blocks(modules: Mapping[str, WeightAdapter]) -> dict[str, WeightAdapter]:
    """Without the layers outside the blocks."""
    return {path: module for path, module in modules.items() if "_blocks." in path}


@pytest.mark.parametrize("fold", [False, True], ids=["alpha", "folded"])
@pytest.mark.parametrize("layout", ["kohya", "comfy"])
def test_fused_layers(layout: str, fold: bool, shapes: Shapes, random, tmp_path: Path) -> None:
    """qkv and linear1 from parts of unequal rank and scale, one part missing."""
    modules = blocks(full_width(shapes(2, 2), random, scale=0.75))
    q, mlp = "single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"
    modules[q] = models.lora_for(torch.zeros(3072, 3072) + 1, 5, 1.5, random)
    modules[mlp] = models.lora_for(torch.zeros(12288, 3072) + 1, 1, 0.25, random)
    missing = [
        modules.pop("transformer_blocks.1.attn.to_k"),
        modules.pop("single_transformer_blocks.1.proj_mlp"),
    ]
    file = written(models.adapter_of("flux", {"transformer": modules}), layout, tmp_path, fold=fold)
    state = read_by_diffusers(file)
    for path in ("transformer_blocks.1.attn.to_k", "single_transformer_blocks.1.proj_mlp"):
        assert not theirs(state, path).delta().any()  # the missing part is there now, and zero
        del state[f"transformer.{path}.lora_A.weight"], state[f"transformer.{path}.lora_B.weight"]
    assert missing
    compare(state, modules)


def test_xlabs(shapes: Shapes, random, tmp_path: Path) -> None:
    attention = (".attn.to_", ".attn.add_", "single_transformer_blocks.0.proj_out")
    every = blocks(full_width(shapes(1, 1), random, scale=0.5))
    modules = {
        path: module for path, module in every.items() if any(part in path for part in attention)
    }
    compare(
        read_by_diffusers(
            written(models.adapter_of("flux", {"transformer": modules}), "xlabs", tmp_path)
        ),
        modules,
    )


def test_fal_kontext(shapes: Shapes, random, tmp_path: Path) -> None:
    """Its reader wants every layer of every block and proj_out, and nothing else."""
    every = full_width(shapes(19, 38), random, rank=1, scale=0.5)
    modules = {**blocks(every), "proj_out": every["proj_out"]}
    file = written(models.adapter_of("flux", {"transformer": modules}), "fal-kontext", tmp_path)
    compare(read_by_diffusers(file), modules)


def test_control_lora(shapes: Shapes, random, tmp_path: Path) -> None:
    """The BFL reader wants every layer, their biases and the norm scales, which are values; img_in
    is twice as wide.

    diffusers swaps the halves of the rows of lora_A of the last adaLN too, which mixes up the
    ranks. Right is to swap lora_B alone, whose rows are the layer's outputs.
    """
    sizes = shapes(19, 38)
    modules = full_width(sizes, random)
    modules["x_embedder"] = LoRA(
        up=torch.randn(3072, 2, generator=random),
        down=torch.randn(2, 128, generator=random),
        padded_shape=(3072, 128),
    )
    modules["context_embedder"] = modules["context_embedder"].with_tensors(
        bias=torch.randn(3072, generator=random)
    )
    for name, shape in sizes.items():
        if len(shape) == 1 and ".attn.norm_" in name:
            modules[name.removesuffix(".weight")] = Replace(
                weight=torch.randn(shape, generator=random)
            )
    file = written(models.adapter_of("flux", {"transformer": modules}), "bfl", tmp_path)
    state = read_by_diffusers(file)
    last = modules.pop("norm_out.linear")
    swapped = theirs(state, "norm_out.linear")
    assert difference(last, swapped) > 0.1
    assert difference(last, LoRA(up=swapped.up, down=swapped.down.flip(0))) < 1e-6
    for suffix in ("lora_A.weight", "lora_B.weight"):
        del state[f"transformer.norm_out.linear.{suffix}"]
    assert torch.equal(
        state["transformer.context_embedder.lora_B.bias"],
        modules["context_embedder"].tensors()["bias"],
    )
    values = {path: module for path, module in modules.items() if isinstance(module, Replace)}
    assert len(values) == 4 * 19 + 2 * 38
    for path, module in values.items():
        assert torch.equal(state[f"transformer.{path}.weight"], module.tensors()["weight"])
    bare = {
        path: module.with_tensors(padded_shape=None, bias=None)  # these two were looked at above
        for path, module in modules.items()
        if path not in values
    }
    assert state["transformer.x_embedder.lora_A.weight"].shape == (2, 128)
    compare(state, bare)


def test_control_lora_widens_the_embedder(untouched, random, tmp_path: Path) -> None:
    """diffusers zero-pads the tiny x_embedder for a file with more inputs, exactly as
    `padded_shape` says.

    Such a file does not say so itself: at the published width the architecture's table does.
    """
    model = untouched(FLUX.base)["transformer"]
    assert isinstance(model, nn.Module)
    wide = models.lora_for(torch.randn(32, 8, generator=random), 3, 1.5, random)
    file = tmp_path / "control.safetensors"
    adapter = models.adapter_of("flux", {"transformer": {"x_embedder": wide}})
    save_adapter(adapter, file, layout="diffusers")
    modules: dict[str, WeightAdapter] = {"x_embedder": wide.with_tensors(padded_shape=(32, 8))}
    pipeline = loaded(FLUX, file)
    given = torch.randn(2, 16, 8, generator=random)
    weights = models.merged(model, modules)
    expected = torch.nn.functional.linear(
        given, weights["x_embedder.weight"], weights["x_embedder.bias"]
    )
    assert torch.allclose(pipeline.transformer.x_embedder(given), expected, atol=1e-6)
