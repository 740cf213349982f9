"""Spans: parents, what is sent along, and nothing at all where nobody collects them."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from uuid import UUID

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from orchestrator import tracing
from orchestrator.domain import traceparent_of
from orchestrator.tracing import SpanKind, span

RUN = UUID("0b9f2f0e-7a51-4d0c-9f0e-2d1d3c5a7b11")
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-11111111111111111111111111111111-2222222222222222-01"
UNSAMPLED = CALLER.removesuffix("01") + "00"


@pytest.fixture
def collected() -> Iterator[InMemorySpanExporter]:
    """Spans that have ended."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(None)


def ids(made: ReadableSpan) -> tuple[str, str]:
    """Return a span's trace id and its own, in hex."""
    assert made.context is not None
    return f"{made.context.trace_id:032x}", f"{made.context.span_id:016x}"


def test_a_span_continues_the_trace_of_its_run(collected: InMemorySpanExporter) -> None:
    with span("process x", SpanKind.CONSUMER, CALLER, {"a": 1}) as processing:
        sent = processing.traceparent

    (made,) = collected.get_finished_spans()
    trace_id, span_id = ids(made)
    assert made.parent is not None
    assert f"{made.parent.span_id:016x}" == CALLER.split("-")[2]
    assert (trace_id, made.attributes, made.kind.name) == (CALLER.split("-")[1], {"a": 1}, "CONSUMER")
    assert sent == f"00-{trace_id}-{span_id}-01"


def test_a_run_without_a_caller_has_its_own_id_as_trace_id(collected: InMemorySpanExporter) -> None:
    with span("process x", SpanKind.CONSUMER, traceparent_of(RUN), {}):
        pass

    (made,) = collected.get_finished_spans()
    assert ids(made)[0] == RUN.hex


def test_a_span_within_another_of_its_trace_is_its_child(collected: InMemorySpanExporter) -> None:
    with (
        span("process x", SpanKind.CONSUMER, CALLER, {}) as outer,
        span("POST discover", SpanKind.CLIENT, CALLER, {}),
    ):
        pass

    inner, _ = collected.get_finished_spans()
    assert inner.parent is not None
    assert f"{inner.parent.span_id:016x}" == outer.traceparent.split("-")[2]


def test_a_span_of_another_run_keeps_to_that_runs_trace(collected: InMemorySpanExporter) -> None:
    """A delivery goes on with runs that were set aside."""
    with span("process x", SpanKind.CONSUMER, CALLER, {}), span("POST discover", SpanKind.CLIENT, OTHER, {}):
        pass

    inner, _ = collected.get_finished_spans()
    assert ids(inner)[0] == OTHER.split("-")[1]
    assert inner.parent is not None
    assert f"{inner.parent.span_id:016x}" == OTHER.split("-")[2]


def test_a_caller_who_does_not_sample_is_sent_on_as_he_came(collected: InMemorySpanExporter) -> None:
    with span("process x", SpanKind.CONSUMER, UNSAMPLED, {}) as processing:
        assert processing.traceparent == UNSAMPLED

    assert collected.get_finished_spans() == ()


def test_what_failed_has_a_code_and_no_text_of_others(collected: InMemorySpanExporter) -> None:
    with span("POST discover", SpanKind.CLIENT, CALLER, {}) as calling:
        calling.note({"http.response.status_code": 503})
        calling.fail("discovery_unavailable")
    with pytest.raises(ValueError, match="secret"), span("process x", SpanKind.CONSUMER, CALLER, {}):
        raise ValueError("secret")

    failed, raised = collected.get_finished_spans()
    assert failed.status.status_code is raised.status.status_code is StatusCode.ERROR
    assert failed.attributes == {"http.response.status_code": 503, "error.type": "discovery_unavailable"}
    assert raised.attributes == {"error.type": "ValueError"}
    assert raised.events == ()
    assert "secret" not in str(raised.status.description)


def test_without_a_collector_nothing_is_changed_and_nothing_loaded() -> None:
    probe = f"""
import sys
from orchestrator import tracing
tracing.enable()
with tracing.span("process x", tracing.SpanKind.CONSUMER, {CALLER!r}, {{}}) as made:
    made.note({{"a": 1}})
    made.fail("code")
    assert made.traceparent == {CALLER!r}
tracing.flush()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env={})
    assert done.stdout == "[]\n"


def test_threads_that_come_first_together_share_one_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TracerProvider] = []

    def provider() -> TracerProvider:
        sleep(0.05)  # all the others come meanwhile
        made.append(TracerProvider(shutdown_on_exit=False))
        return made[-1]

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(tracing, "_provider", provider)
    flushed: list[TracerProvider] = []

    def force_flush(self: TracerProvider) -> None:
        flushed.append(self)

    monkeypatch.setattr(TracerProvider, "force_flush", force_flush)
    barrier = threading.Barrier(8)

    def work(_: int) -> None:
        barrier.wait()
        with span("process x", SpanKind.CONSUMER, CALLER, {}):
            pass

    tracing.enable()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        tracing.flush()
    finally:
        tracing.use(None)

    assert len(made) == 1
    assert flushed == made


def test_a_collector_without_the_extra_is_told_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)

    tracing.enable()

    with span("process x", SpanKind.CONSUMER, CALLER, {}) as made:
        assert made.traceparent == CALLER
