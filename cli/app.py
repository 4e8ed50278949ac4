"""The program: its verbs in order, and what becomes of errors."""

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dynamize import __version__
from dynamize.cli import artifacts, catalogue, interrupts, look, runs
from dynamize.cli.console import complain
from dynamize.cli.suggest import suggest
from dynamize.errors import DynamizeError
from dynamize.runtime.threads import share_threads

_USER_ERRNOS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "ENAMETOOLONG", "EIO")
}

_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, of which newer versions of typer have a copy


class _Program(TyperGroup):
    """Turns what a user can repair into one red line and exit code 2; anything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DynamizeError as error:
            complain(str(error))
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            complain(f"{error.format_message()} See `{error.ctx.command_path if error.ctx else 'dynamize'} --help`.")
        except KeyboardInterrupt:
            _stopped(ctx)
        except Exception as error:
            if interrupts.seen():
                _stopped(ctx)
            elif isinstance(error, OSError) and error.errno in _USER_ERRNOS:
                place = f"{error.filename}: " if error.filename else ""
                complain(f"{place}{error.strerror}. Free some space, or name a place that you may read and write.")
            else:
                raise
        raise typer.Exit(2)


def _stopped(ctx: Any) -> None:
    complain("stopped; go on with --resume" if ctx.invoked_subcommand == "run" else "stopped")


app = typer.Typer(
    cls=_Program,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynamize {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn a trained CNN into a dynamic network that really skips work, and measure what it saves.

    Begin with: dynamize run quickstart
    """


app.command()(runs.run)
app.command()(runs.check)
app.command()(look.inspect)
app.command()(look.report)
app.command()(suggest)
app.command()(artifacts.bench)
app.command()(artifacts.calibrate)
app.command()(artifacts.predict)
app.command()(artifacts.export)
app.command()(catalogue.transforms)
app.add_typer(catalogue.recipes, name="recipes")


def main() -> None:
    """Entry point of the `dynamize` command."""
    interrupts.remember()
    try:
        Path.cwd()
    except FileNotFoundError:  # torch would end the process
        complain("the folder that you are in does not exist any more: cd to another one")
        sys.exit(2)
    share_threads()
    app(prog_name="dynamize")
