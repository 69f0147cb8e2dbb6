"""Where text and progress go."""

from __future__ import annotations

import io
import sys

import pytest

from peftsurgery.cli import running
from peftsurgery.cli.running import Display
from peftsurgery.reports import Report


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> dict[str, Terminal]:
    """Called inside a test: pytest sets the streams anew between a fixture and its test."""
    streams = {"stdout": Terminal(), "stderr": Terminal()}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return streams


REPORT = Report("inspect", modules=[{"module": "a" * 100, "rank": 4}])


def test_colour_on_a_terminal_and_not_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = terminal(monkeypatch)
    Display().finish(REPORT)
    assert "\x1b[1m" in streams["stdout"].getvalue()
    streams["stdout"].truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    Display().finish(REPORT)
    shown = streams["stdout"].getvalue().lstrip("\x00")
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 60


def test_bar_on_a_terminal_appears_after_a_while_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = terminal(monkeypatch)
    for after, seen in ((3600.0, False), (0.0, True)):
        monkeypatch.setattr(running, "BAR_AFTER", after)
        with Display().progress("merge") as progress:
            assert progress is not None
            progress(1, 4, "tensors")
            progress(4, 4, "tensors")
        assert ("merge" in streams["stderr"].getvalue()) is seen
    assert streams["stdout"].getvalue() == ""


def test_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for every, expected in ((3600.0, ""), (0.0, "merge: 3/9 a\\x1bb\n")):
        monkeypatch.setattr(running, "PLAIN_EVERY", every)
        with Display().progress("merge") as progress:
            assert progress is not None
            progress(3, 9, "a\x1bb")
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", expected)


def test_quiet_has_no_progress() -> None:
    with Display(quiet=True).progress("merge") as progress:
        assert progress is None


def test_stream_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Display().finish(Report("inspect", summary={"name": "ΔW"}))
    sys.stdout.flush()
    assert b"\\u0394W" in raw.getvalue()
