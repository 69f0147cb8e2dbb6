"""Untrusted text and numbers."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftsurgery.reports import text


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("a\nb\r\tc\x00", "a\\x0ab\\x0d\\x09c\\x00"),
        ("\x9b31m", "\\x9b31m"),
        ("safe\u202egnp.exe", "safe\\u202egnp.exe"),
        ("\ud800\u2028", "\\ud800\\u2028"),
        ("画像 ΔW é 😀", "画像 ΔW é 😀"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_clean(given_text: str, shown: str) -> None:
    assert text.clean(given_text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_that_steers_a_terminal_survives(name: str) -> None:
    categories = {unicodedata.category(char) for char in text.clean(name)}
    assert not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.998312, "0.9983"),
        (12.5, "12.5"),
        (0.001, "0.001"),
        (-0.25, "-0.25"),
        (1.2e-7, "1.2e-7"),
        (-3.456e-12, "-3.46e-12"),
        (9999.7, "10000"),
        (123456.7, "123457"),
        (3e10, "3e10"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_number(number: float, shown: str) -> None:
    assert text.number(number) == shown


@given(st.floats(-1e300, 1e300))
def test_number_is_close_to_the_value(number: float) -> None:
    assert float(text.number(number)) == pytest.approx(number, rel=6e-3, abs=0)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3_400_000, "3.4 MB"), (99_600_000, "100 MB")],
)
def test_size(count: int, shown: str) -> None:
    assert text.size(count) == shown


def test_value_follows_type_and_column() -> None:
    assert text.value(16, "rank") == "16"
    assert text.value(23_800_000, "peak_bytes") == "24 MB"
    assert text.value(23_800_000, "Size") == "24 MB"
    assert text.value(True, "bytes") == "yes"
    assert text.value(None, "alpha") == "-"
    assert text.value(1.2e-7, "error") == "1.2e-7"
    assert text.value("\x1b[m", "key") == "\\x1b[m"
