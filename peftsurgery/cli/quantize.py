"""`peftsurgery quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display


@click.command()
@click.argument("base")
@options.output
@click.option(
    "--format",
    "format_",
    required=True,
    metavar="FORMAT",
    help="nf4, fp4, int8, fp8-scaled, gptq …; a wrong name lists them.",
)
@click.option("--block", type=int, metavar="N", help="Values that share a scale (nf4, fp4).")
@click.option("--group", type=int, metavar="N", help="Inputs that share a scale (gptq and others).")
@click.option("--bits", type=int, metavar="N", help="Bits of a code, where the format has several.")
@click.option("--nested/--no-nested", default=None, help="Pack the scales too (nf4, fp4).")
@click.option("--only", multiple=True, metavar="PATTERN", help="Pack just these matrices.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these matrices plain.")
@click.option(
    "--rounding",
    type=click.Choice(("nearest", "stochastic", "gptq")),
    default="nearest",
    show_default=True,
    help="How codes are chosen; gptq feeds errors forward and needs --gram.",
)
@options.gram_for_rounding
@options.seed
@options.overwrite
@options.dry_run
@options.allow_pickle
@options.display
def quantize(
    base: str,
    *,
    output: Path,
    format_: str,
    block: int | None,
    group: int | None,
    bits: int | None,
    nested: bool | None,
    only: tuple[str, ...],
    exclude: tuple[str, ...],
    rounding: str,
    gram: Path | None,
    seed: int,
    overwrite: bool,
    dry_run: bool,
    allow_pickle: bool,
    display: Display,
) -> None:
    """Pack the matrices of a checkpoint in a quantized format.

    BASE is a file, a sharded index, a folder or a hub id. Embeddings and the head stay plain unless
    --only names them, and the config that loaders need is written; the report says what every
    weight lost.
    """
    from peftsurgery.operations.quantize import quantize as operation

    given = {"block": block, "group": group, "bits": bits, "nested": nested}
    with display.progress("quantize") as progress:
        report = operation(
            base,
            output,
            format=format_,
            options={name: value for name, value in given.items() if value is not None},
            only=only,
            exclude=exclude,
            rounding=rounding,
            gram=gram,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    display.finish(report)
