"""AdaLoRA, VeRA, FourierFT, C3A, MiSS and SHiRA in files: conventions, what crosses layouts, what
is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from peftsurgery import convert, load_adapter, save_adapter
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import (
    C3A,
    AdaLoRA,
    Bat,
    FourierFT,
    MiSS,
    SHiRA,
    VeRA,
    WeightAdapter,
    difference,
)
from peftsurgery.codec import encode
from peftsurgery.errors import UnsupportedError, UsageError
from tests.codec.build import write

NAME = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{NAME}"


def draw(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


def peft(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """A folder; a key that begins with `=` is whole."""
    named = {k[1:] if k[0] == "=" else f"{KEY}.{k}": t for k, t in tensors.items()}
    write(folder / "adapter_model.safetensors", named)
    if config:
        text = json.dumps({"target_modules": ["q_proj"], **config})
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder


def one(path: Path, **options: object) -> WeightAdapter:
    modules = load_adapter(path, **options).modules  # type: ignore[arg-type]
    assert len(modules) == 1
    return next(iter(modules.values()))


def llm(**modules: WeightAdapter) -> Adapter:
    paths = {f"model:model.layers.{n}.self_attn.{p}": m for p, m in modules.items() for n in (0,)}
    return Adapter(paths, "llm")


def adalora(rng: Generator, rank: int = 4) -> dict[str, Tensor]:
    return {
        "lora_E": draw(rng, rank, 1),
        "lora_A": draw(rng, rank, 6),
        "lora_B": draw(rng, 8, rank),
    }


# AdaLoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("E", "A", "B"), ("A", "E", "B"), ("B", "A", "E")])
@pytest.mark.parametrize("adapter_name", ["", ".default"])
def test_a_diagonal_beside_the_factors_makes_it_adalora(
    order: tuple[str, ...], adapter_name: str, tmp_path: Path, rng: Generator
) -> None:
    found = adalora(rng)
    tensors = {f"lora_{n}{adapter_name}": found[f"lora_{n}"] for n in order}
    module = one(peft(tmp_path, tensors, peft_type="ADALORA", init_r=12, lora_alpha=32))
    assert isinstance(module, AdaLoRA)
    assert float(module.scale) == pytest.approx(32 / (12 + 1e-5), rel=1e-7)
    wanted = found["lora_B"] @ torch.diag(found["lora_E"][:, 0]) @ found["lora_A"]
    torch.testing.assert_close(module.delta(), wanted * float(module.scale))


def test_adalora_without_a_config_has_scale_1_and_says_so(tmp_path: Path, rng: Generator) -> None:
    source = peft(tmp_path, adalora(rng)) / "adapter_model.safetensors"
    adapter = load_adapter(source)
    assert "no-adapter-config" in {f.code for f in adapter.findings}
    assert float(next(iter(adapter.modules.values())).scale) == 1


def test_masks_of_pruned_ranks_survive_and_are_made_where_missing(
    tmp_path: Path, rng: Generator
) -> None:
    mask = [False, True, True, False, True, True]
    pattern = {f"{NAME}.lora_E": mask}
    config = {"peft_type": "ADALORA", "init_r": 6, "lora_alpha": 8, "rank_pattern": pattern}
    adapter = load_adapter(peft(tmp_path, adalora(rng), **config))
    assert encode(adapter, "peft").configs[""]["rank_pattern"] == pattern
    adapter.config = {}
    made = encode(adapter, "peft").configs[""]
    assert made["init_r"] == 4
    assert "rank_pattern" not in made
    pair = llm(q_proj=AdaLoRA(draw(rng, 8, 3), draw(rng, 3, 1), draw(rng, 3, 6)))
    pair.modules["model:model.layers.1.self_attn.q_proj"] = AdaLoRA(
        draw(rng, 8, 5), draw(rng, 5, 1), draw(rng, 5, 6)
    )
    config = encode(pair, "peft").configs[""]
    assert config["init_r"] == 5
    flags = config["rank_pattern"]
    assert isinstance(flags, dict)
    assert flags[f"{NAME}.lora_E"] == [True] * 3 + [False] * 2
    assert config["lora_alpha"] == pytest.approx(5 + 1e-5)
    save_adapter(pair, tmp_path / "b", layout="peft")
    for path, module in load_adapter(tmp_path / "b").modules.items():
        assert difference(module, pair.modules[path]) == 0


@pytest.mark.parametrize("field", ["init_r", "lora_alpha"])
def test_a_config_that_is_no_number_is_named(field: str, tmp_path: Path, rng: Generator) -> None:
    config = {"peft_type": "ADALORA", "init_r": 6, "lora_alpha": 8, field: "many"}
    with pytest.raises(UsageError, match=field):
        load_adapter(peft(tmp_path, adalora(rng), **config))


# VeRA ---------------------------------------------------------------------------------------------


def vectors(rng: Generator, o: int = 8, r: int = 3) -> dict[str, Tensor]:
    return {"vera_lambda_b": draw(rng, o), "vera_lambda_d": draw(rng, r)}


def test_projections_are_one_pair_for_all_modules(tmp_path: Path, rng: Generator) -> None:
    down, up = draw(rng, 3, 9), draw(rng, 11, 3)
    other = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors = {**vectors(rng), "=base_model.vera_A": down, "=base_model.vera_B": up}
    tensors |= {f"={other}.{k}": t for k, t in vectors(rng, 11).items()}
    adapter = load_adapter(peft(tmp_path / "a", tensors, peft_type="VERA", r=3))
    assert len(adapter.modules) == 2
    for module in adapter.modules.values():
        assert isinstance(module, VeRA)
        assert torch.equal(module.on((module.shape[0], 9)).factors()[1], down)  # type: ignore[index]
    encoded = encode(adapter, "peft")
    assert set(encoded.tensors[""]) == set(load_file(tmp_path / "a/adapter_model.safetensors"))
    assert len(encoded.sources["base_model.vera_A"]) == 2
    adapter.modules[f"model:{NAME}"] = adapter.modules[f"model:{NAME}"].with_tensors(up=up + 1)
    with pytest.raises(UnsupportedError, match="another module has a different one"):
        encode(adapter, "peft")


def test_half_of_the_projections_or_none_is_named(tmp_path: Path, rng: Generator) -> None:
    own = vectors(rng)
    config = {"peft_type": "VERA", "r": 3, "projection_prng_key": 0}
    pair = {"=base_model.vera_A": draw(rng, 3, 9)}
    with pytest.raises(UsageError, match="vera_B beside"):
        load_adapter(peft(tmp_path / "a", own | pair, **config))
    with pytest.raises(UsageError, match="incomplete"):
        load_adapter(peft(tmp_path / "b", own, **config))
    with pytest.raises(UsageError, match="incomplete"):
        load_adapter(peft(tmp_path / "c", own) / "adapter_model.safetensors")
    lone = {**adalora(rng), "=base_model.vera_A": draw(rng, 3, 9)}
    with pytest.raises(UsageError, match=r"base_model\.vera_A"):
        load_adapter(peft(tmp_path / "d", lone, peft_type="ADALORA"))


def test_drawn_projections_keep_their_seed_and_need_all_their_layers(
    tmp_path: Path, rng: Generator
) -> None:
    config = {"peft_type": "VERA", "r": 3, "projection_prng_key": 77, "save_projection": False}
    other = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors = vectors(rng) | {f"={other}.{k}": t for k, t in vectors(rng, 12).items()}
    source = peft(tmp_path / "a", tensors, **config)
    adapter = load_adapter(source)
    assert {m.widest for m in adapter.modules.values() if isinstance(m, VeRA)} == {(12, 0)}
    made = encode(adapter, "peft").configs[""]
    assert (made["projection_prng_key"], made["save_projection"]) == (77, False)
    assert not any("vera_A" in key for key in encode(adapter, "peft").tensors[""])
    del adapter.modules["model:model.layers.1.self_attn.q_proj"]
    with pytest.raises(UnsupportedError, match="largest of the layers"):
        encode(adapter, "peft")
    with pytest.raises(UsageError, match=r"--drop matches .*layers\.1.*by its path"):
        convert(source, tmp_path / "b", to="peft", drop=["*layers.1.*vera_lambda*"])
    assert not (tmp_path / "b").exists()


# shapes and places --------------------------------------------------------------------------------


def test_frequencies_without_a_config_are_refused(tmp_path: Path, rng: Generator) -> None:
    tensors = {"fourierft_spectrum": draw(rng, 5)}
    with pytest.raises(UsageError, match="random_loc_seed"):
        load_adapter(peft(tmp_path / "a", tensors) / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="scaling"):
        load_adapter(peft(tmp_path / "b", tensors, peft_type="FOURIERFT", scaling="much"))
    module = one(
        peft(tmp_path / "c", tensors, peft_type="FOURIERFT", scaling=90, random_loc_seed=4)
    )
    assert isinstance(module, FourierFT)
    assert (module.seed, float(module.scale), module.shape) == (4, 90.0, (0, 0))


@pytest.mark.parametrize("key", ["miss_block", "bone_block"])
def test_the_form_of_miss_stands_in_dimensions_and_config(
    key: str, tmp_path: Path, rng: Generator
) -> None:
    kind = key.partition("_")[0].upper()
    plain = one(peft(tmp_path / "a", {key: draw(rng, 4, 8)}, peft_type=kind, r=4))
    mini = one(
        peft(tmp_path / "b", {key: draw(rng, 4, 8)}, peft_type=kind, r=4, init_weights="mini")
    )
    bat = one(
        peft(tmp_path / "c", {key: draw(rng, 2, 4, 4)}, peft_type=kind, r=4, init_weights="bat")
    )
    assert isinstance(plain, MiSS)
    assert isinstance(mini, MiSS)
    assert isinstance(bat, Bat)
    assert (plain.shape, mini.shape, bat.shape) == ((8, 0), (0, 0), (8, 0))
    assert (plain.mini, mini.mini) == (False, True)
    for module in (plain, mini, bat):
        encoded = encode(llm(q_proj=module), "peft")
        assert encoded.configs[""]["peft_type"] == "MISS"
        assert set(encoded.tensors[""]) == {f"{KEY}.miss_block"}


def test_a_scale_that_peft_does_not_have_goes_into_the_tensors(
    tmp_path: Path, rng: Generator
) -> None:
    places = torch.tensor([[0, 1] * 7, [3, 2] * 7])
    modules = (
        VeRA(draw(rng, 8), draw(rng, 3), draw(rng, 3, 6), draw(rng, 8, 3), scale=0.3),
        C3A(draw(rng, 4, 3, 2), scale=0.3),
        MiSS(draw(rng, 3, 8), scale=0.3),
        SHiRA(draw(rng, 14), places, sized=(8, 6), scale=0.3),
        FourierFT(draw(rng, 5), scale=0.3),
        AdaLoRA(draw(rng, 8, 3), draw(rng, 3, 1), draw(rng, 3, 6), scale=0.3),
    )
    for n, module in enumerate(modules):
        save_adapter(llm(q_proj=module), tmp_path / str(n), layout="peft")
        assert difference(one(tmp_path / str(n)), module) < 1e-6


def test_what_one_config_cannot_say_is_named(rng: Generator) -> None:
    def lora(rank: int, scale: float = 1.0) -> AdaLoRA:
        return AdaLoRA(draw(rng, 8, rank), draw(rng, rank, 1), draw(rng, rank, 6), scale=scale)

    pair = draw(rng, 5, 6), draw(rng, 8, 5)
    places = torch.tensor([[0], [1]])
    both: list[tuple[WeightAdapter, WeightAdapter, str]] = [
        (lora(3), lora(3, 0.5), "one lora_alpha"),
        (
            VeRA(draw(rng, 8), draw(rng, 3), *pair),
            VeRA(draw(rng, 8), draw(rng, 4), *pair),
            "one r",
        ),
        (FourierFT(draw(rng, 4), seed=1), FourierFT(draw(rng, 4), seed=2), "one random_loc_seed"),
        (FourierFT(draw(rng, 4), scale=2.0), FourierFT(draw(rng, 4)), "one scaling"),
        (MiSS(draw(rng, 3, 8)), MiSS(draw(rng, 4, 8)), "one r"),
        (MiSS(draw(rng, 3, 8)), MiSS(draw(rng, 3, 8), mini=True), "one init_weights"),
        (MiSS(draw(rng, 3, 4), mini=True), MiSS(draw(rng, 3, 8), mini=True), "one mini_r"),
        (Bat(draw(rng, 4, 2, 2)), Bat(draw(rng, 2, 4, 4)), "one r"),
        (Bat(draw(rng, 4, 2, 2)), MiSS(draw(rng, 2, 8)), "one algorithm"),
        (SHiRA(draw(rng, 1), places), SHiRA(draw(rng, 1), places), "depends on the weight's shape"),
        (SHiRA(draw(rng, 1), places, sized=(8, 6)), lora(2), "one algorithm"),
    ]
    for first, second, reason in both:
        with pytest.raises(UnsupportedError, match=reason):
            encode(llm(q_proj=first, k_proj=second), "peft")
    with pytest.raises(UnsupportedError, match="not r times 8"):
        encode(llm(q_proj=SHiRA(draw(rng, 1), places, sized=(8, 6))), "peft")


@pytest.mark.parametrize("to", ["kohya", "comfy", "diffusers"])
def test_other_layouts_have_no_keys_for_them(to: str, rng: Generator) -> None:
    path = "transformer:transformer_blocks.0.attn.to_out.0"
    for module in (
        C3A(draw(rng, 4, 3, 2)),
        MiSS(draw(rng, 3, 8)),
        AdaLoRA(draw(rng, 8, 2), draw(rng, 2, 1), draw(rng, 2, 6)),
    ):
        with pytest.raises(UnsupportedError, match=f"no keys for {module.algorithm}"):
            encode(Adapter({path: module}, "flux"), to)


def test_an_unknown_number_of_rows_stays_on_the_fused_weight(
    tmp_path: Path, rng: Generator
) -> None:
    key = "base_model.model.double_blocks.0.img_attn.qkv"
    tensors = {f"={key}.fourierft_spectrum": draw(rng, 5)}
    config = {"peft_type": "FOURIERFT", "random_loc_seed": 3, "scaling": 2.0}
    source = peft(tmp_path / "a", tensors, **config)
    adapter = load_adapter(source, architecture="flux")
    (path,) = adapter.modules
    assert path == "transformer:transformer_blocks.0.attn.[to_q,to_k,to_v]"
    with pytest.raises(UnsupportedError, match="cannot be split there"):
        encode(adapter, "peft")


def test_types_and_conv1d_that_peft_does_not_have(tmp_path: Path, rng: Generator) -> None:
    key = "=base_model.model.transformer.h.0.attn.c_attn"
    config = {"peft_type": "C3A", "fan_in_fan_out": True, "block_size": 2}
    source = peft(tmp_path, {f"{key}.c3a_kernel": draw(rng, 3, 1, 2)}, **config)
    with pytest.raises(UnsupportedError, match="Conv1D"):
        load_adapter(source)


def test_records_that_lack_a_tensor_are_named(tmp_path: Path, rng: Generator) -> None:
    cases: list[tuple[dict[str, Tensor], str, str]] = [
        ({"lora_E": draw(rng, 4, 1), "lora_A": draw(rng, 4, 6)}, "ADALORA", "adalora needs up"),
        ({"vera_lambda_b": draw(rng, 4)}, "VERA", "vera needs lambda_d"),
        ({"shira_weight": draw(rng, 4)}, "SHIRA", "shira needs indices"),
        ({"c3a_kernel": draw(rng, 4)}, "C3A", "in / b"),
        ({"miss_block": draw(rng, 4)}, "MISS", r"\(rank, outputs\)"),
        (
            {"shira_weight": draw(rng, 4), "shira_indices": torch.zeros(2, 3).int()},
            "SHIRA",
            r"\(2, 4\)",
        ),
        (
            {"lora_E": draw(rng, 3, 1), "lora_A": draw(rng, 4, 6), "lora_B": draw(rng, 8, 4)},
            "ADALORA",
            r"\(4, 1\)",
        ),
    ]
    for n, (tensors, kind, message) in enumerate(cases):
        with pytest.raises(UsageError, match=message):
            load_adapter(peft(tmp_path / str(n), tensors, peft_type=kind))


def test_convert_to_lora_names_what_is_missing(tmp_path: Path, rng: Generator) -> None:
    tensors = {"miss_block": draw(rng, 4, 8)}
    source = peft(tmp_path / "a", tensors, peft_type="MISS", r=4)
    with pytest.raises(UnsupportedError, match="do not tell its shape"):
        convert(source, tmp_path / "b", to="peft", algorithm="lora")
