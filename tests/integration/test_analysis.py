"""The site-analysis engine against a real ledger and a real HTTP server."""

from types import SimpleNamespace
from typing import Any, Final
from uuid import UUID, uuid4

import pytest

from orchestrator import tasks
from orchestrator.analysis import Caps, SiteAnalyser
from orchestrator.discovery import Answer, AnswerCode, DiscoveryClient, RetryPolicy
from orchestrator.domain import AnalysisArguments, Attempt, AttemptOutcome, NewRun, NoAttempt, WakeUp
from orchestrator.errors import DatabaseUnavailableError
from orchestrator.ledger.analyses import AnalysisLedger
from orchestrator.ledger.transitions import SILENCE
from orchestrator.settings import Settings
from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.ledgers import LEASE, NODE, Workbench

ONE: Final = Caps(everywhere=1, here=1)
GOOD: Final = Answer(AttemptOutcome.SUCCEEDED, 202, AnswerCode.OK, "Discovery Service answered 202 Accepted", None, 0.1)


def deliver(ledger: AnalysisLedger, url: str, run_id: UUID) -> WakeUp | None:
    """Deliver a wake-up to an engine that makes one call at a time and never retries."""
    client = DiscoveryClient(url, 5)
    try:
        analyser = SiteAnalyser(ledger, client, RetryPolicy(0, 1, 1), timeout=5, slice_seconds=20)
        return analyser.deliver(WakeUp(run_id, AnalysisArguments(7, "news"), ""), node=NODE, caps=ONE)
    finally:
        client.close()


def test_a_delivery_goes_on_with_all_that_waited_past_those_that_need_no_call(bench: Workbench) -> None:
    busy, over, waits, last = (bench.accept_analysis(source) for source in range(1, 5))
    exhausted = bench.accept_analysis(5)
    assert bench.begin_attempt(exhausted, max_retries=0) is not None
    bench.rewind(exhausted, LEASE + 1)
    attempt = bench.begin_attempt(busy, cap=1)
    assert attempt is not None
    for run_id in (over, waits, last, exhausted):
        assert bench.begin_attempt(run_id, cap=1, max_retries=9) is None
    bench.query("UPDATE runs SET created_at = now() - interval '1 day' WHERE id = %s RETURNING id", exhausted)
    bench.ledger.runs.cancel(over, actor="test")

    with DiscoveryServer(answer()) as discovery:
        bench.rewind(busy, LEASE + 1)
        deliver(bench.ledger.analyses, discovery.url, waits)

        assert [bench.state(run_id) for run_id in (waits, last)] == ["succeeded", "succeeded"]
        assert bench.state(exhausted) == "failed"
        assert len(discovery.requests) == 2


class AwayTwice(AnalysisLedger):
    """A ledger whose database is away when an answer is to be recorded, twice."""

    away = 2

    def finish_attempt(self, attempt: Attempt, answer: Answer, retry_in: float | None) -> bool:
        if self.away:
            self.away -= 1
            raise DatabaseUnavailableError("restarting")
        return super().finish_attempt(attempt, answer, retry_in)


def test_an_answer_is_kept_while_the_database_is_away(bench: Workbench) -> None:
    run_id = bench.accept_analysis()

    with DiscoveryServer(answer(202)) as discovery:
        deliver(AwayTwice(bench.database), discovery.url, run_id)

        assert (bench.state(run_id), len(discovery.requests)) == ("succeeded", 1)


class EndsMeanwhile(AnalysisLedger):
    """A ledger in which the only call under way ends just after a run was set aside for it."""

    under_way: Attempt | None = None

    def begin_attempt(self, run: UUID | NewRun, **how: Any) -> Attempt | NoAttempt:  # noqa: ANN401 -- the base's
        begun = super().begin_attempt(run, **how)
        if begun is NoAttempt.NO_SLOT and self.under_way is not None:
            # It looked for somebody who waits while its statement began, and there was nobody.
            ended, self.under_way = self.under_way, None
            self.finish_attempt(ended, GOOD, None)
        return begun


def test_a_run_set_aside_as_the_slot_comes_free_goes_on_at_once(bench: Workbench) -> None:
    first, second = bench.accept_analysis(1), bench.accept_analysis(2)
    ledger = EndsMeanwhile(bench.database)
    ledger.under_way = bench.begin_attempt(first, cap=1)

    with DiscoveryServer(answer()) as discovery:
        assert deliver(ledger, discovery.url, second) is None

    assert [bench.state(run_id) for run_id in (first, second)] == ["succeeded", "succeeded"]


class Faulty(AnalysisLedger):
    """A ledger with a fault of ours."""

    def begin_attempt(self, run: UUID | NewRun, **how: Any) -> Attempt | NoAttempt:  # noqa: ANN401, ARG002 -- the base's
        raise RuntimeError("a fault of ours")


def test_a_fault_of_ours_leaves_a_callers_run_with_its_arguments(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = DiscoveryClient("http://127.0.0.1:9", 5)
    analyser = SiteAnalyser(Faulty(bench.database), client, RetryPolicy(0, 1, 1), timeout=5, slice_seconds=20)
    ours = SimpleNamespace(ledger=bench.ledger, analyser=analyser, caps=lambda _: ONE, settings=Settings())
    monkeypatch.setattr(tasks, "services", lambda: ours)
    run_id = uuid4()

    tasks.trigger_site_analysis.push_request(id=str(run_id))
    try:
        tasks.trigger_site_analysis.run(7, "news")
    finally:
        tasks.trigger_site_analysis.pop_request()

    run = bench.run(run_id)
    assert (run["state"], run["data_source_id"], run["theme_name"]) == ("queued", 7, "news")
    assert bench.wake() == []
    bench.rewind(run_id, SILENCE + 1)
    assert bench.wake() == [run_id]
