"""Read models: what the command line (and later the API) shows of runs, dispatches, attempts and nodes.

Reads the ledger, writes nothing. Every list is bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, Select, func, select

from orchestrator.db import Database
from orchestrator.domain import DispatchState, RunKind, RunState
from orchestrator.errors import RunNotFoundError
from orchestrator.schema import attempts, dispatches, nodes, run_events, runs

ALIVE_WITHIN: Final = 15.0
"""A node is alive when its heartbeat is at most this many seconds old."""


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as people and scripts see it. Moments are aware, in UTC; counts add up to ``total``."""

    id: UUID
    kind: RunKind
    state: RunState
    trigger: str
    task_id: int | None
    data_source_id: int | None
    theme_name: str | None
    total: int
    published: int
    skipped: int
    attempts: int
    error_code: str | None
    error_message: str | None
    awaits_slot: str | None
    created_at: datetime
    enqueued_at: datetime | None
    started_at: datetime | None
    next_attempt_at: datetime | None
    wake_at: datetime | None
    finished_at: datetime | None
    retry_of: UUID | None
    traceparent: str

    @property
    def pending(self) -> int:
        """Dispatches that are neither published nor skipped."""
        return self.total - self.published - self.skipped


@dataclass(frozen=True, slots=True)
class NodeView:
    """One worker or beat by its last sign of life."""

    name: str
    kind: str
    version: str
    queues: Sequence[str]
    concurrency: int | None
    started_at: datetime
    seen_at: datetime
    alive: bool


_RUN_COLUMNS: Final = [runs.c[name] for name in RunView.__dataclass_fields__]


class Insights:
    """Reads for people.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def runs(
        self,
        *,
        limit: int,
        kind: RunKind | None = None,
        state: RunState | None = None,
        task_id: int | None = None,
        data_source_id: int | None = None,
    ) -> list[RunView]:
        """Return the newest runs that fit every given filter, newest first."""
        wanted = {"kind": kind, "state": state, "task_id": task_id, "data_source_id": data_source_id}
        statement = select(*_RUN_COLUMNS).order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(limit)
        for name, value in wanted.items():
            if value is not None:
                statement = statement.where(runs.c[name] == value)
        with self._database.transaction() as connection:
            return [_run_view(row) for row in connection.execute(statement)]

    def run(self, run_id: UUID) -> RunView:
        """Return one run.

        Raises:
            RunNotFoundError: there is no such run.
        """
        with self._database.transaction() as connection:
            row = connection.execute(select(*_RUN_COLUMNS).where(runs.c.id == run_id)).one_or_none()
        if row is None:
            raise RunNotFoundError(f"there is no run {run_id}")
        return _run_view(row)

    def unfinished(self, run_ids: Sequence[UUID]) -> int:
        """Return how many of the runs are not over."""
        with self._database.transaction() as connection:
            over = runs.c.finished_at.is_not(None)
            return connection.scalar(select(func.count()).where(runs.c.id.in_(run_ids), ~over)) or 0

    def matching(self, prefix: str, limit: int = 2) -> list[UUID]:
        """Return ids of runs that begin with some hex digits, so that people may shorten them."""
        first, last = UUID(prefix.ljust(32, "0")), UUID(prefix.ljust(32, "f"))
        with self._database.transaction() as connection:
            return list(connection.scalars(select(runs.c.id).where(runs.c.id.between(first, last)).limit(limit)))

    def attempts(self, run_id: UUID) -> list[dict[str, Any]]:
        """Return every call that a run made to the Discovery Service, oldest first."""
        return self._rows(select(attempts).where(attempts.c.run_id == run_id).order_by(attempts.c.number))

    def events(self, run_id: UUID, limit: int = 200) -> list[dict[str, Any]]:
        """Return what happened to a run, oldest first."""
        return self._rows(
            select(run_events).where(run_events.c.run_id == run_id).order_by(run_events.c.id).limit(limit)
        )

    def skipped(self, run_id: UUID, limit: int) -> list[dict[str, Any]]:
        """Return dispatches of a run that were skipped, with the reason."""
        return self._rows(
            select(dispatches.c.data_source_id, dispatches.c.reason)
            .where(dispatches.c.run_id == run_id, dispatches.c.state == DispatchState.SKIPPED)
            .order_by(dispatches.c.data_source_id)
            .limit(limit)
        )

    def skip_reasons(self, run_id: UUID) -> dict[str, int]:
        """Return how many dispatches of a run were skipped, by reason."""
        statement = (
            select(dispatches.c.reason, func.count())
            .where(dispatches.c.run_id == run_id, dispatches.c.state == DispatchState.SKIPPED)
            .group_by(dispatches.c.reason)
        )
        with self._database.transaction() as connection:
            return {row.reason: row[1] for row in connection.execute(statement)}

    def nodes(self) -> list[NodeView]:
        """Return workers and beats by their last sign of life."""
        age = func.extract("epoch", func.clock_timestamp() - nodes.c.seen_at)
        with self._database.transaction() as connection:
            rows = connection.execute(select(nodes, (age <= ALIVE_WITHIN).label("alive")).order_by(nodes.c.name))
            return [NodeView(**row._mapping) for row in rows]  # noqa: SLF001 -- SQLAlchemy's documented name

    def _rows(self, statement: Select[Any]) -> list[dict[str, Any]]:
        with self._database.transaction() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]


def _run_view(row: Row[Any]) -> RunView:
    values = dict(row._mapping)  # noqa: SLF001 -- SQLAlchemy's documented name
    return RunView(**values | {"kind": RunKind(row.kind), "state": RunState(row.state)})
