"""The Click group: lazy subcommands, and the one place where an error becomes an exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

import click

from peftsurgery.errors import PeftSurgeryError, nearest

INTERRUPTED = 130
UNREADABLE = 2
INTERNAL = 1


class LazyGroup(click.Group):
    """A group over a table `name -> short help`; the command object is looked up in
    `package.<name with underscores>` under the same name, when it is first needed."""

    def __init__(
        self,
        name: str | None = None,
        *,
        commands_table: Mapping[str, str],
        package: str,
        **settings: object,
    ) -> None:
        super().__init__(name, **settings)  # pyright: ignore[reportArgumentType]
        self.table = commands_table
        self.package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command object, importing its module; None for an unknown name."""
        if cmd_name not in self.table:
            return None
        attribute = cmd_name.replace("-", "_")
        return getattr(import_module(f"{self.package}.{attribute}"), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.table.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click's rule, with the nearest names for an unknown command."""
        name = args[0]
        if name not in self.table and not name.startswith("-") and not ctx.resilient_parsing:
            close = nearest(name, self.table) or list(self.table)
            raise click.UsageError(f"no command {name!r}; did you mean {' or '.join(close)}?", ctx)
        return super().resolve_command(ctx, args)

    def main(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: object
    ) -> NoReturn:
        """Run and leave by `SystemExit` with the documented code (see `PeftSurgeryError`).

        Errors raised on purpose, bad options and operating-system errors print one message; an
        unexpected exception keeps its traceback and ends with 1. With `--json` among the
        arguments the error is also a JSON document on stdout.
        """
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra["standalone_mode"] = False
        try:
            code = super().main(arguments, prog_name, **extra)  # pyright: ignore
        except PeftSurgeryError as error:
            code = self._fail(error, str(error), error.exit_code, arguments)
        except click.UsageError as error:
            hint = f"\nTry '{error.ctx.command_path} --help'." if error.ctx else ""
            code = self._fail(error, error.format_message() + hint, error.exit_code, arguments)
        except click.ClickException as error:
            code = self._fail(error, error.format_message(), error.exit_code, arguments)
        except (click.Abort, KeyboardInterrupt) as error:
            code = self._fail(error, "interrupted", INTERRUPTED, arguments)
        except OSError as error:
            if error.errno is None or error.errno == errno.EPIPE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            code = self._fail(error, f"{where}{error.strerror}", UNREADABLE, arguments)
        except Exception as error:
            self._json(error, f"{type(error).__name__}: {error}", INTERNAL, arguments)
            raise
        sys.exit(code if isinstance(code, int) else 0)

    def _fail(self, error: BaseException, message: str, code: int, arguments: list[str]) -> int:
        from peftsurgery.reports.text import clean

        lines = "\n  ".join(clean(line) for line in message.splitlines())
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(lines, err=True)
        self._json(error, message, code, arguments)
        return code

    def _json(self, error: BaseException, message: str, code: int, arguments: list[str]) -> None:
        if "--json" not in arguments:
            return
        from peftsurgery.reports.json import render_error

        operation = next((word for word in arguments if word in self.table), None)
        click.echo(
            render_error(type(error).__name__, message, exit_code=code, operation=operation),
            nl=False,
        )
