"""`peftsurgery inspect`."""

from __future__ import annotations

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display


@click.command()
@click.argument("path")
@options.base
@options.architecture
@click.option("--norms", is_flag=True, help="Compute the norm of every module's ΔW (reads all).")
@options.allow_pickle
@options.display
@options.html
def inspect(
    path: str,
    *,
    base: str | None,
    architecture: str | None,
    norms: bool,
    allow_pickle: bool,
    display: Display,
) -> None:
    """Say what a file or folder is and what every key in it means.

    PATH is a file, a sharded index, a folder (PEFT, transformers, diffusers pipeline) or
    a hub id, owner/repo[@revision][:file]. Of a checkpoint with packed weights the formats, bits
    per weight and what stays plain are said.
    """
    from peftsurgery.operations.inspect import inspect as operation

    display.finish(
        operation(
            path, base=base, architecture=architecture, allow_pickle=allow_pickle, norms=norms
        )
    )
