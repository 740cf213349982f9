"""Read models: what the command line (and later the API) shows of runs, schedules, slots and nodes.

Reads the ledger, writes nothing. Every list is bounded, and ordered by keys that an index has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import FromClause, Row, Select, and_, column, exists, func, literal, null, or_, select, true, union_all
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from orchestrator.db import Database
from orchestrator.domain import DispatchState, FiringOutcome, FiringReason, RunKind, RunState, ScheduleState
from orchestrator.errors import RunNotFoundError, ScheduleNotFoundError
from orchestrator.schema import (
    attempts,
    audit_events,
    dispatches,
    firings,
    nodes,
    pauses,
    run_events,
    runs,
    schedule_history,
    schedules,
)

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
    scheduled_for: datetime | None
    traceparent: str

    @property
    def pending(self) -> int:
        """Dispatches that are neither published nor skipped."""
        return self.total - self.published - self.skipped


class NodeStatus(StrEnum):
    """How a node is, by its last sign of life."""

    READY = "ready"
    DEGRADED = "degraded"
    """It does its work; something outside keeps that from having its full effect."""
    NOT_READY = "not ready"
    """It lives, and says itself what keeps it from its work."""
    SILENT = "silent"
    """It ended without a word, froze, or cannot reach the database."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """One worker or beat by its last sign of life."""

    name: str
    kind: str
    version: str
    queues: Sequence[str]
    concurrency: int | None
    host: str | None
    problem: str | None
    degraded: str | None
    started_at: datetime
    seen_at: datetime
    alive: bool

    @property
    def ready(self) -> bool:
        """Whether it does its work."""
        return self.status in {NodeStatus.READY, NodeStatus.DEGRADED}

    @property
    def status(self) -> NodeStatus:
        """All of it in a word."""
        if not self.alive:
            return NodeStatus.SILENT
        if self.problem is not None:
            return NodeStatus.NOT_READY
        return NodeStatus.READY if self.degraded is None else NodeStatus.DEGRADED

    @property
    def because(self) -> str | None:
        """Why it is not simply ready, as far as it said so itself."""
        return self.problem or self.degraded


@dataclass(frozen=True, slots=True)
class FiringView:
    """What became of a slot, or, with ``through``, of all slots from one to another."""

    task_id: int
    scheduled_for: datetime
    through: datetime | None
    outcome: FiringOutcome
    reason: FiringReason | None
    run_id: UUID | None
    claimed_at: datetime
    claimed_by: str

    def covers(self, slot: datetime) -> bool:
        """Whether this is the record of a slot."""
        return self.scheduled_for <= slot <= (self.through or self.scheduled_for)


@dataclass(frozen=True, slots=True)
class ScheduleView:
    """One schedule as it was last read. Policies are as written, none where the default holds."""

    task_id: int
    state: ScheduleState
    text: str | None
    canonical: str | None
    zone: str
    misfire_policy: str | None
    overlap_policy: str | None
    problem: str | None
    next_fire_at: datetime | None
    paused_at: datetime | None
    paused_by: str | None
    pause_reason: str | None
    first_seen_at: datetime
    read_at: datetime
    last_firing: FiringView | None


@dataclass(frozen=True, slots=True)
class ReadingView:
    """What a schedule was read as for some time. It decides on slots after ``since``, up to and with ``until``."""

    since: datetime
    until: datetime | None
    text: str | None
    zone: str
    active: bool
    canonical: str | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class PauseView:
    """Who paused a schedule when, and why."""

    at: datetime
    actor: str
    reason: str | None


_RUN_COLUMNS: Final = [runs.c[name] for name in RunView.__dataclass_fields__]
_FIRING_COLUMNS: Final = [firings.c[name] for name in FiringView.__dataclass_fields__]
_READ: Final = tuple(ReadingView.__dataclass_fields__)
_NEWEST_FIRST: Final = (firings.c.scheduled_for.desc(), firings.c.task_id.desc())

# Each select of schedules has an order that an index of theirs has: those that fire, or those that do not.
_FIRING: Final = (
    select(schedules)
    .where(schedules.c.next_fire_at.is_not(None))
    .order_by(schedules.c.next_fire_at, schedules.c.task_id)
)
_QUIET: Final = select(schedules).where(schedules.c.next_fire_at.is_(None)).order_by(schedules.c.task_id)
_READABLE: Final = _QUIET.where(schedules.c.problem.is_(None))
_PAUSED: Final = exists().where(pauses.c.task_id == schedules.c.task_id, pauses.c.resumed_at.is_(None))
# In the order of the states: what a state is not, those before it say.
_PARTS: Final[dict[ScheduleState | None, Sequence[Select[Any]]]] = {
    None: (_FIRING, _QUIET),
    ScheduleState.INVALID: (_QUIET.where(schedules.c.problem.is_not(None)),),
    ScheduleState.INACTIVE: (_READABLE.where(~schedules.c.active),),
    ScheduleState.PAUSED: (_FIRING.where(_PAUSED), _READABLE.where(schedules.c.active, _PAUSED)),
    ScheduleState.MANUAL: (_READABLE.where(schedules.c.active, schedules.c.text.is_(None), ~_PAUSED),),
    ScheduleState.ACTIVE: (_FIRING.where(~_PAUSED),),
}


def _shown(page: FromClause) -> Select[Any]:
    """Select a page of schedules with their pauses and last firings, of these rows only."""
    pause = and_(pauses.c.task_id == page.c.task_id, pauses.c.resumed_at.is_(None))
    last = (
        select(*_FIRING_COLUMNS)
        .where(firings.c.task_id == page.c.task_id)
        .order_by(firings.c.scheduled_for.desc())
        .limit(1)
        .lateral("last")
    )
    paused = (pauses.c.paused_at, pauses.c.actor.label("paused_by"), pauses.c.reason.label("pause_reason"))
    return (
        select(page, *paused, *(each.label(f"last_{each.name}") for each in last.c))
        .select_from(page.outerjoin(pauses, pause).outerjoin(last, true()))
        .order_by(page.c.next_fire_at.nulls_last(), page.c.task_id)
    )


def _readings() -> FromClause:
    """Past readings, and those that stand."""
    kept = [schedule_history.c[name] for name in ("task_id", *_READ[2:])]
    stand = [schedules.c[name] for name in ("task_id", *_READ[2:])]
    return union_all(
        select(schedule_history.c.valid_from.label("since"), schedule_history.c.valid_until.label("until"), *kept),
        select(schedules.c.read_at, null(), *stand),
    ).subquery("readings")


_READINGS: Final = _readings()


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

    def queued(self, limit: int) -> int:
        """Return how many runs wait for a worker, counted up to a limit."""
        waiting = select(literal(1)).where(runs.c.state == RunState.QUEUED).limit(limit).subquery()
        with self._database.transaction() as connection:
            return connection.scalar(select(func.count()).select_from(waiting)) or 0

    def unfinished_at(self, task_id: int, moment: datetime) -> RunView | None:
        """Return the newest run of a crawl task that was unfinished at a moment, by what is known of it now."""
        statement = (
            select(*_RUN_COLUMNS)
            .where(runs.c.task_id == task_id, runs.c.created_at <= moment)
            .where(or_(runs.c.finished_at.is_(None), runs.c.finished_at > moment))
            .order_by(runs.c.created_at.desc())
            .limit(1)
        )
        with self._database.transaction() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else _run_view(row)

    # --- Schedules and slots -------------------------------------------------------------------------------

    def schedules(
        self, *, limit: int, state: ScheduleState | None = None, task_id: int | None = None
    ) -> list[ScheduleView]:
        """Return the schedules that fit, those that fire next first; those that do not fire by crawl task."""
        views: list[ScheduleView] = []
        with self._database.transaction() as connection:
            for part in _PARTS[state]:
                if len(views) < limit:
                    page = part if task_id is None else part.where(schedules.c.task_id == task_id)
                    rows = connection.execute(_shown(page.limit(limit - len(views)).subquery("page")))
                    views += [_schedule_view(row) for row in rows]
        return views

    def schedule(self, task_id: int) -> ScheduleView:
        """Return one schedule.

        Raises:
            ScheduleNotFoundError: no such crawl task has been noticed, or it was deleted.
        """
        views = self.schedules(limit=1, task_id=task_id)
        if not views:
            raise ScheduleNotFoundError(task_id)
        return views[0]

    def invalid(self) -> int:
        """Return how many schedules cannot be read."""
        with self._database.transaction() as connection:
            return connection.scalar(select(func.count()).where(schedules.c.problem.is_not(None))) or 0

    def firings(
        self,
        *,
        limit: int,
        task_id: int | None = None,
        outcome: FiringOutcome | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[FiringView]:
        """Return what became of slots, newest slot first; a range has its place where it begins.

        Args:
            limit: at most so many.
            task_id: of this crawl task only.
            outcome: with this outcome only.
            since: the first slot.
            until: the last slot.
        """
        statement = select(*_FIRING_COLUMNS).order_by(*_NEWEST_FIRST).limit(limit)
        if task_id is not None:
            statement = statement.where(firings.c.task_id == task_id)
        if outcome is not None:
            statement = statement.where(firings.c.outcome == outcome)
        if since is not None:
            statement = statement.where(firings.c.scheduled_for >= since)
        if until is not None:
            statement = statement.where(firings.c.scheduled_for <= until)
        with self._database.transaction() as connection:
            return [_firing_view(row) for row in connection.execute(statement)]

    def became_of(self, task_id: int, slots: Sequence[datetime]) -> dict[datetime, FiringView]:
        """Return the record of each slot of a crawl task that has one, be it of its own or of a range."""
        moments = literal(list(slots), ARRAY(TIMESTAMP(timezone=True)))
        wanted = func.unnest(moments).table_valued(column("slot", TIMESTAMP(timezone=True))).render_derived("wanted")
        slot = wanted.c.slot
        # Slots are claimed in order, so a range ends before the next record; only backfills come in between.
        record = (
            select(*_FIRING_COLUMNS)
            .where(firings.c.task_id == task_id, firings.c.scheduled_for <= slot)
            .where(or_(firings.c.scheduled_for == slot, firings.c.reason.is_distinct_from(FiringReason.BACKFILL)))
            .order_by(firings.c.scheduled_for.desc())
            .limit(1)
            .lateral("record")
        )
        with self._database.transaction() as connection:
            rows = connection.execute(select(wanted.c.slot, record).join_from(wanted, record, true()))
            found = {row.slot: _firing_view(row) for row in rows}
        return {slot: record for slot, record in found.items() if record.covers(slot)}

    def readings_around(self, task_id: int, moment: datetime) -> tuple[ReadingView | None, ReadingView | None]:
        """Return the last reading of a schedule that began before a moment, and the first that began after it."""
        of_task = select(*_READINGS.c).where(_READINGS.c.task_id == task_id).limit(1)
        since = _READINGS.c.since
        with self._database.transaction() as connection:
            before = connection.execute(of_task.where(since < moment).order_by(since.desc())).one_or_none()
            after = connection.execute(of_task.where(since >= moment).order_by(since)).one_or_none()
        return _reading_view(before), _reading_view(after)

    def last_pause(self, task_id: int, before: datetime) -> PauseView | None:
        """Return the last time that a schedule was paused up to a moment."""
        statement = (
            select(audit_events.c.at, audit_events.c.actor, audit_events.c.reason)
            .where(audit_events.c.task_id == task_id, audit_events.c.action == "pause", audit_events.c.at <= before)
            .order_by(audit_events.c.id.desc())
            .limit(1)
        )
        with self._database.transaction() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else PauseView(*row)

    # --- Nodes ---------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        """Return what time it is in the ledger."""
        with self._database.transaction() as connection:
            moment: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return moment

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


def _firing_view(row: Row[Any], prefix: str = "") -> FiringView:
    values = {name: getattr(row, prefix + name) for name in FiringView.__dataclass_fields__}
    reason = None if values["reason"] is None else FiringReason(values["reason"])
    return FiringView(**values | {"outcome": FiringOutcome(values["outcome"]), "reason": reason})


def _reading_view(row: Row[Any] | None) -> ReadingView | None:
    return None if row is None else ReadingView(**{name: getattr(row, name) for name in _READ})


def _schedule_view(row: Row[Any]) -> ScheduleView:
    values = {name: getattr(row, name) for name in ScheduleView.__dataclass_fields__ if hasattr(row, name)}
    last = None if row.last_scheduled_for is None else _firing_view(row, "last_")
    return ScheduleView(**values, state=_state(row), last_firing=last)


def _state(row: Row[Any]) -> ScheduleState:
    if row.problem is not None:
        return ScheduleState.INVALID
    if not row.active:
        return ScheduleState.INACTIVE
    if row.paused_at is not None:
        return ScheduleState.PAUSED
    return ScheduleState.MANUAL if row.text is None else ScheduleState.ACTIVE
