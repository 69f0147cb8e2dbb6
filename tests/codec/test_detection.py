"""Detection explains every key or says which it cannot; other algorithms and whole checkpoints are
refused by name.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch

from peftsurgery.algorithms import difference
from peftsurgery.codec import AmbiguousArchitecture, load_adapter
from peftsurgery.codec.foreign import FOREIGN, foreign_key
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.layouts import KOHYA
from peftsurgery.operations.convert import convert
from peftsurgery.operations.inspect import inspect
from tests.codec.build import KEYS, filled, listing, narrowed, shapes_of, thinned, write
from tests.codec.parts import Maker, Tensors

CROSS = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TE = "text_model_encoder_layers_0_self_attn_q_proj"
GENERATED = sorted(path.stem for path in KEYS.glob("gen__*.json"))


def peft_folder(folder: Path, name: str) -> Path:
    """The generated PEFT listing as the folder PEFT writes, configuration included."""
    config = dict(listing(name)["config"])
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.startswith("{"):
        config["target_modules"] = sorted(ast.literal_eval(targets))
    write(folder / "adapter_model.safetensors", filled(shapes_of(name)))
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def lycoris_file(folder: Path, name: str) -> tuple[Path, Path]:
    """The generated LyCORIS listing, and a base that has its modules (`attn.to_q`, `conv`, …)."""
    shapes = shapes_of(name)
    modules = {k.split(".")[0].removeprefix("lycoris_") for k in shapes}
    base = {f"{m.replace('attn_', 'attn.')}.weight": torch.zeros(64, 64) for m in modules}
    return write(folder / "a.safetensors", filled(shapes)), write(folder / "base", base)


def foreign(name: str) -> bool:
    return any(foreign_key(key) for key in shapes_of(name))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_listings_are_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    peft = name.startswith("gen__peft")
    if peft:
        source, base = peft_folder(tmp_path / "a", name), None
    else:
        source, base = lycoris_file(tmp_path, name)
    out = tmp_path / "out.safetensors"
    if foreign(name):
        with pytest.raises(UnsupportedError, match="recognises but does not handle") as caught:
            convert(source, out, to="lycoris", base=base)
        assert caught.value.exit_code == 3
        method = next(filter(None, map(foreign_key, sorted(shapes_of(name)))))
        assert method.name in str(caught.value)
        assert method.reason in str(caught.value)
        return
    adapter = load_adapter(source, base=base)
    assert sum(len(m.tensors()) for m in adapter.modules.values()) >= len(adapter.modules)
    maps = any(m.algorithm not in KOHYA.algorithms for m in adapter.modules.values())
    maps |= any(not m.additive and m.magnitude is None for m in adapter.modules.values())
    if "replication" in name or "to_save" in name or "bias_all" in name or (peft and maps):
        out, to = tmp_path / "out", "peft"
    else:
        to = "lycoris"
    convert(source, out, to=to, base=base)
    known = tmp_path / "names"
    write(known, {f"{p.partition(':')[2]}.weight": torch.zeros(1) for p in adapter.modules})
    back = load_adapter(out, base=known)
    assert back.modules.keys() == adapter.modules.keys()
    for path, module in back.modules.items():
        assert difference(module, adapter.modules[path]) < 1e-6, path


EXAMPLES = {
    "pvera_lambda_b": "PVeRA", "beft_bias": "BEFT",
    "tinylora_v.0": "TinyLoRA", "osf_svd_params.U_low": "OSF", "psoft_R.weight": "PSOFT",
    "peanut_A.weight": "PEANuT", "deft_P": "DEFT", "lily_A.weight": "LiLy", "frod_x": "FRoD",
    "unilora_theta_d": "UniLoRA", "adamss_A.3": "AdaMSS", "poly_lora_A": "Poly",
    "shadow_A.weight": "Shadow", "supertuning_x": "SuperTuning", "oft_diag": "OFT in an older form",
    "oft_r": "OFT of PEFT before 0.16", "initial_norm": "OFT with DoRA", "glora_C.Xd": "five terms",
    "q_layer.weight": "T-LoRA", "adapter_down.0.weight": "bottleneck", "bias_indices": "sparse",
    "adaption_gate": "Llama-Adapter", "internal_xlora_classifier.l.w": "X-LoRA",
    "prefix_task_rows": "prefix",
}  # fmt: skip


@pytest.mark.parametrize("suffix", EXAMPLES)
def test_every_other_suffix_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{suffix}"
    source = write(tmp_path / "a.safetensors", {key: torch.zeros(2, 2)})
    with pytest.raises(UnsupportedError, match=re.escape(EXAMPLES[suffix])) as caught:
        convert(source, tmp_path / "b", to="peft")
    assert repr(key) in str(caught.value)
    with pytest.raises(UnsupportedError):
        inspect(source)


def test_every_family_of_suffixes_has_an_example() -> None:
    keys = [f"x.{suffix}" for suffix in EXAMPLES]
    keys += [key for name in GENERATED for key in shapes_of(name)]
    assert set(FOREIGN) <= {foreign_key(key) for key in keys}


def lora(*names: str, out: int = 640, into: int = 768) -> Tensors:
    maker = Maker(1)
    return {k: t for n in names for k, t in maker.lora(n, out, into).items()}


def test_unknown_modules_are_named_under_the_two_best_candidates(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", lora(f"lora_unet_{CROSS}", "lora_unet_foo_bar"))
    with pytest.raises(UsageError, match="not every key could be explained") as caught:
        convert(source, tmp_path / "b.safetensors", to="kohya")
    lines = str(caught.value).splitlines()
    assert sum(line.startswith("  sd") for line in lines) == 2
    assert all("1 of 2 modules unexplained" in line for line in lines[1:3])
    assert "'lora_unet_foo_bar.lora_down.weight'" in lines[1]
    assert "--base" in lines[-1]
    assert not (tmp_path / "b.safetensors").exists()


def test_keys_without_an_adapter_suffix_are_named(tmp_path: Path) -> None:
    tensors = {**lora(f"lora_unet_{CROSS}"), "optimizer.step": torch.zeros(1)}
    with pytest.raises(UsageError, match="1 of 3 keys have no adapter suffix, first 'optimizer"):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize(
    ("key", "width", "candidates"),
    [
        (f"lora_te_{TE}", 768, "sd1, flux"),
        (f"lora_te1_{TE}", 768, "sd1, sdxl, flux"),
        (f"lycoris_{TE}", 768, "sd1, sdxl, flux"),
    ],
)
def test_text_encoders_alone_name_the_candidates(
    key: str, width: int, candidates: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.safetensors", lora(key, out=width, into=width))
    with pytest.raises(AmbiguousArchitecture, match=f"explained by {candidates} alike") as caught:
        convert(source, tmp_path / "b.safetensors", to="kohya")
    assert "--architecture" in str(caught.value)
    report = inspect(source)
    assert "ambiguous-architecture" in [f.code for f in report.findings]
    assert report.architecture == ""


@pytest.mark.parametrize(
    ("key", "width", "path"),
    [
        (f"lora_te_{TE}", 1024, "sd2 text_encoder"),
        (f"lora_te2_{TE}", 1280, "sdxl text_encoder_2"),
        (f"lycoris_{TE}", 1280, "sdxl text_encoder_2"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4096, "flux text_encoder_2"),
    ],
)
def test_pinned_shapes_tell_text_encoders_apart(
    key: str, width: int, path: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.safetensors", lora(key, out=width, into=width))
    adapter = load_adapter(source)
    assert f"{adapter.architecture} {adapter.components[0]}" == path


@pytest.mark.parametrize(
    ("said", "found"),
    [("sdxl_base_v1-0", "sdxl"), ("sd_v1.5", "sd1"), ("flux1", "flux")],
)
def test_metadata_settles_what_shapes_do_not(said: str, found: str, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    write(source, lora(f"lora_te1_{TE}", out=768), ss_base_model_version=said)
    assert load_adapter(source).architecture == found


OTHERS = {
    "published__anima_lora_peft_format": ("peft", "diffusers", "onetrainer-original", "comfy"),
    "published__qwen_image_lora_diffusers_format": ("peft", "diffusers", "onetrainer-original"),
    "published__anima_lora_kohya_format": (),
    "published__qwen_image_lora_kohya_format": (),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_inspected_and_dotted_ones_converted(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", filled(narrowed(thinned(shapes_of(name), 2))))
    report = inspect(source)
    modules = {re.split(r"\.(?:lora|lokr|alpha)", key)[0] for key in shapes_of(name)}
    assert {row["name in file"] for row in report.modules} == modules
    assert not report.tables["programs"]
    for layout in OTHERS[name]:
        out = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        assert convert(source, out, to=layout).largest_error < 4e-7
    if not OTHERS[name]:
        assert "unknown-architecture" in [f.code for f in report.findings]
        with pytest.raises(UsageError, match="--base"):
            convert(source, tmp_path / "b.safetensors", to="kohya")


@pytest.mark.parametrize(
    "name", ["base__diffusers_sd15_unet", "base__sdmecha_flux-flux", "base__transformers_clip_l"]
)
def test_a_whole_checkpoint_is_no_adapter(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", filled(narrowed(shapes_of(name))))
    for operation in (lambda: convert(source, tmp_path / "b", to="peft"), lambda: inspect(source)):
        with pytest.raises(UsageError, match=r"this is a checkpoint.*not an adapter"):
            operation()
