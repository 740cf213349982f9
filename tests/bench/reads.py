"""Reading with much history: pages, searches and counts; and what deleting history costs beside it.

    python -m tests.bench.reads [--size 1000000] [--times 100]

On a private PostgreSQL with five dispatches a run, made by SQL, and a run of a tenth as many dispatches as there are
runs. Each question is asked by our own code, over and over with other values where it has any: medians and 95th
percentiles, and how many blocks PostgreSQL looked at for it, which tells on a busy machine too.
"""

import argparse
import random
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from time import perf_counter
from typing import Final
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import func, select

from orchestrator.domain import CrawlArguments, DispatchState, NewRun, Node, RunKind, RunState, Trigger, traceparent_of
from orchestrator.insights import FiringFilter, Insights, RunFilter
from orchestrator.settings import LogSettings
from orchestrator.telemetry import configure_logging
from tests.bench.schedules import host
from tests.support.ledgers import Workbench, template
from tests.support.postgres import PostgresServer

SIZE: Final = 1_000_000
ASKED: Final = 100
PAGE: Final = 50
DAYS: Final = 90
BATCH: Final = 5_000
SERVER: Final = {"fsync": "on", "full_page_writes": "on", "shared_buffers": "256MB", "max_wal_size": "4GB"}
TARGET: Final = 50.0  # milliseconds

# A tenth are site analyses; one in 50 failed; 1,000 crawl tasks. What is rare is in 10 runs, wherever they are.
_RUNS: Final = """
INSERT INTO orchestrator.runs (id, kind, state, trigger, task_id, data_source_id, theme_name, traceparent, created_at,
                               finished_at, total, published, error_code)
SELECT gen_random_uuid(), kind, state, CASE WHEN rare THEN 'cli' WHEN kind = 'crawl' THEN 'schedule' ELSE 'celery' END,
       CASE WHEN kind = 'crawl' THEN n %% 1000 END, CASE WHEN kind <> 'crawl' THEN n %% 5000 END,
       CASE WHEN kind <> 'crawl' THEN CASE WHEN rare THEN 'rare' ELSE 'news' END END,
       repeat('x', 55), at, at, plan, plan,
       CASE WHEN state = 'failed' THEN CASE WHEN rare THEN 'rare' ELSE 'often' END END
FROM (SELECT n, n %% (%(size)s / 10) IN (0, 1) AS rare,
             CASE WHEN n %% 10 = 1 THEN 'site_analysis' ELSE 'crawl' END AS kind,
             CASE WHEN n %% 50 = 0 THEN 'failed' ELSE 'succeeded' END AS state,
             CASE WHEN n %% 10 = 1 THEN 0 ELSE 5 END AS plan,
             now() - %(days)s * interval '1 day' * n / %(size)s AS at
      FROM generate_series(1, %(size)s) AS n) AS made
"""
# Data source 1 is in one of 20 plans, 2 in ten of all, the others in about as many as there are.
_DISPATCHES: Final = """
INSERT INTO orchestrator.dispatches (run_id, data_source_id, crawl_config_id, state, reason, published_at)
SELECT id, CASE WHEN place = 1 AND task_id %% 20 = 0 THEN 1 WHEN place = 2 AND state = 'failed' AND error_code = 'rare'
                THEN 2 ELSE 10 + task_id * 10 + place END,
       1, CASE WHEN place = 5 AND task_id = 7 THEN 'skipped' ELSE 'published' END,
       CASE WHEN place = 5 AND task_id = 7 THEN 'no_active_config' END, finished_at
FROM orchestrator.runs, generate_series(1, 5) AS place WHERE kind = 'crawl'
"""
_EVENTS: Final = """
INSERT INTO orchestrator.run_events (run_id, at, event, state)
SELECT id, created_at, event, 'running' FROM orchestrator.runs, unnest(ARRAY['run.accepted', 'run.succeeded']) AS event
"""
_FIRINGS: Final = """
INSERT INTO orchestrator.firings (task_id, scheduled_for, outcome, reason, run_id, claimed_at, claimed_by)
SELECT task_id, created_at, CASE WHEN id::text < '001' THEN 'missed' ELSE 'started' END,
       CASE WHEN id::text < '001' THEN 'too_late' END, CASE WHEN id::text >= '001' THEN id END, created_at, 'beat'
FROM orchestrator.runs WHERE kind = 'crawl'
"""
_LARGE: Final = """
INSERT INTO orchestrator.dispatches (run_id, data_source_id, crawl_config_id, state, reason, published_at)
SELECT %(run)s, 1000000 + n, 1, CASE WHEN n %% 10000 = 0 THEN 'skipped' ELSE 'published' END,
       CASE WHEN n %% 10000 = 0 THEN 'no_active_config' END, now() FROM generate_series(1, %(plan)s) AS n
"""


class Reader:
    """Asks questions and prints how long the answers take."""

    def __init__(self, bench: Workbench, size: int, times: int) -> None:
        self._bench = bench
        self._insights = Insights(bench.database)
        self._size = size
        self._times = times
        self._random = random.Random(1)
        self._large: UUID = uuid4()

    def make(self) -> None:
        """Make the history."""
        values = {"size": self._size, "days": DAYS, "run": self._large, "plan": self._size // 10}
        started = perf_counter()
        with psycopg.connect(self._bench.url, autocommit=True) as connection:
            for statement in (_RUNS, _DISPATCHES, _EVENTS, _FIRINGS):
                connection.execute(statement, values)
            connection.execute(
                "INSERT INTO orchestrator.runs (id, kind, state, trigger, task_id, traceparent, finished_at, total,"
                " published, skipped) VALUES (%(run)s, 'crawl', 'succeeded', 'api', 1, 'x', now(), %(plan)s,"
                " %(plan)s - %(plan)s / 10000, %(plan)s / 10000)",
                values,
            )
            connection.execute(_LARGE, values)
            connection.execute("VACUUM ANALYZE")
        say(f"{self._size:,} runs, {4.5 * self._size:,.0f} dispatches made in {perf_counter() - started:.0f} s\n")
        say(f"{'question, in milliseconds':56}{'median':>10}{'p95':>10}{'blocks':>10}")

    def pages_of_runs(self) -> None:
        self._ask("newest page", self._page(RunFilter()))
        page = partial(self._insights.search_runs, limit=PAGE)
        self._ask("any page, by cursor", lambda: page(RunFilter(), after=(self._moment(), uuid4())))
        for what, wanted in (
            ("kind: site analyses", RunFilter(kind=RunKind.SITE_ANALYSIS)),
            ("kind: crawls", RunFilter(kind=RunKind.CRAWL)),
            ("state: succeeded", RunFilter(state=RunState.SUCCEEDED)),
            ("state: failed", RunFilter(state=RunState.FAILED)),
            ("state: running (none)", RunFilter(state=RunState.RUNNING)),
            ("crawl task", RunFilter(task_id=7)),
            ("crawl task and state: failed", RunFilter(task_id=50, state=RunState.FAILED)),
            ("theme, common", RunFilter(theme_name="news")),
            ("theme, rare", RunFilter(theme_name="rare")),
            ("trigger: schedule", RunFilter(trigger=Trigger.SCHEDULE)),
            ("trigger: command line (rare)", RunFilter(trigger=Trigger.CLI)),
            ("trigger: API (one)", RunFilter(trigger=Trigger.API)),
            ("error, common", RunFilter(error_code="often")),
            ("error, rare", RunFilter(error_code="rare")),
            ("error, none", RunFilter(error_code="unheard_of")),
            ("a day, a month ago, failed", self._month_ago(RunState.FAILED)),
            ("data source, in a twentieth of the runs", RunFilter(data_source_id=1)),
            ("data source, in ten runs", RunFilter(data_source_id=2)),
            ("data source, in none", RunFilter(data_source_id=10**9)),
            ("data source, in a twentieth, and state: failed", RunFilter(data_source_id=1, state=RunState.FAILED)),
        ):
            self._ask(what, self._page(wanted))
        sources = range(20, 10_000)
        self._ask("data source, any", lambda: page(RunFilter(data_source_id=self._random.choice(sources))))

    def counts(self) -> None:
        for what, wanted in (
            ("all", RunFilter()),
            ("state: failed", RunFilter(state=RunState.FAILED)),
            ("error, rare", RunFilter(error_code="rare")),
            ("data source, in a twentieth of the runs", RunFilter(data_source_id=1)),
        ):
            self._ask(f"count up to 1,000: {what}", partial(self._insights.search_runs, wanted, limit=1, most=1_000))

    def one_run(self) -> None:
        insights, large = self._insights, self._large
        ids = [view.id for view in insights.search_runs(RunFilter(until=self._moment()), limit=200).runs]

        def detail() -> None:
            run_id = self._random.choice(ids)
            insights.run(run_id)
            insights.page_events(run_id, limit=PAGE)
            insights.page_attempts(run_id, limit=PAGE)
            insights.page_dispatches(run_id, limit=PAGE)

        self._ask("one run, with its first pages", detail)
        page = partial(insights.page_dispatches, large, limit=PAGE)
        self._ask("large plan: first page", page)
        self._ask("large plan: any page", lambda: page(after=1_000_000 + self._random.randrange(self._size // 10)))
        for state in DispatchState:
            self._ask(f"large plan: {state}", partial(page, state=state))
        self._ask("large plan: how many skipped, by reason", partial(insights.skip_reasons, large))

    def slots(self) -> None:
        page = partial(self._insights.page_firings, limit=PAGE)
        self._ask("slots: newest page", partial(page, FiringFilter()))
        self._ask("slots: any page", lambda: page(FiringFilter(), after=(self._moment(), 1)))
        self._ask("slots of a crawl task", partial(page, FiringFilter(task_id=7)))

    def retention(self) -> None:
        """Delete a third of the history while runs are accepted and looked for."""
        ledger, stop = self._bench.ledger, threading.Event()
        node = Node("reads@bench", "worker")

        def work() -> None:
            run_id = uuid4()
            ledger.runs.accept(NewRun(run_id, CrawlArguments(1), Trigger.API, traceparent_of(run_id)), delivered=True)

        def look() -> None:
            ledger.runs.wake_due(lambda _: None, 200)

        def all_of_it(when: str) -> None:
            self._ask(f"accept a run, {when}", work)
            self._ask(f"look for what is due, {when}", look)
            self._ask(f"heartbeat, {when}", partial(ledger.nodes.heartbeat, node, "1"))
            self._ask(f"newest page, {when}", self._page(RunFilter()))

        all_of_it("nothing else going on")
        took: list[float] = []

        def forget() -> None:
            while not stop.is_set():
                started = perf_counter()
                more = ledger.retention.forget(DAYS * 2 / 3, BATCH)
                took.append((perf_counter() - started) * 1_000)
                if not more:
                    return

        thread = threading.Thread(target=forget)
        before = self._rows()
        started = perf_counter()
        thread.start()
        all_of_it("history being deleted")
        stop.wait(max(0.0, 20 - (perf_counter() - started)))
        stop.set()
        thread.join()
        rate = (before - self._rows()) / (perf_counter() - started)
        report("a round of deleting", took)
        say(f"\ndeleted {rate:,.0f} runs a second, each with about 5 dispatches, 2 events and a firing")

    def _rows(self) -> int:
        (row,) = self._bench.query("SELECT count(*) FROM runs")
        count: int = row["count"]
        return count

    def _page(self, wanted: RunFilter, after: tuple[datetime, UUID] | None = None) -> Callable[[], object]:
        return partial(self._insights.search_runs, wanted, limit=PAGE, after=after)

    def _month_ago(self, state: RunState) -> RunFilter:
        since = datetime.now(UTC) - timedelta(days=31)
        return RunFilter(state=state, since=since, until=since + timedelta(days=1))

    def _moment(self) -> datetime:
        return datetime.now(UTC) - timedelta(days=DAYS) * self._random.random()

    def _ask(self, what: str, question: Callable[[], object]) -> None:
        took = []
        before = self._blocks()
        for _ in range(self._times):
            started = perf_counter()
            question()
            took.append((perf_counter() - started) * 1_000)
        report(what, took, (self._blocks() - before) // self._times)

    def _blocks(self) -> int:
        """Return how many blocks the database has looked at so far: that does not depend on what else is going on."""
        with self._bench.database.transaction() as connection:
            connection.execute(select(func.pg_stat_force_next_flush()))
        (row,) = self._bench.query(
            "SELECT blks_hit + blks_read AS blocks FROM pg_stat_database WHERE datname = current_database()"
        )
        blocks: int = row["blocks"]
        return blocks


def report(what: str, took: Sequence[float], blocks: int | None = None) -> None:
    p95 = statistics.quantiles(took, n=20)[-1] if len(took) > 1 else took[0]
    counted = "" if blocks is None else f"{blocks:,}"
    over = "" if p95 <= TARGET else "   over the target"
    say(f"{what:56}{statistics.median(took):10.2f}{p95:10.2f}{counted:>10}{over}")


def say(line: str) -> None:
    with suppress(BrokenPipeError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--times", type=int, default=ASKED)
    chosen = parser.parse_args()
    configure_logging(LogSettings(level="WARNING"))
    with (
        PostgresServer(SERVER) as server,
        template(server) as empty,
        Workbench.copy_of(server, empty) as bench,
    ):
        say(f"{host()}; PostgreSQL {server.version}")
        reader = Reader(bench, chosen.size, chosen.times)
        reader.make()
        reader.pages_of_runs()
        reader.counts()
        reader.one_run()
        reader.slots()
        reader.retention()


if __name__ == "__main__":
    main()
