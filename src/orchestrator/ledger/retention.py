"""Forgetting: what is over and old is deleted, in bounded batches and short transactions.

A run goes last, after its dispatches and events and with its firing, by a transaction that has it locked. So whoever
dies in between leaves rows that have their run, and the next round finds them by it. Nothing unfinished is deleted, nor
what belongs to it. A batch costs the same however much there is to delete.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    Uuid,
    delete,
    func,
    literal,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from orchestrator.db import Database
from orchestrator.domain import TERMINAL, RunState
from orchestrator.ledger.requests import KEPT
from orchestrator.ledger.transitions import clock, lock_key, now
from orchestrator.schema import (
    api_requests,
    audit_events,
    dispatches,
    firings,
    run_events,
    runs,
    schedule_history,
)
from orchestrator.telemetry import Event, logger

_log = logger(__name__)
_place: Final[ColumnElement[Any]] = literal_column("ctid")
_RUNS_OF_A_BATCH: Final = 5  # a fifth of its rows: most runs have a few events and a dispatch or more


class _Deleted(NamedTuple):
    rows: int
    more: bool
    """Whether a batch was too small for what there was."""


class RetentionLedger:
    """Deletes what is over and old.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def forget(self, days: float | None, batch: int) -> bool:
        """Delete a batch of everything that is over and older than so many days; one process at a time does.

        Answers to requests that may be repeated go in their own time, however long the rest is kept.

        Args:
            days: how long history is kept; none: for ever.
            batch: rows of one table that are deleted at most in one transaction.

        Returns:
            whether there is more to delete that this process may.
        """
        steps: list[tuple[str, Callable[[Connection], _Deleted]]] = [("api_requests", partial(_requests, batch=batch))]
        if days is not None:
            age = timedelta(days=days)
            parts = (
                ("runs", _runs),
                ("firings", _unstarted),
                ("schedule_history", _readings),
                ("audit_events", _actions),
            )
            steps += [(table, partial(part, age=age, batch=batch)) for table, part in parts]
        more = False
        for table, step in steps:
            with self._database.transaction() as connection:
                lock = func.pg_try_advisory_xact_lock(lock_key(self._database.schema, "retention"))
                if not connection.scalar(select(lock)):
                    return False
                deleted = step(connection)
            more = more or deleted.more
            if deleted.rows:
                _log.info(Event.HISTORY_FORGOTTEN, what=table, count=deleted.rows)
        return more


def _requests(connection: Connection, *, batch: int) -> _Deleted:
    old = select(_place).select_from(api_requests).where(api_requests.c.created_at < now - KEPT)
    return _delete(connection, api_requests, old.order_by(api_requests.c.created_at), batch)


def _runs(connection: Connection, *, age: timedelta, batch: int) -> _Deleted:
    """Delete dispatches and events of the oldest runs, then those runs and their firings, if one batch is enough."""
    most = max(1, batch // _RUNS_OF_A_BATCH)
    oldest = connection.scalars(
        select(runs.c.id)
        # Found by when they were created, which is before they ended. A canceled one may have rows to be skipped yet.
        .where(runs.c.created_at < now - age, runs.c.finished_at < now - age, runs.c.wake_at.is_(None))
        .where(runs.c.state.in_(TERMINAL))
        .order_by(runs.c.created_at)
        .limit(most)
        # Who revives one of them was faster, or finds it gone.
        .with_for_update(skip_locked=True)
    ).all()
    if not oldest:
        return _Deleted(0, more=False)
    rows = 0
    for table in (dispatches, run_events):
        of_them = select(_place).select_from(table).where(table.c.run_id == func.any(_array(oldest)))
        deleted = _delete(connection, table, of_them, batch)
        rows += deleted.rows
        if deleted.more:
            # What is left of a plan is none any more: whoever could be revived must not be.
            revivable = (runs.c.state == RunState.FAILED) & runs.c.forgotten_at.is_(None)
            connection.execute(
                update(runs).where(runs.c.id == func.any(_array(oldest)), revivable).values(forgotten_at=clock)
            )
            return _Deleted(rows, more=True)
    # A firing is kept for as long as its run, and found by it: to look for those whose run is gone takes all of them.
    rows += _delete(connection, firings, _firings_of(oldest), batch).rows
    # Their attempts go with them.
    rows += connection.execute(delete(runs).where(runs.c.id == func.any(_array(oldest)))).rowcount
    return _Deleted(rows, more=len(oldest) == most)


def _firings_of(run_ids: Sequence[UUID]) -> Select[Any]:
    """Select where the firings of runs are: one look-up a run, whatever the planner believes of so many."""
    slot = (firings.c.task_id == runs.c.task_id) & (firings.c.scheduled_for == runs.c.scheduled_for)
    place = select(_place).select_from(firings).where(slot, firings.c.run_id == runs.c.id).scalar_subquery()
    return select(place).where(runs.c.id == func.any(_array(run_ids)), runs.c.scheduled_for.is_not(None))


def _unstarted(connection: Connection, *, age: timedelta, batch: int) -> _Deleted:
    """Delete what is recorded of slots that started nothing, one by one or in ranges."""
    old = (
        select(_place)
        .select_from(firings)
        # Word for word, so that it implies the condition of the index that has these alone.
        .where(literal_column("outcome IN ('missed', 'skipped')", type_=true().type))
        # Backfills and late beats write about slots long past.
        .where(firings.c.scheduled_for < now - age, firings.c.claimed_at < now - age)
        .where(func.coalesce(firings.c.through, firings.c.scheduled_for) < now - age)
        .order_by(firings.c.outcome, firings.c.scheduled_for)
        # A backfill that has one of them locked makes it one that started.
        .with_for_update(skip_locked=True)
    )
    return _delete(connection, firings, old, batch)


def _readings(connection: Connection, *, age: timedelta, batch: int) -> _Deleted:
    old = select(_place).select_from(schedule_history).where(schedule_history.c.valid_until < now - age)
    return _delete(connection, schedule_history, old.order_by(schedule_history.c.valid_until), batch)


def _actions(connection: Connection, *, age: timedelta, batch: int) -> _Deleted:
    # By number, which has an index; the numbers of actions are in the order of their moments.
    oldest = select(_place.label("place"), audit_events.c.at).order_by(audit_events.c.id).limit(batch).subquery()
    old = select(oldest.c.place).where(oldest.c.at < now - age)
    return _delete(connection, audit_events, old, batch)


def _delete(connection: Connection, table: Table, rows: Select[Any], batch: int) -> _Deleted:
    """Delete at most a batch of some rows, by where they are: nothing is looked up a second time."""
    places = func.array(rows.limit(batch).scalar_subquery())
    count = connection.execute(delete(table).where(_place == func.any(places))).rowcount
    return _Deleted(count, more=count >= batch)


def _array(ids: Sequence[UUID]) -> ColumnElement[Any]:
    return literal(list(ids), ARRAY(Uuid))
