"""The reader: random small tables inverted, templates, and every way a table can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.architectures import Trie, expand, flatten, group, index_flat, load
from peftsurgery.errors import UnsupportedError, UsageError

SEGMENT = st.text("abc_", min_size=1, max_size=3).filter(lambda s: s.strip("_") == s)
NAME = st.lists(SEGMENT, min_size=1, max_size=4).map(".".join)
TEMPLATE = st.lists(st.one_of(SEGMENT, st.just("{}")), min_size=1, max_size=4).map(".".join)


def table(tmp_path: Path, text: str, name: str = "tiny") -> Path:
    path = tmp_path / f"{name}.toml"
    path.write_text(f'title = "tiny"\n{text}', encoding="utf-8")
    return path


@st.composite
def _rows(draw: st.DrawFn) -> list[tuple[list[str], str]]:
    """Rows (home modules, other module) that are unambiguous in both columns."""
    found: list[tuple[list[str], str]] = []
    for i in range(draw(st.integers(1, 6))):
        head, other = draw(TEMPLATE), draw(TEMPLATE)
        count = max(head.count("{}"), other.count("{}"))
        head += ".{}" * (count - head.count("{}"))
        other += ".{}" * (count - other.count("{}"))
        tails = draw(st.lists(SEGMENT, min_size=1, max_size=3, unique=True))
        found.append(([f"home{i}.{head}.{tail}" for tail in tails], f"other{i}.{other}"))
    return found


@settings(max_examples=60, deadline=None)
@given(_rows(), st.lists(st.integers(0, 120), min_size=9, max_size=9))
def test_random_tables_are_inverted(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[list[str], str]], ints: list[int]
) -> None:
    lines = ", ".join(f'["{group(homes)}", "{other}"]' for homes, other in rows)
    text = f'[components.c]\ncolumns = ["h", "o"]\nrows = [{lines}]\n'
    component = load(table(tmp_path_factory.mktemp("t"), text)).components["c"]
    for homes, other in rows:
        numbers = ints[: other.count("{}")]
        parts = tuple(h.format(*numbers) for h in homes)
        name = other.format(*numbers)
        site = component.site("o", name)
        assert site is not None
        assert (site.name, site.parts) == (name, parts)
        assert component.site_of("o", site.home) == site
        for part in parts:
            assert component.site_of("o", part) == site
            own = component.site("h", part)
            assert own is not None
            assert own.parts == (part,)
        for parameter in ("weight", "bias"):
            tensor = component.tensor("o", f"{name}.{parameter}")
            assert tensor is not None
            assert tensor.parts == tuple(f"{part}.{parameter}" for part in parts)
            assert all(component.tensor_of("o", part) == tensor for part in tensor.parts)
        assert component.site_flat("o", flatten(name)) == site


@given(st.lists(NAME, min_size=1, max_size=12, unique=True))
def test_flattened_names_are_found_again_or_refused(names: list[str]) -> None:
    if len({flatten(name) for name in names}) < len(names):
        with pytest.raises(UnsupportedError, match="flatten to it"):
            index_flat(names)
    else:
        assert {flatten(n): n for n in names} == index_flat(names)


@given(st.lists(TEMPLATE, min_size=1, max_size=8, unique=True), st.lists(st.integers(0, 99)))
def test_trie_finds_all_templates_and_only_those(templates: list[str], ints: list[int]) -> None:
    for separator in ".", "_":
        trie: Trie[str] = Trie(separator)
        kept = {flatten(t) if separator == "_" else t: t for t in templates}
        for template in kept.values():
            trie.add(template, template)
        for template in kept.values():
            if len(ints) < template.count("{}"):
                continue
            name = template.format(*ints)
            name = flatten(name) if separator == "_" else name
            found = {
                (t := value.format(*numbers), flatten(t))[separator == "_"]
                for value, numbers in trie.find(name)
            }
            assert found == {name}
            assert template in [value for value, _ in trie.find(name)]
        assert trie.find("zzz") == []


@given(st.lists(NAME, min_size=1, max_size=4, unique=True))
def test_group_is_undone_by_expand(names: list[str]) -> None:
    assert expand(group(names)) == tuple(names)


def test_expand_takes_the_product_of_brackets() -> None:
    assert expand("[a,b].x.[c,d.e]") == ("a.x.c", "a.x.d.e", "b.x.c", "b.x.d.e")
    assert expand("plain.{}") == ("plain.{}",)


def test_ambiguity_names_both(tmp_path: Path) -> None:
    text = '[components.c]\ncolumns = ["h"]\nrows = ["a.b_c", "a_b.c", "x.{}.y", "x.0.y"]\n'
    component = load(table(tmp_path, text)).components["c"]
    with pytest.raises(UnsupportedError, match=r"'a\.b_c'.*'a_b\.c'|'a_b\.c'.*'a\.b_c'"):
        component.site_flat("h", "a_b_c")
    with pytest.raises(UnsupportedError, match="it stands for both"):
        component.site("h", "x.0.y")
    site = component.site("h", "x.1.y")
    assert site is not None
    assert site.parts == ("x.1.y",)


def test_joints_parameters_and_absent_modules(tmp_path: Path) -> None:
    text = """
[components.c]
columns = ["h", "o", "p"]
rows = [
  ["l.{}.[q,k,v]", "r.{}.in_", "", "1:1:2"],
  ["l.{}.n.weight", "r.{}.n.gamma", "p.{}.scale"],
  ["l.{}.n.bias", "r.{}.n.beta", ""],
  ["l.{}.table", "r.{}.modulation", "", "parameter"],
]
"""
    component = load(table(tmp_path, text)).components["c"]
    fused = component.tensor("o", "r.4.in_bias")
    assert fused is not None
    assert fused.parts == ("l.4.q.bias", "l.4.k.bias", "l.4.v.bias")
    assert fused.row_ranges(12) == ((0, 3), (3, 6), (6, 12))
    with pytest.raises(UsageError, match="13 rows cannot be cut 1:1:2"):
        fused.row_ranges(13)
    assert component.tensor("o", "r.4.in.bias") is None
    assert component.tensor("o", "r.4.n.weight") is None
    assert component.tensor_of("o", "l.4.n.other") is None
    for name, part, parameter in (
        ("r.4.n.gamma", "l.4.n.weight", "weight"),
        ("r.4.n.beta", "l.4.n.bias", "bias"),
        ("r.4.modulation", "l.4.table", "table"),
    ):
        site = component.tensor("o", name)
        assert site is not None
        assert (site.parts, site.parameter) == ((part,), parameter)
        assert component.tensor_of("o", part) == site
    norm = component.site("o", "r.4.n")
    assert norm is not None
    assert norm.parts == ("l.4.n",)
    assert component.site_of("p", "l.4.q") is None
    assert component.site_of("o", "l.4.[q,k]") is None
    scale = component.tensor("p", "p.4.scale")
    assert scale is not None
    assert scale.parts == ("l.4.n.weight",)


def test_parts_are_read_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "shared.toml").write_text(
        '[parts.inner]\ncolumns = ["h", "o", "unused"]\nrows = [["a", "x", "u"], "b"]\n'
        '[parts.outer]\ncolumns = ["h", "o"]\nrows = [["m.{}", "n.{}", "+inner"], "c"]\n',
        encoding="utf-8",
    )
    text = (
        'include = ["shared.toml"]\n[components.c]\ncolumns = ["h", "o"]\n'
        'rows = ["+outer", ["k", "", "+inner"]]\n'
    )
    component = load(table(tmp_path, text)).components["c"]
    assert component.templates("h") == ("m.{}.a", "m.{}.b", "c", "k.a", "k.b")
    assert component.templates("o") == ("n.{}.x", "n.{}.b", "c", "x", "b")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('["a"]', "expected one template for each"),
        ('["a.{}", "b"]', "different numbers"),
        ('["a{}", "b{}"]', "whole segment"),
        ('["a", "[b,c]"]', "only the home column"),
        ('["[a,b]", "c", "1:1:1"]', "3 proportions for 2 modules"),
        ('["a", "b", "swap_thirds"]', "'swap_thirds' is no proportion"),
        ('"+nothing"', "no part 'nothing'"),
        ('"+loop"', "no part 'loop' to use here"),
        ('["a", "b"], ["a", "c"]', "stands in two rows"),
        ('["a", "c"], ["b", "c"]', "stands in two rows"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, rows: str, message: str) -> None:
    text = (
        f'[components.c]\ncolumns = ["h", "o"]\nrows = [{rows}]\n'
        '[parts.loop]\ncolumns = ["h", "o"]\nrows = ["+loop"]\n'
    )

    def read() -> None:
        component = load(table(tmp_path, text)).components["c"]
        component.site("o", "x")
        component.site_of("o", "x")

    with pytest.raises(UsageError, match=message):
        read()


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tiny\.toml: not valid TOML"):
        load(table(tmp_path, "rows = ["))
