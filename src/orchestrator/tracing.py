"""Spans for OpenTelemetry: what continues a caller's trace, and how little happens where nobody collects them.

A process that may be traced calls :func:`enable`. Spans are made if the standard ``OTEL_*`` variables name a collector
and the extra ``telemetry`` is installed; OpenTelemetry is not even imported otherwise. The exporter starts with a
process's first span, so after a fork.

Every run has a traceparent, the caller's or one of its own, and a span of a run is a child of that. What leaves with
a span in force carries the span's id, and always the trace id of the run.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from orchestrator import __version__
from orchestrator.errors import OrchestratorError
from orchestrator.telemetry import Event, logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OpenTelemetrySpan
    from opentelemetry.trace import Tracer

Attributes = Mapping[str, str | int]

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_GOODBYE: Final = 2.0  # seconds

_log = logger(__name__)


class SpanKind(Enum):
    """What a span has to do with other processes, by OpenTelemetry's names."""

    CLIENT = "CLIENT"
    CONSUMER = "CONSUMER"
    PRODUCER = "PRODUCER"
    SERVER = "SERVER"


class Span:
    """A span under way, or nothing.

    Attributes:
        traceparent: what to send along with whatever is done in it.
    """

    def __init__(self, traceparent: str, span: "OpenTelemetrySpan | None" = None) -> None:
        self.traceparent = traceparent
        self._span = span

    def note(self, attributes: Attributes) -> None:
        """Add what has become known."""
        if self._span is not None:
            for name, value in attributes.items():
                self._span.set_attribute(name, value)

    def fail(self, code: str) -> None:
        """Note that what it is about failed, with a stable code."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode  # noqa: PLC0415 -- imported long since, where there is a span

            self._span.set_attribute("error.type", code)
            self._span.set_status(StatusCode.ERROR, code)


@contextmanager
def span(name: str, kind: SpanKind, traceparent: str, attributes: Attributes) -> Iterator[Span]:
    """Do the block in a span, where spans are collected.

    Args:
        name: of few different ones.
        kind: see :class:`SpanKind`.
        traceparent: of the run; the parent, unless a span of the same trace is in force.
        attributes: of OpenTelemetry's semantic conventions.
    """
    exporting = _enabled
    if exporting is None:
        yield Span(traceparent)
        return
    from opentelemetry import trace  # noqa: PLC0415 -- who is not traced does not wait for it
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415 -- the same

    current = trace.get_current_span().get_span_context()
    inherited = None
    if not (current.is_valid and f"{current.trace_id:032x}" == traceparent[3:35]):
        inherited = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    # Not the exception's text: it may be anybody's.
    with exporting.tracer.start_as_current_span(
        name,
        inherited,
        trace.SpanKind[kind.value],
        dict(attributes),
        record_exception=False,
        set_status_on_exception=False,
    ) as made:
        context = made.get_span_context()
        # An unsampled span is never exported: a caller's own id says more.
        ours = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        under_way = Span(ours if made.is_recording() else traceparent, made)
        try:
            yield under_way
        except Exception as error:
            under_way.fail(error.code if isinstance(error, OrchestratorError) else type(error).__name__)
            raise


_enabled: "_Exporting | None" = None


class _Exporting:
    """How this process exports spans."""

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer: Tracer | None = None
        self._making = threading.Lock()

    @property
    def tracer(self) -> "Tracer":
        """What makes spans; it and the SDK's provider are made on first use, once, however many threads come first."""
        if (tracer := self._tracer) is not None:
            return tracer
        with self._making:
            if self._provider is None:
                self._provider = _provider()
            if self._tracer is None:
                self._tracer = self._provider.get_tracer("orchestrator", __version__)
            return self._tracer

    def flush(self) -> None:
        """Export what is left, for as long as one can wait for a collector that is away."""
        if self._provider is not None:
            last = threading.Thread(target=self._provider.force_flush, daemon=True)
            last.start()
            last.join(_GOODBYE)


def enable() -> None:
    """Have this process, and those that it forks, make spans, if its environment says where to send them."""
    global _enabled  # noqa: PLW0603 -- a process has one
    if _enabled is not None or not _is_wanted():
        return
    if find_spec("opentelemetry.sdk") is None or find_spec("opentelemetry.exporter") is None:
        _log.warning(
            Event.TRACING_UNAVAILABLE, error="the extra is not installed: pip install 'task-orchestrator[telemetry]'"
        )
        return
    _enabled = _Exporting()


def use(provider: "TracerProvider | None") -> None:
    """Make spans with this provider of OpenTelemetry's SDK from now on; none: make no more."""
    global _enabled  # noqa: PLW0603 -- see above
    _enabled = None if provider is None else _Exporting(provider)


def flush() -> None:
    """Export the spans that have ended, within two seconds; before a process ends."""
    if _enabled is not None:
        _enabled.flush()


def _is_wanted() -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(os.environ.get(name) for name in _ENDPOINTS)


def _provider() -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 -- an extra
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 -- the same
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 -- the same
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 -- the same

    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    ours = {} if named else {"service.name": "task-orchestrator"}
    provider = TracerProvider(resource=Resource.create(ours | {"service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _after_fork() -> None:
    """Have a forked child make its own: threads and sockets are not shared, and a thread may have held the lock."""
    global _enabled  # noqa: PLW0603 -- see above
    if _enabled is not None:
        _enabled = _Exporting()


os.register_at_fork(after_in_child=_after_fork)
