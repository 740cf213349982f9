"""What Prometheus is told: what processes counted, and what the ledger says at the moment of a scrape.

Counts come from :mod:`orchestrator.measures`: each worker and each beat serves its own. What is, rather than what
happened, stands in the ledger and is the same whoever asks: the API tells it. Those questions are answered from
indexes and stop counting at :data:`MOST`, so that a scrape costs the same however long the history is.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from sqlalchemy import ColumnElement, Row, ScalarSelect, Select, func, literal, or_, select, union_all

from orchestrator.db import Database
from orchestrator.domain import UNFINISHED, RunState
from orchestrator.errors import OrchestratorError
from orchestrator.insights import Insights, NodeStatus
from orchestrator.measures import CATALOGUE, PREFIX, Counter, Histogram
from orchestrator.schema import runs, schedules
from orchestrator.telemetry import Event, logger

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Of :func:`exposition`."""
MOST: Final = 100_000
"""Where counting of what is in the ledger stops: a gauge that stands there says "at least"."""
OLDEST: Final = 10_000
"""Of how many runs of a state, the oldest, pending dispatches are added up."""
_TIMEOUT: Final = "5s"

_log = logger(__name__)
_ACTIVE: Final = sorted(UNFINISHED)


class _Counted(Collector):
    """What this process and its children counted."""

    def collect(self) -> Iterator[Metric]:
        """Yield every measure under all its labels, from zero on, so that the first of a kind is an increase."""
        for measure in CATALOGUE:
            if isinstance(measure, Counter):
                counter = CounterMetricFamily(measure.name, measure.meaning, labels=measure.labels)
                for labels, value in measure.read():
                    counter.add_metric(labels, value)
                yield counter
            elif isinstance(measure, Histogram):
                histogram = HistogramMetricFamily(measure.name, measure.meaning, labels=measure.labels)
                bounds = [*map(floatToGoString, measure.buckets), "+Inf"]
                for labels, counts, total in measure.read():
                    histogram.add_metric(labels, list(zip(bounds, counts, strict=True)), total)
                yield histogram


class _Ledger(Collector):
    """How the ledger stands.

    Args:
        database: where it is.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._insights = Insights(database)

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges; of a ledger that does not answer only that."""
        try:
            gauges = [*self._of_runs_and_schedules(), *self._of_nodes()]
        except OrchestratorError as error:
            _log.warning(Event.METRICS_INCOMPLETE, code=error.code, error=str(error))
            gauges = []
        yield _gauge("ledger_up", "Whether the ledger answered this scrape.", float(bool(gauges)))
        yield from gauges

    def _of_runs_and_schedules(self) -> Iterator[Metric]:
        with self._database.transaction() as connection:
            connection.execute(select(func.set_config("statement_timeout", _TIMEOUT, literal(value=True))))
            row = connection.execute(_STATE).one()
        active = GaugeMetricFamily(PREFIX + "runs_active", f"Runs that are not over, up to {MOST}.", labels=["state"])
        for state in _ACTIVE:
            active.add_metric([state], _value(row, f"active_{state}"))
        yield active
        for name, meaning in _GAUGES.items():
            yield _gauge(name, meaning, _value(row, name))

    def _of_nodes(self) -> Iterator[Metric]:
        nodes = self._insights.nodes()
        states = GaugeMetricFamily(
            PREFIX + "nodes", "Workers and beats by their last sign of life.", labels=["kind", "status"]
        )
        for kind in ("worker", "beat"):
            for status in NodeStatus:
                number = sum(each.kind == kind and each.status is status for each in nodes)
                states.add_metric([kind, status.value.replace(" ", "_")], number)
        yield states
        ticks = [each.seen_at.timestamp() for each in nodes if each.kind == "beat"]
        meaning = "When a beat ticked last, in seconds since the epoch; 0: none is known."
        yield _gauge("scheduler_last_tick_timestamp_seconds", meaning, max(ticks, default=0.0))


_GAUGES: Final = {
    "oldest_active_run_age_seconds": "Age of the oldest run that is not over; one that waits for its ETA is left out.",
    "pending_dispatches": f"Data sources still to be published, of the {OLDEST} oldest runs at work.",
    "oldest_pending_dispatch_age_seconds": "How long the oldest of them has been planned.",
    "schedules_invalid": f"Schedules that cannot be read and so never fire, up to {MOST}.",
    "oldest_due_slot_age_seconds": "For how long the oldest slot that nobody has claimed has been due.",
}


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, meaning, value=value)


def _value(row: Row[Any], name: str) -> float:
    return float(getattr(row, name) or 0)


def _in_state(state: RunState) -> Select[Any]:
    return select(runs).where(runs.c.state == state.value)


def _counted(condition: ColumnElement[bool]) -> ScalarSelect[int]:
    found = select(literal(1)).where(condition).limit(MOST).subquery()
    return select(func.count()).select_from(found).scalar_subquery()


def _oldest(state: RunState) -> Select[Any]:
    """Select when the oldest run of a state was made; one that is queued may be waiting for its ETA."""
    found = select(runs.c.created_at).where(runs.c.state == state.value)
    if state is RunState.QUEUED:
        found = found.where(or_(runs.c.next_attempt_at.is_(None), runs.c.next_attempt_at <= func.statement_timestamp()))
    return found.order_by(runs.c.created_at, runs.c.id).limit(1)


def _planned(state: RunState) -> Select[Any]:
    left = (runs.c.total - runs.c.published - runs.c.skipped).label("left")
    found = select(left, runs.c.materialized_at).where(runs.c.state == state.value)
    return found.order_by(runs.c.created_at, runs.c.id).limit(OLDEST)


def _age(moment: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.greatest(func.extract("epoch", func.clock_timestamp() - moment), 0)


def _state() -> Select[*tuple[Any, ...]]:
    """Ask for everything at once: one round trip, each part by an index."""
    oldest = union_all(*(select(_oldest(state).subquery()) for state in RunState if state in UNFINISHED)).subquery()
    # A run that is queued has no plan yet; one that was revived has, until it is at work again.
    at_work = (RunState.RUNNING, RunState.RETRYING)
    planned = union_all(*(select(_planned(state).subquery()) for state in at_work)).subquery("planned")
    due = select(func.min(schedules.c.next_fire_at)).where(schedules.c.next_fire_at.is_not(None)).scalar_subquery()
    pending = select(
        func.coalesce(func.sum(planned.c.left), 0).label("pending_dispatches"),
        _age(func.min(planned.c.materialized_at).filter(planned.c.left > 0)).label(
            "oldest_pending_dispatch_age_seconds"
        ),
    ).subquery("pending")
    return select(
        *(_counted(runs.c.state == state).label(f"active_{state}") for state in _ACTIVE),
        select(_age(func.min(oldest.c.created_at))).scalar_subquery().label("oldest_active_run_age_seconds"),
        pending,
        _counted(schedules.c.problem.is_not(None)).label("schedules_invalid"),
        _age(due).label("oldest_due_slot_age_seconds"),
    )


_STATE: Final = _state()


def exposition(database: Database) -> bytes:
    """Return the ledger's gauges and what this process counted, in Prometheus's text format.

    Two statements; a few milliseconds, at most some hundred where as much is unfinished as is counted. Never raises for
    a ledger that is away: ``orchestrator_ledger_up`` is 0 then.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Counted())
    registry.register(_Ledger(database))
    return generate_latest(registry)


def serve(host: str, port: int) -> None:
    """Serve what this process and its children count, from a thread that ends with it.

    A port that cannot be had is told and nothing more: work goes on unwatched rather than not at all.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Counted())
    try:
        server, _ = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        _log.error(Event.METRICS_UNSERVED, host=host, port=port, error=str(error))
        return

    def let_go() -> None:
        # Else a child that outlives its parent would keep the port from its successor.
        with suppress(OSError):
            server.socket.close()

    os.register_at_fork(after_in_child=let_go)
    _log.info(Event.METRICS_SERVED, host=host, port=server.server_port)
