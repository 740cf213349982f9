"""The two Celery tasks, thin: parse the message, accept the run, let the engine work, map errors.

A message is acknowledged once its effect is in the ledger. Wrong arguments become a failed run, never a
crash; a database that is away is waited for, message in hand.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from time import monotonic, sleep
from typing import Any, Final
from uuid import UUID

from celery.app.task import Context, Task
from celery.exceptions import Reject

from orchestrator.bootstrap import services, stopping
from orchestrator.celery_app import ANALYSIS_QUEUE, ANALYSIS_TASK, CRAWL_QUEUE, CRAWL_TASK, HELPS, WAKE_NUMBER, app
from orchestrator.domain import (
    AnalysisArguments,
    Arguments,
    CrawlArguments,
    NewRun,
    RunKind,
    RunState,
    Trigger,
    WakeUp,
    run_id_of,
    traceparent_of,
)
from orchestrator.errors import InvalidArgumentsError, PublishError, TransientError
from orchestrator.telemetry import Event, bound, logger
from orchestrator.tracing import SpanKind, span
from orchestrator.worker import EXPIRES, NOT_BEFORE, this_node

PATIENCE: Final = 120.0
"""Seconds that a delivery waits for the database before it gives its message back to the broker."""
_LONGEST_PAUSE: Final = 5.0
_LAST_YEAR: Final = 2999

_log = logger(__name__)


@app.task(name=CRAWL_TASK, bind=True, max_retries=3, default_retry_delay=1)
def execute_crawl_task(self: Task[Any, Any], /, *args: object, **kwargs: object) -> None:
    """Fan one crawl task out to ``extraction_queue``: ``execute_crawl_task(task_id: int)``."""
    _patiently(self.request, RunKind.CRAWL, lambda: _crawl(self.request, args, kwargs))


@app.task(name=ANALYSIS_TASK, bind=True, max_retries=3, default_retry_delay=1)
def trigger_site_analysis(self: Task[Any, Any], /, *args: object, **kwargs: object) -> None:
    """Ask the Discovery Service to analyse a site: ``trigger_site_analysis(data_source_id: int, theme_name: str)``."""
    _patiently(self.request, RunKind.SITE_ANALYSIS, lambda: _analyse(self.request, args, kwargs))


def _crawl(request: Context, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    new = _read(request, RunKind.CRAWL, CrawlArguments, args, kwargs)
    if new is None:
        return
    number, fan_out = _number(request), services().fan_out
    if number is None:
        services().ledger.runs.accept(new, delivered=True)
    with bound(**asdict(new.arguments)):
        if number is not None and request.get(HELPS):
            continuation = fan_out.help(new.run_id, number)
        else:
            continuation = fan_out.deliver(new.run_id, number)
    if continuation is not None:
        _wake(continuation)


def _analyse(request: Context, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    new = _read(request, RunKind.SITE_ANALYSIS, AnalysisArguments, args, kwargs)
    if new is None:
        return
    ours = services()
    node = this_node()
    # A caller's own run is accepted with its first call, in one transaction.
    delivered = new if _number(request) is None else new.wake_up
    try:
        waiting = ours.analyser.deliver(delivered, node=node.name, caps=ours.caps(node))
    except TransientError:
        raise
    except Exception:
        # Else a fault of ours would be recorded of a run without arguments, which nobody could retry.
        ours.ledger.runs.accept(new, delivered=True)
        raise
    if waiting is not None:
        _wake(waiting)


def _number(request: Context) -> int | None:
    # None of a caller's own message.
    number = request.get(WAKE_NUMBER)
    return number if isinstance(number, int) else None


def _read(
    request: Context,
    kind: RunKind,
    parse: Callable[..., Arguments],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> NewRun | None:
    """Return the run that a message asks for, in the ledger if it is a wake-up; none when it ended before it began."""
    run_id, celery_id = run_id_of(str(request.id))
    if _number(request) is not None and not services().ledger.runs.exists(run_id):
        # Whoever sends a wake-up has committed its run: to accept it here would do the work twice, out of two catalogs.
        _log.warning(Event.WAKE_UP_FOREIGN, run_id=str(run_id))
        return None
    traceparent = traceparent_of(run_id, request.get("traceparent"))
    ledger = services().ledger
    try:
        arguments = _parse(parse, args, kwargs)
        not_before, expires = _moment("eta", request.get(NOT_BEFORE)), _moment("expires", request.get(EXPIRES))
    except InvalidArgumentsError as error:
        ledger.runs.record_ended(
            {"id": run_id, "kind": kind, "trigger": Trigger.CELERY, "traceparent": traceparent, "celery_id": celery_id},
            RunState.FAILED,
            error.code,
            str(error),
        )
        return None
    new = NewRun(run_id, arguments, Trigger.CELERY, traceparent, celery_id=celery_id, not_before=not_before)
    if expires is not None and expires <= max(datetime.now(UTC), not_before or datetime.now(UTC)):
        ledger.runs.expire(new)
        return None
    return new


def _parse(parse: Callable[..., Arguments], args: tuple[object, ...], kwargs: Mapping[str, object]) -> Arguments:
    try:
        inspect.signature(parse).bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidArgumentsError(f"wrong arguments: {str(error)[:200]}") from None
    return parse(*args, **kwargs)


def _moment(name: str, text: object) -> datetime | None:
    """Read a moment of the caller's; without a zone it is UTC, as Celery sends it.

    Raises:
        InvalidArgumentsError: it is none, or none that can be waited for.
    """
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(str(text))
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidArgumentsError(f"{name} must be an ISO 8601 time, got {str(text)[:50]!r}") from None
    if moment.year > _LAST_YEAR:
        raise InvalidArgumentsError(f"{name} must be before the year {_LAST_YEAR + 1}, got {str(text)[:50]!r}")
    return moment


def _wake(wake_up: WakeUp) -> None:
    """Enqueue a continuation; when that fails the pulse will, so it is no reason to fail the delivery."""
    try:
        services().sender.wake([wake_up])
    except PublishError as error:
        _log.warning(Event.WAKE_UP_FAILED, code=error.code, error=str(error))


def _patiently(request: Context, kind: RunKind, deliver: Callable[[], None]) -> None:
    """Deliver, waiting for the database while it is away; every step of a delivery may be repeated.

    Raises:
        Reject: it stayed away; the message goes back to the broker.
    """
    run_id, _ = run_id_of(str(request.id))
    give_up_at = monotonic() + PATIENCE
    pause = 0.5
    with bound(run_id=str(run_id), kind=kind.value):
        while True:
            try:
                with _processing(request, kind, run_id):
                    deliver()
            except TransientError as error:
                _log.warning(Event.DATABASE_WAITING, code=error.code, error=str(error), delay=pause)
                if monotonic() > give_up_at or stopping():
                    raise Reject(str(error), requeue=True) from error
                sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            except Exception as error:  # noqa: BLE001 -- whatever it is, the message must leave a trace
                _log.exception(Event.DELIVERY_FAILED)
                _record_fault(request, kind, error)
                return
            else:
                return


def _processing(request: Context, kind: RunKind, run_id: UUID) -> AbstractContextManager[object]:
    task, queue = (CRAWL_TASK, CRAWL_QUEUE) if kind is RunKind.CRAWL else (ANALYSIS_TASK, ANALYSIS_QUEUE)
    attributes = {
        "messaging.system": "rabbitmq" if services().settings.broker_transport == "amqp" else "postgresql",
        "messaging.destination.name": queue,
        "messaging.operation.type": "process",
        "messaging.message.conversation_id": str(run_id),
    }
    # A wake-up carries what the ledger has of its run.
    traceparent = traceparent_of(run_id, request.get("traceparent"))
    return span(f"process {task.rpartition('.')[2]}", SpanKind.CONSUMER, traceparent, attributes)


def _record_fault(request: Context, kind: RunKind, error: Exception) -> None:
    """Put a fault of ours into the ledger: a message must not be acknowledged as if nothing had happened.

    Raises:
        Reject: the ledger cannot take it; the message goes back to the broker.
    """
    run_id, celery_id = run_id_of(str(request.id))
    ledger = services().ledger
    try:
        if not ledger.runs.note_fault(run_id, error):
            values = {"id": run_id, "kind": kind, "trigger": Trigger.CELERY, "celery_id": celery_id}
            traceparent = {"traceparent": traceparent_of(run_id, request.get("traceparent"))}
            message = f"{type(error).__name__}: {str(error)[:200]}".replace("\x00", "")
            ledger.runs.record_ended(values | traceparent, RunState.FAILED, "internal_error", message)
    except Exception as second:
        sleep(_LONGEST_PAUSE)
        raise Reject(repr(second)[:200], requeue=True) from second
