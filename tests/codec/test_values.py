"""Odd values: alphas in every form, DoRA magnitudes in every shape, dead and damaged factors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.codec import load_adapter
from peftsurgery.errors import UsageError
from peftsurgery.operations.convert import convert
from peftsurgery.operations.inspect import inspect
from tests.codec.build import dense, gap, read, write
from tests.codec.parts import Maker, Tensors

NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
HOME = "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "lora_unet_down_blocks_1_resnets_1_conv1"
RANK = 4


def with_alpha(alpha: torch.Tensor | None) -> Tensors:
    tensors = Maker(3).lora(NAME, 320, 768, RANK)
    return tensors if alpha is None else {**tensors, f"{NAME}.alpha": alpha}


ALPHAS = {
    "missing": (None, RANK),
    "scalar": (torch.tensor(2.0), 2),
    "one element": (torch.tensor([2.0]), 2),
    "fp16": (torch.tensor(2.5, dtype=torch.float16), 2.5),
    "bf16": (torch.tensor(2.5, dtype=torch.bfloat16), 2.5),
    "integer": (torch.tensor(3), 3),
    "irrational": (torch.tensor(math.sqrt(RANK) * 16), math.sqrt(RANK) * 16),
    "zero": (torch.tensor(0.0), 0),
    "negative": (torch.tensor(-2.0), -2),
    "huge": (torch.tensor(1e10), 1e10),
}
FINDINGS = {"zero": "alpha-zero", "negative": "alpha-negative", "huge": "alpha-huge"}


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "diffusers-dot", "peft", "comfy"])
@pytest.mark.parametrize("kind", ALPHAS)
def test_alpha_over_rank_survives(kind: str, layout: str, tmp_path: Path) -> None:
    alpha, value = ALPHAS[kind]
    source = write(tmp_path / "a.safetensors", with_alpha(alpha))
    out = tmp_path / ("b" if layout == "peft" else "b.safetensors")
    report = convert(source, out, to=layout)
    raw = read(source)
    product = raw[f"{NAME}.lora_up.weight"] @ raw[f"{NAME}.lora_down.weight"]
    assert gap(dense(load_adapter(out).modules[HOME]), value / RANK * product) < 1e-7
    codes = [f.code for f in report.findings if f.code.startswith("alpha-")]
    assert (FINDINGS.get(kind) in codes) == (kind in FINDINGS)
    assert ("dead-modules" in [f.code for f in report.findings]) == (kind == "zero")


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor([1.0, 2.0]), torch.zeros(0)],
)
def test_an_alpha_that_is_no_number_is_refused(alpha: torch.Tensor, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", with_alpha(alpha))
    with pytest.raises(UsageError, match=rf"{NAME}\.alpha.*damaged"):
        convert(source, tmp_path / "b.safetensors", to="kohya")
    assert not (tmp_path / "b.safetensors").exists()


def test_the_placeholder_of_full_lokr_factors_is_ignored(tmp_path: Path) -> None:
    tensors = Maker(3).lokr(NAME, (20, 24), (16, 32), None, alpha=1e10)
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert "alpha-placeholder" in [f.code for f in adapter.findings]
    product = np.kron(*(tensors[f"{NAME}.lokr_{w}"].double().numpy() for w in ("w1", "w2")))
    assert gap(dense(adapter.modules[HOME]), product) < 1e-12


def test_alpha_tensors_beside_stale_metadata(tmp_path: Path) -> None:
    """diffusers would apply both; the tensors are what the file was trained with."""
    stale = json.dumps({"unet.r": 4, "unet.lora_alpha": 64, "unet.peft_type": "LORA"})
    source = tmp_path / "a.safetensors"
    write(source, with_alpha(torch.tensor(2.0)), lora_adapter_metadata=stale)
    report = convert(source, tmp_path / "b.safetensors", to="kohya")
    assert "alpha-twice" in [f.code for f in report.findings]
    adapter = load_adapter(tmp_path / "b.safetensors")
    assert float(adapter.modules[HOME].scale) == 0.5
    assert "lora_adapter_metadata" not in adapter.metadata


# magnitude shape -> axis; on a linear [320, 768] and a convolution [640, 320, 3, 3]
LINEAR = {(320, 1): "out", (320,): "out", (1, 768): "in"}
CONVOLUTION = {(640, 1, 1, 1): "out", (640,): "out", (1, 320, 1, 1): "in"}


@pytest.mark.parametrize("algorithm", ["lora", "loha"])
@pytest.mark.parametrize(("shape", "axis"), [*LINEAR.items(), *CONVOLUTION.items()])
def test_dora_magnitudes(shape: tuple[int, ...], axis: str, algorithm: str, tmp_path: Path) -> None:
    maker, conv = Maker(4), shape in CONVOLUTION
    name, out, into = (CONV, 640, 320) if conv else (NAME, 320, 768)
    if algorithm == "lora":
        tensors = maker.lora(name, out, into, kernel=(3, 3) if conv else ())
    else:
        tensors = maker.loha(name, out, into * (9 if conv else 1))
    tensors[f"{name}.dora_scale"] = maker.draw(*shape).abs()
    source = write(tmp_path / "a.safetensors", tensors)
    module = next(iter(load_adapter(source, architecture="sd1").modules.values()))
    assert module.magnitude_axis == axis
    back = tmp_path / "b.safetensors"
    convert(source, back, to="comfy", architecture="sd1")
    convert(back, tmp_path / "c.safetensors", to="kohya", architecture="sd1")
    found = read(tmp_path / "c.safetensors")[f"{name}.dora_scale"]
    assert np.array_equal(found.reshape(-1), tensors[f"{name}.dora_scale"].reshape(-1).numpy())
    if len(shape) > 1:
        assert found.shape == shape


@pytest.mark.parametrize("shape", [(768,), (1, 320), (2,), (320, 2)])
def test_magnitudes_of_no_axis_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {**Maker(4).lora(NAME, 320, 768), f"{NAME}.dora_scale": torch.ones(shape)}
    with pytest.raises(UsageError, match=NAME):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


def test_a_dead_adapter_is_named_and_survives(tmp_path: Path) -> None:
    tensors = Maker(5).lora(NAME, 320, 768)
    tensors[f"{NAME}.lora_up.weight"].zero_()
    fused = Maker(6).lora("lora_unet_double_blocks_0_img_attn_qkv", 144, 48)
    fused["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].zero_()
    for name, found, to in ((None, tensors, "kohya"), ("flux", fused, "diffusers")):
        source, out = tmp_path / f"{to}.safetensors", tmp_path / f"{to}-out.safetensors"
        write(source, found)
        report = convert(source, out, to=to, architecture=name)
        assert "dead-modules" in [f.code for f in report.findings]
        first, second = (load_adapter(p, architecture=name) for p in (source, out))
        assert first.modules.keys() == second.modules.keys()
        assert all(m.is_zero() for m in second.modules.values())
        dead = [f.code for f in inspect(source, architecture=name, norms=True).findings]
        assert "dead-module" in dead


DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"
CORPSES = {
    "1-D": ({DOWN: torch.ones(768), UP: torch.ones(320)}, "un-gathered sharded"),
    "empty": ({DOWN: torch.zeros(0), UP: torch.zeros(320, 4)}, "un-gathered sharded"),
    "no rank": ({DOWN: torch.zeros(0, 768), UP: torch.zeros(320, 0)}, "have no elements"),
    "slice": ({DOWN: torch.ones(2, 768), UP: torch.ones(320, 4)}, "have different ranks"),
    "half": ({DOWN: torch.ones(2, 768)}, "lora needs up"),
    "only alpha": ({f"{NAME}.alpha": torch.tensor(1.0)}, "no tensor to apply"),
}


@pytest.mark.parametrize("kind", CORPSES)
def test_what_a_failed_save_leaves_is_named(kind: str, tmp_path: Path) -> None:
    tensors, message = CORPSES[kind]
    source = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UsageError, match=message) as caught:
        convert(source, tmp_path / "b.safetensors", to="kohya")
    assert NAME in str(caught.value)
    assert caught.value.exit_code == 2


def test_nan_is_named_with_its_module(tmp_path: Path) -> None:
    tensors = Maker(5).lora(NAME, 320, 768)
    tensors[UP][3, 1] = math.nan
    report = inspect(write(tmp_path / "a.safetensors", tensors), norms=True)
    assert [(f.code, f.key) for f in report.findings if f.level == "error"] == [
        ("not-finite", HOME)
    ]
