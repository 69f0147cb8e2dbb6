"""FLUX's fused weights: q, k, v (and the MLP) lie apart in diffusers files, in one elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.codec import load_adapter
from peftsurgery.errors import UsageError
from peftsurgery.operations.convert import convert
from tests.codec.build import dense, gap, read, write
from tests.codec.parts import Maker, Tensors

H = 48
ATTENTION = "transformer.transformer_blocks.0.attn."
SINGLE = "transformer.single_transformer_blocks.3."
FUSING = ("kohya", "comfy", "ai-toolkit", "bfl", "fal-kontext", "onetrainer-kohya")


def there_and_back(folder: Path, tensors: Tensors, layout: str, own: str = "diffusers") -> dict:
    """The raw tensors in `layout`, after checking that ΔW of every module comes back."""
    source = write(folder / "in.safetensors", tensors)
    there, back = folder / "there.safetensors", folder / "back.safetensors"
    assert convert(source, there, to=layout, architecture="flux").ok
    convert(there, back, to=own, architecture="flux")
    first = load_adapter(source, architecture="flux")
    for adapter in (
        load_adapter(there, architecture="flux"),
        load_adapter(back, architecture="flux"),
    ):
        assert set(adapter.modules) == {p for p, m in first.modules.items() if not m.is_zero()}
        for path, module in adapter.modules.items():
            assert gap(dense(module), dense(first.modules[path])) < 4e-7, path
    return read(there)


def peft_files() -> dict[str, Tensors]:
    """Files with q, k and v apart, unequal in everything that may differ."""
    one, half = Maker(1, style="peft"), Maker(2, style="peft", dtype=torch.float16)
    bf16 = Maker(3, style="peft", dtype=torch.bfloat16)
    q, k, v = (ATTENTION + n for n in ("to_q", "to_k", "to_v"))
    flat = "lora_transformer_transformer_blocks_0_attn_"
    kohya = Maker(4)
    return {
        "ranks": {**one.lora(q, H, H, 4), **one.lora(k, H, H, 1), **one.lora(v, H, H, 7)},
        "dtypes": {**one.lora(q, H, H), **half.lora(k, H, H), **bf16.lora(v, H, H)},
        "alphas": {
            **kohya.lora(f"{flat}to_q", H, H, 4, alpha=3),
            **kohya.lora(f"{flat}to_k", H, H, 2, alpha=0.7),
            **kohya.lora(f"{flat}to_v", H, H, 3),
        },
        "only q": one.lora(q, H, H, 4),
        "no v": {**one.lora(q, H, H, 4), **one.lora(k, H, H, 4)},
        "text stream": one.lora(ATTENTION + "add_k_proj", H, H),
        "no mlp": {**one.lora(SINGLE + "attn.to_q", H, H), **one.lora(SINGLE + "attn.to_v", H, H)},
        "only mlp": one.lora(SINGLE + "proj_mlp", 4 * H, H, 3),
        "all four": {
            **one.lora(SINGLE + "attn.to_q", H, H, 2),
            **one.lora(SINGLE + "attn.to_k", H, H, 3),
            **one.lora(SINGLE + "attn.to_v", H, H, 4),
            **one.lora(SINGLE + "proj_mlp", 4 * H, H, 5),
        },
        "top level": {
            **one.lora("transformer.x_embedder", H, 64),
            **one.lora("transformer.context_embedder", H, 80),
            **one.lora("transformer.time_text_embed.guidance_embedder.linear_2", H, H),
            **one.lora("transformer.norm_out.linear", 2 * H, H, 3),
            **one.lora("transformer.proj_out", 64, H),
        },
    }


@pytest.mark.parametrize("layout", FUSING)
@pytest.mark.parametrize("name", peft_files())
def test_parts_apart_survive_fusing(name: str, layout: str, tmp_path: Path) -> None:
    tensors = peft_files()[name]
    if name == "dtypes" or layout in ("bfl", "fal-kontext", "ai-toolkit"):
        tensors = {k: t.float() for k, t in tensors.items()}  # a folded scale is rounded to fp32
    own = "diffusers" if name != "alphas" else "onetrainer"
    there_and_back(tmp_path, tensors, layout, own)


def test_mixed_dtypes_fuse_into_the_widest(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", peft_files()["dtypes"])
    report = convert(source, tmp_path / "out.safetensors", to="kohya", architecture="flux")
    assert report.largest_error == 0
    adapter = load_adapter(tmp_path / "out.safetensors", architecture="flux")
    assert {m.tensors()["up"].dtype for m in adapter.modules.values()} == {torch.float32}


def test_the_fused_product_is_the_parts_on_top_of_each_other(tmp_path: Path) -> None:
    """Read from the raw file: rows in the order q, k, v, mlp; rank is the sum of the ranks."""
    tensors = peft_files()["all four"]
    fused = there_and_back(tmp_path, tensors, "ai-toolkit")
    name = "diffusion_model.single_blocks.3.linear1"
    up, down = fused[f"{name}.lora_B.weight"], fused[f"{name}.lora_A.weight"]
    assert down.shape == (2 + 3 + 4 + 5, H)
    parts = [
        tensors[f"{SINGLE}{part}.lora_B.weight"].double().numpy()
        @ tensors[f"{SINGLE}{part}.lora_A.weight"].double().numpy()
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    assert gap(up @ down, np.concatenate(parts)) < 1e-12


def test_missing_rows_stay_untouched(tmp_path: Path) -> None:
    fused = there_and_back(tmp_path, peft_files()["no v"], "kohya")
    up = fused["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert up.shape == (3 * H, 8)
    assert not up[2 * H :].any()


def test_the_final_layer_swaps_its_halves(tmp_path: Path) -> None:
    """diffusers stores scale and shift in the other order; up moves, down does not."""
    tensors = peft_files()["top level"]
    native = there_and_back(tmp_path, tensors, "kohya")
    up = native["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    own = tensors["transformer.norm_out.linear.lora_B.weight"].double().numpy()
    assert np.array_equal(up, np.concatenate([own[H:], own[:H]]))
    down = native["lora_unet_final_layer_adaLN_modulation_1.lora_down.weight"]
    assert np.array_equal(down, tensors["transformer.norm_out.linear.lora_A.weight"].numpy())


def test_a_dense_fused_lora_shares_its_down(tmp_path: Path) -> None:
    """Trained on the fused weight: every part needs every rank index, none may be cut off."""
    maker = Maker(9)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = maker.lora(name, 3 * H, H, 6, alpha=3)
    apart = there_and_back(tmp_path, tensors, "diffusers", "kohya")
    downs = [apart[f"{ATTENTION}{n}.lora_A.weight"] for n in ("to_q", "to_k", "to_v")]
    assert all(np.array_equal(d, downs[0]) for d in downs)
    assert downs[0].shape == (6, H)
    back = read(tmp_path / "back.safetensors")
    assert back[f"{name}.lora_down.weight"].shape == (6, H)


def test_rows_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    tensors = Maker(1).lora("lora_unet_double_blocks_0_img_attn_qkv", 3 * H + 1, H)
    source = write(tmp_path / "in.safetensors", tensors)
    with pytest.raises(UsageError, match="145 output rows, which do not divide as 1:1:1"):
        convert(source, tmp_path / "out.safetensors", to="kohya", architecture="flux")
