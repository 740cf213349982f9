"""Runs, and what is kept of each: its dispatches, its calls to the Discovery Service, and what happened to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
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
    Trigger,
    message_id,
)
from orchestrator.errors import InvalidArgumentsError, RunNotFoundError
from orchestrator.schema import attempts, dispatches, run_events, runs

MOST_SKIPS: Final = 10_000
MANY_RUNS: Final = 1_000
"""A data source with so many runs is a common one; of others all runs are looked at to find the newest ones."""
MOST_PROBED: Final = 2_000
"""Runs that are looked into for a common data source, for one page."""


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
class RunFilter:
    """Which runs are wanted: those that fit all that is given.

    Attributes:
        kind: of this kind.
        state: in this state.
        task_id: of this crawl task.
        data_source_id: analyses of this data source, and crawl runs whose plan has it.
        theme_name: analyses for this theme.
        trigger: started so.
        error_code: with this error.
        since: created at this moment or later.
        until: created before this moment.
    """

    kind: RunKind | None = None
    state: RunState | None = None
    task_id: int | None = None
    data_source_id: int | None = None
    theme_name: str | None = None
    trigger: Trigger | None = None
    error_code: str | None = None
    since: datetime | None = None
    until: datetime | None = None


Position = tuple[datetime, UUID]
"""Of a run in a list: its ``created_at`` and ``id``."""


@dataclass(frozen=True, slots=True)
class FoundRuns:
    """Runs that fit a filter.

    Attributes:
        runs: a page of them, newest first.
        following: after which the next page begins; none: there is none.
        counted: how many fit in all, or at least.
        exact: whether these are all.
    """

    runs: list[RunView]
    following: Position | None
    counted: int
    exact: bool


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


_RUN_COLUMNS: Final = [runs.c[name] for name in RunView.__dataclass_fields__]
_ATTEMPT_COLUMNS: Final = [attempts.c[name] for name in AttemptView.__dataclass_fields__]
_EVENT_COLUMNS: Final = [run_events.c[name] for name in EventView.__dataclass_fields__]
_DISPATCH_COLUMNS: Final = [dispatches.c[name] for name in DispatchView.__dataclass_fields__ if name != "message_id"]
_KEYS: Final = (runs.c.created_at, runs.c.id)
_NEWEST_FIRST: Final = tuple(key.desc() for key in _KEYS)
_EQUAL: Final = ("kind", "state", "task_id", "theme_name", "trigger", "error_code")
# The conditions of partial indexes, word for word: a prepared statement's plan does not know the values asked for.
_NOT_SCHEDULED: Final = literal_column("trigger <> 'schedule'", type_=true().type)
_ANALYSIS: Final = literal_column("kind = 'site_analysis'", type_=true().type)
# An index of its own has this sum; see the schema.
_source: Final[ColumnElement[int]] = dispatches.c.data_source_id + literal_column("0")

Conditions = list[ColumnElement[bool]]


class RunInsights:
    """Reads runs.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def search_runs(self, wanted: RunFilter, *, limit: int, after: Position | None = None, most: int = 0) -> FoundRuns:
        """Find runs, newest first.

        For the runs of a common data source :data:`MOST_PROBED` are looked into, so that no page takes long: one may
        have few or none of them, and another one following all the same. Those beyond the page are not counted.

        Args:
            wanted: which.
            limit: at most so many on the page.
            after: go on after this one.
            most: count how many there are up to so many; 0: do not.
        """
        with self._database.reading() as connection:
            common = _is_common(connection, wanted)
            rows = connection.execute(_newest(wanted, limit + 1, after, common=common))
            found = [_run_view(row) for row in rows]
            following = _position(found[limit - 1]) if len(found) > limit else None
            if common and following is None:
                following = _last_probed(connection, wanted, after)
                found = [run for run in found if following is None or _position(run) >= following]
            counted, exact = len(found[:limit]), after is None and following is None
            if most and not common and not exact:
                counted = connection.scalar(_count(wanted, most + 1)) or 0
                exact = counted <= most
        return FoundRuns(found[:limit], following, min(counted, most) if most else counted, exact)

    def run(self, run_id: UUID) -> RunView:
        """Return one run.

        Raises:
            RunNotFoundError: there is no such run.
        """
        with self._database.reading() as connection:
            row = connection.execute(select(*_RUN_COLUMNS).where(runs.c.id == run_id)).one_or_none()
        if row is None:
            raise RunNotFoundError(f"there is no run {run_id}")
        return _run_view(row)

    def unfinished(self, run_ids: Sequence[UUID]) -> int:
        """Return how many of the runs are not over."""
        with self._database.reading() as connection:
            over = runs.c.finished_at.is_not(None)
            return connection.scalar(select(func.count()).where(runs.c.id.in_(run_ids), ~over)) or 0

    def matching(self, prefix: str, limit: int = 2) -> list[UUID]:
        """Return ids of runs that begin with some hex digits, so that people may shorten them."""
        first, last = UUID(prefix.ljust(32, "0")), UUID(prefix.ljust(32, "f"))
        with self._database.reading() as connection:
            return list(connection.scalars(select(runs.c.id).where(runs.c.id.between(first, last)).limit(limit)))

    def queued(self, limit: int) -> int:
        """Return how many runs wait for a worker, counted up to a limit."""
        waiting = select(literal(1)).where(runs.c.state == RunState.QUEUED).limit(limit).subquery()
        with self._database.reading() as connection:
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
        with self._database.reading() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else _run_view(row)

    # --- What is kept of one run -----------------------------------------------------------------------------

    def page_attempts(self, run_id: UUID, *, limit: int, after: int | None = None) -> list[AttemptView]:
        """Return the calls that a run made to the Discovery Service, oldest first, after the one of a number."""
        statement = select(*_ATTEMPT_COLUMNS).where(attempts.c.run_id == run_id).order_by(attempts.c.number)
        if after is not None:
            statement = statement.where(attempts.c.number > after)
        with self._database.reading() as connection:
            return [_attempt_view(row) for row in connection.execute(statement.limit(limit))]

    def last_attempt(self, run_id: UUID) -> AttemptView | None:
        """Return the last call that a run made to the Discovery Service."""
        statement = select(*_ATTEMPT_COLUMNS).where(attempts.c.run_id == run_id).order_by(attempts.c.number.desc())
        with self._database.reading() as connection:
            row = connection.execute(statement.limit(1)).one_or_none()
        return None if row is None else _attempt_view(row)

    def page_events(self, run_id: UUID, *, limit: int, after: int | None = None) -> list[EventView]:
        """Return what happened to a run, oldest first, after the event of an id."""
        statement = select(*_EVENT_COLUMNS).where(run_events.c.run_id == run_id).order_by(run_events.c.id)
        if after is not None:
            statement = statement.where(run_events.c.id > after)
        with self._database.reading() as connection:
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
        with self._database.reading() as connection:
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
        with self._database.reading() as connection:
            rows = connection.execute(select(some.c.reason, func.count()).group_by(some.c.reason))
            return {SkipReason(row.reason): row[1] for row in rows}


# --- Statements ----------------------------------------------------------------------------------------------------


def _newest(wanted: RunFilter, limit: int, after: Position | None, *, common: bool) -> Select[Any]:
    """Select the newest runs that fit."""
    if wanted.data_source_id is None:
        return _page(_RUN_COLUMNS, _conditions(wanted, after), limit)
    newest = _newest_of_source(wanted.data_source_id, wanted, limit, after, common=common).subquery()
    return select(*_RUN_COLUMNS).join_from(newest, runs, runs.c.id == newest.c.id).order_by(*_NEWEST_FIRST)


def _count(wanted: RunFilter, limit: int) -> Select[Any]:
    """Count the runs that fit, up to a limit; not for a common data source."""
    # In order, or else the planner takes a walk through the table. Without their ids, which some indexes do not have.
    some: Select[Any] = select(true()).select_from(runs).where(*_conditions(wanted, None))
    some = some.order_by(runs.c.created_at.desc()).limit(limit)
    if wanted.data_source_id is not None:
        some = _newest_of_source(wanted.data_source_id, wanted, limit, None, common=False)
    return select(func.count()).select_from(some.subquery())


def _newest_of_source(
    source: int, wanted: RunFilter, limit: int, after: Position | None, *, common: bool
) -> Select[Any]:
    """Select the keys of the newest runs of a data source, which may be in runs of either kind."""
    pages = [_page(_KEYS, [*_conditions(wanted, after), runs.c.data_source_id == source], limit)]
    if _is_planned(wanted) and common:
        pages.append(_probed(_crawls(wanted, after), source, limit))
    elif _is_planned(wanted):
        pages.append(_page(_KEYS, [*_crawls(wanted, after), _in_plan(source)], limit))
    # Each is read off an index of its own, and no run is on both; an OR would be read off none.
    either = union_all(*(select(each.subquery()) for each in pages)).subquery()
    return select(either).order_by(either.c.created_at.desc(), either.c.id.desc()).limit(limit)


def _page(columns: Sequence[ColumnElement[Any]], conditions: Conditions, limit: int) -> Select[Any]:
    return select(*columns).where(*conditions).order_by(*_NEWEST_FIRST).limit(limit)


def _conditions(wanted: RunFilter, after: Position | None) -> Conditions:
    conditions = [runs.c[name] == getattr(wanted, name) for name in _EQUAL if getattr(wanted, name) is not None]
    if wanted.since is not None:
        conditions.append(runs.c.created_at >= wanted.since)
    if wanted.until is not None:
        conditions.append(runs.c.created_at < wanted.until)
    if wanted.trigger not in {None, Trigger.SCHEDULE}:
        conditions.append(_NOT_SCHEDULED)
    if wanted.kind is RunKind.SITE_ANALYSIS:
        conditions.append(_ANALYSIS)
    if after is not None:
        position = (literal(value, key.type) for key, value in zip(_KEYS, after, strict=True))
        conditions.append(tuple_(*_KEYS) < tuple_(*position))
    return conditions


# --- Crawl runs by data source. The planner has to guess how many there are, and a wrong guess costs seconds: so there
# --- are two ways, and we say which.


def _is_planned(wanted: RunFilter) -> bool:
    """Whether plans of crawl runs have to be looked into."""
    return wanted.data_source_id is not None and wanted.kind is not RunKind.SITE_ANALYSIS and wanted.theme_name is None


def _is_common(connection: Connection, wanted: RunFilter) -> bool:
    """Whether the crawl runs of a data source are too many to be looked up one by one."""
    if not _is_planned(wanted):
        return False
    # A range in order, which an index has: with an equation all of its entries would be collected first.
    of_source = (
        select(true()).select_from(dispatches).where(_source.between(wanted.data_source_id, wanted.data_source_id))
    )
    return connection.scalar(of_source.order_by(_source).offset(MANY_RUNS - 1).limit(1)) is True


def _crawls(wanted: RunFilter, after: Position | None) -> Conditions:
    return [*_conditions(wanted, after), runs.c.kind == RunKind.CRAWL]


def _in_plan(data_source_id: int) -> ColumnElement[bool]:
    """Return the condition that a run has a dispatch for a rare data source: its runs are looked up first."""
    of_source = select(dispatches.c.run_id).where(_source == data_source_id)
    return runs.c.id == func.any(func.array(of_source.scalar_subquery()))


def _probed(crawls: Conditions, data_source_id: int, limit: int) -> Select[Any]:
    """Select those of the newest runs that have a dispatch for a common data source, by looking into one by one."""
    newest = _page(_KEYS, crawls, MOST_PROBED).subquery("newest")
    of_run = (dispatches.c.run_id == newest.c.id) & (dispatches.c.data_source_id == data_source_id)
    has_it = select(true()).where(of_run).limit(1).scalar_subquery()
    return select(newest).where(has_it).order_by(newest.c.created_at.desc(), newest.c.id.desc()).limit(limit)


def _last_probed(connection: Connection, wanted: RunFilter, after: Position | None) -> Position | None:
    """Return the last run that was looked into, if there are more."""
    row = connection.execute(_page(_KEYS, _crawls(wanted, after), 1).offset(MOST_PROBED - 1)).one_or_none()
    return None if row is None else (row.created_at, row.id)


# --- The rest ------------------------------------------------------------------------------------------------------


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


def _position(run: RunView) -> Position:
    return run.created_at, run.id


def _run_view(row: Sequence[Any]) -> RunView:
    run_id, kind, state, *rest = row
    return RunView(run_id, RunKind(kind), RunState(state), *rest)


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
