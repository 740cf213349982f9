"""What happens to a site analysis: calls are recorded, lost, capped, and waited for."""

from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    Connection,
    Double,
    Executable,
    Integer,
    Row,
    Select,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    select,
    update,
)

from orchestrator.db import Database
from orchestrator.discovery import Answer
from orchestrator.domain import (
    UNFINISHED,
    AnalysisArguments,
    Attempt,
    AttemptOutcome,
    NewRun,
    NoAttempt,
    RunKind,
    RunState,
    WakeUp,
)
from orchestrator.ledger.transitions import (
    EXPLAINED,
    TOLD,
    accept,
    among,
    announce,
    backoff,
    clock,
    end,
    ending,
    from_now,
    going_on,
    inserting,
    lock_key,
    measure_start,
    moving,
    now,
    only,
    starting,
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


# --- Statements, made once: to make one takes longer than to execute it --------------------------------------

_DUE: Final[Select[Any]] = (
    select(
        runs.c.id,
        runs.c.state,
        runs.c.attempts,
        runs.c.attempts_forgiven,
        runs.c.data_source_id,
        runs.c.theme_name,
        runs.c.traceparent,
    )
    .where(runs.c.id == bindparam("run"), workable(RunKind.SITE_ANALYSIS))
    .with_for_update()
)
_OPEN: Final = (attempts.c.run_id == bindparam("run"), attempts.c.finished_at.is_(None))

_under_way = (
    select(
        func.count().label("everywhere"),
        func.count().filter(attempts.c.node == bindparam("worker")).label("here"),
    )
    .where(attempts.c.finished_at.is_(None), attempts.c.lease_until > now)
    .subquery()
)
_slot_free = (_under_way.c.everywhere < bindparam("cap"), _under_way.c.here < bindparam("node_cap"))
_IS_SLOT_FREE: Final = select(and_(*_slot_free))
_ATTEMPT: Final = bindparam("attempt", type_=Integer)
_recorded = (
    insert(attempts)
    .from_select(
        ["run_id", "number", "node", "lease_until"],
        select(
            bindparam("run", type_=Uuid),
            _ATTEMPT,
            bindparam("worker", type_=Text),
            from_now(bindparam("wake_in", type_=Double)),
        ).where(*_slot_free),
    )
    .returning(attempts.c.number)
    .cte("recorded_attempt")
)
# Of a run whose row is locked: the attempt is recorded if a slot is free, and the run begun if it was recorded. In one
# statement, for whoever else starts a call waits for it.
_begun = {"attempts": _ATTEMPT, "awaits_slot": None}
_START: Final = only(starting(exists(select(_recorded.c.number)), **_begun), "kind", "trigger", "waited")
_GO_ON: Final = going_on(exists(select(_recorded.c.number)), **_begun)

# To ask whether anybody waits, too. Not by EXISTS, which PostgreSQL would answer by reading runs one after the other
# once it believes that many wait.
_OLDEST_WAITING: Final = (
    select(runs.c.id)
    .where(
        runs.c.awaits_slot.is_not(None),
        among(UNFINISHED),
        func.coalesce(runs.c.next_attempt_at, clock) <= clock,
    )
    .order_by(runs.c.created_at)
    .limit(1)
)
_oldest = _OLDEST_WAITING.with_for_update(skip_locked=True).scalar_subquery()
_NEXT_WAITING: Final = update(runs).where(runs.c.id == _oldest).values(awaits_slot=None).returning(runs)

# The run's row before its attempt: see the order of locks.
_locked = select(runs.c.id).where(runs.c.id == bindparam("run")).with_for_update().cte("locked")
_AGAIN_AT: Final = from_now(bindparam("retry_in", type_=Double))
_SAID: Final = ("outcome", "status", "code", "message", "seconds", "retry_after")
_finished = (
    update(attempts)
    .where(attempts.c.run_id == _locked.c.id, attempts.c.number == _ATTEMPT, attempts.c.finished_at.is_(None))
    .values({name: bindparam(f"said_{name}", type_=attempts.c[name].type) for name in _SAID})
    .values(finished_at=clock, next_attempt_at=_AGAIN_AT)
    .returning(attempts.c.number)
    .cte("finished_attempt")
)
_was_open = exists(select(_finished.c.number))
_again = {"next_attempt_at": _AGAIN_AT, "wake_at": _AGAIN_AT, "progress_at": clock}
_SUCCEED: Final = only(ending(RunState.SUCCEEDED, _was_open), *TOLD)
_FAIL: Final = only(ending(RunState.FAILED, _was_open), *TOLD)
_RETRY: Final = only(moving(RunState.RETRYING, _was_open, **EXPLAINED, **_again), *TOLD)

_Due = tuple[Attempt, Executable]
"""A call that may be made if a slot is free, and the statement that begins it."""


class AnalysisLedger:
    """Records calls to the Discovery Service.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        lock = func.pg_advisory_xact_lock(lock_key(database.schema, "discovery"))
        number, expired = func.max(attempts.c.number), func.bool_or(attempts.c.lease_until <= clock)
        # Where a call is under way nobody waits: the run's row would be locked meanwhile.
        turn = case((number.is_(None) | expired, lock))
        self._turn = select(turn, number, expired).where(*_OPEN)
        self._accept_in_turn = inserting(lock)

    def begin_attempt(
        self,
        run: UUID | NewRun,
        *,
        node: str,
        lease: float,
        max_retries: int,
        cap: int,
        node_cap: int,
    ) -> Attempt | NoAttempt:
        """Record one call to the Discovery Service before it is made; say why when none may be made now.

        An attempt whose lease ran out becomes ``lost`` first, which counts. When ``cap`` calls are under way
        everywhere, or ``node_cap`` by this node, the run is set aside for :meth:`next_waiting`.

        Args:
            run: which; a new one is accepted first: a worker holds a message about it.
            node: the worker's name.
            lease: seconds until the attempt counts as lost.
            max_retries: attempts beyond the first, since the last revival.
            cap: most calls under way at once, all workers together.
            node_cap: most calls under way at once by this node.
        """
        run_id = run.run_id if isinstance(run, NewRun) else run
        with self._database.transaction() as connection:
            due = self._accept(connection, run) if isinstance(run, NewRun) else None
            due = due or self._find_due(connection, run_id, max_retries)
            if due is None:
                return NoAttempt.NOT_DUE
            attempt, start = due
            facts = {
                "run": run_id,
                "attempt": attempt.number,
                "worker": node,
                "wake_in": lease,
                "cap": cap,
                "node_cap": node_cap,
            }
            begun = connection.execute(start, facts).one_or_none()
            if begun is None:
                _set_aside(connection, run_id)
                return NoAttempt.NO_SLOT
            measure_start(begun)
            return attempt

    def finish_attempt(self, attempt: Attempt, answer: Answer, retry_in: float | None) -> bool:
        """Record how a call ended, and what follows for its run.

        Args:
            attempt: from :meth:`begin_attempt`.
            answer: what the Discovery Service said.
            retry_in: seconds until the next attempt; none when there will be none.

        Returns:
            whether a run may wait for a free call.
        """
        facts = {"run": attempt.run_id, "attempt": attempt.number, "retry_in": retry_in}
        facts |= {f"said_{name}": getattr(answer, name) for name in _SAID}
        statement = _SUCCEED
        if answer.outcome is not AttemptOutcome.SUCCEEDED:
            statement = _FAIL if retry_in is None else _RETRY
            facts |= {"why": answer.code, "sentence": answer.message}
        with self._database.autocommit() as connection:
            announce(connection.execute(statement, facts).one_or_none())
            # Not before the commit: a run that is set aside meanwhile looks for a free slot after its own. One of the
            # two sees the other.
            return connection.scalar(_OLDEST_WAITING) is not None

    def is_slot_free(self, *, node: str, cap: int, node_cap: int) -> bool:
        """Tell whether a call might begin now; see :meth:`begin_attempt`."""
        with self._database.autocommit() as connection:
            return bool(connection.scalar(_IS_SLOT_FREE, {"worker": node, "cap": cap, "node_cap": node_cap}))

    def next_waiting(self) -> WakeUp | None:
        """Take the oldest run that was set aside for want of a free call, if there is one."""
        with self._database.transaction() as connection:
            run = connection.execute(_NEXT_WAITING).one_or_none()
            return None if run is None else wake_up_of(run)

    def _accept(self, connection: Connection, new: NewRun) -> _Due | None:
        """Accept a run, and take the turn of its first call; return none if it is not new, or waits for its time."""
        assert isinstance(new.arguments, AnalysisArguments)  # noqa: S101 -- for the type checker
        waits = new.not_before is not None
        [is_new] = accept(connection, [new], delivered=True, by=None if waits else self._accept_in_turn)
        if waits or not is_new:
            return None
        source, theme = new.arguments.data_source_id, new.arguments.theme_name
        return Attempt(new.run_id, 1, 0, source, theme, new.traceparent), _START

    def _find_due(self, connection: Connection, run_id: UUID, max_retries: int) -> _Due | None:
        """Lock a run and take the turn of its next call; return none if it may make none now, or never again."""
        run = connection.execute(_DUE, {"run": run_id}).one_or_none()
        if run is None or not self._take_turn(connection, run_id):
            return None
        done = run.attempts - run.attempts_forgiven
        if done > max_retries:
            _exhaust(connection, run)
            return None
        attempt = Attempt(run_id, run.attempts + 1, done, run.data_source_id, run.theme_name, run.traceparent)
        return attempt, _GO_ON if run.state == RunState.RUNNING else _START

    def _take_turn(self, connection: Connection, run_id: UUID) -> bool:
        """Wait until nobody else starts a call, and keep the others waiting until the commit.

        Serialises the starts of calls, not the calls: two nodes must not both see the last free slot.

        Returns:
            whether no call of this run is under way; one whose lease ran out becomes lost.
        """
        _, number, expired = connection.execute(self._turn, {"run": run_id}).one()
        if number is not None and expired:
            _lose(connection, run_id, number)
        return number is None or expired


def _lose(connection: Connection, run_id: UUID, number: int) -> None:
    """Mark a run's open attempt, whose lease ran out, as lost."""
    connection.execute(
        update(attempts)
        .where(attempts.c.run_id == run_id, attempts.c.number == number, attempts.c.finished_at.is_(None))
        .values(finished_at=clock, outcome=AttemptOutcome.LOST, code="lost", message=_LOST)
    )
    DISCOVERY_ATTEMPTS.add(AttemptOutcome.LOST)
    _log.warning(Event.ATTEMPT_LOST, run_id=str(run_id), number=number)


def _exhaust(connection: Connection, run: Row[Any]) -> None:
    """Fail a run whose last allowed attempt was lost."""
    if run.state != RunState.RUNNING:
        transition(connection, run.id, RunState.RUNNING, None, None)
    announce(end(connection, run.id, RunState.FAILED, "lost", _LOST))


def _set_aside(connection: Connection, run_id: UUID) -> None:
    connection.execute(
        update(runs)
        .where(runs.c.id == run_id)
        .values(
            awaits_slot="discovery_concurrency",
            wake_at=from_now(backoff(LONGEST_WAIT_FOR_SLOT)),
        )
    )
