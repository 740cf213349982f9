"""The site-analysis engine against a real ledger and a real HTTP server."""

from uuid import UUID

from orchestrator.analysis import Caps, SiteAnalyser
from orchestrator.discovery import Answer, DiscoveryClient, RetryPolicy
from orchestrator.domain import AnalysisArguments, Attempt, WakeUp
from orchestrator.errors import DatabaseUnavailableError
from orchestrator.ledger.analyses import AnalysisLedger
from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.ledgers import LEASE, NODE, Workbench

ONE = Caps(everywhere=1, here=1)


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
