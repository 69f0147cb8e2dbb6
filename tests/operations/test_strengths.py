"""Strengths: parsing, components, patterns, and block-weight lists with sd-scripts' meaning of
every number.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from peftsurgery.errors import UsageError
from peftsurgery.operations.strengths import BLOCK_LISTS, Strength, block_name, block_weights, parse
from tests.operations.merging import kohya_lora, saved, sd_ldm, sdxl_ldm, state, write

# sd-scripts networks/svd_merge_lora.py: the blocks each list length names, in its order (facts, by
# index 0 to 25)
NAMED = {
    12: [0, 5, 6, 8, 9, 13, 14, 15, 16, 17, 18, 19],
    17: [0, 2, 3, 5, 6, 8, 9, 13, 17, 18, 19, 20, 21, 22, 23, 24, 25],
    20: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22],
    26: list(range(26)),
}


PICKED = re.compile(r"conv1|samplers|conv_in|conv_out|proj_in|attn[12]\.to_q|linear_1|q_proj")


def index_sd(diffusers: str) -> int | None:
    """Block index of a diffusers UNet module name, as sd-scripts counts SD1.x; None outside the
    blocks.
    """
    match = re.match(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", diffusers
    )
    if match:
        block, kind, number = int(match[2]), match[3], int(match[4])
        if match[1] == "down":
            return 1 + (3 * (block + 1) if kind == "downsamplers" else 3 * block + number + 1)
        return 14 + (3 * block + 2 if kind == "upsamplers" else 3 * block + number)
    return 13 if diffusers.startswith("mid_block") else None


def index_sdxl(sgm: str) -> int | None:
    """Block index of an sgm module name, as sd-scripts counts SDXL; None outside the blocks."""
    head, _, rest = sgm.partition(".")
    number = int(rest.split(".")[0]) if rest.split(".")[0].isdigit() else 0
    return {"input_blocks": 1 + number, "middle_block": 13, "output_blocks": 14 + number}.get(head)


def adapter(
    folder: Path, builder: str
) -> tuple[Path, dict[str, torch.Tensor], dict[str, int | None]]:
    """A LoRA on some layers of every block of the UNet and on a text encoder; deltas and block
    indices by tensor name.
    """
    sdxl = "sdxl" in builder
    ldm = sdxl_ldm if sdxl else sd_ldm
    picked, homes, blocks = {}, {}, {}
    for name, tensor in state(saved(builder)).items():
        component, _, inner = name.partition(":")
        if not inner.endswith(".weight") or tensor.ndim < 2 or not PICKED.search(inner):
            continue
        if component == "unet":
            native = ldm(inner)
            key = "lora_unet_" + native.removesuffix(".weight").replace(".", "_")
            blocks[name] = index_sdxl(native) if sdxl else index_sd(inner)
            if native.startswith("input_blocks.0."):
                blocks[name] = 1
        elif component == "text_encoder" and "q_proj" in inner:
            module = inner.removeprefix("text_model.").removesuffix(".weight")
            key = f"lora_{'te1' if sdxl else 'te'}_text_model_{module.replace('.', '_')}"
            blocks[name] = 0
        else:
            continue
        picked[key], homes[key] = tensor, name
    file, deltas = kohya_lora(picked, seed=17, rank=1)
    return write(folder / "a.safetensors", file), {homes[k]: d for k, d in deltas.items()}, blocks


def factors(base: Path, out: Path, deltas: dict[str, torch.Tensor]) -> dict[str, float]:
    """Tensor name -> the strength its delta was merged with, by least squares."""
    before, after = state(base), state(out)
    found = {}
    for name, delta in deltas.items():
        change = (after[name].double() - before[name].double()).reshape(delta.shape)
        found[name] = float((change * delta).sum() / (delta * delta).sum())
    return found


@pytest.mark.parametrize(
    ("builder", "length"),
    [
        ("tiny_sd_pipeline", 17),
        ("tiny_sd_pipeline", 26),
        ("tiny_sdxl_pipeline", 12),
        ("tiny_sdxl_pipeline", 20),
    ],
)
def test_every_number_of_a_block_list_reaches_its_block(
    tmp_path: Path, builder: str, length: int
) -> None:
    family = "sdxl" if "sdxl" in builder else "sd1"
    file, deltas, blocks = adapter(tmp_path, builder)
    numbers = [round(0.1 + 0.07 * n, 2) for n in range(length)]
    mapping = tmp_path / "lbw.json"
    mapping.write_text(json.dumps(numbers))
    given = parse(f"{file}=@{mapping}")
    ps.merge(saved(builder), [given], tmp_path / "out", architecture=family)
    wanted = dict(zip(NAMED[length], numbers, strict=True))
    seen = set()
    for name, factor in factors(saved(builder), tmp_path / "out", deltas).items():
        index = blocks[name]
        expected = wanted.get(index, 1.0) if index is not None else 1.0
        assert factor == pytest.approx(expected, abs=2e-3), (name, index)
        seen.add(index)
    assert set(NAMED[length]) - {1} <= seen, "some block of the list has no module in this test"


def test_block_lists_have_the_order_of_sd_scripts() -> None:
    names = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
    for length, indices in NAMED.items():
        assert BLOCK_LISTS[length] == tuple(names[i] for i in indices)


def test_block_lists_of_the_other_family_are_refused(tmp_path: Path) -> None:
    file, _, _ = adapter(tmp_path, "tiny_sdxl_pipeline")
    strength = Strength(1.0, blocks=block_weights([1.0] * 17, "list"))
    with pytest.raises(UsageError, match="17 block weights are not for sdxl; expected 12 or 20"):
        ps.merge(
            saved("tiny_sdxl_pipeline"), [(file, strength)], tmp_path / "out", architecture="sdxl"
        )
    with pytest.raises(UsageError, match="13 block weights; expected 12, 17, 20, 26"):
        block_weights([1.0] * 13, "list")
    with pytest.raises(UsageError, match="must be numbers"):
        block_weights([*[1.0] * 11, True], "list")


def test_block_names() -> None:
    assert block_name("unet", "input_blocks.4.1.proj_in") == "IN04"
    assert block_name("unet", "output_blocks.11.0.in_layers.2") == "OUT11"
    assert block_name("unet", "middle_block.1.proj_in") == "M00"
    assert block_name("unet", "time_embed.0") is None
    assert block_name("text_encoder_2", None) == "BASE"


def test_components_and_patterns(tmp_path: Path) -> None:
    base = saved("tiny_sd_pipeline")
    file, deltas, _ = adapter(tmp_path, "tiny_sd_pipeline")
    report = ps.merge(
        base, [parse(f"{file}=unet:0.4,text_encoder:-0.5")], tmp_path / "c", architecture="sd1"
    )
    assert not any(finding.code == "strength-zero" for finding in report.findings)
    for name, factor in factors(base, tmp_path / "c", deltas).items():
        assert factor == pytest.approx(0.4 if name.startswith("unet:") else -0.5, abs=2e-3), name
    report = ps.merge(base, [parse(f"{file}=unet:0.4")], tmp_path / "u", architecture="sd1")
    assert any("strength 0" in finding.message for finding in report.findings)
    after = state(tmp_path / "u")
    for name, weight in state(base).items():
        if name.startswith("text_encoder:"):
            assert torch.equal(weight, after[name])
    patterns = {"unet:*attn2*": 0.25, "unet:mid_block*": 0.75, "*": 0.5}
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(patterns))
    ps.merge(base, [parse(f"{file}=@{path}")], tmp_path / "p", architecture="sd1")
    for name, factor in factors(base, tmp_path / "p", deltas).items():
        expected = 0.25 if "attn2" in name else 0.75 if name.startswith("unet:mid_block") else 0.5
        assert factor == pytest.approx(expected, abs=2e-3), name


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("=unet:1,text_encoder_2:0.5", "no component 'text_encoder_2'"),
        ('{"*attention9*": 1}', r"no module matches .*closest"),
    ],
)
def test_strengths_for_nothing_are_refused(tmp_path: Path, text: str, why: str) -> None:
    file, _, _ = adapter(tmp_path, "tiny_sd_pipeline")
    if text.startswith("{"):
        (tmp_path / "m.json").write_text(text)
        text = f"=@{tmp_path / 'm.json'}"
    with pytest.raises(UsageError, match=why):
        ps.merge(
            saved("tiny_sd_pipeline"),
            [parse(f"{file}{text}")],
            tmp_path / "out",
            architecture="sd1",
        )


def test_parsing() -> None:
    assert parse("a.safetensors") == ("a.safetensors", Strength())
    assert parse("a=0.5") == ("a", Strength(0.5))
    assert parse("a=-1") == ("a", Strength(-1.0))
    assert parse("x=y.safetensors") == ("x=y.safetensors", Strength())
    assert parse("x=1/file") == ("x=1/file", Strength())
    assert parse("a=unet:0.8,text_encoder:0.5")[1].components == {"unet": 0.8, "text_encoder": 0.5}
    for wrong in ("a=strong", "a=unet:x", "a=0.5,0.6"):
        with pytest.raises(UsageError, match="is no strength"):
            parse(wrong)
    for endless in ("a=nan", "a=inf", "a=unet:nan"):
        with pytest.raises(UsageError, match="finite"):
            parse(endless)


@pytest.mark.parametrize("text", ["{", "3", '{"a": "x"}', '{"a": true}', "[1, 2]"])
def test_mapping_files_that_say_nothing_usable(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(str(path))):
        parse(f"a=@{path}")
    with pytest.raises(UsageError, match="cannot be read"):
        parse(f"a=@{tmp_path / 'missing.json'}")
