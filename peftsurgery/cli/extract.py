"""`peftsurgery extract`."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display
from peftsurgery.layouts import LAYOUT_NAMES


def _factor(_: click.Context, __: click.Parameter, value: str) -> int | None:
    """A whole number that is -1 or above 0, or None for 'auto'."""
    if value == "auto":
        return None
    if not value.removeprefix("-").isdigit() or not (int(value) == -1 or int(value) > 0):
        raise click.BadParameter(f"{value!r}: expected -1, a number above 0, or auto.")
    return int(value)


@click.command()
@click.argument("tuned")
@click.argument("base")
@options.output
@options.rank
@click.option(
    "--algorithm",
    type=click.Choice(("lora", "lokr", "full")),
    default="lora",
    show_default=True,
    help="What to fit the change with; 'full' writes it whole. 'lora' needs --rank.",
)
@click.option(
    "--to",
    type=click.Choice(LAYOUT_NAMES),
    metavar="LAYOUT",
    help="Layout to write, see convert; peft for language models and kohya for the rest when not "
    "given.",
)
@click.option(
    "--factor",
    metavar="NUMBER|auto",
    callback=_factor,
    default="-1",
    show_default=True,
    help="How LoKr cuts the sides of a weight: the size of the small factor, -1 for near-square, "
    "'auto' for the most exact cut of each weight.",
)
@options.architecture
@click.option(
    "--only",
    multiple=True,
    metavar="COMPONENT",
    help="Extract these components only: unet, text_encoder, … (repeatable).",
)
@click.option(
    "--targets",
    multiple=True,
    metavar="PATTERN",
    help="Extract only the modules that match: a path, its last names or a glob (repeatable).",
)
@click.option(
    "--exclude",
    "--drop",
    "exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave out the modules that match (repeatable).",
)
@options.dtype
@options.seed
@options.overwrite
@options.dry_run
@options.allow_pickle
@options.display
def extract(
    tuned: str,
    base: str,
    output: Path,
    *,
    rank: str | None,
    algorithm: str,
    to: str | None,
    factor: int | None,
    architecture: str | None,
    only: tuple[str, ...],
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    dtype: str,
    seed: int,
    overwrite: bool,
    dry_run: bool,
    allow_pickle: bool,
    display: Display,
) -> None:
    """Take what a fine-tune changed out of it, as an adapter.

    TUNED and BASE are files, sharded indexes, folders or hub ids; they may name, shard and fuse
    their tensors differently, and be packed: weights are compared as what they stand for. BASE +
    the written adapter is measured against TUNED.
    """
    from peftsurgery.checkpoint import hash_ahead

    if not dry_run:
        hash_ahead(tuned, base)  # beside the import of torch
    from peftsurgery.operations.extract import extract as operation

    with display.progress("extract") as progress:
        report = operation(
            tuned,
            base,
            output,
            rank=rank,
            algorithm=algorithm,
            to=to,
            architecture=architecture,
            factor=factor,
            only=only,
            targets=targets,
            exclude=exclude,
            dtype=dtype,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    display.finish(report)
