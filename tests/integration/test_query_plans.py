"""Questions that are asked every second, or of millions of rows, are answered from an index."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import event

from orchestrator import metrics
from orchestrator.discovery import Answer, AnswerCode
from orchestrator.domain import AttemptOutcome, DispatchState, RunKind, RunState, Trigger
from orchestrator.insights import AuditFilter, Insights, RunFilter
from tests.support.ledgers import Workbench, template
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.timeout(180)

DUE: Final = 30
BUSY: Final = 7
RUN: Final = UUID(int=1)
DONE: Final = UUID(int=2)
UNDER_WAY: Final = UUID(int=10)
EARLY: Final = datetime.now(UTC) - timedelta(seconds=150_000)
# 200,000 runs over 200,000 seconds; a tenth is unfinished and waits, a few are due, a few wait for a free call. One
# crawl task has 4,000 of them, no other more than 400.
_RUNS: Final = """
INSERT INTO orchestrator.runs
    (id, kind, state, trigger, task_id, theme_name, traceparent, created_at, finished_at, wake_at, error_code,
     awaits_slot, total, published)
SELECT lpad(to_hex(n), 32, '0')::uuid, CASE WHEN n % 50 = 12 THEN 'site_analysis' ELSE 'crawl' END, state,
       CASE WHEN n % 50000 = 5 THEN 'cli' WHEN n % 50 = 12 THEN 'celery' ELSE 'schedule' END,
       CASE WHEN n % 50 = 7 THEN 7 WHEN n % 50 <> 12 THEN n % 500 END,
       CASE WHEN n % 10000 = 12 THEN 'rare' WHEN n % 50 = 12 THEN 'news' END, 'x', now() - make_interval(secs => n),
       CASE WHEN state = 'succeeded' THEN now() END,
       CASE WHEN state = 'running' THEN now() + make_interval(secs => CASE WHEN n <= 300 THEN -1 ELSE 3600 END) END,
       CASE WHEN n % 20000 = 10 THEN 'rare' WHEN n % 10 = 0 THEN 'often' END,
       CASE WHEN n % 10000 = 10 THEN 'discovery_concurrency' END,
       CASE WHEN n IN (2, 10) THEN 100000 ELSE 0 END, CASE n WHEN 2 THEN 100000 WHEN 10 THEN 75000 ELSE 0 END
FROM (SELECT n, CASE WHEN n % 10 = 0 THEN 'running' ELSE 'succeeded' END AS state
      FROM generate_series(1, 200000) AS n) AS made
"""
_DISPATCHES: Final = """
INSERT INTO orchestrator.dispatches (run_id, data_source_id, crawl_config_id, state)
SELECT lpad(to_hex(run), 32, '0')::uuid, source, source,
       CASE WHEN source <= 75000 OR run = 2 THEN 'published' ELSE 'pending' END
FROM unnest(ARRAY[1, 2, 10]) AS run, generate_series(1, 100000) AS source
"""
# One action a minute, one after the other.
_ACTIONS: Final = """
INSERT INTO orchestrator.audit_events (at, actor, action)
SELECT now() - make_interval(mins => 100000 - n), 'ann', 'start' FROM generate_series(1, 100000) AS n
"""
# 30,000 runs and their firings, and 20,000 slots that started nothing.
_BACKLOG: Final = """
INSERT INTO orchestrator.runs (id, kind, state, trigger, task_id, scheduled_for, traceparent, created_at, finished_at)
SELECT lpad(to_hex(n), 32, '0')::uuid, 'crawl', 'succeeded', 'schedule', n % 500, slot, 'x', slot, slot
FROM generate_series(1, 30000) AS n, LATERAL (SELECT now() - make_interval(days => 31, secs => n) AS slot) AS slots;
INSERT INTO orchestrator.firings (task_id, scheduled_for, outcome, run_id, claimed_at, claimed_by)
SELECT task_id, scheduled_for, 'started', id, created_at, 'beat' FROM orchestrator.runs;
INSERT INTO orchestrator.firings (task_id, scheduled_for, outcome, reason, claimed_at, claimed_by)
SELECT 501, now() - make_interval(days => 31, secs => n), CASE WHEN n % 2 = 0 THEN 'missed' ELSE 'skipped' END, 'x',
       now() - interval '31 days', 'beat'
FROM generate_series(1, 20000) AS n;
CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER keeps BEFORE DELETE ON orchestrator.runs FOR EACH ROW EXECUTE FUNCTION keep();
CREATE TRIGGER keeps BEFORE DELETE ON orchestrator.firings FOR EACH ROW EXECUTE FUNCTION keep()
"""
_SCHEDULES: Final = """
INSERT INTO orchestrator.schedules (task_id, text, zone, active, rules, canonical, problem, next_fire_at)
SELECT n, 'x', 'UTC', true, '', CASE WHEN n > 20 THEN 'x' END, CASE WHEN n <= 20 THEN 'no' END,
       CASE WHEN n > 20 THEN now() + make_interval(secs => n) END
FROM generate_series(1, 20000) AS n
"""


@pytest.fixture(scope="module")
def empty(postgres_server: PostgresServer) -> Iterator[str]:
    with template(postgres_server) as name:
        yield name


@pytest.fixture
def fresh(postgres_server: PostgresServer, empty: str) -> Iterator[Workbench]:
    """A ledger that PostgreSQL has no statistics of."""
    with Workbench.copy_of(postgres_server, empty) as bench:
        yield bench


@pytest.fixture(scope="module")
def audited(postgres_server: PostgresServer, empty: str) -> Iterator[Workbench]:
    """A ledger with a long audit log."""
    with Workbench.copy_of(postgres_server, empty) as bench:
        with psycopg.connect(bench.url, autocommit=True) as connection:
            connection.execute(_ACTIONS)
            connection.execute("VACUUM ANALYZE orchestrator.audit_events")
        yield bench


@pytest.fixture
def backlog(postgres_server: PostgresServer, empty: str) -> Iterator[Workbench]:
    """A ledger with much to forget, of which nothing ever goes: what is explained is what was asked."""
    with Workbench.copy_of(postgres_server, empty) as bench:
        with psycopg.connect(bench.url, autocommit=True) as connection:
            connection.execute(_BACKLOG)
            connection.execute("VACUUM ANALYZE orchestrator.runs, orchestrator.firings")
        yield bench


@pytest.fixture(scope="module")
def bench(postgres_server: PostgresServer, empty: str) -> Iterator[Workbench]:
    """A ledger with history, and statistics of it."""
    with Workbench.copy_of(postgres_server, empty) as bench:
        with psycopg.connect(bench.url, autocommit=True) as connection:
            connection.execute(_RUNS)
            connection.execute(_DISPATCHES)
            connection.execute("VACUUM ANALYZE orchestrator.runs, orchestrator.dispatches")
        yield bench


class Explained:
    """How PostgreSQL answers what a call asks: every scan of its statements."""

    def __init__(self, bench: Workbench, call: Callable[[], object]) -> None:
        asked: list[tuple[str, Any]] = []

        def listen(*seen: Any) -> None:  # noqa: ANN401 -- SQLAlchemy's listener
            asked.append((seen[2], seen[3]))

        engine = bench.database._engine  # noqa: SLF001 -- to hear what is asked
        event.listen(engine, "before_cursor_execute", listen)
        try:
            call()
        finally:
            event.remove(engine, "before_cursor_execute", listen)
        self.scans: list[dict[str, Any]] = []
        with psycopg.connect(bench.url, row_factory=dict_row) as connection:
            for statement, parameters in asked:
                (row,) = connection.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters).fetchall()
                self._collect(row["QUERY PLAN"][0]["Plan"])
            connection.rollback()

    def _collect(self, node: dict[str, Any]) -> None:
        if "Relation Name" in node or "Index Name" in node:
            self.scans.append(node)
        for child in node.get("Plans", []):
            self._collect(child)

    def assert_by(self, table: str, *indexes: str, looked_at: int) -> None:
        """Check that a table was read by these indexes only, and that few rows were looked at in vain."""
        used = set()
        read = [0]
        for scan in self.scans:
            # A bitmap scan is two nodes: the heap's knows the table, the index's knows the index.
            if scan["Node Type"] == "Bitmap Index Scan" and scan["Index Name"].startswith(table):
                used.add(scan["Index Name"])
            elif scan.get("Relation Name") == table and scan["Node Type"] != "Bitmap Heap Scan":
                used.add(scan.get("Index Name", scan["Node Type"]))
            if scan.get("Relation Name") == table and scan["Node Type"] != "ModifyTable":
                read.append(scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0))
        assert used, self.scans
        assert used <= set(indexes), self.scans
        assert max(read) <= looked_at, self.scans


class Stop(Exception):  # noqa: N818 -- it is no error
    """Ends a call before it changes anything."""


def test_the_pulse_looks_at_what_is_due_and_at_nothing_else(bench: Workbench) -> None:
    woken: list[object] = []

    def look(wake_ups: Any) -> None:  # noqa: ANN401 -- counted, not read
        woken.extend(wake_ups)
        raise Stop

    def ask() -> None:
        with pytest.raises(Stop):
            bench.ledger.runs.wake_due(look, 200)

    explained = Explained(bench, ask)

    assert len(woken) == DUE
    explained.assert_by("runs", "runs_wake_at_idx", "runs_pkey", "ModifyTable", looked_at=DUE)


def test_the_pulse_looks_at_nothing_when_nothing_is_due(bench: Workbench) -> None:
    with psycopg.connect(bench.url) as connection:
        connection.execute("UPDATE orchestrator.runs SET wake_at = wake_at + interval '1 hour' WHERE wake_at < now()")
        connection.commit()
        try:
            explained = Explained(bench, lambda: bench.ledger.runs.wake_due(lambda _: None, 200))
        finally:
            connection.execute(
                "UPDATE orchestrator.runs SET wake_at = wake_at - interval '1 hour'"
                " WHERE wake_at BETWEEN now() + interval '50 minutes' AND now() + interval '3599 seconds'"
                " AND id <= lpad(to_hex(300), 32, '0')::uuid"
            )

    explained.assert_by("runs", "runs_wake_at_idx", looked_at=DUE)


def test_the_pulse_finds_canceled_runs_among_what_is_due(bench: Workbench) -> None:
    explained = Explained(bench, bench.ledger.runs.skip_canceled)

    explained.assert_by("runs", "runs_wake_at_idx", looked_at=DUE)


def test_the_next_run_that_waits_for_a_call_is_found_by_its_index(bench: Workbench) -> None:
    explained = Explained(bench, bench.ledger.analyses.next_waiting)

    explained.assert_by("runs", "runs_awaits_slot_idx", "runs_pkey", "ModifyTable", looked_at=1)


def test_the_end_of_a_call_sees_by_the_same_index_whether_a_run_waits(bench: Workbench) -> None:
    attempt = bench.begin_attempt(bench.accept_analysis())
    assert attempt is not None
    ok = Answer(AttemptOutcome.SUCCEEDED, 200, AnswerCode.OK, "ok", None, 0.1)

    explained = Explained(bench, lambda: bench.ledger.analyses.finish_attempt(attempt, ok, None))

    explained.assert_by("runs", "runs_awaits_slot_idx", "runs_pkey", "ModifyTable", looked_at=1)


def test_the_newest_runs_are_read_off_an_index(bench: Workbench) -> None:
    insights = Insights(bench.database)

    explained = Explained(bench, lambda: insights.search_runs(RunFilter(), limit=50))

    explained.assert_by("runs", "runs_created_at_id_idx", looked_at=51)


def test_the_newest_runs_of_a_task_are_read_off_an_index(bench: Workbench) -> None:
    insights = Insights(bench.database)

    explained = Explained(bench, lambda: insights.search_runs(RunFilter(task_id=BUSY), limit=50))

    # One more may be as old as the last: the index does not have the id.
    explained.assert_by("runs", "runs_task_id_created_at_idx", looked_at=52)


@pytest.mark.parametrize("state", [RunState.RUNNING, RunState.FAILED])
def test_the_newest_runs_in_a_state_are_read_off_an_index_however_rare_it_is(bench: Workbench, state: RunState) -> None:
    insights = Insights(bench.database)

    explained = Explained(bench, lambda: insights.search_runs(RunFilter(state=state), limit=50))

    explained.assert_by("runs", "runs_state_created_at_id_idx", looked_at=51)


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (RunFilter(error_code="rare"), "runs_error_code_created_at_id_idx"),
        (RunFilter(error_code="unheard_of"), "runs_error_code_created_at_id_idx"),
        (RunFilter(theme_name="rare"), "runs_theme_name_created_at_id_idx"),
        (RunFilter(theme_name="unheard of"), "runs_theme_name_created_at_id_idx"),
        (RunFilter(trigger=Trigger.CLI), "runs_trigger_created_at_id_idx"),
        (RunFilter(trigger=Trigger.API), "runs_trigger_created_at_id_idx"),
        (RunFilter(kind=RunKind.SITE_ANALYSIS), "runs_site_analysis_created_at_id_idx"),
        (RunFilter(kind=RunKind.SITE_ANALYSIS, until=EARLY), "runs_site_analysis_created_at_id_idx"),
        (RunFilter(until=EARLY), "runs_created_at_id_idx"),
        (RunFilter(state=RunState.RUNNING, until=EARLY), "runs_state_created_at_id_idx"),
    ],
)
def test_runs_are_searched_by_an_index_however_rare_they_are(bench: Workbench, wanted: RunFilter, index: str) -> None:
    insights = Insights(bench.database)

    Explained(bench, lambda: insights.search_runs(wanted, limit=50)).assert_by("runs", index, looked_at=51)
    counted = Explained(bench, lambda: insights.search_runs(wanted, limit=1, most=100))
    counted.assert_by("runs", index, looked_at=102)


def test_any_page_costs_what_the_first_one_does(bench: Workbench) -> None:
    insights = Insights(bench.database)
    (deep,) = insights.search_runs(RunFilter(until=EARLY), limit=1).runs

    for wanted, index in (
        (RunFilter(), "runs_created_at_id_idx"),
        (RunFilter(state=RunState.RUNNING), "runs_state_created_at_id_idx"),
        (RunFilter(error_code="often"), "runs_error_code_created_at_id_idx"),
    ):
        asked = Explained(bench, partial(insights.search_runs, wanted, limit=50, after=(deep.created_at, deep.id)))
        asked.assert_by("runs", index, looked_at=51)


def test_all_runs_of_a_rare_data_source_are_looked_up(bench: Workbench) -> None:
    insights = Insights(bench.database)

    for wanted in (RunFilter(data_source_id=7), RunFilter(data_source_id=7, state=RunState.SUCCEEDED)):
        explained = Explained(bench, partial(insights.search_runs, wanted, limit=50))
        explained.assert_by("dispatches", "dispatches_source_idx", looked_at=3)
        explained.assert_by("runs", "runs_data_source_id_created_at_idx", "runs_pkey", looked_at=3)


def test_the_newest_runs_of_a_common_data_source_are_met_on_the_way(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.insights.searches.MANY_RUNS", 3)
    monkeypatch.setattr("orchestrator.insights.searches.MOST_PROBED", 10)
    insights = Insights(bench.database)

    explained = Explained(bench, lambda: insights.search_runs(RunFilter(data_source_id=7), limit=3))

    keys = ("runs_created_at_id_idx", "runs_data_source_id_created_at_idx", "runs_pkey")
    explained.assert_by("runs", *keys, looked_at=10)
    explained.assert_by("dispatches", "dispatches_pkey", "dispatches_source_idx", looked_at=3)


def test_pages_of_one_run_are_read_off_their_keys(bench: Workbench) -> None:
    insights = Insights(bench.database)

    def ask(state: DispatchState | None = None, after: int | None = None) -> Explained:
        return Explained(bench, lambda: insights.page_dispatches(UNDER_WAY, limit=50, state=state, after=after))

    ask().assert_by("dispatches", "dispatches_pkey", looked_at=50)
    ask(after=90_000).assert_by("dispatches", "dispatches_pkey", looked_at=50)
    ask(DispatchState.PUBLISHED).assert_by("dispatches", "dispatches_pkey", looked_at=50)
    ask(DispatchState.SKIPPED).assert_by("dispatches", "dispatches_skipped_idx", looked_at=0)
    ask(DispatchState.PENDING, after=75_000).assert_by("dispatches", "dispatches_pkey", looked_at=50)
    # The first page walks through what is published before it; to index what is pending would cost more.
    ask(DispatchState.PENDING).assert_by("dispatches", "dispatches_pkey", looked_at=75_050)
    skips = Explained(bench, lambda: insights.skip_reasons(RUN))
    skips.assert_by("dispatches", "dispatches_skipped_idx", looked_at=0)


def test_what_the_counts_of_a_run_rule_out_is_not_looked_for(bench: Workbench) -> None:
    insights = Insights(bench.database)

    explained = Explained(bench, lambda: insights.page_dispatches(DONE, limit=50, state=DispatchState.PENDING))

    explained.assert_by("dispatches", "dispatches_pkey", looked_at=0)


def test_a_plan_without_statistics_is_taken_along_the_primary_key_too(fresh: Workbench) -> None:
    run_id = fresh.planned(50_000)

    def take() -> None:
        with fresh.ledger.crawls.pending_batch(run_id, limit=1_000, after=10_000) as batch:
            assert len(batch.sources) == 1_000
            batch.mark([source for source, _ in batch.sources])

    explained = Explained(fresh, take)

    explained.assert_by("dispatches", "dispatches_pkey", "ModifyTable", looked_at=2_000)


@pytest.mark.parametrize("after", [0, 60_000, 76_000, 98_000])
def test_a_batch_is_taken_along_the_primary_key(bench: Workbench, after: int) -> None:
    def take() -> None:
        with bench.ledger.crawls.pending_batch(RUN, limit=1_000, after=after) as batch:
            assert len(batch.sources) == 1_000

    explained = Explained(bench, take)

    explained.assert_by("dispatches", "dispatches_pkey", looked_at=max(75_000 - after, 0) + 2_000)


def test_a_batch_is_marked_along_the_primary_key(bench: Workbench) -> None:
    def mark() -> None:
        with bench.ledger.crawls.pending_batch(RUN, limit=1_000, after=75_000) as batch:
            assert batch.mark([]) is RunState.SUCCEEDED

    explained = Explained(bench, mark)

    # Of an empty list PostgreSQL holds that it implies the condition of any index.
    explained.assert_by("dispatches", "dispatches_pkey", "dispatches_skipped_idx", "ModifyTable", looked_at=1_000)


def test_one_run_and_its_parts_are_found_by_their_keys(bench: Workbench) -> None:
    insights = Insights(bench.database)

    Explained(bench, lambda: insights.run(RUN)).assert_by("runs", "runs_pkey", looked_at=1)
    Explained(bench, lambda: bench.ledger.crawls.begin(RUN)).assert_by("runs", "runs_pkey", "ModifyTable", looked_at=1)


def test_a_scrape_costs_the_same_however_long_the_history(bench: Workbench) -> None:
    with psycopg.connect(bench.url, autocommit=True) as connection:
        connection.execute(_SCHEDULES)
        connection.execute("VACUUM ANALYZE orchestrator.schedules")

    explained = Explained(bench, lambda: metrics.exposition(bench.database))

    # What is unfinished, a tenth, is counted; the nine tenths that are over are not looked at.
    explained.assert_by("runs", "runs_state_created_at_id_idx", looked_at=20_000)
    explained.assert_by("schedules", "schedules_problem_idx", "schedules_next_fire_at_task_id_idx", looked_at=20)


def test_a_batch_of_a_run_that_statistics_do_not_know_is_marked_along_the_primary_key(bench: Workbench) -> None:
    run_id = bench.planned(3_000)

    def mark() -> None:
        with suppress(Stop), bench.ledger.crawls.pending_batch(run_id, limit=1_000, after=0) as batch:
            batch.mark([source for source, _ in batch.sources])
            raise Stop

    explained = Explained(bench, mark)

    explained.assert_by("dispatches", "dispatches_pkey", "ModifyTable", looked_at=1_000)
    bench.ledger.runs.cancel(run_id, actor="test")


@pytest.mark.parametrize("wanted", [AuditFilter(), AuditFilter(actor="ann"), AuditFilter(action="start")])
def test_a_window_of_the_audit_log_costs_what_is_in_it(audited: Workbench, wanted: AuditFilter) -> None:
    insights = Insights(audited.database)
    now = datetime.now(UTC)
    indexes = ("audit_events_at_idx", "audit_events_pkey", "audit_events_actor_id_idx", "audit_events_action_id_idx")

    for since, until, found in ((10, None, 10), (50_010, 50_000, 10), (90_000, 50_000, 50), (None, 99_990, 9)):
        ends = [None if end is None else now - timedelta(minutes=end) for end in (since, until)]
        window = replace(wanted, since=ends[0], until=ends[1])
        views = insights.page_audit(window, limit=50)
        explained = Explained(audited, partial(insights.page_audit, window, limit=50))
        assert len(views) == pytest.approx(found, abs=1)
        # The margin on either side may hold a few more.
        explained.assert_by("audit_events", *indexes, looked_at=found + 4)


def test_a_batch_is_forgotten_without_a_look_at_the_rest_of_the_backlog(backlog: Workbench) -> None:
    explained = Explained(backlog, lambda: backlog.ledger.retention.forget(30, 500))

    modified = ("ModifyTable", "Tid Scan")
    explained.assert_by("runs", "runs_created_at_id_idx", "runs_pkey", *modified, looked_at=100)
    unstarted = "firings_outcome_scheduled_for_task_id_idx"
    # Either of two indexes finds a slot.
    slots = ("firings_pkey", "firings_scheduled_for_task_id_idx")
    explained.assert_by("firings", *slots, unstarted, *modified, looked_at=500)
