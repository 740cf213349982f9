"""Runs, and what is kept of each: its dispatches, its calls to the Discovery Service, and what happened to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Self
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Row,
    exists,
    func,
    literal,
    or_,
    select,
)

from orchestrator.db import Database
from orchestrator.domain import (
    AnalysisArguments,
    Arguments,
    AttemptOutcome,
    CrawlArguments,
    DispatchState,
    RunKind,
    RunState,
    SkipReason,
    message_id,
)
from orchestrator.errors import InvalidArgumentsError, RunNotFoundError
from orchestrator.schema import attempts, dispatches, run_events, runs

MOST_SKIPS: Final = 10_000


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
    scheduled_for: datetime | None
    traceparent: str

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Read a row of :data:`RUN_COLUMNS`."""
        run_id, kind, state, *rest = row
        return cls(run_id, RunKind(kind), RunState(state), *rest)

    @property
    def pending(self) -> int:
        """Dispatches that are neither published nor skipped."""
        return self.total - self.published - self.skipped

    @property
    def arguments(self) -> Arguments | None:
        """What it was asked for; none when its message had no usable arguments, or today's rules refuse them."""
        try:
            if self.task_id is not None:
                return CrawlArguments(self.task_id)
            if self.data_source_id is not None and self.theme_name is not None:
                return AnalysisArguments(self.data_source_id, self.theme_name)
        except InvalidArgumentsError:
            return None
        return None

    @property
    def what(self) -> str:
        """What it does, in words."""
        return f"{self.kind} without usable arguments" if self.arguments is None else self.arguments.what


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One call to the Discovery Service."""

    run_id: UUID
    number: int
    node: str
    started_at: datetime
    lease_until: datetime
    finished_at: datetime | None
    outcome: AttemptOutcome | None
    status: int | None
    code: str | None
    message: str | None
    seconds: float | None
    retry_after: float | None
    next_attempt_at: datetime | None


@dataclass(frozen=True, slots=True)
class EventView:
    """Something that happened to a run, and the state that it had afterwards."""

    id: int
    run_id: UUID
    at: datetime
    event: str
    state: RunState
    code: str | None
    message: str | None


@dataclass(frozen=True, slots=True)
class DispatchView:
    """One data source of a crawl run, and the id that every message about it carries."""

    run_id: UUID
    data_source_id: int
    crawl_config_id: int | None
    state: DispatchState
    reason: SkipReason | None
    published_at: datetime | None
    message_id: UUID


RUN_COLUMNS: Final = [runs.c[name] for name in RunView.__dataclass_fields__]
_ATTEMPT_COLUMNS: Final = [attempts.c[name] for name in AttemptView.__dataclass_fields__]
_EVENT_COLUMNS: Final = [run_events.c[name] for name in EventView.__dataclass_fields__]
_DISPATCH_COLUMNS: Final = [dispatches.c[name] for name in DispatchView.__dataclass_fields__ if name != "message_id"]
Conditions = list[ColumnElement[bool]]


class RunInsights:
    """Reads runs.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def run(self, run_id: UUID) -> RunView:
        """Return one run.

        Raises:
            RunNotFoundError: there is no such run.
        """
        with self._database.autocommit() as connection:
            row = connection.execute(select(*RUN_COLUMNS).where(runs.c.id == run_id)).one_or_none()
        if row is None:
            raise RunNotFoundError(f"there is no run {run_id}")
        return RunView.of(row)

    def unfinished(self, run_ids: Sequence[UUID]) -> int:
        """Return how many of the runs are not over."""
        with self._database.autocommit() as connection:
            over = runs.c.finished_at.is_not(None)
            return connection.scalar(select(func.count()).where(runs.c.id.in_(run_ids), ~over)) or 0

    def matching(self, prefix: str, limit: int = 2) -> list[UUID]:
        """Return ids of runs that begin with some hex digits, so that people may shorten them."""
        first, last = UUID(prefix.ljust(32, "0")), UUID(prefix.ljust(32, "f"))
        with self._database.autocommit() as connection:
            return list(connection.scalars(select(runs.c.id).where(runs.c.id.between(first, last)).limit(limit)))

    def queued(self, limit: int) -> int:
        """Return how many runs wait for a worker, counted up to a limit."""
        waiting = select(literal(1)).where(runs.c.state == RunState.QUEUED).limit(limit).subquery()
        with self._database.autocommit() as connection:
            return connection.scalar(select(func.count()).select_from(waiting)) or 0

    def unfinished_at(self, task_id: int, moment: datetime) -> RunView | None:
        """Return the newest run of a crawl task that was unfinished at a moment, by what is known of it now."""
        statement = (
            select(*RUN_COLUMNS)
            .where(runs.c.task_id == task_id, runs.c.created_at <= moment)
            .where(or_(runs.c.finished_at.is_(None), runs.c.finished_at > moment))
            .order_by(runs.c.created_at.desc())
            .limit(1)
        )
        with self._database.autocommit() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else RunView.of(row)

    # --- What is kept of one run -----------------------------------------------------------------------------

    def page_attempts(self, run_id: UUID, *, limit: int, after: int | None = None) -> list[AttemptView]:
        """Return the calls that a run made to the Discovery Service, oldest first, after the one of a number."""
        statement = select(*_ATTEMPT_COLUMNS).where(attempts.c.run_id == run_id).order_by(attempts.c.number)
        if after is not None:
            statement = statement.where(attempts.c.number > after)
        with self._database.autocommit() as connection:
            return [_attempt_view(row) for row in connection.execute(statement.limit(limit))]

    def last_attempt(self, run_id: UUID) -> AttemptView | None:
        """Return the last call that a run made to the Discovery Service."""
        statement = select(*_ATTEMPT_COLUMNS).where(attempts.c.run_id == run_id).order_by(attempts.c.number.desc())
        with self._database.autocommit() as connection:
            row = connection.execute(statement.limit(1)).one_or_none()
        return None if row is None else _attempt_view(row)

    def page_events(self, run_id: UUID, *, limit: int, after: int | None = None) -> list[EventView]:
        """Return what happened to a run, oldest first, after the event of an id."""
        statement = select(*_EVENT_COLUMNS).where(run_events.c.run_id == run_id).order_by(run_events.c.id)
        if after is not None:
            statement = statement.where(run_events.c.id > after)
        with self._database.autocommit() as connection:
            rows = connection.execute(statement.limit(limit))
            return [EventView(**{**row._mapping, "state": RunState(row.state)}) for row in rows]  # noqa: SLF001 -- SQLAlchemy's documented name

    def page_dispatches(
        self, run_id: UUID, *, limit: int, after: int | None = None, state: DispatchState | None = None
    ) -> list[DispatchView]:
        """Return the plan of a crawl run by data source, or what is in one state of it.

        Args:
            run_id: the run.
            limit: at most so many.
            after: go on after this data source.
            state: in this state only.
        """
        statement = select(*_DISPATCH_COLUMNS).where(dispatches.c.run_id == run_id)
        if after is not None:
            statement = statement.where(dispatches.c.data_source_id > after)
        if state is not None:
            statement = statement.where(*_in_state(run_id, state))
        with self._database.autocommit() as connection:
            rows = connection.execute(statement.order_by(dispatches.c.data_source_id).limit(limit))
            return [_dispatch_view(row) for row in rows]

    def skip_reasons(self, run_id: UUID) -> dict[SkipReason, int]:
        """Return how many dispatches of a run were skipped, by reason, counted up to :data:`MOST_SKIPS` in all."""
        some = (
            select(dispatches.c.reason)
            .where(dispatches.c.run_id == run_id, dispatches.c.reason.is_not(None))
            .limit(MOST_SKIPS)
            .subquery()
        )
        with self._database.autocommit() as connection:
            rows = connection.execute(select(some.c.reason, func.count()).group_by(some.c.reason))
            return {SkipReason(row.reason): row[1] for row in rows}


# --- Statements ----------------------------------------------------------------------------------------------------


def _in_state(run_id: UUID, state: DispatchState) -> Conditions:
    if state is DispatchState.SKIPPED:
        # What the index has: one on the state itself would make marking a batch twice as dear.
        return [dispatches.c.reason.is_not(None)]
    # A million rows are not walked through for what the run's counts say is not there. For what is there they may be, a
    # tenth of a second: an index of pending rows would make marking each of the million dearer; see the schema.
    left = {
        DispatchState.PENDING: runs.c.published + runs.c.skipped < runs.c.total,
        DispatchState.PUBLISHED: runs.c.published > 0,
    }
    return [dispatches.c.state == state, exists().where(runs.c.id == run_id, left[state])]


def _attempt_view(row: Row[Any]) -> AttemptView:
    values = dict(row._mapping)  # noqa: SLF001 -- SQLAlchemy's documented name
    return AttemptView(**values | {"outcome": row.outcome and AttemptOutcome(row.outcome)})


def _dispatch_view(row: Row[Any]) -> DispatchView:
    return DispatchView(
        row.run_id,
        row.data_source_id,
        row.crawl_config_id,
        DispatchState(row.state),
        row.reason and SkipReason(row.reason),
        row.published_at,
        message_id(row.run_id, row.data_source_id),
    )
