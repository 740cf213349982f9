"""Real workers and beats as Prometheus and an OpenTelemetry collector see them."""

import http.server
import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, children_of, eventually, free_port
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack

BATCH: Final = 50
SOURCES: Final = 400
COUNTS: Final = ("_total", "_count", "_sum", "_bucket")


@pytest.fixture
def stack(
    postgres_server: PostgresServer, rabbitmq_server: RabbitMQServer, discovery: DiscoveryServer, tmp_path: Path
) -> Iterator[Stack]:
    """Set-up 2, without processes, with a crawl task 1 of many sources."""
    name = f"observation_{free_port()}"
    broker = rabbitmq_server.vhost_url(rabbitmq_server.fresh_vhost())
    settings = {"DISPATCH__BATCH_SIZE": str(BATCH), "DISCOVERY_URL": discovery.url}
    stack = Stack.on_rabbitmq(postgres_server.create_database(name), broker, tmp_path, **settings)
    stack.prepare()
    stack.application.add_sources(SOURCES)
    stack.application.add_task(1, list(range(1, SOURCES + 1)))
    yield stack
    stack.close()
    postgres_server.drop_database(name)


class Scraper:
    """Scrapes one process, and checks each time that no count has gone down."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._counts: dict[tuple[str, str], float] = {}

    def scrape(self) -> dict[str, float]:
        """Return what was counted by name and labels, buckets left out."""
        with urllib.request.urlopen(self._url, timeout=5) as response:
            text = response.read().decode()
        found = {
            (sample.name.removeprefix("orchestrator_"), json.dumps(sample.labels)): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.endswith(COUNTS)
        }
        sunken = {key: (value, found.get(key)) for key, value in self._counts.items() if found.get(key, -1) < value}
        assert not sunken, "counts went down"
        self._counts = found
        return {
            f"{name}{':'.join(['', *json.loads(labels).values()])}": value
            for (name, labels), value in found.items()
            if not name.endswith("_bucket")
        }


def published(stack: Stack) -> int:
    (row,) = stack.query("SELECT coalesce(sum(published), 0) AS number FROM orchestrator.runs")
    number: int = row["number"]
    return number


def test_counts_of_a_prefork_worker_outlive_its_children(stack: Stack) -> None:
    port = free_port()
    worker = stack.worker("--max-tasks-per-child", "2", settings={"METRICS__WORKER_PORT": str(port)})
    scraper = Scraper(port)
    assert scraper.scrape()["runs_finished_total:crawl:succeeded"] == 0
    first_children = set(children_of(worker.pid))

    for run_id in [stack.crawl(1) for _ in range(12)]:
        stack.await_run(run_id)
        scraper.scrape()

    eventually(
        lambda: scraper.scrape()["runs_finished_total:crawl:succeeded"] == 12, within=20, what="each end is counted"
    )
    counts = scraper.scrape()
    assert not first_children & set(children_of(worker.pid)), "they did their two deliveries each, and more"
    assert counts["runs_created_total:crawl:celery"] == 12
    assert counts["dispatches_total:published"] == 12 * SOURCES
    assert counts["publish_duration_seconds_count"] == 12 * SOURCES / BATCH
    assert counts["run_start_delay_seconds_count:crawl"] == counts["run_duration_seconds_count:crawl"] == 12
    ended = [line for line in worker.text().splitlines() if '"run.succeeded"' in line]
    assert {(line["kind"], line["task_id"]) for line in map(json.loads, ended)} == {("crawl", 1)}


def test_what_a_killed_child_counted_stays(stack: Stack) -> None:
    port = free_port()
    worker = stack.worker(settings={"METRICS__WORKER_PORT": str(port), "DISPATCH__BATCH_SIZE": "10"})
    scraper = Scraper(port)
    run_ids = [stack.crawl(1) for _ in range(3)]
    eventually(
        lambda: scraper.scrape()["dispatches_total:published"] >= SOURCES / 4,
        within=60,
        what="they are in the middle of it",
    )

    worker.kill_a_child()

    for run_id in run_ids:
        stack.await_run(run_id, within=120)
        scraper.scrape()
    # What it had committed and not counted yet, is lost: at most one batch.
    counted = eventually(
        lambda: now if (now := scraper.scrape())["dispatches_total:published"] >= published(stack) - 10 else None,
        within=20,
        what="what was published is counted",
    )
    assert counted is not None
    assert counted["dispatches_total:published"] <= published(stack) == 3 * SOURCES


def test_a_worker_whose_port_is_taken_works_unwatched(stack: Stack) -> None:
    port = free_port()
    settings = {"METRICS__WORKER_PORT": str(port)}
    first = stack.worker(settings=settings, concurrency=1)
    stack.worker(settings=settings, concurrency=1).await_line("metrics.unserved", within=10)

    # And it is not the children, which outlive their parent for a moment, who keep it.
    first.freeze()
    first.kill()
    stack.worker(settings=settings, concurrency=1).await_line("metrics.served", within=10)
    stack.await_run(stack.crawl(1))


def test_a_beat_serves_what_it_fired(stack: Stack) -> None:
    port = free_port()
    stack.application.add_task(2, [1], "every 1 seconds")
    _beat(stack, port)
    scraper = Scraper(port)

    def fired() -> bool:
        with suppress(OSError):
            return scraper.scrape()["schedule_fires_total:started"] >= 1
        return False

    eventually(fired, within=60, what="a slot was started")
    counts = scraper.scrape()
    assert counts["runs_created_total:crawl:schedule"] == counts["schedule_fires_total:started"]
    assert counts["schedule_lag_seconds_count"] == counts["schedule_fires_total:started"]


def _beat(stack: Stack, port: int) -> Process:
    return stack.start("celery", "-A", "orchestrator.celery_app", "beat", settings={"METRICS__BEAT_PORT": str(port)})


class Collector:
    """An OpenTelemetry collector of the loopback's, as far as spans over HTTP go."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of_trace(self, trace_id: str) -> dict[str, list[Any]]:
        """Return the spans of a trace by name."""
        found: dict[str, list[Any]] = {}
        for each in self.spans:
            if each.trace_id.hex() == trace_id:
                found.setdefault(each.name, []).append(each)
        return found


def attributes(span: Any) -> dict[str, Any]:  # noqa: ANN401 -- a generated type
    """Return a span's attributes."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_callers_trace_goes_on_to_the_extractor_and_to_discovery(stack: Stack, discovery: DiscoveryServer) -> None:
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    trace_id, parent_id = caller.split("-")[1:3]
    with Collector() as collector:
        stack.env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        discovery.play(answer())
        stack.worker()
        crawl = stack.crawl(1, headers={"traceparent": caller})
        analysis = stack.analyse(7, "news", headers={"traceparent": caller})
        stack.await_run(crawl)
        stack.await_run(analysis)
        eventually(
            lambda: len(collector.of_trace(trace_id)) == 4 and collector.of_trace(trace_id), within=20, what="4 kinds"
        )
        spans = collector.of_trace(trace_id)

        (processed,) = spans["process execute_crawl_task"]
        assert processed.parent_span_id.hex() == parent_id
        assert attributes(processed)["messaging.message.conversation_id"] == str(crawl)
        published_ = spans["publish extraction_queue"]
        assert len(published_) == SOURCES / BATCH, "a span a batch"
        assert {each.parent_span_id for each in published_} == {processed.span_id}
        assert attributes(published_[0]) == {
            "messaging.system": "rabbitmq",
            "messaging.destination.name": "extraction_queue",
            "messaging.operation.type": "send",
            "messaging.batch.message_count": BATCH,
            "messaging.message.conversation_id": str(crawl),
        }
        headers = {each.properties["application_headers"]["traceparent"] for each in stack.extractions()}
        assert headers == {f"00-{trace_id}-{each.span_id.hex()}-01" for each in published_}

        (called,) = spans["POST discover"]
        assert attributes(called)["http.response.status_code"] == 200
        assert called.parent_span_id == spans["process trigger_site_analysis"][0].span_id
        sent = [each.headers["traceparent"] for each in discovery.requests if each.json["data_source_id"] == 7]
        assert sent[-1:] == [f"00-{trace_id}-{called.span_id.hex()}-01"]
