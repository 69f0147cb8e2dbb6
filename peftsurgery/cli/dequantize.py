"""`peftsurgery dequantize`."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display


@click.command()
@click.argument("base")
@options.output
@options.dtype
@options.overwrite
@options.dry_run
@options.display
def dequantize(
    base: str,
    *,
    output: Path,
    dtype: str,
    overwrite: bool,
    dry_run: bool,
    display: Display,
) -> None:
    """Write a packed checkpoint with plain weights.

    What its configs say of the packing is taken out. Each weight gets the dtype it was packed from
    unless --dtype says otherwise.
    """
    from peftsurgery.operations.quantize import dequantize as operation

    with display.progress("dequantize") as progress:
        report = operation(
            base,
            output,
            dtype=dtype,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    display.finish(report)
