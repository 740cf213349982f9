"""Callers who repeat until they are told yes; from then on they are owed what they asked for.

with Traffic(stack, workers=2) as traffic:
    run_id = traffic.fan_out()
    … a fault, and its end …
    traffic.await_resumed()
oracle.assert_holds(traffic.expected)
"""

import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any, Final, Self
from uuid import UUID, uuid4

import amqp
import kombu.exceptions
from celery import Celery

from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE
from tests.support.beats import add_policies, slot_run
from tests.support.operators import COMMAND, Outcome, command
from tests.support.oracle import RESUMED
from tests.support.processes import eventually
from tests.support.stack import CRAWL_TASK, Stack, amqp_connection

BIG: Final = 1
SMALL: Final = 2
SCHEDULED: Final = 3
"""Crawl tasks: a fan-out to be hit in the middle, one that is over in no time, one that beats start."""
EVERY: Final = 1
"""Seconds between two slots of the scheduled one."""
_ANSWER: Final = 4.0
"""Seconds that the plain client waits for the broker."""


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
            thread.join(COMMAND + 10)
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
