"""`peftsurgery resize-rank`."""

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
    "--rank",
    required=True,
    metavar="RULE",
    help="Per module: 16, energy:0.99, fro:0.95, cumulative:0.9, ratio:100, noise, with min:4 and "
    "max:64; or one budget for the file, size:200MB or total-rank:4000; joined by commas.",
)
@click.option(
    "--conv-rank",
    metavar="RULE",
    help="Another rule for convolutions with a kernel larger than 1.",
)
@click.option(
    "--pad",
    is_flag=True,
    help="One rank for all modules, filled up with zeros: the number asked for, or the largest "
    "chosen. For servers that need one rank; a smaller adapter is only filled up.",
)
@click.option(
    "--gram",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE",
    help="Gram matrices of the modules' inputs (n, n), or their diagonals (n,), in safetensors: "
    "keep what acts on these inputs.",
)
@click.option(
    "--algorithm",
    type=click.Choice(("lora", "keep")),
    help="lora: fit full differences and rotations too (some need --base). keep: a LoKr stays one, "
    "what cannot is refused. Without it LoHa and LoKr become LoRA, and the others are carried.",
)
@click.option(
    "--kohya-compat",
    is_flag=True,
    help="Choose the ranks as resize_lora.py of sd-scripts did (one more for ratio, fro and "
    "cumulative).",
)
@click.option(
    "--to",
    type=click.Choice(LAYOUT_NAMES),
    metavar="LAYOUT",
    help="Layout to write; that of SRC when not given.",
)
@options.architecture
@options.base
@options.dtype
@options.device
@options.overwrite
@click.option(
    "--dry-run",
    is_flag=True,
    help="Read the values, print the curve of size against energy, write nothing.",
)
@options.allow_pickle
@options.display
def resize_rank(
    src: str,
    output: Path,
    *,
    rank: str,
    conv_rank: str | None,
    pad: bool,
    gram: Path | None,
    algorithm: str | None,
    kohya_compat: bool,
    to: str | None,
    architecture: str | None,
    base: str | None,
    dtype: str,
    device: str,
    overwrite: bool,
    dry_run: bool,
    allow_pickle: bool,
    display: Display,
) -> None:
    """Bring an adapter to other ranks, optimally, and say what that lost.

    SRC is a file, a folder or a hub id. The truncation is exact in the factors; the scale
    alpha / rank stays what it was. Weights that are stored fused are resized fused.
    """
    from peftsurgery.checkpoint import hash_ahead

    if not dry_run:
        hash_ahead(src)  # beside the import of torch
    from peftsurgery.operations.resize_rank import resize_rank as operation

    with display.progress("resize-rank") as progress:
        report = operation(
            src,
            output,
            rank=rank,
            conv_rank=conv_rank,
            to=to,
            architecture=architecture,
            base=base,
            algorithm=algorithm,
            gram=gram,
            pad=pad,
            kohya_compat=kohya_compat,
            dtype=dtype,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    display.finish(report)
