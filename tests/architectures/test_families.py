"""The facts in the tables beside the rows: prefixes, vocabularies, pins, aliases."""

from __future__ import annotations

import re
from itertools import product

import pytest

from peftsurgery import architectures
from peftsurgery.architectures import ARCHITECTURES, Architecture
from peftsurgery.errors import UsageError

from .listings import CASES, Case

FAMILIES = ("kohya", "onetrainer", "lycoris", "comfy", "diffusers", "checkpoint")


@pytest.fixture(params=ARCHITECTURES)
def family(request: pytest.FixtureRequest) -> Architecture:
    return architectures.get(request.param)


def test_vocabularies_are_columns_and_go_with_prefixes(family: Architecture) -> None:
    for component in family.components.values():
        assert component.home == component.columns[0]
        assert component.prefixes.keys() == component.vocabularies.keys() <= set(FAMILIES)
        assert {c for v in component.vocabularies.values() for c in v} <= set(component.columns)
        assert all(component.prefixes.values())
        assert all(component.vocabularies.values())
        for layout, prefixes in component.prefixes.items():
            dots = {p.endswith(".") for p in prefixes if p}
            assert dots <= {layout == "checkpoint"}


def test_prefixes_written_are_distinct(family: Architecture) -> None:
    for layout in FAMILIES:
        written = [
            c.prefixes[layout][0] for c in family.components.values() if layout in c.prefixes
        ]
        assert len(written) == len(set(written)) or layout == "checkpoint"


def test_pins_name_modules_of_the_table(family: Architecture) -> None:
    for pin in family.pins:
        table = family.components[pin.component]
        paths = [pin.template.format(*n) for n in product("012", repeat=pin.template.count("{}"))]
        assert any(table.site(table.home, path) for path in paths), pin
        assert all(family.pin(pin.component, path) == pin for path in paths)
        assert (pin.out, pin.in_) != (None, None)
    for component, blocks in family.blocks.items():
        table = family.components[component]
        templates = [re.sub(r"(?<=\.)\d+(?=\.)", "{}", t) for t in table.templates(table.home)]
        for head in blocks:
            general = re.sub(r"(?<=\.)\d+(?=\.)", "{}", f"{head}.{{}}.")
            assert any(t.startswith(general) for t in templates), head


@pytest.mark.parametrize("case", [c for c in CASES if c.column == c.table.home], ids=str)
def test_pins_hold_for_the_real_shapes(case: Case) -> None:
    family = architectures.get(case.architecture)
    pinned = 0
    for name, shape in case.home_shapes().items():
        path, _, parameter = name.rpartition(".")
        if parameter != "weight" or len(shape) < 2:
            continue
        assert family.misfit(case.component, path, shape[0], shape[1]) is None
        pin = family.pin(case.component, path)
        if pin is not None:
            pinned += 1
            assert family.misfit(case.component, path, shape[0] + 1, shape[1] + 1)
    assert pinned


def test_unets_tell_each_other_apart() -> None:
    """The others refuse each cross attention of a UNet by its shape, or do not know it."""
    unets = {c.architecture: c for c in CASES if c.component == "unet" and c.column == "diffusers"}
    assert set(unets) == {"sd1", "sd2", "sdxl"}
    for case in unets.values():
        for name, shape in case.home_shapes().items():
            if not name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):
                continue
            path = name.removesuffix(".weight")
            for other in unets.keys() - {case.architecture}:
                family = architectures.get(other)
                known = family.components["unet"].site("diffusers", path)
                assert known is None or family.misfit("unet", path, *shape)


def test_shortened_text_encoder_names_are_read() -> None:
    table = architectures.get("sd1").components["text_encoder"]
    long, short = "text_model.encoder.layers.3.mlp.fc1", "encoder.layers.3.mlp.fc1"
    site, flat = table.site("hf", short), table.site_flat("hf", "encoder_layers_3_mlp_fc1")
    assert site is not None
    assert flat is not None
    assert site.parts == flat.parts == (long,)
    assert site.name == short
    written = table.site_of("hf", long)
    assert written is not None
    assert written.name == long
    assert table.site_of("hf", short) is None


def test_unknown_family_and_vocabulary() -> None:
    with pytest.raises(UsageError, match=r"no architecture 'sdx'.*closest: sdxl"):
        architectures.get("sdx")
    table = architectures.get("flux").components["transformer"]
    with pytest.raises(UsageError, match="no vocabulary 'ldm'"):
        table.site("ldm", "x")
    assert table.closest("bfl", "double_blocks_0_img_modlin", flat=True)[0] == (
        "double_blocks_0_img_mod_lin"
    )


def test_llm_facts() -> None:
    llm = architectures.get("llm")
    assert {"embed_tokens", "wte", "wpe", "shared"} <= llm.embeddings
    assert llm.conv1d == {"c_attn", "c_proj", "c_fc"}
