"""Edits are noticed and slots are claimed, on real PostgreSQL and by a clock that moves when a test says so."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from itertools import count
from typing import Any, Final, LiteralString
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from orchestrator import firing as firing_module
from orchestrator import schedule as schedule_module
from orchestrator.catalog import Catalog
from orchestrator.db import Database
from orchestrator.domain import CrawlArguments, DueSchedule, WakeUp, slot_run_id, traceparent_of
from orchestrator.errors import BrokerUnreachableError, IllegalTransitionError, ScheduleNotFoundError
from orchestrator.firing import FiringEngine
from orchestrator.ledger import Ledger
from orchestrator.ledger import schedules as schedules_module
from orchestrator.ledger.schedules import Look
from orchestrator.schedule import parse
from orchestrator.settings import CatalogSettings
from orchestrator.timetable import Settlement, Timetable
from tests.support.application import migrated
from tests.support.ledgers import Workbench
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually, free_port
from tests.support.scheduling import Rota, at, span

pytestmark = pytest.mark.timeout(120)

_NUMBERS: Final = count(1)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """How busy the machine is decides nothing: neither how often engines look, nor how much they do in a round."""
    monkeypatch.setattr(firing_module, "SHARE", 1e9)
    monkeypatch.setattr(firing_module, "_BUDGET", 3_600.0)


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
    rota.hands.move(1)
    rota.edit(1, schedule="* * * * *")
    rota.go()
    assert rota.due() == "12:01"

    rota.go("16:00:30")

    assert covers(rota, "12:01") == ["started"]
    assert covers(rota, "12:02") == covers(rota, "14:00") == ["missed"]


# --- Edits: what was due never fires, and the reading that it was due by is kept ---------------------------------

NEVER: Final = 1e9  # seconds


def with_options(rota: Rota) -> None:
    """Give the application's table the optional columns."""
    rota.bench.application.execute(
        "ALTER TABLE crawl_tasks ADD timezone text, ADD misfire_policy text, ADD overlap_policy text"
    )


@contextmanager
def another_process_looks(rota: Rota) -> Iterator[None]:
    """Somebody else looks for edits, and is frozen in the midst of it."""
    with psycopg.connect(rota.bench.url, options=f"-c search_path={rota.bench.schema}") as other:
        other.execute("SELECT * FROM catalog_watch FOR UPDATE")
        yield


LONG_AGO: Final = at("08:00")


def begin(rota: Rota) -> None:
    """Have everything read, by a sweep and by updated_at."""
    rota.go()
    notice(rota, "updates")


def look_around(rota: Rota, to: str) -> None:
    """Do rounds until it was time for each kind of look."""
    rota.go(to)
    rota.go()


def notice(rota: Rota, how: str) -> None:
    """Have an edit noticed in one way and in no other."""
    if how == "claim":
        with another_process_looks(rota):
            rota.go()
        return
    every, sweep_every = (0, NEVER) if how == "updates" else (NEVER, 0)
    look = rota.ledger.schedules.look(rota.timetable, every=every, sweep_every=sweep_every, by="beat@test")
    assert (look.kind, look.more) == (how, False)


HOW: Final = ("updates", "sweep", "claim")
ANOTHER: Final[dict[str, tuple[dict[str, object], str, str | None]]] = {
    "text": ({"schedule": "*/5 * * * *"}, "edited", "12:05"),
    "time zone": ({"timezone": "Asia/Kathmandu"}, "edited", "12:02"),
    "disabled": ({"is_active": False}, "disabled", None),
    "no text any more": ({"schedule": None}, "edited", None),
    "blank text": ({"schedule": " "}, "edited", None),
    "unreadable text": ({"schedule": "fortnightly"}, "invalid", None),
    "unreadable text, disabled": ({"schedule": "fortnightly", "is_active": False}, "invalid", None),
    "no such time zone": ({"timezone": "Asia/Shangai"}, "invalid", None),
    "no such misfire policy": ({"misfire_policy": "never"}, "invalid", None),
    "no such overlap policy": ({"overlap_policy": "queue"}, "invalid", None),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("edit", ANOTHER)
def test_an_edit_skips_what_was_due_and_keeps_the_reading_that_it_was_due_by(rota: Rota, edit: str, how: str) -> None:
    columns, reason, due = ANOTHER[edit]
    with_options(rota)
    rota.add(1, "* * * * *")
    rota.add(2, "* * * * *")
    begin(rota)
    rota.hands.now = at("12:01:10")
    rota.edit(1, touch=how == "updates", **columns)
    rota.hands.now = at("12:01:20")

    notice(rota, how)

    assert (rota.firings(), rota.due()) == ([("12:01", "skipped", reason)], due)
    reading = rota.schedule()
    assert reading is not None
    said = {"schedule": "* * * * *", "timezone": "UTC", "is_active": True} | columns
    text = str(said["schedule"] or "").strip() or None
    assert (reading["text"], reading["zone"], reading["active"]) == (text, said["timezone"], said["is_active"])
    assert (reading["problem"] is not None, reading["read_at"]) == (reason == "invalid", rota.hands.now)
    assert rota.rows("SELECT * FROM schedule_history") == [
        {
            "task_id": 1,
            "valid_from": at("12:00:30"),
            "valid_until": at("12:01:20"),
            "text": "* * * * *",
            "zone": "UTC",
            "active": True,
            "canonical": "* * * * *",
            "problem": None,
        }
    ]

    rota.go("12:05")

    assert rota.rows("SELECT * FROM runs WHERE task_id = 1 AND scheduled_for < %s", at("12:02")) == []
    assert (len(rota.firings()) > 1) == (due is not None)
    assert ("12:01", "started", None) in rota.firings(2) or how != "claim"


@pytest.mark.parametrize("how", ["sweep", "claim"])
def test_a_deleted_task_skips_what_was_due_and_is_forgotten(rota: Rota, how: str) -> None:
    rota.add(1, "* * * * *")
    rota.add(2, "0 0 * * *")
    begin(rota)
    rota.hands.now = at("12:01:10")
    rota.delete(1)

    notice(rota, "updates")
    assert rota.due() == "12:01", "no row says that it was deleted"
    notice(rota, how)

    assert (rota.firings(), rota.schedule()) == ([("12:01", "skipped", "deleted")], None)
    (past,) = rota.rows("SELECT * FROM schedule_history")
    assert (past["task_id"], past["valid_from"], past["valid_until"]) == (1, at("12:00:30"), at("12:01:10"))
    assert rota.due(2) == "2026-07-02 00:00"
    assert rota.rows("SELECT * FROM runs") == []


@pytest.mark.parametrize("how", HOW)
def test_many_slots_that_were_due_are_skipped_as_a_range(rota: Rota, how: str) -> None:
    rota.add(1, "* * * * *")
    begin(rota)
    rota.hands.now = at("12:04:10")
    rota.edit(1, touch=how == "updates", schedule="0 * * * *")

    notice(rota, how)

    assert (rota.firings(), rota.due()) == ([("12:01–12:04", "skipped", "edited")], "13:00")


def test_each_reading_is_kept_with_the_time_that_it_stood(rota: Rota) -> None:
    rota.add(1, "0 1 * * *")
    rota.go("12:00:30")
    for moment, schedule in (("12:10", "0 2 * * *"), ("12:20", "nonsense"), ("12:30", None), ("12:40", "0 3 * * *")):
        rota.hands.now = at(moment)
        rota.edit(1, schedule=schedule)
        rota.go()

    history = rota.rows("SELECT * FROM schedule_history ORDER BY valid_from")
    assert [(span(row["valid_from"], row["valid_until"]), row["text"], row["canonical"]) for row in history] == [
        ("12:00:30–12:10", "0 1 * * *", "0 1 * * *"),
        ("12:10–12:20", "0 2 * * *", "0 2 * * *"),
        ("12:20–12:30", "nonsense", None),
        ("12:30–12:40", None, None),
    ]
    assert history[2]["problem"].startswith('cannot read "nonsense"')
    assert (rota.due(), rota.firings()) == ("2026-07-02 03:00", [])


# --- An edit never fires retroactively -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["updates", "sweep"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"schedule": "0 0 * * *"}, {"schedule": "*/5 * * * *"}),
        ({"schedule": "*/5 * * * *", "is_active": False}, {"is_active": True}),
        ({"schedule": None}, {"schedule": "*/5 * * * *"}),
        ({"schedule": "nonsense"}, {"schedule": "*/5 * * * *"}),
        ({"schedule": "5 14 * * *", "timezone": "Asia/Shanghai"}, {"timezone": "Europe/Berlin"}),
    ],
)
def test_what_came_before_an_edit_was_noticed_never_fires(
    rota: Rota, before: dict[str, Any], after: dict[str, Any], how: str
) -> None:
    with_options(rota)
    rota.add(1, None)
    rota.edit(1, **before)
    begin(rota)
    # 12:05 comes between the edit and its being noticed.
    rota.hands.now = at("12:04:50")
    rota.edit(1, touch=how == "updates", **after)
    rota.hands.now = at("12:05:10")
    notice(rota, how)
    due = rota.due()

    rota.go("12:09:59")

    assert rota.firings() == []
    assert rota.due() == due == ("12:10" if "timezone" not in after else "2026-07-02 12:05")
    rota.go("12:10" if "timezone" not in after else "2026-07-02 12:05")
    assert rota.firings() == [(due, "started", None)]


def test_a_task_that_is_inserted_again_begins_anew(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.delete(1)
    rota.go("12:01:50")
    rota.hands.now = at("12:03:50")
    rota.add(1, "* * * * *")

    rota.go("12:05:10")

    assert rota.firings() == [("12:01", "skipped", "deleted")]
    assert rota.due() == "12:06"


@pytest.mark.parametrize("how", HOW)
def test_a_row_that_was_replaced_by_an_equal_one_goes_on(rota: Rota, how: str) -> None:
    rota.add(1, "* * * * *")
    begin(rota)
    rota.hands.now = at("12:01:10")
    rota.delete(1)
    rota.add(1, "* * * * *")

    notice(rota, how)
    rota.go()

    assert (rota.firings(), rota.due()) == ([("12:01", "started", None)], "12:02")
    assert rota.rows("SELECT * FROM schedule_history") == []


def test_disabling_is_exact_for_every_slot_after_its_commit(rota: Rota) -> None:
    with_options(rota)
    rota.add(1, "every 1 second", overlap_policy="allow")
    rota.go()
    with another_process_looks(rota):
        for second in range(31, 41):
            rota.go(f"12:00:{second}.25")
        rota.hands.now = at("12:00:40.5")
        rota.edit(1, touch=False, is_active=False)
        for second in range(40, 46):
            rota.go(f"12:00:{second}.75")

    started = [slot for slot, outcome, _ in rota.firings() if outcome == "started"]
    assert started == [f"12:00:{second}" for second in range(31, 41)]
    assert rota.firings()[10:] == [("12:00:41", "skipped", "disabled")]
    # What was claimed goes on.
    assert {row["state"] for row in rota.rows("SELECT * FROM runs")} == {"queued"}
    assert len(rota.sent) == 10


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "columns",
    [
        {"schedule": "每日"},
        {"schedule": "0 0 * * *"},
        {"schedule": "@daily"},
        {"timezone": "UTC"},
        {"misfire_policy": "all"},
        {"overlap_policy": "ALLOW"},
    ],
)
def test_other_words_or_another_policy_leave_what_is_due(rota: Rota, columns: dict[str, object], how: str) -> None:
    with_options(rota)
    rota.add(1, "daily")
    rota.hands.now = at("2026-07-01 23:59:30")
    begin(rota)
    rota.hands.now = at("2026-07-02 00:00:10")
    rota.edit(1, touch=how == "updates", **columns)

    notice(rota, how)
    reading = rota.schedule()
    rota.go("2026-07-02 00:00:20")

    assert reading is not None
    assert reading["text"] == columns.get("schedule", "daily")
    assert (reading["misfire_policy"], reading["overlap_policy"]) == (
        columns.get("misfire_policy"),
        columns.get("overlap_policy"),
    )
    assert reading["read_at"] == at("2026-07-01 23:59:30")
    assert rota.rows("SELECT * FROM schedule_history") == []
    assert (rota.firings(), rota.due()) == ([("2026-07-02 00:00", "started", None)], "2026-07-03 00:00")


def test_a_chain_of_other_words_changes_nothing(rota: Rota) -> None:
    rota.add(1, "daily")
    rota.go("2026-07-01 23:59:30")
    for second, words in enumerate(["每日", "0 0 * * *", "@daily", "每天 00:00", "daily"]):
        rota.hands.now = at(f"2026-07-01 23:59:{40 + 2 * second}")
        rota.edit(1, schedule=words)
        rota.go()
        assert (rota.schedule() or {})["text"] == words

    rota.go("2026-07-02 00:00:00")

    assert rota.firings() == [("2026-07-02 00:00", "started", None)]
    assert rota.rows("SELECT * FROM schedule_history") == []


def test_a_claim_goes_by_the_policies_of_the_moment(rota: Rota) -> None:
    with_options(rota)
    for task_id in (1, 2, 3):
        rota.add(task_id, "* * * * *", misfire_policy="skip", overlap_policy="skip")
    rota.go()
    rota.hands.now = at("12:05:30")
    rota.edit(1, touch=False, misfire_policy="all", overlap_policy="allow")
    rota.edit(2, touch=False, misfire_policy=None)

    with another_process_looks(rota):
        rota.go()

    assert rota.firings(1) == [
        *((f"12:0{minute}", "started", "caught_up") for minute in range(1, 5)),
        ("12:05", "started", None),
    ]
    assert rota.firings(2) == [
        *((f"12:0{minute}", "missed", "superseded") for minute in range(1, 4)),
        ("12:04", "started", "caught_up"),
        ("12:05", "skipped", "overlap"),
    ]
    assert rota.firings(3) == [
        *((f"12:0{minute}", "missed", "too_late") for minute in range(1, 5)),
        ("12:05", "started", None),
    ]


# --- Looking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noted", "noticed"), [("12:00:31", True), ("12:00:29", False)])
def test_a_look_reaches_back_for_edits_that_were_committed_late(rota: Rota, noted: str, noticed: bool) -> None:  # noqa: FBT001 -- a parameter
    rota.add(1, "0 0 * * *")
    begin(rota)
    rota.hands.now = at("12:01:30")
    notice(rota, "updates")
    # Of a transaction that noted its time and was committed after that look.
    rota.edit(1, touch=False, updated_at=at(noted), schedule="0 1 * * *")
    rota.hands.now = at("12:01:31")

    notice(rota, "updates")

    assert rota.due() == ("2026-07-02 01:00" if noticed else "2026-07-02 00:00")


def test_edits_are_noticed_after_the_clock_was_set_back(rota: Rota) -> None:
    rota.add(1, "0 0 * * *")
    rota.go("14:00:00")
    rota.hands.now = at("12:30:00")
    rota.edit(1, schedule="0 1 * * *")
    rota.go()
    assert rota.due() == "2026-07-02 01:00"

    rota.hands.move(1)
    rota.edit(1, touch=False, schedule="0 2 * * *")
    rota.go(engine=rota.beat())
    rota.hands.move(5)
    rota.go(engine=rota.beat())

    assert rota.due() == "2026-07-02 02:00"


def test_who_finds_another_process_looking_leaves_it_to_that_one_and_claims(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01:00")
    rota.add(2, "* * * * *")

    with another_process_looks(rota):
        assert rota.ledger.schedules.look(rota.timetable, every=0, sweep_every=0, by="beat@test") == Look()
        rota.go()

    assert rota.firings(1) == [("12:01", "started", None)]
    assert rota.schedule(2) is None
    rota.go("12:01:02")
    assert rota.due(2) == "12:02"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of three rows at a time."""
    monkeypatch.setattr(schedules_module, "CHUNK", 3)


def look(rota: Rota, *, every: float = NEVER, sweep_every: float = 5) -> Look:
    """Look once, as any process may."""
    return rota.ledger.schedules.look(Timetable(), every=every, sweep_every=sweep_every, by="another")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 7])
def test_a_sweep_of_many_chunks_finds_every_row_and_every_deletion(rota: Rota, count: int) -> None:
    ids = [*range(10, 10 * count + 1, 10)]
    for task_id in ids:
        rota.add(task_id, "0 0 * * *", updated_at=LONG_AGO)
    rota.go()
    assert [row["task_id"] for row in rota.rows("SELECT task_id FROM schedules ORDER BY 1")] == ids

    rota.hands.now = at("12:02")
    gone, left = ids[-3:], ids[:-3]
    for task_id in gone:
        rota.delete(task_id)
    for task_id in left:
        rota.edit(task_id, touch=False, schedule="0 1 * * *")
    rota.add(1, "0 2 * * *", updated_at=LONG_AGO)
    rota.add(1_000, "0 2 * * *", updated_at=LONG_AGO)
    look_around(rota, "12:02")

    rows = rota.rows("SELECT task_id, text FROM schedules ORDER BY 1")
    assert [(row["task_id"], row["text"]) for row in rows] == [
        (1, "0 2 * * *"),
        *((task_id, "0 1 * * *") for task_id in left),
        (1_000, "0 2 * * *"),
    ]


@pytest.mark.usefixtures("small_chunks")
def test_a_sweep_that_was_interrupted_is_continued_by_another_process(rota: Rota) -> None:
    for task_id in range(1, 9):
        rota.add(task_id, "0 0 * * *", updated_at=LONG_AGO)
    begin(rota)
    rota.hands.now = at("12:02")
    for task_id in range(1, 9):
        rota.edit(task_id, touch=False, schedule="0 1 * * *")

    assert look(rota)[:3] == ("sweep", True, True)
    read = "SELECT task_id FROM schedules WHERE text = '0 1 * * *' ORDER BY 1"
    assert [row["task_id"] for row in rota.rows(read)] == [1, 2, 3]
    # Whoever swept has died. Meanwhile a row that the sweep has passed changes once more, and one before it.
    rota.edit(2, touch=False, schedule="0 2 * * *")
    rota.hands.now = at("12:02:01")
    assert look(rota).more
    assert [row["task_id"] for row in rota.rows(read)] == [1, 2, 3, 4, 5, 6]
    # Looks by updated_at come in between, and say that there is more to sweep.
    rota.edit(7, schedule="0 3 * * *")
    assert look(rota, every=0)[:3] == ("updates", True, True)
    assert rota.due(7) == "2026-07-02 03:00"
    assert look(rota)[:3] == ("sweep", False, True)
    assert [row["task_id"] for row in rota.rows(read)] == [1, 2, 3, 4, 5, 6, 8]
    (watch,) = rota.rows("SELECT * FROM catalog_watch")
    assert (watch["swept_at"], watch["sweep_began_at"]) == (at("12:02"), None)

    # The next one counts from when this one began, and finds the rest.
    rota.hands.now = at("12:02:04.9")
    assert look(rota) == Look()
    rota.hands.now = at("12:02:05")
    while look(rota).more:
        pass
    assert rota.due(2) == "2026-07-02 02:00"


@pytest.mark.usefixtures("small_chunks")
def test_more_edits_at_once_than_a_chunk_are_all_noticed_by_updated_at(rota: Rota) -> None:
    for task_id in range(1, 9):
        rota.add(task_id, "0 0 * * *")
    rota.go()
    rota.hands.now = at("12:00:40")
    for task_id in range(1, 9):
        rota.edit(task_id, schedule="0 1 * * *")

    assert look(rota, every=0, sweep_every=NEVER)[:3] == ("updates", True, True)
    rota.go("12:00:42")

    assert {row["text"] for row in rota.rows("SELECT text FROM schedules")} == {"0 1 * * *"}


@pytest.mark.parametrize("seconds", [0.9, 1.1, 2.5])
def test_a_sweep_begins_within_a_minute_however_far_apart_the_rounds_are(rota: Rota, seconds: float) -> None:
    rota.add(1, "0 0 * * *", updated_at=LONG_AGO)
    rota.go()
    rota.hands.move(seconds)
    rota.go()
    rota.edit(1, touch=False, schedule="0 1 * * *")

    edited_at = rota.hands.now
    while rota.due() != "2026-07-02 01:00" and rota.hands.now < edited_at + timedelta(minutes=3):
        rota.hands.move(seconds)
        rota.go()

    assert rota.due() == "2026-07-02 01:00"
    assert (rota.hands.now - edited_at).total_seconds() <= 60 + 2 * seconds


def test_where_looking_takes_long_it_is_done_once_a_minute(rota: Rota, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing_module, "SHARE", 1e-9)
    rota.add(1, "0 0 * * *", updated_at=LONG_AGO)
    begin(rota)
    rota.go("12:00:40")
    rota.edit(1, schedule="0 1 * * *")

    rota.go("12:01:29")
    assert rota.due() == "2026-07-02 00:00"
    rota.go("12:01:40")

    assert rota.due() == "2026-07-02 01:00"


def test_another_default_zone_is_noticed(rota: Rota) -> None:
    with_options(rota)
    rota.add(1, "0 13 * * *")
    rota.add(2, "0 13 * * *", timezone="UTC")
    rota.go()

    moved = Rota(rota.bench, at("12:01:31"), catalog=Catalog(CatalogSettings(), "Asia/Shanghai"))
    moved.go()
    moved.go()

    assert (rota.due(1), rota.due(2)) == ("2026-07-02 05:00", "13:00")
    (past,) = rota.rows("SELECT * FROM schedule_history")
    assert (past["task_id"], past["zone"]) == (1, "UTC")


def test_another_spread_is_noticed(rota: Rota) -> None:
    rota.add(1, "daily")
    rota.add(2, "0 0 * * *")
    rota.go()
    rota.hands.now = at("12:01:31")
    minute, hour = parse("daily").spread(1, 7_200).canonical.split()[:2]
    assert (minute, hour) != ("0", "0"), "task 1 is moved"

    engine = rota.beat(timetable=Timetable(spread=7_200))
    rota.go(engine=engine)
    rota.go(engine=engine)

    assert rota.due(1) == f"2026-07-02 {int(hour):02}:{int(minute):02}"
    assert rota.due(2) == "2026-07-02 00:00"
    assert {row["rules"] for row in rota.rows("SELECT rules FROM schedules")} == {Timetable(spread=7_200).rules}
    assert [row["task_id"] for row in rota.rows("SELECT task_id FROM schedule_history")] == [1]


def test_another_spread_is_noticed_where_slots_are_claimed(rota: Rota) -> None:
    rota.add(1, "daily")
    rota.go("2026-07-01 23:59:30")
    rota.hands.now = at("2026-07-02 00:00:10")

    with another_process_looks(rota):
        rota.go(engine=rota.beat(timetable=Timetable(spread=7_200)))

    assert rota.firings() == [("2026-07-02 00:00", "skipped", "edited")]
    assert rota.due() != "2026-07-03 00:00"


# --- Pauses --------------------------------------------------------------------------------------------------------


def pause(rota: Rota, moment: str, task_id: int = 1) -> None:
    rota.hands.now = at(moment)
    rota.ledger.schedules.pause(task_id, actor="tester", reason="maintenance")


def resume(rota: Rota, moment: str, task_id: int = 1) -> None:
    rota.hands.now = at(moment)
    rota.ledger.schedules.resume(task_id, actor="tester")


def test_a_paused_schedule_skips_every_slot_until_it_is_resumed_and_again(rota: Rota) -> None:
    with_options(rota)
    rota.add(1, "* * * * *", overlap_policy="allow")
    rota.add(2, "* * * * *", overlap_policy="allow")
    rota.go()
    for minute in range(1, 9):
        rota.go(f"12:0{minute}")
        match minute:
            case 1 | 5:
                pause(rota, f"12:0{minute}:30")
            case 3 | 6:
                resume(rota, f"12:0{minute}:30")

    assert rota.firings() == [
        ("12:01", "started", None),
        ("12:02", "skipped", "paused"),
        ("12:03", "skipped", "paused"),
        ("12:04", "started", None),
        ("12:05", "started", None),
        ("12:06", "skipped", "paused"),
        ("12:07", "started", None),
        ("12:08", "started", None),
    ]
    assert [outcome for _, outcome, _ in rota.firings(2)] == ["started"] * 8
    audit = rota.rows("SELECT * FROM audit_events ORDER BY id")
    assert [(row["actor"], row["action"], row["task_id"], row["reason"]) for row in audit] == [
        ("tester", "pause", 1, "maintenance"),
        ("tester", "resume", 1, None),
    ] * 2


@pytest.mark.parametrize("misfires", ["fire_once", "skip", "all"])
def test_slots_of_a_pause_stay_skipped_that_nobody_claimed_before_it_ended(rota: Rota, misfires: str) -> None:
    with_options(rota)
    rota.add(1, "* * * * *", misfire_policy=misfires, overlap_policy="allow")
    rota.go()
    pause(rota, "12:00:40")
    resume(rota, "12:03:30")

    rota.go("12:05:10")

    assert rota.firings() == [
        *((f"12:0{minute}", "skipped", "paused") for minute in range(1, 4)),
        ("12:04", *{"skip": ("missed", "too_late")}.get(misfires, ("started", "caught_up"))),
        ("12:05", "started", None),
    ]


def test_a_slot_at_the_very_moment_of_resuming_fires(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    pause(rota, "12:00:40")
    resume(rota, "12:01")

    rota.go("12:01")

    assert rota.firings() == [("12:01", "started", None)]


@pytest.mark.parametrize("meanwhile", ["delete", "disable", "edit", "invalid"])
def test_a_pause_survives_what_the_application_does_to_its_row(rota: Rota, meanwhile: str) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    pause(rota, "12:00:40")
    rota.hands.now = at("12:00:50")
    match meanwhile:
        case "delete":
            rota.delete(1)
        case "disable":
            rota.edit(1, is_active=False)
        case "edit":
            rota.edit(1, schedule="0 0 * * *")
        case "invalid":
            rota.edit(1, schedule="nonsense")
    rota.go("12:02:00", engine=rota.beat())
    assert rota.firings()[0][2] != "paused"
    assert rota.due() in (None, "2026-07-02 00:00")

    if meanwhile == "delete":
        rota.add(1, "* * * * *")
    else:
        rota.edit(1, schedule="* * * * *", is_active=True)
    rota.go("12:02:10", engine=rota.beat())
    rota.go("12:03", engine=rota.beat())
    assert rota.firings()[-1] == ("12:03", "skipped", "paused")

    resume(rota, "12:03:30")
    rota.go("12:04")
    assert rota.firings()[-1] == ("12:04", "started", None)


def test_a_schedule_can_be_resumed_while_its_row_is_gone(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    pause(rota, "12:00:40")
    rota.delete(1)
    rota.go("12:02:00", engine=rota.beat())
    assert rota.schedule() is None

    resume(rota, "12:02:10")
    rota.add(1, "* * * * *")
    rota.go("12:02:20")
    rota.go("12:03")

    assert rota.firings()[-1] == ("12:03", "started", None)


def test_what_cannot_be_paused_or_resumed_is_refused(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    schedules = rota.ledger.schedules

    with pytest.raises(IllegalTransitionError, match="is not paused; allowed: pause"):
        schedules.resume(1, actor="tester")
    schedules.pause(1, actor="tester")
    with pytest.raises(IllegalTransitionError, match="is paused; allowed: resume"):
        schedules.pause(1, actor="tester")
    schedules.resume(1, actor="tester")
    with pytest.raises(IllegalTransitionError, match="is not paused; allowed: pause"):
        schedules.resume(1, actor="tester")
    for act in (schedules.pause, schedules.resume):
        with pytest.raises(ScheduleNotFoundError, match="no crawl task 2"):
            act(2, actor="tester")
    assert len(rota.rows("SELECT * FROM audit_events")) == 2


# --- Overlap -------------------------------------------------------------------------------------------------------


def finish(rota: Rota, *run_ids: UUID) -> None:
    """Have runs succeed; all if none is named."""
    rota.rows(
        "UPDATE runs SET state = 'succeeded', finished_at = clock_timestamp(), wake_at = NULL WHERE id = ANY(%s) OR %s",
        list(run_ids),
        not run_ids,
    )


@pytest.mark.parametrize(
    ("policy", "expected"), [(None, "skipped"), ("skip", "skipped"), ("SKIP", "skipped"), ("allow", "started")]
)
def test_a_slot_while_a_run_by_hand_is_unfinished_is_for_the_overlap_policy(
    rota: Rota, policy: str | None, expected: str
) -> None:
    with_options(rota)
    rota.add(1, "* * * * *", overlap_policy=policy)
    rota.go()
    by_hand = rota.bench.accept(CrawlArguments(1))
    # No run of this task.
    rota.bench.accept(CrawlArguments(2))
    rota.bench.accept_analysis(1)

    rota.go("12:01")
    finish(rota)
    rota.go("12:02")

    reason = "overlap" if expected == "skipped" else None
    assert rota.firings() == [("12:01", expected, reason), ("12:02", "started", None)]
    assert rota.bench.state(by_hand) == "succeeded"


@pytest.mark.parametrize("state", ["queued", "running", "retrying"])
def test_a_run_of_an_earlier_slot_is_unfinished_in_each_state_but_the_last_ones(rota: Rota, state: str) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.go("12:01")
    rota.rows("UPDATE runs SET state = %s, error_code = 'busy'", state)

    rota.go("12:02")
    rota.ledger.runs.cancel(slot_run_id(1, at("12:01")), actor="tester")
    rota.go("12:03")

    assert rota.firings() == [
        ("12:01", "started", None),
        ("12:02", "skipped", "overlap"),
        ("12:03", "started", None),
    ]


def test_runs_of_other_tasks_do_not_hold_up_a_slot(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.bench.accept(CrawlArguments(2))
    rota.bench.accept_analysis(1)

    rota.go("12:01")

    assert rota.firings() == [("12:01", "started", None)]


# --- Many beats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [6, 100])
def test_two_claims_at_the_same_time_take_each_what_the_other_has_not(rota: Rota, limit: int) -> None:
    for task_id in range(1, 13):
        rota.add(task_id, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01:10")
    both_have_taken = threading.Barrier(2)

    def claim(node: str) -> tuple[set[int], set[UUID]]:
        timetable = Timetable()
        with rota.ledger.schedules.claim(timetable, late=False, limit=limit, by=node) as claim:
            both_have_taken.wait(10)
            for schedule in claim.due:
                claim.settle(schedule, *timetable.settle(schedule, claim.now, overlapping=False))
        return {each.task_id for each in claim.due}, {each.run_id for each in claim.unsent.wake_ups}

    with ThreadPoolExecutor(2) as threads:
        (first, first_runs), (second, second_runs) = threads.map(claim, ["a", "b"])

    assert not first & second
    assert first | second == set(range(1, 13))
    assert limit == 100 or len(first) == len(second) == 6
    assert (len(first_runs), len(second_runs)) == (len(first), len(second))
    rows = rota.rows("SELECT * FROM firings")
    assert {row["task_id"]: row["claimed_by"] for row in rows} == dict.fromkeys(first, "a") | dict.fromkeys(second, "b")
    assert {row["id"] for row in rota.rows("SELECT id FROM runs")} == first_runs | second_runs
    assert {row["next_fire_at"] for row in rota.rows("SELECT * FROM schedules")} == {at("12:02")}


def test_an_engine_whose_slots_others_have_taken_waits_a_moment(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01")

    with rota.ledger.schedules.claim(rota.timetable, late=False, limit=10, by="another") as claim:
        assert [each.task_id for each in claim.due] == [1]
        wait = rota.engine.once()

    assert 0 < wait < 1
    assert rota.engine.problem is None
    assert rota.firings() == []


def test_an_edit_waits_for_a_claim_that_holds_its_row_and_comes_after_it(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.add(2, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01:10")

    with rota.ledger.schedules.claim(rota.timetable, late=False, limit=10, by="another") as claim:
        for task_id in (1, 2):
            rota.edit(task_id, schedule="0 0 * * *")
        assert look(rota, every=0).kind == "updates"
        assert rota.due(1) == "12:01", "its reading is not replaced under the claim"
        for schedule in claim.due:
            claim.settle(schedule, *rota.timetable.settle(schedule, claim.now, overlapping=False))
    # Noticed by a later look: it reaches back.
    rota.hands.now = at("12:01:15")
    assert look(rota, every=0).kind == "updates"

    assert (rota.firings(1), rota.due(1)) == ([("12:01", "started", None)], "2026-07-02 00:00")


# --- Back-pressure, and what happens to wake-ups -------------------------------------------------------------------


def test_nothing_is_claimed_while_too_many_runs_wait_and_what_is_due_stays_due(rota: Rota) -> None:
    for task_id in (1, 2, 3):
        rota.add(task_id, "* * * * *")
    engine = rota.beat(max_queued=3)
    rota.go("12:00:30", engine=engine)
    rota.go("12:01", engine=engine)
    assert len(rota.sent) == 3

    rota.go("12:02", engine=engine)
    assert engine.once() == 1.0
    assert [rota.due(task_id) for task_id in (1, 2, 3)] == ["12:02"] * 3
    # Those that run do not wait; edits are noticed all the same.
    rota.edit(3, schedule="0 0 * * *")
    rota.rows("UPDATE runs SET state = 'running' WHERE task_id = 1")
    finish(rota, slot_run_id(2, at("12:01")))
    rota.go("12:02:10", engine=engine)

    assert rota.firings(1)[-1] == ("12:02", "skipped", "overlap")
    assert rota.firings(2)[-1] == ("12:02", "started", None)
    assert rota.firings(3)[-1] == ("12:02", "skipped", "edited")


def make_overdue(rota: Rota) -> None:
    """Let the time pass after which the pulse sends what was not said to be sent."""
    rota.rows("UPDATE outbox SET due_at = clock_timestamp() - interval '1 second'")


def test_a_broker_that_fails_does_not_stop_claims_and_the_pulse_sends_what_it_refused(rota: Rota) -> None:
    tried: list[int] = []

    def refuse(wake_ups: Sequence[WakeUp]) -> None:
        tried.append(len(wake_ups))
        raise BrokerUnreachableError("it is down")

    with_options(rota)
    for task_id in (1, 2):
        rota.add(task_id, "* * * * *", overlap_policy="allow")
    engine = rota.beat(refuse)
    rota.go("12:00:30", engine=engine)
    for minute in (1, 2, 3):
        rota.go(f"12:0{minute}", engine=engine)

    assert tried == [2], "it is given a rest, for it takes its time to fail"
    runs = {slot_run_id(task_id, at(f"12:0{minute}")) for task_id in (1, 2) for minute in (1, 2, 3)}
    assert {row["id"] for row in rota.rows("SELECT id FROM runs")} == runs
    assert sorted(len(row["run_ids"]) for row in rota.rows("SELECT * FROM outbox")) == [2, 2, 2]
    rota.rows("UPDATE outbox SET due_at = clock_timestamp() + interval '1 hour'")
    assert rota.bench.wake() == []
    make_overdue(rota)
    assert sorted(rota.bench.wake()) == sorted(runs)
    assert rota.bench.wake() == []
    assert rota.rows("SELECT * FROM outbox") == []


def test_a_broker_that_is_back_is_used_again(rota: Rota, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing_module, "_LONGEST_PAUSE", 0.0)
    down = [True]

    def enqueue(wake_ups: Sequence[WakeUp]) -> None:
        if down:
            raise BrokerUnreachableError("it is down")
        rota.sent.extend(wake_ups)

    with_options(rota)
    rota.add(1, "* * * * *", overlap_policy="allow")
    engine = rota.beat(enqueue)
    rota.go("12:00:30", engine=engine)
    rota.go("12:01", engine=engine)
    down.clear()
    rota.go("12:02", engine=engine)

    assert [wake_up.run_id for wake_up in rota.sent] == [slot_run_id(1, at("12:02"))]
    make_overdue(rota)
    assert rota.bench.wake() == [slot_run_id(1, at("12:01"))]


class Killed(BaseException):
    """The process ends here."""


def test_a_crash_between_commit_and_enqueue_loses_no_wake_up(rota: Rota) -> None:
    def die(_: Sequence[WakeUp]) -> None:
        raise Killed

    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01")
    with pytest.raises(Killed):
        rota.beat(die).once()

    rota.go("12:01:05")

    assert (rota.firings(), rota.sent) == ([("12:01", "started", None)], [])
    make_overdue(rota)
    assert rota.bench.wake() == [slot_run_id(1, at("12:01"))]


def test_a_crash_between_enqueue_and_its_record_sends_a_wake_up_twice_and_starts_one_run(rota: Rota) -> None:
    def send_and_die(wake_ups: Sequence[WakeUp]) -> None:
        rota.sent.extend(wake_ups)
        raise Killed

    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01")
    with pytest.raises(Killed):
        rota.beat(send_and_die).once()
    make_overdue(rota)

    assert rota.bench.wake() == [wake_up.run_id for wake_up in rota.sent] == [slot_run_id(1, at("12:01"))]
    assert len(rota.rows("SELECT * FROM runs")) == 1


def test_the_pulse_leaves_alone_what_a_worker_has_begun(rota: Rota) -> None:
    def send_and_die(_: Sequence[WakeUp]) -> None:
        raise Killed

    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01")
    with pytest.raises(Killed):
        rota.beat(send_and_die).once()
    assert rota.bench.ledger.crawls.begin(slot_run_id(1, at("12:01"))) is not None
    make_overdue(rota)

    assert rota.bench.wake() == []


def test_slots_that_were_missed_do_not_hold_up_those_on_time(rota: Rota, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing_module, "_BUDGET", 0.5)
    batches: list[tuple[int, set[int]]] = []

    def enqueue(wake_ups: Sequence[WakeUp]) -> None:
        batches.append((len(wake_ups), {each.task_id for each in map(arguments, wake_ups)}))
        # It takes a second to send a batch, and a slot is due each second.
        rota.hands.move(1)

    with_options(rota)
    rota.add(1, "every 1 second", misfire_policy="all", overlap_policy="allow")
    rota.go()
    rota.add(2, "every 2 seconds", overlap_policy="allow")
    with another_process_looks(rota):
        rota.hands.now = at("14:00:00")
        rota.rows(
            "INSERT INTO schedules SELECT 2, text, zone, active, misfire_policy, 'allow', rules, 'every 2 seconds',"
            " problem, %s, first_seen_at, read_at FROM schedules",
            at("14:00:00"),
        )
        rota.rows("UPDATE schedules SET text = 'every 2 seconds' WHERE task_id = 2")
        engine = rota.beat(enqueue)
        while rota.due(1) is not None and rota.hands.now < at("14:01:00"):
            engine.once()
            assert engine.problem is None

    # An hour and 59 minutes and a half, a thousand at a time, between which task 2 is never late.
    caught_up = [slot for slot, _, reason in rota.firings(1) if reason == "caught_up"]
    assert len(caught_up) > 7_000
    lateness = rota.rows(
        "SELECT max(extract(epoch FROM claimed_at - scheduled_for)) AS most, count(*) FROM firings WHERE task_id = 2"
    )
    assert lateness[0]["most"] <= 4
    assert lateness[0]["count"] >= 7
    assert batches[0][1] == {2}, "first those on time"
    assert max(size for size, tasks in batches if 1 in tasks) <= 1_000


def arguments(wake_up: WakeUp) -> CrawlArguments:
    assert isinstance(wake_up.arguments, CrawlArguments)
    return wake_up.arguments


# --- The application's tables, as they may be ----------------------------------------------------------------------

BROKEN: Final[dict[str, tuple[LiteralString, LiteralString, str]]] = {
    "table renamed": (
        "ALTER TABLE crawl_tasks RENAME TO elsewhere",
        "ALTER TABLE elsewhere RENAME TO crawl_tasks",
        "there is no table crawl_tasks",
    ),
    "column renamed": (
        "ALTER TABLE crawl_tasks RENAME schedule TO plan",
        "ALTER TABLE crawl_tasks RENAME plan TO schedule",
        "schedule does not exist",
    ),
    "column of another type": (
        "ALTER TABLE crawl_tasks ALTER is_active DROP DEFAULT, ALTER is_active TYPE text USING 'perhaps'",
        "ALTER TABLE crawl_tasks ALTER is_active TYPE boolean USING true",
        "invalid input syntax for type boolean",
    ),
    "ids of another type": (
        "ALTER TABLE crawl_tasks ALTER id DROP IDENTITY; ALTER TABLE crawl_tasks ALTER id TYPE text",
        "ALTER TABLE crawl_tasks ALTER id TYPE bigint USING id::bigint",
        "operator does not exist",
    ),
}


@pytest.mark.parametrize("where", ["looking", "claiming"])
@pytest.mark.parametrize("broken", BROKEN)
def test_tables_that_do_not_fit_are_a_problem_that_is_told_and_ends_when_it_is_cured(
    rota: Rota, broken: str, where: str
) -> None:
    break_it, cure_it, says = BROKEN[broken]
    rota.add(1, "* * * * *")
    rota.go()
    rota.bench.application.execute(break_it)
    rota.hands.now = at("12:01:10")

    with another_process_looks(rota) if where == "claiming" else nullcontext():
        waits = [rota.engine.once() for _ in range(8)]

    problem = rota.engine.problem or ""
    assert says in problem
    assert problem.endswith("`orchestrator doctor` says how to map")
    assert waits == sorted(waits)
    assert 0 < waits[0] < waits[-1] <= 10
    assert (rota.firings(), rota.due()) == ([], "12:01")

    rota.bench.application.execute(cure_it)
    rota.go("12:01:50")

    assert (rota.firings(), rota.due()) == ([("12:01", "started", None)], "12:02")
    assert rota.engine.problem is None


@pytest.fixture
def reader(postgres_server: PostgresServer, bench: Workbench) -> Iterator[Rota]:
    """Beats of a role that may read the application's tables and nothing more, at 12:00:30."""
    role = f"reader_{next(_NUMBERS)}"
    postgres_server.create_role(role)
    granted = sql.SQL(
        "GRANT USAGE ON SCHEMA {schema} TO {role};"
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role};"
        "GRANT SELECT ON crawl_tasks, crawl_configs TO {role}"
    ).format(schema=sql.Identifier(bench.schema), role=sql.Identifier(role))
    bench.application.execute(granted)
    limited = Workbench(make_conninfo(bench.url, user=role))
    limited.application = bench.application
    yield Rota(limited, at("12:00:30"))
    limited.close()
    bench.application.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
    postgres_server.drop_role(role)


def revoke(rota: Rota, right: LiteralString) -> None:
    """Take a right from a reader, or give it back."""
    role = sql.Identifier(str(conninfo_to_dict(rota.bench.url)["user"]))
    rota.bench.application.execute(sql.SQL(right).format(role))


def test_the_right_to_select_suffices(reader: Rota) -> None:
    for task_id in (1, 2, 3):
        reader.add(task_id, "* * * * *")
    reader.go()
    reader.edit(2, schedule="*/2 * * * *")
    reader.go("12:00:40")
    reader.delete(3)
    reader.go("12:01")
    reader.ledger.schedules.pause(1, actor="tester")
    reader.go("12:02")
    reader.ledger.schedules.resume(1, actor="tester")
    assert len(reader.ledger.schedules.backfill(1, [at("11:00")], actor="tester").wake_ups) == 1

    assert reader.firings(1) == [
        ("11:00", "started", "backfill"),
        ("12:01", "started", None),
        ("12:02", "skipped", "paused"),
    ]
    assert reader.firings(2) == [("12:02", "started", None)]
    assert reader.firings(3) == [("12:01", "skipped", "deleted")]
    for statement in ("UPDATE crawl_tasks SET id = id", "SELECT 1 FROM crawl_tasks FOR KEY SHARE"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.rows(statement)


@pytest.mark.parametrize("where", ["looking", "claiming"])
def test_without_the_right_to_select_nothing_fires_until_it_is_given(reader: Rota, where: str) -> None:
    reader.add(1, "* * * * *")
    reader.go()
    revoke(reader, "REVOKE SELECT ON crawl_tasks FROM {}")
    reader.hands.now = at("12:01:10")

    with another_process_looks(reader) if where == "claiming" else nullcontext():
        assert reader.engine.once() > 0

    assert "permission denied for table crawl_tasks" in (reader.engine.problem or "")
    assert (reader.firings(), reader.due()) == ([], "12:01")
    revoke(reader, "GRANT SELECT ON crawl_tasks TO {}")
    reader.go("12:01:30")
    assert reader.firings() == [("12:01", "started", None)]


def test_without_a_server_a_round_fails_and_says_so() -> None:
    database = Database(f"postgresql://nobody@127.0.0.1:{free_port()}/nothing", "orchestrator")
    engine = FiringEngine(Ledger(database, Catalog(CatalogSettings())), Timetable(), print, "beat@test", max_queued=1)
    try:
        assert engine.once() > 0
        assert (engine.problem or "").startswith("PostgreSQL: ")
    finally:
        database.close()


def fail(*_: object, **__: object) -> float:
    """Have a bug."""
    return 1 / 0


def test_a_bug_ends_a_round_and_not_the_beat(rota: Rota, monkeypatch: pytest.MonkeyPatch) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01")
    with monkeypatch.context() as patch:
        patch.setattr(rota.ledger.schedules, "next_due_in", fail)
        assert rota.engine.once() > 0
        assert rota.engine.problem == "ZeroDivisionError; see its log"
    assert rota.firings() == []

    rota.go()

    assert rota.firings() == [("12:01", "started", None)]


def test_slots_are_claimed_though_looking_fails(rota: Rota, monkeypatch: pytest.MonkeyPatch) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.hands.now = at("12:01")
    monkeypatch.setattr(rota.ledger.schedules, "look", fail)

    assert rota.engine.once() > 0

    assert rota.engine.problem == "ZeroDivisionError; see its log"
    assert rota.firings() == [("12:01", "started", None)]


def test_a_fault_with_one_schedule_stops_no_other_and_hides_none_of_its_slots(
    rota: Rota, monkeypatch: pytest.MonkeyPatch
) -> None:
    rota.add(1, "* * * * *")
    rota.add(2, "* * * * *")
    rota.go()
    settle = rota.timetable.settle

    def settle_one(schedule: DueSchedule, now: datetime, *, overlapping: bool) -> Settlement:
        if schedule.task_id == 1:
            fail()
        return settle(schedule, now, overlapping=overlapping)

    monkeypatch.setattr(rota.timetable, "settle", settle_one)
    rota.hands.now = at("12:04:10")
    rota.engine.once()

    assert [covers(rota, f"12:0{minute}", 2) for minute in (1, 2, 3, 4)] == [
        ["missed"],
        ["missed"],
        ["started"],
        ["skipped"],
    ]
    assert (rota.schedule() or {})["problem"] is not None
    assert [covers(rota, f"12:0{minute}") for minute in (1, 2, 3, 4)] == [["skipped"]] * 4


def plainly(rota: Rota, task_id: int, schedule: str) -> None:
    """Add or edit a crawl task in a table without updated_at."""
    rota.bench.application.execute(
        "INSERT INTO crawl_tasks (id, schedule) VALUES (%s, %s)"
        " ON CONFLICT (id) DO UPDATE SET schedule = excluded.schedule",
        task_id,
        schedule,
    )


def test_a_table_without_any_optional_column_is_swept(rota: Rota) -> None:
    rota.bench.application.execute("ALTER TABLE crawl_tasks DROP updated_at")
    plainly(rota, 1, "* * * * *")
    plainly(rota, 2, "30 12 * * *")
    rota.go()
    rota.go("12:01")
    assert rota.firings(1) == [("12:01", "started", None)]

    plainly(rota, 2, "40 12 * * *")
    plainly(rota, 3, "50 12 * * *")
    rota.delete(1)
    # Within a minute, however long sweeps take.
    rota.go("12:01:31")

    assert (rota.schedule(1), rota.due(2), rota.due(3)) == (None, "12:40", "12:50")
    assert look(rota, every=0, sweep_every=0)[:3] == ("sweep", False, False)


def test_optional_columns_that_come_and_go_are_noticed(rota: Rota) -> None:
    rota.add(1, "0 13 * * *")
    rota.go()
    rota.bench.application.execute("ALTER TABLE crawl_tasks ADD timezone text DEFAULT 'Asia/Shanghai'")
    look_around(rota, "12:01:31")
    assert rota.due() == "2026-07-02 05:00"

    rota.bench.application.execute("ALTER TABLE crawl_tasks DROP timezone, DROP updated_at")
    look_around(rota, "12:02:40")

    assert rota.due() == "13:00"


@pytest.mark.parametrize(
    ("zone", "how"),
    [("UTC", "updates"), ("Asia/Shanghai", "updates"), ("America/New_York", "sweep")],
)
def test_an_updated_at_without_time_zone_is_taken_for_utc_and_nothing_rests_on_it(
    rota: Rota, zone: str, how: str
) -> None:
    rota.bench.application.execute("ALTER TABLE crawl_tasks ALTER updated_at TYPE timestamp")
    rota.add(1, "0 0 * * *")
    begin(rota)
    rota.hands.now = at("12:00:40")
    local = rota.hands.now.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    rota.edit(1, touch=False, updated_at=local, schedule="0 1 * * *")

    notice(rota, "updates")

    assert rota.due() == ("2026-07-02 01:00" if how == "updates" else "2026-07-02 00:00")
    look_around(rota, "12:01:31")
    assert rota.due() == "2026-07-02 01:00"


def test_rows_without_updated_at_are_found_by_the_sweep(rota: Rota) -> None:
    rota.bench.application.execute("ALTER TABLE crawl_tasks ALTER updated_at DROP NOT NULL")
    rota.add(1, "0 0 * * *", updated_at=None)
    rota.go()
    assert rota.due() == "2026-07-02 00:00"
    rota.edit(1, touch=False, schedule="0 1 * * *")

    rota.go("12:00:40")
    assert rota.due() == "2026-07-02 00:00"
    look_around(rota, "12:01:31")
    assert rota.due() == "2026-07-02 01:00"


def test_a_view_is_as_good_as_a_table(rota: Rota) -> None:
    rota.bench.application.execute(
        "ALTER TABLE crawl_tasks RENAME TO tasks;"
        "CREATE VIEW crawl_tasks AS SELECT id, schedule, is_active, updated_at FROM tasks WHERE id < 100"
    )
    rota.add(1, "* * * * *")
    rota.add(2, "* * * * *")
    rota.go()
    rota.go("12:01")
    # It leaves the view, which is to be deleted.
    rota.bench.application.execute("UPDATE tasks SET id = 100 WHERE id = 2")
    rota.edit(1, schedule="*/2 * * * *")
    rota.go("12:02:01")

    assert rota.firings(1) == [("12:01", "started", None), ("12:02", "skipped", "edited")]
    assert rota.firings(2) == [("12:01", "started", None), ("12:02", "skipped", "deleted")]
    assert rota.schedule(100) is None


@pytest.mark.parametrize("other", ["* * * * *", "*/5 * * * *", "nonsense"])
def test_a_view_that_has_an_id_twice_stops_no_other(rota: Rota, other: str) -> None:
    rota.bench.application.execute(
        "ALTER TABLE crawl_tasks RENAME TO tasks;"
        "CREATE VIEW crawl_tasks AS SELECT id, schedule, is_active, updated_at FROM tasks WHERE id < 100"
        " UNION ALL SELECT id - 100, schedule, is_active, updated_at FROM tasks WHERE id > 100"
    )
    rota.bench.application.execute(
        "INSERT INTO tasks (id, schedule) VALUES (1, '* * * * *'), (2, '* * * * *'), (3, '* * * * *')"
    )
    rota.bench.application.execute("INSERT INTO tasks (id, schedule) VALUES (101, %s)", other)
    rota.go()
    for minute in (1, 2, 3, 4):
        rota.go(f"12:0{minute}")
        finish(rota)

    for task_id in (2, 3):
        assert rota.firings(task_id) == [(f"12:0{minute}", "started", None) for minute in (1, 2, 3, 4)]


@pytest.fixture
def renamed(postgres_server: PostgresServer, database_url: str) -> Iterator[Rota]:
    """Beats on tables and columns of quite other names, and with a ledger in another schema."""
    del postgres_server
    schema = "crawl_ledger"
    migrated(database_url, with_queues=False, schema=schema)
    mapping = {
        "schema": "Customer Data",
        "table": 'the "jobs"',
        "id": "Job",
        "schedule": "When",
        "is_active": "select",
        "updated_at": "Changed at",
        "timezone": "Where",
        "misfire_policy": "If late",
        "overlap_policy": "If busy",
    }
    settings = CatalogSettings.model_validate({"crawl_tasks": mapping})
    bench = Workbench(database_url, schema=schema, catalog=settings)
    bench.application.execute(
        'CREATE SCHEMA "Customer Data";'
        'CREATE TABLE "Customer Data"."the ""jobs""" ("Job" integer PRIMARY KEY, "When" varchar(80), "select" boolean,'
        ' "Changed at" timestamptz, "Where" varchar(40), "If late" varchar(10), "If busy" varchar(10))'
    )
    yield Rota(bench, at("12:00:30"))
    bench.close()


def test_tables_columns_and_schema_may_have_any_name(renamed: Rota) -> None:
    def write(task_id: int, schedule: str, *others: object, active: bool | None) -> None:
        renamed.bench.application.execute(
            'INSERT INTO "Customer Data"."the ""jobs""" VALUES (%s, %s, %s, %s, %s, %s, %s)'
            ' ON CONFLICT ("Job") DO UPDATE SET ("When", "select", "Changed at", "Where", "If late", "If busy")'
            ' = (excluded."When", excluded."select", excluded."Changed at", excluded."Where", excluded."If late",'
            ' excluded."If busy")',
            task_id,
            schedule,
            active,
            *others,
        )

    write(1, "* * * * *", at("12:00:00"), None, "all", "allow", active=True)
    write(2, "30 20 * * *", at("12:00:00"), "Asia/Shanghai", None, None, active=True)
    write(3, "* * * * *", at("12:00:00"), None, None, None, active=None)
    renamed.go()
    assert [renamed.due(task_id) for task_id in (1, 2, 3)] == ["12:01", "12:30", None]
    renamed.go("12:03:30")
    assert renamed.firings(1) == [
        ("12:01", "started", "caught_up"),
        ("12:02", "started", "caught_up"),
        ("12:03", "started", None),
    ]

    write(1, "*/10 * * * *", at("12:03:40"), None, "all", "allow", active=True)
    renamed.go("12:03:45")
    assert renamed.due(1) == "12:10"
    with another_process_looks(renamed):
        renamed.hands.now = at("12:10:10")
        write(1, "*/10 * * * *", at("12:00:00"), None, "all", "allow", active=False)
        renamed.go()

    assert renamed.firings(1)[3:] == [("12:10", "skipped", "disabled")]
