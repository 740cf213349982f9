"""Workers as operators run them: so many, by fixed names, each started again when it ends, with nobody waiting for it.

    with Fleet(stack, 3) as fleet:
        position = fleet.kill(fleet.ready()[0])

A worker that ends without a test's doing fails the test: it is what somebody would have to look into.
"""

import json
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self
from uuid import UUID

from tests.support.processes import Process, children_of, eventually, local_ports
from tests.support.stack import Stack

SHUTDOWN: Final = 30.0
"""Seconds in which a worker ends on SIGTERM: as long as Kubernetes waits by default."""

_AT_WORK: Final = ("batch.published", "run.materialized")
_UNFINISHED: Final = """
SELECT (SELECT count(*) FROM orchestrator.runs WHERE finished_at IS NULL)
     + (SELECT count(*) FROM unnest(%s::uuid[]) AS sent (id)
        WHERE NOT EXISTS (SELECT FROM orchestrator.runs WHERE runs.id = sent.id)) AS count
"""

# A heartbeat is due every 5 s.
_LIVELY: Final = "SELECT name FROM orchestrator.nodes WHERE clock_timestamp() - seen_at < interval '8 s'"


@dataclass(frozen=True)
class Position:
    """Where a worker of one child stands.

    Attributes:
        run_id: the crawl run that it is in the middle of: running, some of its messages published, some not.
        published: how many the ledger knows of.
        in_batch: its child has a transaction open: the rest of the time it is between two batches. Over TCP only.
    """

    run_id: UUID
    published: int
    in_batch: bool


@dataclass
class Fleet:
    """The workers of a set-up, each a stock Celery worker in a process group of its own.

    Attributes:
        stack: the set-up; with ``LOG__LEVEL`` at DEBUG, else nobody can be caught at work.
        size: how many there are.
        concurrency: children of each.
        options: what else their command line has.
        env: the environment of those that are started from now on; by default the set-up's.
        crawls: the crawl runs that it was given.
        host: of the names of its members.
    """

    stack: Stack
    size: int
    concurrency: int = 1
    options: Sequence[str] = ()
    env: Mapping[str, str] | None = None
    crawls: list[UUID] = field(default_factory=list)
    host: str = "test"
    members: dict[str, Process] = field(default_factory=dict)
    _orphaned: list[Process] = field(default_factory=list)
    _ready: set[int] = field(default_factory=set)
    _started: int = 0

    def __enter__(self) -> Self:
        """Start them all, and wait until each takes messages."""
        for number in range(self.size):
            self._spawn(f"w{number + 1}@{self.host}")
        self.await_ready()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill -9 them all: where an orderly end matters, a test looks at it itself."""
        for worker in [*self.members.values(), *self._orphaned]:
            self._forget(worker)

    def await_ready(self) -> None:
        """Wait until each of them takes messages."""
        eventually(lambda: len(self.ready()) == self.size, within=90, what=f"{self.size} workers are ready")

    def ready(self) -> list[Process]:
        """Return those that take messages.

        Raises:
            AssertionError: one of them has ended, and it was not a test's doing.
        """
        for name, worker in self.members.items():
            if not worker.running:
                raise AssertionError(f"{name} ended by itself with {worker.wait(within=1)}:\n{worker.text()[-3000:]}")
            if worker.pid not in self._ready and f"{name} ready." in worker.text():
                self._ready.add(worker.pid)
        return [worker for worker in self.members.values() if worker.pid in self._ready]

    # --- What they have to do --------------------------------------------------------------------------------

    def crawl(self) -> UUID:
        """Ask for a run of crawl task 1."""
        self.crawls.append(self.stack.crawl(1))
        return self.crawls[-1]

    def keep_busy(self, runs: int = 1) -> None:
        """Have at least so many runs that are not over."""
        for _ in range(self.unfinished(), runs):
            self.crawl()

    # --- What befalls them -----------------------------------------------------------------------------------

    def kill(self, worker: Process, *, alone: bool = False) -> Position | None:
        """Kill -9 a worker and start it again without waiting; return what it was in the middle of.

        Args:
            worker: one of them.
            alone: spare its children, as the system's killer of processes does when memory is short.
        """
        worker.freeze()  # so that what is seen is where it died
        position = self.position(worker)
        name = self._dismiss(worker)
        if alone:
            worker.kill()
            with suppress(ProcessLookupError):  # it had no children yet
                worker.thaw()
            self._orphaned.append(worker)
        else:
            self._forget(worker)
        self._spawn(name)
        return position

    def roll(self, worker: Process) -> float:
        """SIGTERM a worker, which must end well, and start it again; return the seconds until it had ended."""
        began_at = time.monotonic()
        code = worker.terminate(within=SHUTDOWN)
        took = time.monotonic() - began_at
        assert code == 0, f"a worker ended with {code} on SIGTERM:\n{worker.text()[-3000:]}"
        name = self._dismiss(worker)
        self._forget(worker)
        self._spawn(name)
        return took

    def stop(self) -> None:
        """SIGTERM them all at once; each must end well, with all that it was delivered."""
        for worker in self.members.values():
            worker.send(signal.SIGTERM)
        for worker in list(self.members.values()):
            code = worker.wait(within=SHUTDOWN)
            assert code == 0, f"a worker ended with {code} on SIGTERM:\n{worker.text()[-3000:]}"
            self._dismiss(worker)
            self._forget(worker)

    # --- Where they stand ------------------------------------------------------------------------------------

    def position(self, worker: Process) -> Position | None:
        """Return what a worker is in the middle of; it should be frozen, or will have moved on."""
        run_id = _last_run(worker)
        run = self.stack.run(run_id) if run_id is not None else None
        if run is None or run["state"] != "running" or not 0 < run["published"] < run["total"]:
            return None
        return Position(run["id"], run["published"], self.in_batch(children_of(worker.pid)))

    def in_batch(self, children: Iterable[int]) -> bool:
        """Return whether a process, one of these, has a transaction open in PostgreSQL."""
        (row,) = self.stack.query(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL"
            " AND client_port = ANY(%s)",
            sorted(set[int]().union(*map(local_ports, children))),
        )
        return bool(row["count"])

    def unfinished(self) -> int:
        """Return how many runs are not over; one that we asked for may not be in the ledger yet."""
        (row,) = self.stack.query(_UNFINISHED, self.crawls)
        number: int = row["count"]
        return number

    def gone_on(self, since: Position) -> bool:
        """Return whether a run has published more than it had, or is over."""
        run = self.stack.run(since.run_id)
        return run is not None and (run["published"] > since.published or run["finished_at"] is not None)

    def assert_well(self) -> None:
        """Check that each of them takes messages and shows signs of life, and that no orphan has stayed behind."""
        self.await_ready()

        def silent() -> set[str]:
            nodes = self.stack.query(_LIVELY)
            return {f"{name}:{worker.pid}" for name, worker in self.members.items()} - {node["name"] for node in nodes}

        eventually(lambda: not silent(), within=60, what="every worker shows signs of life")
        eventually(lambda: not self._orphans(), within=60, what="children of killed workers end by themselves")

    def _orphans(self) -> list[Process]:
        for worker in [worker for worker in self._orphaned if not group_members(worker.pid)]:
            self._orphaned.remove(worker)
            self._forget(worker)
        return self._orphaned

    def _spawn(self, name: str) -> None:
        command = ["celery", "-A", "orchestrator.celery_app", "worker", "-n", name, "-c", str(self.concurrency)]
        worker = Process(
            [sys.executable, "-m", *command, *self.options],
            output=self.stack.directory / f"{name}-{self._started}.log",
            env=self.env or self.stack.env,
            cwd=self.stack.directory,
        )
        self._started += 1
        self.stack.processes.append(worker)
        self.members[name] = worker
        # Process ids come round again.
        self._ready.discard(worker.pid)

    def _dismiss(self, worker: Process) -> str:
        (name,) = [name for name, member in self.members.items() if member is worker]
        del self.members[name]
        return name

    def _forget(self, worker: Process) -> None:
        """Kill what is left of its group, now: later its number may be another's."""
        worker.close()
        self.stack.processes.remove(worker)


def group_members(group: int) -> list[int]:
    """Return the ids of the living processes of a group."""
    members = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, its_group = (directory / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                members.append(int(directory.name))
    return members


def _last_run(worker: Process) -> UUID | None:
    """Return the crawl run that a worker was last at, by its log."""
    for line in reversed(worker.text().splitlines()):
        if any(f'"{event}"' in line for event in _AT_WORK):
            with suppress(ValueError):  # a line half written
                return UUID(json.loads(line)["run_id"])
    return None
