"""What happens to a run of either kind: it is accepted, enqueued, woken, failed, canceled, revived.

Knows that a crawl run has rows to skip and a plan to complete, and nothing of how they are published.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, cast
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Uuid,
    any_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from orchestrator.db import Database, after_commit
from orchestrator.domain import (
    UNFINISHED,
    DispatchState,
    NewRun,
    OnConflict,
    RunKind,
    RunState,
    SkipReason,
    Trigger,
    WakeUp,
    storable,
    traceparent_of,
)
from orchestrator.errors import IllegalTransitionError, InvalidArgumentsError, OrchestratorError, RunInProgressError
from orchestrator.ledger.transitions import (
    ENQUEUE_GRACE,
    SILENCE,
    accept,
    announce,
    arguments_of,
    backoff,
    clock,
    complete_crawl,
    count_created,
    end,
    from_now,
    identity_of,
    illegal,
    insert_ended,
    lock_key,
    now,
    run_row,
    transition,
    wake_up_of,
)
from orchestrator.measures import DISPATCHES, RUNS_FINISHED, SWEEPER_CORRECTIONS
from orchestrator.schema import audit_events, dispatches, outbox, runs
from orchestrator.telemetry import Event, logger

LONGEST_SILENCE: Final = 600.0
"""Cap, in seconds, of the backoff between wake-ups of a run that nothing delivers."""
SKIP_BATCH: Final = 10_000
"""Rows of a canceled run that are skipped in one transaction."""

_MARK_ENQUEUED: Final = (
    update(runs)
    .where(
        runs.c.id == any_(bindparam("run_ids", type_=ARRAY(Uuid))),
        runs.c.state == RunState.QUEUED,
        runs.c.enqueued_at.is_(None),
    )
    # Never before the caller's ETA; GREATEST passes over NULL.
    .values(enqueued_at=clock, wake_at=func.greatest(from_now(SILENCE), runs.c.next_attempt_at))
)
_EXISTS: Final = select(exists().where(runs.c.id == bindparam("run", type_=Uuid)))

_log = logger(__name__)


class RunLedger:
    """Accepts, wakes and ends runs.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def accept(self, new: NewRun, *, delivered: bool) -> bool:
        """Commit a run; return whether it is new. The same id is one run, and its first arguments stand.

        Args:
            new: the run.
            delivered: a worker holds a message about it, so it needs no enqueueing of ours.
        """
        return self.accept_all([new], delivered=delivered)[0]

    def accept_all(
        self,
        news: Sequence[NewRun],
        *,
        delivered: bool = False,
        actor: str | None = None,
        reason: str | None = None,
        within: Connection | None = None,
    ) -> list[bool]:
        """Commit runs, all or none; return of each whether it is new. See :meth:`accept`.

        Args:
            news: the runs.
            delivered: see :meth:`accept`.
            actor: who has to answer for it, if anybody: then it is in the audit log.
            reason: why.
            within: a transaction of the caller's to take part in.
        """
        with self._database.transaction(within) as connection:
            return accept(connection, news, delivered=delivered, actor=actor, reason=reason)

    def accept_crawl(
        self,
        new: NewRun,
        on_conflict: OnConflict,
        *,
        actor: str | None = None,
        reason: str | None = None,
        within: Connection | None = None,
    ) -> UUID:
        """Commit a crawl run, depending on whether one of its task is unfinished; return the run that there is now.

        Several that come at once take turns. Who does not ask about others, as a schedule that allows overlaps, waits
        for nobody, and may start a run beside ours.

        Args:
            new: the run.
            on_conflict: what to do if another is unfinished.
            actor: see :meth:`accept_all`.
            reason: why.
            within: a transaction of the caller's to take part in.

        Raises:
            RunInProgressError: another one is unfinished, and that is not wanted.
        """
        task_id = cast("int", identity_of(new)["task_id"])
        with self._database.transaction(within) as connection:
            if on_conflict is not OnConflict.ALLOW:
                turn = lock_key(self._database.schema, f"task:{task_id}")
                connection.execute(select(func.pg_advisory_xact_lock(turn)))
                if (unfinished := _unfinished_of(connection, task_id)) is not None:
                    if on_conflict is OnConflict.REJECT:
                        raise RunInProgressError(task_id, unfinished)
                    return unfinished
            self.accept_all([new], actor=actor, reason=reason, within=connection)
        return new.run_id

    def exists(self, run_id: UUID) -> bool:
        """Tell whether this ledger has a run."""
        with self._database.autocommit() as connection:
            return bool(connection.scalar(_EXISTS, {"run": run_id}))

    def record_ended(self, values: dict[str, object], state: RunState, code: str, message: str) -> None:
        """Commit a run that ended before it began: wrong arguments, or expired on the way.

        Args:
            values: ``id``, ``kind``, ``trigger``, ``traceparent``, and of the rest of a run's identity what is known.
            state: failed or canceled.
            code: stable error code.
            message: one sentence for people.
        """
        with self._database.transaction() as connection:
            created = insert_ended(connection, values, state, code, message)
        if created:
            kind, trigger = RunKind(str(values["kind"])), Trigger(str(values["trigger"]))
            count_created(kind, trigger)
            RUNS_FINISHED.add(kind, state)
        if created and state is RunState.FAILED:
            _log.warning(Event.RUN_ARGUMENTS_INVALID, run_id=str(values["id"]), code=code, error=message)

    def expire(self, new: NewRun) -> None:
        """Commit a run whose message came after the caller's expiry time."""
        self.record_ended(identity_of(new), RunState.CANCELED, "expired", "the message expired before a worker saw it")

    def mark_sent(self, batch: int) -> None:
        """Note that the wake-ups of a whole batch of new runs are safely in the broker; cheap, however many."""
        with self._database.transaction() as connection:
            connection.execute(delete(outbox).where(outbox.c.id == batch))

    def mark_enqueued(self, run_ids: Sequence[UUID]) -> None:
        """Note that a wake-up for each run is safely in the broker."""
        with self._database.transaction() as connection:
            connection.execute(_MARK_ENQUEUED, {"run_ids": list(run_ids)})

    def fail(self, run_id: UUID, error: OrchestratorError) -> None:
        """End a running run as failed, with the error's code and sentence."""
        with self._database.transaction() as connection:
            run = end(connection, run_id, RunState.FAILED, error.code, str(error))
        announce(run)

    def note_fault(self, run_id: UUID, error: BaseException) -> bool:
        """Note on an unfinished run what went wrong unforeseen; return whether the ledger has the run at all.

        Its state stays: the pulse brings it up again, and too many deliveries without progress end it.
        """
        values = {"error_code": "internal_error", "error_message": _first_words(error)}
        with self._database.transaction() as connection:
            connection.execute(update(runs).where(runs.c.id == run_id, runs.c.state.in_(UNFINISHED)).values(values))
            return connection.scalar(select(exists().where(runs.c.id == run_id))) is True

    def cancel(self, run_id: UUID, *, actor: str, reason: str | None = None, within: Connection | None = None) -> None:
        """Cancel an unfinished run; its pending rows that nobody is publishing become skipped at once.

        Args:
            run_id: the run.
            actor: who asks.
            reason: why.
            within: a transaction of the caller's; the rows are then left to the pulse (:meth:`skip_canceled`), for
                they may be many.

        Raises:
            RunNotFoundError: there is no such run.
            IllegalTransitionError: it is over.
        """
        with self._database.transaction(within) as connection:
            before = run_row(connection, run_id, lock=True)
            message = f"canceled by {actor}" + (f": {reason}" if reason else "")
            run = end(connection, run_id, RunState.CANCELED, "canceled", message, wake_at=clock)
            if run is None:
                raise illegal(before, "canceled")
            _audit(connection, actor, "cancel", before, RunState.CANCELED, reason)
            after_commit(connection, partial(announce, run))
            after_commit(connection, partial(_log.info, Event.RUN_CANCELED, run_id=str(run_id), actor=actor))
        while within is None and self._skip_some(run_id):
            pass

    def skip_canceled(self) -> bool:
        """Skip some rows of the canceled run that has been due for longest; one process at a time does.

        Of a run with more rows than a batch the rest is due at once, after the others; rows that somebody is publishing
        are passed over and looked at again a little later.

        Returns:
            whether there may be more to skip that this process may.
        """
        return self._skip_some() is not None

    def _skip_some(self, run_id: UUID | None = None) -> int | None:
        """Skip a batch of a run's rows, or of the one that is due; return how many, none where no run is due."""
        # In short transactions: workers in mid-batch wait for the run's row, with confirmed messages in hand.
        with self._database.transaction() as connection:
            if run_id is None and (run_id := _canceled_due(connection, self._database.schema)) is None:
                return None
            skipped = _skip_pending(connection, run_id)
        DISPATCHES.add(DispatchState.SKIPPED, times=skipped)
        return skipped

    def revive(
        self, run_id: UUID, *, actor: str, reason: str | None = None, within: Connection | None = None
    ) -> WakeUp:
        """Put a failed run back in the queue: same run, plan and message ids; attempt numbers go on.

        Raises:
            RunNotFoundError: there is no such run.
            IllegalTransitionError: it did not fail.
        """
        with self._database.transaction(within) as connection:
            before = run_row(connection, run_id, lock=True)
            arguments = arguments_of(before)
            if arguments is None:
                raise IllegalTransitionError(f"run {run_id} has no usable arguments; start a new one")
            if before.forgotten_at is not None:
                raise IllegalTransitionError(f"run {run_id} is old and being deleted; start a new one")
            run = transition(
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
                progress_at=clock,
                wake_at=from_now(ENQUEUE_GRACE),
                attempts_forgiven=runs.c.attempts,
                stalls=0,
                wakes=0,
                wake_number=runs.c.wake_number + 1,
                postponements=0,
            )
            if run is None:
                raise illegal(before, "retried")
            _audit(connection, actor, "retry", before, RunState.QUEUED, reason)
            after_commit(connection, partial(_log.info, Event.RUN_REVIVED, run_id=str(run_id), actor=actor))
        return wake_up_of(run)

    def retry(
        self,
        run_id: UUID,
        trigger: Trigger,
        *,
        actor: str,
        reason: str | None = None,
        traceparent: str | None = None,
        within: Connection | None = None,
    ) -> WakeUp:
        """Put a failed run back in the queue, or repeat a succeeded or canceled one as a new run, ``retry_of`` it.

        Args:
            run_id: the run.
            trigger: of the new run.
            actor: who asks.
            reason: why.
            traceparent: W3C trace context of who asks, which a new run continues.
            within: a transaction of the caller's to take part in.

        Raises:
            RunNotFoundError: there is no such run.
            IllegalTransitionError: it is not over, or has no usable arguments.
        """
        with self._database.transaction(within) as connection:
            before = run_row(connection, run_id, lock=True)
            arguments = arguments_of(before)
            if arguments is None or before.state not in {RunState.SUCCEEDED, RunState.CANCELED}:
                return self.revive(run_id, actor=actor, reason=reason, within=connection)
            new_id = uuid4()
            new = NewRun(new_id, arguments, trigger, traceparent_of(new_id, traceparent), retry_of=run_id)
            self.accept_all([new], within=connection)
            _audit(connection, actor, "retry", before, RunState(before.state), reason, new_run=str(new_id))
            return new.wake_up

    def wake_due(self, enqueue: Callable[[Sequence[WakeUp]], None], limit: int) -> int | None:
        """Enqueue a wake-up for each run that is due, oldest first; one process at a time looks for them.

        Not for canceled ones, which nothing is to wake for: see :meth:`skip_canceled`.

        No lock is held while the broker is spoken to. When ``enqueue`` raises, the runs are due again at once;
        a crash before that costs them one silence.

        Returns:
            how many runs were due, at most ``limit``; none when another process is looking.
        """
        with self._database.transaction() as connection:
            if not connection.scalar(select(func.pg_try_advisory_xact_lock(lock_key(self._database.schema, "pulse")))):
                return None
            _take_over_unsent(connection)
            due = _claim_due(connection, limit)
        due.measure()
        if due.waking:
            try:
                enqueue(due.waking)
            except OrchestratorError:
                self._give_back(due.waking)
                raise
            self.mark_enqueued([wake_up.run_id for wake_up in due.waking])
        return due.count

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
                .values(wakes=runs.c.wakes - 1, wake_at=clock)
            )


@dataclass(slots=True)
class _Due:
    """What became of the runs that were due."""

    count: int
    waking: Sequence[WakeUp] = ()
    late: Counter[str] = field(default_factory=Counter)
    """By their state, those of ``waking`` that no wait of theirs explains."""
    completed: list[Row[Any]] = field(default_factory=list)

    def measure(self) -> None:
        """Count and log what was committed."""
        for state, runs_ in self.late.items():
            SWEEPER_CORRECTIONS.add(state, state, times=runs_)
        SWEEPER_CORRECTIONS.add(RunState.RUNNING, RunState.SUCCEEDED, times=len(self.completed))
        for run in self.completed:
            announce(run)


# --- Parts of transactions ---------------------------------------------------------------------------------


def _take_over_unsent(connection: Connection) -> None:
    """Make runs due whose wake-ups were to be sent together, and whose sender did not say that they were."""
    unsent = connection.scalars(delete(outbox).where(outbox.c.due_at <= now).returning(outbox.c.run_ids)).all()
    for run_ids in unsent:
        connection.execute(
            update(runs)
            .where(runs.c.id.in_(run_ids), runs.c.state == RunState.QUEUED, runs.c.wakes == 0)
            .values(wake_at=clock)
        )


def _canceled_due(connection: Connection, schema: str) -> UUID | None:
    """Return the canceled run that has been due for longest, locked; none if there is none, or another looks."""
    if not connection.scalar(select(func.pg_try_advisory_xact_lock(lock_key(schema, "skip")))):
        return None
    run_id: UUID | None = connection.scalar(
        select(runs.c.id)
        # Not "is canceled": of runs in a state there is an index, which leads through the whole history.
        .where(runs.c.wake_at <= now, runs.c.state.not_in(UNFINISHED))
        .order_by(runs.c.wake_at)
        .limit(1)
        # A frozen worker may have the row: the pulse must not wait for that.
        .with_for_update(skip_locked=True)
    )
    return run_id


def _skip_pending(connection: Connection, run_id: UUID) -> int:
    """Skip some of a canceled run's pending rows that nobody is publishing; keep its wake-up while any are left."""
    ours = (dispatches.c.run_id == run_id, dispatches.c.reason == SkipReason.RUN_CANCELED.value)
    last = connection.scalar(select(func.max(dispatches.c.data_source_id)).where(*ours))
    # On from where the last batch ended, else each comes by all before it; those that were in flight at the end.
    skipped = 0 if last is None else _skip_from(connection, run_id, SKIP_BATCH, dispatches.c.data_source_id > last)
    if skipped < SKIP_BATCH:
        skipped += _skip_from(connection, run_id, SKIP_BATCH - skipped)
    # By the counts, for who looks for a pending row comes by all that are none.
    left = runs.c.published + runs.c.skipped + skipped < runs.c.total
    # Less than a batch: the others are in flight.
    again_at = clock if skipped == SKIP_BATCH else from_now(ENQUEUE_GRACE)
    connection.execute(
        update(runs)
        .where(runs.c.id == run_id)
        .values(skipped=runs.c.skipped + skipped, wake_at=case((left, again_at), else_=None))
    )
    return skipped


def _skip_from(connection: Connection, run_id: UUID, limit: int, *where: ColumnElement[bool]) -> int:
    # As for a batch of the fan-out: without statistics all that is left would be fetched and sorted each time.
    for setting in ("enable_sort", "enable_bitmapscan"):
        connection.execute(select(func.set_config(setting, "off", literal(value=True))))
    unlocked = (
        select(dispatches.c.data_source_id)
        .where(dispatches.c.run_id == run_id, dispatches.c.state == DispatchState.PENDING, *where)
        .order_by(dispatches.c.data_source_id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("unlocked")
    )
    return connection.execute(
        update(dispatches)
        .where(dispatches.c.run_id == run_id, dispatches.c.data_source_id == unlocked.c.data_source_id)
        .values(state=DispatchState.SKIPPED.value, reason=SkipReason.RUN_CANCELED.value)
    ).rowcount


def _claim_due(connection: Connection, limit: int) -> _Due:
    """Take what is due; return also the wake-ups to send, each not due again for a while."""
    due = connection.execute(
        select(runs)
        .where(runs.c.wake_at <= now, runs.c.state != RunState.CANCELED)
        .order_by(runs.c.wake_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    taken = _Due(len(due))
    waking = []
    for run in due:
        if (completed := _complete_if_done(connection, run)) is not None:
            taken.completed.append(completed)
        else:
            waking.append(run)
    if not waking:
        return taken
    claimed = connection.execute(
        update(runs)
        .where(runs.c.id.in_([run.id for run in waking]))
        .values(wakes=runs.c.wakes + 1, wake_number=runs.c.wake_number + 1, wake_at=from_now(backoff(LONGEST_SILENCE)))
        .returning(runs)
    ).all()
    taken.late.update(run.state for run in waking if run.next_attempt_at is None and run.awaits_slot is None)
    rank = {run.id: place for place, run in enumerate(waking)}
    oldest_first = sorted(claimed, key=lambda run: rank[run.id])
    taken.waking = [wake_up for run in oldest_first if (wake_up := _wake_up_or_fail(connection, run)) is not None]
    return taken


def _wake_up_or_fail(connection: Connection, run: Row[Any]) -> WakeUp | None:
    """Contain a row that today's rules do not accept: it must not keep the pulse from all the others."""
    try:
        return wake_up_of(run)
    except InvalidArgumentsError as error:
        if run.state != RunState.RUNNING:
            transition(connection, run.id, RunState.RUNNING, None, None)
        announce(end(connection, run.id, RunState.FAILED, error.code, str(error)))
        return None


def _complete_if_done(connection: Connection, run: Row[Any]) -> Row[Any] | None:
    """End a silent crawl run that has nothing pending: its last worker died between batch and completion."""
    if run.kind != RunKind.CRAWL or run.state != RunState.RUNNING or run.published + run.skipped < run.total:
        return None
    return complete_crawl(connection, run.id)


def _unfinished_of(connection: Connection, task_id: int) -> UUID | None:
    statement = select(runs.c.id).where(runs.c.task_id == task_id, runs.c.finished_at.is_(None))
    run_id: UUID | None = connection.scalar(statement.order_by(runs.c.created_at).limit(1))
    return run_id


def _audit(
    connection: Connection,
    actor: str,
    action: str,
    before: Row[Any],
    after: RunState,
    reason: str | None,
    **facts: object,
) -> None:
    connection.execute(
        insert(audit_events).values(
            actor=actor,
            action=action,
            run_id=before.id,
            reason=reason,
            before={"state": before.state, "error_code": before.error_code},
            after={"state": after} | facts,
        )
    )


def _first_words(error: BaseException) -> str:
    return storable(f"{type(error).__name__}: {error}".partition("\n")[0])
