"""``why`` gives every answer there is, from the ledger alone."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from orchestrator.discovery import Answer, AnswerCode
from orchestrator.domain import (
    AttemptOutcome,
    CrawlArguments,
    FiringReason,
    Health,
    MisfirePolicy,
    NewRun,
    Node,
    RunState,
    Trigger,
    slot_run_id,
    traceparent_of,
)
from orchestrator.errors import BrokerBlockedError
from orchestrator.explain import Explanation, Verdict, Wait, WaitCode, waits_for, why
from orchestrator.insights import Insights
from orchestrator.timetable import Timetable
from tests.support.ledgers import Workbench
from tests.support.scheduling import Rota, at

pytestmark = pytest.mark.timeout(120)

MANY = 50_000


@pytest.fixture
def rota(bench: Workbench) -> Rota:
    """Beats at 12:00:30 of a day that is past."""
    return Rota(bench, at("12:00:30"))


@pytest.fixture
def tomorrow(bench: Workbench) -> Rota:
    """Beats ahead of the clock of what the ledger stamps by itself."""
    return Rota(bench, (datetime.now(UTC) + timedelta(days=1)).replace(hour=12, minute=0, second=30, microsecond=0))


def ask(rota: Rota, moment: str | datetime, *, max_queued: int = MANY) -> Explanation:
    moment = at(moment) if isinstance(moment, str) else moment
    answer = why(Insights(rota.bench.database), rota.timetable, 1, moment, max_queued=max_queued)
    assert (answer.task_id, answer.at) == (1, moment)
    assert all(sentence.endswith((".", ")", "?")) for sentence in answer.sentences)
    return answer


def said(answer: Explanation) -> str:
    return " ".join(answer.sentences)


def verdicts(rota: Rota, moments: Sequence[str]) -> list[str]:
    return [ask(rota, moment).verdict for moment in moments]


# --- It ran ----------------------------------------------------------------------------------------------------------


def test_started_tells_the_run_and_how_it_went(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    rota.go("12:01:00.4")
    run_id = slot_run_id(1, at("12:01"))

    answer = ask(rota, "12:01")

    assert (answer.verdict, answer.run_id) == (Verdict.STARTED, run_id)
    assert answer.firing is not None
    assert answer.firing.claimed_by == "beat@test"
    assert answer.sentences == (
        "It ran: 2026-07-01 12:01:00Z was claimed 0.4 s after it, by beat@test.",
        f"Run {run_id} waits for a worker: 0 published, 0 skipped of 0 data sources.",
    )

    rota.rows(
        "UPDATE runs SET state = 'failed', error_code = 'crawl_task_not_found', error_message = 'there is none',"
        " finished_at = '2026-07-01 12:02Z', wake_at = NULL"
    )
    assert ask(rota, "12:01").sentences[1] == (
        f"Run {run_id} failed at 2026-07-01 12:02:00Z: 0 published, 0 skipped of 0 data sources; "
        "there is none (crawl_task_not_found)."
    )

    rota.rows("DELETE FROM runs")
    assert "in the ledger no more" in ask(rota, "12:01").sentences[1]


def test_missed_slots_name_the_policy_and_the_one_that_fired_for_them(rota: Rota) -> None:
    rota.add(1, "*/30 * * * *")
    rota.go()
    rota.go("13:45")

    assert verdicts(rota, ["12:30", "13:00", "13:30"]) == ["superseded", "superseded", "caught_up"]
    assert "missed, for nobody claimed it until 75 min after it. A later slot was missed too" in said(
        ask(rota, "12:30")
    )
    assert "missed, and caught up 15 min after it" in said(ask(rota, "13:30"))


def test_too_late_by_policy(bench: Workbench) -> None:
    rota = Rota(bench, at("12:00:30"), Timetable(MisfirePolicy.SKIP))
    rota.add(1, "*/30 * * * *")
    rota.go()
    rota.go("12:45")

    answer = ask(rota, "12:30")

    assert (answer.verdict, answer.run_id) == (Verdict.TOO_LATE, None)
    assert "misfire policy skip" in said(answer)


def test_a_range_stands_for_slots_and_for_nothing_in_between(bench: Workbench) -> None:
    rota = Rota(bench, at("12:00:30"), Timetable(catch_up_window=timedelta(hours=1)))
    rota.add(1, "every 10 seconds")
    rota.go()
    rota.go("15:00")

    assert verdicts(rota, ["12:00:40", "13:00:20", "14:10:10"]) == [
        "outside_catch_up_window",
        "outside_catch_up_window",
        "superseded",
    ]
    assert "One record stands for all slots from 2026-07-01 12:00:40Z to 2026-07-01 13:59:50Z." in said(
        ask(rota, "13:00:20")
    )
    between = ask(rota, "13:00:21")
    assert (between.verdict, between.firing) == (Verdict.NO_SLOT, None)
    assert (between.before, between.after) == (at("13:00:20"), at("13:00:30"))
    assert "which was missed (outside_catch_up_window)" in said(between)


def test_a_backfill_tells_who_asked_and_leaves_the_rest_of_the_range(rota: Rota) -> None:
    rota.add(1, "every 10 seconds")
    rota.go()
    rota.go("13:00")
    rota.ledger.schedules.backfill(1, [at("12:00:40"), at("12:05")], actor="ann")

    answer = ask(rota, "12:05")

    assert (answer.verdict, answer.run_id) == (Verdict.BACKFILL, slot_run_id(1, at("12:05")))
    assert "It ran afterwards: ann asked for a backfill of 2026-07-01 12:05:00Z" in said(answer)
    assert verdicts(rota, ["12:00:40", "12:00:50", "12:05:10", "12:05:11"]) == [
        "backfill",
        "superseded",
        "superseded",
        "no_slot",
    ]
    # The rest of a range begins between two slots.
    assert ask(rota, "12:00:41").verdict is Verdict.NO_SLOT


# --- It was skipped --------------------------------------------------------------------------------------------------


def test_overlap_names_the_run_in_the_way(tomorrow: Rota) -> None:
    tomorrow.add(1, "* * * * *")
    tomorrow.go()
    run_id = uuid4()
    new = NewRun(run_id, CrawlArguments(1), Trigger.CLI, traceparent_of(run_id))
    tomorrow.ledger.runs.accept(new, delivered=False)
    slot = tomorrow.hands.now + timedelta(seconds=30)
    tomorrow.go(slot)

    answer = ask(tomorrow, slot)

    assert answer.verdict is Verdict.OVERLAP
    assert f"a run of the crawl task was unfinished (overlap policy skip): run {run_id}, now queued." in said(answer)


def test_paused_names_who_and_why(tomorrow: Rota) -> None:
    tomorrow.add(1, "* * * * *")
    tomorrow.go()
    tomorrow.ledger.schedules.pause(1, actor="ann", reason="the site is down")
    slot = tomorrow.hands.now + timedelta(seconds=30)
    tomorrow.go(slot)

    answer = ask(tomorrow, slot)

    assert answer.verdict is Verdict.PAUSED
    assert "for ann paused it at" in said(answer)
    assert "(the site is down)" in said(answer)
    ahead = ask(tomorrow, slot + timedelta(minutes=1))
    assert ahead.verdict is Verdict.NOT_DUE_YET
    assert "ann paused the schedule at" in said(ahead)


@pytest.mark.parametrize(
    ("edit", "verdict", "sentence"),
    [
        ({"schedule": "daily at 05:00"}, "edited", "was changed to “daily at 05:00” (0 5 * * *, UTC) before"),
        ({"is_active": False}, "disabled", "is_active was set to false before it was claimed; that was noticed at"),
        ({"schedule": "whenever"}, "invalid", 'noticed at 2026-07-01 12:01:05Z: cannot read "whenever"'),
        ({}, "deleted", "the crawl task was deleted before it was claimed"),
    ],
)
def test_a_slot_that_an_edit_overtook(rota: Rota, edit: dict[str, Any], verdict: str, sentence: str) -> None:
    rota.add(1, "* * * * *")
    rota.go()
    if edit:
        rota.edit(1, **edit)
    else:
        rota.delete(1)
    rota.go("12:01:05")

    answer = ask(rota, "12:01")

    assert answer.verdict == verdict
    assert sentence in said(answer)


# --- There was nothing to run ----------------------------------------------------------------------------------------


def test_an_unknown_task_and_no_beat_to_notice_it(rota: Rota) -> None:
    answer = ask(rota, "12:00")

    assert answer.verdict is Verdict.UNKNOWN_TASK
    assert said(answer).startswith("No crawl task 1 was ever noticed")
    assert "No beat is alive; start one: `orchestrator beat`." in answer.sentences


def test_a_moment_before_the_task_was_noticed(rota: Rota) -> None:
    rota.add(1, "* * * * *")
    rota.go()

    answer = ask(rota, "12:00")

    assert answer.verdict is Verdict.NOT_YET_NOTICED
    assert "crawl task 1 was first noticed at 2026-07-01 12:00:30Z" in said(answer)


def test_an_edit_that_came_too_late_for_the_slot(rota: Rota) -> None:
    rota.add(1, "0 5 * * *")
    rota.go()
    rota.hands.move(3600)
    rota.edit(1, schedule="daily at 12:30")
    rota.go()

    answer = ask(rota, "12:30")

    assert answer.verdict is Verdict.NOT_YET_NOTICED
    assert answer.sentences[:2] == (
        (
            "It did not run: by “daily at 12:30” (30 12 * * *, UTC) 2026-07-01 12:30:00Z is a slot, but that was "
            "noticed only at 2026-07-01 13:00:30Z, and an edit never fires for slots before it."
        ),
        "Until then the schedule was “0 5 * * *” (UTC).",
    )


def test_no_slot_tells_the_schedule_and_what_became_of_the_slot_before(rota: Rota) -> None:
    rota.bench.application.execute("ALTER TABLE crawl_tasks ADD timezone text")
    rota.add(1, "每天 03:00", timezone="Asia/Shanghai")
    rota.go()
    rota.go("19:00")
    run_id = slot_run_id(1, at("19:00"))

    answer = ask(rota, "20:00")

    assert (answer.verdict, answer.before, answer.after) == (Verdict.NO_SLOT, at("19:00"), at("2026-07-02 19:00"))
    assert answer.sentences == (
        (
            "2026-07-01 20:00:00Z (2026-07-02 04:00:00 in Asia/Shanghai) is no slot of “每天 03:00” (0 3 * * *, "
            "Asia/Shanghai), which the schedule is, as read at 2026-07-01 12:00:30Z (2026-07-01 20:00:30 in "
            "Asia/Shanghai)."
        ),
        f"The slot before it: 2026-07-01 19:00:00Z (2026-07-02 03:00:00 in Asia/Shanghai), which started run {run_id}.",
        "The slot after it: 2026-07-02 19:00:00Z (2026-07-03 03:00:00 in Asia/Shanghai).",
    )
    first = ask(rota, "12:30")
    assert (first.before, first.after) == (None, at("19:00"))


def test_the_schedule_of_then_counts_not_that_of_now(rota: Rota) -> None:
    rota.add(1, "0 * * * *")
    rota.go()
    rota.go("13:00:10")
    rota.edit(1, schedule="0 5 * * *")
    rota.go("13:00:20")

    assert verdicts(rota, ["13:00", "13:00:15", "14:00"]) == ["started", "no_slot", "no_slot"]
    assert "an edit was noticed, which fires for later slots only: “0 5 * * *” (UTC)." in said(ask(rota, "12:30"))


@pytest.mark.parametrize(
    ("columns", "verdict", "sentence"),
    [
        ({"is_active": False}, "inactive", "the crawl task was inactive (is_active is false)."),
        ({"schedule": "whenever"}, "invalid", 'without a readable schedule: cannot read "whenever" (character 1)'),
        ({"schedule": None}, "no_schedule", "the crawl task was without a schedule, to be run by hand."),
    ],
)
def test_a_task_that_had_no_slots(rota: Rota, columns: dict[str, Any], verdict: str, sentence: str) -> None:
    rota.add(1, "0 * * * *")
    rota.edit(1, **columns)
    rota.go()
    rota.hands.move(3 * 3600)
    rota.edit(1, schedule="daily at 05:00", is_active=True)
    rota.go()

    answer = ask(rota, "13:00")

    assert answer.verdict == verdict
    assert "It did not run: as read at 2026-07-01 12:00:30Z" in said(answer)
    assert sentence in said(answer)
    assert "At 2026-07-01 15:00:30Z an edit was noticed" in said(answer)


def test_a_zone_that_the_system_knows_no_more(rota: Rota) -> None:
    rota.add(1, "0 * * * *")
    rota.go()
    rota.rows("UPDATE schedules SET zone = 'Mars/Olympus'")

    answer = ask(rota, "13:00")

    assert answer.verdict is Verdict.INVALID
    assert "'Mars/Olympus' is no IANA time zone" in said(answer)


def test_a_task_that_was_gone_and_came_back(rota: Rota) -> None:
    rota.add(1, "0 * * * *")
    rota.go()
    rota.delete(1)
    rota.go("12:02")
    rota.go()  # the sweep, after the look
    answer = ask(rota, "13:00")
    assert answer.verdict is Verdict.DELETED
    assert said(answer) == "It did not run: crawl task 1 had been deleted, noticed at 2026-07-01 12:02:00Z."

    rota.hands.now = at("14:30")
    rota.add(1, "0 * * * *")
    rota.go()

    assert verdicts(rota, ["13:00", "15:00"]) == ["deleted", "not_claimed_yet"]
    assert "One of that id was noticed again at 2026-07-01 14:30:00Z." in said(ask(rota, "13:00"))


# --- Not yet, or not any more ----------------------------------------------------------------------------------------


def test_a_slot_to_come(rota: Rota) -> None:
    rota.add(1, "0 3 * * *")
    rota.go()
    ahead = (datetime.now(UTC) + timedelta(days=9)).replace(hour=3, minute=0, second=0, microsecond=0)

    answer = ask(rota, ahead)

    assert (answer.verdict, answer.after) == (Verdict.NOT_DUE_YET, ahead + timedelta(days=1))
    assert "is a slot of “0 3 * * *” (UTC), in " in said(answer)
    assert " days." in said(answer)


def test_a_due_slot_tells_what_keeps_it_from_being_claimed(rota: Rota) -> None:
    rota.add(1, "*/5 * * * *")
    rota.go()
    nodes = rota.bench.ledger.nodes

    nobody = ask(rota, "12:10")
    assert nobody.verdict is Verdict.NOT_CLAIMED_YET
    assert "No beat is alive; start one: `orchestrator beat`." in nobody.sentences

    nodes.heartbeat(Node("beat@a", "beat"), "1", health=Health("PostgreSQL: out of disk"))
    assert "beat@a reports a problem: PostgreSQL: out of disk." in ask(rota, "12:10").sentences
    assert "ask again" not in said(ask(rota, "12:10"))

    nodes.heartbeat(Node("beat@a", "beat"), "1")
    assert "ask again in a moment." in said(ask(rota, "12:10"))

    rota.bench.accept(delivered=False)
    assert "1 runs or more wait for a worker" in said(ask(rota, "12:10", max_queued=1))

    rota.rows("UPDATE nodes SET seen_at = '2026-07-01 12:00:40Z'")
    assert "No beat is alive, the last one was seen at 2026-07-01 12:00:40Z" in said(ask(rota, "12:10"))


def test_a_slot_without_a_record_is_not_explained_away(rota: Rota) -> None:
    rota.add(1, "*/5 * * * *")
    rota.go()
    rota.go("12:05")
    rota.go("12:10")
    rota.rows("DELETE FROM firings WHERE scheduled_for = %s", at("12:10"))

    answer = ask(rota, "12:10")

    assert (answer.verdict, answer.before) == (Verdict.NOT_RECORDED, at("12:05"))
    assert "the ledger has no record of it" in said(answer)


def test_every_reason_of_a_firing_is_a_verdict() -> None:
    assert {reason.value for reason in FiringReason} <= {verdict.value for verdict in Verdict}


# --- What a run waits for --------------------------------------------------------------------------------------------


def waits(bench: Workbench, run_id: UUID) -> Wait:
    insights = Insights(bench.database)
    return waits_for(insights, insights.run(run_id))


def employ(bench: Workbench) -> None:
    """Have a worker for both queues."""
    node = Node("w1@test", "worker", ("orchestrator.analysis", "orchestrator.crawl"), 2)
    bench.ledger.nodes.heartbeat(node, "1", first=True)


def test_a_queued_run_waits_for_a_worker_and_says_when_there_is_none(bench: Workbench) -> None:
    run_id = bench.accept()

    lonely = waits(bench, run_id)
    employ(bench)

    assert lonely.code is WaitCode.NO_WORKER
    assert lonely.sentence.endswith("; no living worker consumes orchestrator.crawl: `orchestrator worker`")
    assert waits(bench, run_id) == Wait(WaitCode.WORKER, "a worker to take it from orchestrator.crawl")


def test_a_crawl_run_waits_for_its_plan_its_messages_and_its_broker(bench: Workbench) -> None:
    employ(bench)
    early, run_id = bench.accept(), bench.planned(10)
    assert bench.ledger.crawls.begin(early) is not None

    assert waits(bench, early) == Wait(WaitCode.PLAN, "its plan to be made")
    assert waits(bench, run_id) == Wait(WaitCode.PUBLISHING, "10 messages to be published")
    bench.ledger.crawls.postpone(run_id, BrokerBlockedError("the broker is low on memory"))
    blocked = waits(bench, run_id)
    assert blocked.code is WaitCode.BROKER
    assert blocked.sentence.startswith("the next try to publish, at 20")
    assert blocked.sentence.endswith("; the last one failed: the broker is low on memory")
    bench.ledger.runs.cancel(run_id, actor="ann")
    assert waits(bench, run_id) == Wait(WaitCode.NOTHING, "nothing: it is over")


@pytest.mark.parametrize(
    ("retry_after", "code"), [(None, WaitCode.NEXT_CALL), (90.0, WaitCode.RETRY_AFTER)], ids=["backoff", "retry-after"]
)
def test_an_analysis_waits_for_its_call_and_then_for_the_next_one(
    bench: Workbench, retry_after: float | None, code: WaitCode
) -> None:
    employ(bench)
    first, second = bench.accept_analysis(7), bench.accept_analysis(8)
    attempt = bench.begin_attempt(first, cap=1)
    assert attempt is not None
    assert bench.begin_attempt(second, cap=1) is None

    assert waits(bench, first) == Wait(WaitCode.ANSWER, "the answer of the Discovery Service to call 1")
    assert waits(bench, second).code is WaitCode.FREE_CALL
    busy = Answer(AttemptOutcome.RETRYABLE, 429, AnswerCode.UNAVAILABLE, "busy", retry_after, 0.1)
    bench.ledger.analyses.finish_attempt(attempt, busy, 90.0)
    wait = waits(bench, first)
    assert wait.code is code
    assert wait.sentence.startswith("call 2 to the Discovery Service, at 20")
    assert wait.sentence.endswith("to wait 90 s") is (retry_after is not None)
    bench.rewind(first, 100)
    refused = Answer(AttemptOutcome.REFUSED, 400, AnswerCode.REFUSED, "no", None, 0.1)
    again = bench.begin_attempt(first)
    assert again is not None
    bench.ledger.analyses.finish_attempt(again, refused, None)
    assert waits(bench, first).code is WaitCode.OPERATOR


def test_a_run_waits_for_its_callers_time(bench: Workbench) -> None:
    employ(bench)
    run_id, later = uuid4(), datetime.now(UTC) + timedelta(hours=1)
    new = NewRun(run_id, CrawlArguments(1), Trigger.CELERY, traceparent_of(run_id), not_before=later)
    bench.ledger.runs.accept(new, delivered=True)

    assert waits(bench, run_id) == Wait(WaitCode.ETA, f"the time that its caller asked for, {later:%Y-%m-%d %H:%M:%S}Z")


def test_a_run_without_usable_arguments_waits_for_nothing(bench: Workbench) -> None:
    run_id = uuid4()
    values = {"id": run_id, "kind": "crawl", "trigger": Trigger.CELERY, "traceparent": "x"}
    bench.ledger.runs.record_ended(values, RunState.FAILED, "invalid_arguments", "task_id is missing")

    assert waits(bench, run_id).code is WaitCode.NEW_RUN
