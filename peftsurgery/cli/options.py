"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import click

from peftsurgery.cli.running import Display

DTYPES = ("keep", "fp32", "fp16", "bf16")
REPORTS = (".json", ".html")


class ReportFile(click.Path):
    """A path with one of `suffixes` in a folder that exists; checked before any work is done."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self.suffixes = suffixes

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """The path, or a usage error that names the suffixes or the missing folder."""
        path = Path(value)
        if path.suffix.lower() not in self.suffixes:
            self.fail(f"{path}: the name must end in {' or '.join(self.suffixes)}", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{path}: there is no folder {path.parent}", param, ctx)
        return super().convert(value, param, ctx)


def display(function: Callable[..., object]) -> Callable[..., object]:
    """`--json --report FILE -q -v`, handed to the command as one keyword `display`."""

    @functools.wraps(function)
    def command(
        *args: object,
        as_json: bool,
        report: Path | None,
        quiet: bool,
        verbose: bool,
        html: Path | None = None,
        **kwargs: object,
    ) -> object:
        files = tuple(path for path in (report, html) if path)
        shown = Display(as_json=as_json, files=files, quiet=quiet, verbose=verbose)
        return function(*args, display=shown, **kwargs)

    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Show every row of every table."),
        click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
        click.option(
            "--report",
            type=ReportFile(*REPORTS),
            metavar="FILE.{json,html}",
            help="Also write the report to a file.",
        ),
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            help="Print the report as JSON on stdout; progress and errors go to stderr.",
        ),
    ):
        command = option(command)
    return command


html = click.option(  # together with `display`, which takes it
    "--html", type=ReportFile(".html"), metavar="FILE", help="The same as --report FILE.html."
)
output = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DST",
    help="File or folder to write.",
)
output_or_in_place = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DST",
    help="File or folder to write; or --in-place.",
)
in_place = click.option(
    "--in-place",
    is_flag=True,
    help="Overwrite the changed tensors in the files themselves, under a crash-safe journal.",
)
adapters = click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="ADAPTER[=STRENGTH]",
    help="Adapter and strength: 0.8, unet:0.8,text_encoder:0.5, or @FILE.json with patterns or "
    "Kohya block weights (repeatable, in order).",
)
relative_to = click.option(
    "--relative-to",
    type=click.Choice(("current", "base")),
    default="current",
    show_default=True,
    help="Compose adapters in order, or add every change relative to the base.",
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
dry_run = click.option(
    "--dry-run", is_flag=True, help="Read headers only; print the plan and write nothing."
)
architecture = click.option(
    "--architecture", metavar="NAME", help="Model family; found from the keys when not given."
)
base = click.option(
    "--base", metavar="BASE", help="Checkpoint the adapter belongs to: file, folder or hub id."
)
dtype = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="keep",
    show_default=True,
    help="Number type of the output.",
)
device = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, mps."
)
seed = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed."
)
allow_pickle = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Accept .pt/.bin/.ckpt files; they are read without executing anything.",
)
rank = click.option(
    "--rank",
    metavar="RULE",
    help="16, energy:0.99, fro:0.95, cumulative:0.9, ratio:100, noise, or several: "
    "max:64,energy:0.99.",
)
gram_for_rounding = click.option(
    "--gram",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Gram matrices of the modules' inputs, for --rounding gptq.",
)
