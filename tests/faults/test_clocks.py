"""Hosts with wrong clocks: the ledger's time is PostgreSQL's, so a worker's own does not matter."""

import itertools
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Final
from uuid import UUID

import pytest

from tests.faults.conftest import StackFactory
from tests.support.beats import HostClock, last_line_at
from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.evidence import Evidence
from tests.support.fleet import Fleet
from tests.support.oracle import Oracle
from tests.support.processes import eventually
from tests.support.rounds import LONG, rounds

HOURS: Final = 2
SOURCES: Final = range(1, 2_001 if LONG else 501)


@pytest.mark.fault("clocks of the workers' hosts step by two hours, back and forth, in mid-fan-out and between retries")
@pytest.mark.usefixtures("faketime")
def test_clocks_of_workers_step_by_hours(
    make_rabbitmq: StackFactory, random: Random, tmp_path: Path, evidence: Evidence
) -> None:
    with DiscoveryServer(answer(503, headers={"Retry-After": "1"})) as discovery:
        stack = make_rabbitmq(
            DISCOVERY_URL=discovery.url,
            DISCOVERY_RETRY_DELAY="0.1",
            DISCOVERY_MAX_RETRIES="3",
            DISPATCH__BATCH_SIZE="20",
            LOG__LEVEL="DEBUG",
        )
        stack.application.add_sources(len(SOURCES))
        stack.application.add_task(1, SOURCES)
        clocks = [HostClock(tmp_path / name) for name in ("left", "right")]
        analyses: list[UUID] = []

        with (
            Fleet(stack, 1, env=clocks[0].applied_to(stack.env), host="left") as left,
            Fleet(stack, 1, env=clocks[1].applied_to(stack.env), host="right") as right,
        ):
            for _ in rounds(5, 50):
                analyses.append(stack.analyse(len(analyses) + 1, "news"))
                left.keep_busy(2)
                random.choice(clocks).step(timedelta(hours=random.choice([-HOURS, 0, HOURS])))
                evidence.trials += 1
                time.sleep(random.uniform(0.2, 1.0))
            for clock, hours in zip(clocks, (HOURS, -HOURS), strict=True):
                clock.step(timedelta(hours=hours))
            left.crawl()
            with evidence.recovery():
                eventually(lambda: not left.unfinished(), within=60, what="every run is over")
            stamps = [last_line_at(fleet.ready()[0]) - datetime.now(UTC) for fleet in (left, right)]
            left.assert_well()
            right.assert_well()

        evidence.saw(Oracle(stack).assert_holds(dict.fromkeys(left.crawls, SOURCES)))
    for run_id in analyses:
        attempts = stack.attempts(run_id)
        assert [attempt["outcome"] for attempt in attempts] == ["retryable"] * 4
        for before, after in itertools.pairwise(attempts):
            assert after["started_at"] - before["finished_at"] >= timedelta(seconds=1), "earlier than Retry-After"
            assert after["started_at"] - before["finished_at"] < timedelta(minutes=1), "hours late"
    assert max(stamps) > timedelta(hours=1.9), "the clock was not set: the test proved nothing"
    assert min(stamps) < -timedelta(hours=1.9), "the clock was not set: the test proved nothing"
