"""rank_pattern and alpha_pattern: the quick look-up agrees with PEFT's regular expressions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.codec.patterns import Patterns
from peftsurgery.codec.scales import patterns
from peftsurgery.errors import UsageError
from tests.counting import calls

SEGMENT = st.sampled_from(["a", "b_c", "ab", "0", "11", "to_q", "x-y"])
PATH = st.lists(SEGMENT, min_size=1, max_size=4).flatmap(
    lambda parts: st.sampled_from([".".join(parts), "_".join(parts), "a" + ".".join(parts)])
)
DOTTED = st.lists(SEGMENT, min_size=1, max_size=4).map(".".join)
PATTERN = st.one_of(
    PATH,
    PATH.map("^{}".format),
    PATH.map(".*{}".format),
    PATH.map(".{}".format),
    PATH.map("{}.".format),
    st.tuples(PATH, PATH).map("|".join),
    PATH.map(r"{}(\.\d+)?".format),
)


def by_peft(table: dict[str, float], path: str) -> float | None:
    """PEFT's `get_pattern_key`: the first pattern that matches the end of the path."""
    return next((v for p, v in table.items() if re.match(rf"(.*\.)?({p})$", path)), None)


@settings(max_examples=600, deadline=None)
@given(st.lists(PATTERN, max_size=6, unique=True), st.lists(PATH, min_size=1, max_size=5))
def test_same_as_the_regular_expressions(names: list[str], paths: list[str]) -> None:
    table = {name: float(index) for index, name in enumerate(names)}
    found = Patterns(table, "test")
    for path in paths:
        assert found.find(path, None) == by_peft(table, path)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(DOTTED, st.integers(1, 3), min_size=1, max_size=8))
def test_written_patterns_give_every_module_its_own_number(values: dict[str, int]) -> None:
    written = patterns({p: float(v) for p, v in values.items()}, 1.0)
    for path, value in values.items():
        assert (by_peft(written, path) or 1.0) == value


def test_a_pattern_that_is_no_regular_expression_is_named() -> None:
    with pytest.raises(UsageError, match=r"config.json: '\(a' in the adapter config"):
        Patterns({"(a": 1.0}, "config.json")


def test_a_thousand_patterns_on_a_thousand_modules() -> None:
    """A dynamically resized SDXL adapter; one regular expression a pair would be a million."""
    names = [f"down_blocks.{i // 100}.attentions.{i}.attn{i % 7}.to_q" for i in range(1000)]
    found = Patterns({name: float(i) for i, name in enumerate(names)}, "test")
    assert [found.find(name, None) for name in names] == list(range(1000))
    assert calls(lambda: [found.find(name, None) for name in names]) < 200_000
