"""`peftsurgery convert`."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display
from peftsurgery.layouts import LAYOUT_NAMES


@click.command()
@click.argument("src")
@options.output
@click.option(
    "--to",
    required=True,
    type=click.Choice(LAYOUT_NAMES),
    metavar="LAYOUT",
    help=f"Layout to write: {', '.join(LAYOUT_NAMES)}.",
)
@options.architecture
@options.base
@click.option(
    "--algorithm",
    type=click.Choice(("lora", "lokr", "full")),
    help="Change the algorithm too; 'lora' needs --rank unless the change is exact.",
)
@options.rank
@options.dtype
@click.option(
    "--alpha",
    type=click.Choice(("keep", "fold")),
    default="keep",
    show_default=True,
    help="Keep alpha as it is, or fold the scale into the factors.",
)
@click.option(
    "--drop",
    multiple=True,
    metavar="PATTERN",
    help="Leave out the keys that match (glob; repeatable).",
)
@click.option(
    "--only",
    multiple=True,
    metavar="COMPONENT",
    help="Convert these components only: unet, text_encoder, … (repeatable).",
)
@click.option(
    "--keep-unknown",
    is_flag=True,
    help="Carry keys that nothing explains as they are, instead of refusing the file.",
)
@options.overwrite
@options.dry_run
@options.allow_pickle
@options.display
def convert(
    src: str,
    output: Path,
    *,
    to: str,
    architecture: str | None,
    base: str | None,
    algorithm: str | None,
    rank: str | None,
    dtype: str,
    alpha: str,
    drop: tuple[str, ...],
    only: tuple[str, ...],
    keep_unknown: bool,
    overwrite: bool,
    dry_run: bool,
    allow_pickle: bool,
    display: Display,
) -> None:
    """Rewrite an adapter in another layout, exactly.

    SRC is a file, a sharded index, a folder or a hub id, owner/repo[@revision][:file]. Every
    key is accounted for, or nothing is written. Whole checkpoints go by the same tables.
    """
    from peftsurgery.checkpoint import hash_ahead

    if not dry_run:
        hash_ahead(src)  # beside the import of torch
    from peftsurgery.operations.convert import convert as operation

    with display.progress("convert") as progress:
        report = operation(
            src,
            output,
            to=to,
            architecture=architecture,
            base=base,
            algorithm=algorithm,
            rank=rank,
            dtype=dtype,
            alpha=alpha,
            drop=drop,
            only=only or None,
            keep_unknown=keep_unknown,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    display.finish(report)
