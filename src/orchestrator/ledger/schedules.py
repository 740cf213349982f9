"""Schedules as they were last read, pauses, and the firing of each slot.

``firings`` is the only judge of whether a slot was claimed. A reading is written only while the schedule's row is
locked, and only from what the application's row said after that: no process can write an older reading over a newer
one. The moments of a decision come from one clock, the database's.

Deliberately unknown here: what a schedule's text means, and which slots fire; a :class:`Reader` and the engine say so.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    Double,
    FromClause,
    Insert,
    Row,
    Select,
    TableValuedAlias,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.types import TypeEngine

from orchestrator.catalog import Catalog, ScheduleSource, mismatch_explained
from orchestrator.db import Database, after_commit
from orchestrator.domain import (
    GRACE,
    MAX_BIGINT,
    CrawlArguments,
    DueSchedule,
    Firing,
    FiringOutcome,
    FiringReason,
    Reading,
    RunKind,
    RunState,
    ScheduleRow,
    Trigger,
    WakeUp,
    slot_run_id,
)
from orchestrator.errors import IllegalTransitionError, ScheduleNotFoundError, UnreadableScheduleError
from orchestrator.ledger.transitions import ENQUEUE_GRACE, SILENCE, from_now
from orchestrator.measures import RUNS_CREATED, SCHEDULE_FIRES, SCHEDULE_LAG
from orchestrator.schema import (
    audit_events,
    catalog_watch,
    firings,
    outbox,
    pauses,
    run_events,
    runs,
    schedule_history,
    schedules,
)
from orchestrator.telemetry import Event, logger

CHUNK: Final = 5_000
"""Crawl tasks that one transaction compares and reads at most: what is due waits for it, and so do others' looks."""
OVERLAP: Final = timedelta(seconds=60)
"""How far a look by ``updated_at`` reaches back: a transaction commits later than the moment that it notes."""

_SLOWEST_SENDER: Final = 1_000  # wake-ups a second; where each is confirmed by itself, a large batch takes a while
_SHOWN: Final = 20  # problems that are logged of one look; `orchestrator schedules` has them all
_log = logger(__name__)
_MOMENT: Final = TIMESTAMP(timezone=True)
_LONG_AGO: Final = datetime(1, 1, 1, tzinfo=UTC)
Clock = Callable[[Connection], datetime]


def database_clock(connection: Connection) -> datetime:
    """Return what time it is, the same for every process."""
    now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    return now


class Reader(Protocol):
    """Knows what schedules mean."""

    @property
    def rules(self) -> str:
        """Version and settings of the reading; what was read by other rules is read again."""
        ...

    def read(self, row: ScheduleRow, after: datetime) -> Reading:
        """Return what a row means, with its first slot after a moment."""
        ...

    def last_slot(self, canonical: str, zone: str, first: datetime, until: datetime) -> datetime:
        """Return the last of the slots from ``first`` to a moment, or that moment where it takes long to tell."""
        ...


class Look(NamedTuple):
    """What one look at the application's table came to.

    Attributes:
        kind: which it was; none when it was not time for any, or another process was looking.
        more: there is more to look at, at once.
        has_updates: whether the table has ``updated_at``.
        swept_in: seconds since the beginning of the sweep that it completed.
    """

    kind: Literal["updates", "sweep"] | None = None
    more: bool = False
    has_updates: bool = False
    swept_in: float | None = None


@dataclass(frozen=True, slots=True)
class Unsent:
    """Wake-ups of runs that are about to be committed, to be sent once they are.

    Attributes:
        batch: for ``RunLedger.mark_sent`` after they were confirmed; the pulse sends what is not marked in 2 s.
        wake_ups: what to send.
    """

    batch: int | None
    wake_ups: Sequence[WakeUp]


NOTHING_UNSENT: Final = Unsent(None, ())


@dataclass(slots=True)
class Claim:
    """Schedules whose slots have come, locked until the transaction ends.

    Attributes:
        now: the moment of the claim.
        due: the schedules, longest due first, as they stand in the application's table now.
        overlapping: those of their tasks that have an unfinished run.
        edited: how many more were due by a reading that no longer holds.
        unsent: known when the transaction has ended.
    """

    now: datetime
    due: Sequence[DueSchedule] = ()
    overlapping: frozenset[int] = frozenset()
    edited: int = 0
    unsent: Unsent = NOTHING_UNSENT
    _firings: list[Firing] = field(default_factory=list)
    _advances: dict[int, datetime | None] = field(default_factory=dict)
    _problems: dict[int, str] = field(default_factory=dict)

    def settle(self, schedule: DueSchedule, slots: Sequence[Firing], next_fire_at: datetime | None) -> None:
        """Say what becomes of a schedule's slots, and when its next one is; one that is left out stays due."""
        self._firings.extend(slots)
        self._advances[schedule.task_id] = next_fire_at

    def reject(self, schedule: DueSchedule, problem: str, through: datetime | None = None) -> None:
        """Say that a schedule cannot be read any more: its zone, for instance, has left the system's database.

        Args:
            schedule: one of those that are due.
            problem: why, for people.
            through: the last of its slots that have come, where there are more than one.
        """
        slot = schedule.next_fire_at
        self._firings.append(Firing(schedule.task_id, slot, FiringOutcome.SKIPPED, FiringReason.INVALID, through))
        self._problems[schedule.task_id] = problem

    def measure(self) -> None:
        """Count what was committed."""
        RUNS_CREATED.add(RunKind.CRAWL, Trigger.SCHEDULE, times=len(self.unsent.wake_ups))
        for outcome, times in Counter(slot.outcome for slot in self._firings).items():
            SCHEDULE_FIRES.add(outcome, times=times)
        # Thousands have their slot at the same moment.
        started = Counter(slot.scheduled_for for slot in self._firings if slot.outcome is FiringOutcome.STARTED)
        for moment, times in started.items():
            SCHEDULE_LAG.observe((self.now - moment).total_seconds(), times=times)


class ScheduleLedger:
    """Writes schedules, pauses and firings.

    Every method opens its own transaction and raises DatabaseUnavailableError when it cannot; the caller then repeats
    the call. Those that look into the application's tables raise CatalogMismatchError when they do not fit.

    Args:
        database: where the ledger's tables are.
        catalog: the application's tables.
        clock: tells the moment of a decision; simulations have one of their own.
    """

    def __init__(self, database: Database, catalog: Catalog, clock: Clock = database_clock) -> None:
        self._database = database
        self._catalog = catalog
        self._clock = clock

    # --- Noticing edits ------------------------------------------------------------------------------------

    def look(self, reader: Reader, *, every: float, sweep_every: float, by: str) -> Look:
        """Read schedules whose row in the application's table is not what it was, at most a chunk of them.

        One process at a time looks; the others return at once, for it does so for all. Edits are told by
        ``updated_at``. A sweep compares the whole table, chunk by chunk: it also finds rows that were deleted, and
        edits that left ``updated_at`` alone.

        Args:
            reader: what rows mean.
            every: seconds between looks by ``updated_at``.
            sweep_every: seconds between the beginnings of sweeps.
            by: who looks.
        """
        with self._database.transaction() as connection:
            # Not worth waiting for the disk each second: what a crash loses is looked at again.
            connection.execute(_NO_WAIT)
            watch = connection.execute(_WATCH).one_or_none()
            if watch is None:
                return Look()
            now = self._clock(connection)
            source = self._catalog.schedules(connection)
            sweep_is_due = watch.sweep_began_at is None and _over(watch.swept_at, now, sweep_every)
            if source.has_updated_at and watch.swept_at is not None and _over(watch.looked_at, now, every):
                many = self._look_at_updates(connection, source, reader, watch.looked_at, by)
                if many:
                    # Chunk by chunk in the order of ids: another look would compare what has been read all over again.
                    connection.execute(_BEGIN_SWEEP, {"now": now})
                more = many or sweep_is_due or watch.sweep_began_at is not None
                return Look("updates", more, has_updates=True)
            if sweep_is_due:
                watch = connection.execute(_BEGIN_SWEEP, {"now": now}).one()
            if watch.sweep_began_at is None:
                return Look()
            more = self._sweep_on(connection, source, reader, watch.sweep_after, by)
            took = None if more else (self._clock(connection) - watch.sweep_began_at).total_seconds()
            return Look("sweep", more, source.has_updated_at, took)

    def _look_at_updates(
        self, connection: Connection, source: ScheduleSource, reader: Reader, since: datetime | None, by: str
    ) -> bool:
        """Read what was edited lately, at most a chunk of it; return whether it was a whole one."""
        now = self._clock(connection)
        theirs = source.rows
        # Compared first, so that what has been read costs no more than the comparison.
        statement = (
            select(*_said(theirs), schedules.c.task_id.label("known"))
            .select_from(theirs.outerjoin(schedules, schedules.c.task_id == theirs.c.task_id))
            .where(theirs.c.updated_at >= min(since or now, now) - OVERLAP, _differs(theirs, schedules, reader))
            .limit(CHUNK)
        )
        with mismatch_explained():
            rows = connection.execute(statement).all()
        self._read_again(connection, source, reader, rows, by)
        connection.execute(update(catalog_watch).values(looked_at=now))
        return len(rows) == CHUNK

    def _sweep_on(self, connection: Connection, source: ScheduleSource, reader: Reader, after: int, by: str) -> bool:
        """Compare one chunk of the whole table; return whether there is more."""
        theirs = source.rows
        # By ranges of ids: a chunk costs the same whether all of its rows have changed or none.
        end = (
            select(theirs.c.task_id)
            .where(theirs.c.task_id > after)
            .order_by(theirs.c.task_id)
            .offset(CHUNK - 1)
            .limit(1)
        )
        with mismatch_explained():
            upto = connection.scalar(end)
        theirs = select(theirs).where(theirs.c.task_id > after, theirs.c.task_id <= (upto or MAX_BIGINT)).subquery()
        ours = (
            select(schedules).where(schedules.c.task_id > after, schedules.c.task_id <= (upto or MAX_BIGINT)).subquery()
        )
        statement = (
            select(*_said(theirs), ours.c.task_id.label("known"))
            .select_from(theirs.join(ours, theirs.c.task_id == ours.c.task_id, full=True))
            .where(_differs(theirs, ours, reader))
        )
        with mismatch_explained():
            rows = connection.execute(statement).all()
        self._read_again(connection, source, reader, rows, by)
        connection.execute(_END_SWEEP if upto is None else update(catalog_watch).values(sweep_after=upto))
        return upto is not None

    def _read_again(
        self, connection: Connection, source: ScheduleSource, reader: Reader, rows: Sequence[Any], by: str
    ) -> None:
        """Read what differs: new rows, where ``known`` is null, and those that were changed or deleted."""
        new = [_schedule_row(row) for row in rows if row.known is None]
        if new:
            # The clock is asked after the rows: an edit must not fire for a slot that was before it.
            now = self._clock(connection)
            readings = [reader.read(row, now) for row in new]
            _warn(readings)
            connection.execute(_INSERT_READINGS, _columns(readings) | {"rules": reader.rules, "now": now})
        known = [row.known for row in rows if row.known is not None]
        if known:
            locked = connection.scalars(_LOCK, {"ids": known}).all()
            self._reread(connection, self._edited(connection, source, reader, locked), reader, by)
        if rows:
            _log.debug(Event.SCHEDULES_READ, new=len(new), changed=len(known))

    @staticmethod
    def _edited(
        connection: Connection, source: ScheduleSource, reader: Reader, locked: Sequence[int]
    ) -> Sequence[Row[Any]]:
        """Return the application's rows of locked schedules where they differ from our reading, and that beside."""
        theirs = source.rows
        statement = (
            select(*_said(theirs), *(each.label(f"our_{each.name}") for each in schedules.c))
            .select_from(schedules.outerjoin(theirs, theirs.c.task_id == schedules.c.task_id))
            .where(schedules.c.task_id == func.any(bindparam("ids", type_=_IDS)), _differs(theirs, schedules, reader))
        )
        with mismatch_explained():
            return connection.execute(statement, {"ids": locked}).all()

    def _reread(
        self, connection: Connection, edited: Sequence[Row[Any]], reader: Reader, by: str
    ) -> dict[int, ScheduleRow]:
        """Replace the readings of locked schedules, and keep the old ones in the history.

        Returns:
            Those that are the same slots in other words, or by another policy: what is due of them stays due.
        """
        reworded: dict[int, ScheduleRow] = {}
        if not edited:
            return reworded
        now = self._clock(connection)
        past: list[Row[Any]] = []
        readings: list[Reading] = []
        unclaimed: list[Firing] = []
        for row in edited:
            reading = None if row.task_id is None else reader.read(_schedule_row(row), now)
            if reading is not None and _has_the_slots_of(row, reading):
                reworded[row.task_id] = reading.row
                readings.append(Reading(reading.row, reading.canonical, None, row.our_next_fire_at))
                continue
            past.append(row)
            if reading is not None:
                readings.append(reading)
            if row.our_next_fire_at is not None and row.our_next_fire_at <= now:
                unclaimed.append(_unclaimed(row, reading, reader, now))
        _warn(readings)
        _write_firings(connection, unclaimed, now, by)
        after_commit(connection, partial(SCHEDULE_FIRES.add, FiringOutcome.SKIPPED, times=len(unclaimed)))
        replaced = {row.our_task_id for row in past}
        connection.execute(_KEEP, {"ids": list(replaced), "now": now})
        connection.execute(_UPDATE_READINGS, _columns(readings, replaced) | {"rules": reader.rules, "now": now})
        connection.execute(_FORGET, {"ids": [row.our_task_id for row in edited if row.task_id is None]})
        return reworded

    # --- Claiming ------------------------------------------------------------------------------------------

    def next_due_in(self) -> float | None:
        """Return the seconds until the next slot, negative when it has come; none when there is none."""
        with self._database.transaction() as connection:
            first: datetime | None = connection.scalar(_FIRST)
            return None if first is None else (first - self._clock(connection)).total_seconds()

    def backlog(self, limit: int) -> int:
        """Return how many runs wait for a worker, counted up to a limit."""
        with self._database.transaction() as connection:
            return connection.execute(_BACKLOG, {"state": RunState.QUEUED, "limit": limit}).scalar_one()

    @contextmanager
    def claim(self, reader: Reader, *, late: bool, limit: int, by: str) -> Iterator[Claim]:
        """Take schedules that are due, for the block to settle; commit slots, runs and next slots at its end.

        Any number of processes may claim at the same time: each takes what no other has. A schedule that was edited
        since it was read is read again first, and what was due by the old reading is recorded as skipped.

        Args:
            reader: what rows mean.
            late: take those whose slots were missed, else those that are on time; the ones must not hold up the others.
            limit: schedules to take at most.
            by: who claims.
        """
        with self._database.transaction() as connection:
            now = self._clock(connection)
            after, until = (_LONG_AGO, now - GRACE) if late else (now - GRACE, now)
            rows = connection.execute(_TAKE, {"after": after, "until": until, "limit": limit})
            taken = {row.task_id: row for row in rows.all()}
            claim = self._claim(connection, taken, reader, now, by) if taken else Claim(now)
            yield claim
            claim.unsent = _commit(connection, claim, by)
        claim.measure()

    def _claim(
        self, connection: Connection, taken: dict[int, Row[Any]], reader: Reader, now: datetime, by: str
    ) -> Claim:
        ids = list(taken)
        edited = self._edited(connection, self._catalog.schedules(connection), reader, ids)
        reworded = self._reread(connection, edited, reader, by)
        for row in edited:
            if row.our_task_id not in reworded:
                taken.pop(row.our_task_id, None)  # a view may have an id twice
        paused = {row.task_id: row for row in connection.execute(_PAUSES, {"ids": ids})}
        overlapping = frozenset(connection.scalars(_OVERLAPPING, {"ids": ids}))
        if reworded or paused:
            due = [_due(row, reworded.get(task_id), paused.get(task_id)) for task_id, row in taken.items()]
        else:
            due = [DueSchedule(*tuple(row)) for row in taken.values()]
        return Claim(now, due, overlapping, len(edited) - len(reworded))

    # --- Control -------------------------------------------------------------------------------------------

    def pause(self, task_id: int, *, actor: str, reason: str | None = None, within: Connection | None = None) -> None:
        """Have every slot skipped, and recorded so, until :meth:`resume`; a run that exists goes on.

        Raises:
            ScheduleNotFoundError: no such crawl task has been noticed.
            IllegalTransitionError: it is paused.
        """
        with self._database.transaction(within) as connection:
            _require(connection, task_id)
            values = {"paused_at": self._clock(connection), "actor": actor, "reason": reason, "resumed_at": None}
            statement = (
                upsert(pauses)
                .values(task_id=task_id, **values)
                .on_conflict_do_update(
                    index_elements=[pauses.c.task_id], set_=values, where=pauses.c.resumed_at.is_not(None)
                )
                .returning(pauses.c.task_id)
            )
            if connection.scalar(statement) is None:
                raise IllegalTransitionError(
                    f"the schedule of crawl task {task_id} is paused; allowed: resume", ["resume"]
                )
            _audit(connection, actor, "pause", task_id, reason, {"paused": True}, before={"paused": False})
            after_commit(connection, partial(_log.info, Event.SCHEDULE_PAUSED, task_id=task_id, actor=actor))

    def resume(self, task_id: int, *, actor: str, reason: str | None = None, within: Connection | None = None) -> None:
        """Have slots fire again from now on; those before stay skipped, even if nobody has claimed them yet.

        Raises:
            ScheduleNotFoundError: no such crawl task has been noticed.
            IllegalTransitionError: it is not paused.
        """
        with self._database.transaction(within) as connection:
            # First, as those who pause do: else the two would wait for each other. It may be gone, and come back.
            known = _is_known(connection, task_id)
            statement = (
                update(pauses)
                .where(pauses.c.task_id == task_id, pauses.c.resumed_at.is_(None))
                .values(resumed_at=self._clock(connection))
                .returning(pauses.c.actor, pauses.c.reason)
            )
            pause = connection.execute(statement).one_or_none()
            if pause is None:
                if not known:
                    raise ScheduleNotFoundError(task_id)
                raise IllegalTransitionError(
                    f"the schedule of crawl task {task_id} is not paused; allowed: pause", ["pause"]
                )
            before = {"paused": True, "by": pause.actor, "reason": pause.reason}
            _audit(connection, actor, "resume", task_id, reason, {"paused": False}, before=before)
            after_commit(connection, partial(_log.info, Event.SCHEDULE_RESUMED, task_id=task_id, actor=actor))

    def backfill(
        self,
        task_id: int,
        slots: Sequence[datetime],
        *,
        actor: str,
        reason: str | None = None,
        within: Connection | None = None,
    ) -> Unsent:
        """Start a run for each slot that has none.

        Missed and skipped slots become started ones; one that was started stays as it is.

        Args:
            task_id: the crawl task.
            slots: moments in the past, whole seconds.
            actor: who asks.
            reason: why.
            within: a transaction of the caller's to take part in.

        Raises:
            ScheduleNotFoundError: no such crawl task has been noticed.
        """
        wanted = [Firing(task_id, slot, FiringOutcome.STARTED, FiringReason.BACKFILL) for slot in dict.fromkeys(slots)]
        with self._database.transaction(within) as connection:
            _require(connection, task_id)
            now = self._clock(connection)
            # A range that begins with one of the slots goes on after it.
            connection.execute(_CUT_RANGES, {"task": task_id, "slots": list(slots)})
            unsent = _write_firings(connection, wanted, now, actor, _BACKFILL_SLOTS, Trigger.BACKFILL)
            count = len(unsent.wake_ups)
            asked = {"since": min(slots).isoformat(), "until": max(slots).isoformat(), "slots": len(slots)}
            _audit(connection, actor, "backfill", task_id, reason, asked | {"runs": count})
            told = partial(_log.info, Event.SCHEDULE_BACKFILLED, task_id=task_id, actor=actor, count=count)
            after_commit(connection, told)
        return unsent


# --- Statements ------------------------------------------------------------------------------------------------

_IDS: Final = ARRAY(BigInteger)


def _given(**columns: TypeEngine[Any]) -> TableValuedAlias:
    """Rows that come as one array a column."""
    arrays = [bindparam(f"{name}s", type_=ARRAY(kind)) for name, kind in columns.items()]
    return (
        func.unnest(*arrays)
        .table_valued(*(column(name, kind) for name, kind in columns.items()))
        .render_derived(name="given")
    )


_NO_WAIT: Final = select(func.set_config("synchronous_commit", "off", literal(value=True)))
_WATCH: Final = select(catalog_watch).with_for_update(skip_locked=True)
_BEGIN_SWEEP: Final = (
    update(catalog_watch).values(sweep_began_at=bindparam("now", type_=_MOMENT), sweep_after=0).returning(catalog_watch)
)
_END_SWEEP: Final = update(catalog_watch).values(swept_at=catalog_watch.c.sweep_began_at, sweep_began_at=None)
_LOCK: Final = (
    select(schedules.c.task_id)
    .where(schedules.c.task_id == func.any(bindparam("ids", type_=_IDS)))
    .with_for_update(skip_locked=True, key_share=True)
)
_COMPARED: Final = ("text", "zone", "active", "misfire_policy", "overlap_policy")


def _differs(theirs: FromClause, ours: FromClause, reader: Reader) -> ColumnElement[bool]:
    """Whether the application's row is not what we read last, or was read by other rules, or one of them is missing."""
    said: ColumnElement[Any] = tuple_(*(theirs.c[name] for name in _COMPARED), literal(reader.rules, Text))
    read: ColumnElement[Any] = tuple_(*(ours.c[name] for name in _COMPARED), ours.c.rules)
    return or_(theirs.c.task_id.is_(None), ours.c.task_id.is_(None), said.is_distinct_from(read))


def _said(theirs: FromClause) -> list[ColumnElement[Any]]:
    """What a reading is made of; not ``updated_at``, which may be beyond what Python can hold."""
    return [theirs.c[name] for name in ("task_id", *_COMPARED)]


_READINGS: Final = _given(
    task_id=BigInteger(),
    text=Text(),
    zone=Text(),
    active=Boolean(),
    misfire_policy=Text(),
    overlap_policy=Text(),
    canonical=Text(),
    problem=Text(),
    next_fire_at=_MOMENT,
    replaces=Boolean(),
)
_READ_COLUMNS: Final = [each.name for each in _READINGS.c if each.name != "replaces"]
_INSERT_READINGS: Final = (
    upsert(schedules)
    .from_select(
        [*_READ_COLUMNS, "rules", "first_seen_at", "read_at"],
        select(
            *(_READINGS.c[name] for name in _READ_COLUMNS),
            bindparam("rules", type_=Text),
            bindparam("now", type_=_MOMENT),
            bindparam("now", type_=_MOMENT),
        ),
    )
    .on_conflict_do_nothing()
)
_UPDATE_READINGS: Final = (
    update(schedules)
    .where(schedules.c.task_id == _READINGS.c.task_id)
    .values(
        {name: _READINGS.c[name] for name in _READ_COLUMNS if name != "task_id"}
        | {
            "rules": bindparam("rules", type_=Text),
            "read_at": case((_READINGS.c.replaces, bindparam("now", type_=_MOMENT)), else_=schedules.c.read_at),
        }
    )
)
_KEPT: Final = ("task_id", "text", "zone", "active", "canonical", "problem")
_KEEP: Final = (
    upsert(schedule_history)
    .from_select(
        [*_KEPT, "valid_from", "valid_until"],
        select(*(schedules.c[name] for name in _KEPT), schedules.c.read_at, bindparam("now", type_=_MOMENT)).where(
            schedules.c.task_id == func.any(bindparam("ids", type_=_IDS))
        ),
    )
    .on_conflict_do_nothing()
)
_FORGET: Final = delete(schedules).where(schedules.c.task_id == func.any(bindparam("ids", type_=_IDS)))

_FIRST: Final = select(func.min(schedules.c.next_fire_at)).where(schedules.c.next_fire_at.is_not(None))
_BACKLOG: Final = select(func.count()).select_from(
    select(literal(1)).where(runs.c.state == bindparam("state")).limit(bindparam("limit")).subquery()
)
_DUE: Final = ("task_id", "canonical", "zone", "misfire_policy", "overlap_policy", "next_fire_at")  # as DueSchedule's
_TAKE: Final[Select[Any]] = (
    select(*(schedules.c[name] for name in _DUE))
    .where(
        schedules.c.next_fire_at > bindparam("after", type_=_MOMENT),
        schedules.c.next_fire_at <= bindparam("until", type_=_MOMENT),
    )
    .order_by(schedules.c.next_fire_at)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True, key_share=True)
)
_PAUSES: Final = select(pauses).where(pauses.c.task_id == func.any(bindparam("ids", type_=_IDS)))
_OVERLAPPING: Final = (
    select(runs.c.task_id)
    .distinct()
    .where(runs.c.task_id == func.any(bindparam("ids", type_=_IDS)), runs.c.finished_at.is_(None))
)

_AFTER_A_SLOT: Final = timedelta(microseconds=1)
"""Where the rest of a range begins: slots are whole seconds, so that none can begin there."""

_SLOTS: Final = _given(
    task_id=BigInteger(),
    scheduled_for=_MOMENT,
    through=_MOMENT,
    outcome=Text(),
    reason=Text(),
    run_id=Uuid(),
)
_RECORDED: Final = exists().where(
    firings.c.task_id == _SLOTS.c.task_id, firings.c.scheduled_for == _SLOTS.c.scheduled_for
)
_BEGIN: Final = case(
    (_SLOTS.c.through.is_not(None) & _RECORDED, _SLOTS.c.scheduled_for + _AFTER_A_SLOT), else_=_SLOTS.c.scheduled_for
)
_FIRING: Final = upsert(firings).from_select(
    [*(each.name for each in _SLOTS.c), "claimed_at", "claimed_by"],
    select(
        *(_BEGIN.label("scheduled_for") if each.name == "scheduled_for" else each for each in _SLOTS.c),
        bindparam("now", type_=_MOMENT),
        bindparam("by", type_=Text),
    ),
)


def _firing_and_running(statement: Insert) -> Select[UUID, int, str]:
    """Record slots, and commit a run for each that starts and was not there; return these runs."""
    # The judge has spoken: a slot that was there before starts nothing.
    fired = statement.returning(firings.c.task_id, firings.c.scheduled_for, firings.c.run_id).cte("fired")
    digits = func.replace(cast(fired.c.run_id, Text), "-", "")
    started = (
        upsert(runs)
        .from_select(
            ["id", "kind", "state", "trigger", "task_id", "scheduled_for", "traceparent", "wake_at"],
            select(
                fired.c.run_id,
                literal(RunKind.CRAWL.value),
                literal(RunState.QUEUED.value),
                bindparam("trigger", type_=Text),
                fired.c.task_id,
                fired.c.scheduled_for,
                # As domain.traceparent_of has it.
                func.concat("00-", digits, "-", func.right(digits, 16), "-01"),
                from_now(SILENCE),
            ).where(fired.c.run_id.is_not(None)),
        )
        .on_conflict_do_nothing()
        .returning(runs.c.id, runs.c.task_id, runs.c.traceparent)
        .cte("started")
    )
    recorded = insert(run_events).from_select(
        ["run_id", "event", "state"],
        select(started.c.id, literal(Event.RUN_ACCEPTED.value), literal(RunState.QUEUED.value)),
    )
    return select(started).add_cte(recorded.cte("recorded"))


_CLAIM_SLOTS: Final = _firing_and_running(_FIRING.on_conflict_do_nothing())
_BACKFILL_SLOTS: Final = _firing_and_running(
    _FIRING.on_conflict_do_update(
        index_elements=[firings.c.task_id, firings.c.scheduled_for],
        set_={
            name: _FIRING.excluded[name]
            for name in ("outcome", "reason", "run_id", "claimed_at", "claimed_by", "through")
        },
        where=firings.c.outcome != FiringOutcome.STARTED,
    )
)
_CUT_RANGES: Final = (
    upsert(firings)
    .from_select(
        [each.name for each in firings.c],
        select(
            *(
                firings.c.scheduled_for + _AFTER_A_SLOT if each is firings.c.scheduled_for else each
                for each in firings.c
            )
        ).where(
            firings.c.task_id == bindparam("task"),
            firings.c.scheduled_for == func.any(bindparam("slots", type_=ARRAY(_MOMENT))),
            firings.c.through > firings.c.scheduled_for,
        ),
    )
    .on_conflict_do_nothing()
)
_REMEMBER: Final = (
    insert(outbox)
    .values(run_ids=bindparam("ids", type_=ARRAY(Uuid)), due_at=from_now(bindparam("grace", type_=Double)))
    .returning(outbox.c.id)
)
_ADVANCES: Final = _given(task_id=BigInteger(), next_fire_at=_MOMENT)
_ADVANCE: Final = (
    update(schedules).where(schedules.c.task_id == _ADVANCES.c.task_id).values(next_fire_at=_ADVANCES.c.next_fire_at)
)


# --- Parts of transactions ---------------------------------------------------------------------------------------


def _over(since: datetime | None, now: datetime, seconds: float) -> bool:
    """Whether a time has passed; also when the clock was set back meanwhile."""
    return since is None or now < since or (now - since).total_seconds() >= seconds


def _schedule_row(row: Row[Any]) -> ScheduleRow:
    return ScheduleRow(row.task_id, row.text, row.zone, row.active, row.misfire_policy, row.overlap_policy)


def _columns(readings: Sequence[Reading], replaced: Container[int] = ()) -> dict[str, object]:
    return {
        **{f"{name}s": _sparse([getattr(each.row, name) for each in readings]) for name in ("task_id", *_COMPARED)},
        "canonicals": [each.canonical for each in readings],
        "problems": _sparse([each.problem for each in readings]),
        "next_fire_ats": [each.next_fire_at for each in readings],
        "replacess": [each.row.task_id in replaced for each in readings],
    }


def _sparse(values: list[Any]) -> list[Any]:
    """Return no values where there are none but nulls: unnest fills up with nulls, and sending them takes longer."""
    return values if any(value is not None for value in values) else []


def _warn(readings: Sequence[Reading]) -> None:
    for reading in [each for each in readings if each.problem is not None][:_SHOWN]:
        _log.warning(Event.SCHEDULE_INVALID, task_id=reading.row.task_id, error=reading.problem)


def _has_the_slots_of(row: Row[Any], reading: Reading) -> bool:
    ours = (row.our_canonical, row.our_zone, row.our_active, row.our_problem)
    return (
        reading.canonical is not None
        and reading.problem is None
        and ours == (reading.canonical, reading.row.zone, reading.row.active, None)
    )


def _unclaimed(row: Row[Any], reading: Reading | None, reader: Reader, now: datetime) -> Firing:
    """Record what was due by a reading that is no more."""
    if reading is None:
        reason = FiringReason.DELETED
    elif reading.problem is not None:
        reason = FiringReason.INVALID
    elif not reading.row.active:
        reason = FiringReason.DISABLED
    else:
        reason = FiringReason.EDITED
    first = row.our_next_fire_at
    try:
        last = reader.last_slot(row.our_canonical, row.our_zone, first, now)
    except UnreadableScheduleError:  # its zone has left the system's database
        last = first
    through = None if last == first else last
    return Firing(row.our_task_id, first, FiringOutcome.SKIPPED, reason, through)


def _due(row: Row[Any], reworded: ScheduleRow | None, pause: Row[Any] | None) -> DueSchedule:
    return DueSchedule(
        row.task_id,
        row.canonical,
        row.zone,
        row.misfire_policy if reworded is None else reworded.misfire_policy,
        row.overlap_policy if reworded is None else reworded.overlap_policy,
        row.next_fire_at,
        paused=pause is not None and pause.resumed_at is None,
        resumed_at=None if pause is None else pause.resumed_at,
    )


def _write_firings(
    connection: Connection,
    slots: Sequence[Firing],
    now: datetime,
    by: str,
    statement: Select[UUID, int, str] = _CLAIM_SLOTS,
    trigger: Trigger = Trigger.SCHEDULE,
) -> Unsent:
    """Record slots, and commit a run for each that starts and was not there."""
    if not slots:
        return NOTHING_UNSENT
    started = connection.execute(
        statement,
        {
            "task_ids": [each.task_id for each in slots],
            "scheduled_fors": [each.scheduled_for for each in slots],
            "throughs": _sparse([each.through for each in slots]),
            "outcomes": [each.outcome.value for each in slots],
            "reasons": _sparse([each.reason and each.reason.value for each in slots]),
            "run_ids": [
                slot_run_id(each.task_id, each.scheduled_for) if each.outcome is FiringOutcome.STARTED else None
                for each in slots
            ],
            "now": now,
            "by": by,
            "trigger": trigger.value,
        },
    ).all()
    if not started:
        return NOTHING_UNSENT
    grace = ENQUEUE_GRACE + len(started) / _SLOWEST_SENDER
    batch = connection.scalar(_REMEMBER, {"ids": [run.id for run in started], "grace": grace})
    return Unsent(batch, [WakeUp(run.id, CrawlArguments(run.task_id), run.traceparent) for run in started])


def _commit(connection: Connection, claim: Claim, by: str) -> Unsent:
    """Write what was decided of a claim."""
    slots, advances, problems = claim._firings, claim._advances, claim._problems  # noqa: SLF001 -- a class of this module
    unsent = _write_firings(connection, slots, claim.now, by)
    if advances:
        connection.execute(_ADVANCE, {"task_ids": list(advances), "next_fire_ats": list(advances.values())})
    for task_id, problem in problems.items():
        # Without rules, so that the next sweep reads it again: another beat may know better.
        values = {"problem": problem, "canonical": None, "next_fire_at": None, "rules": ""}
        connection.execute(update(schedules).where(schedules.c.task_id == task_id).values(values))
    return unsent


def _require(connection: Connection, task_id: int) -> None:
    if not _is_known(connection, task_id):
        raise ScheduleNotFoundError(task_id)


def _is_known(connection: Connection, task_id: int) -> bool:
    found = select(schedules.c.task_id).where(schedules.c.task_id == task_id).with_for_update(key_share=True)
    return connection.scalar(found) is not None


def _audit(
    connection: Connection,
    actor: str,
    action: str,
    task_id: int,
    reason: str | None,
    after: Mapping[str, object],
    *,
    before: Mapping[str, object] | None = None,
) -> None:
    facts = {"task_id": task_id, "reason": reason, "before": before, "after": after}
    connection.execute(insert(audit_events).values(actor=actor, action=action, **facts))
