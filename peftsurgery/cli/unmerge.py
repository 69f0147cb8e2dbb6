"""`peftsurgery unmerge`."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display


@click.command()
@click.argument("merged")
@click.option(
    "--undo",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What merge --undo wrote, or the journal of an interrupted merge in place.",
)
@options.output_or_in_place
@options.in_place
@options.overwrite
@options.dry_run
@options.display
def unmerge(
    merged: str,
    *,
    undo: Path,
    output: Path | None,
    in_place: bool,
    overwrite: bool,
    dry_run: bool,
    display: Display,
) -> None:
    """Restore the base of a merged checkpoint, bit for bit.

    MERGED must be what the merge wrote, and the result is compared with the base, both by SHA-256.
    """
    from peftsurgery.operations.unmerge import unmerge as operation

    with display.progress("unmerge") as progress:
        report = operation(
            merged,
            undo,
            output,
            in_place=in_place,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    display.finish(report)
