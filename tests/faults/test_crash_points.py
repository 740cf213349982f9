"""A kill at every named boundary: before, in and after each transaction, around each call that leaves the process."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Final
from uuid import UUID, uuid4

import pytest

from orchestrator.catalog import Catalog
from orchestrator.db import Database
from orchestrator.domain import CrawlArguments, NewRun, Trigger, traceparent_of
from orchestrator.ledger import Ledger
from orchestrator.schema import SCHEMA
from orchestrator.settings import CatalogSettings
from tests.faults.conftest import StackFactory
from tests.support.beats import add_policies
from tests.support.crashes import CrashPoints
from tests.support.discovery_server import DiscoveryServer, Exchange, answer
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
    "RunLedger.record_ended": 3,
    "RunLedger.wake_due": 3,
    "RunLedger.mark_enqueued": 3,
    "RunLedger._give_back": 3,
    "RunLedger.mark_sent": 3,
    "RunLedger.fail": 3,
    "RunLedger.note_fault": 3,
    "RunLedger.cancel": 3,
    "RunLedger._skip_some": 3,
    "RunLedger.retry": 3,
    "CrawlLedger.begin": 3,
    "CrawlLedger.materialize": 3,
    "CrawlLedger.pending_batch": 3,
    "CrawlLedger.hand_over": 3,
    "CrawlLedger.complete": 3,
    "CrawlLedger.postpone": 3,
    "AnalysisLedger.begin_attempt": 3,
    "AnalysisLedger.finish_attempt": 2,
    "AnalysisLedger.next_waiting": 3,
    "ScheduleLedger.look": 3,
    "ScheduleLedger.claim": 3,
    "NodeLedger.heartbeat": 3,
    "RetentionLedger.forget": 3,
    "Publisher.publish": 2,
    "Sender.wake": 2,
    "DiscoveryClient.call": 2,
}
# Not among them: NodeLedger.sign_off, for nothing here ends by itself; CrawlLedger.skipped_sources, which only reads;
# ScheduleLedger.pause, resume and backfill, each one transaction of a command, as RunLedger.retry is.
NO_TASK: Final = 999
ENDS: Final = {"news": "succeeded", "no such page": "failed", "always busy": "failed"}
"""How the analysis of each theme ends."""


def discover(exchange: Exchange) -> bool:
    status = {"no such page": 404, "always busy": 503}.get(exchange.request.json["theme_name"], 202)
    return answer(status)(exchange)


@dataclass
class Scene:
    """A worker and a beat that may be killed at any point, started again by a supervisor, and work for them."""

    stack: Stack
    points: CrashPoints
    crawls: list[UUID] = field(default_factory=list)
    """Runs that must succeed."""
    others: dict[UUID, set[str]] = field(default_factory=dict)
    """How each other run may end."""
    running: dict[str, Process] = field(default_factory=dict)
    commands: list[Process] = field(default_factory=list)
    deaths: Counter[str] = field(default_factory=Counter)
    _catalog: Catalog = field(default_factory=lambda: Catalog(CatalogSettings()))

    def supervise(self) -> None:
        """Start again whatever has been killed; nothing but a command ends otherwise."""
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

        for command in [command for command in self.commands if not command.running]:
            assert "Traceback" not in command.text(), command.text()[-3000:]
            self.deaths["command"] += command.wait(within=1) == -9
            command.close()
            self.commands.remove(command)

    def trigger(self) -> None:
        """Ask for one of each, by a plain client and by the ledger alone, and see to it that not all goes well."""
        self.crawls.append(self.stack.crawl(1))
        with self._ledger() as ledger:
            self.crawls.append(self._accept(ledger))
            # Only the pulse sends this one's wake-up.
            self.points.refuse_wake_up(self.crawls[-1])
            self._cancel(ledger)
        self.points.refuse_batch()
        self.points.break_batch()
        analyses = {self.stack.analyse(1, theme): {state} for theme, state in ENDS.items()}
        self.others |= analyses
        # One comes twice. Whoever finds nothing to do looks for another that waits.
        self.stack.analyse(1, next(iter(ENDS)), task_id=str(next(iter(analyses))))
        self.others[self.stack.crawl("no id")] = {"failed"}
        self._retry()
        self.others[self.stack.crawl(NO_TASK)] = {"failed"}

    def _accept(self, ledger: Ledger, *, delivered: bool = False) -> UUID:
        run_id = uuid4()
        new = NewRun(run_id, CrawlArguments(1), Trigger.CLI, traceparent_of(run_id))
        ledger.runs.accept(new, delivered=delivered)
        return run_id

    def _cancel(self, ledger: Ledger) -> None:
        """Cancel a run that has its plan and whose worker is no more; else the pulse wakes it 15 s later."""
        run_id = self._accept(ledger, delivered=True)
        ledger.crawls.begin(run_id)
        ledger.crawls.materialize(run_id, 1, self._catalog.plan(1))
        self.others[run_id] = {"canceled", "succeeded"}
        self._command("cancel", run_id)

    def _retry(self) -> None:
        """Retry a run that has failed, and will again."""
        failed = self.stack.query(
            "SELECT id FROM orchestrator.runs WHERE task_id = %s AND state = 'failed' LIMIT 1", NO_TASK
        )
        for row in failed:
            self._command("retry", row["id"])

    def _command(self, name: str, run_id: UUID) -> None:
        self.commands.append(self.stack.start("tests.support.crashes", name, str(run_id)))

    def await_crash(self, point: str) -> None:
        """Arm a point, and give work until a process has died of it."""
        self.points.arm(point)
        self.work_until(lambda: not self.points.armed, within=90, what=f"a process comes by {point}")

    def work_until(self, predicate: Callable[[], bool], *, within: float, what: str) -> None:
        """Give work until something has come to be."""
        calls = count()

        def reached() -> bool:
            # Not more than can be worked off meanwhile.
            if next(calls) % 100 == 0 and self.unfinished() < 30:
                self.trigger()
            self.supervise()
            return predicate()

        eventually(reached, within=within, what=what)

    def unfinished(self) -> int:
        """Return how many of the runs that were asked for are not over."""
        (row,) = self.stack.query(
            "SELECT count(*) FROM unnest(%s::uuid[]) AS asked (id) LEFT JOIN orchestrator.runs USING (id)"
            " WHERE finished_at IS NULL",
            [*self.crawls, *self.others],
        )
        left: int = row["count"]
        return left

    def settled(self) -> bool:
        """Tell whether all of them are, and nobody is about to revive one."""
        self.supervise()
        return not self.commands and self.unfinished() == 0

    @contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        database = Database(self.stack.database, SCHEMA)
        yield Ledger(database, self._catalog)
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
    with DiscoveryServer(discover) as discovery:
        stack = make_rabbitmq(
            DISCOVERY_URL=discovery.url,
            DISCOVERY_RETRY_DELAY="0.1",
            DISPATCH__BATCH_SIZE="20",
            DISPATCH__SLICE_SECONDS="0.1",
        )
        stack.application.add_sources(len(SOURCES))
        points = CrashPoints(stack.directory / "points")
        stack.env |= points.env
        stack.application.add_task(1, SOURCES, is_active=False)
        scene = Scene(stack, points)
        scene.supervise()
        schedule_every_2_seconds(stack)
        # A round without kills, to learn the points. By some a process comes at its start only: there each dies of the
        # others. What only tells a command how things are is no boundary.
        scene.work_until(lambda: not missing(points), within=60, what="all boundaries are met")
        known = chosen = [point for point in points.known if "." in point and "Insights." not in point]

        if not LONG:
            chosen = random.sample([point for point in known if point.partition(":")[0] in BOUNDARIES], 4)
        for _ in rounds(1, 3):
            random.shuffle(chosen)
            for point in chosen:
                scene.await_crash(point)
                evidence.trials += 1
        with evidence.recovery():
            eventually(scene.settled, within=90, what=f"every run is over; {scene.unfinished()} were not at first")
        stack.execute("UPDATE crawl_tasks SET is_active = false, updated_at = clock_timestamp()")
        evidence.saw(Oracle(stack).assert_holds(dict.fromkeys(scene.crawls, SOURCES)))
        for run_id, states in scene.others.items():
            assert (run := stack.run(run_id)) is not None, f"LOST: there is no run {run_id}"
            assert run["state"] in states, run
        assert_no_slot_was_missed(stack)
        assert evidence.duplicates <= 20 * evidence.trials
        evidence.note(
            f"{len(chosen)} of {len(known)} points, the pool's child or the main process: {dict(scene.deaths)}"
        )
