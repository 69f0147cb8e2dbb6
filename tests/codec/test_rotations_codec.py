"""Rotations, IA3 and GLoRA in files: conventions, what crosses dialects, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from peftsurgery import convert, load_adapter, save_adapter
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import BOFT, HRA, IA3, OFT, GLoRA, LoRA, WeightAdapter, difference
from peftsurgery.codec import encode
from peftsurgery.errors import UnsupportedError, UsageError
from tests.codec.build import write

NAME = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{NAME}"


def draw(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


def peft(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    write(folder / "adapter_model.safetensors", {f"{KEY}.{k}": t for k, t in tensors.items()})
    text = json.dumps({"target_modules": ["q_proj"], **config})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder


def one(path: Path, **options: object) -> WeightAdapter:
    modules = load_adapter(path, **options).modules  # type: ignore[arg-type]
    assert len(modules) == 1
    return next(iter(modules.values()))


def flux(module: WeightAdapter, path: str = "transformer_blocks.0.attn.to_out.0") -> Adapter:
    return Adapter({f"transformer:{path}": module}, "flux")


# conventions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"peft_version": "0.18.0"}, (5, True, False)),
        ({"peft_version": "0.21.2.dev0@unknown"}, (5, True, False)),
        ({"peft_version": "0.17.1"}, (5, False, False)),
        ({}, (5, False, False)),
        ({"use_cayley_neumann": False}, (0, False, True)),
        ({"num_cayley_neumann_terms": 3, "peft_version": "1.0"}, (3, True, False)),
    ],
)
def test_version_and_config_choose_the_transform(
    config: dict, wanted: tuple[int, bool, bool], tmp_path: Path, rng: Generator
) -> None:
    module = one(peft(tmp_path, {"oft_R.weight": draw(rng, 2, 6)}, peft_type="OFT", **config))
    assert isinstance(module, OFT)
    assert (module.series, module.half_last, module.inverse) == wanted
    other = OFT(module.vector, series=5)
    same = wanted == (5, True, False)
    assert (difference(module, other) < 1e-6) == same
    out = tmp_path / "out"
    save_adapter(load_adapter(tmp_path), out, layout="peft")
    again = one(out)
    assert difference(again, module) == 0


def test_old_series_are_noticed_and_keep_their_version(tmp_path: Path, rng: Generator) -> None:
    tensors = {"oft_R.weight": draw(rng, 2, 6)}
    source = peft(tmp_path / "a", tensors, peft_type="OFT", peft_version="0.17.0")
    adapter = load_adapter(source)
    assert "oft-series" in {f.code for f in adapter.findings}
    config = encode(adapter, "peft").configs[""]
    assert config["peft_version"] == "0.17.0"
    assert config["use_cayley_neumann"] is True


def test_options_of_oft_survive(tmp_path: Path, rng: Generator) -> None:
    config = {"peft_type": "OFT", "coft": True, "eps": 0.01, "peft_version": "0.20.0"}
    coft = one(peft(tmp_path / "a", {"oft_R.weight": draw(rng, 2, 6)}, **config))
    assert isinstance(coft, OFT)
    assert coft.limit == 0.01
    shared = peft(
        tmp_path / "b", {"oft_R.weight": draw(rng, 1, 6)}, peft_type="OFT", block_share=True
    )
    module = one(shared)
    assert isinstance(module, OFT)
    assert module.shared
    assert module.shape == (0, 0)
    assert encode(load_adapter(shared), "peft").configs[""]["block_share"] is True


def test_named_adapters_are_read(tmp_path: Path, rng: Generator) -> None:
    found = peft(tmp_path, {"oft_R.default.weight": draw(rng, 2, 6)}, peft_type="OFT")
    assert one(found).algorithm == "oft"
    found = peft(tmp_path / "b", {"ia3_l.mine": draw(rng, 6, 1)}, peft_type="IA3")
    assert one(found).algorithm == "ia3"


def test_the_side_of_ia3_on_a_convolution_stands_in_the_config(
    tmp_path: Path, rng: Generator
) -> None:
    tensors = {"ia3_l": draw(rng, 1, 6, 1, 1)}
    outputs = one(peft(tmp_path / "a", tensors, peft_type="IA3", feedforward_modules=[]))
    inputs = one(peft(tmp_path / "b", tensors, peft_type="IA3", feedforward_modules=["q_proj"]))
    assert isinstance(outputs, IA3)
    assert isinstance(inputs, IA3)
    assert (outputs.acts_on, outputs.on_bias) == ("out", True)
    assert (inputs.acts_on, inputs.on_bias) == ("in", False)
    lone = write(tmp_path / "c.safetensors", {f"{KEY}.ia3_l": tensors["ia3_l"]})
    with pytest.raises(UsageError, match="feedforward_modules"):
        load_adapter(lone)


def test_scaled_oft_of_onetrainer_divides_the_angles(tmp_path: Path, rng: Generator) -> None:
    name = "lora_transformer_transformer_blocks_0_attn_to_out_0"
    vector = draw(rng, 768, 6)
    tensors = {f"{name}.oft_R.weight": vector}
    plain = one(write(tmp_path / "a.safetensors", tensors))
    tensors[f"{name}.oft_R.scaled_oft"] = torch.tensor(1)
    scaled = one(write(tmp_path / "b.safetensors", tensors))
    assert isinstance(scaled, OFT)
    wanted = OFT(vector / (2 * 3**0.5), series=5)
    assert difference(scaled, wanted) < 1e-6
    assert difference(plain, OFT(vector, series=5)) == 0
    for layout in ("onetrainer", "onetrainer-kohya", "onetrainer-original", "onetrainer-comfy"):
        encoded = encode(flux(scaled), layout)
        keys = {k.partition("oft_R")[2] for k in encoded.tensors[""]}
        assert keys == {".weight", ".scaled_oft"}
        again = one(write(tmp_path / f"{layout}.safetensors", encoded.tensors[""]))
        assert difference(again, scaled) == 0
    with pytest.raises(UnsupportedError, match="no scaled OFT"):
        encode(flux(scaled), "peft")


def test_alpha_of_an_output_rotation_is_its_constraint(tmp_path: Path, rng: Generator) -> None:
    module = OFT(None, draw(rng, 512, 6, 6), acts_on="out", inverse=True, constraint=0.5 * 3072)
    encoded = encode(flux(module), "kohya-hf")
    (key,) = [k for k in encoded.tensors[""] if k.endswith(".alpha")]
    assert float(encoded.tensors[""][key]) == 0.5
    again = one(write(tmp_path / "a.safetensors", encoded.tensors[""]))
    assert difference(again, module) == 0
    free = encode(flux(module.with_tensors(constraint=None)), "comfy").tensors[""]
    assert float(next(t for k, t in free.items() if k.endswith(".alpha"))) == 0
    with pytest.raises(UnsupportedError, match="ComfyUI native ignores rescale"):
        encode(flux(module), "comfy")


# between dialects ---------------------------------------------------------------------------------


def test_inputs_and_outputs_are_never_exchanged(tmp_path: Path, rng: Generator) -> None:
    vector, blocks = draw(rng, 512, 15), draw(rng, 512, 6, 6)
    inputs: list[WeightAdapter] = [
        OFT(vector, series=5),
        BOFT(draw(rng, 1, 512, 6, 6), torch.ones(3072, 1)),
    ]
    outputs: list[WeightAdapter] = [
        OFT(None, blocks, acts_on="out", inverse=True),
        BOFT(blocks[None], form="lycoris"),
    ]
    for modules, layout, side in ((inputs, "kohya", "inputs"), (outputs, "peft", "outputs")):
        for module in modules:
            with pytest.raises(UnsupportedError, match=f"rotates {side}") as caught:
                encode(flux(module), layout)
            assert "--base" in str(caught.value)
            assert "--algorithm lora" in str(caught.value)
    for layout in ("diffusers", "bfl", "ai-toolkit"):
        with pytest.raises(UnsupportedError, match="has no keys for oft"):
            encode(flux(inputs[0]), layout)


def test_ia3_on_inputs_crosses_from_lycoris_to_peft_and_back(
    tmp_path: Path, rng: Generator
) -> None:
    flat = f"lycoris_{NAME.replace('.', '_')}"
    small = 1e-4 * draw(rng, 64)
    tensors = {f"{flat}.weight": small, f"{flat}.on_input": torch.tensor(1)}
    source = write(tmp_path / "a.safetensors", tensors)
    base = write(tmp_path / "base.safetensors", {f"{NAME}.weight": draw(rng, 64, 64)})
    convert(source, tmp_path / "peft", to="peft", base=base)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")[f"{KEY}.ia3_l"]
    assert stored.shape == (1, 64)
    torch.testing.assert_close(stored.reshape(-1).double(), 1 + small.double())
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["feedforward_modules"] == [NAME]
    convert(tmp_path / "peft", tmp_path / "back.safetensors", to="lycoris")
    back = load_file(tmp_path / "back.safetensors")
    torch.testing.assert_close(back[f"{flat}.weight"].float(), small)


def test_ia3_on_outputs_differs_by_the_bias_and_does_not_cross(
    tmp_path: Path, rng: Generator
) -> None:
    ours = peft(tmp_path, {"ia3_l": draw(rng, 6, 1)}, peft_type="IA3")
    with pytest.raises(UnsupportedError, match="scales the bias of its layer too"):
        convert(ours, tmp_path / "b.safetensors", to="lycoris")
    flat = IA3(draw(rng, 3072), acts_on="out", centred=True)
    with pytest.raises(UnsupportedError, match="leaves the bias of its layer alone"):
        encode(flux(flat), "peft")


def test_numbers_that_differ_between_modules_fit_no_peft_config(rng: Generator) -> None:
    path = "transformer:transformer_blocks.{}.attn.to_out.0"

    def both(a: WeightAdapter, b: WeightAdapter) -> Adapter:
        return Adapter({path.format(0): a, path.format(1): b}, "flux")

    with pytest.raises(UnsupportedError, match="one r for all modules"):
        encode(both(HRA(draw(rng, 3072, 2)), HRA(draw(rng, 3072, 4))), "peft")
    exact = OFT(draw(rng, 512, 15), inverse=True)
    with pytest.raises(UnsupportedError, match="kind of Cayley transform"):
        encode(both(OFT(draw(rng, 512, 15), series=5), exact), "peft")
    four, six = (BOFT(draw(rng, 1, 3072 // b, b, b), torch.ones(3072, 1)) for b in (4, 6))
    with pytest.raises(UnsupportedError, match="blocks of \\[4, 6\\]"):
        encode(both(four, six), "peft")
    lora = LoRA(draw(rng, 3072, 2), draw(rng, 2, 3072))
    with pytest.raises(UnsupportedError, match="holds one algorithm"):
        encode(both(HRA(draw(rng, 3072, 2)), lora), "peft")


# fused weights ------------------------------------------------------------------------------------

QKV = [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")]


def fused(module: WeightAdapter, folder: Path) -> Path:
    tensors = encode(flux(module), "kohya-hf").tensors[""]
    renamed = {
        k.replace("lora_unet_transformer_blocks_0_attn_to_out_0", NATIVE): t
        for k, t in tensors.items()
    }
    assert set(renamed) != set(tensors)
    return write(folder / "native.safetensors", renamed)


NATIVE = "lora_unet_double_blocks_0_img_attn_qkv"


def test_a_fused_weight_is_split_between_blocks(tmp_path: Path, rng: Generator) -> None:
    whole = OFT(None, 0.2 * draw(rng, 1536, 6, 6), acts_on="out", inverse=True)
    adapter = load_adapter(fused(whole, tmp_path))
    assert {p.partition(":")[2] for p in adapter.modules} == set(QKV)
    weight = draw(rng, 9216, 5)
    pieces = torch.split(whole.merged(weight)[0], 3072)
    for path, wanted in zip(QKV, pieces, strict=True):
        start = QKV.index(path) * 3072
        found = adapter.modules[f"transformer:{path}"].merged(weight[start : start + 3072])[0]
        torch.testing.assert_close(found, wanted)
    out = tmp_path / "back.safetensors"
    save_adapter(adapter, out, layout="kohya-ldm")
    joined = load_file(out)
    torch.testing.assert_close(joined[f"{NATIVE}.oft_blocks"], whole.blocks)


def test_a_block_across_the_border_keeps_the_weight_together(
    tmp_path: Path, rng: Generator
) -> None:
    whole = OFT(None, 0.2 * draw(rng, 1024, 9, 9), acts_on="out", inverse=True)
    adapter = load_adapter(fused(whole, tmp_path))
    (path,) = adapter.modules
    assert path.endswith("[to_q,to_k,to_v]")
    with pytest.raises(UnsupportedError, match="cannot be split there"):
        encode(adapter, "kohya-hf")
    encode(adapter, "kohya-ldm")


def test_one_rotation_of_a_fused_input_is_shared_by_its_parts(
    tmp_path: Path, rng: Generator
) -> None:
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    vector = draw(rng, 512, 15)
    source = write(tmp_path / "a.safetensors", {f"{name}.oft_R.weight": vector})
    adapter = load_adapter(source)
    assert {p.partition(":")[2] for p in adapter.modules} == set(QKV)
    again = encode(adapter, "onetrainer-comfy").tensors[""]
    assert torch.equal(again[f"{name}.oft_R.weight"], vector)
    del adapter.modules[f"transformer:{QKV[1]}"]
    with pytest.raises(UnsupportedError, match="one weight has one input"):
        encode(adapter, "onetrainer-comfy")


# damaged ------------------------------------------------------------------------------------------


def test_incomplete_and_misshapen_records_are_named(tmp_path: Path, rng: Generator) -> None:
    name = "lora_unet_double_blocks_0_img_attn_proj"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"a1.weight": draw(rng, 8, 2), "a2.weight": draw(rng, 2, 8)}, "b1, b2"),
        ({"rescale": torch.ones(8, 1)}, "needs blocks"),
        ({"on_input": torch.tensor(0)}, "needs vector"),
        ({"oft_blocks": draw(rng, 2, 4, 3)}, r"\(blocks, b, b\)"),
        ({"oft_blocks": draw(rng, 4, 4)}, "oft_blocks has shape"),
        ({"oft_blocks": draw(rng, 2, 4, 4), "alpha": torch.tensor(float("nan"))}, "damaged"),
        ({"oft_R.weight": draw(rng, 2, 4)}, "whole b"),
        ({"oft_blocks": draw(rng, 2, 4, 4), "dora_scale": torch.ones(8, 1)}, "DoRA"),
    ]
    for number, (tensors, message) in enumerate(cases):
        source = {f"{name}.{k}": t for k, t in tensors.items()}
        path = write(tmp_path / f"{number}.safetensors", source)
        with pytest.raises(UsageError, match=message):
            load_adapter(path, architecture="flux")


def test_glora_goes_through_the_layouts_that_hold_it(tmp_path: Path, rng: Generator) -> None:
    shapes = ((3072, 2), (2, 3072), (3072, 2), (2, 3072))
    module = GLoRA(*(0.1 * draw(rng, *s) for s in shapes), scale=0.75)
    for layout in ("kohya", "kohya-hf", "lycoris", "comfy"):
        encoded = encode(flux(module), layout)
        path = write(tmp_path / f"{layout}.safetensors", encoded.tensors[""])
        again = one(path, architecture="flux")
        assert difference(again, module) == 0
        assert float(again.scale) == 0.75
    folded = encode(flux(module), "kohya", fold_alpha=True).tensors[""]
    assert not [k for k in folded if k.endswith("alpha")]
    again = one(write(tmp_path / "folded.safetensors", folded), architecture="flux")
    assert difference(again, module) < 1e-6
    with pytest.raises(UnsupportedError, match="has no keys for glora"):
        encode(flux(module), "peft")
