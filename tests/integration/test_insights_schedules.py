"""What people are shown of schedules and slots, and that it costs no more with many of them than with few."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

import psycopg
import pytest

from orchestrator.domain import FiringOutcome, FiringReason, ScheduleState, Trigger, traceparent_of
from orchestrator.errors import ScheduleNotFoundError
from orchestrator.insights import FiringFilter, FiringView, Insights, RunFilter
from tests.integration.test_query_plans import Explained
from tests.support.ledgers import Workbench
from tests.support.postgres import PostgresServer
from tests.support.scheduling import Rota, at

pytestmark = pytest.mark.timeout(180)

# 50,000 schedules, of which 1,000 are invalid, 5,000 each inactive and without a text, 100 paused; 200,000 slots.
_SCHEDULES: Final = """
INSERT INTO orchestrator.schedules
    (task_id, text, zone, active, rules, canonical, problem, next_fire_at, first_seen_at, read_at)
SELECT n, CASE WHEN n % 10 <> 2 THEN 'hourly' END, 'UTC', n % 10 <> 1, '1',
       CASE WHEN n % 50 <> 0 AND n % 10 <> 2 THEN '0 * * * *' END, CASE WHEN n % 50 = 0 THEN 'cannot be read' END,
       CASE WHEN n % 10 NOT IN (1, 2) AND n % 50 <> 0 THEN now() + make_interval(secs => n % 5000) END,
       now() - interval '30 days', now() - interval '10 days'
FROM generate_series(1, 50000) AS n;
INSERT INTO orchestrator.pauses (task_id, paused_at, actor, resumed_at)
SELECT n, now(), 'ann', CASE WHEN n % 2 = 0 THEN now() END FROM generate_series(503, 100000, 503) AS n;
INSERT INTO orchestrator.firings (task_id, scheduled_for, outcome, reason, claimed_by)
SELECT n, date_trunc('hour', now()) - make_interval(hours => hours, secs => n % 3600), 'skipped', 'overlap', 'beat'
FROM generate_series(1, 50000) AS n, generate_series(1, 4) AS hours;
INSERT INTO orchestrator.schedule_history (task_id, valid_from, valid_until, zone, active)
SELECT n, now() - interval '30 days', now() - interval '10 days', 'UTC', false FROM generate_series(1, 50000) AS n;
"""
NOW: Final = datetime(2026, 7, 1, 12, 0, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def many(postgres_server: PostgresServer, empty: str) -> Iterator[Workbench]:
    """A ledger of many schedules."""
    with Workbench.copy_of(postgres_server, empty) as bench:
        with psycopg.connect(bench.url, autocommit=True) as connection:
            connection.execute(_SCHEDULES)
            connection.execute("VACUUM ANALYZE")
        yield bench


@pytest.fixture
def rota(bench: Workbench) -> Rota:
    """Crawl tasks in every state, all but the last noticed."""
    rota = Rota(bench, NOW)
    for task_id, text in ((1, "hourly"), (2, "whenever"), (3, None), (4, "every 10 minutes"), (5, "每天 03:00")):
        rota.add(task_id, text)
    rota.edit(5, is_active=False)
    rota.go()
    rota.ledger.schedules.pause(4, actor="ann", reason="too many")
    return rota


# --- What is shown -------------------------------------------------------------------------------------------------


def test_schedules_are_listed_by_what_fires_next_and_filtered_by_state(rota: Rota) -> None:
    insights = Insights(rota.bench.database)

    views = insights.page_schedules(limit=10)

    assert [(view.task_id, view.state) for view in views] == [
        (4, ScheduleState.PAUSED),
        (1, ScheduleState.ACTIVE),
        (2, ScheduleState.INVALID),
        (3, ScheduleState.MANUAL),
        (5, ScheduleState.INACTIVE),
    ]
    for view in views:
        assert insights.page_schedules(limit=10, state=view.state) == [view]
        assert insights.schedule(view.task_id) == view
    assert insights.page_schedules(limit=3) == views[:3]
    assert insights.page_schedules(limit=1) == views[:1]
    assert insights.page_schedules(limit=5, state=ScheduleState.ACTIVE, task_id=4) == []
    assert insights.invalid() == 1
    paused, active, invalid, *_ = views
    assert (active.text, active.canonical, active.zone) == ("hourly", "0 * * * *", "UTC")
    assert (active.next_fire_at, active.read_at) == (at("13:00"), NOW)
    assert (paused.paused_by, paused.pause_reason, paused.paused_at) == ("ann", "too many", NOW)
    assert invalid.problem is not None
    assert invalid.problem.startswith('cannot read "whenever"')
    with pytest.raises(ScheduleNotFoundError):
        insights.schedule(9)


def test_a_pause_that_is_over_is_none(rota: Rota) -> None:
    rota.ledger.schedules.resume(4, actor="ann")

    view = Insights(rota.bench.database).schedule(4)

    assert (view.state, view.paused_at, view.paused_by) == (ScheduleState.ACTIVE, None, None)


def test_a_schedule_shows_its_last_slot(rota: Rota) -> None:
    insights = Insights(rota.bench.database)
    assert insights.schedule(1).last_firing is None
    rota.go("12:10")
    rota.go("13:00:01")

    last = insights.schedule(1).last_firing

    assert last is not None
    assert (last.scheduled_for, last.outcome, last.reason) == (at("13:00"), FiringOutcome.STARTED, None)
    assert last.run_id is not None
    run = insights.run(last.run_id)
    assert (run.scheduled_for, run.trigger) == (at("13:00"), Trigger.SCHEDULE)
    assert insights.schedule(4).last_firing == insights.page_firings(FiringFilter(task_id=4), limit=1)[0]


def test_sql_and_the_domain_make_the_same_traceparent(rota: Rota) -> None:
    rota.go("13:00")
    rota.ledger.schedules.backfill(1, [at("11:00")], actor="ann")

    runs = Insights(rota.bench.database).search_runs(RunFilter(task_id=1), limit=10).runs

    assert {run.trigger for run in runs} == {Trigger.SCHEDULE, Trigger.BACKFILL}
    assert [run.traceparent for run in runs] == [traceparent_of(run.id) for run in runs]


def test_firings_are_listed_newest_slot_first_and_filtered(rota: Rota) -> None:
    insights = Insights(rota.bench.database)
    rota.ledger.schedules.resume(4, actor="ann")
    for minute in range(0, 61, 10):
        rota.go(at("12:10") + timedelta(minutes=minute))

    def slots(**wanted: object) -> list[tuple[int, datetime]]:
        return [(each.task_id, each.scheduled_for) for each in insights.page_firings(FiringFilter(**wanted), limit=20)]  # type: ignore[arg-type]

    assert slots()[:3] == [(4, at("13:10")), (4, at("13:00")), (1, at("13:00"))]
    assert slots(task_id=1) == [(1, at("13:00"))]
    assert slots(task_id=4, since=at("12:50"), until=at("13:00")) == [(4, at("13:00")), (4, at("12:50"))]
    assert slots(task_id=4, outcome=FiringOutcome.STARTED) == [(4, at("12:10"))]
    assert len(slots(outcome=FiringOutcome.SKIPPED)) == 6
    assert insights.page_firings(FiringFilter(), limit=1)[0].reason is FiringReason.OVERLAP


def test_every_slot_of_a_range_has_its_record_even_after_a_backfill_within(bench: Workbench) -> None:
    rota = Rota(bench, NOW)
    rota.add(1, "every 10 seconds")
    rota.go()
    rota.go("13:00")
    rota.ledger.schedules.backfill(1, [at("12:05"), at("12:05:10")], actor="ann")
    slots = [at("12:00:40") + timedelta(seconds=10 * number) for number in range(357)]

    records = Insights(bench.database).became_of(1, slots)

    assert list(records) == slots
    assert [slot for slot in slots if records[slot].reason is FiringReason.BACKFILL] == [at("12:05"), at("12:05:10")]
    assert records[at("12:05:20")].scheduled_for == at("12:00:40")
    assert Insights(bench.database).became_of(1, [at("12:00:30"), at("13:00:10")]) == {}
    assert Insights(bench.database).became_of(2, slots) == {}


def test_a_record_covers_its_slot_or_its_range() -> None:
    def record(through: datetime | None) -> FiringView:
        missed = (FiringOutcome.MISSED, FiringReason.SUPERSEDED)
        return FiringView(1, at("12:00"), through, *missed, None, at("13:00"), "beat")

    assert [record(None).covers(at(each)) for each in ("11:59", "12:00", "12:01")] == [False, True, False]
    assert [record(at("12:01")).covers(at(each)) for each in ("11:59", "12:00", "12:01", "12:02")] == [
        False,
        True,
        True,
        False,
    ]


# --- What it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "index", "looked_at"),
    [
        (None, "schedules_next_fire_at_task_id_idx", 80),
        (ScheduleState.ACTIVE, "schedules_next_fire_at_task_id_idx", 80),
        (
            ScheduleState.PAUSED,
            "schedules_pkey",
            11_000,
        ),  # or by the pauses, where fewer schedules are paused than quiet
        (ScheduleState.INVALID, "schedules_problem_idx", 50),
        (ScheduleState.INACTIVE, "schedules_quiet_idx", 200),
        (ScheduleState.MANUAL, "schedules_quiet_idx", 200),
    ],
)
def test_schedules_are_read_off_an_index(
    many: Workbench, state: ScheduleState | None, index: str, looked_at: int
) -> None:
    insights = Insights(many.database)

    explained = Explained(many, lambda: insights.page_schedules(limit=50, state=state))

    explained.assert_by("schedules", index, "schedules_quiet_idx", looked_at=looked_at)
    explained.assert_by("firings", "firings_pkey", looked_at=1)


def test_the_invalid_ones_are_counted_by_their_index(many: Workbench) -> None:
    explained = Explained(many, Insights(many.database).invalid)

    explained.assert_by("schedules", "schedules_problem_idx", looked_at=1_000)


def test_one_schedule_and_its_readings_are_found_by_their_keys(many: Workbench) -> None:
    insights = Insights(many.database)
    now = datetime.now(UTC)

    Explained(many, lambda: insights.schedule(7)).assert_by("schedules", "schedules_pkey", looked_at=1)
    explained = Explained(many, lambda: insights.readings_around(7, now - timedelta(days=20)))
    explained.assert_by("schedules", "schedules_pkey", looked_at=1)
    explained.assert_by("schedule_history", "schedule_history_pkey", looked_at=1)


def test_firings_are_read_off_an_index(many: Workbench) -> None:
    insights = Insights(many.database)
    now = datetime.now(UTC)

    newest = Explained(many, lambda: insights.page_firings(FiringFilter(), limit=50))
    newest.assert_by("firings", "firings_scheduled_for_task_id_idx", looked_at=50)
    earlier = Explained(many, lambda: insights.page_firings(FiringFilter(until=now - timedelta(hours=3)), limit=50))
    earlier.assert_by("firings", "firings_scheduled_for_task_id_idx", looked_at=50)
    of_task = Explained(many, lambda: insights.page_firings(FiringFilter(task_id=7), limit=50))
    of_task.assert_by("firings", "firings_pkey", looked_at=4)


def test_the_record_of_a_slot_is_found_by_its_key(many: Workbench) -> None:
    insights = Insights(many.database)
    slots = [datetime.now(UTC) - timedelta(hours=hours) for hours in range(1_000)]

    explained = Explained(many, lambda: insights.became_of(7, slots))

    explained.assert_by("firings", "firings_pkey", looked_at=1)
