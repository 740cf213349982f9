"""Stock beats that tests are cruel to, a witness in the workers' place, and the oracle of what must have fired.

What should have happened is worked out here anew: slots, run ids, outcomes. No line of ours is asked for it, and the
ledger is read by plain SQL.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID, uuid5

import amqp
import psycopg

from tests.support.oracle import RESUMED
from tests.support.processes import Process, eventually, local_ports
from tests.support.stack import Stack, amqp_connection

CRAWL_QUEUE: Final = "orchestrator.crawl"
SLOT_NAMESPACE: Final = UUID("b3f0c7a2-58d1-5e0c-8a41-2f9d6b7e4c35")
"""Of the ids of runs that slots start; part of their identity, hence written down here once more."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LIBRARY: Final = "faketime/libfaketimeMT.so.1"
# libfaketime 0.9.10 breaks Python's sleep, an absolute one of the monotonic clock, when told to leave that clock alone
# (its issue 426). With that clock faked, on the other hand, Python's locks never time out (390).
_SLEEP_OTHERWISE: Final = """
import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


# SIGTERM to oneself as soon as a statement has been sent: the moments that a signal from outside meets once in a while.
_TERMINATED_IN_TIME: Final = """
import os, signal
from psycopg.cursor import BaseCursor
send, left = BaseCursor._execute_send, int(os.environ["TEST_STATEMENTS"])
def send_and_end(*args, **kwargs):
    global left
    send(*args, **kwargs)
    if os.path.exists(os.environ["TEST_FLAG"]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
BaseCursor._execute_send = send_and_end
"""


def find_faketime() -> Path | None:
    """Return libfaketime, if it is installed."""
    places = [*Path("/usr/lib").glob(f"*/{_LIBRARY}"), *Path("/usr").glob(f"lib*/{_LIBRARY}")]
    return places[0] if places else None


class HostClock:
    """The wall clock of a beat's host, to be set while it runs.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        library = find_faketime()
        assert library is not None, "libfaketime is not installed"
        self._library = library
        self._directory = directory
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(_SLEEP_OTHERWISE)
        self.step(timedelta())

    def step(self, offset: timedelta) -> None:
        """Set it to the right time and so much."""
        fresh = self._directory / "offset.new"
        fresh.write_text(f"{offset.total_seconds():+.0f}\n")
        fresh.rename(self._directory / "offset")

    def applied_to(self, env: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a process on this host."""
        return {
            **env,
            "LD_PRELOAD": os.fspath(self._library),
            "FAKETIME_TIMESTAMP_FILE": os.fspath(self._directory / "offset"),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "PYTHONPATH": os.pathsep.join([os.fspath(self._directory), env["PYTHONPATH"]]),
        }


@dataclass
class Beats:
    """The beats of a set-up, each started as Celery's users start it."""

    stack: Stack
    running: list[Process] = field(default_factory=list)

    def start(self, count: int = 1, *, clocks: Sequence[HostClock] = ()) -> Sequence[Process]:
        """Start some, the first ones on hosts with clocks of their own, and wait until each has signed on."""
        envs = [clock.applied_to(self.stack.env) for clock in clocks]
        return self._start([*envs, *[self.stack.env] * (count - len(envs))])

    def start_doomed(self, flag: Path, statements: Iterable[int]) -> Sequence[Process]:
        """Start one for each number; once the flag exists, it gets SIGTERM right after sending so many statements."""
        shim = self.stack.directory / "doomed"
        shim.mkdir(exist_ok=True)
        (shim / "sitecustomize.py").write_text(_TERMINATED_IN_TIME)
        path = os.pathsep.join([os.fspath(shim), self.stack.env["PYTHONPATH"]])
        env = {**self.stack.env, "PYTHONPATH": path, "TEST_FLAG": os.fspath(flag)}
        return self._start([{**env, "TEST_STATEMENTS": str(number)} for number in statements])

    def replace(self, beat: Process) -> None:
        """Kill -9 a beat, and start another without waiting for it."""
        beat.close()
        self.running.remove(beat)
        self.spawn()

    def terminate(self, beat: Process) -> float:
        """SIGTERM a beat, which must end well; return the seconds until it had ended."""
        began_at = time.monotonic()
        code = beat.terminate(within=60)
        took = time.monotonic() - began_at
        self.running.remove(beat)
        assert code == 0, f"a beat ended with {code} on SIGTERM:\n{beat.text()[-3000:]}"
        return took

    def nodes(self, beat: Process) -> list[dict[str, Any]]:
        """Return the rows of ``nodes`` that are this process's."""
        return self.stack.query(
            "SELECT name, seen_at, problem FROM orchestrator.nodes"
            " WHERE kind = 'beat' AND split_part(name, ':', 2) = %s",
            str(beat.pid),
        )

    def await_sign_on(self, beat: Process) -> None:
        """Wait for its first sign of life."""
        beat.await_ready(lambda: self.nodes(beat), within=60, what="a beat signs on in the ledger")

    def await_signs_of_life(self, *, well: bool = True) -> None:
        """Wait until each of them has written another heartbeat from now on, by default one without a problem."""
        asked_at = database_clock(self.stack)

        def alive(beat: Process) -> bool:
            return any(node["seen_at"] > asked_at and not (well and node["problem"]) for node in self.nodes(beat))

        for beat in self.running:
            beat.await_ready(partial(alive, beat), within=60, what="a beat shows another sign of life")

    def _start(self, envs: Iterable[Mapping[str, str]]) -> Sequence[Process]:
        started = [self.spawn(env) for env in envs]
        for beat in started:
            self.await_sign_on(beat)
        return started

    def spawn(self, env: Mapping[str, str] | None = None) -> Process:
        """Start one without waiting for it."""
        beat = Process(
            [sys.executable, "-m", "celery", "-A", "orchestrator.celery_app", "beat"],
            output=self.stack.directory / f"{len(self.stack.processes)}-beat.log",
            env=env or self.stack.env,
            cwd=self.stack.directory,
        )
        self.stack.processes.append(beat)
        self.running.append(beat)
        return beat

    # --- Caught in the act --------------------------------------------------------------------------------------

    @contextmanager
    def caught_claiming(self) -> Iterator[Process]:
        """Catch one of them in the middle of a claim, its schedules locked; in the block it can get no further."""
        with psycopg.connect(self.stack.database) as trap:
            trap.execute("LOCK TABLE orchestrator.firings IN SHARE MODE")
            caught = eventually(self._waiting_for_a_lock, within=20, what="a beat claims, and waits for our lock")
            assert caught is not None
            yield caught

    def _waiting_for_a_lock(self) -> Process | None:
        ports = self.stack.query(
            "SELECT client_port FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        waiting = {row["client_port"] for row in ports}
        return next((beat for beat in self.running if waiting & local_ports(beat.pid)), None)

    def last_claimer(self, since: datetime) -> Process | None:
        """Return who has claimed slots after a moment, if anyone has who still runs."""
        names = self.stack.query("SELECT DISTINCT claimed_by FROM orchestrator.firings WHERE claimed_at > %s", since)
        claimers = {row["claimed_by"].split(":")[1] for row in names}
        return next((beat for beat in self.running if str(beat.pid) in claimers), None)


class Witness:
    """A plain AMQP consumer in the workers' place: notes every wake-up and acknowledges it.

    As a worker does that begins, it moves the run's next wake-up out of the way; so the pulse sends again only what
    may have been lost, and the number of duplicates means something. It outlives outages of broker and database.
    """

    def __init__(self, stack: Stack) -> None:
        assert stack.broker is not None
        self._broker = stack.broker
        self._database = stack.database
        self._seen: Counter[tuple[UUID, int]] = Counter()
        self._lock = threading.Lock()
        self._begun: list[UUID] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)

    @property
    def runs(self) -> set[tuple[UUID, int]]:
        """The runs of which there were wake-ups, each with its crawl task."""
        with self._lock:
            return set(self._seen)

    @property
    def duplicates(self) -> int:
        """How many wake-ups were not the first of their run."""
        with self._lock:
            return self._seen.total() - len(self._seen)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                with amqp_connection(self._broker) as connection:
                    self._consume(connection)
            except (OSError, amqp.AMQPError):
                self._stop.wait(0.2)  # the broker is away

    def _consume(self, connection: amqp.Connection) -> None:
        channel = connection.channel()
        channel.queue_declare(CRAWL_QUEUE, durable=True, auto_delete=False)
        channel.basic_qos(0, 1_000, a_global=False)
        channel.basic_consume(CRAWL_QUEUE, callback=self._note)
        while not self._stop.is_set():
            try:
                connection.drain_events(timeout=0.2)
            except TimeoutError:
                self._begin()
            if len(self._begun) >= 500:
                self._begin()

    def _note(self, message: amqp.Message) -> None:
        run_id = UUID(message.properties["application_headers"]["id"])
        (task_id,), _, _ = json.loads(message.body)
        with self._lock:
            self._seen[run_id, task_id] += 1
        self._begun.append(run_id)
        message.channel.basic_ack(message.delivery_tag)

    def _begin(self) -> None:
        if not self._begun:
            return
        try:
            with psycopg.connect(self._database, connect_timeout=2) as connection:
                connection.execute(
                    "UPDATE orchestrator.runs SET wake_at = clock_timestamp() + interval '1 hour',"
                    " enqueued_at = COALESCE(enqueued_at, clock_timestamp()) WHERE id = ANY(%s)",
                    [self._begun],
                )
        except psycopg.Error:
            return  # the database is away
        self._begun = []


@dataclass
class Intervals:
    """Crawl tasks that fire every few seconds and whose every slot counts, and the oracle for them.

    Attributes:
        seconds: the interval of each task.
    """

    stack: Stack
    seconds: Mapping[int, int]
    _added_at: datetime
    _on_until: datetime | None = None

    @classmethod
    def add(cls, stack: Stack, count: int, every: Sequence[int], sources: Sequence[int] = ()) -> Self:
        """Add tasks with the intervals in turn; each of them has these data sources."""
        add_policies(stack)
        seconds = {task_id: every[task_id % len(every)] for task_id in range(1, count + 1)}
        added_at = database_clock(stack)
        stack.execute(
            "INSERT INTO crawl_tasks (id, data_source_ids, schedule, misfire_policy, overlap_policy)"
            " SELECT task, %s::bigint[], format('every %%s seconds', seconds), 'all', 'allow'"
            " FROM unnest(%s::bigint[], %s::int[]) AS given (task, seconds)",
            list(sources),
            list(seconds),
            list(seconds.values()),
        )
        return cls(stack, seconds, added_at)

    def await_read(self) -> None:
        """Wait until the beats know all of them."""

        def all_read() -> bool:
            (row,) = self.stack.query("SELECT count(*) FROM orchestrator.schedules")
            return bool(row["count"] == len(self.seconds))

        eventually(all_read, within=60, what="every schedule has been read")

    def await_fired(self, count: int) -> None:
        """Wait until each of them has fired so often from now on."""
        asked_at = database_clock(self.stack)

        def fired() -> bool:
            (row,) = self.stack.query(
                "SELECT count(*) FROM (SELECT FROM orchestrator.firings WHERE scheduled_for > %s"
                " GROUP BY task_id HAVING count(*) >= %s) AS often",
                asked_at,
                count,
            )
            return bool(row["count"] == len(self.seconds))

        eventually(fired, within=RESUMED, what=f"every schedule has fired {count} times more")

    def disable(self) -> None:
        """Have the application disable all of them, in a moment when nothing is due; wait until they have stopped."""

        def disabled() -> bool:
            with psycopg.connect(self.stack.database) as connection:
                row = connection.execute(
                    "SELECT clock_timestamp(), min(next_fire_at) FROM orchestrator.schedules"
                ).fetchone()
                assert row is not None
                now, due_at = row
                if due_at - now < timedelta(seconds=0.3):
                    return False
                connection.execute("UPDATE crawl_tasks SET is_active = false, updated_at = clock_timestamp()")
            self._on_until = now
            return True

        eventually(disabled, within=RESUMED, what="a moment in which nothing is due: the beats have caught up")

        def stopped() -> bool:
            (row,) = self.stack.query("SELECT count(next_fire_at), bool_or(active) FROM orchestrator.schedules")
            return not row["count"] and not row["bool_or"]

        eventually(stopped, within=RESUMED, what="every schedule has been read again as disabled")

    def assert_each_slot_started_once(self) -> set[tuple[UUID, int]]:
        """Check that every slot between first reading and disabling has one firing, started; return runs and tasks."""
        expected = self._slots(self._on_until)
        rows = self.stack.query("SELECT * FROM orchestrator.firings")
        found = {(row["task_id"], row["scheduled_for"]): row for row in rows}
        assert len(found) == len(rows)
        missing = expected - found.keys()
        # Slots that came before the beats had noticed are recorded as skipped.
        unexpected = {slot for slot in found.keys() - expected if found[slot]["reason"] != "disabled"}
        assert not missing, f"{len(missing)} of {len(expected)} slots have no firing: {_some(missing)}"
        assert not unexpected, f"{len(unexpected)} firings of no slot: {_some(unexpected)}"
        started = {slot for slot, row in found.items() if row["outcome"] == "started"}
        passed = [found[slot] for slot in expected - started]
        assert not passed, f"{len(passed)} of {len(expected)} slots did not start: {_some(passed)}"
        runs = {(slot_run(*slot), slot[0]) for slot in started}
        assert {(found[slot]["run_id"], slot[0]) for slot in started} == runs, "a run id is not uuid5 of (task, slot)"
        self._assert_runs(runs, started)
        late = max((row["claimed_at"] - row["scheduled_for"]).total_seconds() for row in rows)
        by = Counter(row["claimed_by"] for row in rows)
        _tell(f"{len(started)} slots, each started once, by {len(by)} beats; the latest {late:.2f} s late")
        return runs

    def assert_all_were_told(self, witness: Witness) -> None:
        """Check that the witness saw a wake-up of each run that started, and none of any other; say the duplicates."""
        runs = self.assert_each_slot_started_once()
        eventually(
            lambda: not runs - witness.runs,
            within=RESUMED,
            what=f"a wake-up of each of {len(runs)} runs; {len(runs - witness.runs)} were missing at first",
        )
        strangers = witness.runs - runs
        assert not strangers, f"{len(strangers)} wake-ups of runs that no slot started: {_some(strangers)}"
        _tell(f"{len(runs)} runs; {witness.duplicates} more wake-ups than that")

    def _slots(self, until: datetime | None) -> set[tuple[int, datetime]]:
        assert until is not None, "not disabled"
        rows = self.stack.query("SELECT task_id, first_seen_at FROM orchestrator.schedules")
        seen = {row["task_id"]: row["first_seen_at"] for row in rows}
        assert seen.keys() == self.seconds.keys()
        assert min(seen.values()) > self._added_at
        return {
            (task_id, slot)
            for task_id, seconds in self.seconds.items()
            for slot in interval_slots(seconds, seen[task_id], until)
        }

    def _assert_runs(self, runs: set[tuple[UUID, int]], slots: set[tuple[int, datetime]]) -> None:
        rows = self.stack.query("SELECT id, task_id, scheduled_for, trigger, kind FROM orchestrator.runs")
        assert {(row["id"], row["task_id"]) for row in rows} == runs, "the ledger has other runs than its firings say"
        assert {(row["task_id"], row["scheduled_for"]) for row in rows} == slots
        assert {(row["trigger"], row["kind"]) for row in rows} <= {("schedule", "crawl")}


def add_policies(stack: Stack) -> None:
    """Give the application's table its optional columns."""
    stack.execute("ALTER TABLE crawl_tasks ADD COLUMN misfire_policy text, ADD COLUMN overlap_policy text")


def slot_run(task_id: int, slot: datetime) -> UUID:
    """Return the id that the run of a slot must have."""
    return uuid5(SLOT_NAMESPACE, f"{task_id}@{slot.astimezone(UTC).strftime('%Y-%m-%dT%H:%M:%SZ')}")


def interval_slots(seconds: int, after: datetime, until: datetime) -> Iterator[datetime]:
    """Yield the slots of an interval after a moment, up to another: whole multiples since 1970."""
    step = timedelta(seconds=seconds)
    slot = _EPOCH + ((after - _EPOCH) // step + 1) * step
    while slot <= until:
        yield slot
        slot += step


def database_clock(stack: Stack) -> datetime:
    """Return what time it is in the database."""
    (row,) = stack.query("SELECT clock_timestamp() AS now")
    now: datetime = row["now"]
    return now


def last_line_at(process: Process) -> datetime:
    """Return when a process of ours wrote its last line, by its own clock."""
    stamps = [json.loads(line)["timestamp"] for line in process.text().splitlines() if line.startswith("{")]
    return datetime.fromisoformat(stamps[-1])


def _tell(fact: str) -> None:
    print(fact)  # noqa: T201 -- `pytest -rP` shows it, and so does a failure


def _some(things: Any) -> str:  # noqa: ANN401 -- any collection
    return ", ".join(str(thing) for thing, _ in zip(things, range(5), strict=False))
