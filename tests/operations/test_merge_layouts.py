"""Any layout into any vocabulary: the result is the base plus a dense oracle, read back without the
package.
"""

# transformers, peft and diffusers are typed loosely
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftsurgery as ps
from peftsurgery.errors import UnsupportedError
from tests.operations.merging import (
    GOLDEN,
    Tensors,
    bfl,
    check,
    dotted_lora,
    flux_from_single,
    flux_single,
    kohya_lora,
    off_rounding,
    plain_clip,
    random,
    saved,
    sd_ldm,
    sdxl_from_single,
    sdxl_ldm,
    sdxl_single,
    state,
    write,
)


def canonical(tensors: Tensors) -> Tensors:
    """`component:name` without the level transformers 5 drops, and without the VAE."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        component, _, inner = name.partition(":")
        if component != "vae":
            found[f"{component}:{plain_clip(inner) if 'text' in component else inner}"] = tensor
    return found


def sdxl_kohya(folder: Path, *, seed: int = 1) -> tuple[Path, Tensors]:
    """A Kohya LoRA in sgm names on attention, feed-forward, convolutions and both text encoders;
    deltas by tensor name.
    """
    weights, homes = {}, {}
    for name, tensor in state(saved("tiny_sdxl_pipeline")).items():
        component, _, inner = name.partition(":")
        module, _, parameter = inner.rpartition(".")
        if parameter != "weight" or tensor.ndim < 2 or component == "vae" or "embedding" in inner:
            continue
        if component == "unet" and (
            ".attentions." in inner or ".conv1." in inner or "samplers" in inner
        ):
            key = "lora_unet_" + sdxl_ldm(inner).removesuffix(".weight").replace(".", "_")
        elif component.startswith("text_encoder") and "layers" in inner:
            prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
            key = f"{prefix}_text_model_{plain_clip(module).replace('.', '_')}"
        else:
            continue
        weights[key], homes[key] = tensor, name
    file, deltas = kohya_lora(weights, seed=seed)
    assert len(file) > 600
    return write(folder / "kohya.safetensors", file), {homes[k]: d for k, d in deltas.items()}


def test_kohya_lora_into_a_diffusers_sdxl_folder(tmp_path: Path) -> None:
    base = saved("tiny_sdxl_pipeline")
    adapter, deltas = sdxl_kohya(tmp_path)
    report = ps.merge(base, [(adapter, 1.0)], tmp_path / "out", verify="full")
    assert report.ok
    assert report.survival == pytest.approx(1, abs=1e-6)
    check(state(base), state(tmp_path / "out"), deltas)
    from diffusers import StableDiffusionXLPipeline

    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    name = "down_blocks.1.attentions.0.proj_in.weight"
    assert torch.equal(loaded.unet.state_dict()[name], state(tmp_path / "out")[f"unet:{name}"])


def test_kohya_lora_into_a_single_file_with_openclip_names(tmp_path: Path) -> None:
    base = sdxl_single()
    adapter, deltas = sdxl_kohya(tmp_path, seed=2)
    ps.merge(base, [(adapter, 0.7)], tmp_path / "out.safetensors", verify="full")
    before = canonical(state(saved("tiny_sdxl_pipeline")))
    again = sdxl_from_single(base)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[n], before[n]) for n in before), (
        "the single file of this test is wrong"
    )
    wanted = canonical({name: 0.7 * delta for name, delta in deltas.items()})
    check(before, sdxl_from_single(tmp_path / "out.safetensors"), wanted)
    fused = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    assert not torch.equal(load_file(base)[fused], load_file(tmp_path / "out.safetensors")[fused])


@pytest.mark.parametrize("golden", ["diffusers_sdxl_lora"])
def test_diffusers_lora_into_a_single_file_sdxl(tmp_path: Path, golden: str) -> None:
    file = load_file(GOLDEN / f"{golden}.safetensors")
    probed = load_file(GOLDEN / f"{golden}.oracle.safetensors")
    ps.merge(
        sdxl_single(),
        [(GOLDEN / f"{golden}.safetensors", 1.0)],
        tmp_path / "out.safetensors",
        verify="full",
    )
    before, after = sdxl_from_single(sdxl_single()), sdxl_from_single(tmp_path / "out.safetensors")
    changed = set()
    for module in dotted_lora(file):
        component, _, inner = module.partition(".")
        inner = plain_clip(inner) if component.startswith("text") else inner
        changed.add(f"{component}:{inner}.weight")
    for name in before:
        assert torch.equal(before[name], after[name]) or name in changed, name
    for name, delta in canonical(probed).items():
        error = (after[name].double() - before[name].double() - delta.double()).norm()
        assert error < 1e-6 * before[name].double().norm(), name


def test_diffusers_lora_into_a_bfl_file(tmp_path: Path) -> None:
    base = flux_single()
    plain = state(saved("tiny_flux_pipeline") / "transformer")
    again = flux_from_single(base)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[n], plain[n]) for n in plain), (
        "the single file of this test is wrong"
    )
    golden = GOLDEN / "diffusers_flux_lora.safetensors"
    ps.merge(
        base, [(golden, 1.0)], tmp_path / "out.safetensors", architecture="flux", verify="full"
    )
    after = flux_from_single(tmp_path / "out.safetensors")
    for name, delta in load_file(GOLDEN / "diffusers_flux_lora.oracle.safetensors").items():
        inner = name.partition(":")[2]
        error = (after[inner].double() - plain[inner].double() - delta.double()).norm()
        assert error < 1e-6 * plain[inner].double().norm(), name


def flux_modules(tensors: Tensors) -> Tensors:
    """Every linear weight of the transformer by module name."""
    return {
        n.removesuffix(".weight"): t
        for n, t in tensors.items()
        if n.endswith(".weight") and t.ndim == 2
    }


def test_diffusers_lora_on_every_linear_of_flux_into_a_bfl_file_with_swapped_halves(
    tmp_path: Path,
) -> None:
    base, normal = flux_single(), random(5)
    plain = state(saved("tiny_flux_pipeline") / "transformer")
    file: Tensors = {}
    for module, weight in flux_modules(plain).items():
        file[f"transformer.{module}.lora_A.weight"] = normal(2, weight.shape[1]) * 0.2
        file[f"transformer.{module}.lora_B.weight"] = normal(weight.shape[0], 2) * 0.2
    adapter = write(tmp_path / "all.safetensors", file)
    ps.merge(
        base, [(adapter, 1.0)], tmp_path / "out.safetensors", architecture="flux", verify="full"
    )
    deltas = {f"{m.partition('.')[2]}.weight": d for m, d in dotted_lora(file).items()}
    assert "norm_out.linear.weight" in deltas
    check(plain, flux_from_single(tmp_path / "out.safetensors"), deltas)


def comfy_lokr(weights: Tensors, *, seed: int, alpha: float = 3.0) -> tuple[Tensors, Tensors]:
    """(file, ΔW in fp64) of a ComfyUI LoKr, second factor low-rank, on fused native modules."""
    normal = random(seed)
    file: Tensors = {}
    deltas: Tensors = {}
    for module, weight in weights.items():
        rows, columns = weight.shape
        a, c = 2 if rows % 3 else 4, 2
        b, d = rows // a, columns // c
        w1, w2_a, w2_b = normal(a, c) * 0.3, normal(b, 2) * 0.3, normal(2, d) * 0.3
        key = f"diffusion_model.{module}"
        file |= {
            f"{key}.lokr_w1": w1,
            f"{key}.lokr_w2_a": w2_a,
            f"{key}.lokr_w2_b": w2_b,
            f"{key}.alpha": torch.tensor(alpha),
        }
        product = torch.kron(w1.double(), w2_a.double() @ w2_b.double())
        deltas[f"{module}.weight"] = (alpha / 2) * product
    return file, deltas


def test_comfyui_lokr_into_a_bfl_file_and_sliced_onto_a_diffusers_folder(tmp_path: Path) -> None:
    native = load_file(flux_single())
    fused = {
        m: t for m, t in flux_modules(native).items() if m.endswith(("qkv", "linear1", "proj"))
    }
    file, deltas = comfy_lokr(fused, seed=8)
    adapter = write(tmp_path / "lokr.safetensors", file)
    out = tmp_path / "out.safetensors"
    ps.merge(flux_single(), [(adapter, 1.0)], out, architecture="flux", verify="full")
    check(native, load_file(out), deltas)
    # the blocks of 24 or so rows do not end where q, k and v do, so the record stays on the group
    # and merge slices it
    folder = saved("tiny_flux_pipeline")
    ps.merge(folder, [(adapter, 1.0)], tmp_path / "folder", architecture="flux", verify="full")
    merged = bfl(state(tmp_path / "folder" / "transformer"))
    check(native, merged, deltas)


def test_lokr_with_a_magnitude_per_output_is_sliced_too(tmp_path: Path) -> None:
    native = load_file(flux_single())
    fused = {m: t for m, t in flux_modules(native).items() if m.endswith("img_attn.qkv")}
    file, deltas = comfy_lokr(fused, seed=9)
    for module, weight in fused.items():
        magnitude = weight.double().norm(dim=1, keepdim=True) * 1.1
        file[f"diffusion_model.{module}.dora_scale"] = magnitude.float()
        moved = weight.double() + deltas[f"{module}.weight"]
        kept = magnitude.float().double() * moved / moved.norm(dim=1, keepdim=True)
        deltas[f"{module}.weight"] = kept - weight.double()
    adapter = write(tmp_path / "dora.safetensors", file)
    folder = saved("tiny_flux_pipeline")
    ps.merge(folder, [(adapter, 1.0)], tmp_path / "folder", architecture="flux", verify="full")
    check(native, bfl(state(tmp_path / "folder" / "transformer")), deltas)
    ps.merge(
        flux_single(),
        [(adapter, 1.0)],
        tmp_path / "o.safetensors",
        architecture="flux",
        verify="full",
    )
    check(native, load_file(tmp_path / "o.safetensors"), deltas)


def test_per_input_magnitude_needs_the_fused_weight(tmp_path: Path) -> None:
    native = load_file(flux_single())
    name = "double_blocks.0.img_attn.qkv"
    weight = native[f"{name}.weight"]
    normal = random(10)
    down, up = normal(3, weight.shape[1]) * 0.2, normal(weight.shape[0], 3) * 0.2
    magnitude = weight.norm(dim=0, keepdim=True) * 0.9
    file = {
        f"diffusion_model.{name}.lora_down.weight": down,
        f"diffusion_model.{name}.lora_up.weight": up,
        f"diffusion_model.{name}.dora_scale": magnitude,
    }
    adapter = write(tmp_path / "in.safetensors", file)
    out = tmp_path / "out.safetensors"
    ps.merge(flux_single(), [(adapter, 0.6)], out, architecture="flux", verify="full")
    moved = weight.double() + up.double() @ down.double()
    merged = magnitude.double() * moved / moved.norm(dim=0, keepdim=True)
    check(native, load_file(out), {f"{name}.weight": 0.6 * (merged - weight.double())})
    with pytest.raises(UnsupportedError, match="one magnitude per input"):
        ps.merge(
            saved("tiny_flux_pipeline"), [(adapter, 1.0)], tmp_path / "no", architecture="flux"
        )
    assert not (tmp_path / "no").exists()


def test_kohya_lora_on_sd15_in_ldm_names(tmp_path: Path) -> None:
    base = saved("tiny_sd_pipeline")
    weights, homes = {}, {}
    for name, tensor in state(base).items():
        component, _, inner = name.partition(":")
        if component == "unet" and inner.endswith(".weight") and tensor.ndim > 1:
            key = "lora_unet_" + sd_ldm(inner).removesuffix(".weight").replace(".", "_")
            weights[key], homes[key] = tensor, name
    file, deltas = kohya_lora(weights, seed=3)
    adapter = write(tmp_path / "ldm.safetensors", file)
    ps.merge(base, [(adapter, -0.5)], tmp_path / "out", architecture="sd1", verify="full")
    check(state(base), state(tmp_path / "out"), {homes[k]: -0.5 * d for k, d in deltas.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_bases_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = sdxl_single(dtype)
    adapter, deltas = sdxl_kohya(tmp_path, seed=4)
    ps.merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors")
    before, after = sdxl_from_single(base), sdxl_from_single(tmp_path / "out.safetensors")
    elements = wrong = 0
    for name, delta in canonical(deltas).items():
        assert after[name].dtype == dtype
        exact = before[name].double() + delta.reshape(before[name].shape)
        differing, far = off_rounding(after[name], exact)
        assert far == 0, name
        elements, wrong = elements + delta.numel(), wrong + differing
    print(f"{wrong} of {elements} elements are ties of the fp32 sum")
    assert wrong < 2e-3 * elements
