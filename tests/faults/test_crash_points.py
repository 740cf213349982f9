"""A kill at every named boundary: before, in and after each transaction, around each call that leaves the process."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Final
from uuid import UUID, uuid4

import pytest

from orchestrator.db import Database
from orchestrator.domain import CrawlArguments, NewRun, Trigger, traceparent_of
from orchestrator.ledger.runs import RunLedger
from orchestrator.schema import SCHEMA
from tests.faults.conftest import StackFactory
from tests.support.beats import add_policies
from tests.support.crashes import CrashPoints
from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.evidence import Evidence
from tests.support.oracle import Oracle
from tests.support.processes import Process, eventually
from tests.support.rounds import LONG, rounds
from tests.support.stack import Stack

SOURCES: Final = range(1, 401)
PROGRAMS: Final = {
    "worker": ("worker", "-c", "1", "-n", "crashing@test"),
    "beat": ("beat",),
}
# Each of these must be among the points, or the test would prove less than it says.
BOUNDARIES: Final = {
    "RunLedger.accept_all": 3,
    "RunLedger.wake_due": 3,
    "RunLedger.mark_enqueued": 3,
    "RunLedger.mark_sent": 3,
    "CrawlLedger.begin": 3,
    "CrawlLedger.materialize": 3,
    "CrawlLedger.pending_batch": 3,
    "CrawlLedger.hand_over": 3,
    "CrawlLedger.complete": 3,
    "AnalysisLedger.begin_attempt": 3,
    "AnalysisLedger.finish_attempt": 3,
    "ScheduleLedger.look": 3,
    "ScheduleLedger.claim": 3,
    "NodeLedger.heartbeat": 3,
    "Publisher.publish": 2,
    "Sender.wake": 2,
    "DiscoveryClient.call": 2,
}


@dataclass
class Scene:
    """A worker and a beat that may be killed at any point, started again by a supervisor, and work for them."""

    stack: Stack
    points: CrashPoints
    crawls: list[UUID] = field(default_factory=list)
    analyses: list[UUID] = field(default_factory=list)
    running: dict[str, Process] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)

    def supervise(self) -> None:
        """Start again whatever has been killed; nothing ends otherwise."""
        for name, arguments in PROGRAMS.items():
            process = self.running.get(name)
            if process is not None and process.running:
                continue
            if process is not None:
                code = process.wait(within=1)
                assert code == -9, f"a {name} ended by itself, with {code}:\n{process.text()[-3000:]}"
                process.close()
                self.deaths[name] += 1
            self.running[name] = self.stack.start("celery", "-A", "tests.support.crashes", *arguments)

    def trigger(self) -> None:
        """Ask for one of each: by a plain client, by way of the ledger alone, and a site analysis."""
        self.crawls.append(self.stack.crawl(1))
        run_id = uuid4()
        new = NewRun(run_id, CrawlArguments(1), Trigger.CLI, traceparent_of(run_id))
        with self._ledger() as runs:
            runs.accept(new, delivered=False)
        self.crawls.append(run_id)
        self.analyses.append(self.stack.analyse(1, "news"))

    def await_crash(self, point: str) -> None:
        """Arm a point, and give work until a process has died of it."""
        self.points.arm(point)
        calls = count()

        def crashed() -> bool:
            # Not more than can be worked off meanwhile.
            if next(calls) % 100 == 0 and self.unfinished() < 20:
                self.trigger()
            self.supervise()
            return not self.points.armed

        eventually(crashed, within=90, what=f"a process comes by {point}")

    def unfinished(self) -> int:
        """Return how many of the runs that were asked for are not over."""
        (row,) = self.stack.query(
            "SELECT count(*) FROM unnest(%s::uuid[]) AS asked (id) LEFT JOIN orchestrator.runs USING (id)"
            " WHERE finished_at IS NULL",
            self.crawls + self.analyses,
        )
        left: int = row["count"]
        return left

    def settled(self) -> bool:
        """Tell whether all of them are."""
        self.supervise()
        return self.unfinished() == 0

    @contextmanager
    def _ledger(self) -> Iterator[RunLedger]:
        database = Database(self.stack.database, SCHEMA)
        yield RunLedger(database)
        database.close()


def schedule_every_2_seconds(stack: Stack) -> None:
    add_policies(stack)
    for task_id in (2, 3, 4):
        stack.application.add_task(task_id, SOURCES[:5], "every 2 seconds")
    stack.execute("UPDATE crawl_tasks SET misfire_policy = 'all', overlap_policy = 'allow'")


def assert_no_slot_was_missed(stack: Stack) -> None:
    """Every slot from the first to the last has its one firing, and each of these has started its run."""
    rows = stack.query(
        "SELECT firings.task_id, count(*) AS slots, "
        " extract(epoch FROM max(firings.scheduled_for) - min(firings.scheduled_for)) / 2 + 1 AS due,"
        " count(runs.id) AS runs, count(*) FILTER (WHERE runs.state = 'succeeded') AS done"
        " FROM orchestrator.firings LEFT JOIN orchestrator.runs ON runs.id = run_id"
        " WHERE reason IS DISTINCT FROM 'disabled' GROUP BY firings.task_id"
    )
    assert len(rows) == 3
    for row in rows:
        assert row["slots"] == row["due"] == row["runs"] == row["done"], row


def missing(points: CrashPoints) -> set[str]:
    """Return the boundaries of which not every point has been met so far."""
    found = Counter(point.partition(":")[0] for point in points.known)
    return {name for name, count in BOUNDARIES.items() if found[name] != count}


@pytest.mark.fault("kill -9 at every named boundary: before, in, after each transaction; around each call outside")
@pytest.mark.timeout(0 if LONG else 300)
def test_a_kill_at_every_named_boundary(make_rabbitmq: StackFactory, random: Random, evidence: Evidence) -> None:
    with DiscoveryServer(answer(202)) as discovery:
        stack = make_rabbitmq(DISCOVERY_URL=discovery.url, DISPATCH__BATCH_SIZE="20", DISPATCH__SLICE_SECONDS="0.1")
        stack.application.add_sources(len(SOURCES))
        points = CrashPoints(stack.directory / "points")
        stack.env |= points.env
        stack.application.add_task(1, SOURCES, is_active=False)
        scene = Scene(stack, points)
        scene.supervise()
        schedule_every_2_seconds(stack)
        scene.trigger()
        # A quiet round, to learn the points. By some a process comes at its start only: there each dies of the others.
        eventually(lambda: scene.settled() and not missing(points), within=60, what=f"all of {BOUNDARIES} are met")
        known = chosen = [point for point in points.known if "." in point]

        if not LONG:
            chosen = random.sample([point for point in known if point.partition(":")[0] in BOUNDARIES], 6)
        for _ in rounds(1, 3):
            random.shuffle(chosen)
            for point in chosen:
                scene.await_crash(point)
                evidence.trials += 1
        with evidence.recovery():
            eventually(scene.settled, within=90, what=f"every run is over; {scene.unfinished()} were not at first")
        stack.execute("UPDATE crawl_tasks SET is_active = false, updated_at = clock_timestamp()")
        evidence.saw(Oracle(stack).assert_holds(dict.fromkeys(scene.crawls, SOURCES)))
        assert {(stack.run(run_id) or {})["state"] for run_id in scene.analyses} == {"succeeded"}
        assert_no_slot_was_missed(stack)
        assert evidence.duplicates <= 20 * evidence.trials
        evidence.note(
            f"{len(chosen)} of {len(known)} points, the pool's child or the main process: {dict(scene.deaths)}"
        )
