"""Schedules, what they were read as, and what became of their slots."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import (
    Connection,
    FromClause,
    Row,
    Select,
    and_,
    column,
    exists,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from orchestrator.db import Database
from orchestrator.domain import FiringOutcome, FiringReason, ScheduleState
from orchestrator.errors import IllegalTransitionError, ScheduleNotFoundError
from orchestrator.schema import audit_events, firings, pauses, schedule_history, schedules


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
class FiringFilter:
    """Which slots are wanted: those that fit all that is given.

    Attributes:
        task_id: of this crawl task.
        outcome: with this outcome.
        since: the first slot.
        until: the last slot.
    """

    task_id: int | None = None
    outcome: FiringOutcome | None = None
    since: datetime | None = None
    until: datetime | None = None


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

    def meaning(self) -> str:
        """Return what its text means.

        Raises:
            IllegalTransitionError: nothing: it has no text, or cannot be read.
        """
        if self.canonical is None:
            why_not = f"cannot be read: {self.problem}" if self.problem else "has no text"
            raise IllegalTransitionError(
                f"the schedule of crawl task {self.task_id} {why_not}; allowed: trigger", ["trigger"]
            )
        return self.canonical


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


_FIRING_COLUMNS: Final = [firings.c[name] for name in FiringView.__dataclass_fields__]
_READ: Final = tuple(ReadingView.__dataclass_fields__)

# Each select of schedules has an order that an index of theirs has: those that fire, or those that do not.
_FIRING: Final = (
    select(schedules)
    .where(schedules.c.next_fire_at.is_not(None))
    .order_by(schedules.c.next_fire_at, schedules.c.task_id)
)
_QUIET: Final = select(schedules).where(schedules.c.next_fire_at.is_(None)).order_by(schedules.c.task_id)
_READABLE: Final = _QUIET.where(schedules.c.problem.is_(None))
_PAUSED: Final = exists().where(pauses.c.task_id == schedules.c.task_id, pauses.c.resumed_at.is_(None))


class _Parts(NamedTuple):
    """The schedules in a state: first those that fire, then those that do not."""

    firing: Select[Any] | None = None
    quiet: Select[Any] | None = None


# In the order of the states: what a state is not, those before it say.
_PARTS: Final[dict[ScheduleState | None, _Parts]] = {
    None: _Parts(_FIRING, _QUIET),
    ScheduleState.INVALID: _Parts(quiet=_QUIET.where(schedules.c.problem.is_not(None))),
    ScheduleState.INACTIVE: _Parts(quiet=_READABLE.where(~schedules.c.active)),
    ScheduleState.PAUSED: _Parts(_FIRING.where(_PAUSED), _READABLE.where(schedules.c.active, _PAUSED)),
    ScheduleState.MANUAL: _Parts(quiet=_READABLE.where(schedules.c.active, schedules.c.text.is_(None), ~_PAUSED)),
    ScheduleState.ACTIVE: _Parts(_FIRING.where(~_PAUSED)),
}
_SLOT: Final = (firings.c.scheduled_for, firings.c.task_id)
# The condition of a partial index, word for word: a prepared statement's plan does not know the values asked for.
_NOT_STARTED: Final = literal_column("outcome <> 'started'", type_=true().type)


def _after(part: _Parts, after: tuple[datetime | None, int] | None) -> list[Select[Any]]:
    """Return what is left of a list of schedules after one of them, which fires at a moment, or does not."""
    firing, quiet = part
    if after is not None:
        next_fire_at, task_id = after
        if next_fire_at is None:
            firing, quiet = None, None if quiet is None else quiet.where(schedules.c.task_id > task_id)
        elif firing is not None:
            keys = (schedules.c.next_fire_at, schedules.c.task_id)
            firing = firing.where(
                tuple_(*keys) > tuple_(literal(next_fire_at, keys[0].type), literal(task_id, keys[1].type))
            )
    return [each for each in (firing, quiet) if each is not None]


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


class ScheduleInsights:
    """Reads schedules and slots.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def page_schedules(
        self,
        *,
        limit: int,
        state: ScheduleState | None = None,
        task_id: int | None = None,
        after: tuple[datetime | None, int] | None = None,
        within: Connection | None = None,
    ) -> list[ScheduleView]:
        """Return schedules: those that fire, by when they do next, and then those that do not, by crawl task.

        Args:
            limit: at most so many.
            state: in this state only.
            task_id: of this crawl task only.
            after: go on after the schedule with this ``next_fire_at`` and ``task_id``.
            within: a transaction of the caller's to take part in.
        """
        views: list[ScheduleView] = []
        with self._database.autocommit(within) as connection:
            for part in _after(_PARTS[state], after):
                if len(views) < limit:
                    page = part if task_id is None else part.where(schedules.c.task_id == task_id)
                    rows = connection.execute(_shown(page.limit(limit - len(views)).subquery("page")))
                    views += [_schedule_view(row) for row in rows]
        return views

    def schedule(self, task_id: int, within: Connection | None = None) -> ScheduleView:
        """Return one schedule, as a transaction of the caller's sees it, if there is one.

        Raises:
            ScheduleNotFoundError: no such crawl task has been noticed, or it was deleted.
        """
        views = self.page_schedules(limit=1, task_id=task_id, within=within)
        if not views:
            raise ScheduleNotFoundError(task_id)
        return views[0]

    def invalid(self) -> int:
        """Return how many schedules cannot be read."""
        with self._database.autocommit() as connection:
            return connection.scalar(select(func.count()).where(schedules.c.problem.is_not(None))) or 0

    def page_firings(
        self, wanted: FiringFilter, *, limit: int, after: tuple[datetime, int] | None = None
    ) -> list[FiringView]:
        """Return what became of slots, newest slot first; a range has its place where it begins.

        Args:
            wanted: which.
            limit: at most so many.
            after: go on after the record with this ``scheduled_for`` and ``task_id``.
        """
        statement = select(*_FIRING_COLUMNS).order_by(*(key.desc() for key in _SLOT)).limit(limit)
        if wanted.task_id is not None:
            statement = statement.where(firings.c.task_id == wanted.task_id)
        if wanted.outcome is not None:
            statement = statement.where(firings.c.outcome == wanted.outcome)
        if wanted.outcome not in {None, FiringOutcome.STARTED}:
            statement = statement.where(_NOT_STARTED)
        if wanted.since is not None:
            statement = statement.where(firings.c.scheduled_for >= wanted.since)
        if wanted.until is not None:
            statement = statement.where(firings.c.scheduled_for <= wanted.until)
        if after is not None:
            last = (literal(value, key.type) for key, value in zip(_SLOT, after, strict=True))
            statement = statement.where(tuple_(*_SLOT) < tuple_(*last))
        with self._database.autocommit() as connection:
            return [_firing_view(row) for row in connection.execute(statement)]

    def became_of(
        self, task_id: int, slots: Sequence[datetime], within: Connection | None = None
    ) -> dict[datetime, FiringView]:
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
        with self._database.autocommit(within) as connection:
            rows = connection.execute(select(wanted.c.slot, record).join_from(wanted, record, true()))
            found = {row.slot: _firing_view(row) for row in rows}
        return {slot: record for slot, record in found.items() if record.covers(slot)}

    def readings_around(self, task_id: int, moment: datetime) -> tuple[ReadingView | None, ReadingView | None]:
        """Return the last reading of a schedule that began before a moment, and the first that began after it."""
        of_task = select(*_READINGS.c).where(_READINGS.c.task_id == task_id).limit(1)
        since = _READINGS.c.since
        with self._database.autocommit() as connection:
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
        with self._database.autocommit() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else PauseView(*row)


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
