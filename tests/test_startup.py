"""`peftsurgery --help` is instant: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

HEAVY = ("torch", "numpy", "rich", "huggingface_hub", "safetensors", "transformers", "diffusers")
LIGHT = ("errors", "checkpoint", "architectures", "layouts", "reports", "cli")
MODULES = 40


def loaded(code: str) -> set[str]:
    """Which of HEAVY are in `sys.modules` of a fresh interpreter after `code`."""
    probe = f"import sys\n{code}\nprint('LOADED', *[m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_no_heavy_import_before_a_command(arguments: list[str]) -> None:
    code = (
        "from peftsurgery.cli import main\n"
        f"try: main({arguments!r}, prog_name='peftsurgery')\n"
        "except SystemExit: pass"
    )
    assert loaded(code) == set()


def test_the_probe_sees_a_heavy_import() -> None:
    assert loaded("import numpy") == {"numpy"}


@pytest.mark.parametrize("name", LIGHT)
def test_light_packages_do_not_import_torch(name: str) -> None:
    if find_spec(f"peftsurgery.{name}") is not None:
        assert "torch" not in loaded(f"import peftsurgery.{name}")


def test_command_modules_do_not_import_torch() -> None:
    code = (
        "from peftsurgery.cli import COMMANDS\n"
        "from importlib import import_module\n"
        "for name in COMMANDS: import_module('peftsurgery.cli.' + name.replace('-', '_'))"
    )
    assert "torch" not in loaded(code)


def test_help_imports_little_beside_click() -> None:
    """The time is in tests/benchmarks/convert.py; here the modules, which are what takes it."""
    code = (
        "import sys, click; before = set(sys.modules)\n"
        "from peftsurgery.cli import main\n"
        "try: main(['--help'], prog_name='peftsurgery')\n"
        "except SystemExit: print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()[-1].split()) < MODULES
