"""The command line: a group that knows its commands by name and imports one only when it runs."""

from __future__ import annotations

import click

from peftsurgery.cli.group import LazyGroup

COMMANDS = {  # name (its module in this package, dashes as underscores): first line of its help
    "inspect": "Say what a file or folder is and what every key in it means.",
    "convert": "Rewrite an adapter in another layout, exactly.",
    "resize-rank": "Bring an adapter to other ranks, optimally, and say what that lost.",
    "merge": "Fold adapters into a base checkpoint, streamed and proved.",
    "extract": "Take what a fine-tune changed out of it, as an adapter.",
    "combine": "Combine adapters into one, of any layouts, algorithms and ranks.",
    "unmerge": "Restore the base of a merged checkpoint, bit for bit.",
    "quantize": "Pack the matrices of a checkpoint in a quantized format.",
    "dequantize": "Write a packed checkpoint with plain weights.",
    "verify": "Say whether a merged checkpoint really is base + adapters.",
}


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"peftsurgery {version('peftsurgery')}")
        context.exit()


@click.group(
    cls=LazyGroup,
    commands_table=COMMANDS,
    package=__name__,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 a check failed; 2 usage or unreadable input; 3 unsupported; "
    "4 unsafe input refused; 130 interrupted.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Inspect and rewrite adapters and checkpoints on the files themselves."""
