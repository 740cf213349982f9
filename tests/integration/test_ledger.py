"""The ledger's promises, one by one: legal transitions, counts that add up, shared batches, wake-ups, attempts."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Any, Final, LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Connection
from structlog.testing import capture_logs

from orchestrator.discovery import Answer, AnswerCode
from orchestrator.dispatch import Help
from orchestrator.domain import (
    TRANSITIONS,
    UNFINISHED,
    AnalysisArguments,
    Attempt,
    AttemptOutcome,
    CrawlArguments,
    ExtractionBatch,
    NewRun,
    Node,
    RunKind,
    RunState,
    Trigger,
    WakeUp,
    message_id,
    traceparent_of,
)
from orchestrator.errors import (
    BrokerBlockedError,
    BrokerUnreachableError,
    CrawlTaskNotFoundError,
    DatabaseUnavailableError,
    IllegalTransitionError,
    InvalidArgumentsError,
    MessageRefusedError,
    PublishError,
    RunNotFoundError,
)
from orchestrator.ledger.crawls import MAX_STALLS
from orchestrator.ledger.runs import LONGEST_SILENCE, SKIP_BATCH
from orchestrator.ledger.transitions import SILENCE
from orchestrator.pulse import Pulse
from orchestrator.queues import Publisher, Receipt
from tests.support.ledgers import LEASE, NODE, Workbench, sources_of
from tests.support.processes import eventually

pytestmark = pytest.mark.timeout(120)

DOWN: Final = BrokerUnreachableError("nobody listens")
FATAL: Final = CrawlTaskNotFoundError("there is no crawl task 1")
GOOD: Final = Answer(AttemptOutcome.SUCCEEDED, 202, AnswerCode.OK, "accepted", None, 0.1)
BUSY: Final = Answer(AttemptOutcome.RETRYABLE, 503, AnswerCode.UNAVAILABLE, "the service answered 503", 90.0, 0.2)
NO: Final = Answer(AttemptOutcome.REFUSED, 404, AnswerCode.REFUSED, "the service answered 404", None, 0.2)


class Fake:
    """A publisher that confirms what a test wants it to."""

    def __init__(self, publish: Callable[[ExtractionBatch], Receipt] | None = None) -> None:
        self._publish = publish or (lambda batch: Receipt([source for source, _ in batch.sources]))
        self.batches: list[ExtractionBatch] = []

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:  # noqa: ARG002 -- the port
        self.batches.append(batch)
        return self._publish(batch)

    def prepare(self) -> None:
        pass

    def check(self) -> str:
        return "nowhere"

    def close(self) -> None:
        pass


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls at the same time, each in a thread of its own; return what they return."""
    start = threading.Barrier(len(calls))

    def call(each: Callable[[], Any]) -> Any:  # noqa: ANN401 -- whatever it returns
        start.wait(10)
        return each()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


# --- Transitions -------------------------------------------------------------------------------------------


def crawl_in(bench: Workbench, state: RunState) -> UUID:
    """Make a crawl run with nothing left to publish that is in a state."""
    if state is RunState.QUEUED:
        return bench.accept()
    run_id = bench.planned(0, skipped=1)
    match state:
        case RunState.RETRYING:
            bench.ledger.crawls.postpone(run_id, DOWN)
            bench.rewind(run_id, 2)
        case RunState.SUCCEEDED:
            assert bench.ledger.crawls.complete(run_id)
        case RunState.FAILED:
            bench.ledger.runs.fail(run_id, FATAL)
        case RunState.CANCELED:
            bench.ledger.runs.cancel(run_id, actor="tester")
    assert bench.state(run_id) == state
    return run_id


def analysis_in(bench: Workbench, state: RunState) -> UUID:
    """Make a site analysis that is in a state, and whose time to be worked on has come."""
    run_id = bench.accept_analysis()
    if state is RunState.QUEUED:
        return run_id
    if state is RunState.CANCELED:
        bench.ledger.runs.cancel(run_id, actor="tester")
        return run_id
    attempt = bench.begin_attempt(run_id)
    assert attempt is not None
    match state:
        case RunState.RETRYING:
            bench.ledger.analyses.finish_attempt(attempt, BUSY, 1)
        case RunState.SUCCEEDED:
            bench.ledger.analyses.finish_attempt(attempt, GOOD, None)
        case RunState.FAILED:
            bench.ledger.analyses.finish_attempt(attempt, NO, None)
    bench.rewind(run_id, LEASE + 1)
    assert bench.state(run_id) == state
    return run_id


Action = Callable[[Workbench, UUID], object]
ACTIONS: Final[dict[str, tuple[RunState, Action]]] = {
    "begin": (RunState.RUNNING, lambda bench, run: bench.ledger.crawls.begin(run)),
    "postpone": (RunState.RETRYING, lambda bench, run: bench.ledger.crawls.postpone(run, DOWN)),
    "complete": (RunState.SUCCEEDED, lambda bench, run: bench.ledger.crawls.complete(run)),
    "fail": (RunState.FAILED, lambda bench, run: bench.ledger.runs.fail(run, FATAL)),
    "cancel": (RunState.CANCELED, lambda bench, run: bench.ledger.runs.cancel(run, actor="tester")),
    "revive": (RunState.QUEUED, lambda bench, run: bench.ledger.runs.revive(run, actor="tester")),
}
RAISES: Final = {"cancel", "revive"}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("state", RunState)
def test_an_action_leads_along_the_edges_of_the_table_and_no_others(
    bench: Workbench, state: RunState, action: str
) -> None:
    run_id = crawl_in(bench, state)
    before = bench.run(run_id)
    target, act = ACTIONS[action]
    legal = target in TRANSITIONS[state]

    if legal or action not in RAISES:
        act(bench, run_id)
    else:
        with pytest.raises(IllegalTransitionError, match=rf"is {state}: it cannot be (canceled|retried); allowed: "):
            act(bench, run_id)

    after = bench.run(run_id)
    if legal:
        assert after["state"] == target
        assert bench.events(run_id)[-1]["state"] == target
    elif (state, action) == (RunState.RUNNING, "begin"):
        # No transition: another delivery takes part, and its beginning is a sign of life.
        assert after["state"] == RunState.RUNNING
        assert after["wake_at"] > before["wake_at"]
    else:
        assert after == before
    bench.assert_adds_up(run_id)


@pytest.mark.parametrize("state", RunState)
def test_a_call_begins_from_every_state_that_leads_to_running(bench: Workbench, state: RunState) -> None:
    run_id = analysis_in(bench, state)
    before = bench.run(run_id)

    attempt = bench.begin_attempt(run_id)

    assert (attempt is not None) is (state in UNFINISHED)
    assert bench.run(run_id) == before or bench.state(run_id) == RunState.RUNNING


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELED])
@pytest.mark.parametrize("answer", [GOOD, BUSY, NO], ids=lambda answer: answer.outcome)
def test_an_answer_never_moves_a_run_that_is_over(bench: Workbench, state: RunState, answer: Answer) -> None:
    run_id = bench.accept_analysis()
    attempt = bench.begin_attempt(run_id)
    assert attempt is not None
    match state:
        case RunState.CANCELED:
            bench.ledger.runs.cancel(run_id, actor="tester")
        case RunState.FAILED:
            bench.ledger.analyses.finish_attempt(attempt, NO, None)
        case RunState.SUCCEEDED:
            bench.ledger.analyses.finish_attempt(attempt, GOOD, None)
    before = bench.run(run_id)

    bench.ledger.analyses.finish_attempt(attempt, answer, 60 if answer is BUSY else None)

    assert bench.run(run_id) == before


def test_an_unknown_run_is_named_or_left_alone(bench: Workbench) -> None:
    unknown = uuid4()
    for action in ("cancel", "revive"):
        with pytest.raises(RunNotFoundError, match=str(unknown)):
            ACTIONS[action][1](bench, unknown)
    with pytest.raises(RunNotFoundError):
        bench.materialize(unknown)
    assert bench.ledger.crawls.begin(unknown) is None
    assert bench.begin_attempt(unknown) is None
    assert not bench.ledger.crawls.complete(unknown)
    bench.ledger.crawls.postpone(unknown, DOWN)
    bench.ledger.runs.fail(unknown, FATAL)
    bench.ledger.runs.mark_enqueued([unknown])

    assert bench.query("SELECT id FROM runs") == []


def test_a_run_of_the_other_kind_is_left_alone(bench: Workbench) -> None:
    crawl, analysis = bench.accept(), bench.accept_analysis()

    assert bench.begin_attempt(crawl) is None
    assert bench.ledger.crawls.begin(analysis) is None

    assert (bench.state(crawl), bench.state(analysis)) == (RunState.QUEUED, RunState.QUEUED)


# --- Accepting ---------------------------------------------------------------------------------------------


def test_the_same_id_is_one_run_and_its_first_arguments_stand(bench: Workbench) -> None:
    run_id = bench.accept(CrawlArguments(1))
    before = bench.run(run_id)

    for other in (CrawlArguments(1), CrawlArguments(2), AnalysisArguments(3, "news")):
        again = NewRun(run_id, other, Trigger.CLI, traceparent_of(uuid4()))
        assert bench.ledger.runs.accept(again, delivered=False) is False

    assert bench.run(run_id) == before
    assert [event["event"] for event in bench.events(run_id)] == ["run.accepted"]


def test_of_many_that_accept_one_run_at_once_one_creates_it(bench: Workbench) -> None:
    run_id = uuid4()
    new = NewRun(run_id, CrawlArguments(1), Trigger.CELERY, traceparent_of(run_id))

    created = together(*[lambda: bench.ledger.runs.accept(new, delivered=True)] * 8)

    assert sorted(created) == [False] * 7 + [True]
    assert len(bench.events(run_id)) == 1


def test_any_number_of_runs_is_accepted_at_once(bench: Workbench) -> None:
    ids = [uuid4() for _ in range(6_001)]
    news = [NewRun(each, AnalysisArguments(7, "news"), Trigger.CLI, traceparent_of(each)) for each in ids]

    assert bench.ledger.runs.accept_all(news, actor="tester") == [True] * len(ids)

    assert bench.ledger.runs.accept_all(news[:1], actor="tester") == [False]
    (row,) = bench.query("SELECT count(*) FROM orchestrator.run_events")
    assert row["count"] == len(ids)


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELED])
def test_a_run_that_ended_before_it_began_is_recorded_once(bench: Workbench, state: RunState) -> None:
    run_id = uuid4()
    values: dict[str, object] = {
        "id": run_id,
        "kind": RunKind.CRAWL,
        "trigger": Trigger.CELERY,
        "traceparent": traceparent_of(run_id),
    }

    for _ in range(2):
        bench.ledger.runs.record_ended(values, state, InvalidArgumentsError.code, "task_id must be an integer, got str")

    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["wake_at"]) == (state, "invalid_arguments", None)
    assert run["finished_at"] is not None
    assert [event["message"] for event in bench.events(run_id)] == ["task_id must be an integer, got str"]
    assert bench.wake() == []


def test_a_run_without_usable_arguments_is_not_revived(bench: Workbench) -> None:
    run_id = uuid4()
    values: dict[str, object] = {
        "id": run_id,
        "kind": RunKind.SITE_ANALYSIS,
        "trigger": Trigger.CELERY,
        "traceparent": traceparent_of(run_id),
    }
    bench.ledger.runs.record_ended(values, RunState.FAILED, InvalidArgumentsError.code, "wrong arguments")

    with pytest.raises(IllegalTransitionError, match="no usable arguments"):
        bench.ledger.runs.revive(run_id, actor="tester")

    assert bench.state(run_id) == RunState.FAILED


def test_an_expired_message_leaves_a_canceled_run(bench: Workbench) -> None:
    run_id = uuid4()

    bench.ledger.runs.expire(NewRun(run_id, CrawlArguments(1), Trigger.CELERY, traceparent_of(run_id)))

    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["wake_at"]) == (RunState.CANCELED, "expired", None)


def test_an_accepted_run_that_ended_is_not_ended_again(bench: Workbench) -> None:
    run_id = bench.accept()
    before = bench.run(run_id)

    bench.ledger.runs.expire(NewRun(run_id, CrawlArguments(1), Trigger.CELERY, traceparent_of(run_id)))

    assert bench.run(run_id) == before


def test_a_run_waits_for_the_callers_eta(bench: Workbench) -> None:
    run_id = uuid4()
    later = datetime.now(UTC) + timedelta(hours=1)
    new = NewRun(run_id, CrawlArguments(1), Trigger.CELERY, traceparent_of(run_id), not_before=later)
    bench.ledger.runs.accept(new, delivered=True)

    assert bench.ledger.crawls.begin(run_id) is None
    assert bench.wake() == []

    bench.rewind(run_id, 3_601)
    assert bench.wake() == [run_id]
    assert bench.ledger.crawls.begin(run_id) is not None


def test_enqueueing_a_run_that_waits_does_not_wake_it_early(bench: Workbench) -> None:
    run_id = uuid4()
    later = datetime.now(UTC) + timedelta(hours=1)
    new = NewRun(run_id, CrawlArguments(1), Trigger.CLI, traceparent_of(run_id), not_before=later)
    bench.ledger.runs.accept(new, delivered=False)

    bench.ledger.runs.mark_enqueued([run_id])

    assert bench.run(run_id)["wake_at"] >= later


# --- Plans -------------------------------------------------------------------------------------------------


def test_of_two_that_fix_a_plan_at_once_exactly_one_does(bench: Workbench) -> None:
    bench.application.add_sources(50)
    bench.application.add_task(1, list(range(1, 61)))
    for _ in range(10):
        run_id = bench.accept()
        bench.ledger.crawls.begin(run_id)

        answers = together(*[lambda run_id=run_id: bench.materialize(run_id)] * 2)

        assert sorted(answers, key=str) == [(60, 10), None]
        assert bench.assert_adds_up(run_id) == {"pending": 50, "published": 0, "skipped": 10}


def test_a_plan_stays_as_it_was_fixed_though_the_tables_change(bench: Workbench) -> None:
    run_id = bench.planned(3, skipped=1)
    before = bench.plan(run_id)

    bench.application.execute("UPDATE crawl_tasks SET data_source_ids = '{8,9}'; DELETE FROM crawl_configs")
    bench.application.add_configs([(80, 8), (90, 9), (100, 1)])

    assert bench.materialize(run_id) is None
    assert bench.publish(run_id) == [1, 2, 3]
    assert [(source, config) for source, config, _ in bench.plan(run_id)] == [
        (source, config) for source, config, _ in before
    ]


def test_a_plan_is_not_fixed_once_the_run_is_over(bench: Workbench) -> None:
    bench.application.add_sources(3)
    bench.application.add_task(1, [1, 2, 3])
    run_id = bench.accept()
    bench.ledger.runs.cancel(run_id, actor="tester")

    assert bench.materialize(run_id) is None

    assert bench.plan(run_id) == []


def test_a_refused_plan_leaves_no_row(bench: Workbench) -> None:
    run_id = bench.accept(CrawlArguments(404))

    bench.fan_out().deliver(run_id)

    run = bench.run(run_id)
    assert (run["state"], run["error_code"]) == (RunState.FAILED, "crawl_task_not_found")
    assert bench.plan(run_id) == []


@pytest.mark.parametrize("listed", [[], None, [None]], ids=str)
def test_an_empty_plan_is_a_success(bench: Workbench, listed: list[object] | None) -> None:
    bench.application.add_task(1, listed)
    run_id = bench.accept()

    assert bench.fan_out().deliver(run_id) is None

    assert bench.state(run_id) == RunState.SUCCEEDED
    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 0, "skipped": 0}


# --- Batches -----------------------------------------------------------------------------------------------


def test_two_workers_share_the_rows_and_take_none_twice(bench: Workbench) -> None:
    run_id = bench.planned(10)
    crawls = bench.ledger.crawls

    with crawls.pending_batch(run_id, limit=3, after=0) as first:
        with crawls.pending_batch(run_id, limit=3, after=0) as second:
            with crawls.pending_batch(run_id, limit=10, after=0) as third:
                assert (sources_of(first), sources_of(second), sources_of(third)) == (
                    [1, 2, 3],
                    [4, 5, 6],
                    [7, 8, 9, 10],
                )
                third.mark(sources_of(third))
            second.mark(sources_of(second))
        first.mark(sources_of(first))

    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 10, "skipped": 0}
    assert bench.publish(run_id) == []


def test_many_workers_on_one_run_publish_each_source_once(bench: Workbench) -> None:
    run_id = bench.planned(400)
    publisher = Fake()
    start = threading.Barrier(4)

    def work() -> None:
        start.wait(10)
        bench.fan_out(publisher, batch_size=7).deliver(run_id)

    together(*[work] * 4)

    published = [source for batch in publisher.batches for source, _ in batch.sources]
    assert sorted(published) == list(range(1, 401))
    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 400, "skipped": 0}
    assert bench.state(run_id) == RunState.SUCCEEDED


def test_only_what_was_confirmed_is_marked(bench: Workbench) -> None:
    run_id = bench.planned(5)

    with bench.ledger.crawls.pending_batch(run_id, limit=5, after=0) as batch:
        assert batch.mark([2, 4]) is RunState.RUNNING

    assert bench.assert_adds_up(run_id) == {"pending": 3, "published": 2, "skipped": 0}
    assert bench.publish(run_id) == [1, 3, 5]


def test_a_batch_that_breaks_off_leaves_its_rows_to_others(bench: Workbench) -> None:
    run_id = bench.planned(5)
    before = bench.run(run_id)

    with suppress(ZeroDivisionError), bench.ledger.crawls.pending_batch(run_id, limit=5, after=0) as batch:
        batch.mark([1, 2, 3, 4, 5])
        raise ZeroDivisionError

    assert bench.run(run_id) == before
    assert bench.publish(run_id) == [1, 2, 3, 4, 5]


def test_a_worker_that_froze_with_a_batch_in_hand_is_told_to_try_again(bench: Workbench) -> None:
    run_id = bench.planned(3)

    def thaw_too_late() -> None:
        with bench.ledger.crawls.pending_batch(run_id, limit=3, after=0) as batch:
            pid = batch.transaction.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            batch.transaction.exec_driver_sql("SET idle_in_transaction_session_timeout = '10ms'")
            eventually(
                lambda: not bench.query("SELECT pid FROM pg_stat_activity WHERE pid = %s", pid),
                within=10,
                what="PostgreSQL ends the frozen session",
            )
            batch.mark([1, 2, 3])

    with pytest.raises(DatabaseUnavailableError):
        thaw_too_late()

    assert bench.publish(run_id) == [1, 2, 3]


def test_of_two_that_hold_the_last_two_batches_exactly_one_completes_the_run(bench: Workbench) -> None:
    for _ in range(25):
        run_id = bench.planned(2)
        both_hold = threading.Barrier(2)
        both_committed = threading.Barrier(2)

        def finish(
            run_id: UUID = run_id, hold: threading.Barrier = both_hold, done: threading.Barrier = both_committed
        ) -> bool:
            with bench.ledger.crawls.pending_batch(run_id, limit=1, after=0) as batch:
                hold.wait(10)
                batch.mark(sources_of(batch))
            done.wait(10)
            return bench.ledger.crawls.complete(run_id)

        assert sorted(together(finish, finish)) == [False, True]
        assert [event["event"] for event in bench.events(run_id)].count("run.succeeded") == 1


def test_two_engines_that_end_together_complete_the_run_however_they_interleave(bench: Workbench) -> None:
    for _ in range(25):
        run_id = bench.planned(2)
        both_publish = threading.Barrier(2)

        def confirm(batch: ExtractionBatch, meet: threading.Barrier = both_publish) -> Receipt:
            meet.wait(10)
            return Receipt([source for source, _ in batch.sources])

        def work(run_id: UUID = run_id, publisher: Publisher = Fake(confirm)) -> None:  # noqa: B008 -- one a round
            bench.fan_out(publisher, batch_size=1).deliver(run_id)

        together(work, work)

        assert bench.state(run_id) == RunState.SUCCEEDED
        assert [event["event"] for event in bench.events(run_id)].count("run.succeeded") == 1


def test_a_run_is_not_complete_while_another_batch_is_open(bench: Workbench) -> None:
    run_id = bench.planned(2)

    with bench.ledger.crawls.pending_batch(run_id, limit=1, after=0) as batch:
        assert bench.publish(run_id) == [2]
        assert bench.ledger.crawls.complete(run_id) is False
        batch.mark(sources_of(batch))

    assert bench.ledger.crawls.complete(run_id) is True


def test_a_run_that_was_not_planned_yet_is_not_complete(bench: Workbench) -> None:
    run_id = bench.accept()
    bench.ledger.crawls.begin(run_id)

    assert bench.ledger.crawls.complete(run_id) is False


def test_messages_and_marks_commit_together_where_the_queue_is_in_postgresql(bench: Workbench) -> None:
    run_id = bench.planned(25, skipped=2)

    assert bench.fan_out().deliver(run_id) is None

    assert bench.state(run_id) == RunState.SUCCEEDED
    rows = bench.query("SELECT message, headers FROM pgmq.q_extraction_queue ORDER BY msg_id")
    assert [row["message"]["data_source_id"] for row in rows] == list(range(1, 26))
    assert [row["headers"]["message_id"] for row in rows] == [
        str(message_id(run_id, source)) for source in range(1, 26)
    ]


# --- Help with big runs ------------------------------------------------------------------------------------


def test_help_is_asked_for_by_who_begins_a_slice_of_a_run_that_is_big_enough(bench: Workbench) -> None:
    asked: list[WakeUp] = []
    help_ = Help(20, 3, asked.extend)
    bench.fan_out(Fake(), help_=help_).deliver(bench.planned(20))
    assert not asked
    run_id = bench.planned(21)
    bench.fan_out(Fake(), help_=help_).deliver(run_id)
    assert [(each.run_id, each.number, each.helps) for each in asked] == [(run_id, 0, True)] * 3


def test_who_helps_takes_part_until_the_slice_is_handed_over(bench: Workbench) -> None:
    run_id = bench.planned(50)
    asked: list[WakeUp] = []
    again: list[WakeUp | None] = []
    helpers = Fake()

    def publish(batch: ExtractionBatch) -> Receipt:
        if asked:  # in the middle of its slice
            again.append(bench.fan_out(helpers, batches=1).help(run_id, asked.pop().number))
        return Receipt([source for source, _ in batch.sources])

    first = Fake(publish)
    continuation = bench.fan_out(first, batches=1, help_=Help(20, 1, asked.extend)).deliver(run_id)

    assert continuation is not None
    assert [len(publisher.batches) for publisher in (first, helpers)] == [1, 1]
    (invitation,) = again
    assert invitation is not None
    assert (invitation.number, invitation.helps) == (0, True), "it goes to the end of the queue"
    assert bench.fan_out(helpers).help(run_id, invitation.number) is None
    assert len(helpers.batches) == 1, "it helped with a slice that was over"
    assert bench.state(run_id) == RunState.RUNNING
    assert bench.fan_out(first).deliver(run_id, continuation.number) is None
    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 50, "skipped": 0}
    assert bench.fan_out(helpers).help(run_id, continuation.number) is None
    assert len(helpers.batches) == 1, "it helped with a run that was over"


def test_who_helps_to_the_last_shuts_the_door(bench: Workbench) -> None:
    run_id = bench.planned(10)

    def publish(batch: ExtractionBatch) -> Receipt:
        # Whoever answers for the run finds that the rest is taken, and leaves.
        assert bench.fan_out(Fake()).deliver(run_id) is None
        return Receipt([source for source, _ in batch.sources])

    assert bench.fan_out(Fake(publish)).help(run_id, 0) is None

    assert bench.state(run_id) == RunState.SUCCEEDED


@pytest.mark.parametrize("error", [DOWN, MessageRefusedError("too large")])
def test_who_helps_and_cannot_leaves_the_run_to_others(bench: Workbench, error: PublishError) -> None:
    run_id = bench.planned(30)
    before = bench.run(run_id)

    assert bench.fan_out(Fake(lambda _: Receipt([], error))).help(run_id, 0) is None

    after = bench.run(run_id)
    assert after | {"progress_at": None, "wake_at": None} == before | {"progress_at": None, "wake_at": None}
    assert bench.assert_adds_up(run_id) == {"pending": 30, "published": 0, "skipped": 0}


def test_help_that_cannot_be_asked_for_is_done_without(bench: Workbench) -> None:
    run_id = bench.planned(30)

    def ask(_: Sequence[WakeUp]) -> None:
        raise DOWN

    assert bench.fan_out(Fake(), help_=Help(1, 1, ask)).deliver(run_id) is None

    assert bench.state(run_id) == RunState.SUCCEEDED


# --- Postponing --------------------------------------------------------------------------------------------


def test_a_broker_that_is_down_is_tried_after_1_2_4_and_at_last_60_seconds(bench: Workbench) -> None:
    run_id = bench.planned(1)
    waits = []
    for _ in range(9):
        bench.ledger.crawls.postpone(run_id, DOWN)
        run = bench.run(run_id)
        waits.append((run["next_attempt_at"] - bench.events(run_id)[-1]["at"]).total_seconds())
        assert (run["state"], run["error_code"]) == (RunState.RETRYING, "broker_unreachable")
        assert run["wake_at"] - run["next_attempt_at"] < timedelta(milliseconds=100)
        bench.rewind(run_id, 61)
        assert bench.ledger.crawls.begin(run_id) is not None

    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60], rel=0.05)


def test_progress_begins_the_waits_anew(bench: Workbench) -> None:
    run_id = bench.planned(2)
    for _ in range(5):
        bench.ledger.crawls.postpone(run_id, DOWN)
        bench.rewind(run_id, 61)
        bench.ledger.crawls.begin(run_id)
    assert bench.publish(run_id, limit=1) == [1]

    bench.ledger.crawls.postpone(run_id, DOWN)

    wait = bench.run(run_id)["next_attempt_at"] - bench.events(run_id)[-1]["at"]
    assert wait.total_seconds() == pytest.approx(1, rel=0.05)


def test_a_delivery_during_the_wait_leaves_and_one_after_it_goes_on(bench: Workbench) -> None:
    run_id = bench.planned(3)
    blocked = Fake(lambda _: Receipt([2], BrokerBlockedError("memory alarm")))
    assert bench.fan_out(blocked).deliver(run_id) is None
    assert bench.assert_adds_up(run_id) == {"pending": 2, "published": 1, "skipped": 0}
    assert bench.run(run_id)["error_code"] == "broker_blocked"

    assert bench.ledger.crawls.begin(run_id) is None
    bench.rewind(run_id, 2)
    assert bench.wake() == [run_id]
    healthy = Fake()
    bench.fan_out(healthy).deliver(run_id)

    assert [batch.sources for batch in healthy.batches] == [[(1, 1), (3, 3)]]
    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["error_message"]) == (RunState.SUCCEEDED, None, None)


# --- Deliveries without progress ---------------------------------------------------------------------------


def test_a_run_that_kills_its_workers_fails_after_a_bounded_number_of_deliveries(bench: Workbench) -> None:
    run_id = bench.planned(1)
    for _ in range(MAX_STALLS):
        bench.rewind(run_id, 16)
        assert bench.wake() == [run_id]
        assert bench.ledger.crawls.begin(run_id) is not None
    bench.rewind(run_id, 16)

    assert bench.ledger.crawls.begin(run_id) is None

    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["wake_at"]) == (RunState.FAILED, "no_progress", None)
    bench.ledger.runs.revive(run_id, actor="tester")
    assert bench.ledger.crawls.begin(run_id) is not None


@pytest.mark.parametrize("silent_for", [0, 60], ids=["soon after progress", "after a long silence"])
def test_a_storm_of_deliveries_is_not_taken_for_a_run_that_kills_its_workers(
    bench: Workbench, silent_for: float
) -> None:
    run_id = bench.planned(1)
    bench.rewind(run_id, silent_for)

    assert all(bench.ledger.crawls.begin(run_id) is not None for _ in range(50))

    assert bench.publish(run_id) == [1]
    assert bench.ledger.crawls.complete(run_id)


def test_progress_forgives_deliveries_without_progress(bench: Workbench) -> None:
    run_id = bench.planned(3)
    for _ in range(3):
        for _ in range(MAX_STALLS):
            bench.rewind(run_id, 6)
            assert bench.ledger.crawls.begin(run_id) is not None
        bench.publish(run_id, limit=1)

    assert bench.ledger.crawls.complete(run_id)


# --- Canceling ---------------------------------------------------------------------------------------------


def cancel_by_api(bench: Workbench, run_id: UUID) -> None:
    with bench.database.transaction() as connection:
        bench.ledger.runs.cancel(run_id, actor="tester", within=connection)


def pulse_of(bench: Workbench, *, before: Callable[[], object] = lambda: None) -> Pulse:
    """Make a worker's pulse, and have something happen before it sends wake-ups."""

    def send(wake_ups: Sequence[WakeUp]) -> None:
        before()
        bench.woken.extend(wake_ups)

    return Pulse(bench.ledger, send, lambda: Node(NODE, "worker"), skip=bench.ledger.runs.skip_canceled)


def pending_of(bench: Workbench) -> int:
    (row,) = bench.query("SELECT count(*) FROM dispatches WHERE state = 'pending'")
    count: int = row["count"]
    return count


def test_cancel_skips_what_nobody_publishes_and_leaves_the_batch_in_flight(bench: Workbench) -> None:
    run_id = bench.planned(5)

    with bench.ledger.crawls.pending_batch(run_id, limit=2, after=0) as batch:
        bench.ledger.runs.cancel(run_id, actor="tester", reason="wrong task")
        assert bench.assert_adds_up(run_id) == {"pending": 2, "published": 0, "skipped": 3}
        assert bench.run(run_id)["wake_at"] is not None
        assert batch.mark(sources_of(batch)) is RunState.CANCELED

    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 2, "skipped": 3}
    bench.rewind(run_id, 3)
    assert bench.wake() == []
    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["wake_at"]) == (RunState.CANCELED, "canceled", None)
    reasons = bench.query("SELECT DISTINCT reason FROM dispatches WHERE state = 'skipped'")
    assert reasons == [{"reason": "run_canceled"}]


def test_the_pulse_skips_what_a_batch_rolled_back_after_the_cancel(bench: Workbench) -> None:
    run_id = bench.planned(5)
    with suppress(ZeroDivisionError), bench.ledger.crawls.pending_batch(run_id, limit=2, after=0):
        bench.ledger.runs.cancel(run_id, actor="tester")
        bench.rewind(run_id, 3)
        assert bench.wake() == []
        assert bench.assert_adds_up(run_id) == {"pending": 2, "published": 0, "skipped": 3}
        assert bench.run(run_id)["wake_at"] is not None
        raise ZeroDivisionError

    bench.rewind(run_id, 3)
    assert bench.wake() == []

    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 0, "skipped": 5}
    assert bench.run(run_id)["wake_at"] is None


def test_a_cancel_in_a_transaction_of_the_callers_is_told_once_that_is_committed(bench: Workbench) -> None:
    run_id = bench.planned(5)

    def cancel(*, fails: bool) -> None:
        with bench.database.transaction() as connection:
            bench.ledger.runs.cancel(run_id, actor="tester", within=connection)
            assert logs == []
            if fails:
                raise ZeroDivisionError

    with capture_logs() as logs:
        with suppress(ZeroDivisionError):
            cancel(fails=True)
        assert (bench.state(run_id), logs) == (RunState.RUNNING, [])
        cancel(fails=False)

    assert [(line["event"], line["run_id"], line["actor"]) for line in logs] == [
        ("run.canceled", str(run_id), "tester")
    ]
    # Only the pulse skips these, for they may be many.
    assert bench.assert_adds_up(run_id) == {"pending": 5, "published": 0, "skipped": 0}
    assert bench.wake() == []
    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 0, "skipped": 5}


def test_a_big_canceled_run_is_skipped_entirely_by_a_few_rounds_of_the_pulse(bench: Workbench) -> None:
    run_id = bench.planned(6 * SKIP_BATCH)
    pulse = pulse_of(bench)

    with bench.ledger.crawls.pending_batch(run_id, limit=1_000, after=0) as batch:
        cancel_by_api(bench, run_id)
        rounds = 0
        while bench.run(run_id)["skipped"] < 6 * SKIP_BATCH - 1_000:
            pulse.once()
            rounds += 1
        assert rounds <= 10
        assert bench.assert_adds_up(run_id)["pending"] == 1_000
        assert batch.mark(sources_of(batch)) is RunState.CANCELED

    bench.rewind(run_id, 3)
    pulse.once()
    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 1_000, "skipped": 6 * SKIP_BATCH - 1_000}
    assert bench.run(run_id)["wake_at"] is None


def test_many_canceled_runs_do_not_hold_up_the_wake_ups_of_others(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    canceled = [bench.planned(3) for _ in range(30)]
    for run_id in canceled:
        cancel_by_api(bench, run_id)
        bench.rewind(run_id, 60)
    due = bench.accept(delivered=False)
    bench.rewind(due, 3)
    monkeypatch.setattr("orchestrator.pulse.BATCH", 10)
    monkeypatch.setattr("orchestrator.pulse._SKIPPING", 0.0)

    pending: list[int] = []
    pulse = pulse_of(bench, before=lambda: pending.append(pending_of(bench)))
    pulse.once()

    # All were due before it, it was woken before any of them was looked at, and the round took as long as it may.
    assert [wake_up.run_id for wake_up in bench.woken] == [due]
    assert pending == [90]
    assert pending_of(bench) == 87
    monkeypatch.undo()
    pulse.once()
    assert pending_of(bench) == 0


def test_canceled_runs_are_skipped_while_the_broker_is_away(bench: Workbench) -> None:
    run_id = bench.planned(3)
    cancel_by_api(bench, run_id)
    bench.rewind(bench.accept(delivered=False), 3)

    def refuse() -> None:
        raise DOWN

    pulse_of(bench, before=refuse).once()

    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 0, "skipped": 3}


def test_a_canceled_run_that_somebody_has_locked_is_passed_over_and_one_process_at_a_time_skips(
    bench: Workbench,
) -> None:
    held, free = bench.planned(3), bench.planned(3)
    for run_id in (held, free):
        cancel_by_api(bench, run_id)

    with psycopg.connect(bench.url) as first:
        first.execute("SELECT pg_advisory_xact_lock(hashtextextended('orchestrator:orchestrator:skip', 0))")
        assert not bench.ledger.runs.skip_canceled()
    with psycopg.connect(bench.url) as connection:
        connection.execute("SELECT 1 FROM orchestrator.runs WHERE id = %s FOR UPDATE", [held])
        assert [bench.ledger.runs.skip_canceled() for _ in range(2)] == [True, False]
        assert bench.assert_adds_up(free)["skipped"] == 3

    assert [bench.ledger.runs.skip_canceled() for _ in range(2)] == [True, False]
    assert bench.assert_adds_up(held)["skipped"] == 3


def test_an_engine_stops_at_the_batch_during_which_its_run_was_canceled(bench: Workbench) -> None:
    run_id = bench.planned(50)

    def confirm(batch: ExtractionBatch) -> Receipt:
        bench.ledger.runs.cancel(run_id, actor="tester")
        return Receipt([source for source, _ in batch.sources])

    assert bench.fan_out(Fake(confirm), batch_size=10).deliver(run_id) is None

    assert bench.state(run_id) == RunState.CANCELED
    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 10, "skipped": 40}


def test_cancel_and_completion_at_once_have_one_winner_and_one_story(bench: Workbench) -> None:
    for _ in range(20):
        run_id = bench.planned(1)
        bench.publish(run_id)

        def cancel(run_id: UUID = run_id) -> bool:
            try:
                bench.ledger.runs.cancel(run_id, actor="tester")
            except IllegalTransitionError:
                return False
            return True

        def complete(run_id: UUID = run_id) -> bool:
            return bench.ledger.crawls.complete(run_id)

        canceled, completed = together(cancel, complete)

        assert canceled is not completed
        assert bench.state(run_id) == (RunState.CANCELED if canceled else RunState.SUCCEEDED)


def test_operators_deeds_are_in_the_audit_log(bench: Workbench) -> None:
    failed, queued = crawl_in(bench, RunState.FAILED), crawl_in(bench, RunState.QUEUED)

    bench.ledger.runs.revive(failed, actor="ann", reason="the task is back")
    bench.ledger.runs.cancel(queued, actor="bob")

    rows = bench.query("SELECT actor, action, run_id, reason, before, after FROM audit_events ORDER BY id")
    assert [tuple(row.values()) for row in rows] == [
        (
            "ann",
            "retry",
            failed,
            "the task is back",
            {"state": "failed", "error_code": "crawl_task_not_found"},
            {"state": "queued"},
        ),
        ("bob", "cancel", queued, None, {"state": "queued", "error_code": None}, {"state": "canceled"}),
    ]


# --- Reviving ----------------------------------------------------------------------------------------------


def test_a_revived_crawl_keeps_its_plan_and_its_message_ids(bench: Workbench) -> None:
    run_id = bench.planned(3)
    bench.publish(run_id, limit=1)
    plan = bench.plan(run_id)
    bench.ledger.runs.fail(run_id, FATAL)
    bench.application.execute("DELETE FROM crawl_tasks; DELETE FROM crawl_configs")

    wake_up = bench.ledger.runs.revive(run_id, actor="tester")

    assert wake_up.run_id == run_id
    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["finished_at"]) == (RunState.QUEUED, None, None)
    assert bench.plan(run_id) == plan
    publisher = Fake()
    bench.fan_out(publisher).deliver(run_id)
    ids = [id_ for batch in publisher.batches for _, id_, _ in batch.messages()]
    assert ids == [str(message_id(run_id, source)) for source in (2, 3)]
    assert bench.state(run_id) == RunState.SUCCEEDED


def test_a_revived_run_that_nobody_enqueues_is_woken(bench: Workbench) -> None:
    run_id = crawl_in(bench, RunState.FAILED)
    bench.ledger.runs.revive(run_id, actor="tester")
    assert bench.wake() == []

    bench.rewind(run_id, 3)

    assert bench.wake() == [run_id]


def test_a_revived_analysis_counts_its_calls_on_and_its_retries_anew(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    for _ in range(4):
        assert bench.begin_attempt(run_id) is not None
        bench.rewind(run_id, LEASE + 1)
    assert bench.begin_attempt(run_id) is None
    assert bench.state(run_id) == RunState.FAILED

    bench.ledger.runs.revive(run_id, actor="tester")

    attempt = bench.begin_attempt(run_id)
    assert attempt is not None
    assert (attempt.number, attempt.retries_done) == (5, 0)
    assert [row["number"] for row in bench.attempts(run_id)] == [1, 2, 3, 4, 5]


# --- The pulse ---------------------------------------------------------------------------------------------


def test_a_run_that_nobody_enqueued_is_woken_after_the_grace_and_not_before(bench: Workbench) -> None:
    run_id = bench.accept(delivered=False)
    assert bench.wake() == []

    bench.rewind(run_id, 2)

    assert bench.wake() == [run_id]
    assert bench.woken[0].arguments == CrawlArguments(1)
    assert bench.run(run_id)["enqueued_at"] is not None


@pytest.mark.parametrize("delivered", [True, False], ids=["delivered", "enqueued"])
def test_a_run_under_way_is_woken_after_the_silence_and_not_before(bench: Workbench, *, delivered: bool) -> None:
    run_id = bench.accept(delivered=delivered)
    bench.ledger.runs.mark_enqueued([run_id])
    bench.rewind(run_id, SILENCE - 5)
    assert bench.wake() == []

    bench.rewind(run_id, 5)

    assert bench.wake() == [run_id]


def test_each_batch_puts_the_wake_up_off(bench: Workbench) -> None:
    run_id = bench.planned(3)
    for _ in range(3):
        bench.rewind(run_id, SILENCE - 5)
        assert bench.wake() == []
        bench.publish(run_id, limit=1)

    bench.rewind(run_id, SILENCE - 5)
    assert bench.wake() == []


def test_one_wake_up_is_outstanding_and_the_next_waits_ever_longer(bench: Workbench) -> None:
    run_id = bench.accept()
    bench.rewind(run_id, SILENCE)
    waits = []
    for _ in range(8):
        assert bench.wake() == [run_id]
        assert bench.wake() == []
        (row,) = bench.query("SELECT extract(epoch FROM wake_at - clock_timestamp())::float8 AS left FROM runs")
        waits.append(row["left"])
        bench.rewind(run_id, row["left"])

    assert waits == pytest.approx([15, 30, 60, 120, 240, 480, 600, 600], rel=0.05)
    assert waits[-1] <= LONGEST_SILENCE
    assert bench.ledger.crawls.begin(run_id) is not None
    assert bench.run(run_id)["wakes"] == 0


def test_the_oldest_are_woken_first_and_never_more_than_the_limit(bench: Workbench) -> None:
    run_ids = [bench.accept() for _ in range(5)]
    for age, run_id in enumerate(run_ids):
        bench.rewind(run_id, 100 + age)

    rounds = [bench.wake(limit=2) for _ in range(4)]

    assert rounds == [run_ids[:2:-1], run_ids[2:0:-1], run_ids[:1], []]


def test_while_one_process_looks_for_due_runs_a_second_one_leaves_it_alone(bench: Workbench) -> None:
    run_id = bench.accept()
    bench.rewind(run_id, SILENCE)

    with psycopg.connect(bench.url) as first:
        first.execute("SELECT pg_advisory_xact_lock(hashtextextended('orchestrator:orchestrator:pulse', 0))")
        assert bench.ledger.runs.wake_due(bench.woken.extend, 10) is None

    assert bench.wake() == [run_id]


def test_while_wake_ups_are_being_sent_their_runs_are_not_locked_and_not_due(bench: Workbench) -> None:
    run_id = bench.accept()
    bench.rewind(run_id, SILENCE)
    meanwhile: list[object] = []

    def send(_: object) -> None:
        meanwhile.append(bench.ledger.runs.wake_due(bench.woken.extend, 10))
        meanwhile.append(bench.ledger.crawls.begin(run_id) is not None)

    bench.ledger.runs.wake_due(send, 10)

    assert meanwhile == [0, True]


def test_a_wake_up_that_could_not_be_sent_is_due_again_at_once(bench: Workbench) -> None:
    run_id = bench.accept(delivered=False)
    bench.rewind(run_id, SILENCE)
    before = bench.run(run_id)

    def refuse(_: object) -> None:
        raise DOWN

    with pytest.raises(BrokerUnreachableError):
        bench.ledger.runs.wake_due(refuse, 10)

    changed = {name for name, value in bench.run(run_id).items() if value != before[name]}
    assert changed <= {"wake_at", "wake_number"}
    assert bench.wake() == [run_id]


def test_a_run_delivered_although_its_wake_up_failed_keeps_its_new_silence(bench: Workbench) -> None:
    run_id = bench.accept()
    bench.rewind(run_id, SILENCE)

    def send_and_fail(_: object) -> None:
        bench.ledger.crawls.begin(run_id)
        raise DOWN

    with pytest.raises(BrokerUnreachableError):
        bench.ledger.runs.wake_due(send_and_fail, 10)

    assert bench.wake() == []


def test_a_run_that_a_worker_has_locked_is_passed_over(bench: Workbench) -> None:
    held, free = bench.accept(), bench.accept()
    for run_id in (held, free):
        bench.rewind(run_id, SILENCE)

    with psycopg.connect(bench.url) as connection:
        connection.execute("SELECT 1 FROM orchestrator.runs WHERE id = %s FOR UPDATE", [held])
        assert bench.wake() == [free]

    assert bench.wake() == [held]


def test_a_silent_run_with_nothing_pending_is_completed_not_woken(bench: Workbench) -> None:
    run_id = bench.planned(2, skipped=1)
    bench.publish(run_id)
    bench.rewind(run_id, SILENCE)

    assert bench.wake() == []

    assert bench.state(run_id) == RunState.SUCCEEDED
    assert [event["event"] for event in bench.events(run_id)][-1] == "run.succeeded"


def test_a_finished_run_is_never_woken(bench: Workbench) -> None:
    for state in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELED):
        bench.rewind(crawl_in(bench, state), 3_600)
        bench.rewind(analysis_in(bench, state), 3_600)

    assert bench.wake() == []


@pytest.mark.parametrize("state", sorted(UNFINISHED))
def test_postgresql_refuses_an_unfinished_run_without_a_wake_up(bench: Workbench, state: RunState) -> None:
    run_id = crawl_in(bench, state)

    with pytest.raises(psycopg.errors.CheckViolation, match="runs_wake_up_ahead_check"):
        bench.query("UPDATE runs SET wake_at = NULL WHERE id = %s", run_id)


@pytest.mark.parametrize(
    ("state", "change", "constraint"),
    [
        (RunState.QUEUED, "state = 'asleep'", "state"),
        (RunState.QUEUED, "kind = 'other'", "kind"),
        (RunState.RUNNING, "published = 1", "counts"),
        (RunState.RUNNING, "skipped = -1", "counts"),
        (RunState.QUEUED, "finished_at = now()", "finished"),
        (RunState.SUCCEEDED, "finished_at = NULL", "finished"),
        (RunState.SUCCEEDED, "total = 2", "complete"),
        (RunState.FAILED, "error_code = NULL", "reason"),
        (RunState.FAILED, "wake_at = now()", "wake_up_ahead"),
    ],
)
def test_postgresql_refuses_what_the_promises_exclude(
    bench: Workbench, state: RunState, change: str, constraint: str
) -> None:
    run_id = crawl_in(bench, state)
    statement = f"UPDATE orchestrator.runs SET {change} WHERE id = '{run_id}'"

    with (
        psycopg.connect(bench.url) as connection,
        pytest.raises(psycopg.errors.CheckViolation, match=f"runs_{constraint}_check"),
    ):
        connection.execute(statement.encode())


def test_a_node_is_seen_until_it_signs_off(bench: Workbench) -> None:
    node = Node("w1@host", "worker", ("orchestrator.crawl",), 4)
    for version in ("1.0", "1.1"):
        bench.ledger.nodes.heartbeat(node, version)
    (row,) = bench.query("SELECT * FROM nodes")
    assert (row["name"], row["version"], row["queues"], row["concurrency"]) == (
        "w1@host",
        "1.1",
        ["orchestrator.crawl"],
        4,
    )
    assert row["seen_at"] > row["started_at"]

    bench.ledger.nodes.sign_off(node)

    assert bench.query("SELECT * FROM nodes") == []


# --- Attempts ----------------------------------------------------------------------------------------------


def test_a_call_is_in_the_ledger_before_it_is_made_and_completed_after_it(bench: Workbench) -> None:
    run_id = bench.accept_analysis(42)

    attempt = bench.begin_attempt(run_id)

    assert attempt is not None
    assert (attempt.number, attempt.retries_done, attempt.data_source_id, attempt.theme_name) == (1, 0, 42, "news")
    (before,) = bench.attempts(run_id)
    assert (before["node"], before["outcome"], before["finished_at"]) == (NODE, None, None)
    assert (before["lease_until"] - before["started_at"]).total_seconds() == pytest.approx(LEASE, rel=0.05)

    bench.ledger.analyses.finish_attempt(attempt, GOOD, None)

    (after,) = bench.attempts(run_id)
    assert (after["outcome"], after["status"], after["code"], after["seconds"]) == ("succeeded", 202, "ok", 0.1)
    assert bench.state(run_id) == RunState.SUCCEEDED


def test_a_retry_and_what_the_service_asked_for_are_recorded(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    attempt = bench.begin_attempt(run_id)
    assert attempt is not None

    bench.ledger.analyses.finish_attempt(attempt, BUSY, 95)

    (row,), run = bench.attempts(run_id), bench.run(run_id)
    assert (row["outcome"], row["retry_after"]) == ("retryable", 90.0)
    assert (row["next_attempt_at"] - row["finished_at"]).total_seconds() == pytest.approx(95, rel=0.05)
    assert (run["state"], run["error_code"], run["error_message"]) == (
        RunState.RETRYING,
        "discovery_unavailable",
        "the service answered 503",
    )
    assert bench.begin_attempt(run_id) is None
    bench.rewind(run_id, 96)
    assert bench.wake() == [run_id]
    assert bench.begin_attempt(run_id) is not None


def test_a_refused_call_fails_the_run_at_once(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    attempt = bench.begin_attempt(run_id)
    assert attempt is not None

    bench.ledger.analyses.finish_attempt(attempt, NO, None)

    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["wake_at"]) == (RunState.FAILED, "discovery_refused", None)


def test_success_after_a_retry_leaves_no_error_behind(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    first = bench.begin_attempt(run_id)
    assert first is not None
    bench.ledger.analyses.finish_attempt(first, BUSY, 1)
    bench.rewind(run_id, 2)
    second = bench.begin_attempt(run_id)
    assert second is not None

    bench.ledger.analyses.finish_attempt(second, GOOD, None)

    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["attempts"]) == (RunState.SUCCEEDED, None, 2)


def analysis(theme: str = "news", *, not_before: datetime | None = None) -> NewRun:
    """Return a run that a caller's message asks for."""
    run_id = uuid4()
    return NewRun(run_id, AnalysisArguments(7, theme), Trigger.CELERY, traceparent_of(run_id), not_before=not_before)


def test_a_callers_run_is_accepted_with_its_first_call(bench: Workbench) -> None:
    new = analysis()

    attempt = bench.begin_attempt(new)

    assert attempt == Attempt(new.run_id, 1, 0, 7, "news", new.traceparent)
    run = bench.run(new.run_id)
    assert (run["state"], run["attempts"], run["stale_below"]) == (RunState.RUNNING, 1, 1)
    assert [event["event"] for event in bench.events(new.run_id)] == ["run.accepted", "run.started"]
    # It is recorded as any other call is: of one that comes after it, and of the run's other deliveries.
    assert bench.begin_attempt(new) is None
    assert [(call["number"], call["node"]) for call in bench.attempts(new.run_id)] == [(1, NODE)]


def test_one_message_that_comes_four_times_at_once_is_one_run_with_one_call(bench: Workbench) -> None:
    for _ in range(10):
        new = analysis()

        begun = together(*[lambda new=new: bench.begin_attempt(new)] * 4)

        assert sum(attempt is not None for attempt in begun) == 1
        assert len(bench.attempts(new.run_id)) == 1


def test_of_a_callers_run_the_first_arguments_stand(bench: Workbench) -> None:
    new = analysis()
    bench.accept(new.arguments, run_id=new.run_id)

    attempt = bench.begin_attempt(replace(new, arguments=AnalysisArguments(8, "other")))

    assert attempt is not None
    assert (attempt.data_source_id, attempt.theme_name) == (7, "news")


@pytest.mark.parametrize("hours", [1, -1])
def test_a_callers_run_waits_for_its_time(bench: Workbench, hours: int) -> None:
    new = analysis(not_before=datetime.now(UTC) + timedelta(hours=hours))

    attempt = bench.begin_attempt(new)

    assert (attempt is None) == (hours > 0)
    assert bench.state(new.run_id) == ("queued" if hours > 0 else "running")


def test_a_callers_run_is_accepted_though_no_slot_is_free(bench: Workbench) -> None:
    first, second = analysis(), analysis()
    assert bench.begin_attempt(first, cap=1) is not None

    assert bench.begin_attempt(second, cap=1) is None

    run = bench.run(second.run_id)
    assert (run["state"], run["awaits_slot"]) == (RunState.QUEUED, "discovery_concurrency")


def test_callers_runs_that_begin_at_once_stay_within_the_cap(bench: Workbench) -> None:
    news = [analysis() for _ in range(12)]

    begun = together(*[lambda new=new: bench.begin_attempt(new, cap=3) for new in news])

    assert sum(attempt is not None for attempt in begun) == 3
    assert bench.query("SELECT count(*) FROM runs WHERE awaits_slot IS NOT NULL") == [{"count": 9}]


def test_the_end_of_a_call_says_whether_another_run_waits_for_it(bench: Workbench) -> None:
    alone, first, waits = (bench.accept_analysis(source) for source in range(1, 4))
    finish = bench.ledger.analyses.finish_attempt
    attempt = bench.begin_attempt(alone, cap=1)
    assert attempt is not None
    assert not finish(attempt, GOOD, None)

    other = bench.begin_attempt(first, cap=1)
    assert other is not None
    assert bench.begin_attempt(waits, cap=1) is None

    assert finish(other, GOOD, None)


@contextmanager
def ends_meanwhile(
    bench: Workbench, attempt: Attempt, change: LiteralString
) -> Iterator[tuple[psycopg.Connection, Future[bool]]]:
    """Let a call end while another session, which is to commit, changes its run."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as pool, psycopg.connect(bench.url) as other:
        other.execute(f"UPDATE orchestrator.runs SET {change} WHERE id = %s", [attempt.run_id])
        ends = pool.submit(bench.ledger.analyses.finish_attempt, attempt, GOOD, None)
        eventually(lambda: bench.query(waiting), within=10, what="the statement has begun, and waits for the run's row")
        yield other, ends


def test_a_run_set_aside_while_a_call_ends_is_seen_by_whoever_ends_it(bench: Workbench) -> None:
    first, second = bench.accept_analysis(1), bench.accept_analysis(2)
    attempt = bench.begin_attempt(first, cap=1)
    assert attempt is not None

    with ends_meanwhile(bench, attempt, "wakes = wakes + 1") as (other, ends):
        assert bench.begin_attempt(second, cap=1) is None
        assert not bench.ledger.analyses.is_slot_free(node=NODE, cap=1, node_cap=100)
        other.commit()

        assert ends.result(10)


@pytest.mark.parametrize("meanwhile", ["wakes = wakes + 1", "state = 'canceled', finished_at = clock_timestamp()"])
def test_a_call_ends_once_its_run_is_free(bench: Workbench, meanwhile: LiteralString) -> None:
    run_id = bench.accept_analysis()
    attempt = bench.begin_attempt(run_id)
    assert attempt is not None

    with ends_meanwhile(bench, attempt, meanwhile) as (other, ends):
        other.commit()
        ends.result(10)

    canceled = "canceled" in meanwhile
    assert bench.state(run_id) == ("canceled" if canceled else "succeeded")
    assert [call["outcome"] for call in bench.attempts(run_id)] == ["succeeded"]
    told = [event["event"] for event in bench.events(run_id)]
    assert told == ["run.accepted", "run.started", *([] if canceled else ["run.succeeded"])]


def test_a_second_delivery_inside_the_lease_leaves(bench: Workbench) -> None:
    run_id = bench.accept_analysis()

    begun = together(*[lambda: bench.begin_attempt(run_id)] * 4)

    assert sum(attempt is not None for attempt in begun) == 1
    bench.rewind(run_id, LEASE - 5)
    assert bench.begin_attempt(run_id) is None
    assert len(bench.attempts(run_id)) == 1


def test_a_second_delivery_does_not_stand_in_line_with_its_run_locked(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    assert bench.begin_attempt(run_id) is not None

    with psycopg.connect(bench.url) as starter:
        starter.execute("SELECT pg_advisory_xact_lock(hashtextextended('orchestrator:orchestrator:discovery', 0))")
        # It would be an error of the lock's time-out.
        assert bench.begin_attempt(run_id) is None


def test_a_call_whose_lease_ran_out_is_lost_and_counts(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    first = bench.begin_attempt(run_id)
    assert first is not None
    bench.rewind(run_id, LEASE)
    assert bench.wake() == [run_id]

    second = bench.begin_attempt(run_id)

    assert second is not None
    assert (second.number, second.retries_done) == (2, 1)
    assert [row["outcome"] for row in bench.attempts(run_id)] == ["lost", None]

    bench.ledger.analyses.finish_attempt(first, GOOD, None)
    assert bench.state(run_id) == RunState.RUNNING
    assert [row["outcome"] for row in bench.attempts(run_id)] == ["lost", None]


def test_a_late_answer_counts_as_long_as_nobody_gave_the_call_up(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    attempt = bench.begin_attempt(run_id)
    assert attempt is not None
    bench.rewind(run_id, LEASE + 60)

    bench.ledger.analyses.finish_attempt(attempt, GOOD, None)

    assert bench.state(run_id) == RunState.SUCCEEDED


def test_three_retries_mean_four_calls_lost_ones_included(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    for number in range(1, 5):
        attempt = bench.begin_attempt(run_id)
        assert attempt is not None
        assert attempt.number == number
        bench.rewind(run_id, LEASE + 1)

    assert bench.begin_attempt(run_id) is None

    run = bench.run(run_id)
    assert (run["state"], run["error_code"], run["attempts"]) == (RunState.FAILED, "lost", 4)
    assert [row["outcome"] for row in bench.attempts(run_id)] == ["lost"] * 4


def test_what_was_canceled_meanwhile_stays_canceled_and_its_answer_is_recorded(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    attempt = bench.begin_attempt(run_id)
    assert attempt is not None
    bench.ledger.runs.cancel(run_id, actor="tester")

    bench.ledger.analyses.finish_attempt(attempt, GOOD, None)

    assert bench.state(run_id) == RunState.CANCELED
    assert [row["outcome"] for row in bench.attempts(run_id)] == ["succeeded"]


@pytest.mark.parametrize(("cap", "node_cap"), [(2, 9), (9, 2)], ids=["everywhere", "here"])
def test_beyond_the_cap_runs_are_set_aside_and_go_on_oldest_first(bench: Workbench, cap: int, node_cap: int) -> None:
    run_ids = [bench.accept_analysis(source) for source in range(1, 6)]
    for age, run_id in enumerate(reversed(run_ids)):
        bench.rewind(run_id, age)

    begun = [bench.begin_attempt(run_id, cap=cap, node_cap=node_cap) for run_id in reversed(run_ids)]

    calls = [attempt for attempt in begun if attempt is not None]
    assert [attempt.run_id for attempt in calls] == [run_ids[4], run_ids[3]]
    assert bench.run(run_ids[0])["awaits_slot"] == "discovery_concurrency"
    bench.ledger.analyses.finish_attempt(calls[0], GOOD, None)
    order = []
    while (waiting := bench.ledger.analyses.next_waiting()) is not None:
        order.append(waiting.run_id)
    assert order == run_ids[:3]
    assert bench.begin_attempt(order[0], cap=cap, node_cap=node_cap) is not None
    assert bench.begin_attempt(order[1], cap=cap, node_cap=node_cap) is None


def test_the_cap_here_does_not_hold_up_another_node(bench: Workbench) -> None:
    first, second = bench.accept_analysis(1), bench.accept_analysis(2)
    assert bench.begin_attempt(first, node_cap=1) is not None
    assert bench.begin_attempt(second, node_cap=1) is None

    assert bench.begin_attempt(second, node="w2@test", node_cap=1) is not None

    assert bench.run(second)["awaits_slot"] is None


def test_calls_whose_lease_ran_out_free_their_slot(bench: Workbench) -> None:
    first, second = bench.accept_analysis(1), bench.accept_analysis(2)
    assert bench.begin_attempt(first, cap=1) is not None
    bench.rewind(first, LEASE + 1)

    assert bench.begin_attempt(second, cap=1) is not None


def test_many_nodes_that_begin_at_once_stay_within_the_cap(bench: Workbench) -> None:
    run_ids = [bench.accept_analysis(source) for source in range(1, 13)]

    begun = together(*[lambda run_id=run_id: bench.begin_attempt(run_id, cap=3) for run_id in run_ids])

    assert sum(attempt is not None for attempt in begun) == 3
    assert bench.query("SELECT count(*) FROM runs WHERE awaits_slot IS NOT NULL") == [{"count": 9}]


def test_a_run_that_waits_for_its_retry_is_not_handed_out(bench: Workbench) -> None:
    first, second = bench.accept_analysis(1), bench.accept_analysis(2)
    assert bench.begin_attempt(first, cap=1) is not None
    assert bench.begin_attempt(second, cap=1) is None
    bench.query("UPDATE runs SET next_attempt_at = clock_timestamp() + interval '1 minute' WHERE id = %s", second)
    assert bench.ledger.analyses.next_waiting() is None

    bench.rewind(second, 61)

    waiting = bench.ledger.analyses.next_waiting()
    assert waiting is not None
    assert waiting.run_id == second


@pytest.mark.parametrize("how", ["cancel", "wake"])
def test_a_run_set_aside_is_not_forgotten(bench: Workbench, how: str) -> None:
    first, second = bench.accept_analysis(1), bench.accept_analysis(2)
    assert bench.begin_attempt(first, cap=1) is not None
    assert bench.begin_attempt(second, cap=1) is None

    if how == "cancel":
        bench.ledger.runs.cancel(second, actor="tester")
        assert bench.ledger.analyses.next_waiting() is None
    else:
        bench.rewind(second, SILENCE + 1)
        assert bench.wake() == [second]


# --- One run, whatever happens to it -----------------------------------------------------------------------


class OneRun(RuleBasedStateMachine):
    """Random deeds on one crawl run, against a model that knows states and sets of sources."""

    bench: Workbench
    size = 6

    def __init__(self) -> None:
        super().__init__()
        self.task_id = int(uuid4()) % 2**60 + 1
        # Sources 1 to 6 are listed, all but the last one have a config.
        self.bench.application.add_task(self.task_id, list(range(1, self.size + 1)))
        self.run_id = self.bench.accept(CrawlArguments(self.task_id))
        self.state = RunState.QUEUED
        self.planned = False
        self.pending: set[int] = set()
        self.published: set[int] = set()

    @rule()
    def begin(self) -> None:
        begun = self.bench.ledger.crawls.begin(self.run_id)
        assert (begun is not None) is (self.state in UNFINISHED)
        if begun is not None:
            assert begun.left == (len(self.pending) if self.planned else None)
            self.state = RunState.RUNNING

    @rule()
    def materialize(self) -> None:
        counts = self.bench.materialize(self.run_id, self.task_id)
        fresh = not self.planned and self.state in UNFINISHED
        assert counts == ((self.size, 1) if fresh else None)
        if fresh:
            self.planned = True
            self.pending = set(range(1, self.size))

    @rule(limit=st.integers(1, 6), after=st.integers(0, 6), confirm=st.sets(st.integers(1, 6)), commit=st.booleans())
    def batch(self, limit: int, after: int, confirm: set[int], *, commit: bool) -> None:
        with (
            suppress(ZeroDivisionError),
            self.bench.ledger.crawls.pending_batch(self.run_id, limit=limit, after=after) as got,
        ):
            expected = sorted(source for source in self.pending if source > after)[:limit]
            assert sources_of(got) == expected
            confirmed = confirm.intersection(expected)
            assert got.mark(sorted(confirmed)) == self.state
            if not commit:
                raise ZeroDivisionError
            self.pending -= confirmed
            self.published |= confirmed

    @rule()
    def complete(self) -> None:
        done = self.bench.ledger.crawls.complete(self.run_id)
        assert done is (self.state is RunState.RUNNING and self.planned and not self.pending)
        if done:
            self.state = RunState.SUCCEEDED

    @rule()
    def postpone(self) -> None:
        self.bench.ledger.crawls.postpone(self.run_id, DOWN)
        if self.state is RunState.RUNNING:
            self.state = RunState.RETRYING
            self.bench.rewind(self.run_id, 61)

    @rule()
    def fail(self) -> None:
        self.bench.ledger.runs.fail(self.run_id, FATAL)
        if self.state is RunState.RUNNING:
            self.state = RunState.FAILED

    # Canceled is the end of the road; most examples should get further than that.
    @precondition(lambda self: self.planned)
    @rule(meanwhile=st.booleans(), rare=st.integers(0, 3))
    def cancel(self, rare: int, *, meanwhile: bool) -> None:
        if rare:
            return
        legal = self.state in UNFINISHED
        if not legal:
            with pytest.raises(IllegalTransitionError):
                self.bench.ledger.runs.cancel(self.run_id, actor="machine")
            return
        if meanwhile:
            with self.bench.ledger.crawls.pending_batch(self.run_id, limit=2, after=0) as taken:
                self.bench.ledger.runs.cancel(self.run_id, actor="machine")
                taken.mark(sources_of(taken))
                self.published |= set(sources_of(taken))
        else:
            self.bench.ledger.runs.cancel(self.run_id, actor="machine")
        self.pending.clear()
        self.state = RunState.CANCELED

    @rule()
    def revive(self) -> None:
        if self.state is RunState.FAILED:
            assert self.bench.ledger.runs.revive(self.run_id, actor="machine").run_id == self.run_id
            self.state = RunState.QUEUED
        else:
            with pytest.raises(IllegalTransitionError):
                self.bench.ledger.runs.revive(self.run_id, actor="machine")

    @rule()
    def wake_much_later(self) -> None:
        self.bench.rewind(self.run_id, LONGEST_SILENCE + 1)
        woken = self.run_id in self.bench.wake()
        if self.state is RunState.RUNNING and self.planned and not self.pending:
            assert not woken
            self.state = RunState.SUCCEEDED
        else:
            assert woken is (self.state in UNFINISHED)

    @invariant()
    def the_ledger_agrees(self) -> None:
        run = self.bench.run(self.run_id)
        assert run["state"] == self.state
        assert (run["wake_at"] is not None) >= (self.state in UNFINISHED)
        counts = self.bench.assert_adds_up(self.run_id)
        assert counts["pending"] == len(self.pending)
        assert {source for source, _, state in self.bench.plan(self.run_id) if state == "published"} == self.published

    @invariant()
    def the_story_is_legal(self) -> None:
        told = [RunState(event["state"]) for event in self.bench.events(self.run_id)]
        assert told[0] is RunState.QUEUED
        assert all(after in TRANSITIONS[before] for before, after in pairwise(told)), told


def test_whatever_happens_to_a_run_its_state_is_legal_and_its_counts_add_up(bench: Workbench) -> None:
    bench.application.add_sources(OneRun.size - 1)
    machine = type("OneRunHere", (OneRun,), {"bench": bench})

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# --- What a review found -----------------------------------------------------------------------------------


def test_wake_ups_sent_while_a_continuation_waited_in_the_queue_are_stale(bench: Workbench) -> None:
    run_id = bench.planned(3)
    continuation = bench.ledger.crawls.hand_over(run_id)
    assert continuation is not None
    for _ in range(3):
        bench.rewind(run_id, LONGEST_SILENCE)
        assert bench.wake() == [run_id]
    redundant = list(bench.woken)

    assert bench.ledger.crawls.begin(run_id, continuation.number) is not None

    # Else each would work a slice and send a continuation of its own, and the queue would only grow.
    assert [bench.ledger.crawls.begin(run_id, wake_up.number) for wake_up in redundant] == [None]
    # The one that is being worked on may come again: its worker may have died.
    assert bench.ledger.crawls.begin(run_id, continuation.number) is not None


def test_only_one_continuation_is_on_its_way(bench: Workbench) -> None:
    run_id = bench.planned(3)

    first, second = bench.ledger.crawls.hand_over(run_id), bench.ledger.crawls.hand_over(run_id)

    assert (first is not None, second) == (True, None)


def test_a_lost_continuation_is_made_up_for_by_the_pulse(bench: Workbench) -> None:
    run_id = bench.planned(3)
    assert bench.ledger.crawls.hand_over(run_id) is not None
    bench.rewind(run_id, SILENCE)
    assert bench.wake() == [run_id]
    (wake_up,) = bench.woken

    assert bench.ledger.crawls.begin(run_id, wake_up.number) is not None
    assert bench.ledger.crawls.hand_over(run_id) is not None


def test_the_first_message_about_a_run_and_about_a_revived_one_is_good(bench: Workbench) -> None:
    run_id = bench.accept(delivered=False)
    assert bench.ledger.crawls.begin(run_id, 0) is not None
    bench.ledger.runs.fail(run_id, CrawlTaskNotFoundError("gone"))

    wake_up = bench.ledger.runs.revive(run_id, actor="test")

    assert bench.ledger.crawls.begin(run_id, wake_up.number) is not None


def test_a_row_that_todays_rules_refuse_does_not_keep_the_pulse_from_the_others(bench: Workbench) -> None:
    bad, good = bench.accept_analysis(), bench.accept()
    bench.query("UPDATE runs SET theme_name = repeat('x', 300) WHERE id = %s RETURNING id", bad)
    for run_id in (bad, good):
        bench.rewind(run_id, SILENCE)

    assert bench.wake() == [good]

    assert (bench.run(bad)["state"], bench.run(bad)["error_code"]) == ("failed", "invalid_arguments")


def test_an_answer_and_the_end_of_its_lease_do_not_deadlock(bench: Workbench) -> None:
    ok = Answer(AttemptOutcome.SUCCEEDED, 200, AnswerCode.OK, "ok", None, 0.1)
    for _ in range(25):
        run_id = bench.accept_analysis()
        attempt = bench.begin_attempt(run_id)
        assert attempt is not None
        bench.rewind(run_id, LEASE + 1)

        together(partial(bench.ledger.analyses.finish_attempt, attempt, ok, None), partial(bench.begin_attempt, run_id))

        outcomes = [row["outcome"] for row in bench.attempts(run_id)]
        assert outcomes in (["succeeded"], ["lost", None])


def test_cancelling_a_large_run_skips_it_in_short_transactions(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.ledger.runs.SKIP_BATCH", 10)
    run_id = bench.planned(35)

    bench.ledger.runs.cancel(run_id, actor="test")

    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 0, "skipped": 35}
    assert bench.run(run_id)["wake_at"] is None
