"""What commands print: tables for people, one JSON document for scripts; sentences beside the result to stderr."""

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Final

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator import doctor
from orchestrator.domain import FiringOutcome, RunState, ScheduleState

STYLES: Final[dict[str, str]] = {
    RunState.QUEUED: "cyan",
    RunState.RUNNING: "blue",
    RunState.RETRYING: "yellow",
    RunState.SUCCEEDED: "green",
    RunState.FAILED: "bold red",
    RunState.CANCELED: "magenta",
    ScheduleState.INVALID: "bold red",
    ScheduleState.PAUSED: "yellow",
    ScheduleState.ACTIVE: "green",
    FiringOutcome.STARTED: "green",
    FiringOutcome.MISSED: "bold red",
    FiringOutcome.SKIPPED: "yellow",
    doctor.Status.OK: "green",
    doctor.Status.WARN: "yellow",
    doctor.Status.FAIL: "bold red",
}


def print_document(document: object) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(document, default=_plain, ensure_ascii=False, indent=2))


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None, more: int = 0
) -> None:
    """Print a table; ``more`` rows that are not shown get a line."""
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    shown = console()
    shown.print(table)
    if more > 0:
        shown.print(f"… and {more} more; --limit shows more of them")


def _cell(value: object) -> Text:
    if value is None:
        return Text("")
    text = stamp(value) if isinstance(value, datetime) else str(round(value, 3) if isinstance(value, float) else value)
    return Text(printable(text), STYLES.get(text, ""))


def console() -> Console:
    """Return standard output, for people."""
    # A pipe has no width; wrapped at 80 columns no line of a table could be searched for.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 240)


def stamp(moment: datetime | None) -> str:
    """Write a moment in UTC."""
    return "" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def printable(text: str) -> str:
    """Return text without what could steer the terminal, for others sent it."""
    return "".join(each if each.isprintable() or each == "\n" else "�" for each in text)


def say(sentence: str) -> None:
    """Tell people something beside the result."""
    with suppress(OSError):  # a full disk behind it is no reason to stop
        sys.stderr.write(f"{printable(sentence)}\n")
        sys.stderr.flush()
