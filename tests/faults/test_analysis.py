"""A Discovery Service at its worst: no kill loses a retry, makes it early, or makes it twice; no answer holds us up."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Final

import pytest

from tests.faults.conftest import StackFactory
from tests.support.discovery_server import (
    Behaviour,
    DiscoveryServer,
    answer,
    close,
    dribble,
    endless,
    raw,
    reset,
    silence,
)
from tests.support.evidence import Evidence
from tests.support.network import LONGEST_CALL
from tests.support.processes import Process, children_of, eventually, peak_memory
from tests.support.rounds import rounds

_NOW: Final = datetime.now(UTC)
_TIMEOUT: Final = 1.5
_LONGEST_WAIT: Final = 3.0

MISBEHAVIOURS: Final[dict[str, tuple[Behaviour, float]]] = {
    "429 without a word": (answer(429), 0.0),
    "429, Retry-After in seconds": (answer(429, headers={"Retry-After": "2"}), 2.0),
    "503, Retry-After as a date": (
        answer(
            503,
            headers={
                "Date": format_datetime(_NOW, usegmt=True),
                "Retry-After": format_datetime(_NOW + timedelta(seconds=2), usegmt=True),
            },
        ),
        2.0,
    ),
    "503, Retry-After in the past": (answer(503, headers={"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}), 0.0),
    "503, Retry-After that is none": (answer(503, headers={"Retry-After": "soon\t-1e9 \xff"}), 0.0),
    "503, Retry-After of 10^300 s": (answer(503, headers={"Retry-After": "1" + "0" * 300}), _LONGEST_WAIT),
    "a header that never ends": (dribble(b"HTTP/1.1 200 OK\r\nX: ", every=0.1), 0.0),
    "a body of an error that never ends": (dribble(b"HTTP/1.1 500 X\r\n\r\n", every=0.1), 0.0),
    "a flood of a body": (endless(500), 0.0),
    "100 MB of JSON": (answer(500, b'["' + b"x" * 100_000_000 + b'"]'), 0.0),
    "truncated JSON": (raw(b'HTTP/1.1 502 X\r\nContent-Length: 100\r\n\r\n{"error": "cu'), 0.0),
    "a status cut off": (raw(b"HTTP/1.1 20"), 0.0),
    "no HTTP": (raw(b"\x00\xff\x16\x03garbage\r\n\r\n"), 0.0),
    "reset": (reset(), 0.0),
    "closed": (close(), 0.0),
    "silence": (silence(), 0.0),
}
"""What a Discovery Service may do, each worth another try, and the seconds that must pass before it."""


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


@pytest.mark.fault("a Discovery Service that misbehaves in every way we know, and comes to its senses")
def test_every_misbehaviour_is_outlived(make_rabbitmq: StackFactory, evidence: Evidence) -> None:
    with DiscoveryServer(answer()) as discovery:
        stack = make_rabbitmq(
            DISCOVERY_URL=discovery.url,
            DISCOVERY_TIMEOUT=str(_TIMEOUT),
            DISCOVERY_RETRY_DELAY="0.2",
            DISCOVERY_MAX_DELAY=str(_LONGEST_WAIT),
        )
        stack.application.add_task(1, [])
        worker = stack.worker()
        stack.await_run(stack.analyse(1, "news"))
        small = resident(worker)

        for name, (behaviour, least) in [case for _ in rounds(1, 5) for case in MISBEHAVIOURS.items()]:
            discovery.play(behaviour, answer())
            run_id = stack.analyse(2, "news")
            # Crawl runs do not wait for it.
            assert stack.await_run(stack.crawl(1), within=LONGEST_CALL)["state"] == "succeeded", name

            run = stack.await_run(run_id)
            first, second = stack.attempts(run_id)
            assert (run["state"], first["outcome"], second["outcome"]) == ("succeeded", "retryable", "succeeded"), name
            assert first["finished_at"] - first["started_at"] < timedelta(seconds=LONGEST_CALL), name
            assert second["started_at"] - first["finished_at"] >= timedelta(seconds=least), name
            assert second["started_at"] >= first["next_attempt_at"], name
            assert len({request.headers["idempotency-key"] for request in discovery.requests}) == 1, name
            evidence.trials += 1
            evidence.recovered((run["finished_at"] - first["next_attempt_at"]).total_seconds())

        assert worker.running
        grown = resident(worker) - small
        assert grown < 50, f"the worker has grown by {grown:.0f} MB: it keeps what it was sent"
        evidence.note(f"the worker's memory grew by {max(grown, 0.0):.1f} MB, 100 MB bodies included")


def resident(worker: Process) -> float:
    """Return the most memory that a worker and its children ever had, each, in MiB in all."""
    return sum(map(peak_memory, [worker.pid, *children_of(worker.pid)]))
