"""`peftsurgery merge`."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display


@click.command()
@click.argument("base")
@options.adapters
@options.output_or_in_place
@options.in_place
@options.architecture
@options.relative_to
@options.dtype
@click.option(
    "--rounding",
    type=click.Choice(("auto", "nearest", "stochastic", "subspace", "gptq")),
    default="auto",
    show_default=True,
    help="How results are rounded to the output's number type. auto: nearest; into packed weights "
    "that, or error feedback in the input directions of the change (subspace), by what is "
    "predicted to survive. gptq needs --gram.",
)
@options.seed
@click.option(
    "--requant",
    default="auto",
    show_default=True,
    metavar="HOW",
    help="What packed (quantized) weights become: same (the base's own format; auto is this), "
    "dequant (plain weights), from-original:BASE16 (the unquantized base with the change, packed), "
    "residual:RANK (what rounding loses goes to an adapter beside the output).",
)
@click.option(
    "--qlora-base",
    metavar="WHICH",
    help="What the adapter was trained on: packed (BASE as it is packed; the default), original "
    "(the unquantized weights, needs --requant from-original:BASE16), or packed:FORMAT for a plain "
    "BASE that was packed for the training, as packed:nf4.",
)
@options.gram_for_rounding
@click.option(
    "--min-survival",
    type=click.FloatRange(0, 1),
    help="Fail when less than this share of the change survives rounding; 0.9 for packed weights "
    "unless given.",
)
@click.option(
    "--verify",
    type=click.Choice(("sample", "full")),
    default="sample",
    show_default=True,
    help="Recompute one tile of every touched tensor from the written file, or all of them.",
)
@click.option(
    "--tied",
    type=click.Choice(("error", "both", "untie")),
    default="error",
    show_default=True,
    help="When an adapter changes one side of an embedding that is also the output head: refuse, "
    "change both, or write two tensors.",
)
@click.option(
    "--residual-base",
    is_flag=True,
    help="BASE is the residual model that PiSSA, OLoRA and their like left, not the pristine one.",
)
@click.option(
    "--undo",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep the original bytes of the touched tensors here, for unmerge.",
)
@options.overwrite
@options.dry_run
@options.allow_pickle
@options.display
def merge(
    base: str,
    adapters: tuple[str, ...],
    *,
    output: Path | None,
    in_place: bool,
    architecture: str | None,
    relative_to: str,
    dtype: str,
    rounding: str,
    seed: int,
    requant: str,
    gram: Path | None,
    qlora_base: str | None,
    min_survival: float | None,
    verify: str,
    tied: str,
    residual_base: bool,
    undo: Path | None,
    overwrite: bool,
    dry_run: bool,
    allow_pickle: bool,
    display: Display,
) -> None:
    """Fold adapters into a base checkpoint, streamed and proved.

    BASE is a file, a sharded index, a folder or a hub id; no model code runs. Every module of
    every adapter lands on a weight of the right shape, or nothing is written.
    """
    from peftsurgery.operations.merge import merge as operation
    from peftsurgery.operations.strengths import parse

    with display.progress("merge") as progress:
        report = operation(
            base,
            [parse(text) for text in adapters],
            output,
            in_place=in_place,
            architecture=architecture,
            relative_to=relative_to,
            dtype=dtype,
            rounding=rounding,
            seed=seed,
            requant=requant,
            gram=gram,
            qlora_base=qlora_base,
            min_survival=min_survival,
            verify=verify,
            tied=tied,
            residual_base=residual_base,
            undo=undo,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    display.finish(report)
