"""Report -> text for people, with rich; the caller decides where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from peftsurgery.reports import text
from peftsurgery.reports.base import Finding, Report, Row, Value, columns_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

ROWS = 20  # rows of one table shown unless more are asked for
_UNLIMITED = 100_000  # columns: a pipe never wraps
_STYLE = {"info": "cyan", "warning": "yellow", "error": "bold red"}


def render(
    report: Report, *, width: int | None = None, colour: bool = False, rows: int | None = ROWS
) -> str:
    """The report as text: title, summary, findings, named tables, modules.

    `width` is the terminal's, None for a pipe (one line per row, nothing wrapped). Without `colour`
    there is no ANSI sequence and no box drawing. `rows` limits each table, None shows all.
    """
    from rich.console import Console

    buffer = StringIO()
    console = Console(
        file=buffer,
        width=max(width, 20) if width else _UNLIMITED,
        force_terminal=colour,
        color_system="standard" if colour else None,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    _title(console, report)
    _summary(console, report.summary)
    for finding in report.findings:
        _finding(console, finding)
    for name, table in report.tables.items():
        _table(console, name, table, rows)
    _table(console, "modules", report.modules, rows)
    for path in report.outputs:
        _line(console, f"wrote {text.clean(path)}")
    return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())


def _line(console: Console, content: str, style: str = "") -> None:
    from rich.text import Text

    console.print(Text(content, style=style, overflow="fold"))


def _title(console: Console, report: Report) -> None:
    state = "ok" if report.ok else "FAILED"
    _line(console, f"{text.clean(report.operation)}: {state}", "bold" if report.ok else "bold red")


def _summary(console: Console, summary: Mapping[str, Value]) -> None:
    if not summary:
        return
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold", style="dim")
    grid.add_column(overflow="fold")
    for label, content in summary.items():
        grid.add_row(_cell(text.heading(label)), _cell(text.value(content, label)))
    console.print(grid)


def _finding(console: Console, finding: Finding) -> None:
    where = f" {text.clean(finding.key)}:" if finding.key else ""
    head = f"{finding.level}[{text.clean(finding.code)}]:{where}"
    message = text.clean(finding.message)
    remedy = f" {text.clean(finding.remedy)}" if finding.remedy else ""
    _line(console, f"{head} {message}{remedy}", _STYLE[finding.level])


def _table(console: Console, name: str, rows: Sequence[Row], limit: int | None) -> None:
    if not rows:
        return
    from rich import box
    from rich.table import Table

    columns = columns_of(rows)
    shown = rows if limit is None else rows[:limit]
    table = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        header_style="bold",
    )
    for column in columns:
        numeric = is_numeric(rows, column)
        table.add_column(
            _cell(text.heading(column)), overflow="fold", justify="right" if numeric else "left"
        )
    for row in shown:
        table.add_row(*(_cell(text.value(row.get(column), column)) for column in columns))
    console.print()
    _line(console, f"{text.heading(name)} ({len(rows)})", "bold")
    console.print(table)
    if len(shown) < len(rows):
        _line(console, f"… {len(rows) - len(shown)} more rows; -v shows all", "dim")


def _cell(content: str) -> RenderableType:
    from rich.text import Text

    return Text(content)


def is_numeric(rows: Sequence[Row], column: str) -> bool:
    """Whether a column holds numbers only (None allowed, at least one number, bools are none)."""
    cells = [row.get(column) for row in rows]
    numbers = [cell for cell in cells if isinstance(cell, (int, float)) and cell is not None]
    return bool(numbers) and all(
        cell is None or (isinstance(cell, (int, float)) and not isinstance(cell, bool))
        for cell in cells
    )
