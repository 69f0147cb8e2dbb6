"""The README says what the program does today."""

from __future__ import annotations

import re
import shlex

import pytest
from click.testing import CliRunner

from peftsurgery.cli import COMMANDS, main
from tests.readme import BLOCKS, README, ROOT, WIDTH, commands, generated

TEXT = README.read_text(encoding="utf-8")


def test_generated_blocks_are_current() -> None:
    assert generated(TEXT) == TEXT, "run: python tests/readme.py --write"


def test_stale_text_and_missing_markers_are_noticed() -> None:
    stale = TEXT.replace("Usage: peftsurgery convert", "Usage: peftsurgery konvert")
    assert stale != TEXT
    assert generated(stale) == TEXT
    for name in BLOCKS:
        with pytest.raises(ValueError, match=name):
            generated(TEXT.replace(f"<!-- end: {name} -->", ""))


def test_reference_is_what_help_prints() -> None:
    reference = commands()
    for arguments in ([], *([name] for name in COMMANDS)):
        result = CliRunner().invoke(
            main, [*arguments, "--help"], prog_name="peftsurgery", terminal_width=WIDTH
        )
        assert result.output.strip() in reference


def test_files_named_in_commands_exist() -> None:
    lines = re.findall(r"^(?!#).*\bfixtures/\S+.*$", TEXT, flags=re.MULTILINE)
    named = {w for line in lines for w in shlex.split(line) if w.startswith("fixtures/")}
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
