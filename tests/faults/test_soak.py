"""Half an hour of mixed load and random faults: nothing lost, and nothing that grows, leaks or lingers.

Watched are the workers' main processes and the beats, which no fault ends, and, while they live, the workers' children,
which do the work.
"""

import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import linear_regression, median
from typing import Final
from uuid import UUID

import pytest
from celery import Celery

from tests.support.beats import add_policies
from tests.support.callers import EVERY, SCHEDULED, slots_owed
from tests.support.discovery_server import Behaviour, DiscoveryServer, answer, close
from tests.support.evidence import Evidence
from tests.support.oracle import RESUMED, Oracle
from tests.support.postgres import PostgresServer, StopMode
from tests.support.processes import Process, children_of, eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import LONG
from tests.support.sessions import terminate
from tests.support.stack import Stack

SECONDS: Final = 1_800 if LONG else 10
PAUSE: Final = 20.0 if LONG else 2.0
"""Seconds between two faults, at most."""
SOURCES: Final = range(1, 1_001 if LONG else 301)
MIB: Final = 2**20
WARM_UP: Final = 180.0 if LONG else 0.0
"""Seconds of a process's life that say nothing of leaks: late imports, caches and pools that fill, and each kind of
fault for the first time, which takes about two minutes; arenas stay as large as they became in it."""
GROWTH: Final = 8 * MIB
"""Bytes that a process may have grown from the first third after that to the last."""
LIVED: Final = 300.0
"""Seconds after which memory of a child says something of leaks; many are killed before, or replaced (500 tasks)."""
CHILD: Final = 128 * MIB
"""Bytes that a child may have resident at any time."""
Samples = list[tuple[float, int]]
"""Seconds since the beginning, and bytes resident then."""
# The tests' own sessions and the server's are not the product's.
_LINGERING: Final = (
    "SELECT pid, state, query, now() - xact_start AS age FROM pg_stat_activity"
    " WHERE application_name = 'task-orchestrator' AND state LIKE 'idle in transaction%%'"
    " AND now() - state_change > interval '40 s'"
)
_SESSIONS: Final = (
    "SELECT (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'task-orchestrator') AS sessions,"
    " (SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
    "  WHERE locktype = 'advisory' AND now() - xact_start > interval '5 s') AS locks"
)


@dataclass
class Gauges:
    """What is measured of some processes and their servers, now and then.

    Attributes:
        processes: by the names to call them by.
        workers: those of them that have children.
        children: what was measured of these, by process id and start, for ids come round again.
    """

    stack: Stack
    rabbitmq: RabbitMQServer
    processes: dict[str, Process]
    workers: list[Process]
    rss: defaultdict[str, Samples] = field(default_factory=lambda: defaultdict(list))
    children: defaultdict[tuple[int, str], Samples] = field(default_factory=lambda: defaultdict(list))
    files: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _begun_at: float = field(default_factory=time.monotonic)

    def read(self) -> None:
        """Measure; whatever lingers in the database fails the test."""
        now = time.monotonic() - self._begun_at
        for name, process in self.processes.items():
            assert process.running, f"{name} ended:\n{process.text()[-3000:]}"
            self.rss[name].append((now, _resident(process.pid)))
            self.files[name].append(len(list(Path(f"/proc/{process.pid}/fd").iterdir())))
        for child in [child for worker in self.workers for child in children_of(worker.pid)]:
            with suppress(OSError, IndexError):  # it has ended meanwhile
                size = _resident(child)
                self.children[child, _started(child)].append((now, size))
                assert size < CHILD, f"a child has {size / MIB:.0f} MiB"
        assert not (lingering := self.stack.query(_LINGERING)), f"idle in transaction: {lingering}"

    def connections(self) -> tuple[int, int, int]:
        """Return how many sessions PostgreSQL has of the product, and RabbitMQ connections and channels."""
        (row,) = self.stack.query(_SESSIONS)
        assert row["locks"] == 0, "an advisory lock is held for seconds"
        return row["sessions"], *(
            len(self.rabbitmq.ctl(f"list_{what}", "pid").split()) for what in ("connections", "channels")
        )


def growth(samples: Samples) -> tuple[float, float]:
    """Return how many bytes a process grew after its warm-up, first third to last, and its slope in bytes an hour."""
    steady = [(at, size) for at, size in samples if at - samples[0][0] >= WARM_UP]
    third = len(steady) // 3
    grown = median(size for _, size in steady[-third:]) - median(size for _, size in steady[:third])
    slope = linear_regression([at for at, _ in steady], [size for _, size in steady]).slope
    return grown, slope * 3_600


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kill_a_child(worker: Process) -> None:
    with suppress(ProcessLookupError, IndexError):
        os.kill(children_of(worker.pid)[0], signal.SIGKILL)


def faults(
    stack: Stack, postgres: PostgresServer, rabbitmq: RabbitMQServer, workers: list[Process], random: Random
) -> dict[str, Callable[[], object]]:
    """Return what may befall the set-up, by name; each is over when it returns."""

    def pause_broker() -> None:
        rabbitmq.pause()
        time.sleep(random.uniform(0, 5))
        rabbitmq.resume()

    def restart_postgres() -> None:
        postgres.stop(random.choice([StopMode.FAST, StopMode.IMMEDIATE]))
        postgres.start()

    def kill_broker() -> None:
        rabbitmq.kill()
        rabbitmq.start()

    def freeze_worker() -> None:
        worker = random.choice(workers)
        worker.freeze()
        time.sleep(random.uniform(0, 5))
        worker.thaw()

    def raise_alarm() -> None:
        with rabbitmq.alarm():
            time.sleep(random.uniform(0, 5))

    return {
        "child killed": lambda: kill_a_child(random.choice(workers)),
        "sessions terminated": lambda: terminate(stack),
        "broker frozen": pause_broker,
        "worker frozen": freeze_worker,
        "memory alarm": raise_alarm,
        "PostgreSQL restarted": restart_postgres,
        "broker killed": kill_broker,
    }


def in_turn(kinds: list[str], random: Random) -> Iterator[str]:
    """Yield each kind once, in any order, again and again."""
    while True:
        yield from random.sample(kinds, len(kinds))


@pytest.mark.fault("a soak: mixed load, random faults")
@pytest.mark.timeout(0 if LONG else 300)
def test_soak(
    postgres: PostgresServer, rabbitmq: RabbitMQServer, tmp_path: Path, random: Random, evidence: Evidence
) -> None:
    script: list[Behaviour] = [answer(202), answer(202, delay=0.1), answer(503), answer(429), close(), answer(202)]
    with DiscoveryServer(*(random.choice(script) for _ in range(10_000)), answer(202)) as discovery:
        stack = Stack.on_rabbitmq(
            postgres.create_database("soak"),
            rabbitmq.url,
            tmp_path,
            DISCOVERY_URL=discovery.url,
            DISCOVERY_RETRY_DELAY="0.5",
            DISCOVERY_MAX_RETRIES="20",
            DISCOVERY_MAX_DELAY="2",
            DISPATCH__BATCH_SIZE="100",
        )
        stack.prepare()
        try:
            soak(stack, postgres, rabbitmq, random, evidence)
        finally:
            postgres.start()
            rabbitmq.start()
            stack.close()


def soak(stack: Stack, postgres: PostgresServer, rabbitmq: RabbitMQServer, random: Random, evidence: Evidence) -> None:
    stack.application.add_sources(len(SOURCES))
    stack.application.add_task(1, SOURCES, is_active=False)
    add_policies(stack)
    stack.application.add_task(SCHEDULED, SOURCES[:50], f"every {EVERY} seconds")
    stack.execute("UPDATE crawl_tasks SET misfire_policy = 'all', overlap_policy = 'allow'")
    workers = [stack.worker(concurrency=2) for _ in range(2)]
    beats = [stack.start("celery", "-A", "orchestrator.celery_app", "beat") for _ in range(2)]
    gauges = Gauges(
        stack,
        rabbitmq,
        {f"worker {n}": w for n, w in enumerate(workers)} | {f"beat {n}": b for n, b in enumerate(beats)},
        workers,
    )
    oracle, crawls, analyses = Oracle(stack), list[UUID](), list[UUID]()
    befalls = faults(stack, postgres, rabbitmq, workers, random)
    # With confirms: what a broker that is killed has not confirmed, nobody owes.
    client = Celery("client", broker=rabbitmq.url)
    client.conf.broker_transport_options = {"confirm_publish": True}
    kinds, befallen = in_turn(list(befalls), random), Counter[str]()
    crawls.append(stack.crawl(1))
    stack.await_run(crawls[0])
    rabbitmq.settle()
    before = gauges.connections()

    ends_at = time.monotonic() + SECONDS
    due_at = time.monotonic() + random.uniform(0, PAUSE)
    while time.monotonic() < ends_at or evidence.trials < len(befalls) // 2:
        with client.connection_for_write() as connection:
            crawls.append(stack.crawl(1, connection=connection))
            analyses += [stack.analyse(source, "news", connection=connection) for source in range(1, 6)]
        if time.monotonic() > due_at:
            kind = next(kinds)
            befalls[kind]()
            befallen[kind] += 1
            evidence.trials += 1
            with evidence.recovery():
                with client.connection_for_write() as connection:
                    crawls.append(stack.crawl(1, connection=connection))
                stack.await_run(crawls[-1], "succeeded", within=RESUMED)
            due_at = time.monotonic() + random.uniform(0, PAUSE)
        # Not so fast that work piles up: what is measured is a steady state.
        await_worked_off(stack)
        oracle.read_wire()
        gauges.read()

    evidence.saw(oracle.assert_holds(dict.fromkeys(crawls, SOURCES) | slots_owed(stack)))
    assert {(stack.run(run_id) or {"state": None})["state"] for run_id in analyses} == {"succeeded"}
    evidence.note(f"{len(crawls)} crawl runs, {len(analyses)} site analyses, {SECONDS} s")
    evidence.note(", ".join(f"{kind}: {count}" for kind, count in sorted(befallen.items())))
    assert not LONG or befallen.keys() == befalls.keys(), "some kinds of fault never happened"
    assert_nothing_leaked(gauges, before, evidence)


def await_worked_off(stack: Stack) -> None:
    """Wait until few runs are not over."""

    def worked_off() -> bool:
        (row,) = stack.query("SELECT count(*) FROM orchestrator.runs WHERE finished_at IS NULL")
        return bool(row["count"] < 20)

    eventually(worked_off, within=RESUMED, what="the backlog is worked off")


def assert_nothing_leaked(gauges: Gauges, before: tuple[int, int, int], evidence: Evidence) -> None:
    """Check connections against those at the start, open files and, over half an hour, memory against themselves."""
    # Each child has one of each; a child that had not worked at the start has none.
    room = 2 * 2 * 2

    def few() -> bool:
        return all(now <= then + room for now, then in zip(gauges.connections(), before, strict=True))

    eventually(
        few, within=60, what=f"no more connections than {before} and {room} for the children's: {gauges.connections()}"
    )
    evidence.note(f"sessions, connections, channels before and after: {before}, {gauges.connections()}")
    for name in gauges.processes:
        files = gauges.files[name]
        assert files[-1] <= max(files[: len(files) // 3 + 1]) + 4, f"{name} has {files[-1]} open files"
        if LONG:
            grown, slope = growth(gauges.rss[name])
            size = gauges.rss[name][-1][1]
            evidence.note(
                f"{name}: {slope / MIB:+.1f} MiB an hour, {grown / MIB:+.1f} MiB in all, at {size / MIB:.0f} MiB"
            )
            assert grown < GROWTH, f"{name} grew by {grown / MIB:.1f} MiB"
    largest = max(size for samples in gauges.children.values() for _, size in samples)
    old = [growth(samples) for samples in gauges.children.values() if samples[-1][0] - samples[0][0] >= LIVED]
    evidence.note(f"{len(gauges.children)} children, the largest {largest / MIB:.0f} MiB")
    if old:
        grown, slope = (max(values) / MIB for values in zip(*old, strict=True))
        evidence.note(
            f"{len(old)} children lived for 5 minutes: at most {slope:+.1f} MiB an hour, {grown:+.1f} MiB in all"
        )
