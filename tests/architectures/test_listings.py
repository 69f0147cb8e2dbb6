"""Every table against real key listings, in every vocabulary and both directions."""

from __future__ import annotations

import random
import re
from functools import partial

import pytest

from peftsurgery import architectures
from peftsurgery.architectures import Component, Site, flatten, index_flat
from tests.counting import calls

from .listings import CASES, OTHER_KEYS, Case, shapes

PARAMETER = re.compile(r"[._](weight|bias|scale)$")


def modules(case: Case) -> list[str]:
    """Module names of the listing as the table sees them: parameter removed."""
    return sorted({PARAMETER.sub("", name) for name in case.shapes()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensor_names_are_mapped_one_to_one(case: Case) -> None:
    table, home = case.table, case.home_shapes()
    covered: list[str] = []
    for name, shape in case.shapes().items():
        site = table.tensor(case.column, name)
        assert site is not None, f"{name} is not explained"
        assert (site.column, site.name) == (case.column, name)
        covered += site.parts
        assert all(part.endswith(f".{site.parameter}") for part in site.parts)
        for part in site.parts:
            back = table.tensor_of(case.column, part)
            assert back is not None
            if table.site(table.home, name.rpartition(".")[0]) is None:  # not an alias
                assert back == site
        parts = [home[part] for part in site.parts]
        if site.operator == "transpose":
            parts = [part[::-1] for part in parts]
        if len(parts) == 1:
            assert parts[0] == shape or parts[0] == (*shape, 1, 1)  # proj_in of 1x1 or linear
            continue
        assert sum(part[0] for part in parts) == shape[0]
        assert all(part[1:] == shape[1:] for part in parts)
        ranges = site.row_ranges(shape[0])
        assert [stop - start for start, stop in ranges] == [part[0] for part in parts]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == shape[0]
    if case.listing != "base__transformers_t5_xxl_encoder":
        assert len(covered) == len(set(covered))
    absent = set(home) ^ set(covered)
    assert not absent, sorted(absent)[:9]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_modules_dotted_and_flattened(case: Case) -> None:
    table, names = case.table, modules(case)
    assert len(index_flat(names)) == len(names)  # no two flatten alike
    for name in names:
        site = table.site(case.column, name)
        assert site is not None, name
        assert site.name == name
        flat = table.site_flat(case.column, flatten(name))
        assert flat is not None, name
        assert flat.parts == site.parts
        assert (flat.proportions, flat.operator) == (site.proportions, site.operator)
        for path in (*site.parts, site.home):
            back = table.site_of(case.column, path)
            assert back == flat, path
        for path in site.parts:
            assert table.site(table.home, path) == Site(table.home, path, (path,))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unknown_names_are_none(case: Case) -> None:
    table = case.table
    for name in modules(case)[::17]:
        for wrong in (f"{name}x", f"x{name}", f"{name}.x", name.rpartition(".")[0] + ".", ""):
            assert table.site(case.column, wrong) is None
            assert table.tensor(case.column, f"{wrong}.weight") is None
            assert table.site_of(case.column, wrong) is None
        with_zero = re.sub(r"\.(\d)(?=\.|$)", r".0\1", name)
        if with_zero != name:
            assert table.site(case.column, with_zero) is None


def test_no_key_of_a_listing_is_left() -> None:
    """Each key of a whole-model file is in a component above, or listed as something else."""
    for listing in sorted({case.listing for case in CASES if "sdmecha" in case.listing}):
        cases = [case for case in CASES if case.listing == listing]
        for key in shapes(listing):
            owners = [c for c in cases if key.startswith(c.prefix)]
            if any(re.fullmatch(c.ignored, key.removeprefix(c.prefix)) for c in owners):
                continue
            assert len(owners) == 1 or re.fullmatch(OTHER_KEYS, key), f"{listing}: {key}"


def test_every_row_is_met() -> None:
    """No template that no listing contains, but for modules these models happen not to have."""
    unmet: set[tuple[str, str, str]] = set()
    for name in ("sd1", "sdxl", "flux"):
        for component in architectures.get(name).components.values():
            own = [c for c in CASES if c.architecture == name and c.table is component]
            for column in {c.column for c in own}:
                names = {
                    re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", m)
                    for c in own
                    if c.column == column
                    for m in (*modules(c), *(p for p in c.home_shapes() if column == c.table.home))
                }
                for template in component.templates(column):
                    general = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", template)
                    shortcut = template.endswith((".conv_shortcut", ".skip_connection"))
                    if general not in names and not shortcut:  # where the width changes only
                        unmet.add((name, component.name, template))
    assert unmet == {(a, "text_encoder", "text_projection") for a in ("sd1", "sdxl", "flux")}


def test_sd2_in_ldm_names() -> None:
    """SD 2 files name the UNet as SD 1 files do, and the encoder as SDXL does its second."""
    sd2 = architectures.get("sd2")
    for component, column, listing, like in (
        ("unet", "ldm", "base__diffusers_sd21_unet", "model.diffusion_model."),
        ("text_encoder", "openclip", "base__transformers_clip_h", "conditioner.embedders.1.model."),
    ):
        table = sd2.components[component]
        names: set[str] = set()
        for name in shapes(listing):
            home = table.tensor(table.home, name)
            assert home is not None, name
            site = table.tensor_of(column, home.parts[0])
            assert site is not None, name
            assert table.tensor(column, site.name) == site
            names.add(site.name)
        whole = "sd1-ldm" if column == "ldm" else "sdxl-sgm"
        expected = {
            key.removeprefix(like)
            for key in shapes(f"base__sdmecha_{whole}")
            if key.startswith(like)
        }
        if column == "openclip":  # 23 of 32 layers, neither projection nor logit scale
            deep = re.compile(
                r"transformer\.resblocks\.(2[3-9]|3\d)\..*|text_projection|logit_scale"
            )
            expected = {name for name in expected if not deep.fullmatch(name)}
        assert names == expected


def test_a_long_file_is_resolved_quickly() -> None:
    """2500 names, table included: some twenty calls a name; the bound catches a change of order."""
    flat = [flatten(m) for c in CASES if c.column == "ldm" for m in modules(c)]
    names = random.Random(0).choices([n for n in flat if "label_emb" not in n], k=2500)
    architectures.get.cache_clear()

    def resolve() -> None:
        table: Component = architectures.get("sdxl").components["unet"]
        assert any(list(map(partial(table.site_flat, "ldm"), names)))

    assert calls(resolve) < 200_000
