"""What happens to a site analysis: calls are recorded, lost, capped, and waited for."""

from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Row, func, insert, select, update

from orchestrator.db import Database
from orchestrator.discovery import Answer
from orchestrator.domain import UNFINISHED, Attempt, AttemptOutcome, NoAttempt, RunKind, RunState, WakeUp
from orchestrator.ledger.transitions import (
    announce,
    backoff,
    begin,
    clock,
    end,
    from_now,
    lock_key,
    now,
    run_row,
    transition,
    wake_up_of,
    workable,
)
from orchestrator.measures import DISCOVERY_ATTEMPTS
from orchestrator.schema import attempts, runs
from orchestrator.telemetry import Event, logger

LEASE_MARGIN: Final = 5.0
"""Seconds that an attempt's lease outlives the time-out of its call (design 3.2)."""
LONGEST_WAIT_FOR_SLOT: Final = 60.0
"""Cap, in seconds, of the backoff of a run that waits for a free call; mostly it gets one from a call that ends."""

_log = logger(__name__)
_LOST: Final = "the worker did not record an answer before the lease ended"


class AnalysisLedger:
    """Records calls to the Discovery Service.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin_attempt(
        self, run_id: UUID, *, node: str, lease: float, max_retries: int, cap: int, node_cap: int
    ) -> Attempt | NoAttempt:
        """Record one call to the Discovery Service before it is made; say why when none may be made now.

        An attempt whose lease ran out becomes ``lost`` first, which counts. When ``cap`` calls are under way
        everywhere, or ``node_cap`` by this node, the run is set aside for :meth:`next_waiting`.

        Args:
            run_id: the run.
            node: the worker's name.
            lease: seconds until the attempt counts as lost.
            max_retries: attempts beyond the first, since the last revival.
            cap: most calls under way at once, all workers together.
            node_cap: most calls under way at once by this node.
        """
        with self._database.transaction() as connection:
            run = connection.execute(
                select(runs).where(runs.c.id == run_id, workable(RunKind.SITE_ANALYSIS)).with_for_update()
            ).one_or_none()
            if run is None or not _lose_expired(connection, run):
                return NoAttempt.NOT_DUE
            done = run.attempts - run.attempts_forgiven
            if done > max_retries:
                _exhaust(connection, run)
                return NoAttempt.NOT_DUE
            # Serialises the starts of calls, not the calls: two nodes must not both see the last free slot.
            connection.execute(select(func.pg_advisory_xact_lock(lock_key(self._database.schema, "discovery"))))
            if not _slot_free(connection, node, cap, node_cap):
                _set_aside(connection, run_id)
                return NoAttempt.NO_SLOT
            number = run.attempts + 1
            connection.execute(
                insert(attempts).values(run_id=run_id, number=number, node=node, lease_until=from_now(lease))
            )
            begin(connection, run_id, RunKind.SITE_ANALYSIS, wake_in=lease, attempts=number, awaits_slot=None)
            return Attempt(run_id, number, done, run.data_source_id, run.theme_name, run.traceparent)

    def finish_attempt(self, attempt: Attempt, answer: Answer, retry_in: float | None) -> None:
        """Record how a call ended, and what follows for its run.

        Args:
            attempt: from :meth:`begin_attempt`.
            answer: what the Discovery Service said.
            retry_in: seconds until the next attempt; none when there will be none.
        """
        next_attempt_at = None if retry_in is None else from_now(retry_in)
        run: Row[Any] | None = None
        with self._database.transaction() as connection:
            run_row(connection, attempt.run_id, lock=True)
            counted = connection.execute(
                update(attempts)
                .where(
                    attempts.c.run_id == attempt.run_id,
                    attempts.c.number == attempt.number,
                    attempts.c.finished_at.is_(None),
                )
                .values(
                    finished_at=clock,
                    outcome=answer.outcome,
                    status=answer.status,
                    code=answer.code,
                    message=answer.message,
                    seconds=answer.seconds,
                    retry_after=answer.retry_after,
                    next_attempt_at=next_attempt_at,
                )
            ).rowcount
            if not counted:
                return
            if answer.outcome is AttemptOutcome.SUCCEEDED:
                run = end(connection, attempt.run_id, RunState.SUCCEEDED, None, None)
            elif retry_in is None:
                run = end(connection, attempt.run_id, RunState.FAILED, answer.code, answer.message)
            else:
                run = transition(
                    connection,
                    attempt.run_id,
                    RunState.RETRYING,
                    answer.code,
                    answer.message,
                    next_attempt_at=next_attempt_at,
                    wake_at=next_attempt_at,
                    progress_at=clock,
                )
        announce(run)

    def next_waiting(self) -> WakeUp | None:
        """Take the oldest run that was set aside for want of a free call, if there is one."""
        oldest = (
            select(runs.c.id)
            .where(
                runs.c.awaits_slot.is_not(None),
                runs.c.state.in_(UNFINISHED),
                func.coalesce(runs.c.next_attempt_at, clock) <= clock,
            )
            .order_by(runs.c.created_at)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        with self._database.transaction() as connection:
            run = connection.execute(
                update(runs).where(runs.c.id == oldest).values(awaits_slot=None).returning(runs)
            ).one_or_none()
            return None if run is None else wake_up_of(run)


def _lose_expired(connection: Connection, run: Row[Any]) -> bool:
    """Mark a run's open attempt as lost if its lease ran out; return false when one is still under way."""
    open_attempt = connection.execute(
        select(attempts.c.number, (attempts.c.lease_until <= clock).label("expired")).where(
            attempts.c.run_id == run.id, attempts.c.finished_at.is_(None)
        )
    ).one_or_none()
    if open_attempt is None:
        return True
    if not open_attempt.expired:
        return False
    connection.execute(
        update(attempts)
        .where(attempts.c.run_id == run.id, attempts.c.number == open_attempt.number, attempts.c.finished_at.is_(None))
        .values(finished_at=clock, outcome=AttemptOutcome.LOST, code="lost", message=_LOST)
    )
    DISCOVERY_ATTEMPTS.add(AttemptOutcome.LOST)
    _log.warning(Event.ATTEMPT_LOST, run_id=str(run.id), number=open_attempt.number)
    return True


def _exhaust(connection: Connection, run: Row[Any]) -> None:
    """Fail a run whose last allowed attempt was lost."""
    if run.state != RunState.RUNNING:
        transition(connection, run.id, RunState.RUNNING, None, None)
    announce(end(connection, run.id, RunState.FAILED, "lost", _LOST))


def _slot_free(connection: Connection, node: str, cap: int, node_cap: int) -> bool:
    under_way = connection.execute(
        select(func.count().label("everywhere"), func.count().filter(attempts.c.node == node).label("here")).where(
            attempts.c.finished_at.is_(None), attempts.c.lease_until > now
        )
    ).one()
    return bool(under_way.everywhere < cap and under_way.here < node_cap)


def _set_aside(connection: Connection, run_id: UUID) -> None:
    connection.execute(
        update(runs)
        .where(runs.c.id == run_id)
        .values(
            awaits_slot="discovery_concurrency",
            wake_at=from_now(backoff(LONGEST_WAIT_FOR_SLOT)),
        )
    )
