"""Waits live in the ledger: no kill loses a retry, makes it early, or makes it twice."""

import pytest

from tests.faults.conftest import StackFactory
from tests.support.discovery_server import DiscoveryServer, answer, silence
from tests.support.processes import eventually


@pytest.mark.fault("kill -9 of the worker while a site analysis waits for its Retry-After")
def test_kill_9_while_a_retry_waits(make_stack: StackFactory) -> None:
    with DiscoveryServer(answer(503, headers={"Retry-After": "8"}), answer()) as discovery:
        stack = make_stack(DISCOVERY_URL=discovery.url, DISCOVERY_RETRY_DELAY="0.1")
        worker = stack.worker()
        run_id = stack.analyse(1, "news")
        stack.await_run(run_id, "retrying")

        worker.close()
        stack.worker()

        run = stack.await_run(run_id)
        first, second = stack.attempts(run_id)
        assert run["state"] == "succeeded"
        assert len(discovery.requests) == 2
        assert second["started_at"] >= first["next_attempt_at"]


@pytest.mark.fault("kill -9 of the worker in the middle of a Discovery call")
def test_kill_9_in_the_middle_of_a_call_is_a_lost_attempt_and_another_call(make_rabbitmq: StackFactory) -> None:
    with DiscoveryServer(silence(), answer()) as discovery:
        stack = make_rabbitmq(DISCOVERY_URL=discovery.url, DISCOVERY_TIMEOUT="3")
        worker = stack.worker()
        run_id = stack.analyse(1, "news")
        eventually(lambda: discovery.requests, within=20, what="the first call")

        worker.close()
        stack.worker()

        run = stack.await_run(run_id)
        assert (run["state"], [attempt["outcome"] for attempt in stack.attempts(run_id)]) == (
            "succeeded",
            ["lost", "succeeded"],
        )
        assert len({request.headers["idempotency-key"] for request in discovery.requests}) == 1


@pytest.mark.fault("30 site analyses at once over two workers, at most 3 calls allowed")
def test_the_cap_on_calls_holds_across_workers_and_everything_gets_done(make_rabbitmq: StackFactory) -> None:
    with DiscoveryServer(answer(delay=0.3)) as discovery:
        stack = make_rabbitmq(DISCOVERY_URL=discovery.url, DISCOVERY_CONCURRENCY="3")
        for _ in range(2):
            stack.worker(concurrency=4)

        run_ids = [stack.analyse(source, "news") for source in range(1, 31)]

        for run_id in run_ids:
            assert stack.await_run(run_id)["state"] == "succeeded"
        (most,) = stack.query(
            "SELECT max(under_way) FROM (SELECT (SELECT count(*) FROM orchestrator.attempts b"
            " WHERE b.started_at <= a.started_at AND b.finished_at > a.started_at) AS under_way"
            " FROM orchestrator.attempts a) AS counts"
        )
        assert most["max"] <= 3
        assert len(discovery.requests) == 30


@pytest.mark.fault("a Discovery Service that never answers, beside a crawl run")
def test_slow_discovery_does_not_hold_up_crawl_runs(make_rabbitmq: StackFactory) -> None:
    with DiscoveryServer(silence()) as discovery:
        stack = make_rabbitmq(DISCOVERY_URL=discovery.url, DISCOVERY_TIMEOUT="20")
        stack.application.add_sources(5)
        stack.application.add_task(1, [1, 2, 3, 4, 5])
        stack.worker(concurrency=2)
        slow = [stack.analyse(source, "news") for source in range(1, 6)]
        eventually(lambda: discovery.requests, within=20, what="a slow call is under way")

        crawl = stack.await_run(stack.crawl(1), within=15)

        assert crawl["state"] == "succeeded"
        assert all((stack.run(run_id) or {"finished_at": None})["finished_at"] is None for run_id in slow)
