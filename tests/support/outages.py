"""What goes on while servers are hurt: callers who repeat until they are told yes, and an operator at the command line.

with scene.traffic as traffic:
    run_id = traffic.fan_out()
    … a fault, and its end …
    traffic.await_resumed()
scene.conclude(evidence)
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any, Final, Generic, LiteralString, Self, TypeVar
from uuid import UUID, uuid4

import amqp
import kombu.exceptions
import psycopg
import pytest
from celery import Celery
from psycopg import sql

from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE
from tests.support.beats import add_policies, database_clock, slot_run
from tests.support.evidence import Evidence
from tests.support.oracle import FEW, RESUMED, Oracle, Verdict
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import CRAWL_TASK, Stack, amqp_connection

BIG: Final = 1
SMALL: Final = 2
SCHEDULED: Final = 3
"""Crawl tasks: a fan-out to be hit in the middle, one that is over in no time, one that beats start."""
EVERY: Final = 1
"""Seconds between two slots of the scheduled one."""

NOTICED: Final = 30.0
"""Seconds in which an operator must see that something is wrong, and what."""

_ANSWER: Final = 4.0
_COMMAND: Final = 90.0
"""Seconds that a command of ours may take, whatever is hurt."""
_LOOK: Final = 1.0
"""Seconds between two looks of an operator: a command takes a processor to itself for most of one."""


@dataclass(frozen=True)
class Outcome:
    """How a command of ours ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:  # noqa: ANN401 -- JSON
        """What it printed with --json."""
        return json.loads(self.out)

    @property
    def sentences(self) -> list[str]:
        """What it said to people on standard error; logs are not for them."""
        return [line for line in self.err.splitlines() if line and not line.startswith("{")]

    def assert_refused(self) -> None:
        """Check that it promised nothing, and said why in one sentence."""
        assert self.code == 1, self
        assert not self.out, self
        assert len(self.sentences) == 1, self
        assert self.sentences[0].startswith("orchestrator: "), self
        assert "Traceback" not in self.err, self


def command(stack: Stack, *arguments: str) -> Outcome:
    """Run a command of ours to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        env=stack.env,
        cwd=stack.directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_COMMAND,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def send(stack: Stack, task_id: int, run_id: UUID, *, by_exchange: bool = False) -> bool:
    """Ask for a run as a plain Celery client with confirms does, once; return whether the broker said yes."""
    assert stack.broker is not None
    client = Celery("client", broker=stack.broker)
    client.conf.broker_transport_options = {"confirm_publish": True, "read_timeout": _ANSWER, "write_timeout": _ANSWER}
    where: dict[str, Any] = (
        {"exchange": "orchestrator", "exchange_type": "topic", "routing_key": CRAWL_QUEUE, "declare": []}
        if by_exchange
        else {"queue": CRAWL_QUEUE}
    )
    try:
        with client.connection_for_write(connect_timeout=_ANSWER) as connection:
            client.send_task(
                CRAWL_TASK,
                args=[task_id],
                task_id=str(run_id),
                connection=connection,
                retry=False,
                confirm_timeout=_ANSWER,
                mandatory=True,
                **where,
            )
    except (OSError, amqp.AMQPError, kombu.exceptions.KombuError):
        return False
    return True


def consumers(stack: Stack, queue: str = CRAWL_QUEUE) -> int:
    """Return how many consumers a queue has; none where it cannot be asked."""
    assert stack.broker is not None
    try:
        with amqp_connection(stack.broker) as connection:
            declared = connection.channel().queue_declare(queue, passive=True)
    except (OSError, amqp.AMQPError):
        return 0
    assert declared is not None
    return int(declared[2])


def add_tasks(stack: Stack, big: int, small: int = 20, scheduled: int = 5) -> None:
    """Add the three crawl tasks, each with so many data sources; the third fires as soon as a beat runs."""
    application = stack.application
    application.add_sources(big)
    application.add_task(BIG, range(1, big + 1), is_active=False)
    application.add_task(SMALL, range(1, small + 1), is_active=False)
    add_policies(stack)
    application.add_task(SCHEDULED, range(1, scheduled + 1), f"every {EVERY} seconds")
    application.execute("UPDATE crawl_tasks SET misfire_policy = 'all', overlap_policy = 'allow'")


class Caller:
    """Asks for runs until somebody says yes: from then on they are owed.

    Args:
        stack: with the tasks of :func:`add_tasks`.
        workers: how many consume.
    """

    def __init__(self, stack: Stack, *, workers: int) -> None:
        self.stack = stack
        self.expected: dict[UUID, Collection[int]] = {}
        self.repeats = 0
        self._workers = workers
        tasks = stack.query("SELECT id, data_source_ids FROM public.crawl_tasks")
        self._sources: dict[int, list[int]] = {row["id"]: row["data_source_ids"] for row in tasks}

    def fan_out(self) -> UUID:
        """Start a run of the big task, and return once some of it is published."""
        run_id = self.ask(BIG)

        def under_way() -> bool:
            run = self.stack.run(run_id)
            return run is not None and run["published"] > 0

        eventually(under_way, within=RESUMED, what="a fan-out has begun")
        return run_id

    def ask(self, task_id: int, *, by_exchange: bool = False) -> UUID:
        """Ask for a run as a plain client until the broker has confirmed it; return its id."""
        run_id = uuid4()
        eventually(
            lambda: self._asked(run_id, task_id, by_exchange=by_exchange),
            within=RESUMED,
            what="the broker takes a plain client's message",
        )
        return run_id

    def owe(self, run_id: UUID, task_id: int) -> None:
        """Note that a run was promised to a caller."""
        self.expected[run_id] = self._sources[task_id]

    def await_resumed(self) -> None:
        """Wait until something asked for now is done, and every worker consumes again."""
        ends_at = time.monotonic() + RESUMED
        run_id = self.ask(SMALL)
        self.stack.await_run(run_id, "succeeded", within=ends_at - time.monotonic())
        for queue in (CRAWL_QUEUE, ANALYSIS_QUEUE):
            eventually(
                partial(self._attended, queue),
                within=ends_at - time.monotonic(),
                what=f"{self._workers} workers consume {queue}",
            )

    def _attended(self, queue: str) -> bool:
        return consumers(self.stack, queue) == self._workers

    def _asked(self, run_id: UUID, task_id: int, *, by_exchange: bool = False) -> bool:
        if not send(self.stack, task_id, run_id, by_exchange=by_exchange):
            self.repeats += 1
            return False
        self.owe(run_id, task_id)
        return True


class Traffic(Caller):
    """Callers that go on all the time, each in a thread: a plain client, and the command line.

    Args:
        stack: with the tasks of :func:`add_tasks`.
        workers: how many consume.
        pause: seconds between two runs of the plain client; the command line, which takes a processor to itself for a
            second, comes less often.
    """

    def __init__(self, stack: Stack, *, workers: int, pause: float = 0.5) -> None:
        super().__init__(stack, workers=workers)
        self.refusals: list[Outcome] = []
        self._pause = pause
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._stop.clear()
        self.refusals, self.repeats = [], 0
        callers = ((partial(self._asked, task_id=SMALL), self._pause), (self._commanded, 16 * self._pause))
        self._threads = [threading.Thread(target=self._go_on, args=caller, daemon=True) for caller in callers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_COMMAND + 10)
            assert not thread.is_alive(), f"a caller is still at it: {thread.name}"

    def _go_on(self, caller: Callable[[UUID], bool], pause: float) -> None:
        while not self._stop.is_set():
            run_id = uuid4()
            while not caller(run_id) and not self._stop.is_set():
                self._stop.wait(pause / 2)
            self._stop.wait(pause)

    def _commanded(self, run_id: UUID) -> bool:
        outcome = command(self.stack, "run", str(SMALL), "--id", str(run_id))
        if outcome.code:
            self.refusals.append(outcome)
            return False
        self.owe(run_id, SMALL)
        return True


def pending(stack: Stack) -> int:
    """Return how many messages are owed and not published."""
    (row,) = stack.query("SELECT count(*) FROM orchestrator.dispatches WHERE state = 'pending'")
    count: int = row["count"]
    return count


def slots_owed(stack: Stack) -> dict[UUID, Collection[int]]:
    """Return the runs that beats' slots owe, with their data sources, having checked that no slot is missing."""
    rows = stack.query("SELECT * FROM orchestrator.firings WHERE task_id = %s ORDER BY scheduled_for", SCHEDULED)
    slots = [row["scheduled_for"] for row in rows]
    assert slots, "no slot was claimed"
    assert {after - before for before, after in pairwise(slots)} <= {timedelta(seconds=EVERY)}, slots
    assert {row["outcome"] for row in rows} == {"started"}, rows
    (task,) = stack.query("SELECT data_source_ids FROM public.crawl_tasks WHERE id = %s", SCHEDULED)
    return {slot_run(SCHEDULED, slot): task["data_source_ids"] for slot in slots}


def assert_all_run(processes: Collection[Process]) -> None:
    """Check that none of them has ended: nobody would start it again."""
    ended = [process for process in processes if not process.running]
    assert not ended, "\n".join(process.text()[-2000:] for process in ended)


# --- Scenes --------------------------------------------------------------------------------------------------------


class Scene:
    """A set-up with running workers, for one test after the other, as long as each leaves it whole.

    Args:
        stack: prepared, without tasks.
        sources: how many data sources the big task has.
        workers: how many workers to start.

    Attributes:
        traffic: its callers; what they are owed adds up from test to test.
        whole: whether the last test left it as it was.
    """

    def __init__(self, stack: Stack, *, sources: int, workers: int) -> None:
        assert stack.broker is not None
        add_tasks(stack, sources)
        self.stack = stack
        self.broker = stack.broker
        self.workers = [stack.worker() for _ in range(workers)]
        self.oracle = Oracle(stack)
        self.traffic = Traffic(stack, workers=workers)
        self.whole = True
        self._beat: Process | None = None
        self._seen = Verdict(0, 0)

    def start_beat(self, settings: Mapping[str, str] | None = None) -> None:
        """Start a beat, until the test's end; slots between two tests are caught up."""
        self._beat = self.stack.start("celery", "-A", "orchestrator.celery_app", "beat", settings=settings)

    def replace_worker(self) -> None:
        """Have a worker end in good order, and start another, as an update does."""
        worker = self.workers.pop(0)
        assert worker.terminate(within=60) == 0, worker.text()[-2000:]
        self.workers.append(self.stack.worker())

    def await_resumed(self) -> None:
        """Wait until something asked for now is done, every worker consumes and the beat claims slots again."""
        ends_at = time.monotonic() + RESUMED
        self.traffic.await_resumed()
        if self._beat is not None:
            since = database_clock(self.stack)
            statement = "SELECT 1 FROM orchestrator.firings WHERE claimed_at > %s LIMIT 1"
            self._beat.await_ready(
                lambda: self.stack.query(statement, since),
                within=ends_at - time.monotonic(),
                what="a beat claims slots",
            )

    def conclude(self, evidence: Evidence) -> None:
        """Check what must hold once all is cured: nobody has ended, everybody works, nothing is lost."""
        self.await_resumed()
        assert_all_run([*self.workers, *([self._beat] if self._beat else [])])
        expected = dict(self.traffic.expected)
        if self._beat is not None:
            assert self._beat.terminate(within=30) == 0
            self._beat = None
            expected |= slots_owed(self.stack)
        verdict = self.oracle.assert_holds(expected)
        new = Verdict(verdict.messages - self._seen.messages, verdict.duplicates - self._seen.duplicates)
        self._seen = verdict
        evidence.saw(new)
        assert new.duplicates < FEW * new.messages, new
        self.whole = True


AnyScene = TypeVar("AnyScene", bound=Scene)


class Scenes(Generic[AnyScene]):
    """Hands out one scene again and again, and another once a test has failed.

    Args:
        postgres: where each has a database of its own.
        rabbitmq: where each has a vhost of its own.
        directories: where each has one for its processes.
        make: makes a scene of a set-up.
        settings: of its processes.
    """

    def __init__(
        self,
        postgres: PostgresServer,
        rabbitmq: RabbitMQServer,
        directories: pytest.TempPathFactory,
        make: Callable[[Stack], AnyScene],
        **settings: str,
    ) -> None:
        self._servers = postgres, rabbitmq
        self._directories = directories
        self._make = make
        self._settings = settings
        self._made: list[AnyScene] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for scene in self._made:
            scene.stack.close()

    def take(self) -> AnyScene:
        """Return a scene that is whole; :meth:`Scene.conclude` says that it still is."""
        if not self._made or not self._made[-1].whole:
            self._made.append(self._make(self._prepared()))
        scene = self._made[-1]
        scene.whole = False
        return scene

    def _prepared(self) -> Stack:
        postgres, rabbitmq = self._servers
        directory = self._directories.mktemp("scene")
        url = rabbitmq.vhost_url(rabbitmq.fresh_vhost())
        stack = Stack.on_rabbitmq(postgres.create_database(directory.name), url, directory, **self._settings)
        stack.prepare()
        return stack


# --- The operator ---------------------------------------------------------------------------------------------------


def await_told(stack: Stack, run_id: UUID, *codes: str) -> str:
    """Wait until the command line tells, in ``runs`` and ``show``, that a run waits and why; return the sentence."""
    seen: list[dict[str, Any]] = []

    def told() -> bool:
        seen.append(command(stack, "show", str(run_id), "--json").document)
        run = seen[-1]["run"]
        if run["state"] != "retrying" or run["error_code"] not in codes:
            return False
        # By its task: many more may wait by now.
        listed = command(stack, "runs", "--state", "retrying", "--task", str(BIG), "--json").document["runs"]
        return any(each["id"] == str(run_id) and each["error_code"] in codes for each in listed)

    try:
        eventually(told, within=NOTICED, what=f"an operator is told {codes}", every=_LOOK)
    except AssertionError as error:
        raise AssertionError(f"{error}; in {len(seen)} looks, at last it said {seen[-1]}") from None
    assert seen[-1]["run"]["pending"] > 0
    sentence: str = seen[-1]["run"]["error_message"]
    return sentence


def await_degraded(stack: Stack, *, answers: bool = True) -> str:
    """Wait until the command line tells that every worker does its work, and is degraded; return the reason.

    A broker that answers nobody is given up by its consumers before long: then they are not ready any more.
    """
    expected = {"degraded"} if answers else {"degraded", "not ready"}
    seen: list[list[dict[str, Any]]] = []

    def told() -> bool:
        nodes = command(stack, "workers", "--json").document["nodes"]
        seen.append([node for node in nodes if node["kind"] == "worker"])
        return {node["status"] for node in seen[-1]} <= expected

    try:
        eventually(told, within=NOTICED, what="`orchestrator workers` says that the workers are degraded", every=_LOOK)
    except AssertionError as error:
        raise AssertionError(f"{error}; at last it said {seen[-1]}") from None
    probe = command(stack, "ready", "worker")
    assert not answers or (probe.code, "degraded" in probe.out) == (0, True), probe
    reason: str = seen[-1][0]["degraded"] or seen[-1][0]["problem"]
    return reason


# --- Sessions of PostgreSQL -----------------------------------------------------------------------------------------

PUBLISHING: Final = "state = 'idle in transaction' AND query LIKE '%dispatches%FOR UPDATE%'"
"""A session whose batch is being published."""
MARKED: Final = "state = 'idle in transaction' AND query LIKE 'UPDATE %runs SET published%'"
"""A session whose batch was published and marked, just before its commit."""
PULSE: Final = "state <> 'idle' AND (query LIKE '%pg_try_advisory%' OR query LIKE 'DELETE FROM %outbox%')"
"""A session in which a pulse looks for what is due."""
AT_COMMIT: Final = "wait_event = 'SyncRep'"
"""A session whose commit is on disk and not yet known to its client: see :func:`commits_held`."""

_TERMINATE: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'task-orchestrator' AND {which}
"""


def terminate(stack: Stack, which: LiteralString = "true") -> int:
    """End the sessions of the product's processes that are like this, in SQL on pg_stat_activity; return how many."""
    return len(stack.query(_TERMINATE.format(which=which)))


def catch(stack: Stack, which: LiteralString, *, within: float = 30) -> int:
    """End the first sessions that are caught like this; return how many."""
    statement = sql.SQL(_TERMINATE).format(which=sql.SQL(which))
    ends_at = time.monotonic() + within
    with psycopg.connect(stack.database, autocommit=True) as connection:
        # As fast as it goes: a batch takes milliseconds.
        while time.monotonic() < ends_at:
            if caught := connection.execute(statement).fetchall():
                return len(caught)
    raise AssertionError(f"not within {within} s: a session where {which}")


@contextmanager
def commits_held(postgres: PostgresServer) -> Iterator[None]:
    """Have every commit stay without an answer once it is on disk, as it does for want of a standby."""
    configure(postgres, "SET synchronous_standby_names = 'nobody'")
    try:
        yield
    finally:
        configure(postgres, "RESET synchronous_standby_names")


def configure(postgres: PostgresServer, change: LiteralString) -> None:
    """Change a setting of the whole server."""
    postgres.execute(sql.SQL("ALTER SYSTEM ") + sql.SQL(change))
    postgres.execute(sql.SQL("SELECT pg_reload_conf()"))
