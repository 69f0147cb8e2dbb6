"""The record and its three faces."""

from __future__ import annotations

import json
import math
import random
from dataclasses import FrozenInstanceError
from html.parser import HTMLParser

import pytest

from peftsurgery.reports import Finding, Report, Row
from peftsurgery.reports import html as as_html
from peftsurgery.reports import json as as_json
from peftsurgery.reports import table as as_table

HOSTILE = "a[red]\x1b[31m<script>alert(1)</script>&\"'\u202e"


def sample(rows: int = 3, *, key: str = "unet:down.0.attn.to_q") -> Report:
    rng = random.Random(rows)
    modules: list[Row] = [
        {"module": f"{key}.{n}", "rank": rng.randint(1, 64), "norm": rng.random(), "note": None}
        for n in range(rows)
    ]
    return Report(
        "convert",
        ok=False,
        summary={"layout": "kohya", "size": 3_400_000, key: key},
        findings=[
            Finding("info", "alpha-missing", "scale 1 is used"),
            Finding("error", "lost-key", "no such module", key=key, remedy="Pass --base."),
        ],
        modules=modules,
        tables={"blocks": [{"block": f"{key}{n}", "energy": 10.0**n} for n in range(4)]},
        inputs={key: "ab" * 32},
        outputs=[f"/out/{key}.safetensors"],
    )


def test_to_dict_has_every_field_and_the_schema_version() -> None:
    report = sample()
    document = report.to_dict()
    assert document["schema_version"] == 1
    assert (document["ok"], document["exit_code"], report.exit_code) == (False, 1, 1)
    assert document["findings"] == [
        {
            "level": "info",
            "code": "alpha-missing",
            "message": "scale 1 is used",
            "key": None,
            "remedy": None,
        },
        {
            "level": "error",
            "code": "lost-key",
            "message": "no such module",
            "key": "unet:down.0.attn.to_q",
            "remedy": "Pass --base.",
        },
    ]
    assert document["modules"] == report.modules
    assert set(document) >= {"operation", "summary", "tables", "inputs", "outputs"}


def test_fields_cannot_be_rebound_but_lists_can_be_filled() -> None:
    report = Report("inspect")
    report.findings.append(Finding("warning", "x", "y"))
    with pytest.raises(FrozenInstanceError):
        report.ok = False  # pyright: ignore[reportAttributeAccessIssue]
    assert (report.ok, report.exit_code, report.count("warning")) == (True, 0, 1)
    assert Report("inspect").findings == []


def test_json_is_strict() -> None:
    report = Report(
        "inspect",
        modules=[{"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5, "e": None, "f": True}],
    )

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    document = json.loads(as_json.render(report), parse_constant=refuse)
    row = {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5, "e": None, "f": True}
    assert document["modules"] == [row]


def test_json_round_trips_hostile_names_as_ascii() -> None:
    report = sample(key=HOSTILE + "\ud800")
    content = as_json.render(report)
    assert content.isascii()
    assert json.loads(content) == report.to_dict()


@pytest.mark.parametrize("width", [None, 20, 40, 80, 200])
@pytest.mark.parametrize("colour", [False, True])
def test_table_is_safe_with_hostile_names_at_any_width(width: int | None, colour: bool) -> None:
    shown = as_table.render(sample(key=HOSTILE), width=width, colour=colour)
    assert HOSTILE not in shown
    assert "\x1b[31m<" not in shown
    assert "\u202e" not in shown
    if not colour:
        assert "\x1b" not in shown
        assert all(len(line) <= (width or 10_000) for line in shown.splitlines())


def test_table_keeps_every_character_when_narrow() -> None:
    key = "abcdefghij" * 9
    report = Report("inspect", modules=[{"module": key, "rank": 16}])
    shown = as_table.render(report, width=30)
    assert sum(shown.count(letter) for letter in "j") >= 9
    assert "…" not in shown


def test_pipe_gets_one_line_per_row_without_boxes() -> None:
    report = sample(key="k" * 300)
    lines = as_table.render(report).splitlines()
    for row in report.modules:
        assert sum(str(row["module"]) in line for line in lines) == 1
    assert not set("".join(lines)) & set("─│┌┐└┘━┃╸")
    assert str(report) == as_table.render(report)


def test_table_limits_rows_and_says_so() -> None:
    report = sample(57)
    assert "… 37 more rows; -v shows all" in as_table.render(report)
    everything = as_table.render(report, rows=None)
    assert "more rows" not in everything
    assert all(str(row["module"]) in everything for row in report.modules)


def test_table_formats_numbers() -> None:
    report = Report(
        "inspect",
        summary={"peak_bytes": 3_400_000, "exact": True},
        modules=[{"rank": 16, "error": 1.2e-7, "alpha": None}],
    )
    shown = as_table.render(report)
    for expected in ("peak bytes  3.4 MB", "exact       yes", "1.2e-7", " 16 "):
        assert expected in f" {shown}"


class Page(HTMLParser):
    """Tags, attributes and text of a document."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.content: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.content.append(data)


def test_html_holds_no_active_or_external_content() -> None:
    page = Page(as_html.render(sample(key=HOSTILE)))
    assert not {"script", "img", "iframe", "link", "object", "a"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "href"}
    assert any("<script>alert(1)</script>" in piece for piece in page.content)
    assert "\x1b" not in "".join(page.content)


def test_html_shows_everything() -> None:
    report = sample(30)
    content = as_html.render(report)
    page = Page(content)
    text = "\n".join(page.content)
    for row in report.modules:
        assert str(row["module"]) in text
    for expected in ("lost-key", "Pass --base.", "ab" * 32, "3.4 MB", *report.outputs):
        assert expected in text
    assert page.tags.count("svg") == 3  # energy of blocks, rank and norm of modules
    assert page.tags.count("rect") == 4 + 30 + 30


def test_html_bars_are_proportional_and_survive_nan() -> None:
    rows: list[Row] = [
        {"block": "a", "energy": 2.0},
        {"block": "b", "energy": -1.0},
        {"block": "c", "energy": math.nan},
        {"block": "d", "energy": None},
    ]
    page = Page(as_html.render(Report("inspect", tables={"blocks": rows})))
    widths = [float(v or "") for name, v in page.attributes if name == "width" and v]
    assert widths[-4:] == [480.0, 240.0, 0.0, 0.0]


def test_empty_report_renders() -> None:
    report = Report("inspect")
    assert as_table.render(report, width=1) == "inspect: ok\n"
    assert "svg" not in Page(as_html.render(report)).tags
