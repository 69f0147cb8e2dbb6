"""What diffusers 0.42.1 gets wrong in valid files. Each test asserts the wrong result and says what
would be right.

When one of them fails, diffusers has been mended: delete the test, cover the case in
test_diffusers_unet or _flux, and correct the verdicts of `peftsurgery inspect`
(operations/programs.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from safetensors.torch import load_file, save_file

from peftsurgery import convert, inspect, load_adapter
from tests.interop import models
from tests.interop.pipelines import (
    FLUX,
    SD,
    SDXL,
    WITHIN,
    Parts,
    errors,
    loaded,
    random_parts,
    written,
)

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden"
WRONG = 0.02  # far beyond rounding


def only(parts: Parts, *endings: str) -> Parts:
    """The modules whose path ends so."""
    kept = {c: {p: m for p, m in part.items() if p.endswith(endings)} for c, part in parts.items()}
    return {component: part for component, part in kept.items() if part}


# Stable Diffusion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_kohya_alphas_that_differ(component, untouched, plain_output, random, tmp_path) -> None:
    """The alpha patterns name attention processors and half a path, match nothing, and the
    commonest alpha is used.

    Right: every module's own alpha. `--alpha fold` helps (test_diffusers_unet).
    """
    built = untouched(SD.base)
    parts = random_parts(SD, built, random, alphas=(4, 1, 8), only=(f"{component}:*",))
    pipeline = loaded(SD, written(models.adapter_of("sd1", parts), "kohya", tmp_path))
    assert errors(SD, pipeline, parts, built, plain_output)[component] > WRONG


def test_kohya_ldm_names_of_sd1(untouched, plain_output, random, tmp_path) -> None:
    """Only the SDXL pipeline renames input_blocks; the SD pipeline loses nearly all. Right: the
    same for both."""
    built = untouched(SD.base)
    parts = random_parts(SD, built, random, alphas=(3,), only=("unet:*",))
    pipeline = loaded(SD, written(models.adapter_of("sd1", parts), "kohya-ldm", tmp_path))
    assert errors(SD, pipeline, parts, built, plain_output)["unet"] > WRONG


def test_kohya_hf_names_of_the_sdxl_embedding(untouched, plain_output, random, tmp_path) -> None:
    """add_embedding_linear_1 becomes add.embedding.linear and is dropped. Right:
    add_embedding.linear_1."""
    built = untouched(SDXL.base)
    parts = random_parts(
        SDXL, built, random, alphas=(3,), only=("unet:add_embedding.*", "unet:conv_in")
    )
    pipeline = loaded(SDXL, written(models.adapter_of("sdxl", parts), "kohya-hf", tmp_path))
    assert errors(SDXL, pipeline, only(parts, "conv_in"), built, plain_output)["unet"] < WITHIN


def test_text_encoder_of_kohya_needs_an_out_proj(untouched, plain_output, random, tmp_path) -> None:
    """Without an out_proj, q_proj, k_proj and v_proj of a Kohya text encoder are dropped. Right:
    all are read."""
    built = untouched(SD.base)
    parts = random_parts(SD, built, random, alphas=(3,), only=("text_encoder:*",))
    parts = only(parts, "q_proj", "k_proj", "v_proj", "fc1")
    pipeline = loaded(SD, written(models.adapter_of("sd1", parts), "kohya", tmp_path))
    assert errors(SD, pipeline, only(parts, "fc1"), built, plain_output)["text_encoder"] < WITHIN


def test_text_encoder_with_mlp_layers_only(untouched, random, tmp_path) -> None:
    """The kind of a text encoder's names is guessed from its attention. Right: fc1 and fc2 alone
    are a valid LoRA."""
    parts = random_parts(SD, untouched(SD.base), random, only=("text_encoder:*.fc?",))
    file = written(models.adapter_of("sd1", parts), "diffusers", tmp_path)
    with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
        loaded(SD, file)


def test_dora_scale(untouched, plain_output, tmp_path) -> None:
    """dora_scale is filtered out of Kohya files, and a LoRA of another strength remains. Right: the
    DoRA."""
    built = untouched(SD.base)
    source = GOLDEN / "diffusers_sd_dora.safetensors"
    modules = load_adapter(source, architecture="sd1").of("unet")
    file = tmp_path / "dora.safetensors"
    convert(source, file, to="kohya", architecture="sd1")
    pipeline = loaded(SD, file)
    assert errors(SD, pipeline, {"unet": modules}, built, plain_output)["unet"] > WRONG
    plain = {
        path: module.with_tensors(magnitude=None, magnitude_axis=None)
        for path, module in modules.items()
    }
    assert errors(SD, pipeline, {"unet": plain}, built, plain_output)["unet"] < WITHIN


def test_dotted_names_with_alpha(untouched, random, tmp_path) -> None:
    """Any alpha in a dotted UNet file makes it "invalid", so we fold it. Right: read it, as the
    FLUX pipeline does."""
    parts = random_parts(SD, untouched(SD.base), random, only=("unet:conv_in",))
    file = written(models.adapter_of("sd1", parts), "diffusers-dot", tmp_path)
    tensors = load_file(file)
    assert sorted(tensors) == ["unet.conv_in.lora.down.weight", "unet.conv_in.lora.up.weight"]
    save_file({**tensors, "unet.conv_in.alpha": torch.tensor(4.0)}, file)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        loaded(SD, file)


# FLUX ---------------------------------------------------------------------------------------------

TOP = ("x_embedder", "context_embedder", "linear_1", "linear_2", "norm_out.linear")


@pytest.mark.parametrize("layout", ["kohya", "comfy"])
def test_flux_layers_outside_the_blocks(layout, untouched, plain_output, random, tmp_path) -> None:
    """They get no `transformer.` prefix and are dropped. Right: they are part of the LoRA (`--to
    diffusers` keeps them)."""
    built = untouched(FLUX.base)
    parts = random_parts(
        FLUX, built, random, only=("transformer:*",), without=("transformer:single_*",)
    )
    assert any(path.endswith(TOP) for path in parts["transformer"])
    pipeline = loaded(FLUX, written(models.adapter_of("flux", parts), layout, tmp_path))
    assert errors(FLUX, pipeline, parts, built, plain_output)["transformer"] > WRONG
    inner = {p: m for p, m in parts["transformer"].items() if "_blocks." in p}
    assert (
        errors(FLUX, pipeline, {"transformer": inner}, built, plain_output)["transformer"] < WITHIN
    )


def test_flux_alpha_of_the_final_layer(untouched, random, tmp_path) -> None:
    """final_layer is renamed, still without prefix, and its alpha thrown away unapplied. Right:
    scale alpha / rank."""
    parts = random_parts(
        FLUX, untouched(FLUX.base), random, alphas=(1,), ranks=(4,), only=("transformer:proj_out",)
    )
    written(models.adapter_of("flux", parts), "kohya", tmp_path)
    state = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="kohya.safetensors")
    assert isinstance(state, dict)
    own = parts["transformer"]["proj_out"].tensors()
    assert set(state) == {"proj_out.lora_A.weight", "proj_out.lora_B.weight"}
    assert torch.equal(state["proj_out.lora_A.weight"], own["down"])
    assert torch.equal(state["proj_out.lora_B.weight"], own["up"])


@pytest.mark.parametrize("layout", ["ai-toolkit", "onetrainer-comfy", "onetrainer-original"])
def test_flux_native_names_with_a_and_b(layout, untouched, plain_output, random, tmp_path) -> None:
    """BFL names with lora_A and lora_B match no reader and nothing is loaded, silently. Right: as
    with lora_down/up."""
    built = untouched(FLUX.base)
    parts = random_parts(FLUX, built, random, only=("transformer:transformer_blocks.*",))
    file = written(models.adapter_of("flux", parts), layout, tmp_path)
    pipeline = loaded(FLUX, file)
    assert torch.equal(models.run(pipeline.transformer), plain_output(FLUX.base, "transformer"))


def test_flux_onetrainer_mixture(untouched, random, tmp_path) -> None:
    """Everything of a block but attention gets the block's own name; the last one wins. Right: one
    key pair per module."""
    parts = random_parts(
        FLUX, untouched(FLUX.base), random, only=("transformer:transformer_blocks.0.*",)
    )
    written(models.adapter_of("flux", parts), "onetrainer", tmp_path)
    state = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="onetrainer.safetensors")
    assert "transformer.transformer_blocks.0.lora_A.weight" in state
    attention = [path for path in parts["transformer"] if ".attn." in path]
    assert len(state) == 2 * (len(attention) + 1) < 2 * len(parts["transformer"])


def test_flux_kohya_hf_names(untouched, random, tmp_path) -> None:
    """Flattened diffusers names under lora_unet_ are refused: only BFL names are known there.
    ComfyUI does not either."""
    parts = random_parts(
        FLUX, untouched(FLUX.base), random, only=("transformer:transformer_blocks.*",)
    )
    file = written(models.adapter_of("flux", parts), "kohya-hf", tmp_path)
    with pytest.raises(ValueError, match="Incompatible keys"):
        loaded(FLUX, file)


def test_flux_t5(untouched, random, tmp_path) -> None:
    """No FLUX reader loads a T5 LoRA: OneTrainer's is an error, others are dropped. Right: load or
    say so."""
    t5 = untouched(FLUX.base)["text_encoder_2"]
    modules = models.random_loras(models.layers(t5, "*.SelfAttention.q"), random)
    both = {
        "text_encoder_2": modules,
        **random_parts(FLUX, untouched(FLUX.base), random, only=("*norm1.linear",)),
    }
    adapter = models.adapter_of("flux", both)
    pipeline = loaded(FLUX, written(adapter, "diffusers", tmp_path))
    assert torch.equal(models.run(pipeline.text_encoder_2), models.run(t5))
    with pytest.raises(AssertionError, match="lora_te2"):
        loaded(FLUX, written(adapter, "onetrainer", tmp_path))


def test_flux_stale_metadata(untouched, plain_output, random, tmp_path) -> None:
    """A Kohya file's alphas are folded by diffusers and the header's metadata applied again. Right:
    once.

    We leave lora_adapter_metadata out of Kohya files, so only files of others show it.
    """
    built = untouched(FLUX.base)
    parts = random_parts(
        FLUX, built, random, alphas=(1,), ranks=(2,), only=("transformer:*norm1.linear",)
    )
    first = written(models.adapter_of("flux", parts), "diffusers", tmp_path)
    convert(first, tmp_path / "kohya.safetensors", to="kohya", architecture="flux")
    pipeline = loaded(FLUX, tmp_path / "kohya.safetensors")
    assert errors(FLUX, pipeline, parts, built, plain_output)["transformer"] < WITHIN
    from safetensors import safe_open

    with safe_open(first, "pt") as file:
        stale = {"lora_adapter_metadata": file.metadata()["lora_adapter_metadata"]}
    save_file(
        load_file(tmp_path / "kohya.safetensors"), tmp_path / "stale.safetensors", metadata=stale
    )
    pipeline = loaded(FLUX, tmp_path / "stale.safetensors")
    assert errors(FLUX, pipeline, parts, built, plain_output)["transformer"] > WRONG


# what `inspect` says of the files above -----------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layout", "alphas", "only", "verdict"),
    [
        (SD, "kohya", (3,), ("*",), "yes"),
        (SD, "kohya", (4, 1), ("*",), "partly"),
        (SD, "kohya-ldm", (3,), ("unet:*",), "no"),
        (SD, "diffusers-dot", (4, 1), ("*",), "yes"),
        (SD, "diffusers", (4, 1), ("*",), "yes"),
        (SD, "comfy", (3,), ("*",), "no"),
        (SDXL, "kohya-ldm", (3,), ("*",), "yes"),
        (FLUX, "kohya", (4, 1), ("*transformer_blocks*",), "yes"),
        (FLUX, "kohya", (3,), ("transformer:*",), "partly"),
        (FLUX, "comfy", (4, 1), ("*transformer_blocks*",), "yes"),
        (FLUX, "ai-toolkit", (3,), ("*transformer_blocks*",), "no"),
        (FLUX, "kohya-hf", (3,), ("*transformer_blocks*",), "no"),
        (FLUX, "onetrainer", (3,), ("*transformer_blocks*",), "partly"),
    ],
)
def test_inspect_knows(family, layout, alphas, only, verdict, untouched, random, tmp_path) -> None:
    parts = random_parts(family, untouched(family.base), random, alphas=alphas, only=only)
    file = written(models.adapter_of(family.architecture, parts), layout, tmp_path)
    rows = inspect(file, architecture=family.architecture).tables["programs"]
    assert [row["loads"] for row in rows if row["program"] == "diffusers"] == [verdict]
