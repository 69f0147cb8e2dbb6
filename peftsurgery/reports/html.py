"""Report -> one self-contained HTML file: no script, no external resource, everything escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from peftsurgery.reports import text
from peftsurgery.reports.base import Finding, Report, Row, columns_of
from peftsurgery.reports.table import is_numeric

BARS = 200  # bars of one chart; longer tables get a chart of their first rows
_BAR, _LABEL, _PLOT = 16, 320, 480  # px: height of a bar, width of the labels, width of the bars

_CSS = """
:root{color-scheme:light dark;--fg:#1b1b1b;--bg:#fff;--line:#d5d5d5;--bar:#3b6ea5}
@media(prefers-color-scheme:dark){:root{--fg:#ddd;--bg:#161616;--line:#3a3a3a;--bar:#6fa3d8}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--fg);background:var(--bg);margin:2rem auto;
max-width:72rem;padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin-top:2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse}
th,td{padding:.15rem .7rem .15rem 0;text-align:left;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal}
.error{color:#c62828}.warning{color:#b26a00}.info{color:#2f6f9f}
svg{max-width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--fg)}
svg rect{fill:var(--bar)}code{font:12px ui-monospace,monospace}
"""


def render(report: Report) -> str:
    """The whole document; safe to open even when every name in the report is hostile."""
    title = f"{report.operation}: {'ok' if report.ok else 'failed'}"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>peftsurgery {_text(title)}</title><style>{_CSS}</style></head><body>",
            f"<h1>peftsurgery {_text(title)}</h1>",
            *_body(report),
            "</body></html>\n",
        )
    )


def _body(report: Report) -> Iterator[str]:
    if report.summary:
        yield from _pairs({name: text.value(v, name) for name, v in report.summary.items()})
    if report.findings:
        yield "<h2>findings</h2><ul>"
        yield from map(_finding, report.findings)
        yield "</ul>"
    for name, rows in report.tables.items():
        yield from _section(name, rows)
    yield from _section("modules", report.modules)
    if report.inputs:
        yield "<h2>inputs (sha256)</h2>"
        yield from _pairs(report.inputs)
    if report.outputs:
        yield "<h2>outputs</h2><ul>"
        yield from (f"<li><code>{_text(path)}</code></li>" for path in report.outputs)
        yield "</ul>"


def _text(content: str) -> str:
    return html.escape(text.clean(content), quote=True)


def _pairs(pairs: dict[str, str]) -> Iterator[str]:
    yield '<div class="scroll"><table>'
    for name, content in pairs.items():
        yield f"<tr><th>{_text(text.heading(name))}</th><td>{_text(content)}</td></tr>"
    yield "</table></div>"


def _finding(finding: Finding) -> str:
    key = f" <code>{_text(finding.key)}</code>" if finding.key else ""
    remedy = f" {_text(finding.remedy)}" if finding.remedy else ""
    head = f'<span class="{finding.level}">{finding.level} [{_text(finding.code)}]</span>'
    return f"<li>{head}{key} {_text(finding.message)}{remedy}</li>"


def _section(name: str, rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    columns = columns_of(rows)
    numeric = [column for column in columns if is_numeric(rows, column)]
    labels = [column for column in columns if column not in numeric]
    yield f"<h2>{_text(text.heading(name))} ({len(rows)})</h2>"
    if labels and len(rows) > 1:
        for index, column in enumerate(numeric):
            state = " open" if index == 0 else ""
            yield f"<details{state}><summary>{_text(text.heading(column))}</summary>"
            yield from _chart(rows[:BARS], labels[0], column)
            yield "</details>"
    yield '<div class="scroll"><table><tr>'
    for column in columns:
        yield f"<th{_class(column in numeric)}>{_text(text.heading(column))}</th>"
    yield "</tr>"
    for row in rows:
        cells = (
            f"<td{_class(c in numeric)}>{html.escape(text.value(row.get(c), c))}</td>"
            for c in columns
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</table></div>"


def _class(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _chart(rows: Sequence[Row], label: str, column: str) -> Iterator[str]:
    """Horizontal bars of |value| from zero; the longest fills the plot, NaN and inf get none."""
    values = [cell if isinstance(cell, (int, float)) else math.nan for cell in _cells(rows, column)]
    longest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    height, width = _BAR * len(rows) + 4, _LABEL + _PLOT + 80
    name = _text(text.heading(column))
    yield f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{name}">'
    for index, (row, amount) in enumerate(zip(rows, values, strict=True)):
        y = _BAR * index + 2
        share = abs(amount) / longest if longest and math.isfinite(amount) else 0.0
        shown = _text(_short(text.value(row.get(label), label)))
        figure = _text(text.value(row.get(column), column))
        yield f'<text x="{_LABEL - 6}" y="{y + 11}" text-anchor="end">{shown}</text>'
        yield f'<rect x="{_LABEL}" y="{y}" width="{share * _PLOT:.1f}" height="{_BAR - 3}"/>'
        yield f'<text x="{_LABEL + share * _PLOT + 5:.1f}" y="{y + 11}">{figure}</text>'
    yield "</svg>"


def _cells(rows: Sequence[Row], column: str) -> Iterator[object]:
    return (row.get(column) for row in rows)


def _short(label: str, length: int = 52) -> str:
    return label if len(label) <= length else f"…{label[1 - length :]}"
