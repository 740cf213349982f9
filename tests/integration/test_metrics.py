"""What Prometheus is told, of a ledger and of the processes that count."""

from datetime import UTC, datetime
from typing import Final
from uuid import uuid4

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection

from orchestrator import measures, metrics
from orchestrator.analysis import Caps, SiteAnalyser
from orchestrator.db import Database
from orchestrator.discovery import DiscoveryClient, RetryPolicy
from orchestrator.domain import (
    AnalysisArguments,
    CrawlArguments,
    ExtractionBatch,
    NewRun,
    Node,
    RunKind,
    RunState,
    Trigger,
    WakeUp,
    traceparent_of,
)
from orchestrator.errors import QueueMissingError
from orchestrator.firing import FiringEngine
from orchestrator.queues import Observed, Receipt
from orchestrator.timetable import Timetable
from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.ledgers import Workbench

Samples = dict[str, float]
_COUNTS: Final = ("_total", "_count")


@pytest.fixture(autouse=True)
def counting() -> None:
    measures.begin()


def samples(text: str) -> Samples:
    """Return every sample of an exposition by its name and labels, without the prefix."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix(measures.PREFIX)
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


class Scrapes:
    """How much the counts of a scrape differ from those of the one before."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._last = self.now()

    def now(self) -> Samples:
        """Return the samples as they are."""
        return samples(metrics.exposition(self._bench.database).decode())

    def news(self) -> Samples:
        """Return by how much each count has grown, those that have not left out; buckets are not told."""
        before, self._last = self._last, self.now()
        grown = {name: value - before[name] for name, value in self._last.items() if "_bucket{" not in name}
        return {name: change for name, change in grown.items() if change and name.split("{")[0].endswith(_COUNTS)}


@pytest.fixture
def scrapes(bench: Workbench) -> Scrapes:
    return Scrapes(bench)


def test_a_crawl_run_is_counted_from_its_acceptance_to_its_end(bench: Workbench, scrapes: Scrapes) -> None:
    bench.application.add_sources(25)
    bench.application.add_task(1, list(range(1, 31)))
    run_id = bench.accept()
    assert scrapes.news() == {"runs_created_total{kind=crawl,trigger=celery}": 1}

    bench.fan_out(Observed(bench.publisher, system="postgresql", queue="extraction_queue")).deliver(run_id)

    assert bench.state(run_id) == "succeeded"
    assert scrapes.news() == {
        "run_start_delay_seconds_count{kind=crawl}": 1,
        "dispatches_total{outcome=published}": 25,
        "dispatches_total{outcome=skipped}": 5,
        "publish_duration_seconds_count": 3,
        "runs_finished_total{kind=crawl,outcome=succeeded}": 1,
        "run_duration_seconds_count{kind=crawl}": 1,
    }


def test_a_wait_that_was_asked_for_is_no_delay(bench: Workbench, scrapes: Scrapes) -> None:
    run_id = uuid4()
    not_before = datetime.now(UTC)
    bench.ledger.runs.accept(
        NewRun(run_id, CrawlArguments(1), Trigger.CELERY, traceparent_of(run_id), not_before=not_before),
        delivered=True,
    )
    with psycopg.connect(bench.url) as connection:
        connection.execute("UPDATE orchestrator.runs SET created_at = created_at - interval '1 day'")
    before = scrapes.now()

    assert bench.ledger.crawls.begin(run_id) is not None

    name = "run_start_delay_seconds_sum{kind=crawl}"
    assert 0 <= scrapes.now()[name] - before[name] < 3_600


def test_a_retried_run_starts_once(bench: Workbench, scrapes: Scrapes) -> None:
    run_id = bench.accept()
    assert bench.ledger.crawls.begin(run_id) is not None
    bench.ledger.runs.fail(run_id, QueueMissingError("no queue"))
    bench.ledger.runs.revive(run_id, actor="test")
    assert bench.ledger.crawls.begin(run_id) is not None

    news = scrapes.news()

    assert news["run_start_delay_seconds_count{kind=crawl}"] == 1
    assert news["runs_finished_total{kind=crawl,outcome=failed}"] == 1


def test_runs_that_ended_before_they_began_and_canceled_ones_are_counted(bench: Workbench, scrapes: Scrapes) -> None:
    run_id = uuid4()
    facts: dict[str, object] = {"id": run_id, "kind": RunKind.SITE_ANALYSIS, "trigger": Trigger.CELERY}
    values = facts | {"traceparent": traceparent_of(run_id)}
    for _ in range(2):
        bench.ledger.runs.record_ended(values, RunState.FAILED, "invalid_arguments", "wrong")
    bench.ledger.runs.cancel(bench.planned(12), actor="test")

    news = scrapes.news()

    assert news["runs_created_total{kind=site_analysis,trigger=celery}"] == 1
    assert news["runs_finished_total{kind=site_analysis,outcome=failed}"] == 1
    assert news["runs_finished_total{kind=crawl,outcome=canceled}"] == 1
    assert news["dispatches_total{outcome=skipped}"] == 12


def test_a_run_of_the_command_line_is_counted_by_whoever_starts_it(bench: Workbench, scrapes: Scrapes) -> None:
    run_id = uuid4()
    new = NewRun(run_id, CrawlArguments(1), Trigger.CLI, traceparent_of(run_id))
    bench.ledger.runs.accept(new, delivered=False)
    assert scrapes.news() == {}

    assert bench.ledger.crawls.begin(run_id) is not None

    assert scrapes.news() == {
        "runs_created_total{kind=crawl,trigger=cli}": 1,
        "run_start_delay_seconds_count{kind=crawl}": 1,
    }


def test_calls_to_discovery_are_counted_by_outcome(bench: Workbench, scrapes: Scrapes) -> None:
    run_id = bench.accept_analysis()
    with DiscoveryServer(answer(503), answer(200)) as server:
        client = DiscoveryClient(server.url, timeout=5)
        policy = RetryPolicy(3, 0.01, 0.01)
        analyser = SiteAnalyser(bench.ledger.analyses, client, policy, timeout=5, slice_seconds=5)
        wake_up = WakeUp(run_id, AnalysisArguments(7, "news"), traceparent_of(run_id))
        while bench.state(run_id) != "succeeded":
            analyser.deliver(wake_up, node="n", caps=Caps(9, 9))
        client.close()

    news = scrapes.news()

    assert news["discovery_attempts_total{outcome=retryable}"] == 1
    assert news["discovery_attempts_total{outcome=succeeded}"] == 1
    assert news["discovery_duration_seconds_count"] == 2
    assert news["run_start_delay_seconds_count{kind=site_analysis}"] == 1


def test_what_the_pulse_had_to_put_right_is_counted(bench: Workbench, scrapes: Scrapes) -> None:
    forgotten, silent, finished, waiting = bench.accept(), bench.planned(1), bench.planned(3), bench.accept()
    bench.publish(finished)
    assert bench.ledger.crawls.begin(waiting) is not None
    bench.ledger.crawls.postpone(waiting, QueueMissingError("no queue"))
    for run_id in (forgotten, silent, finished, waiting):
        bench.rewind(run_id, 60)
    scrapes.news()

    assert set(bench.wake()) == {forgotten, silent, waiting}

    assert scrapes.news() == {
        "sweeper_corrections_total{from=queued,to=queued}": 1,
        "sweeper_corrections_total{from=running,to=running}": 1,
        "sweeper_corrections_total{from=running,to=succeeded}": 1,
        "runs_finished_total{kind=crawl,outcome=succeeded}": 1,
        "run_duration_seconds_count{kind=crawl}": 1,
    }


def test_messages_without_a_queue_are_counted(bench: Workbench, scrapes: Scrapes) -> None:
    class Returning:
        """A publisher whose broker has no queue for the last of a batch."""

        def prepare(self) -> None:
            pass

        def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:
            del transaction
            return Receipt([source for source, _ in batch.sources][:-1], QueueMissingError("returned"))

        def check(self) -> str:
            return "nowhere"

        def close(self) -> None:
            pass

    observed = Observed(Returning(), system="rabbitmq", queue="extraction_queue")
    with bench.database.transaction() as transaction:
        observed.publish(ExtractionBatch(uuid4(), 1, traceparent_of(uuid4()), [(1, 1), (2, 2), (3, 3)]), transaction)

    assert scrapes.news() == {"publish_duration_seconds_count": 1, "publish_returned_total": 1}


def test_slots_are_counted_with_their_lag(bench: Workbench, scrapes: Scrapes) -> None:
    for task_id in (1, 2, 3):
        bench.application.add_task(task_id, [1], "every 1 seconds")
    sent: list[WakeUp] = []
    engine = FiringEngine(bench.ledger, Timetable(), sent.extend, "beat@test", max_queued=1_000)
    # Not a round: a slot that came during it would start runs, which the next slots would have to be skipped for.
    bench.ledger.schedules.look(Timetable(), every=0, sweep_every=0, by="beat@test")
    with psycopg.connect(bench.url) as connection:
        connection.execute(
            "UPDATE orchestrator.schedules SET next_fire_at = date_trunc('second', clock_timestamp())"
            " - make_interval(secs => CASE task_id WHEN 1 THEN 120 ELSE 3 END)"
        )
    before = scrapes.now()
    assert before["oldest_due_slot_age_seconds"] >= 120
    scrapes.news()

    engine.once()

    news = scrapes.news()
    assert news["runs_created_total{kind=crawl,trigger=schedule}"] == len(sent)
    assert news["schedule_fires_total{outcome=started}"] == news["schedule_lag_seconds_count"] >= 3
    assert news["schedule_fires_total{outcome=missed}"] >= 1


def test_the_gauges_tell_how_the_ledger_stands(bench: Workbench, scrapes: Scrapes) -> None:
    quiet = scrapes.now()
    assert quiet["ledger_up"] == 1
    assert {quiet[f"runs_active{{state={state}}}"] for state in ("queued", "running", "retrying")} == {0}
    assert quiet["scheduler_last_tick_timestamp_seconds"] == 0

    running = bench.planned(10, skipped=2)
    bench.publish(running, limit=4)
    queued = bench.accept()
    bench.rewind(running, 100)
    bench.rewind(queued, 200)
    bench.ledger.nodes.heartbeat(Node("b1", "beat"), "1", first=True)
    bench.ledger.nodes.heartbeat(Node("w1", "worker"), "1", first=True)

    gauges = scrapes.now()

    assert gauges["runs_active{state=queued}"] == 1
    assert gauges["runs_active{state=running}"] == 1
    assert 200 <= gauges["oldest_active_run_age_seconds"] < 300
    assert gauges["pending_dispatches"] == 6
    assert 100 <= gauges["oldest_pending_dispatch_age_seconds"] < 200
    assert gauges["nodes{kind=beat,status=ready}"] == gauges["nodes{kind=worker,status=ready}"] == 1
    assert gauges["nodes{kind=worker,status=not_ready}"] == 0
    assert abs(gauges["scheduler_last_tick_timestamp_seconds"] - datetime.now(UTC).timestamp()) < 60


def test_a_run_that_waits_for_its_eta_is_not_old(bench: Workbench, scrapes: Scrapes) -> None:
    run_id = uuid4()
    tomorrow = datetime.fromtimestamp(datetime.now(UTC).timestamp() + 86_400, UTC)
    new = NewRun(run_id, CrawlArguments(1), Trigger.CELERY, traceparent_of(run_id), not_before=tomorrow)
    bench.ledger.runs.accept(new, delivered=True)
    with psycopg.connect(bench.url) as connection:
        connection.execute("UPDATE orchestrator.runs SET created_at = created_at - interval '1 hour'")

    gauges = scrapes.now()

    assert (gauges["runs_active{state=queued}"], gauges["oldest_active_run_age_seconds"]) == (1, 0)


def test_a_ledger_that_is_away_costs_the_gauges_only() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/nothing", "orchestrator")
    try:
        told = samples(metrics.exposition(database).decode())
    finally:
        database.close()

    assert told["ledger_up"] == 0
    assert "runs_created_total{kind=crawl,trigger=celery}" in told
    assert "pending_dispatches" not in told


def test_what_a_newer_version_wrote_is_passed_over(scrapes: Scrapes) -> None:
    measures.RUNS_CREATED.add("crawl", "telepathy")
    measures.RUN_DURATION.observe(1.0, "unheard_of")

    assert scrapes.news() == {}


def test_a_duration_is_in_its_bucket_and_those_above(bench: Workbench) -> None:
    before = samples(metrics.exposition(bench.database).decode())
    measures.PUBLISH_DURATION.observe(0.05)
    measures.PUBLISH_DURATION.observe(99.0)

    after = samples(metrics.exposition(bench.database).decode())

    grown = {
        bound: after[f"publish_duration_seconds_bucket{{le={bound}}}"]
        - before[f"publish_duration_seconds_bucket{{le={bound}}}"]
        for bound in ("0.025", "0.05", "20.0", "+Inf")
    }
    assert grown == {"0.025": 0, "0.05": 1, "20.0": 1, "+Inf": 2}
    name = "publish_duration_seconds_sum"
    assert after[name] - before[name] == pytest.approx(99.05)
