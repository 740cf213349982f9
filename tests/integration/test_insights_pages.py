"""Pages: one after the other they show everything once, in order, whatever is filtered by."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from orchestrator.domain import (
    AttemptOutcome,
    DispatchState,
    FiringOutcome,
    RunKind,
    RunState,
    ScheduleState,
    SkipReason,
    Trigger,
    message_id,
)
from orchestrator.insights import AuditFilter, FiringFilter, FoundRuns, Insights, RunFilter, RunView
from tests.integration.test_query_plans import Explained
from tests.support.ledgers import Workbench
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.timeout(120)

NOW: Final = datetime(2026, 7, 1, 12, tzinfo=UTC)
Row = TypeVar("Row")

# 60 runs, three at each moment: crawl runs of tasks 1 to 4, and every sixth a site analysis.
_RUNS: Final = """
INSERT INTO orchestrator.runs (id, kind, state, trigger, task_id, data_source_id, theme_name, traceparent, created_at,
                               finished_at, wake_at, error_code)
SELECT lpad(to_hex(n * 7919 %% 61), 32, '0')::uuid, kind, state, trigger, CASE WHEN kind = 'crawl' THEN n %% 4 + 1 END,
       CASE WHEN kind <> 'crawl' THEN CASE WHEN n > 30 THEN 6 ELSE n END END,
       CASE WHEN kind <> 'crawl' THEN CASE WHEN n = 12 THEN 'rare' ELSE 'news' END END,
       'x', %(now)s::timestamptz - make_interval(mins => n / 3),
       CASE WHEN state <> 'queued' THEN now() END, CASE WHEN state = 'queued' THEN now() END,
       CASE WHEN state = 'failed' THEN CASE WHEN n = 20 THEN 'rare' ELSE 'often' END END
FROM (SELECT n, CASE WHEN n %% 6 = 0 THEN 'site_analysis' ELSE 'crawl' END AS kind,
             CASE n %% 5 WHEN 0 THEN 'failed' WHEN 1 THEN 'queued' ELSE 'succeeded' END AS state,
             CASE n %% 3 WHEN 0 THEN 'celery' WHEN 1 THEN 'schedule' ELSE 'cli' END AS trigger
      FROM generate_series(1, 60) AS n) AS made
"""
# Data source 6 has analyses of its own, old ones in a row, and is in the plans of the runs of tasks 1 and 2.
_DISPATCHES: Final = """
INSERT INTO orchestrator.dispatches (run_id, data_source_id, crawl_config_id, state)
SELECT id, source, 1, 'pending' FROM orchestrator.runs, unnest(ARRAY[6, 70]) AS source
WHERE task_id IN (1, 2)
"""


def _key(view: RunView) -> tuple[datetime, UUID]:
    return view.created_at, view.id


def pages(ask: Callable[..., Sequence[Row]], key: Callable[[Row], Any], limit: int = 4) -> list[Row]:
    """Read page after page until one is empty."""
    found: list[Row] = []
    while page := ask(limit=limit, after=key(found[-1]) if found else None):
        assert len(page) <= limit
        found += page
    return found


def walk(search: Callable[..., FoundRuns]) -> Iterator[list[RunView]]:
    """Go from page to page of a search."""
    page = search()
    while page.following is not None:
        assert all(_key(run) >= page.following for run in page.runs)
        yield page.runs
        page = search(after=page.following)
    yield page.runs


@pytest.fixture(scope="module")
def bench_of_runs(postgres_server: PostgresServer, empty: str) -> Iterator[Workbench]:
    """A ledger with 60 runs."""
    with Workbench.copy_of(postgres_server, empty) as bench:
        with psycopg.connect(bench.url, autocommit=True) as connection:
            connection.execute(_RUNS, {"now": NOW})
            connection.execute(_DISPATCHES)
        yield bench


@pytest.fixture
def insights(bench_of_runs: Workbench) -> Insights:
    """Reads of 60 runs, as a process that has just begun."""
    return Insights(bench_of_runs.database)


def _of_source(view: RunView) -> bool:
    return view.data_source_id == 6 or view.task_id in {1, 2}


@pytest.mark.parametrize("many", [1, 10_000])
@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (RunFilter(), lambda _: True),
        (RunFilter(kind=RunKind.SITE_ANALYSIS), lambda view: view.kind is RunKind.SITE_ANALYSIS),
        (RunFilter(kind=RunKind.CRAWL), lambda view: view.kind is RunKind.CRAWL),
        (RunFilter(state=RunState.QUEUED), lambda view: view.state is RunState.QUEUED),
        (RunFilter(task_id=3), lambda view: view.task_id == 3),
        (RunFilter(theme_name="rare"), lambda view: view.theme_name == "rare"),
        (RunFilter(trigger=Trigger.SCHEDULE), lambda view: view.trigger == "schedule"),
        (RunFilter(trigger=Trigger.CLI), lambda view: view.trigger == "cli"),
        (RunFilter(error_code="often"), lambda view: view.error_code == "often"),
        (RunFilter(since=NOW - timedelta(minutes=7)), lambda view: view.created_at >= NOW - timedelta(minutes=7)),
        (RunFilter(until=NOW - timedelta(minutes=7)), lambda view: view.created_at < NOW - timedelta(minutes=7)),
        (RunFilter(data_source_id=6), _of_source),
        (RunFilter(data_source_id=6, kind=RunKind.CRAWL), lambda view: view.task_id in {1, 2}),
        (RunFilter(data_source_id=6, kind=RunKind.SITE_ANALYSIS), lambda view: view.data_source_id == 6),
        (RunFilter(data_source_id=6, theme_name="news"), lambda view: view.data_source_id == 6),
        (
            RunFilter(data_source_id=6, state=RunState.FAILED, until=NOW - timedelta(minutes=2)),
            lambda view: _of_source(view) and view.state == "failed" and view.created_at < NOW - timedelta(minutes=2),
        ),
        (RunFilter(data_source_id=99), lambda _: False),
    ],
)
def test_pages_show_every_run_that_fits_once(
    insights: Insights, monkeypatch: pytest.MonkeyPatch, wanted: RunFilter, fits: Callable[[RunView], bool], many: int
) -> None:
    monkeypatch.setattr("orchestrator.insights.searches.MANY_RUNS", many)
    everything = insights.search_runs(RunFilter(), limit=100).runs
    assert len(everything) == 60
    assert everything == sorted(everything, key=lambda view: (view.created_at, view.id), reverse=True)

    monkeypatch.setattr("orchestrator.insights.searches.MOST_PROBED", 7)
    first = insights.search_runs(wanted, limit=4, most=5)
    found = [run for page in walk(partial(insights.search_runs, wanted, limit=4)) for run in page]

    assert found == [view for view in everything if fits(view)]
    # Of a common data source only what is on the page is counted.
    common = many == 1 and wanted.data_source_id and wanted.kind is not RunKind.SITE_ANALYSIS and not wanted.theme_name
    counted = len(first.runs) if common else min(len(found), 5)
    assert (first.counted, first.exact) == (counted, counted == len(found) and not (common and first.following))


def test_a_page_looks_into_so_many_runs_for_a_common_data_source(
    bench_of_runs: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    insights = Insights(bench_of_runs.database)
    everything = insights.search_runs(RunFilter(), limit=100).runs
    common, rare = RunFilter(data_source_id=6), RunFilter(data_source_id=99)
    fitting = list(filter(_of_source, everything))
    all_of_them = FoundRuns(fitting, None, len(fitting), exact=True)
    assert insights.search_runs(common, limit=100, most=100) == all_of_them

    monkeypatch.setattr("orchestrator.insights.searches.MANY_RUNS", 2)
    search = partial(Insights(bench_of_runs.database).search_runs, limit=100, most=100)
    assert search(common) == all_of_them, "there are not that many runs"
    monkeypatch.setattr("orchestrator.insights.searches.MOST_PROBED", 10)

    first = search(common)
    last = _key(everything[9])
    near = [view for view in fitting if _key(view) >= last]
    assert first == FoundRuns(near, last, len(near), exact=False)
    assert search(common, limit=2) == FoundRuns(near[:2], _key(near[1]), 2, exact=False)
    # What is beyond the edge belongs to the next page, however many analyses there are.
    monkeypatch.setattr("orchestrator.insights.searches.MOST_PROBED", 3)
    pages_of_two = walk(partial(Insights(bench_of_runs.database).search_runs, common, limit=2))
    assert [view for page in pages_of_two for view in page] == fitting
    for narrow in (rare, replace(common, kind=RunKind.SITE_ANALYSIS), replace(common, theme_name="news"), RunFilter()):
        assert search(narrow).exact


def test_a_prepared_statement_of_any_filter_stays_on_its_index(bench: Workbench) -> None:
    with psycopg.connect(bench.url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO orchestrator.runs (id, kind, state, trigger, task_id, traceparent, wake_at)"
            " SELECT gen_random_uuid(), 'crawl', 'queued', 'schedule', 1, 'x', now() FROM generate_series(1, 20000)"
        )
        connection.execute("ANALYZE orchestrator.runs")
        # As after some calls, when PostgreSQL plans without knowing the values.
        alter = sql.SQL("ALTER DATABASE {} SET plan_cache_mode = force_generic_plan")
        connection.execute(alter.format(sql.Identifier(connection.info.dbname)))
    insights = Insights(bench.database)

    for wanted, index in (
        (RunFilter(trigger=Trigger.API), "runs_trigger_created_at_id_idx"),
        (RunFilter(error_code="x"), "runs_error_code_created_at_id_idx"),
        (RunFilter(theme_name="x"), "runs_theme_name_created_at_id_idx"),
        (RunFilter(kind=RunKind.SITE_ANALYSIS), "runs_site_analysis_created_at_id_idx"),
    ):
        Explained(bench, partial(insights.search_runs, wanted, limit=50)).assert_by("runs", index, looked_at=0)


def test_a_run_says_what_it_does(bench: Workbench) -> None:
    insights = Insights(bench.database)
    crawl, analysis = bench.accept(), bench.accept_analysis(7)

    assert insights.run(crawl).what == "crawl task 1"
    assert insights.run(analysis).what == "analysis of data source 7, theme news"
    values = {"id": UUID(int=9), "kind": RunKind.CRAWL, "trigger": Trigger.CELERY, "traceparent": "x"}
    bench.ledger.runs.record_ended(values, RunState.FAILED, "invalid_arguments", "task_id is missing")
    assert insights.run(UUID(int=9)).arguments is None
    assert insights.run(UUID(int=9)).what == "crawl without usable arguments"


def test_pages_of_a_plan(bench: Workbench) -> None:
    insights = Insights(bench.database)
    run_id = bench.planned(10, skipped=5)
    bench.publish(run_id, limit=6)

    def sources(state: DispatchState | None = None) -> list[int]:
        views = pages(partial(insights.page_dispatches, run_id, state=state), lambda view: view.data_source_id)
        return [view.data_source_id for view in views]

    assert sources() == list(range(1, 16))
    assert sources(DispatchState.PUBLISHED) == list(range(1, 7))
    assert sources(DispatchState.PENDING) == list(range(7, 11))
    assert sources(DispatchState.SKIPPED) == list(range(11, 16))
    first, last = (insights.page_dispatches(run_id, limit=1, after=after)[0] for after in (0, 14))
    assert (first.state, first.reason, first.message_id) == (DispatchState.PUBLISHED, None, message_id(run_id, 1))
    assert first.published_at is not None
    assert first.published_at.utcoffset() == timedelta(0)
    assert (last.state, last.reason, last.crawl_config_id) == (
        DispatchState.SKIPPED,
        SkipReason.NO_ACTIVE_CONFIG,
        None,
    )
    assert insights.skip_reasons(run_id) == {SkipReason.NO_ACTIVE_CONFIG: 5}
    bench.publish(run_id)
    assert sources(DispatchState.PENDING) == []


def test_pages_of_calls_and_of_what_happened(bench: Workbench) -> None:
    insights = Insights(bench.database)
    run_id = bench.accept_analysis()
    for _ in range(3):
        assert bench.begin_attempt(run_id) is not None
        bench.rewind(run_id, 60)

    calls = pages(partial(insights.page_attempts, run_id), lambda view: view.number, limit=2)

    assert [(view.number, view.outcome) for view in calls] == [
        (1, AttemptOutcome.LOST),
        (2, AttemptOutcome.LOST),
        (3, None),
    ]
    assert insights.last_attempt(run_id) == calls[-1]
    assert insights.last_attempt(bench.accept()) is None
    told = pages(partial(insights.page_events, run_id), lambda view: view.id, limit=1)
    assert [view.event for view in told] == [event["event"] for event in bench.events(run_id)]
    assert [view.state for view in told] == [RunState.QUEUED, RunState.RUNNING]


def test_pages_of_slots(bench: Workbench) -> None:
    insights = Insights(bench.database)
    bench.query(
        "INSERT INTO firings (task_id, scheduled_for, outcome, reason, claimed_by) SELECT task, %s + minute * interval"
        " '1 min', CASE WHEN minute = 2 THEN 'missed' ELSE 'skipped' END,"
        " CASE WHEN minute = 2 THEN 'too_late' ELSE 'overlap' END, 'beat'"
        " FROM generate_series(1, 3) AS task, generate_series(1, 4) AS minute",
        NOW,
    )

    def slots(wanted: FiringFilter) -> list[tuple[int, int]]:
        views = pages(partial(insights.page_firings, wanted), lambda view: (view.scheduled_for, view.task_id), limit=5)
        return [(view.scheduled_for.minute, view.task_id) for view in views]

    assert slots(FiringFilter()) == [(minute, task) for minute in (4, 3, 2, 1) for task in (3, 2, 1)]
    assert slots(FiringFilter(outcome=FiringOutcome.MISSED)) == [(2, 3), (2, 2), (2, 1)]
    assert slots(FiringFilter(task_id=2, until=NOW + timedelta(minutes=3))) == [(3, 2), (2, 2), (1, 2)]


def test_pages_of_schedules_go_on_from_those_that_fire_to_those_that_do_not(bench: Workbench) -> None:
    insights = Insights(bench.database)
    bench.query(
        "INSERT INTO schedules (task_id, text, zone, active, rules, canonical, next_fire_at)"
        " SELECT n, 'hourly', 'UTC', n %% 3 <> 0, '1', '0 * * * *',"
        " CASE WHEN n %% 3 <> 0 THEN %s - n / 4 * interval '1 min' END FROM generate_series(1, 20) AS n",
        NOW,
    )

    def tasks(state: ScheduleState | None = None) -> list[int]:
        ask = partial(insights.page_schedules, state=state)
        return [view.task_id for view in pages(ask, lambda view: (view.next_fire_at, view.task_id), limit=3)]

    firing = sorted((n for n in range(1, 21) if n % 3), key=lambda n: (-(n // 4), n))
    assert tasks() == [*firing, 3, 6, 9, 12, 15, 18]
    assert tasks(ScheduleState.ACTIVE) == firing
    assert tasks(ScheduleState.INACTIVE) == [3, 6, 9, 12, 15, 18]


def test_pages_of_the_audit_log(bench: Workbench) -> None:
    insights = Insights(bench.database)
    runs = [bench.accept() for _ in range(5)]
    for run_id, actor in zip(runs, ("ann", "bob", "ann", "ann", "bob"), strict=True):
        bench.ledger.runs.cancel(run_id, actor=actor, reason="try")
    bench.query("INSERT INTO audit_events (actor, action, task_id) VALUES ('ann', 'pause', 7)")

    def ids(wanted: AuditFilter) -> list[UUID | int | None]:
        views = pages(partial(insights.page_audit, wanted), lambda view: view.id, limit=2)
        return [view.run_id or view.task_id for view in views]

    assert ids(AuditFilter()) == [7, *reversed(runs)]
    assert ids(AuditFilter(actor="bob")) == [runs[4], runs[1]]
    assert ids(AuditFilter(action="pause")) == ids(AuditFilter(task_id=7)) == [7]
    assert ids(AuditFilter(run_id=runs[2], actor="ann", action="cancel")) == [runs[2]]
    (paused,) = insights.page_audit(AuditFilter(action="pause"), limit=1)
    assert ids(AuditFilter(until=paused.at)) == [*reversed(runs)]
    assert ids(AuditFilter(since=paused.at)) == [7]
    (canceled,) = insights.page_audit(AuditFilter(run_id=runs[0]), limit=1)
    assert (canceled.before, canceled.after) == ({"state": "queued", "error_code": None}, {"state": "canceled"})


def test_a_window_of_the_audit_log_has_what_was_overtaken_at_its_ends(bench: Workbench) -> None:
    insights = Insights(bench.database)
    # Task n at second n of a quiet day: the first number came last in both pairs of transactions at once.
    for task in (-4_000, 11, 10, 21, 20, 4_000):
        bench.query(
            "INSERT INTO audit_events (at, actor, action, task_id)"
            " VALUES (%s::timestamptz + make_interval(secs => %s), 'ann', 'pause', %s)",
            NOW,
            task,
            task,
        )

    def tasks(since: int | None = None, until: int | None = None) -> list[int | None]:
        ends = [None if second is None else NOW + timedelta(seconds=second) for second in (since, until)]
        return [view.task_id for view in insights.page_audit(AuditFilter(since=ends[0], until=ends[1]), limit=9)]

    assert tasks(since=10, until=21) == [20, 10, 11]
    assert tasks(since=11, until=22) == [20, 21, 11]
    assert tasks(since=-60) == [4_000, 20, 21, 10, 11]
    assert tasks(until=80) == [20, 21, 10, 11, -4_000]
    assert tasks(since=100, until=3_000) == tasks(since=5_000) == tasks(until=-5_000) == []
    everything = AuditFilter(since=datetime.min.replace(tzinfo=UTC), until=datetime.max.replace(tzinfo=UTC))
    assert len(insights.page_audit(everything, limit=9)) == 6
