"""The steps that several stories of the ledger share, each a part of its caller's transaction.

Decides what an edge of ``domain.TRANSITIONS`` writes, on the database's clock; which edge to take, and when, is the
stories' business.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    CTE,
    Boolean,
    ColumnElement,
    Connection,
    Double,
    Row,
    Select,
    Text,
    Update,
    Uuid,
    bindparam,
    case,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.sql.dml import ReturningUpdate

from orchestrator.db import after_commit
from orchestrator.domain import (
    TERMINAL,
    UNFINISHED,
    AnalysisArguments,
    Arguments,
    CrawlArguments,
    NewRun,
    RunKind,
    RunState,
    Trigger,
    WakeUp,
    sources_of,
)
from orchestrator.errors import IllegalTransitionError, RunNotFoundError
from orchestrator.measures import RUN_DURATION, RUN_START_DELAY, RUNS_CREATED, RUNS_FINISHED
from orchestrator.schema import audit_events, run_events, runs
from orchestrator.telemetry import Event, logger

ENQUEUE_GRACE: Final = 2.0
"""Seconds after which a committed run that nobody enqueued is enqueued by the pulse."""
SILENCE: Final = 15.0
"""Seconds without progress after which a run is woken; no proof of death is needed."""

clock: Final = func.clock_timestamp()
"""The database's clock, to be written and compared with one row."""
now: Final = func.statement_timestamp()
"""For searches: an index can be asked for what is stable within a statement, not for what changes from row to row."""

_log = logger(__name__)
_SECOND: Final[ColumnElement[Any]] = literal_column("interval '1 second'")


def from_now(seconds: float | ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the moment that is so many seconds away."""
    return clock + _SECOND * seconds


# A subquery still sees the row as it was before the statement.
_before: Final = runs.alias("before")
_WAITED: Final = (
    select(func.extract("epoch", clock - func.coalesce(_before.c.next_attempt_at, _before.c.created_at)))
    .where(_before.c.id == runs.c.id, _before.c.started_at.is_(None))
    .correlate(runs)
    .scalar_subquery()
    .label("waited")
)
"""Seconds that a run could have been running before it was; null: it had been started before."""
# Whoever makes these may be a command line that is gone before anybody asks it what it counted.
_COUNTED_WHEN_STARTED: Final = frozenset({Trigger.CLI, Trigger.BACKFILL})

_RUN: Final = bindparam("run", type_=Uuid)
_WHY: Final = bindparam("why", None, Text)
_SENTENCE: Final = bindparam("sentence", None, Text)
EXPLAINED: Final[dict[str, object]] = {"error_code": _WHY, "error_message": _SENTENCE}
"""What :func:`moving` is to set where its reason is the run's, too."""

_EVENTS: Final = {
    RunState.QUEUED: Event.RUN_REVIVED,
    RunState.RUNNING: Event.RUN_STARTED,
    RunState.RETRYING: Event.RUN_RETRYING,
    RunState.SUCCEEDED: Event.RUN_SUCCEEDED,
    RunState.FAILED: Event.RUN_FAILED,
    RunState.CANCELED: Event.RUN_CANCELED,
}


def identity_of(new: NewRun) -> dict[str, object]:
    """Return the columns that say what a run is; they never change."""
    values: dict[str, object] = {
        "id": new.run_id,
        "kind": new.kind,
        "trigger": new.trigger,
        "traceparent": new.traceparent,
        "celery_id": new.celery_id,
        "retry_of": new.retry_of,
    }
    match new.arguments:
        case CrawlArguments(task_id):
            return values | {"task_id": task_id}
        case AnalysisArguments(data_source_id, theme_name):
            return values | {"data_source_id": data_source_id, "theme_name": theme_name}


def arguments_of(run: Row[Any]) -> Arguments | None:
    """Return what a run was asked for; none when its message had no usable arguments.

    Raises:
        InvalidArgumentsError: today's rules do not accept them any more.
    """
    if run.kind == RunKind.CRAWL:
        return None if run.task_id is None else CrawlArguments(run.task_id)
    return None if run.theme_name is None else AnalysisArguments(run.data_source_id, run.theme_name)


def wake_up_of(run: Row[Any]) -> WakeUp:
    """Return the wake-up to send about an unfinished run, as its row numbers it.

    Raises:
        InvalidArgumentsError: see :func:`arguments_of`.
    """
    arguments = arguments_of(run)
    if arguments is None:
        raise AssertionError(f"run {run.id} is unfinished and has no arguments")
    return WakeUp(run.id, arguments, run.traceparent, run.wake_number)


_IDENTITY: Final = (
    "id",
    "kind",
    "trigger",
    "traceparent",
    "celery_id",
    "retry_of",
    "task_id",
    "data_source_id",
    "theme_name",
    "next_attempt_at",
)


def accept(
    connection: Connection,
    news: Sequence[NewRun],
    *,
    delivered: bool,
    actor: str | None = None,
    reason: str | None = None,
    by: Select[Any] | None = None,
) -> list[bool]:
    """Accept runs; return of each whether it is new. The same id is one run, and its first arguments stand.

    Args:
        connection: of the transaction; what happened is told once it is committed.
        news: the runs.
        delivered: a worker holds a message about them, so that they need no wake-up soon.
        actor: who started them, if it is to be in the audit log.
        reason: why.
        by: the statement, if it is to do something else, too; see :func:`inserting`.
    """
    wake_in = SILENCE if delivered else ENQUEUE_GRACE
    facts = {"state": RunState.QUEUED, "code": None, "message": None, "delivered": delivered, "wake_in": wake_in}
    rows = [identity_of(new) | {"next_attempt_at": new.not_before} for new in news]
    created = set(
        connection.scalars(_INSERT if by is None else by, _columns(rows) | facts | {"actor": actor, "reason": reason})
    )
    accepted = [
        (new, True, new.arguments)
        if new.run_id in created
        else (new, False, arguments_of(run_row(connection, new.run_id)))
        for new in news
    ]
    after_commit(connection, partial(_tell_accepted, accepted))
    return [is_new for _, is_new, _ in accepted]


def insert_ended(
    connection: Connection, identity: Mapping[str, object], state: RunState, code: str, message: str
) -> bool:
    """Insert a run that is over, and why; return whether it is new."""
    facts = {"state": state, "code": code, "message": message, "delivered": False, "wake_in": None}
    columns = _columns([identity]) | facts | {"actor": None, "reason": None}
    return bool(connection.scalars(_INSERT, columns).all())


def _columns(rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    return {name: [row.get(name) for row in rows] for name in _IDENTITY}


def run_row(connection: Connection, run_id: UUID, *, lock: bool = False) -> Row[Any]:
    """Return a run's row, locked until the transaction ends if so asked.

    Raises:
        RunNotFoundError: there is no such run.
    """
    statement = select(runs).where(runs.c.id == run_id)
    run = connection.execute(statement.with_for_update() if lock else statement).one_or_none()
    if run is None:
        raise RunNotFoundError(f"there is no run {run_id}")
    return run


def among(states: Iterable[RunState]) -> ColumnElement[bool]:
    """Whether a run is in one of some states."""
    # As part of the text: parameters of a list are spelled out anew each time that a statement is executed.
    return runs.c.state.in_([literal_column(f"'{state}'", Text) for state in sorted(states)])


def workable(kind: RunKind) -> ColumnElement[bool]:
    """Whether a run is unfinished, and its wait, if any, over; of this kind, for a foreign message may carry any id."""
    due = or_(runs.c.next_attempt_at.is_(None), runs.c.next_attempt_at <= clock)
    return (runs.c.kind == kind) & among(UNFINISHED) & due


def begin(
    connection: Connection,
    run_id: UUID,
    kind: RunKind,
    *conditions: ColumnElement[bool],
    wake_in: float,
    **values: object,
) -> Row[Any] | None:
    """Make a run running if it may work now (again); count a stall if nothing moved since the last one."""
    facts = {"run": run_id, "wake_in": wake_in}
    for step in (starting, going_on):
        run = connection.execute(step(workable(kind), *conditions, **values), facts).one_or_none()
        if run is not None:
            measure_start(run)
            return run
    return None


def starting(*conditions: ColumnElement[bool], **values: object) -> Select[Any]:
    """Return the statement that makes a run running which is not.

    Its parameters are ``run``, and ``wake_in`` in seconds. See :func:`measure_start`.
    """
    return _recording(
        RunState.RUNNING, _moved(RunState.RUNNING, conditions, _begun() | values).returning(runs, _WAITED)
    )


def going_on(*conditions: ColumnElement[bool], **values: object) -> ReturningUpdate[Any]:
    """Return the like statement for a run that is running."""
    again = update(runs).where(runs.c.id == _RUN, runs.c.state == RunState.RUNNING, *conditions)
    return again.values(_begun() | values).returning(runs, _WAITED)


def _begun() -> dict[str, object]:
    # Many deliveries within moments are a storm, not a run that kills its workers: they count once.
    stalled = func.greatest(runs.c.progress_at, runs.c.stalled_at) < from_now(-5)
    return {
        "started_at": func.coalesce(runs.c.started_at, clock),
        "next_attempt_at": None,
        "wake_at": from_now(bindparam("wake_in", type_=Double)),
        "wakes": 0,
        "stale_below": runs.c.wake_number + 1,
        "stalls": case((stalled, runs.c.stalls + 1), else_=runs.c.stalls),
        "stalled_at": case((stalled, clock), else_=runs.c.stalled_at),
    }


def transition(
    connection: Connection,
    run_id: UUID,
    target: RunState,
    code: str | None,
    message: str | None,
    *conditions: ColumnElement[bool],
    **values: object,
) -> Row[Any] | None:
    """Compare-and-set a run's state; return its row, or none when the present state does not lead there."""
    explained = {} if code is None else EXPLAINED
    moved = moving(target, *conditions, **explained | values)
    return connection.execute(moved, {"run": run_id, "why": code, "sentence": message}).one_or_none()


def moving(target: RunState, *conditions: ColumnElement[bool], **values: object) -> Select[Any]:
    """Return the statement that compares and sets a run's state, and records it.

    Its parameters are ``run``, and the record's code and message, ``why`` and ``sentence``, none unless given. To make
    one takes longer than to execute it: stories that are told often keep theirs.
    """
    return _recording(target, _moved(target, conditions, values).returning(runs))


def _moved(target: RunState, conditions: Iterable[ColumnElement[bool]], values: Mapping[str, object]) -> Update:
    moved = update(runs).where(runs.c.id == _RUN, among(sources_of(target)), *conditions)
    return moved.values(state=target, **values)


def _recording(target: RunState, moved: ReturningUpdate[Any]) -> Select[Any]:
    part = moved.cte("moved")
    return select(part).add_cte(_record(part, _EVENTS[target], _WHY, _SENTENCE))


def only(statement: Select[Any], *names: str) -> Select[Any]:
    """Return the statement with fewer columns: to make values of a whole run takes as long as to exchange them."""
    return statement.with_only_columns(*(statement.selected_columns[name] for name in names))


def end(
    connection: Connection,
    run_id: UUID,
    target: RunState,
    code: str | None,
    message: str | None,
    *conditions: ColumnElement[bool],
    wake_at: ColumnElement[Any] | None = None,
) -> Row[Any] | None:
    """Make a run be over, with its reason unless it succeeded; return its row, or none when it cannot end so."""
    moved = ending(target, *conditions, wake_at=wake_at)
    return connection.execute(moved, {"run": run_id, "why": code, "sentence": message}).one_or_none()


def ending(
    target: RunState, *conditions: ColumnElement[bool], wake_at: ColumnElement[Any] | None = None
) -> Select[Any]:
    """Return the statement that makes a run be over, see :func:`end` and :func:`moving`."""
    explained = {"error_code": None, "error_message": None} if target is RunState.SUCCEEDED else EXPLAINED
    ended = {"finished_at": clock, "wake_at": wake_at, "next_attempt_at": None, "awaits_slot": None}
    return moving(target, *conditions, **ended, **explained)


def _record(changed: CTE, event: Event, code: ColumnElement[Any], message: ColumnElement[Any]) -> CTE:
    """Return the part of a statement that records what another part of it changed: one round trip for both."""
    facts = select(changed.c.id, literal(event.value), changed.c.state, code, message)
    return insert(run_events).from_select(["run_id", "event", "state", "code", "message"], facts).cte("recorded")


def _tell_accepted(accepted: Sequence[tuple[NewRun, bool, Arguments | None]]) -> None:
    """Tell of runs, each with whether it is new and what is kept as its arguments."""
    for new, created, kept in accepted:
        run_id = str(new.run_id)
        if created:
            count_created(new.kind, new.trigger)
            _log.info(Event.RUN_ACCEPTED, run_id=run_id, kind=new.kind, trigger=new.trigger)
        elif kept != new.arguments:
            _log.warning(Event.RUN_ID_CONFLICT, run_id=run_id, kept=repr(kept)[:200], ignored=repr(new.arguments)[:200])


def count_created(kind: RunKind, trigger: Trigger) -> None:
    """Count a run that was committed."""
    if trigger not in _COUNTED_WHEN_STARTED:
        RUNS_CREATED.add(kind, trigger)


def measure_start(run: Row[Any]) -> None:
    """Count and time the start of a run that one of our statements made running, unless it had been started before."""
    if run.waited is None:
        return
    RUN_START_DELAY.observe(float(run.waited), run.kind)
    if run.trigger in _COUNTED_WHEN_STARTED:
        RUNS_CREATED.add(run.kind, run.trigger)


def _measure_end(run: Row[Any]) -> None:
    if run.finished_at is None:
        return
    RUNS_FINISHED.add(run.kind, run.state)
    if run.started_at is not None:
        RUN_DURATION.observe((run.finished_at - run.started_at).total_seconds(), run.kind)


TOLD: Final = (
    "id",
    "kind",
    "state",
    "total",
    "published",
    "skipped",
    "error_code",
    "error_message",
    "started_at",
    "next_attempt_at",
    "finished_at",
)
"""The columns that :func:`announce` asks for."""


def announce(run: Row[Any] | None) -> None:
    """Log and count how a run now stands, if it changed."""
    if run is None:
        return
    _measure_end(run)
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


def illegal(run: Row[Any], wanted: str) -> IllegalTransitionError:
    """Return the error that says what a run cannot be, and what can be done instead."""
    # A retry of what is over for good is a new run.
    allowed = ["retry"] if RunState(run.state) in TERMINAL else ["cancel"]
    if arguments_of(run) is None or run.forgotten_at is not None:
        allowed = []
    instead = ", ".join(allowed) or "to start a new one"
    return IllegalTransitionError(f"run {run.id} is {run.state}: it cannot be {wanted}; allowed: {instead}", allowed)


def backoff(longest: float) -> ColumnElement[Any]:
    """Seconds until a run that was woken so often is woken again."""
    return func.least(longest, SILENCE * func.power(2, func.least(runs.c.wakes, 10)))


def complete_crawl(connection: Connection, run_id: UUID) -> Row[Any] | None:
    """End a crawl run as succeeded if it has a plan and nothing of it is pending; return its row if this did it."""
    planned = runs.c.materialized_at.is_not(None)
    # Each row is counted by the transaction that changes it; to look at the rows takes 0.3 s for a million of them.
    done = runs.c.published + runs.c.skipped == runs.c.total
    return end(connection, run_id, RunState.SUCCEEDED, None, None, planned, done)


def lock_key(schema: str, purpose: str) -> ColumnElement[int]:
    """Return the key of an advisory lock; two ledgers in one database (two schemas) must not wait for each other."""
    return func.hashtextextended(f"orchestrator:{schema}:{purpose}", 0)


def inserting(*also: ColumnElement[Any]) -> Select[Any]:
    """Return the statement that inserts any number of runs, their events and, if there is an actor, audit events.

    Args:
        also: what else to do for each that is new, when it has been inserted.
    """
    arrays = [bindparam(name, type_=ARRAY(runs.c[name].type)) for name in _IDENTITY]
    given = func.unnest(*arrays).table_valued(*_IDENTITY).render_derived("given")
    state, actor = bindparam("state", type_=Text), bindparam("actor", type_=Text)
    values = {name: given.c[name] for name in _IDENTITY} | {
        "state": state,
        "error_code": bindparam("code", type_=Text),
        "error_message": bindparam("message", type_=Text),
        "enqueued_at": case((bindparam("delivered", type_=Boolean), clock)),
        "wake_at": func.coalesce(given.c.next_attempt_at, from_now(bindparam("wake_in", type_=Double))),
        "finished_at": case((state.in_([each.value for each in TERMINAL]), clock)),
    }
    created = (
        upsert(runs)
        .from_select(list(values), select(*values.values()))
        .on_conflict_do_nothing(index_elements=[runs.c.id])
        .returning(runs.c.id, runs.c.task_id, runs.c.state, runs.c.error_code, runs.c.error_message)
        .cte("created")
    )
    recorded = _record(created, Event.RUN_ACCEPTED, created.c.error_code, created.c.error_message)
    audit = {
        "run_id": created.c.id,
        "task_id": created.c.task_id,
        "actor": actor,
        "action": literal("start"),
        "reason": bindparam("reason", type_=Text),
        "after": func.jsonb_build_object("state", created.c.state),
    }
    audited = insert(audit_events).from_select(list(audit), select(*audit.values()).where(actor.is_not(None)))
    return select(created.c.id, *also).add_cte(recorded, audited.cte("audited"))


# One, made once: most of what it costs to accept a run is to make statements and to exchange them.
_INSERT: Final = inserting()
