"""Sole writer of the ledger: runs, dispatches, attempts, heartbeats, and the record of what happened.

State changes only here, by compare-and-set along the edges of ``domain.TRANSITIONS``, on the database's
clock. The concurrency contract, for every caller:

- Any number of processes may call any method at the same time, and any call may be repeated.
- Lock order: a run's dispatches before the run's row, and dispatches only with SKIP LOCKED; the run's row before
  its attempts.
- No lock outlives its transaction; a frozen process loses its session, and so its locks, after 30 s.
- Every run that is not over has ``wake_at`` in the future, or the pulse is about to wake it.

Deliberately unknown here: brokers, HTTP, Celery. What to publish or call, and when to give up, is decided by
the engines above.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Row,
    Select,
    Text,
    bindparam,
    case,
    cast,
    exists,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT
from sqlalchemy.dialects.postgresql import insert as upsert

from orchestrator.catalog import Plan, mismatch_explained, refuse_unplannable
from orchestrator.db import Database
from orchestrator.discovery import Answer
from orchestrator.domain import (
    UNFINISHED,
    AnalysisArguments,
    Arguments,
    Attempt,
    AttemptOutcome,
    CrawlArguments,
    CrawlRun,
    DispatchState,
    NewRun,
    NoAttempt,
    Node,
    RunKind,
    RunState,
    SkipReason,
    WakeUp,
    sources_of,
)
from orchestrator.errors import (
    IllegalTransitionError,
    InvalidArgumentsError,
    OrchestratorError,
    PublishError,
    RunNotFoundError,
)
from orchestrator.schema import attempts, audit_events, dispatches, nodes, run_events, runs
from orchestrator.telemetry import Event, logger

ENQUEUE_GRACE: Final = 2.0
"""Seconds after which a committed run that nobody enqueued is enqueued by the pulse."""
SILENCE: Final = 15.0
"""Seconds without progress after which a run is woken; no proof of death is needed."""
LONGEST_SILENCE: Final = 600.0
"""Cap, in seconds, of the backoff between wake-ups of a run that nothing delivers."""
LONGEST_WAIT_FOR_SLOT: Final = 60.0
"""The same cap, in seconds, for a run that waits for a free call; mostly it gets one from a call that ends."""
SKIP_BATCH: Final = 10_000
"""Rows of a canceled run that are skipped in one transaction."""
MAX_STALLS: Final = 20
"""Deliveries without any progress after which a run fails instead of killing one more worker."""
SHOWN_SKIPS: Final = 20
"""Skipped data sources that are logged one by one; the rest is a count, and rows in the ledger."""
LEASE_MARGIN: Final = 5.0
"""Seconds that an attempt's lease outlives the time-out of its call (design 3.2)."""

_log = logger(__name__)
_clock: Final = func.clock_timestamp()
# For searches: an index can be asked for what is stable within a statement, not for what changes from row to row.
_now: Final = func.statement_timestamp()
_SECOND: Final[ColumnElement[Any]] = literal_column("interval '1 second'")


def _in(seconds: float | ColumnElement[Any]) -> ColumnElement[Any]:
    return _clock + _SECOND * seconds


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """Dispatches of one run, locked until the transaction ends.

    Attributes:
        run_id: the run.
        sources: pairs of (data source id, crawl config id), ascending; empty when no row could be taken.
        transaction: for a publisher that lives in the same database.
    """

    run_id: UUID
    sources: Sequence[tuple[int, int]]
    transaction: Connection

    def mark(self, confirmed: Sequence[int]) -> RunState:
        """Mark the data sources whose message is safely in the queue; return the run's state."""
        marked = self.transaction.execute(_MARK, {"run": self.run_id, "confirmed": list(confirmed)}).rowcount
        return RunState(self.transaction.scalar(_PROGRESS, {"run": self.run_id, "count": marked}))


class Ledger:
    """The one place where state changes.

    Every method opens its own transaction and raises DatabaseUnavailableError when it cannot; the caller
    then repeats the call.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- Accepting -----------------------------------------------------------------------------------------

    def accept(self, new: NewRun, *, delivered: bool) -> bool:
        """Commit a run; return whether it is new. The same id is one run, and its first arguments stand.

        Args:
            new: the run.
            delivered: a worker holds a message about it, so it needs no enqueueing of ours.
        """
        wake_at = new.not_before or _in(SILENCE if delivered else ENQUEUE_GRACE)
        values = _identity(new) | {
            "state": RunState.QUEUED,
            "enqueued_at": _clock if delivered else None,
            "next_attempt_at": new.not_before,
            "wake_at": wake_at,
        }
        with self._database.transaction() as connection:
            created = _insert_run(connection, values)
            kept = None if created else _arguments(_run_row(connection, new.run_id))
        if created:
            _log.info(Event.RUN_ACCEPTED, run_id=str(new.run_id), kind=values["kind"], trigger=new.trigger)
        elif kept != new.arguments:
            _log.warning(
                Event.RUN_ID_CONFLICT, run_id=str(new.run_id), kept=repr(kept)[:200], ignored=repr(new.arguments)[:200]
            )
        return created

    def record_ended(self, values: dict[str, object], state: RunState, code: str, message: str) -> None:
        """Commit a run that ended before it began: wrong arguments, or expired on the way.

        Args:
            values: ``id``, ``kind``, ``trigger``, ``traceparent`` and whatever else is known of it.
            state: failed or canceled.
            code: stable error code.
            message: one sentence for people.
        """
        ended = {"state": state, "error_code": code, "error_message": message, "finished_at": _clock}
        with self._database.transaction() as connection:
            created = _insert_run(connection, values | ended)
        if created and state is RunState.FAILED:
            _log.warning(Event.RUN_ARGUMENTS_INVALID, run_id=str(values["id"]), code=code, error=message)

    def expire(self, new: NewRun) -> None:
        """Commit a run whose message came after the caller's expiry time."""
        self.record_ended(_identity(new), RunState.CANCELED, "expired", "the message expired before a worker saw it")

    def mark_enqueued(self, run_ids: Sequence[UUID]) -> None:
        """Note that a wake-up for each run is safely in the broker."""
        with self._database.transaction() as connection:
            connection.execute(
                update(runs)
                .where(runs.c.id.in_(run_ids), runs.c.state == RunState.QUEUED, runs.c.enqueued_at.is_(None))
                # Never before the caller's ETA; GREATEST passes over NULL.
                .values(enqueued_at=_clock, wake_at=func.greatest(_in(SILENCE), runs.c.next_attempt_at))
            )

    # --- Crawl runs ----------------------------------------------------------------------------------------

    def begin_crawl(self, run_id: UUID, wake_number: int | None = None) -> CrawlRun | None:
        """Take part in a crawl run; return none when there is nothing to do now: it is over, or it waits.

        Of the wake-ups sent before the last delivery began, only that delivery's own is good (it may come again
        after a crash): the others would each work a slice and send a continuation of their own, for ever.

        Fails the run when too many deliveries in a row brought no progress: something about it kills workers.

        Args:
            run_id: the run.
            wake_number: the number of the wake-up that was delivered; none for a caller's own message.
        """
        fresh = (
            true() if wake_number is None else or_(runs.c.begun_by == wake_number, runs.c.stale_below <= wake_number)
        )
        values = {} if wake_number is None else {"begun_by": wake_number}
        with self._database.transaction() as connection:
            run = _begin(connection, run_id, RunKind.CRAWL, fresh, wake_in=SILENCE, **values)
            if run is None:
                return None
            if run.stalls <= MAX_STALLS:
                return CrawlRun(run.id, run.task_id, run.traceparent, run.materialized_at is not None)
            last = f"; the last error: {run.error_message}" if run.error_message else ""
            ended = _end(
                connection, run_id, RunState.FAILED, "no_progress", f"{MAX_STALLS} deliveries without progress{last}"
            )
        _announce(ended)
        return None

    def hand_over(self, run_id: UUID) -> WakeUp | None:
        """Return the continuation to send at the end of a slice; none when another wake-up is on its way."""
        with self._database.transaction() as connection:
            run = connection.execute(
                update(runs)
                .where(
                    runs.c.id == run_id,
                    runs.c.state == RunState.RUNNING,
                    runs.c.wake_number < runs.c.stale_below,
                )
                .values(wake_number=runs.c.wake_number + 1, wake_at=_in(SILENCE))
                .returning(runs)
            ).one_or_none()
            return None if run is None else _wake_up(run)

    def materialize(self, run_id: UUID, task_id: int, plan: Plan) -> tuple[int, int] | None:
        """Fix the plan of a run: insert all its dispatches by one statement, under a lock on the run's row.

        Returns:
            (total, skipped), or none when another worker was faster or the run is over.

        Raises:
            CrawlTaskNotFoundError, InvalidDataSourceIdsError, CatalogMismatchError: see the catalog.
        """
        with self._database.transaction() as connection:
            run = _run_row(connection, run_id, lock=True)
            if run.materialized_at is not None or run.state not in UNFINISHED:
                return None
            with mismatch_explained():
                verdict = connection.execute(_materialization(run_id, plan)).one()
            refuse_unplannable(task_id, verdict.found, verdict.bad, verdict.examples)
            connection.execute(
                update(runs)
                .where(runs.c.id == run_id)
                .values(
                    total=verdict.total,
                    skipped=verdict.skipped,
                    materialized_at=_clock,
                    progress_at=_clock,
                    wake_at=_in(SILENCE),
                    stalls=0,
                )
            )
            return verdict.total, verdict.skipped

    def skipped_sources(self, run_id: UUID, limit: int) -> list[int]:
        """Return the first data sources of a run that were skipped, at most ``limit``."""
        with self._database.transaction() as connection:
            return list(
                connection.scalars(
                    select(dispatches.c.data_source_id)
                    .where(dispatches.c.run_id == run_id, dispatches.c.state == DispatchState.SKIPPED)
                    .order_by(dispatches.c.data_source_id)
                    .limit(limit)
                )
            )

    @contextmanager
    def pending_batch(self, run_id: UUID, *, limit: int, after: int) -> Iterator["PendingBatch"]:
        """Take a batch of pending dispatches, for the block to publish and mark; commit at its end.

        Rows that another worker has taken are passed over. A crash between confirm and commit resends at most
        this batch, with equal message ids.

        Args:
            run_id: the run.
            limit: rows to take at most.
            after: take rows whose data source id is greater.
        """
        with self._database.transaction() as connection:
            connection.execute(_FOR_A_BATCH)
            rows = connection.execute(_TAKE, {"run": run_id, "after": after, "limit": limit}).all()
            yield PendingBatch(run_id, [(row.data_source_id, row.crawl_config_id) for row in rows], connection)

    def complete_crawl(self, run_id: UUID) -> bool:
        """End a run as succeeded if no row of its plan is pending; return whether this call did it.

        In a transaction of its own: inside the batch's, two workers would each see the other's rows pending.
        """
        with self._database.transaction() as connection:
            done = _complete(connection, run_id)
        _announce(done)
        return done is not None

    def postpone_crawl(self, run_id: UUID, error: PublishError) -> None:
        """Let a run wait because its broker does not take messages: 1, 2, 4 … 60 s, without limit in number."""
        delay = func.least(60, func.power(2, func.least(runs.c.postponements, 6)))
        with self._database.transaction() as connection:
            run = _transition(
                connection,
                run_id,
                RunState.RETRYING,
                error.code,
                str(error),
                next_attempt_at=_in(delay),
                wake_at=_in(delay),
                postponements=runs.c.postponements + 1,
                stalls=0,
            )
        _announce(run)

    def fail(self, run_id: UUID, error: OrchestratorError) -> None:
        """End a running run as failed, with the error's code and sentence."""
        with self._database.transaction() as connection:
            run = _end(connection, run_id, RunState.FAILED, error.code, str(error))
        _announce(run)

    def note_fault(self, run_id: UUID, error: BaseException) -> bool:
        """Note on an unfinished run what went wrong unforeseen; return whether the ledger has the run at all.

        Its state stays: the pulse brings it up again, and too many deliveries without progress end it.
        """
        values = {"error_code": "internal_error", "error_message": _first_words(error)}
        with self._database.transaction() as connection:
            connection.execute(update(runs).where(runs.c.id == run_id, runs.c.state.in_(UNFINISHED)).values(values))
            return connection.scalar(select(exists().where(runs.c.id == run_id))) is True

    # --- Site analyses -------------------------------------------------------------------------------------

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
                select(runs).where(runs.c.id == run_id, _workable(RunKind.SITE_ANALYSIS)).with_for_update()
            ).one_or_none()
            if run is None or not _lose_expired(connection, run):
                return NoAttempt.NOT_DUE
            done = run.attempts - run.attempts_forgiven
            if done > max_retries:
                _exhaust(connection, run)
                return NoAttempt.NOT_DUE
            # Serialises the starts of calls, not the calls: two nodes must not both see the last free slot.
            connection.execute(select(func.pg_advisory_xact_lock(self._lock_key("discovery"))))
            if not _slot_free(connection, node, cap, node_cap):
                _set_aside(connection, run_id)
                return NoAttempt.NO_SLOT
            number = run.attempts + 1
            connection.execute(insert(attempts).values(run_id=run_id, number=number, node=node, lease_until=_in(lease)))
            _begin(connection, run_id, RunKind.SITE_ANALYSIS, wake_in=lease, attempts=number, awaits_slot=None)
            return Attempt(run_id, number, done, run.data_source_id, run.theme_name, run.traceparent)

    def finish_attempt(self, attempt: Attempt, answer: Answer, retry_in: float | None) -> None:
        """Record how a call ended, and what follows for its run.

        Args:
            attempt: from :meth:`begin_attempt`.
            answer: what the Discovery Service said.
            retry_in: seconds until the next attempt; none when there will be none.
        """
        next_attempt_at = None if retry_in is None else _in(retry_in)
        run: Row[Any] | None = None
        with self._database.transaction() as connection:
            _run_row(connection, attempt.run_id, lock=True)
            counted = connection.execute(
                update(attempts)
                .where(
                    attempts.c.run_id == attempt.run_id,
                    attempts.c.number == attempt.number,
                    attempts.c.finished_at.is_(None),
                )
                .values(
                    finished_at=_clock,
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
                run = _end(connection, attempt.run_id, RunState.SUCCEEDED, None, None)
            elif retry_in is None:
                run = _end(connection, attempt.run_id, RunState.FAILED, answer.code, answer.message)
            else:
                run = _transition(
                    connection,
                    attempt.run_id,
                    RunState.RETRYING,
                    answer.code,
                    answer.message,
                    next_attempt_at=next_attempt_at,
                    wake_at=next_attempt_at,
                    progress_at=_clock,
                )
        _announce(run)

    def next_waiting(self) -> WakeUp | None:
        """Take the oldest run that was set aside for want of a free call, if there is one."""
        oldest = (
            select(runs.c.id)
            .where(
                runs.c.awaits_slot.is_not(None),
                runs.c.state.in_(UNFINISHED),
                func.coalesce(runs.c.next_attempt_at, _clock) <= _clock,
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
            return None if run is None else _wake_up(run)

    # --- Operators -----------------------------------------------------------------------------------------

    def cancel(self, run_id: UUID, *, actor: str, reason: str | None = None) -> None:
        """Cancel an unfinished run; its pending rows that nobody is publishing become skipped at once.

        Raises:
            RunNotFoundError: there is no such run.
            IllegalTransitionError: it is over.
        """
        with self._database.transaction() as connection:
            before = _run_row(connection, run_id, lock=True)
            message = f"canceled by {actor}" + (f": {reason}" if reason else "")
            run = _end(connection, run_id, RunState.CANCELED, "canceled", message, wake_at=_clock)
            if run is None:
                raise _illegal(before, "canceled")
            _audit(connection, actor, "cancel", before, RunState.CANCELED, reason)
        # In short transactions: workers in mid-batch wait for the run's row, with confirmed messages in hand.
        skipped = 0
        while count := self._skip_some(run_id):
            skipped += count
        _log.info(Event.RUN_CANCELED, run_id=str(run_id), actor=actor, skipped=skipped)

    def _skip_some(self, run_id: UUID) -> int:
        with self._database.transaction() as connection:
            return _skip_pending(connection, run_id)

    def revive(self, run_id: UUID, *, actor: str, reason: str | None = None) -> WakeUp:
        """Put a failed run back in the queue: same run, plan and message ids; attempt numbers go on.

        Raises:
            RunNotFoundError: there is no such run.
            IllegalTransitionError: it did not fail.
        """
        with self._database.transaction() as connection:
            before = _run_row(connection, run_id, lock=True)
            arguments = _arguments(before)
            if arguments is None:
                raise IllegalTransitionError(f"run {run_id} has no usable arguments; start a new one")
            run = _transition(
                connection,
                run_id,
                RunState.QUEUED,
                None,
                f"retried by {actor}" + (f": {reason}" if reason else ""),
                error_code=None,
                error_message=None,
                enqueued_at=None,
                finished_at=None,
                next_attempt_at=None,
                progress_at=_clock,
                wake_at=_in(ENQUEUE_GRACE),
                attempts_forgiven=runs.c.attempts,
                stalls=0,
                wakes=0,
                wake_number=runs.c.wake_number + 1,
                postponements=0,
            )
            if run is None:
                raise _illegal(before, "retried")
            _audit(connection, actor, "retry", before, RunState.QUEUED, reason)
        _log.info(Event.RUN_REVIVED, run_id=str(run_id), actor=actor)
        return _wake_up(run)

    # --- The pulse -----------------------------------------------------------------------------------------

    def wake_due(self, enqueue: Callable[[Sequence[WakeUp]], None], limit: int) -> int | None:
        """Enqueue a wake-up for each run that is due, oldest first; one process at a time looks for them.

        No lock is held while the broker is spoken to. When ``enqueue`` raises, the runs are due again at once;
        a crash before that costs them one silence.

        Returns:
            how many runs were due, at most ``limit``; none when another process is looking.
        """
        with self._database.transaction() as connection:
            if not connection.scalar(select(func.pg_try_advisory_xact_lock(self._lock_key("pulse")))):
                return None
            due, waking = _claim_due(connection, limit)
        if waking:
            try:
                enqueue(waking)
            except OrchestratorError:
                self._give_back(waking)
                raise
            self.mark_enqueued([wake_up.run_id for wake_up in waking])
        return due

    def _give_back(self, waking: Sequence[WakeUp]) -> None:
        """Make runs due again whose wake-up may not have been sent; one that was delivered is left alone."""
        with self._database.transaction() as connection:
            connection.execute(
                update(runs)
                .where(
                    runs.c.id.in_([wake_up.run_id for wake_up in waking]),
                    runs.c.state.in_(UNFINISHED),
                    runs.c.wakes > 0,
                )
                .values(wakes=runs.c.wakes - 1, wake_at=_clock)
            )

    def heartbeat(self, node: Node, version: str, *, first: bool = False) -> None:
        """Write a node's sign of life, on the database's clock; its first one says since when it runs."""
        values: dict[str, object] = {
            "kind": node.kind,
            "version": version,
            "queues": list(node.queues),
            "concurrency": node.concurrency,
        }
        if first:
            values |= {"started_at": _clock}
        with self._database.transaction() as connection:
            connection.execute(
                upsert(nodes)
                .values(name=node.name, **values)
                .on_conflict_do_update(index_elements=[nodes.c.name], set_=values | {"seen_at": _clock})
            )

    def sign_off(self, node: Node) -> None:
        """Remove a node that stops in an orderly way."""
        with self._database.transaction() as connection:
            connection.execute(nodes.delete().where(nodes.c.name == node.name))

    def _lock_key(self, purpose: str) -> ColumnElement[int]:
        # Two ledgers in one database (two schemas) must not wait for each other.
        return func.hashtextextended(f"orchestrator:{self._database.schema}:{purpose}", 0)


# --- Statements of the hot path, built once ----------------------------------------------------------------

_TAKE: Final = (
    select(dispatches.c.data_source_id, dispatches.c.crawl_config_id)
    .where(
        dispatches.c.run_id == bindparam("run"),
        dispatches.c.state == DispatchState.PENDING,
        dispatches.c.data_source_id > bindparam("after"),
    )
    .order_by(dispatches.c.data_source_id)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
# A plan that was just made has no statistics yet. Taken for a few rows, all that is left of it would be fetched and
# sorted for each batch: measured 11 s instead of 2.6 s for 300,000 sources, and it grows with the square.
# And with confirmed messages in hand a batch waits for the run's row as long as the session may be idle, or nearly.
_FOR_A_BATCH: Final = select(
    func.set_config("enable_sort", "off", literal(value=True)),
    func.set_config("lock_timeout", "25s", literal(value=True)),
)
_MARK: Final = (
    update(dispatches)
    .where(
        dispatches.c.run_id == bindparam("run"),
        dispatches.c.data_source_id == func.any(bindparam("confirmed", type_=ARRAY(BIGINT))),
        dispatches.c.state == DispatchState.PENDING,
    )
    .values(state=DispatchState.PUBLISHED.value, published_at=_clock)
)
_PROGRESS: Final = (
    update(runs)
    .where(runs.c.id == bindparam("run"))
    .values(
        published=runs.c.published + bindparam("count", type_=Integer),
        progress_at=case((bindparam("count", type_=Integer) > 0, _clock), else_=runs.c.progress_at),
        postponements=case((bindparam("count", type_=Integer) > 0, 0), else_=runs.c.postponements),
        # A run that waits, or that was canceled, keeps the wake-up it has.
        wake_at=case((runs.c.state == RunState.RUNNING, _in(SILENCE)), else_=runs.c.wake_at),
        stalls=0,
    )
    .returning(runs.c.state)
)


# --- Parts of transactions ---------------------------------------------------------------------------------


def _identity(new: NewRun) -> dict[str, object]:
    values: dict[str, object] = {
        "id": new.run_id,
        "trigger": new.trigger,
        "traceparent": new.traceparent,
        "celery_id": new.celery_id,
        "retry_of": new.retry_of,
    }
    match new.arguments:
        case CrawlArguments(task_id):
            return values | {"kind": RunKind.CRAWL, "task_id": task_id}
        case AnalysisArguments(data_source_id, theme_name):
            return values | {
                "kind": RunKind.SITE_ANALYSIS,
                "data_source_id": data_source_id,
                "theme_name": theme_name,
            }


def _arguments(run: Row[Any]) -> Arguments | None:
    if run.kind == RunKind.CRAWL:
        return None if run.task_id is None else CrawlArguments(run.task_id)
    return None if run.theme_name is None else AnalysisArguments(run.data_source_id, run.theme_name)


def _wake_up(run: Row[Any]) -> WakeUp:
    arguments = _arguments(run)
    if arguments is None:
        raise AssertionError(f"run {run.id} is unfinished and has no arguments")
    return WakeUp(run.id, arguments, run.traceparent, run.wake_number)


def _insert_run(connection: Connection, values: dict[str, object]) -> bool:
    statement = upsert(runs).values(values).on_conflict_do_nothing(index_elements=[runs.c.id]).returning(runs)
    run = connection.execute(statement).one_or_none()
    if run is not None:
        _record(connection, run, Event.RUN_ACCEPTED, run.error_code, run.error_message)
    return run is not None


def _run_row(connection: Connection, run_id: UUID, *, lock: bool = False) -> Row[Any]:
    statement = select(runs).where(runs.c.id == run_id)
    run = connection.execute(statement.with_for_update() if lock else statement).one_or_none()
    if run is None:
        raise RunNotFoundError(f"there is no run {run_id}")
    return run


def _workable(kind: RunKind) -> ColumnElement[bool]:
    """Unfinished, and its wait, if any, is over; of this kind, for a foreign message may carry any id."""
    due = or_(runs.c.next_attempt_at.is_(None), runs.c.next_attempt_at <= _clock)
    return (runs.c.kind == kind) & runs.c.state.in_(UNFINISHED) & due


def _begin(
    connection: Connection,
    run_id: UUID,
    kind: RunKind,
    *conditions: ColumnElement[bool],
    wake_in: float,
    **values: object,
) -> Row[Any] | None:
    """Make a run running if it may work now (again); count a stall if nothing moved since the last one."""
    # Many deliveries within moments are a storm, not a run that kills its workers: they count once.
    stalled = func.greatest(runs.c.progress_at, runs.c.stalled_at) < _in(-5)
    moved = {
        "started_at": func.coalesce(runs.c.started_at, _clock),
        "next_attempt_at": None,
        "wake_at": _in(wake_in),
        "wakes": 0,
        "stale_below": runs.c.wake_number + 1,
        "stalls": case((stalled, runs.c.stalls + 1), else_=runs.c.stalls),
        "stalled_at": case((stalled, _clock), else_=runs.c.stalled_at),
        **values,
    }
    run = _transition(connection, run_id, RunState.RUNNING, None, None, _workable(kind), *conditions, **moved)
    if run is not None:
        return run
    again = update(runs).where(runs.c.id == run_id, runs.c.state == RunState.RUNNING, _workable(kind), *conditions)
    return connection.execute(again.values(moved).returning(runs)).one_or_none()


def _transition(
    connection: Connection,
    run_id: UUID,
    target: RunState,
    code: str | None,
    message: str | None,
    *conditions: ColumnElement[bool],
    **values: object,
) -> Row[Any] | None:
    """Compare-and-set a run's state; return its row, or none when the present state does not lead there."""
    if code is not None:
        values |= {"error_code": code, "error_message": message}
    run = connection.execute(
        update(runs)
        .where(runs.c.id == run_id, runs.c.state.in_(sources_of(target)), *conditions)
        .values(state=target, **values)
        .returning(runs)
    ).one_or_none()
    if run is not None:
        _record(connection, run, _EVENTS[target], code, message)
    return run


def _end(
    connection: Connection,
    run_id: UUID,
    target: RunState,
    code: str | None,
    message: str | None,
    *conditions: ColumnElement[bool],
    wake_at: ColumnElement[Any] | None = None,
) -> Row[Any] | None:
    cleared = {"error_code": None, "error_message": None} if target is RunState.SUCCEEDED else {}
    ended = {"finished_at": _clock, "wake_at": wake_at, "next_attempt_at": None, "awaits_slot": None}
    return _transition(connection, run_id, target, code, message, *conditions, **ended, **cleared)


_EVENTS: Final = {
    RunState.QUEUED: Event.RUN_REVIVED,
    RunState.RUNNING: Event.RUN_STARTED,
    RunState.RETRYING: Event.RUN_RETRYING,
    RunState.SUCCEEDED: Event.RUN_SUCCEEDED,
    RunState.FAILED: Event.RUN_FAILED,
    RunState.CANCELED: Event.RUN_CANCELED,
}


def _record(connection: Connection, run: Row[Any], event: Event, code: str | None, message: str | None) -> None:
    connection.execute(
        insert(run_events).values(run_id=run.id, event=event, state=run.state, code=code, message=message)
    )


def _announce(run: Row[Any] | None) -> None:
    """Log how a run now stands, if it changed."""
    if run is None:
        return
    run_id, counts = str(run.id), {"total": run.total, "published": run.published, "skipped": run.skipped}
    match run.state:
        case RunState.SUCCEEDED:
            _log.info(Event.RUN_SUCCEEDED, run_id=run_id, kind=run.kind, **counts)
        case RunState.FAILED:
            _log.error(Event.RUN_FAILED, run_id=run_id, kind=run.kind, code=run.error_code, error=run.error_message)
        case RunState.RETRYING:
            moment = run.next_attempt_at.isoformat()
            _log.warning(
                Event.RUN_RETRYING, run_id=run_id, code=run.error_code, error=run.error_message, next_attempt_at=moment
            )


def _audit(
    connection: Connection, actor: str, action: str, before: Row[Any], after: RunState, reason: str | None
) -> None:
    connection.execute(
        insert(audit_events).values(
            actor=actor,
            action=action,
            run_id=before.id,
            reason=reason,
            before={"state": before.state, "error_code": before.error_code},
            after={"state": after},
        )
    )


def _first_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].replace("\x00", "")[:500]


def _illegal(run: Row[Any], wanted: str) -> IllegalTransitionError:
    allowed = {RunState.FAILED: "retry", RunState.SUCCEEDED: "run again", RunState.CANCELED: "run again"}
    return IllegalTransitionError(
        f"run {run.id} is {run.state}: it cannot be {wanted}; allowed: {allowed.get(RunState(run.state), 'cancel')}"
    )


def _materialization(run_id: UUID, plan: Plan) -> Select[int, int, bool, int, list[str] | None]:
    rows = plan.rows.cte("plan")
    missing = rows.c.crawl_config_id.is_(None)
    inserted = (
        insert(dispatches)
        .from_select(
            ["run_id", "data_source_id", "crawl_config_id", "state", "reason"],
            select(
                literal(run_id),
                rows.c.data_source_id,
                rows.c.crawl_config_id,
                case((missing, DispatchState.SKIPPED.value), else_=DispatchState.PENDING.value),
                case((missing, SkipReason.NO_ACTIVE_CONFIG.value), else_=cast(None, Text)),
            ),
        )
        .returning(dispatches.c.state)
        .cte("inserted")
    )
    skipped = inserted.c.state == DispatchState.SKIPPED
    return select(
        func.count().label("total"),
        func.count().filter(skipped).label("skipped"),
        plan.found.label("found"),
        plan.bad.label("bad"),
        plan.examples.label("examples"),
    ).select_from(inserted)


def _pending(run_id: UUID) -> ColumnElement[bool]:
    return exists().where(dispatches.c.run_id == run_id, dispatches.c.state == DispatchState.PENDING)


def _skip_pending(connection: Connection, run_id: UUID) -> int:
    """Skip some of a canceled run's pending rows that nobody is publishing; keep its wake-up while any are left."""
    unlocked = (
        select(dispatches.c.data_source_id)
        .where(dispatches.c.run_id == run_id, dispatches.c.state == DispatchState.PENDING)
        .limit(SKIP_BATCH)
        .with_for_update(skip_locked=True)
        .cte("unlocked")
    )
    skipped = connection.execute(
        update(dispatches)
        .where(dispatches.c.run_id == run_id, dispatches.c.data_source_id == unlocked.c.data_source_id)
        .values(state=DispatchState.SKIPPED.value, reason=SkipReason.RUN_CANCELED.value)
    ).rowcount
    left = connection.scalar(select(_pending(run_id)))
    connection.execute(
        update(runs)
        .where(runs.c.id == run_id)
        .values(skipped=runs.c.skipped + skipped, wake_at=_in(ENQUEUE_GRACE) if left else None)
    )
    return skipped


def _claim_due(connection: Connection, limit: int) -> tuple[int, list[WakeUp]]:
    """Take what is due; return how many that were, and the wake-ups to send, each not due again for a while."""
    due = connection.execute(
        select(runs)
        .where(runs.c.wake_at <= _now)
        .order_by(runs.c.wake_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for run in due:
        if run.state == RunState.CANCELED:
            _skip_pending(connection, run.id)
    waking = [run for run in due if run.state in UNFINISHED and not _complete_if_done(connection, run)]
    if not waking:
        return len(due), []
    claimed = connection.execute(
        update(runs)
        .where(runs.c.id.in_([run.id for run in waking]))
        .values(wakes=runs.c.wakes + 1, wake_number=runs.c.wake_number + 1, wake_at=_in(_backoff(LONGEST_SILENCE)))
        .returning(runs)
    ).all()
    rank = {run.id: place for place, run in enumerate(waking)}
    oldest_first = sorted(claimed, key=lambda run: rank[run.id])
    return len(due), [wake_up for run in oldest_first if (wake_up := _wake_up_or_fail(connection, run)) is not None]


def _backoff(longest: float) -> ColumnElement[Any]:
    """Seconds until a run that was woken so often is woken again."""
    return func.least(longest, SILENCE * func.power(2, func.least(runs.c.wakes, 10)))


def _wake_up_or_fail(connection: Connection, run: Row[Any]) -> WakeUp | None:
    """Contain a row that today's rules do not accept: it must not keep the pulse from all the others."""
    try:
        return _wake_up(run)
    except InvalidArgumentsError as error:
        if run.state != RunState.RUNNING:
            _transition(connection, run.id, RunState.RUNNING, None, None)
        _announce(_end(connection, run.id, RunState.FAILED, error.code, str(error)))
        return None


def _complete_if_done(connection: Connection, run: Row[Any]) -> bool:
    """End a silent crawl run that has nothing pending: its last worker died between batch and completion."""
    if run.kind != RunKind.CRAWL or run.state != RunState.RUNNING or run.published + run.skipped < run.total:
        return False
    return _complete(connection, run.id) is not None


def _complete(connection: Connection, run_id: UUID) -> Row[Any] | None:
    """End a crawl run as succeeded if it has a plan and nothing of it is pending; return its row if this did it."""
    planned = runs.c.materialized_at.is_not(None)
    return _end(connection, run_id, RunState.SUCCEEDED, None, None, planned, ~_pending(run_id))


def _lose_expired(connection: Connection, run: Row[Any]) -> bool:
    """Mark a run's open attempt as lost if its lease ran out; return false when one is still under way."""
    open_attempt = connection.execute(
        select(attempts.c.number, (attempts.c.lease_until <= _clock).label("expired")).where(
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
        .values(finished_at=_clock, outcome=AttemptOutcome.LOST, code="lost", message=_LOST)
    )
    _log.warning(Event.ATTEMPT_LOST, run_id=str(run.id), number=open_attempt.number)
    return True


_LOST: Final = "the worker did not record an answer before the lease ended"


def _exhaust(connection: Connection, run: Row[Any]) -> None:
    """Fail a run whose last allowed attempt was lost."""
    if run.state != RunState.RUNNING:
        _transition(connection, run.id, RunState.RUNNING, None, None)
    _announce(_end(connection, run.id, RunState.FAILED, "lost", _LOST))


def _slot_free(connection: Connection, node: str, cap: int, node_cap: int) -> bool:
    under_way = connection.execute(
        select(func.count().label("everywhere"), func.count().filter(attempts.c.node == node).label("here")).where(
            attempts.c.finished_at.is_(None), attempts.c.lease_until > _now
        )
    ).one()
    return bool(under_way.everywhere < cap and under_way.here < node_cap)


def _set_aside(connection: Connection, run_id: UUID) -> None:
    connection.execute(
        update(runs)
        .where(runs.c.id == run_id)
        .values(
            awaits_slot="discovery_concurrency",
            wake_at=_in(_backoff(LONGEST_WAIT_FOR_SLOT)),
        )
    )
