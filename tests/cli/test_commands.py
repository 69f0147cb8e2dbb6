"""Each thin command hands its options to its operation, under the operation's own signature."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock, create_autospec

import pytest
from click.testing import CliRunner

from peftsurgery.cli import main
from peftsurgery.operations import convert as convert_module
from peftsurgery.operations import inspect as inspect_module
from peftsurgery.reports import Report


def spy(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> MagicMock:
    double = create_autospec(getattr(module, name), return_value=Report(name))
    monkeypatch.setattr(module, name, double)
    return double


def run(*arguments: str) -> None:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_inspect(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = spy(monkeypatch, inspect_module, "inspect")
    plain = {"base": None, "architecture": None, "allow_pickle": False, "norms": False}
    run("inspect", "a.safetensors")
    operation.assert_called_with("a.safetensors", **plain)
    run("inspect", "o/r", "--base", "b", "--architecture", "flux", "--norms", "--allow-pickle")
    operation.assert_called_with(
        "o/r", base="b", architecture="flux", allow_pickle=True, norms=True
    )


def test_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = spy(monkeypatch, convert_module, "convert")
    run("convert", "a.safetensors", "-o", "b.safetensors", "--to", "kohya", "-q")
    operation.assert_called_with(
        "a.safetensors",
        Path("b.safetensors"),
        to="kohya",
        architecture=None,
        base=None,
        algorithm=None,
        rank=None,
        dtype="keep",
        alpha="keep",
        drop=(),
        only=None,
        keep_unknown=False,
        overwrite=False,
        dry_run=False,
        allow_pickle=False,
        progress=None,
    )
    options = "--architecture sdxl --base c --algorithm lora --rank max:64,energy:0.99 --alpha fold"
    more = "--dtype bf16 --drop a* --drop b --only unet --overwrite --dry-run --allow-pickle -q"
    more += " --keep-unknown"
    run("convert", "a", "-o", "b", "--to", "peft", *options.split(), *more.split())
    operation.assert_called_with(
        "a",
        Path("b"),
        to="peft",
        architecture="sdxl",
        base="c",
        algorithm="lora",
        rank="max:64,energy:0.99",
        dtype="bf16",
        alpha="fold",
        drop=("a*", "b"),
        only=("unet",),
        keep_unknown=True,
        overwrite=True,
        dry_run=True,
        allow_pickle=True,
        progress=None,
    )


def test_convert_without_quiet_passes_a_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = spy(monkeypatch, convert_module, "convert")
    run("convert", "a", "-o", "b", "--to", "peft")
    assert callable(operation.call_args.kwargs["progress"])
