"""Errors become exit codes, in one place, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner, Result

from peftsurgery import errors
from peftsurgery.cli import COMMANDS, main, options
from peftsurgery.cli.group import LazyGroup
from peftsurgery.cli.running import Display
from peftsurgery.reports import Finding, Report

RAISED: dict[str, BaseException] = {
    "check": errors.CheckFailed("kept 12 of 13 keys"),
    "usage": errors.UsageError("x.safetensors: no such file"),
    "unsupported": errors.CannotFit("loha has no projection"),
    "unsafe": errors.UnsafeInputError("header\x1b[2J overlaps\nsecond line"),
    "interrupt": KeyboardInterrupt(),
    "missing": FileNotFoundError(2, "No such file or directory", "gone.safetensors"),
    "bug": ZeroDivisionError("division by zero"),
}
CODES = {
    "check": 1,
    "usage": 2,
    "unsupported": 3,
    "unsafe": 4,
    "interrupt": 130,
    "missing": 2,
    "bug": 1,
}


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> LazyGroup:
    """A lazy group over throw-away modules: one command per error, and `report` that succeeds."""

    def add(name: str, body: object) -> None:
        attribute = name.replace("-", "_")
        module = ModuleType(f"probe_commands.{attribute}")
        setattr(module, attribute, body)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def failing(error: BaseException) -> click.Command:
        @click.command()
        @options.display
        def command(display: Display) -> None:
            raise error

        return command

    @click.command()
    @click.option("--bad", is_flag=True)
    @options.display
    @options.html
    def report(bad: bool, display: Display) -> None:
        with display.progress("report") as progress:
            if progress:
                progress(1, 2, "tensors")
        finding = Finding("error" if bad else "info", "some-code", "some message")
        display.finish(Report("report", ok=not bad, findings=[finding], outputs=["taken.json"]))

    for name, error in RAISED.items():
        add(name, failing(error))
    add("report", report)
    table = dict.fromkeys((*RAISED, "report"), "A probe.")
    return LazyGroup("probe", commands_table=table, package="probe_commands")


def run(group: click.Group, *arguments: str) -> Result:
    return CliRunner().invoke(group, list(arguments))


@pytest.mark.parametrize("name", RAISED)
def test_exit_codes(group: LazyGroup, name: str) -> None:
    result = run(group, name)
    assert result.exit_code == CODES[name]
    if name == "bug":
        assert result.exception is RAISED[name]  # unexpected: the traceback is kept
    else:
        assert isinstance(result.exception, SystemExit)
        assert result.stderr.lstrip("\n").startswith("error: ")
        assert result.stdout == ""


@pytest.mark.parametrize("name", RAISED)
def test_errors_as_json(group: LazyGroup, name: str) -> None:
    result = run(group, name, "--json")
    document = json.loads(result.stdout)
    assert document["exit_code"] == result.exit_code == CODES[name]
    assert (document["ok"], document["operation"], document["schema_version"]) == (False, name, 1)
    assert document["error"]["message"]


def test_error_text_is_escaped_and_cannot_forge_a_line(group: LazyGroup) -> None:
    result = run(group, "unsafe")
    assert result.stderr == "error: header\\x1b[2J overlaps\n  second line\n"


def test_os_errors_name_the_file(group: LazyGroup) -> None:
    assert run(group, "missing").stderr == "error: gone.safetensors: No such file or directory\n"


def test_usage_errors(group: LazyGroup) -> None:
    result = run(group, "reprot")
    assert result.exit_code == 2
    assert "did you mean report" in result.stderr
    result = run(group, "report", "--no-such-option", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "NoSuchOption"
    assert run(group).exit_code == 0


def test_report_that_fails_its_check_ends_with_1(group: LazyGroup) -> None:
    good, bad = run(group, "report"), run(group, "report", "--bad")
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert good.stdout.startswith("report: ok\n")
    assert bad.stdout.startswith("report: FAILED\nerror[some-code]: some message\n")


def test_json_is_all_there_is_on_stdout(group: LazyGroup) -> None:
    result = run(group, "report", "--bad", "--json")
    assert json.loads(result.stdout)["findings"][0]["code"] == "some-code"
    assert json.loads(result.stdout)["exit_code"] == result.exit_code == 1


def test_quiet_prints_errors_only(group: LazyGroup) -> None:
    good, bad = run(group, "report", "-q"), run(group, "report", "-q", "--bad")
    assert good.output == ""
    assert bad.stdout == ""
    assert "some-code" in bad.stderr


def test_report_files(group: LazyGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text("old")
    result = run(group, "report", "--bad", "--report", "r.json", "--html", "r.html")
    assert result.exit_code == 1
    assert json.loads((tmp_path / "r.json").read_text())["operation"] == "report"
    assert "<svg" not in (tmp_path / "r.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--report", "r.txt", "must end in .json or .html"),
        ("--html", "r.json", "must end in .html"),
        ("--report", "no/such/r.json", "there is no folder"),
        ("--report", "taken.json", "would replace"),
    ],
)
def test_report_file_names_are_checked(
    group: LazyGroup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    name: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(group, "report", option, name)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_every_command_is_what_its_table_row_says() -> None:
    context = click.Context(main)
    for name, summary in COMMANDS.items():
        command = main.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert (command.help or "").split("\n\n")[0] == summary
        assert run(main, name, "--help").exit_code == 0


def test_help_lists_commands_and_exit_codes() -> None:
    result = run(main, "--help")
    for expected in (*COMMANDS, "130 interrupted"):
        assert expected in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupt_of_a_real_process_ends_with_130() -> None:
    code = (
        "import os, signal, click\n"
        "from peftsurgery.cli.group import LazyGroup\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & ignores it
        "class Group(LazyGroup):\n"
        "    def get_command(self, ctx, cmd_name):\n"
        "        kill = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "        return click.Command('wait', callback=kill)\n"
        "Group('probe', commands_table={'wait': ''}, package='x').main(['wait'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (130, "error: interrupted")
