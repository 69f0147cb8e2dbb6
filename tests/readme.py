"""Keeps the README's generated blocks current.

`python tests/readme.py` says whether they are; `python tests/readme.py --write` rewrites them.
A block is everything between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when run as a script
README = ROOT / "README.md"
WIDTH = 96


def commands() -> str:
    """The output of `peftsurgery --help` and of every command's `--help`."""
    from peftsurgery.cli import COMMANDS, main

    top = click.Context(
        main, info_name="peftsurgery", terminal_width=WIDTH, **main.context_settings
    )
    pages = [("peftsurgery", main.get_help(top))]
    for name in COMMANDS:
        command = main.get_command(top, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=top, terminal_width=WIDTH)
        pages.append((f"peftsurgery {name}", command.get_help(context)))
    return "\n\n".join(f"### `{title}`\n\n```text\n{page}\n```" for title, page in pages)


def matrix() -> str:
    """Which layout holds what, found out by converting."""
    from tests.matrix import table

    return table()


def algorithms() -> str:
    """The algorithms, and the layouts that have keys for them."""
    from tests.algorithm_table import table

    return table()


BLOCKS: dict[str, Callable[[], str]] = {
    "algorithms": algorithms,
    "matrix": matrix,
    "commands": commands,
}


def generated(readme: str) -> str:
    """`readme` with every block of BLOCKS replaced; ValueError when a marker is missing."""
    for name, produce in BLOCKS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        head, found, rest = readme.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README.md: expected the markers {begin} and {end}")
        readme = f"{head}{begin}\n\n{produce()}\n\n{end}{tail}"
    return readme


def run(arguments: list[str]) -> int:
    """Compare or write; 1 when the README is stale and nothing was written."""
    present = README.read_text(encoding="utf-8")
    wanted = generated(present)
    if present == wanted:
        return 0
    if arguments == ["--write"]:
        README.write_text(wanted, encoding="utf-8", newline="\n")
        return 0
    print("README.md is stale; run: python tests/readme.py --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(run(sys.argv[1:]))
