"""Who changed what."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, func, literal, literal_column, select

from orchestrator.db import Database
from orchestrator.schema import audit_events


@dataclass(frozen=True, slots=True)
class AuditView:
    """One action of a person or a caller; ``before`` and ``after`` are documents, as they were written."""

    id: int
    at: datetime
    actor: str
    action: str
    run_id: UUID | None
    task_id: int | None
    reason: str | None
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which actions are wanted: those that fit all that is given.

    Attributes:
        actor: who did it.
        action: what was done.
        run_id: to this run.
        task_id: to the schedule of this crawl task.
        since: at this moment or later.
        until: before this moment.
    """

    actor: str | None = None
    action: str | None = None
    run_id: UUID | None = None
    task_id: int | None = None
    since: datetime | None = None
    until: datetime | None = None


_COLUMNS: Final = [audit_events.c[name] for name in AuditView.__dataclass_fields__]
_MARGIN: Final = timedelta(minutes=1)
"""By how much numbers and moments may differ in order: transactions overtake each other, and clocks are corrected."""
_LAST_ID: Final = 2**63 - 1
# No index has this sum: the window is found by its ends, and never by sorting all of it where statistics are old.
_at: Final[ColumnElement[datetime]] = audit_events.c.at + literal_column("interval '0'")


class AuditInsights:
    """Reads the audit log.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def page_audit(self, wanted: AuditFilter, *, limit: int, after: int | None = None) -> list[AuditView]:
        """Return actions, newest first.

        Args:
            wanted: which.
            limit: at most so many.
            after: go on after the one with this id.
        """
        statement = select(*_COLUMNS).order_by(audit_events.c.id.desc()).limit(limit)
        for name in ("actor", "action", "run_id", "task_id"):
            if (value := getattr(wanted, name)) is not None:
                statement = statement.where(audit_events.c[name] == value)
        if wanted.since is not None:
            statement = statement.where(_at >= wanted.since, audit_events.c.id > _last_before(wanted.since))
        if wanted.until is not None:
            statement = statement.where(_at < wanted.until, audit_events.c.id < _first_after(wanted.until))
        if after is not None:
            statement = statement.where(audit_events.c.id < after)
        with self._database.autocommit() as connection:
            return [AuditView(*row) for row in connection.execute(statement)]


# Ids are in the order of moments but for the margin: of two actions that are further apart the later has the higher id.
# So those of a window are between these two, however few they are and whatever overtook what at its ends.


def _last_before(moment: datetime) -> ColumnElement[int]:
    """Return the id of the last action that is before a moment by more than the margin, or one before all."""
    # The database subtracts: it knows moments before the first and after the last one of Python.
    before = audit_events.c.at < literal(moment, audit_events.c.at.type) - _MARGIN
    last = select(audit_events.c.id).where(before).order_by(audit_events.c.at.desc()).limit(1)
    return func.coalesce(last.scalar_subquery(), 0)


def _first_after(moment: datetime) -> ColumnElement[int]:
    """Return the id of the first action that is after a moment by the margin or more, or one after all."""
    later = audit_events.c.at >= literal(moment, audit_events.c.at.type) + _MARGIN
    first = select(audit_events.c.id).where(later).order_by(audit_events.c.at).limit(1)
    return func.coalesce(first.scalar_subquery(), _LAST_ID)
