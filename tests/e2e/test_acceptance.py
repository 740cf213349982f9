"""Both jobs of the mission, end to end, on every supported set-up: real workers, real brokers, real HTTP."""

import json
from itertools import count
from typing import Final
from uuid import UUID, uuid4, uuid5

import pytest

from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.stack import CRAWL_TASK, Extraction, Stack

_NUMBERS: Final = count(1)


def a_task(stack: Stack, sources: list[object] | None) -> int:
    """Add a crawl task of the test's own."""
    task_id = next(_NUMBERS)
    stack.application.add_task(task_id, sources)
    return task_id


def some_sources(stack: Stack, number: int, status: str = "active") -> list[object]:
    """Add crawl configs for data sources of the test's own; a config's id is its source's plus a million."""
    sources = [1_000 + next(_NUMBERS) for _ in range(number)]
    stack.application.add_configs([(1_000_000 + source, source, status) for source in sources])
    return list(sources)


def wire(stack: Stack, run_id: UUID) -> dict[int, Extraction]:
    """Return a run's messages by data source, having checked that no source has two."""
    messages = [message for message in stack.extractions() if message.body["run_id"] == str(run_id)]
    by_source = {message.source: message for message in messages}
    assert len(by_source) == len(messages)
    return by_source


def logged(stack: Stack, event: str, run_id: UUID) -> list[dict[str, object]]:
    """Return the log lines of one event about one run."""
    lines = [line for process in stack.processes for line in process.text().splitlines() if line.startswith("{")]
    return [entry for entry in map(json.loads, lines) if (entry["event"], entry.get("run_id")) == (event, str(run_id))]


def test_a_crawl_task_puts_one_message_per_configured_source_on_the_queue(stack: Stack) -> None:
    one, two = some_sources(stack, 2)
    (disabled,) = some_sources(stack, 1, "disabled")
    stack.application.add_configs([(2_000_000 + next(_NUMBERS), int(str(two)), "disabled")])
    task_id = a_task(stack, [two, one, disabled, None, 999_999, one])

    run_id = stack.crawl(task_id)

    run = stack.await_run(run_id)
    assert (run["state"], run["total"], run["published"], run["skipped"]) == ("succeeded", 4, 2, 2)
    messages = wire(stack, run_id)
    assert {source: message.body for source, message in messages.items()} == {
        source: {
            "crawl_config_id": 1_000_000 + int(str(source)),
            "data_source_id": source,
            "task_id": task_id,
            "run_id": str(run_id),
        }
        for source in (one, two)
    }
    for source, message in messages.items():
        assert message.message_id == str(uuid5(run_id, str(source)))
    warned = logged(stack, "dispatch.skipped", run_id)
    assert {entry["data_source_id"] for entry in warned} == {disabled, 999_999}
    assert all(entry["task_id"] == task_id and entry["level"] == "warning" for entry in warned)


def test_the_message_has_exactly_the_promised_properties(on_rabbitmq: Stack) -> None:
    task_id = a_task(on_rabbitmq, some_sources(on_rabbitmq, 1))
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    generated = on_rabbitmq.crawl(task_id)
    continued = on_rabbitmq.crawl(task_id, headers={"traceparent": trace})
    on_rabbitmq.await_run(generated)
    on_rabbitmq.await_run(continued)

    messages = {UUID(message.body["run_id"]): message for message in on_rabbitmq.extractions()}
    first = messages[generated].properties
    assert first["application_headers"]["traceparent"].split("-")[1] == generated.hex
    assert messages[continued].properties["application_headers"] == {"traceparent": trace}
    for properties in (messages[generated].properties, messages[continued].properties):
        assert {name: properties[name] for name in properties if name not in {"message_id", "application_headers"}} == {
            "content_type": "application/json",
            "delivery_mode": 2,
            "type": "extraction.requested",
            "app_id": "orchestrator",
        }


def test_a_record_on_kafka_has_exactly_the_promised_key_and_headers(on_kafka: Stack) -> None:
    (source,) = some_sources(on_kafka, 1)
    run_id = on_kafka.crawl(a_task(on_kafka, [source]))
    on_kafka.await_run(run_id)

    (message,) = wire(on_kafka, run_id).values()
    record = message.properties
    assert record["key"] == str(source)
    assert record["headers"].pop("traceparent").split("-")[1] == run_id.hex
    assert record["headers"] == {
        "message_id": str(uuid5(run_id, str(source))),
        "type": "extraction.requested",
        "app_id": "orchestrator",
        "content_type": "application/json",
    }


@pytest.mark.parametrize(
    ("sources", "code"),
    [([1, -2], "invalid_data_source_ids"), (None, None), ([], None)],
    ids=["bad element", "null", "empty"],
)
def test_odd_source_lists(stack: Stack, sources: list[object] | None, code: str | None) -> None:
    run = stack.await_run(stack.crawl(a_task(stack, sources)))

    assert (run["state"], run["error_code"]) == ("failed" if code else "succeeded", code)
    assert stack.dispatches(run["id"]) == {}


def test_an_unknown_crawl_task_fails_at_once_and_says_so(stack: Stack) -> None:
    run = stack.await_run(stack.crawl(404_404))

    assert (run["state"], run["error_code"]) == ("failed", "crawl_task_not_found")
    assert "404404" in run["error_message"]


def test_wrong_arguments_become_failed_runs_and_the_worker_goes_on(stack: Stack) -> None:
    wrong = [stack.crawl(argument) for argument in ("7", True, 0, -1, 2**63, 1.5, None, [7])]
    wrong += [stack.analyse(*pair) for pair in ((1, ""), (1, "  "), (1, "x" * 256), (1, 5), (0, "x"), ("1", "x"))]
    right = stack.crawl(a_task(stack, []))

    assert stack.await_run(right)["state"] == "succeeded"
    for run_id in wrong:
        run = stack.await_run(run_id)
        assert (run["state"], run["error_code"]) == ("failed", "invalid_arguments")
        assert run["error_message"]


def test_a_site_analysis_is_one_call_and_never_waits_for_the_analysis(stack: Stack, discovery: DiscoveryServer) -> None:
    discovery.play(answer(202))

    run_id = stack.analyse(42, "新闻")

    run = stack.await_run(run_id)
    assert (run["state"], run["attempts"]) == ("succeeded", 1)
    (request,) = discovery.requests
    assert request.json == {"data_source_id": 42, "theme_name": "新闻"}
    assert request.headers["idempotency-key"] == str(run_id)
    assert request.headers["traceparent"].split("-")[1] == run_id.hex


def test_a_failing_discovery_service_is_tried_again_later_with_the_same_key(
    stack: Stack, discovery: DiscoveryServer
) -> None:
    discovery.play(answer(503, headers={"Retry-After": "1"}), answer(429), answer(200))

    run_id = stack.analyse(42, "news")

    run = stack.await_run(run_id)
    assert (run["state"], run["attempts"]) == ("succeeded", 3)
    assert {request.headers["idempotency-key"] for request in discovery.requests} == {str(run_id)}
    first, second, third = stack.attempts(run_id)
    assert [first["status"], second["status"], third["status"]] == [503, 429, 200]
    assert first["retry_after"] == 1.0
    # Never early: each call begins after the moment that the ledger named.
    assert second["started_at"] >= first["next_attempt_at"]
    assert third["started_at"] >= second["next_attempt_at"]
    assert (first["next_attempt_at"] - first["finished_at"]).total_seconds() >= 0.999


@pytest.mark.parametrize(
    ("status", "attempts", "code"), [(404, 1, "discovery_refused"), (500, 3, "discovery_unavailable")]
)
def test_a_call_that_cannot_succeed_ends_as_a_failed_run_in_words(
    on_rabbitmq: Stack, discovery: DiscoveryServer, status: int, attempts: int, code: str
) -> None:
    discovery.play(answer(status, b"no such site"))

    run = on_rabbitmq.await_run(on_rabbitmq.analyse(42, "news"))

    assert (run["state"], run["error_code"], run["attempts"]) == ("failed", code, attempts)
    assert str(status) in run["error_message"]
    assert "no such site" in run["error_message"]


def test_an_id_that_is_no_uuid_is_one_run_and_is_kept(stack: Stack) -> None:
    task_id = a_task(stack, [])
    client = stack.client()

    for _ in range(2):
        client.send_task(CRAWL_TASK, args=[task_id], queue="orchestrator.crawl", task_id="nightly-7")
    stack.await_run(stack.crawl(task_id))

    (run,) = stack.query("SELECT * FROM orchestrator.runs WHERE celery_id IS NOT NULL")
    assert (run["celery_id"], run["task_id"]) == ("nightly-7", task_id)


def test_the_same_id_with_other_arguments_keeps_the_first(stack: Stack) -> None:
    task_id = a_task(stack, [])
    run_id = stack.crawl(task_id)
    stack.await_run(run_id)

    stack.crawl(404_404, celery_id=str(run_id))
    stack.await_run(stack.crawl(task_id))

    run = stack.run(run_id)
    assert run is not None
    assert (run["task_id"], run["state"]) == (task_id, "succeeded")
    assert logged(stack, "run.id_conflict", run_id)


def test_a_long_run_goes_on_in_slices(stack: Stack) -> None:
    sources = some_sources(stack, 10_000)

    run_id = stack.crawl(a_task(stack, sources))

    stack.await_run(run_id)
    assert stack.assert_exactly_once_in_effect(run_id, [int(str(source)) for source in sources]) == 0
    assert logged(stack, "run.slice_ended", run_id)


def test_the_same_message_five_times_at_once_is_one_run(stack: Stack) -> None:
    sources = some_sources(stack, 500)
    task_id, run_id = a_task(stack, sources), uuid4()

    for _ in range(5):
        stack.crawl(task_id, celery_id=str(run_id))

    stack.await_run(run_id)
    stack.await_run(stack.crawl(a_task(stack, [])))
    assert stack.assert_exactly_once_in_effect(run_id, [int(str(source)) for source in sources]) == 0


def test_an_eta_is_kept_by_the_ledger_and_an_expired_message_is_recorded(on_rabbitmq: Stack) -> None:
    task_id = a_task(on_rabbitmq, [])

    expired = on_rabbitmq.crawl(task_id, expires=-1)
    later = on_rabbitmq.crawl(task_id, countdown=2)

    run = on_rabbitmq.await_run(later)
    assert (run["started_at"] - run["created_at"]).total_seconds() > 1
    run = on_rabbitmq.await_run(expired)
    assert (run["state"], run["error_code"]) == ("canceled", "expired")
