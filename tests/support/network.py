"""A set-up whose processes reach broker, extraction queue and database through proxies; tests reach them directly."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from tests.support.processes import Process, children_of, eventually
from tests.support.proxy import Delay, Proxy, Toward, Wire
from tests.support.stack import Stack

READY: Final = "@test ready."
"""What a worker writes once it takes messages."""
LONGEST_CALL: Final = 15.0
"""Seconds that a call may take, whatever the network does."""


@dataclass
class Network:
    """The set-up and its links.

    Attributes:
        extraction: a way of its own to the broker, for what goes to the extraction queue.
    """

    stack: Stack
    broker: Proxy
    extraction: Proxy
    database: Proxy
    _tasks: int = 0
    _timed: list[Process] = field(default_factory=list)

    @property
    def links(self) -> Mapping[str, Proxy]:
        """The proxies by name."""
        return {"broker": self.broker, "extraction": self.extraction, "database": self.database}

    def workers(self, count: int) -> list[Process]:
        """Start workers, with a stopwatch on their calls."""
        workers = [self.spawn_worker() for _ in range(count)]
        for worker in workers:
            worker.await_line(READY, within=60)
        return workers

    def spawn_worker(self) -> Process:
        """Start a worker without waiting for it."""
        node = f"w{len(self.stack.processes)}-{uuid4().hex[:6]}@test"
        return self._spawn("worker", "-n", node, "-c", "2")

    def spawn_beat(self) -> Process:
        """Start a beat, with a stopwatch too, without waiting for it."""
        return self._spawn("beat")

    def _spawn(self, *arguments: str) -> Process:
        self._timed.append(self.stack.start("celery", "-A", "tests.support.stopwatch", *arguments))
        return self._timed[-1]

    def begin_fan_out(self, sources: int, *, published: int) -> UUID:
        """Start a run of a task of its own, slowed down a little, and wait until so many are published."""
        self._tasks += 1
        self.stack.application.add_task(self._tasks, range(1, sources + 1))
        self.extraction.impose(Delay(0.03), toward=[Toward.CLIENT])
        run_id = self.stack.crawl(self._tasks)

        def enough() -> bool:
            run = self.stack.run(run_id)
            return run is not None and bool(run["published"] >= published)

        eventually(enough, within=60, what=f"{published} published")
        return run_id

    def heal(self, *, silently: bool = False) -> None:
        """End all faults."""
        for proxy in self.links.values():
            proxy.heal(silently=silently)

    def done(self) -> Counter[str]:
        """Return what the proxies have done."""
        return sum((proxy.counts for proxy in self.links.values()), Counter())

    def slow_calls(self) -> list[dict[str, Any]]:
        """Return the calls that took over a second; see :mod:`tests.support.stopwatch`."""
        return [fact for fact in self._timings() if "call" in fact]

    def _timings(self) -> list[dict[str, Any]]:
        path = self.stack.directory / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def assert_no_call_was_long(self) -> None:
        """Check that no call of a worker or beat took too long, ended or not, and that every one was timed."""
        processes = {pid for process in self._timed for pid in (process.pid, *children_of(process.pid))}
        untimed = processes - {fact["process"] for fact in self._timings()}
        assert processes, "no process was to be timed"
        assert not untimed, f"processes without a stopwatch: {untimed}"
        long = [call for call in self.slow_calls() if call["seconds"] > LONGEST_CALL]
        assert not long, f"calls that took over {LONGEST_CALL} s: {long}"


@contextmanager
def open_network(database: str, broker: str, directory: Path) -> Iterator[Network]:
    """Lay a network to a database and a broker, given by their URLs."""
    with ExitStack() as opened:
        to_broker, to_extraction, to_database = (
            opened.enter_context(Proxy(_address(url), speaks=speaks))
            for url, speaks in [(broker, Wire.AMQP), (broker, Wire.AMQP), (database, Wire.POSTGRESQL)]
        )
        stack = Stack.on_rabbitmq(
            database,
            broker,
            directory,
            BROKER_URL=to_broker.url(broker),
            EXTRACTION_URL=to_extraction.url(broker),
            DATABASE_URL=to_database.url(database),
            DISPATCH__BATCH_SIZE="100",
        )
        stack.env["TEST_STOPWATCH"] = str(directory / "calls")
        network = Network(stack, to_broker, to_extraction, to_database)
        # What ends gently shall find its servers.
        opened.callback(stack.close)
        opened.callback(network.heal)
        yield network


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0
