"""Who changed what."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import select

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
            statement = statement.where(audit_events.c.at >= wanted.since)
        if wanted.until is not None:
            statement = statement.where(audit_events.c.at < wanted.until)
        if after is not None:
            statement = statement.where(audit_events.c.id < after)
        with self._database.transaction() as connection:
            return [AuditView(*row) for row in connection.execute(statement)]
