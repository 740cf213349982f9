"""What is over and old is deleted, batch by batch; nothing else is, whatever dies in between."""

from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import psycopg
import pytest

from orchestrator.domain import CrawlArguments, Node, RunState, slot_run_id
from orchestrator.errors import DatabaseUnavailableError, IllegalTransitionError, QueueMissingError, RunNotFoundError
from orchestrator.explain import Verdict, why
from orchestrator.insights import Insights
from orchestrator.ledger.requests import Reply, Request
from orchestrator.pulse import Pulse
from tests.support.ledgers import Workbench
from tests.support.scheduling import Rota, at

pytestmark = pytest.mark.timeout(120)

DAY: Final = 86_400.0
TABLES: Final = ("runs", "dispatches", "attempts", "run_events")


def counts(bench: Workbench) -> dict[str, int]:
    (row,) = bench.query(
        "SELECT (SELECT count(*) FROM runs) AS runs, (SELECT count(*) FROM dispatches) AS dispatches,"
        " (SELECT count(*) FROM attempts) AS attempts, (SELECT count(*) FROM run_events) AS run_events,"
        " (SELECT count(*) FROM firings) AS firings, (SELECT count(*) FROM audit_events) AS audit_events,"
        " (SELECT count(*) FROM schedule_history) AS schedule_history,"
        " (SELECT count(*) FROM api_requests) AS api_requests"
    )
    return row


def assert_no_orphans(bench: Workbench) -> None:
    for row in bench.query(
        "SELECT count(*) FROM dispatches WHERE run_id NOT IN (SELECT id FROM runs) UNION ALL"
        " SELECT count(*) FROM run_events WHERE run_id NOT IN (SELECT id FROM runs)"
    ):
        assert row["count"] == 0


def finished_crawl(bench: Workbench, sources: int) -> UUID:
    run_id = bench.planned(sources)
    bench.publish(run_id, limit=sources)
    assert bench.ledger.crawls.complete(run_id)
    return run_id


def forget(bench: Workbench, *, days: float | None = 30.0, batch: int = 100) -> int:
    """Delete until there is nothing left to delete; return how many rounds that took."""
    rounds = 1
    while bench.ledger.retention.forget(days, batch):
        rounds += 1
        assert rounds < 100
    return rounds


def test_runs_that_are_over_and_old_go_with_all_their_rows(bench: Workbench) -> None:
    old, young = finished_crawl(bench, 10), finished_crawl(bench, 10)
    analysis = bench.accept_analysis()
    assert bench.begin_attempt(analysis) is not None
    bench.ledger.runs.cancel(analysis, actor="ann")
    bench.wake()
    for run_id, days in ((old, 31), (analysis, 31), (young, 29)):
        bench.rewind(run_id, days * DAY)

    forget(bench)

    assert [row["id"] for row in bench.query("SELECT id FROM runs")] == [young]
    assert {name: counts(bench)[name] for name in TABLES} == {
        "runs": 1,
        "dispatches": 10,
        "attempts": 0,
        "run_events": len(bench.events(young)),
    }
    with pytest.raises(RunNotFoundError):
        Insights(bench.database).run(old)


def test_without_a_number_of_days_everything_is_kept(bench: Workbench) -> None:
    bench.rewind(finished_crawl(bench, 3), 10_000 * DAY)
    before = counts(bench)

    assert bench.ledger.retention.forget(None, 100) is False

    assert counts(bench) == before


def test_nothing_unfinished_goes_however_old(bench: Workbench) -> None:
    queued, running, retrying = bench.accept(), bench.planned(5), bench.planned(5)
    bench.ledger.crawls.postpone(retrying, QueueMissingError("there is no such queue"))
    # It is canceled, and its rows are not all skipped yet.
    canceled = bench.planned(5)
    with bench.ledger.crawls.pending_batch(canceled, limit=2, after=0):
        bench.ledger.runs.cancel(canceled, actor="ann")
    for run_id in (queued, running, retrying, canceled):
        bench.rewind(run_id, 1_000 * DAY)
    before = counts(bench)

    forget(bench)

    assert counts(bench) == before


def test_a_run_that_was_revived_is_kept(bench: Workbench) -> None:
    run_id = bench.accept()
    bench.ledger.crawls.begin(run_id)
    bench.ledger.runs.fail(run_id, QueueMissingError("gone"))
    bench.rewind(run_id, 31 * DAY)
    bench.ledger.runs.revive(run_id, actor="ann")

    forget(bench)

    assert bench.state(run_id) == RunState.QUEUED


def test_a_large_plan_goes_in_several_batches_each_of_which_may_be_the_last(bench: Workbench) -> None:
    run_id = bench.planned(250)
    bench.publish(run_id, limit=50)
    bench.ledger.runs.fail(run_id, QueueMissingError("gone"))
    bench.rewind(run_id, 31 * DAY)
    left = []

    # Each call is what a process did before it died.
    while bench.ledger.retention.forget(30, 100):
        left.append(counts(bench)["dispatches"])
        assert_no_orphans(bench)
        with pytest.raises(IllegalTransitionError, match="being deleted"):
            bench.ledger.runs.revive(run_id, actor="ann")

    assert left == [150, 50]
    assert {name: counts(bench)[name] for name in TABLES} == dict.fromkeys(TABLES, 0)


def test_many_runs_go_in_several_batches_the_oldest_first(bench: Workbench) -> None:
    runs = [finished_crawl(bench, 2) for _ in range(7)]
    for age, run_id in enumerate(runs):
        bench.rewind(run_id, (31 + age) * DAY)

    assert bench.ledger.retention.forget(30, 15) is True
    assert {row["id"] for row in bench.query("SELECT id FROM runs")} == set(runs[:4])
    assert forget(bench, batch=15) == 2

    assert {name: counts(bench)[name] for name in TABLES} == dict.fromkeys(TABLES, 0)


def test_a_crash_in_a_batch_undoes_it_and_the_next_one_does_it_again(bench: Workbench) -> None:
    run_id = finished_crawl(bench, 20)
    bench.rewind(run_id, 31 * DAY)
    before = counts(bench)
    with psycopg.connect(bench.url, autocommit=True) as connection:
        # The session dies after the dispatches and the events are deleted, before the run is.
        connection.execute(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " PERFORM pg_terminate_backend(pg_backend_pid()); RETURN OLD; END $$;"
            " CREATE TRIGGER dies BEFORE DELETE ON orchestrator.runs FOR EACH ROW EXECUTE FUNCTION die()"
        )
        with pytest.raises(DatabaseUnavailableError):
            bench.ledger.retention.forget(30, 100)
        assert counts(bench) == before
        connection.execute("DROP TRIGGER dies ON orchestrator.runs")

    forget(bench)

    assert {name: counts(bench)[name] for name in TABLES} == dict.fromkeys(TABLES, 0)


def test_one_process_at_a_time_deletes_and_nobody_waits_for_a_run_in_use(bench: Workbench) -> None:
    held, free = finished_crawl(bench, 3), finished_crawl(bench, 3)
    for run_id in (held, free):
        bench.rewind(run_id, 31 * DAY)
    with psycopg.connect(bench.url) as other:
        other.execute("SELECT pg_advisory_xact_lock(hashtextextended('orchestrator:orchestrator:retention', 0))")
        assert bench.ledger.retention.forget(30, 100) is False
        assert counts(bench)["runs"] == 2
        other.rollback()
        other.execute("SELECT 1 FROM orchestrator.runs WHERE id = %s FOR UPDATE", [held])
        bench.ledger.retention.forget(30, 100)
        assert [row["id"] for row in bench.query("SELECT id FROM runs")] == [held]


def test_a_backlog_of_many_batches_goes_evenly_and_runs_with_their_firings(bench: Workbench) -> None:
    bench.query(
        "INSERT INTO runs (id, kind, state, trigger, task_id, scheduled_for, traceparent, created_at, finished_at)"
        " SELECT lpad(to_hex(n), 32, '0')::uuid, 'crawl', 'succeeded', 'schedule', n % 7, slot, 'x', slot, slot"
        " FROM generate_series(1, 500) AS n, LATERAL (SELECT now() - make_interval(days => 31, secs => n) AS slot) AS x"
    )
    bench.query(
        "INSERT INTO firings (task_id, scheduled_for, outcome, run_id, claimed_at, claimed_by)"
        " SELECT task_id, scheduled_for, 'started', id, created_at, 'beat' FROM runs"
    )
    bench.query(
        "INSERT INTO firings (task_id, scheduled_for, outcome, reason, claimed_at, claimed_by)"
        " SELECT 8, scheduled_for, CASE WHEN task_id = 0 THEN 'missed' ELSE 'skipped' END, 'x', created_at, 'beat'"
        " FROM runs LIMIT 250"
    )
    started, others = [500], [250]

    more = True
    while more:
        more = bench.ledger.retention.forget(30, 100)
        (left,) = bench.query(
            "SELECT count(run_id) AS started, count(*) - count(run_id) AS others, (SELECT count(*) FROM runs) AS runs,"
            " count(*) FILTER (WHERE run_id NOT IN (SELECT id FROM runs)) AS orphans FROM firings"
        )
        assert (left["started"], left["orphans"]) == (left["runs"], 0)
        started.append(left["started"])
        others.append(left["others"])

    # A fifth of a batch are runs; the last call finds that there is nothing left.
    assert started == [*range(500, 0, -20), 0, 0]
    assert others[:4] == [250, 150, 50, 0]


def test_a_slot_that_a_backfill_is_starting_is_not_forgotten_nor_waited_for(bench: Workbench) -> None:
    slot = datetime.now(UTC).replace(microsecond=0) - timedelta(days=40)
    bench.query("INSERT INTO schedules VALUES (1, '* * * * *', 'UTC', true, NULL, NULL, '', '* * * * *')")
    bench.query("INSERT INTO firings VALUES (1, %s, NULL, 'missed', 'too_late', NULL, %s, 'beat')", slot, slot)

    with bench.database.transaction() as connection:
        bench.ledger.schedules.backfill(1, [slot], actor="ann", within=connection)
        forget(bench)
    forget(bench)

    assert [row["run_id"] for row in bench.query("SELECT * FROM firings")] == [slot_run_id(1, slot)]


def test_a_firing_stays_as_long_as_its_run(bench: Workbench) -> None:
    now = datetime.now(UTC)
    slots = {name: now - timedelta(days=days) for name, days in (("gone", 40), ("kept", 35), ("young", 20))}
    kept, gone = (slot_run_id(1, slots[name]) for name in ("kept", "gone"))
    for run in (kept, gone):
        bench.accept(CrawlArguments(1), run_id=run)
    bench.ledger.crawls.begin(gone)
    bench.ledger.runs.fail(gone, QueueMissingError("gone"))
    bench.query("UPDATE runs SET scheduled_for = %s WHERE id = %s", slots["gone"], gone)
    for run, days in ((kept, 35), (gone, 40)):
        bench.query(
            "UPDATE runs SET created_at = created_at - %s, finished_at = finished_at - %s WHERE id = %s",
            *[timedelta(days=days)] * 2,
            run,
        )
    for slot, outcome, reason, run_id, through, claimed in (
        (slots["gone"], "started", None, gone, None, 40),
        (slots["kept"], "started", None, kept, None, 35),
        (slots["young"], "skipped", "overlap", None, None, 20),
        (now - timedelta(days=50), "skipped", "paused", None, slots["young"], 50),
        (now - timedelta(days=60), "skipped", "paused", None, now - timedelta(days=59), 59),
        (now - timedelta(days=70), "missed", "too_late", None, None, 1),
    ):
        bench.query(
            "INSERT INTO firings (task_id, scheduled_for, outcome, reason, run_id, through, claimed_at, claimed_by)"
            " VALUES (1, %s, %s, %s, %s, %s, now() - make_interval(days => %s), 'beat')",
            slot,
            outcome,
            reason,
            run_id,
            through,
            claimed,
        )

    forget(bench, batch=1)

    left = [round((now - row["scheduled_for"]).days) for row in bench.query("SELECT * FROM firings ORDER BY 2")]
    assert left == [70, 50, 35, 20]


def test_readings_and_the_audit_log_go_too_and_why_says_that_they_did(bench: Workbench) -> None:
    rota = Rota(bench, at("12:00:30"))
    rota.add(1, "hourly")
    rota.go()
    rota.edit(1, schedule="every 2 hours")
    rota.go("12:30")
    assert counts(bench)["schedule_history"] == 1
    for days in (31, 31, 29):
        bench.query(
            "INSERT INTO audit_events (at, actor, action) VALUES (now() - make_interval(days => %s), 'ann', 'pause')",
            days,
        )

    forget(bench, batch=1)

    assert (counts(bench)["audit_events"], counts(bench)["schedule_history"]) == (1, 0)
    answer = why(Insights(bench.database), rota.timetable, 1, at("12:10"), max_queued=1)
    assert answer.verdict is Verdict.NOT_RECORDED
    assert answer.sentences[0].endswith("the ledger does not reach back so far any more.")


def test_answers_to_requests_are_forgotten_after_a_day_whatever_else_is_kept(bench: Workbench) -> None:
    for key in ("old", "young"):
        bench.ledger.requests.once(Request("ann", key, b"x"), lambda _: Reply(202, {}))
    bench.query("UPDATE api_requests SET created_at = now() - interval '25 hours' WHERE key = 'old'")

    forget(bench, days=None)

    assert [row["key"] for row in bench.query("SELECT key FROM api_requests")] == ["young"]


def test_the_pulse_deletes_until_nothing_is_left_and_then_looks_again_in_a_minute(bench: Workbench) -> None:
    for _ in range(6):
        bench.rewind(finished_crawl(bench, 2), 31 * DAY)
    asked = []

    def some() -> bool:
        asked.append(bench.ledger.retention.forget(30, 10))
        return asked[-1]

    pulse = Pulse(bench.ledger, bench.woken.extend, lambda: Node("w1@test", "worker"), forget=some)
    while not asked or asked[-1]:
        pulse.once()
    pulse.once()

    assert counts(bench)["runs"] == 0
    assert asked == [True, True, True, False]


def test_a_pulse_that_may_not_delete_wakes_all_the_same(bench: Workbench) -> None:
    def refused() -> bool:
        raise DatabaseUnavailableError("no room")

    pulse = Pulse(bench.ledger, bench.woken.extend, lambda: Node("w1@test", "worker"), forget=refused)
    pulse.once()
    due = bench.accept(delivered=False)
    bench.rewind(due, 60)

    pulse.once()

    assert [wake_up.run_id for wake_up in bench.woken] == [due]
