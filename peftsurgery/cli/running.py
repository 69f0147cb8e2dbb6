"""How a command shows its report and its progress."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click

from peftsurgery.errors import UsageError
from peftsurgery.reports import Progress, Report

PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal
BAR_AFTER = 0.5  # seconds of work before a progress bar appears at all


@dataclass(frozen=True)
class Display:
    """What the user asked to see: `--json`, `--report`/`--html` files, `-q`, `-v`."""

    as_json: bool = False
    files: tuple[Path, ...] = ()
    quiet: bool = False
    verbose: bool = False

    def finish(self, report: Report) -> None:
        """Print the report, write the report files, and leave with 1 if a check failed."""
        if self.as_json:
            from peftsurgery.reports import json

            click.echo(json.render(report), nl=False)
        elif not self.quiet:
            _echo(_table(report, self.verbose), sys.stdout)
        else:
            for finding in report.findings:
                if finding.level == "error":
                    _echo(_table(Report(report.operation, False, findings=[finding])), sys.stderr)
        for path in self.files:
            _write(path, report)
        if report.exit_code:
            raise click.exceptions.Exit(report.exit_code)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress | None]:
        """A bar on a terminal, a line now and then otherwise, nothing with `-q`; all on stderr."""
        if self.quiet:
            yield None
        elif _is_terminal(sys.stderr):
            with _Bar(title) as bar:
                yield bar
        else:
            yield _Lines(title)


class _Lines:
    """Progress as plain lines, at most one in `PLAIN_EVERY` seconds."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.last = time.monotonic()

    def __call__(self, done: int, total: int, label: str = "") -> None:
        if time.monotonic() - self.last >= PLAIN_EVERY:
            from peftsurgery.reports.text import clean

            self.last = time.monotonic()
            click.echo(f"{self.title}: {done}/{total} {clean(label)}".rstrip(), err=True)


class _Bar:
    """Progress as a rich bar that vanishes when the work is over."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.begun = time.monotonic()
        self.bar = None
        self.task = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, label: str = "") -> None:
        if self.bar is None:
            if time.monotonic() - self.begun < BAR_AFTER:
                return
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.title, total=total)
            self.bar.start()
        assert self.task is not None
        self.bar.update(self.task, completed=done, total=total)


def _table(report: Report, verbose: bool = False) -> str:
    from peftsurgery.reports import table

    terminal = _is_terminal(sys.stdout)
    return table.render(
        report,
        width=shutil.get_terminal_size().columns if terminal else None,
        colour=terminal and not os.environ.get("NO_COLOR"),
        rows=None if verbose else table.ROWS,
    )


def _echo(content: str, stream: TextIO) -> None:
    """Write text whatever the encoding of the stream: what it lacks becomes an escape."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    click.echo(
        content.encode(encoding, "backslashreplace").decode(encoding),
        file=stream,
        nl=False,
        color=None,
    )


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _write(path: Path, report: Report) -> None:
    """Write one report file whole or not at all, never over a file of the operation."""
    taken = {Path(name).resolve() for name in (*report.inputs, *report.outputs)}
    if path.resolve() in taken:
        raise UsageError(f"{path}: the report would replace a file of the operation; rename it")
    if path.suffix.lower() == ".html":
        from peftsurgery.reports.html import render
    else:
        from peftsurgery.reports.json import render
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(render(report))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
