"""Edits are noticed and slots are claimed, on real PostgreSQL and by a clock that moves when a test says so."""

import threading
from datetime import timedelta

import psycopg
import pytest

from orchestrator import schedule as schedule_module
from orchestrator.domain import CrawlArguments, WakeUp, slot_run_id, traceparent_of
from tests.support.ledgers import Workbench
from tests.support.processes import eventually
from tests.support.scheduling import Rota, at

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def rota(bench: Workbench) -> Rota:
    """Beats at 12:00:30."""
    return Rota(bench, at("12:00:30"))


def covers(rota: Rota, slot: str, task_id: int = 1) -> list[str]:
    """What became of a slot: the outcome of its own record, else of each range that holds it."""
    rows = rota.rows("SELECT * FROM firings WHERE task_id = %s", task_id)
    own = [row["outcome"] for row in rows if row["scheduled_for"] == at(slot)]
    return own or [
        row["outcome"] for row in rows if row["through"] and row["scheduled_for"] < at(slot) <= row["through"]
    ]


# --- Firing ------------------------------------------------------------------------------------------------------


def test_a_slot_starts_one_run_by_its_own_id_and_its_wake_up_is_sent(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.go("12:00:59.999")
    assert (rota.firings(), rota.due()) == ([], "12:01")

    rota.go("12:01")
    rota.go("12:01:59")

    run_id = slot_run_id(1, at("12:01"))
    assert (rota.firings(), rota.due()) == ([("12:01", "started", None)], "12:02")
    assert rota.sent == [WakeUp(run_id, CrawlArguments(1), traceparent_of(run_id))]
    run = rota.bench.run(run_id)
    assert (run["kind"], run["state"], run["trigger"], run["task_id"]) == ("crawl", "queued", "schedule", 1)
    assert run["scheduled_for"] == at("12:01")
    assert [event["event"] for event in rota.bench.events(run_id)] == ["run.accepted"]
    assert rota.rows("SELECT * FROM outbox") == []


def test_what_was_due_before_the_first_reading_never_fires(rota: Rota) -> None:
    rota.add(1, "* * * * *", updated_at=at("08:00"))
    rota.add(2, "30 12 * * *", updated_at=at("08:00"))

    rota.go("12:00:30")

    assert (rota.due(1), rota.due(2)) == ("12:01", "12:30")
    assert rota.firings(1) == rota.firings(2) == []


def test_a_slot_that_was_recorded_before_starts_nothing(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.rows(
        "INSERT INTO firings (task_id, scheduled_for, outcome, reason, claimed_by)"
        " VALUES (1, %s, 'skipped', 'paused', 'another')",
        at("12:01"),
    )

    rota.go("12:01")

    assert (rota.firings(), rota.due()) == ([("12:01", "skipped", "paused")], "12:02")
    assert (rota.sent, rota.rows("SELECT * FROM runs")) == ([], [])


# --- One bad schedule, or one odd row, must not hold up the others -----------------------------------------------


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "10000-01-01", "0044-03-15 BC"])
def test_an_updated_at_beyond_what_python_can_hold_stops_nothing(rota: Rota, moment: str) -> None:
    rota.add(1, "* * * * *")
    rota.add(2, "* * * * *")
    rota.bench.application.execute("UPDATE crawl_tasks SET updated_at = %s::timestamptz WHERE id = 2", moment)

    rota.go()
    rota.edit(2, touch=False, schedule="*/2 * * * *")
    rota.go("12:02")

    assert rota.firings(1) == [("12:01", "started", None), ("12:02", "skipped", "overlap")]
    assert (rota.firings(2), rota.due(2)) == ([("12:01–12:02", "skipped", "edited")], "12:04")


@pytest.mark.parametrize("edit", ["correct", "delete", "disable", "nothing"])
def test_a_schedule_whose_zone_has_gone_stops_no_other(rota: Rota, monkeypatch: pytest.MonkeyPatch, edit: str) -> None:
    rota.bench.application.execute("ALTER TABLE crawl_tasks ADD timezone text")
    rota.add(1, "* * * * *", timezone="US/Pacific")
    rota.add(2, "* * * * *")
    rota.go()
    # While nobody is at work the system's zones are renewed, and a slot comes.
    left = schedule_module._zone_names() - {"US/Pacific"}  # noqa: SLF001 -- what the system has
    monkeypatch.setattr(schedule_module, "_zone_names", lambda: left)
    rota.hands.now = at("12:01:10")
    match edit:
        case "correct":
            rota.edit(1, timezone="America/Los_Angeles")
        case "delete":
            rota.delete(1)
        case "disable":
            rota.edit(1, is_active=False)

    rota.go("12:01:20", engine=rota.beat())

    assert rota.firings(2) == [("12:01", "started", None)]
    assert [(slot, outcome) for slot, outcome, _ in rota.firings(1)] == [("12:01", "skipped")]
    assert rota.due(1) == ("12:02" if edit == "correct" else None)


def test_a_slot_that_is_just_over_the_catch_up_window_stops_no_other(rota: Rota) -> None:
    rota.add(1, "0 13 * * *")
    rota.add(2, "0 * * * *")
    rota.go()
    # Less than a second more than a day.
    rota.go("2026-07-02 13:00:00.4")

    assert rota.firings(1) == [
        ("13:00", "missed", "outside_catch_up_window"),
        ("2026-07-02 13:00", "started", None),
    ]
    assert ("2026-07-02 13:00", "skipped", "overlap") in rota.firings(2)


# --- Backfill ------------------------------------------------------------------------------------------------------


def missed_for_hours(rota: Rota, schedule: str) -> None:
    """Have nobody at work from 12:00:30 to 16:00, so that a range is recorded."""
    rota.add(1, schedule)
    rota.go()
    rota.go("16:00:00.5")
    assert rota.firings()[0][2] == "superseded"
    assert "–" in rota.firings()[0][0]


def backfill(rota: Rota, *slots: str) -> int:
    """Start runs for slots; return how many."""
    return len(rota.ledger.schedules.backfill(1, [at(slot) for slot in slots], actor="tester").wake_ups)


def test_backfill_starts_what_has_no_run_and_leaves_the_rest(rota: Rota) -> None:
    missed_for_hours(rota, "* * * * *")
    assert covers(rota, "15:59") == ["started"]

    assert backfill(rota, "12:01", "12:02", "12:30", "15:59") == 3
    assert backfill(rota, "12:01", "12:02", "12:30", "15:59") == 0

    started = [slot for slot, outcome, reason in rota.firings() if (outcome, reason) == ("started", "backfill")]
    assert started == ["12:01", "12:02", "12:30"]
    assert covers(rota, "12:03") == covers(rota, "12:31") == covers(rota, "14:19") == ["missed"]
    assert covers(rota, "15:59") == ["started"]
    run = rota.bench.run(slot_run_id(1, at("12:30")))
    assert (run["trigger"], run["scheduled_for"]) == ("backfill", at("12:30"))


@pytest.mark.parametrize(
    "calls",
    [
        [["12:00:31", "12:00:32"]],
        [["12:00:32"], ["12:00:31"]],
        [["12:00:31"], ["12:00:32"]],
        [["12:00:33"], ["12:00:32"], ["12:00:31"]],
    ],
)
def test_backfill_of_neighbouring_seconds_keeps_the_rest_of_the_range(rota: Rota, calls: list[list[str]]) -> None:
    missed_for_hours(rota, "every 1 second")

    for slots in calls:
        assert backfill(rota, *slots) == len(slots)

    wanted = {slot for slots in calls for slot in slots}
    assert {slot for slot in ("12:00:31", "12:00:32", "12:00:33") if covers(rota, slot) == ["started"]} == wanted
    assert covers(rota, "12:00:34") == covers(rota, "14:00:00") == covers(rota, "15:58:20") == ["missed"]


@pytest.mark.parametrize("slots", [["12:01"], ["12:01", "12:02"], ["12:01", "12:40", "15:59"]])
def test_what_was_backfilled_before_it_was_claimed_hides_no_other_slot(rota: Rota, slots: list[str]) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("16:00:30")
    assert backfill(rota, *slots) == len(slots)

    rota.go()

    first, last = at("12:01"), at("16:00")
    minutes = [f"{first + timedelta(minutes=m):%H:%M}" for m in range(int((last - first).total_seconds()) // 60 + 1)]
    assert {slot: len(covers(rota, slot)) for slot in minutes} == dict.fromkeys(minutes, 1)
    assert {slot for slot in slots if covers(rota, slot) == ["started"]} == set(slots)


def test_the_same_slot_twice_in_a_backfill_is_one(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()

    assert backfill(rota, "11:00", "11:00") == 1


def test_a_backfill_beside_a_claim_keeps_the_range_that_the_claim_records(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("16:00:30")
    counts: list[int] = []
    backfilling = threading.Thread(target=lambda: counts.append(backfill(rota, "12:01")))

    # A claim that has recorded a range and not committed yet.
    with psycopg.connect(rota.bench.url, options=f"-c search_path={rota.bench.schema}") as claim:
        claim.execute("SELECT 1 FROM schedules WHERE task_id = 1 FOR NO KEY UPDATE")
        claim.execute(
            "INSERT INTO firings (task_id, scheduled_for, through, outcome, reason, claimed_by)"
            " VALUES (1, %s, %s, 'missed', 'superseded', 'another')",
            (at("12:01"), at("15:59")),
        )
        claim.execute("UPDATE schedules SET next_fire_at = %s", (at("16:01"),))
        backfilling.start()
        waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        eventually(lambda: rota.rows(waiting) or not backfilling.is_alive(), within=10, what="the backfill waits")
    backfilling.join(10)

    assert counts == [1]
    assert covers(rota, "12:01") == ["started"]
    assert covers(rota, "12:02") == covers(rota, "15:59") == ["missed"]


def test_slots_that_come_again_after_the_clock_was_set_back_hide_no_other(rota: Rota) -> None:
    rota.add(
        1,
        "* * * * *",
    )
    rota.go()
    rota.go("12:01")
    rota.hands.now = at("12:00:10")
    rota.edit(1, schedule="*/2 * * * *")
    rota.go()
    rota.edit(1, schedule="* * * * *")
    rota.go()
    assert rota.due() == "12:01"

    rota.go("16:00:30")

    assert covers(rota, "12:01") == ["started"]
    assert covers(rota, "12:02") == covers(rota, "14:00") == ["missed"]
