"""Every algorithm across FLUX's fused weights: exact where the algebra allows, refused with the way
out otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.codec import load_adapter
from peftsurgery.errors import UnsupportedError
from peftsurgery.operations.convert import convert
from tests.codec.build import gap, read, write
from tests.codec.parts import Maker, Tensors

H = 48
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PROJ = "lora_unet_double_blocks_0_img_attn_proj"
BLOCK = "transformer:transformer_blocks.0.attn"
GROUP = f"{BLOCK}.[to_q,to_k,to_v]"
TO_LORA = "--algorithm lora --rank RULE rewrites it as a LoRA and states the loss."
TO_BAKE = "--base CHECKPOINT --algorithm lora --rank RULE (or --algorithm full) bakes it"

M = Maker(21)
FILES: dict[str, Tensors] = {
    "lora": M.lora(QKV, 3 * H, H, 4, alpha=3),
    "loha": M.loha(QKV, 3 * H, H, 2, alpha=1),
    "lokr on blocks": M.lokr(QKV, (12, 4), (12, 12), 2, alpha=1),
    "lokr off blocks": M.lokr(QKV, (4, 4), (36, 12), 2, alpha=1),
    "lokr full": M.lokr(QKV, (4, 4), (36, 12), None, alpha=1e10),
    "dora out": M.dora(QKV, 3 * H, H, "out"),
    "dora in": M.dora(QKV, 3 * H, H, "in"),
    "full": {f"{QKV}.diff": M.draw(3 * H, H), f"{QKV}.diff_b": M.draw(3 * H)},
    "bias": {**M.lora(QKV, 3 * H, H), f"{QKV}.diff_b": M.draw(3 * H)},
}
# file -> layout -> what the refusal says; layouts not named here hold it
REFUSED: dict[str, dict[str, str]] = {
    "lora": {},
    "loha": dict.fromkeys(("diffusers", "bfl", "ai-toolkit"), TO_LORA),
    "lokr on blocks": dict.fromkeys(("diffusers", "bfl"), TO_LORA),
    "lokr off blocks": dict.fromkeys(("diffusers", "bfl", "peft", "onetrainer"), TO_LORA),
    "lokr full": dict.fromkeys(("diffusers", "bfl", "peft", "onetrainer"), TO_LORA),
    "dora out": {"bfl": TO_BAKE},
    "dora in": dict.fromkeys(("diffusers", "bfl", "peft", "onetrainer", "ai-toolkit"), TO_BAKE),
    "full": dict.fromkeys(("diffusers", "bfl", "peft", "ai-toolkit"), TO_LORA),
    "bias": {"ai-toolkit": "--drop PATTERN leaves it out on request"},
}
LAYOUTS = ("kohya", "comfy", "onetrainer", "diffusers", "peft", "bfl", "ai-toolkit")


def out(folder: Path, layout: str) -> Path:
    return folder / ("out" if layout == "peft" else "out.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FILES)
def test_exact_or_refused_with_the_way_out(name: str, layout: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", FILES[name])
    there = out(tmp_path, layout)
    remedy = REFUSED[name].get(layout)
    if remedy is not None:
        first = rf"{re.escape(BLOCK)}\.(to_q|\[to_q,to_k,to_v\]): cannot be written as {layout}: "
        with pytest.raises(UnsupportedError, match=first) as caught:
            convert(source, there, to=layout, architecture="flux")
        assert caught.value.exit_code == 3
        assert remedy in str(caught.value)
        assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors"}
        return
    report = convert(source, there, to=layout, architecture="flux")
    assert report.largest_error < 4e-7
    back = tmp_path / "back.safetensors"
    convert(there, back, to="kohya", architecture="flux")
    first = load_adapter(source, architecture="flux")
    second = load_adapter(back, architecture="flux")
    weight = torch.randn(3 * H, H, generator=torch.Generator().manual_seed(2))
    assert gap(merged(second, weight), merged(first, weight)) < 1e-6


def merged(adapter, weight: torch.Tensor) -> np.ndarray:
    """What the fused weight and its bias become; the parts are merged apart when they lie apart."""
    bias = torch.zeros(len(weight))
    if GROUP in adapter.modules:
        w, b = adapter.modules[GROUP].merged(weight, bias)
        pieces = [(w, b)]
    else:
        names = [f"{BLOCK}.{n}" for n in ("to_q", "to_k", "to_v")]
        rows = [slice(n * H, (n + 1) * H) for n in range(3)]
        pieces = [
            adapter.modules[p].merged(weight[r], bias[r]) for p, r in zip(names, rows, strict=True)
        ]
    return torch.cat([torch.cat([w, b[:, None]], 1) for w, b in pieces]).double().numpy()


@pytest.mark.parametrize("name", ["lokr off blocks", "lokr full", "dora in"])
def test_what_cannot_be_split_goes_through_untouched(name: str, tmp_path: Path) -> None:
    """One record on the group: the fused layouts write the same bytes back."""
    source = write(tmp_path / "in.safetensors", FILES[name])
    assert set(load_adapter(source, architecture="flux").modules) == {GROUP}
    convert(source, tmp_path / "c.safetensors", to="comfy", architecture="flux")
    convert(tmp_path / "c.safetensors", tmp_path / "k.safetensors", to="kohya", architecture="flux")
    before, after = read(source), read(tmp_path / "k.safetensors")
    for tensors in (before, after):  # alpha means nothing beside two full factors
        tensors.pop(f"{QKV}.alpha", None)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("layout", ["diffusers", "bfl", "kohya"])
@pytest.mark.parametrize("name", ["loha", "lokr off blocks", "lokr full", "full"])
def test_refused_ones_convert_as_lora_and_state_the_loss(
    name: str, layout: str, tmp_path: Path
) -> None:
    tensors = {k: t for k, t in FILES[name].items() if not k.endswith("diff_b")}
    source = write(tmp_path / "in.safetensors", tensors)
    there = out(tmp_path, layout)
    report = convert(source, there, to=layout, architecture="flux", algorithm="lora", rank="5")
    loss = report.summary["largest loss of the fit"]
    assert isinstance(loss, float)
    whole = load_adapter(source, architecture="flux")
    weight = torch.zeros(3 * H, H)
    wanted = merged(whole, weight)[:, :H]
    found = merged(load_adapter(there, architecture="flux"), weight)[:, :H]
    stated = np.linalg.norm(wanted - found) / np.linalg.norm(wanted)
    best = np.linalg.svd(wanted, compute_uv=False)
    if name != "loha" and name != "full":  # these are fitted on the whole fused weight
        assert stated == pytest.approx(np.linalg.norm(best[5:]) / np.linalg.norm(best), rel=1e-4)
        assert loss == pytest.approx(stated, rel=1e-3)
    else:
        assert stated <= loss + 1e-6


def test_a_full_rank_fit_is_exact(tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", FILES["lokr off blocks"])
    report = convert(
        *(source, tmp_path / "o.safetensors"), to="diffusers", architecture="flux", algorithm="lora"
    )
    assert float(report.summary["largest loss of the fit"] or 0) < 1e-6


def test_different_algorithms_on_the_parts_of_one_weight(tmp_path: Path) -> None:
    maker = Maker(5)
    flat = "lora_transformer_transformer_blocks_0_attn_"
    tensors = {**maker.lora(f"{flat}to_q", H, H), **maker.loha(f"{flat}to_k", H, H)}
    source = write(tmp_path / "in.safetensors", tensors)
    with pytest.raises(UnsupportedError, match=r"different algorithms \(loha, lora\)") as caught:
        convert(source, tmp_path / "o.safetensors", to="kohya", architecture="flux")
    assert TO_LORA in str(caught.value)
    there = tmp_path / "o.safetensors"
    report = convert(source, there, to="kohya", architecture="flux", algorithm="lora")
    assert report.largest_error < 4e-7


def test_a_convolution_s_kernel_is_asked_for(tmp_path: Path) -> None:
    """LoHa factors (r, i·9) do not tell the kernel: without the base a LoRA would be of the wrong
    shape.
    """
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    source = write(tmp_path / "in.safetensors", Maker(3).loha(name, 320, 320 * 9))
    with pytest.raises(UnsupportedError, match=r"do not tell its kernel. Pass --base"):
        convert(
            *(source, tmp_path / "o.safetensors"),
            to="kohya",
            architecture="sd1",
            algorithm="lora",
            rank="4",
        )
    base = {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(320, 320, 3, 3)}
    convert(
        *(source, tmp_path / "o.safetensors"),
        to="kohya",
        architecture="sd1",
        base=write(tmp_path / "base.safetensors", base),
        algorithm="lora",
        rank="4",
    )
    assert read(tmp_path / "o.safetensors")[f"{name}.lora_down.weight"].shape == (4, 320, 3, 3)
