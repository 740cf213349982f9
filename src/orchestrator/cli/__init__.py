"""The command line: thin over the services, tables and bars for people, ``--json`` for scripts.

Results go to standard output; warnings, progress and logs to standard error. Exit codes: 0, 1 failed,
2 usage or configuration, 130 interrupted. An error of ours is one line, never a traceback. Times are UTC, unless
they say in which time zone they are.

``processes``, ``runs``, ``schedules`` and ``api`` have the commands, ``session`` what these share, ``output`` how
things look.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from sqlalchemy.exc import DBAPIError

from orchestrator import __version__
from orchestrator.cli import api, processes, runs, schedules
from orchestrator.cli.output import say
from orchestrator.cli.session import FAILED, USAGE
from orchestrator.errors import (
    ConfigurationError,
    InvalidArgumentsError,
    OrchestratorError,
    UnreadableScheduleError,
)

app: Final = typer.Typer(
    name="orchestrator",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start here: [bold]orchestrator doctor[/] says whether everything fits, "
    "[bold]orchestrator up[/] starts a worker and a beat, [bold]orchestrator run 7 --wait[/] runs crawl task 7, "
    "[bold]orchestrator schedules[/] says what fires next.",
)
for commands in (processes.app, runs.app, schedules.app, api.app):
    app.add_typer(commands)

_USAGE_ERRORS: Final = (ConfigurationError, InvalidArgumentsError, UnreadableScheduleError)


def main() -> None:
    """Run the command line and exit."""
    # A shell may have closed them.
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115 -- to the end
    try:
        try:
            app(prog_name="orchestrator")
        finally:
            sys.stdout.flush()
    except OrchestratorError as error:
        _fail(str(error), USAGE if isinstance(error, _USAGE_ERRORS) else FAILED)
    except DBAPIError as error:
        # The server's sentence only: the driver's own quotes the address, and that holds the password.
        complaint = getattr(getattr(error.orig, "diag", None), "message_primary", None)
        _fail(f"PostgreSQL: {complaint or type(error.orig).__name__}; `orchestrator doctor` says what to do", FAILED)
    except OSError as error:
        # What is left to be written would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"{error.filename or 'the output'} cannot be read or written: {error.strerror or error}", FAILED)


def _fail(sentence: str, code: int) -> NoReturn:
    say(f"orchestrator: {sentence}")
    sys.exit(code)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 -- typer's callbacks take the value
    if wanted:
        typer.echo(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """The work engine behind a web-crawling platform."""
