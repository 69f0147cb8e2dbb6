"""Imports point one way (the table below is the architecture), and light packages stay light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import peftsurgery.errors

PACKAGE = Path(peftsurgery.errors.__file__).parent

_FORM = {"errors", "linalg", "algorithms", "adapter"}
_CODEC = _FORM | {"checkpoint", "architectures", "layouts", "codec"}
_OPERATIONS = _CODEC | {"quantizers", "merge_methods", "reports", "operations"}
ALLOWED = {  # part of the package -> parts it may import, beside itself
    "errors": set(),
    "linalg": {"errors"},
    "algorithms": {"errors", "linalg"},
    "adapter": {"errors", "linalg", "algorithms", "architectures"},  # for the spelling of groups
    "checkpoint": {"errors"},
    "architectures": {"errors"},
    "layouts": {"errors", "architectures"},
    "codec": _CODEC,
    "quantizers": {"errors", "checkpoint"},
    "merge_methods": _FORM,
    "reports": {"errors"},
    "operations": _OPERATIONS,
    "runtime": _CODEC | {"quantizers"},
    "cli": _OPERATIONS,
    "__main__": {"cli"},
    "__init__": _OPERATIONS | {"runtime"},
}
NO_TORCH = ("errors", "checkpoint", "architectures", "layouts", "reports", "cli")
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def part_of(path: Path) -> str:
    """`peftsurgery/cli/group.py` -> "cli"; `peftsurgery/errors.py` -> "errors"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Absolute dotted names of everything imported anywhere below `tree`."""
    package = ("peftsurgery", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            head = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*head, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> ast.Module:
    """The module without function bodies and `if TYPE_CHECKING:` blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if ast.unparse(node.test).endswith("TYPE_CHECKING"):
                return node.orelse
            return self.generic_visit(node)

    return ast.fix_missing_locations(Strip().visit(tree))


def wrong_directions(path: Path, source: str) -> list[str]:
    part = part_of(path)
    names = {
        name.split(".")[1]
        for name in imported(ast.parse(source), path)
        if name.startswith("peftsurgery.")
    }
    parts = {entry.stem for entry in PACKAGE.iterdir()}
    return sorted((names & parts) - ALLOWED[part] - {part})


def top_level_torch(path: Path, source: str) -> list[str]:
    names = imported(at_import_time(ast.parse(source)), path)
    return [name for name in names if name.split(".")[0] == "torch"]


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    assert part_of(path) in ALLOWED, f"{path}: add its row to ALLOWED and to the design"
    wrong = wrong_directions(path, path.read_text(encoding="utf-8"))
    assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if part_of(path) in NO_TORCH],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_torch_at_import_time(path: Path) -> None:
    assert not top_level_torch(path, path.read_text(encoding="utf-8"))


def test_no_file_is_called_utils() -> None:
    assert not [path for path in SOURCES if path.stem in FORBIDDEN_NAMES]


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("errors", "from peftsurgery.cli import main", ["cli"]),
        ("errors", "def f():\n    from . import reports", ["reports"]),
        ("reports", "from ..cli.group import LazyGroup", ["cli"]),
        ("reports", "from .base import Report\nimport peftsurgery.errors", []),
        ("cli", "import json, torch\nfrom peftsurgery.reports import Report", []),
    ],
)
def test_the_check_finds_wrong_directions(part: str, source: str, wrong: list[str]) -> None:
    file = PACKAGE / f"{part}.py" if part == "errors" else PACKAGE / part / "probe.py"
    assert wrong_directions(file, source) == wrong


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", 1),
        ("try:\n    from torch import nn\nexcept ImportError: pass", 1),
        ("class A:\n    import torch.nn", 1),
        ("def f():\n    import torch", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", 0),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import torch", 1),
    ],
)
def test_the_check_finds_torch(source: str, found: int) -> None:
    assert len(top_level_torch(PACKAGE / "errors.py", source)) == found
