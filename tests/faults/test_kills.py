"""Promises 1 and 2 under fire: workers and their children killed -9, above all in the middle of a fan-out."""

import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final

import pytest

from tests.faults.conftest import StackFactory
from tests.support.discovery_server import DiscoveryServer, answer, silence
from tests.support.evidence import Evidence
from tests.support.fleet import Fleet, Position
from tests.support.oracle import RESUMED, Oracle, Verdict
from tests.support.processes import Process, children_of, eventually
from tests.support.rounds import LONG, rounds
from tests.support.stack import Stack

BATCH: Final = 20
PACE: Final = 1_200
"""Messages between two kills, at least: one batch a kill can come twice, and that is to be less than 2 %."""
SOURCES: Final = range(1, 3_001 if LONG else 1_001)

_OFTEN: Final = 0.8
"""Share of kills that wait for a worker in mid-fan-out; the others meet any, wherever it is, even starting."""
_ALONE: Final = 0.2
"""Share of kills that spare the children."""


@dataclass
class Siege:
    """Kills worker after worker while runs keep coming, and notes how the work of each is taken up again."""

    fleet: Fleet
    random: Random
    evidence: Evidence
    kills: int = 0
    in_mid_fan_out: int = 0
    in_a_batch: int = 0
    _published: int = 0
    _interrupted: list[tuple[Position, float]] = field(default_factory=list)

    def last(self, kills: int) -> None:
        """Go on until so many workers were killed, at least half of them in mid-fan-out."""
        while self.kills < kills or self.in_mid_fan_out < kills / 2:
            eventually(self._enough_published, within=RESUMED, what=f"{PACE} messages are published between two kills")
            victim = self._victim()
            time.sleep(self.random.uniform(0, 0.2))
            self._kill(victim, alone=self.random.random() < _ALONE)
        eventually(lambda: not self._still_interrupted(), within=RESUMED, what="every interrupted run goes on")
        eventually(lambda: not self.fleet.unfinished(), within=RESUMED, what="every run is over")

    def judge(self) -> Verdict:
        """Let the oracle judge all of it."""
        verdict = Oracle(self.fleet.stack).assert_holds(dict.fromkeys(self.fleet.crawls, SOURCES))
        self.evidence.saw(verdict)
        self.evidence.note(f"{self.in_mid_fan_out} kills in mid-fan-out")
        return verdict

    def _enough_published(self) -> bool:
        self.fleet.keep_busy(3)
        self._still_interrupted()
        (row,) = self.fleet.stack.query("SELECT sum(published) AS published FROM orchestrator.runs")
        published: int = row["published"] or 0
        if published < self._published + PACE:
            return False
        self._published = published
        return True

    def _kill(self, victim: Process, *, alone: bool) -> None:
        met = self.fleet.kill(victim, alone=alone)
        self.kills += 1
        self.evidence.trials += 1
        if met is not None:
            self.in_mid_fan_out += 1
            self.in_a_batch += met.in_batch
            self._interrupted.append((met, time.monotonic()))

    def _victim(self) -> Process:
        if self.random.random() >= _OFTEN:
            self.fleet.keep_busy(3)
            return self.random.choice(list(self.fleet.members.values()))

        def in_mid_fan_out() -> list[Process]:
            self.fleet.keep_busy(3)
            self._still_interrupted()
            return [worker for worker in self.fleet.ready() if self.fleet.position(worker)]

        return self.random.choice(eventually(in_mid_fan_out, within=RESUMED, what="a worker is in mid-fan-out"))

    def _still_interrupted(self) -> Collection[tuple[Position, float]]:
        """Note the interrupted runs that have gone on; return the others."""
        for interruption in list(self._interrupted):
            since, killed_at = interruption
            if self.fleet.gone_on(since):
                self._interrupted.remove(interruption)
                self.evidence.recovered(time.monotonic() - killed_at)
        return self._interrupted


def a_task(stack: Stack) -> None:
    stack.application.add_sources(len(SOURCES))
    stack.application.add_task(1, SOURCES)


def besiege(make: StackFactory, workers: int, kills: int, random: Random, evidence: Evidence) -> Siege:
    """Kill workers so often, and check that all of them are well at the end."""
    stack = make(DISPATCH__BATCH_SIZE=str(BATCH), LOG__LEVEL="DEBUG")
    a_task(stack)
    with Fleet(stack, workers) as fleet:
        siege = Siege(fleet, random, evidence)
        siege.last(kills)
        fleet.assert_well()
    return siege


@pytest.mark.fault("kill -9 of one of three workers every second or two: with its children, or sparing them")
def test_kill_9_of_workers_under_load(make_rabbitmq: StackFactory, random: Random, evidence: Evidence) -> None:
    siege = besiege(make_rabbitmq, 3, 200 if LONG else 4, random, evidence)

    verdict = siege.judge()
    evidence.note(f"{siege.in_a_batch} of them within a batch")
    assert verdict.duplicates <= BATCH * siege.kills, "more than one batch for each kill came twice"


@pytest.mark.fault("kill -9 of workers on the embedded set-up, where message and mark share a transaction")
def test_kill_9_of_workers_on_the_embedded_set_up(
    make_embedded: StackFactory, random: Random, evidence: Evidence
) -> None:
    siege = besiege(make_embedded, 2, 20 if LONG else 2, random, evidence)

    assert siege.judge().duplicates == 0


@pytest.mark.fault("kill -9 of workers whose messages go to Kafka, with Celery on")
def test_kill_9_of_workers_that_publish_to_kafka(make_kafka: StackFactory, random: Random, evidence: Evidence) -> None:
    siege = besiege(make_kafka, 2, 20 if LONG else 2, random, evidence)

    siege.judge()


@pytest.mark.fault("kill -9 of a worker's child in the middle of a batch")
def test_kill_9_of_a_pool_child_in_the_middle_of_a_batch(
    make_rabbitmq: StackFactory, random: Random, evidence: Evidence
) -> None:
    stack = make_rabbitmq(DISPATCH__BATCH_SIZE=str(BATCH), LOG__LEVEL="DEBUG")
    a_task(stack)
    with Fleet(stack, 1) as fleet:
        (worker,) = fleet.ready()

        def killed() -> Position | None:
            """Freeze the child where it is; if that is within a batch, kill it."""
            fleet.keep_busy()
            time.sleep(random.uniform(0, 0.1))
            for child in children_of(worker.pid):
                os.kill(child, signal.SIGSTOP)
                met = fleet.position(worker)
                if met is not None and met.in_batch:
                    os.kill(child, signal.SIGKILL)
                    return met
                os.kill(child, signal.SIGCONT)
            return None

        for _ in rounds(1, 50):
            met = eventually(killed, within=60, what="a child is killed in a batch")
            evidence.trials += 1
            assert met is not None
            with evidence.recovery():
                eventually(partial(fleet.gone_on, met), within=RESUMED, what="the run goes on")
            eventually(lambda: not fleet.unfinished(), within=RESUMED, what="the run is over")

        fleet.assert_well()
        assert fleet.ready() == [worker]

    verdict = Oracle(stack).assert_holds(dict.fromkeys(fleet.crawls, SOURCES))
    evidence.saw(verdict)
    assert verdict.duplicates <= BATCH * evidence.trials, "more than one batch for each kill came twice"


@pytest.mark.fault("kill -9 of a worker's children in the middle of calls to the Discovery Service")
def test_kill_9_of_a_pool_child_in_the_middle_of_a_call(make_rabbitmq: StackFactory, evidence: Evidence) -> None:
    calls = 3 if LONG else 1
    with DiscoveryServer(silence()) as discovery:
        stack = make_rabbitmq(DISCOVERY_URL=discovery.url, DISCOVERY_TIMEOUT="2")
        # A worker keeps one of its children for crawl runs.
        with Fleet(stack, 1, concurrency=calls + 1) as fleet:
            (worker,) = fleet.ready()
            for _ in rounds(1, 4):
                discovery.play(silence())
                run_ids = [stack.analyse(source, "news") for source in range(1, calls + 1)]
                eventually(lambda: len(discovery.requests) == calls, within=20, what=f"{calls} calls are under way")
                discovery.play(answer())
                children = children_of(worker.pid)
                for child in children:
                    os.kill(child, signal.SIGKILL)
                evidence.trials += len(children)
                with evidence.recovery():
                    ended = [stack.await_run(run_id, within=RESUMED) for run_id in run_ids]

                assert {run["state"] for run in ended} == {"succeeded"}
                keys = sorted(request.headers["idempotency-key"] for request in discovery.requests)
                assert keys == sorted(map(str, run_ids)), "not one more call each, with the key of the first"
                for run_id in run_ids:
                    assert [attempt["outcome"] for attempt in stack.attempts(run_id)] == ["lost", "succeeded"]

            fleet.assert_well()
            assert fleet.ready() == [worker]
