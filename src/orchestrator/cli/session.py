"""What commands share: their options and exit codes, and the services for as long as a short command runs."""

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Final

import typer

from orchestrator import bootstrap, migrations
from orchestrator.bootstrap import Services
from orchestrator.domain import MAX_BIGINT, CrawlArguments
from orchestrator.settings import current
from orchestrator.telemetry import configure_logging

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130
SHOWN: Final = 20
"""Rows that are shown unless told otherwise."""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Wait = Annotated[bool, typer.Option("--wait", help="Watch until it is over; exit 1 unless it succeeded.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why, for the audit log.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="Rows to show at most.")]
Task = Annotated[int | None, typer.Option("--task", min=1, max=MAX_BIGINT, help="Only those of this crawl task.")]


def _possible(task_id: int) -> int:
    return CrawlArguments(task_id).task_id  # refuses what can be no id


TaskId = Annotated[int, typer.Argument(metavar="TASK_ID", help="The crawl task's id.", callback=_possible)]


@contextmanager
def session() -> Iterator[Services]:
    """Give the services to a short command, over a database that is there and migrated."""
    quieten()
    try:
        bootstrap.home.open()
        ours = bootstrap.services()
        migrations.verify(ours.database)
        yield ours
    finally:
        leave()


def leave() -> None:
    """Close what a command opened."""
    bootstrap.services().sender.close()
    bootstrap.home.close()


def quieten(level: str = "WARNING") -> None:
    """Log from this level up, unless the settings name another."""
    log = current().log
    configure_logging(log if "level" in log.model_fields_set else log.model_copy(update={"level": level}))


def actor() -> str:
    """Return who is at the command line, for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # an account without a name, as containers have them
        return f"cli:{os.getuid()}"
