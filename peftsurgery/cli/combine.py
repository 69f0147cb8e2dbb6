"""`peftsurgery combine`."""

from __future__ import annotations

from pathlib import Path

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display
from peftsurgery.layouts import LAYOUT_NAMES

METHODS = (  # the names of merge_methods.METHODS, without importing torch
    "linear",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "magnitude_prune",
    "sce",
    "slerp",
    "karcher",
    "knots",
    "tsv",
    "iso_c",
    "iso_cts",
    "core_ties",
)


@click.command()
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="ADAPTER[=WEIGHT]",
    help="Adapter (or fine-tuned checkpoint) and weight: 0.5, unet:0.8,text_encoder:0.5, or "
    "@FILE.json with patterns or Kohya block weights (repeatable).",
)
@options.output
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="linear",
    show_default=True,
    metavar="METHOD",
    help=f"How changes are combined: {', '.join(METHODS)}.",
)
@options.base
@click.option(
    "--rank",
    metavar="RULE",
    help="Rank of the result: 16, energy:0.99, fro:0.95, cumulative:0.9, ratio:100, or several: "
    "max:64,energy:0.99. Without it what is exact stays exact.",
)
@click.option(
    "--algorithm",
    type=click.Choice(("lora", "lokr", "full")),
    help="Algorithm of the result; LoRA, or what the inputs are where that is exact.",
)
@click.option(
    "--to",
    type=click.Choice(LAYOUT_NAMES),
    metavar="LAYOUT",
    help="Layout to write; that of the first adapter when not given.",
)
@options.architecture
@click.option(
    "--density", type=float, help="Share of elements that stay (ties, dare, della, …, sce, knots)."
)
@click.option("--scale", "--lambda", "scale", type=float, help="Factor on the result (default 1).")
@click.option(
    "--epsilon", type=float, help="della: half the range of keep probabilities (default 0.15)."
)
@click.option(
    "--gamma", type=float, help="breadcrumbs: share of the largest that go (default 0.01)."
)
@click.option(
    "--majority-sign",
    type=click.Choice(("total", "frequency")),
    help="Elect signs by the weighted sum (default) or by counting.",
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Divide by the sum of the weights (ties, knots, core_ties: on unless switched off).",
)
@click.option(
    "--rescale/--no-rescale",
    default=None,
    help="dare, della: divide what stays by its probability (on unless switched off).",
)
@click.option("--keep", type=float, help="tsv: share of each adapter's rank (default one in n).")
@click.option(
    "--common", type=float, help="iso_cts: share of the rank for common directions (default 0.8)."
)
@options.seed
@options.dtype
@options.overwrite
@options.dry_run
@options.allow_pickle
@options.display
def combine(
    adapters: tuple[str, ...],
    output: Path,
    *,
    method: str,
    base: str | None,
    rank: str | None,
    algorithm: str | None,
    to: str | None,
    architecture: str | None,
    density: float | None,
    scale: float | None,
    epsilon: float | None,
    gamma: float | None,
    majority_sign: str | None,
    normalize: bool | None,
    rescale: bool | None,
    keep: float | None,
    common: float | None,
    seed: int,
    dtype: str,
    overwrite: bool,
    dry_run: bool,
    allow_pickle: bool,
    display: Display,
) -> None:
    """Combine adapters into one, of any layouts, algorithms and ranks.

    The method works on the changes of the weights, never on factors apart. With whole checkpoints
    as inputs, fine-tunes of --base, the result is a checkpoint.
    """
    from peftsurgery.checkpoint import hash_ahead
    from peftsurgery.operations.strengths import parse

    sources = [parse(text) for text in adapters]
    if not dry_run:
        hash_ahead(*(source for source, _ in sources))  # beside the import of torch
    from peftsurgery.operations.combine import combine as operation

    with display.progress("combine") as progress:
        report = operation(
            sources,
            output,
            method=method,
            base=base,
            rank=rank,
            algorithm=algorithm,
            to=to,
            architecture=architecture,
            density=density,
            scale=scale,
            epsilon=epsilon,
            gamma=gamma,
            majority_sign=majority_sign,
            normalize=normalize,
            rescale=rescale,
            keep=keep,
            common=common,
            seed=seed,
            dtype=dtype,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    display.finish(report)
