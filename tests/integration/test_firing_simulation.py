"""Every slot gets its one record, whatever dies meanwhile: random stories, with a crash after every statement.

The oracle knows the rules of promise 3, a schedule's fires, and the story: what the application's table said, and when
that was noticed. It knows nothing of timetables, statements and claims.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final, LiteralString, NamedTuple, Self
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import event

from orchestrator import firing as firing_module
from orchestrator import timetable as timetable_module
from orchestrator.db import Database
from orchestrator.domain import CrawlArguments, MisfirePolicy, OverlapPolicy, WakeUp, slot_run_id
from orchestrator.errors import BrokerUnreachableError, UnreadableScheduleError
from orchestrator.firing import FiringEngine
from orchestrator.ledger import schedules as schedules_module
from orchestrator.schedule import Schedule, parse
from orchestrator.timetable import Timetable
from tests.support.ledgers import Workbench
from tests.support.rounds import SEED, rounds
from tests.support.scheduling import Rota

STEPS: Final = 30
TASKS: Final = 6
WINDOW: Final = timedelta(minutes=40)
LATE: Final = timedelta(seconds=60)
INSTANT: Final = timedelta(microseconds=1)
DEFAULT_ZONE: Final = "UTC"
LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)

STARTS: Final = (
    "2026-07-01 12:00:30+00:00",
    "2026-03-28 23:50:00+00:00",  # Berlin skips 02:00–03:00 at 01:00 UTC
    "2026-10-25 00:10:00+00:00",  # and repeats it at 01:00 UTC
    "2026-03-08 04:30:00+00:00",  # Havana skips midnight at 05:00 UTC
)
# Each line the same slots in other words.
WORDINGS: Final = (
    ("every 5 seconds", "每5秒", "every 5s"),
    ("every 17 seconds", "每17秒"),
    ("* * * * *", "every minute", "每分钟"),
    ("*/2 * * * *", "0-58/2 * * * *"),
    ("*/7 * * * *", "0-59/7 * * * *"),
    ("hourly at :15", "15 * * * *"),
    ("0,30 1-3 * * *", "每天 01:00，01:30，02:00，02:30，03:00，03:30"),
    ("daily at 02:30", "30 2 * * *", "每天2点半"),
    ("daily", "每日", "0 0 * * *"),
)
UNREADABLE: Final = ("fortnightly", "99 * * * *")
ZONES: Final = (None, "UTC", "Europe/Berlin", "America/Havana", "Asia/Shanghai")
MISFIRES: Final = (None, "fire_once", "skip", "all", "ALL")
OVERLAPS: Final = (None, "skip", "allow")

pytestmark = pytest.mark.timeout(300)


# --- The oracle --------------------------------------------------------------------------------------------------


class Fate(NamedTuple):
    """What becomes of a slot."""

    outcome: str
    reason: str | None


class Row(NamedTuple):
    """What a row of a crawl task says of its schedule; zone none: the default one."""

    text: str | None
    zone: str
    active: bool
    misfires: str | None
    overlap: str | None

    def meaning(self) -> Schedule | None:
        """What its text means; none: it has none.

        Raises:
            UnreadableScheduleError: it cannot be read.
        """
        if self.text is None:
            return None
        known = self.zone in ZONES
        policies = (self.misfires or "skip").lower() in MISFIRES and (self.overlap or "skip").lower() in OVERLAPS
        if not (known and policies):
            raise UnreadableScheduleError("zone or policy")
        return parse(self.text)

    def slots_of(self) -> Schedule | None:
        """When it fires; none: never, as it stands."""
        with suppress(UnreadableScheduleError):
            return self.meaning() if self.active else None
        return None

    def first_after(self, moment: datetime) -> datetime | None:
        """Return its first slot after a moment."""
        schedule = self.slots_of()
        return None if schedule is None else schedule.next_after(moment, ZoneInfo(self.zone))

    def fires(self, first: datetime, until: datetime) -> list[datetime]:
        """Return its slots from the first one to a moment."""
        schedule = self.slots_of()
        assert schedule is not None, "only what fires has slots"
        return list(schedule.fires(first - INSTANT, until, ZoneInfo(self.zone)))

    def fires_as(self, other: Self) -> bool:
        """Whether another row is the same slots in other words, or by other policies."""
        try:
            mine, theirs = self.meaning(), other.meaning()
        except UnreadableScheduleError:
            return False
        if mine is None or theirs is None:
            return False
        return (mine.canonical, self.zone, self.active) == (theirs.canonical, other.zone, other.active)


def why_gone(row: Row | None) -> str:
    """Why slots do not fire that were due by what the table said before."""
    if row is None:
        return "deleted"
    try:
        row.meaning()
    except UnreadableScheduleError:
        return "invalid"
    return "edited" if row.active else "disabled"


@dataclass
class Task:
    """One crawl task's story so far.

    Attributes:
        said: what the application's table says now.
        read: what of that has been noticed.
        due: the first slot that has no record.
        fates: of each slot what may have become of it; several where the clock was set back and it came again.
        latest: the last slot that has a record.
        again: spans of time whose slots may have come again.
    """

    said: Row | None = None
    read: Row | None = None
    due: datetime | None = None
    paused: bool = False
    resumed_at: datetime | None = None
    fates: dict[datetime, list[Fate]] = field(default_factory=lambda: defaultdict(list))
    latest: datetime = LONG_AGO
    again: list[tuple[datetime, datetime]] = field(default_factory=list)

    def notice(self, read: Row | None, now: datetime) -> None:
        """What the table says has been noticed: what was due by the reading before never fires."""
        if self.read is not None and self.due is not None and self.due <= now:
            fate = Fate("skipped", why_gone(read))
            for slot in self.read.fires(self.due, now):
                self.record(slot, fate)
        if now < self.latest:
            self.again.append((now, self.latest))
        self.read = read
        self.due = None if read is None else read.first_after(now)

    def claim(self, until: datetime | None, now: datetime, timetable: Timetable, *, busy: bool) -> None:
        """The slots before ``until`` have been claimed at this moment."""
        assert self.read is not None
        assert self.due is not None
        decided = self._decide(self.read, self.read.fires(self.due, now), now, timetable, busy=busy)
        settled = [(slot, fate) for slot, fate in decided if until is None or slot < until]
        assert settled, f"what is due moved from {self.due} to {until} at {now}"
        for slot, fate in settled:
            self.record(slot, fate)
        self.due = self.read.first_after(settled[-1][0])

    def record(self, slot: datetime, fate: Fate) -> None:
        self.fates[slot].append(fate)
        self.latest = max(self.latest, slot)

    def came_again(self, slot: datetime) -> bool:
        return any(first < slot <= last for first, last in self.again)

    def _decide(
        self, row: Row, slots: Sequence[datetime], now: datetime, defaults: Timetable, *, busy: bool
    ) -> Iterator[tuple[datetime, Fate]]:
        """The rule: a pause, the window, the misfire policy, the overlap policy, in this order."""
        misfires = (row.misfires or defaults._misfire_policy.value).lower()  # noqa: SLF001 -- the settings
        may_overlap = (row.overlap or defaults._overlap_policy.value).lower() == "allow"  # noqa: SLF001 -- the same
        late = [slot for slot in slots if now - slot > LATE]
        for slot in slots:
            missed = now - slot > LATE
            if self.paused or (self.resumed_at is not None and slot < self.resumed_at):
                yield slot, Fate("skipped", "paused")
            elif now - slot > WINDOW:
                yield slot, Fate("missed", "outside_catch_up_window")
            elif missed and misfires == "skip":
                yield slot, Fate("missed", "too_late")
            elif missed and misfires == "fire_once" and slot != late[-1]:
                yield slot, Fate("missed", "superseded")
            elif busy and not may_overlap:
                yield slot, Fate("skipped", "overlap")
            else:
                busy = True
                yield slot, Fate("started", "caught_up" if missed else None)


# --- What goes wrong ---------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process dies here."""


class Saboteur:
    """Kills whoever works on a database: after every statement, before and after every commit, once at each point.

    A point is what the transaction has executed so far; so each attempt dies later than the one before, or gets
    through.
    """

    def __init__(self, database: Database) -> None:
        self.seen: set[int] = set()
        self.armed = False
        self._path: list[str] = []
        engine = database._engine  # noqa: SLF001 -- no part of the product lets itself be killed
        event.listen(engine, "begin", self._begun)
        event.listen(engine, "after_cursor_execute", self._executed)
        event.listen(engine, "commit", lambda _: self.reach("about to commit"))

    def reach(self, what: str) -> None:
        """Die here if it is the first time."""
        self._path.append(what)
        point = hash(tuple(self._path))
        if self.armed and point not in self.seen:
            self.seen.add(point)
            raise Crash(what)

    def _begun(self, _: object) -> None:
        try:
            self.reach("the last one was committed")
        finally:
            self._path.clear()

    def _executed(self, _: object, __: object, statement: str, *___: object) -> None:
        self.reach(statement)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Kill within the block."""
        self.armed = True
        self._path.clear()
        try:
            yield
        finally:
            self.armed = False


# --- The story ---------------------------------------------------------------------------------------------------


class World:
    """A database, an application that edits its tasks, beats that die, and what they should come to."""

    def __init__(self, bench: Workbench, random: Random) -> None:
        bench.application.execute(
            "ALTER TABLE crawl_tasks ADD timezone text, ADD misfire_policy text, ADD overlap_policy text"
        )
        self.random = random
        self.rota = Rota(bench, datetime.fromisoformat(random.choice(STARTS)))
        self.timetable = self._a_timetable(random.choice(list(MisfirePolicy)), random.choice(list(OverlapPolicy)))
        self.tasks = {task_id: Task() for task_id in range(1, TASKS + 1)}
        self.saboteur = Saboteur(bench.database)
        self.handed: set[UUID] = set()
        self.lost: set[UUID] = set()
        self.by_hand: set[UUID] = set()
        self.broker_is_down = False
        self.crashes = 0
        self.log: list[str] = []
        self._counts = (0, 0)
        options = f"-c search_path={bench.schema},public"
        self._observer = psycopg.connect(bench.url, autocommit=True, options=options, row_factory=dict_row)
        self.beats = [self._beat(), self._beat()]

    def close(self) -> None:
        self._observer.close()

    @property
    def now(self) -> datetime:
        return self.rota.hands.now

    def rows(self, statement: LiteralString, *parameters: object) -> list[dict[str, Any]]:
        cursor = self._observer.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []

    def note(self, what: str) -> None:
        self.log.append(f"{self.now:%d %H:%M:%S.%f} {what}")

    def _a_timetable(self, misfires: MisfirePolicy, overlap: OverlapPolicy) -> Timetable:
        return Timetable(misfires, overlap, WINDOW)

    def _beat(self) -> FiringEngine:
        """A process that has just started; what the one before remembered is gone."""
        mine = self.timetable
        fresh = self._a_timetable(mine._misfire_policy, mine._overlap_policy)  # noqa: SLF001 -- the same settings
        return self.rota.beat(self.enqueue, timetable=fresh)

    def enqueue(self, wake_ups: Sequence[WakeUp]) -> None:
        ids = [wake_up.run_id for wake_up in wake_ups]
        with self._may_be_lost(ids):
            self.saboteur.reach("before the first message")
            if self.broker_is_down:
                raise BrokerUnreachableError("the story says so")
            self.handed.update(ids[: len(ids) // 2])
            self.saboteur.reach("between two messages")
            self.handed.update(ids)
            self.saboteur.reach("after the last message")

    @contextmanager
    def _may_be_lost(self, ids: Sequence[UUID]) -> Iterator[None]:
        try:
            yield
        except Crash:
            self.lost.update(ids)
            raise

    def tell(self) -> None:
        """Live through the whole story."""
        for task_id in self.tasks:
            self._say(task_id, self._any_row())
        for _ in range(STEPS):
            self._live()
            if self.random.random() < 0.25:
                self.saboteur.seen.clear()  # dies everywhere once more
            if self.random.random() < 0.85:  # else nobody is at work
                self.work()
        self._come_to_rest()

    # --- What happens ---

    def _live(self) -> None:
        """Let things happen while nobody is at work."""
        happens = [self._edit, self._pause_or_resume, self._run_by_hand, self._finish_some, self._pulse]
        for _ in range(self.random.randint(1, 4)):
            self.random.choices(happens, weights=[6, 2, 1, 4, 1])[0]()
            if self.random.random() < 0.7:
                self._let_time_pass()
        self.broker_is_down = self.random.random() < 0.1

    def _let_time_pass(self) -> None:
        chance = self.random.random()
        dues = [task.due for task in self.tasks.values() if task.due is not None]
        if chance < 0.3:
            seconds = self.random.uniform(0, 5)
        elif chance < 0.55:
            seconds = self.random.uniform(5, 100)
        elif chance < 0.7:
            seconds = self.random.uniform(100, 1_200)
        elif chance < 0.75:
            seconds = self.random.uniform(1_200, 3 * 3_600)
        elif chance < 0.93 and dues:
            # To where one rule ends and another begins, or next to it.
            edge = self.random.choice(dues) + self.random.choice([timedelta(0), LATE, WINDOW])
            edge += self.random.choice([-INSTANT, timedelta(0), INSTANT])
            seconds = (edge - self.now).total_seconds() if edge - self.now < timedelta(hours=3) else 1.0
        else:
            seconds = -self.random.choice([self.random.uniform(0, 10), self.random.uniform(10, 7_200)])
        self.rota.hands.move(seconds)
        self.note(f"{seconds:+.6f} s")
        if seconds < 0 and self.random.random() < 0.5:
            # Slots come again only where an edit has them begin anew.
            self._work()
            for task_id, task in self.tasks.items():
                if task.said is not None:
                    self._say(task_id, task.said._replace(text=self._any_row().text))

    def _edit(self) -> None:
        task_id, task = self.random.choice(list(self.tasks.items()))
        row = task.said
        if row is None:
            return self._say(task_id, self._any_row())
        same = next((words for words in WORDINGS if row.text in words), WORDINGS[0])
        edit = self.random.choice(
            ["text", "text", "words", "zone", "active", "misfires", "misfires", "overlap", "delete"]
        )
        match edit:
            case "text":
                row = row._replace(text=self._any_row().text)
            case "words":
                row = row._replace(text=self.random.choice(same))
            case "zone":
                row = row._replace(zone=self.random.choice([*ZONES, "Europe/Nowhere"]) or DEFAULT_ZONE)
            case "active":
                row = row._replace(active=not row.active)
            case "misfires":
                row = row._replace(misfires=self.random.choice([*MISFIRES, *MISFIRES, "never"]))
            case "overlap":
                row = row._replace(overlap=self.random.choice([*OVERLAPS, *OVERLAPS, "queue"]))
            case _:
                row = None
        return self._say(task_id, row)

    def _any_row(self) -> Row:
        chance = self.random.random()
        text = None if chance < 0.05 else self.random.choice(UNREADABLE)
        if chance > 0.1:
            text = self.random.choice(self.random.choice(WORDINGS[:5] if chance < 0.7 else WORDINGS[5:]))
        return Row(
            text,
            self.random.choice(ZONES) or DEFAULT_ZONE,
            self.random.random() < 0.95,
            self.random.choice(MISFIRES),
            self.random.choice(OVERLAPS),
        )

    def _say(self, task_id: int, row: Row | None) -> None:
        """Edit the application's table."""
        self.note(f"task {task_id}: {row}")
        task = self.tasks[task_id]
        if row is None:
            self.rota.delete(task_id)
        else:
            if task.said is None:
                self.rota.add(task_id, row.text)
            zone = None if row.zone == DEFAULT_ZONE and self.random.random() < 0.5 else row.zone
            self.rota.edit(
                task_id,
                touch=self.random.random() < 0.6,
                schedule=row.text,
                timezone=zone,
                is_active=row.active,
                misfire_policy=row.misfires,
                overlap_policy=row.overlap,
            )
        task.said = row

    def _pause_or_resume(self) -> None:
        task_id, task = self.random.choice(list(self.tasks.items()))
        if task.read is None:
            return
        if task.paused:
            self.rota.ledger.schedules.resume(task_id, actor="story")
            task.paused, task.resumed_at = False, self.now
        else:
            self.rota.ledger.schedules.pause(task_id, actor="story")
            task.paused, task.resumed_at = True, None
        self.note(f"task {task_id}: paused={task.paused}")

    def _run_by_hand(self) -> None:
        task_id = self.random.choice(list(self.tasks))
        run_id = UUID(int=self.random.getrandbits(128))
        self.by_hand.add(self.rota.bench.accept(CrawlArguments(task_id), run_id=run_id))
        self.note(f"task {task_id}: a run by hand")

    def _finish_some(self) -> None:
        unfinished = [row["id"] for row in self.rows("SELECT id FROM runs WHERE finished_at IS NULL ORDER BY id")]
        known = [each for each in unfinished if each in self.handed | self.by_hand]
        ended = [each for each in known if self.random.random() < 0.7]
        self.rows(
            "UPDATE runs SET state = 'succeeded', finished_at = clock_timestamp(), wake_at = NULL WHERE id = ANY(%s)",
            ended,
        )
        self.note(f"{len(ended)} runs finished")

    def _pulse(self) -> None:
        """Time for the pulse to take over what was not sent; it may die of that."""
        self.rows("UPDATE outbox SET due_at = clock_timestamp() - interval '1 second'")
        self.note("pulse")
        with suppress(Crash, BrokerUnreachableError), self._doomed_pulse():
            while self.rota.ledger.runs.wake_due(self.enqueue, 50):
                pass

    @contextmanager
    def _doomed_pulse(self) -> Iterator[None]:
        try:
            with self.saboteur.at_work():
                yield
        except Crash:
            # Those that it had taken are woken after a silence.
            self.crashes += 1
            self.lost.update(row["id"] for row in self.rows("SELECT id FROM runs WHERE wakes > 0"))
            raise

    # --- Beats at work ---

    def work(self) -> None:
        """Have beats work until a round gets through, each dying where none has died yet."""
        with self._perhaps_another_looks():
            self._work()

    @contextmanager
    def _perhaps_another_looks(self) -> Iterator[None]:
        """Now and then a frozen process looks for edits for ever: they must be noticed where slots are claimed."""
        if self.random.random() < 0.6:
            yield
            return
        self.note("another one looks")
        with self._observer.transaction():
            self.rows("SELECT * FROM catalog_watch FOR UPDATE")
            yield

    def _work(self) -> None:
        while True:
            number = self.random.randrange(len(self.beats))
            busy = {row["task_id"] for row in self.rows("SELECT task_id FROM runs WHERE finished_at IS NULL")}
            try:
                with self.saboteur.at_work():
                    self.rota.go(engine=self.beats[number])
            except Crash as crash:
                self.crashes += 1
                self.beats[number] = self._beat()
                self.note(f"beat {number} died: {str(crash)[:60]!r}")
                self.observe(busy)
            else:
                self.note(f"beat {number} got through")
                self.observe(busy)
                return

    def observe(self, busy: set[int]) -> None:
        """Tell from what was committed what was noticed and claimed; each must fit the story, and every record that."""
        readings = {row["task_id"]: row for row in self.rows("SELECT * FROM schedules")}
        changed = []
        for task_id, task in self.tasks.items():
            found = readings.pop(task_id, None)
            read = None if found is None else Row(*(found[name] for name in _READ))
            due = None if found is None else found["next_fire_at"]
            if (read, due) == (task.read, task.due):
                continue
            changed.append(task_id)
            if read != task.read:
                assert read == task.said, "what is read is what the table says now"
            if read is None or task.read is None or not (read == task.read or read.fires_as(task.read)):
                task.notice(read, self.now)
            else:
                task.read = read
            if due != task.due:
                # By the row as it stands: who claims has looked.
                assert task.said == task.read, "claimed by what the table no longer says"
                task.claim(due, self.now, self.timetable, busy=task_id in busy)
            assert due == task.due
        assert not readings, "read what is not there"
        counts = self._count()
        if changed or counts != self._counts:
            self.check(changed)
            self._counts = counts

    def _count(self) -> tuple[int, int]:
        (row,) = self.rows(
            "SELECT (SELECT count(*) FROM firings) AS firings,"
            " (SELECT count(*) FROM runs WHERE trigger = 'schedule') AS runs"
        )
        return row["firings"], row["runs"]

    def check(self, changed: Sequence[int]) -> None:
        """Every slot of these tasks has its record, and no other slot has; what started has its run."""
        assert changed, f"records without a claim: {self._count()}, before {self._counts}"
        ids = list(changed)
        records = defaultdict(list)
        for row in self.rows("SELECT * FROM firings WHERE task_id = ANY(%s) ORDER BY scheduled_for", ids):
            records[row["task_id"]].append(row)
        started = {}
        for task_id in ids:
            self._check(self.tasks[task_id], records[task_id])
            for row in records[task_id]:
                if row["outcome"] == "started":
                    assert row["run_id"] == slot_run_id(task_id, row["scheduled_for"])
                    started[row["run_id"]] = (task_id, row["scheduled_for"], "schedule")
        runs = self.rows("SELECT * FROM runs WHERE task_id = ANY(%s) AND trigger = 'schedule'", ids)
        assert {run["id"]: (run["task_id"], run["scheduled_for"], run["trigger"]) for run in runs} == started

    @staticmethod
    def _check(task: Task, records: list[dict[str, Any]]) -> None:
        singles = {row["scheduled_for"]: row for row in records if row["through"] is None}
        ranges = [row for row in records if row["through"] is not None]
        assert singles.keys() <= task.fates.keys(), "a record of what is no slot"
        for row in ranges:
            assert row["scheduled_for"] in task.fates or row["scheduled_for"] - INSTANT in task.fates
            assert row["through"] in task.fates
        spans = [(row["scheduled_for"], row["through"], Fate(row["outcome"], row["reason"])) for row in ranges]
        for slot, fates in task.fates.items():
            covering = [fate for first, last, fate in spans if first <= slot <= last]
            if task.came_again(slot):
                # A record of its own is one of them, and which stands is a matter of which came first.
                own = singles.get(slot)
                covering = [fate for fate in covering if fate in fates][:1] if own is None else []
                covering += [] if own is None else [Fate(own["outcome"], own["reason"])]
                assert len(covering) == 1, (slot, fates)
                assert covering[0] in fates, slot
            else:
                own = singles.get(slot)
                covering += [] if own is None else [Fate(own["outcome"], own["reason"])]
                assert covering == fates, slot

    # --- The end ---

    def _come_to_rest(self) -> None:
        """Nothing more happens: all is noticed, claimed and sent."""
        self.saboteur.seen.clear()
        # A sweep that is under way is brought to its end; then a fresh beat begins another.
        for _ in range(2):
            self.rota.hands.move(61)
            self.note("the end")
            self.beats = [self._beat()]
            self._work()
            self._work()
        for task_id, task in self.tasks.items():
            assert task.read == task.said, task_id
            assert task.due is None or task.due > self.now, task_id
        self.check(list(self.tasks))
        self._check_sent()

    def _check_sent(self) -> None:
        self.broker_is_down = False
        wanted = {row["id"] for row in self.rows("SELECT id FROM runs WHERE trigger = 'schedule'")}
        self.rows("UPDATE outbox SET due_at = clock_timestamp() - interval '1 second'")
        while self.rota.ledger.runs.wake_due(self.enqueue, 100):
            pass
        # Only those that a process took along when it died may need another net.
        assert wanted <= self.handed | self.lost
        assert self.rows("SELECT * FROM outbox") == []
        self.rows("UPDATE runs SET wake_at = clock_timestamp() WHERE wake_at IS NOT NULL")
        while self.rota.ledger.runs.wake_due(self.enqueue, 100):
            pass
        assert wanted <= self.handed


_READ: Final = ("text", "zone", "active", "misfire_policy", "overlap_policy")


@pytest.fixture
def small_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a round take many claims and chunks, so that there is more between which to die."""
    monkeypatch.setattr(timetable_module, "AT_ONCE", 7)
    monkeypatch.setattr(timetable_module, "SINGLY", 5)
    monkeypatch.setattr(firing_module, "_SCHEDULES", 3)
    monkeypatch.setattr(firing_module, "_FIRINGS", 20)
    # However busy the machine is.
    monkeypatch.setattr(firing_module, "_BUDGET", 3_600.0)
    monkeypatch.setattr(firing_module, "SHARE", 1e9)
    monkeypatch.setattr(schedules_module, "CHUNK", 3)


@pytest.mark.usefixtures("small_bites")
@pytest.mark.parametrize("number", rounds(4, 40))
def test_every_slot_has_one_record_by_its_policy_whatever_dies_meanwhile(bench: Workbench, number: int) -> None:
    print(f"FAULT_SEED={SEED + number}")  # noqa: T201 -- pytest shows it with a failure
    world = World(bench, Random(SEED + number))
    try:
        world.tell()
    finally:
        print(*world.log, sep="\n")  # noqa: T201 -- the same
        world.close()
    fates = [fate for task in world.tasks.values() for fates in task.fates.values() for fate in fates]
    assert world.crashes > 50
    assert len(fates) > 50
