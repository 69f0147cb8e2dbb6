"""`peftsurgery verify`."""

from __future__ import annotations

import click

from peftsurgery.cli import options
from peftsurgery.cli.running import Display


@click.command()
@click.argument("merged")
@click.option(
    "--base",
    required=True,
    metavar="BASE",
    help="The checkpoint the adapters are said to have been merged into.",
)
@options.adapters
@options.architecture
@options.relative_to
@click.option(
    "--tied",
    type=click.Choice(("both", "untie")),
    default="both",
    show_default=True,
    help="How a change of an embedding that is also the output head was merged.",
)
@click.option(
    "--residual-base",
    is_flag=True,
    help="BASE is the residual model that PiSSA, OLoRA and their like left.",
)
@options.allow_pickle
@options.display
def verify(
    merged: str,
    *,
    base: str,
    adapters: tuple[str, ...],
    architecture: str | None,
    relative_to: str,
    tied: str,
    residual_base: bool,
    allow_pickle: bool,
    display: Display,
) -> None:
    """Say whether a merged checkpoint really is base + adapters.

    Whoever merged it: every tensor is computed again and compared, to one unit in the last place of
    MERGED's number type; where it is packed, to the step of its grid, and by the strength that is
    found there. Exit code 0 yes, 1 no, 3 it cannot be decided.
    """
    from peftsurgery.operations.strengths import parse
    from peftsurgery.operations.verify import verify as operation

    with display.progress("verify") as progress:
        report = operation(
            merged,
            base,
            [parse(text) for text in adapters],
            architecture=architecture,
            relative_to=relative_to,
            tied=tied,
            residual_base=residual_base,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    display.finish(report)
