"""What a Celery worker of ours does besides running tasks: wait for the ledger, beat, and vet messages.

Works with the stock ``celery worker`` command line and every pool. Messages that no task can take go to
``orchestrator.dead``, confirmed before they are acknowledged; what is left of the others is exactly what a
wake-up needs, so that no header of a client can expire, revoke, delay or kill anything inside Celery.
"""

import json
import threading
from collections.abc import Callable
from typing import Any, Final

from celery import bootsteps, signals
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu import Connection, Message

from orchestrator import bootstrap
from orchestrator.celery_app import ANALYSIS_TASK, CRAWL_TASK, app, declare_topology
from orchestrator.domain import Node
from orchestrator.errors import PublishError
from orchestrator.settings import current
from orchestrator.telemetry import Event, configure_logging, logger

NOT_BEFORE: Final = "orchestrator_not_before"
EXPIRES: Final = "orchestrator_expires"
_OURS: Final = frozenset({ANALYSIS_TASK, CRAWL_TASK})
_LONGEST_ID: Final = 500

_log = logger(__name__)
_node: Node = Node("unnamed", "worker")


def this_node() -> Node:
    """Return the worker that this process, or its parent, is."""
    return _node


@signals.setup_logging.connect
def _configure_logging(**_: object) -> None:
    configure_logging(current().log)


@signals.worker_init.connect
def _prepare(sender: Any, **_: object) -> None:
    global _node  # noqa: PLW0603 -- set once, before the pool forks: children inherit it
    configure_logging(current().log)
    bootstrap.await_migrated()
    _node = Node(sender.hostname, "worker", tuple(app.amqp.queues.consume_from), sender.concurrency)


@signals.worker_shutting_down.connect
def _end_slices(**_: object) -> None:
    bootstrap.stop_soon()


@signals.worker_shutdown.connect
def _leave(**_: object) -> None:
    bootstrap.home.close()


class PulseStep(bootsteps.StartStopStep):
    """Runs the pulse in a thread of the worker's main process."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, parent: Any) -> None:
        """Begin to beat."""
        del parent
        self._thread = threading.Thread(
            target=bootstrap.services().pulse(this_node()).run, args=(self._stop,), name="pulse", daemon=True
        )
        self._thread.start()

    def stop(self, parent: Any) -> None:
        """Stop beating and sign off."""
        del parent
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)


app.steps["worker"].add(PulseStep)


class _UndeliverableError(Exception):
    """A message that no task can take; says why."""


class Consumer(CeleryConsumer):
    """Celery's consumer, with our topology declared on every connection and every message vetted."""

    def connect(self) -> Connection:
        """Connect, and declare what is missing: whoever comes first, and again after a broker lost it."""
        connection: Connection = super().connect()
        declare_topology(connection)
        return connection

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], None]:
        """Return the callback for messages: dead-letter what no task can take, reduce the rest."""
        handle: Callable[[Message], None] = super().create_task_handler(*args, **kwargs)

        def on_message(message: Message) -> None:
            try:
                reduce_to_wake_up(message)
            except _UndeliverableError as error:
                self._bury(message, str(error))
            else:
                handle(message)

        return on_message

    def on_unknown_message(self, body: object, message: Message) -> None:
        """Dead-letter what slipped past the vetting."""
        del body
        self._bury(message, "not a Celery task message")

    def on_unknown_task(self, body: object, message: Message, exc: Exception) -> None:
        """Dead-letter what slipped past the vetting."""
        del body
        self._bury(message, f"unknown task: {exc}")

    def on_invalid_task(self, body: object, message: Message, exc: Exception) -> None:
        """Dead-letter what slipped past the vetting."""
        del body
        self._bury(message, f"invalid task message: {exc}")

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Dead-letter what slipped past the vetting."""
        self._bury(message, f"undecodable: {exc}")

    def _bury(self, message: Message, reason: str) -> None:
        reason = reason.replace("\x00", "")[:500]
        headers = {
            "x-orchestrator-reason": reason,
            "x-orchestrator-queue": str(message.delivery_info.get("routing_key")),
            "x-original-headers": json.dumps(message.headers, default=repr)[:10_000].replace("\\u0000", ""),
        }
        try:
            bootstrap.services().sender.bury(
                message.body, headers, message.content_type or "", message.content_encoding or ""
            )
        except PublishError as error:
            # Not lost: back to the queue it came from, to be tried again.
            _log.warning(Event.WAKE_UP_FAILED, code=error.code, error=str(error))
            message.requeue()
            return
        message.ack_log_error(_log, self.connection_errors)  # type: ignore[attr-defined] # celery-types omits it
        task = str(message.headers.get("task", ""))[:200]
        _log.error(
            Event.MESSAGE_DEAD_LETTERED, reason=reason, task=task, message_id=message.properties.get("message_id")
        )


def reduce_to_wake_up(message: Message) -> None:
    """Vet a message and keep of its headers only what a wake-up needs.

    Celery would hold an ETA in memory, remember an expired id as revoked, or let a client's time limit kill a
    child; ETA and expiry are handed to the task instead, which puts them into the ledger.

    Raises:
        _UndeliverableError: no task can take it.
    """
    try:
        payload = message.payload
    except Exception as error:
        raise _UndeliverableError(f"undecodable: {type(error).__name__}: {error}") from error
    headers: dict[str, Any] = message.headers or {}
    if "task" in headers:
        _vet(headers, payload)
        message.headers = _reduced(headers)
    elif isinstance(payload, dict) and "task" in payload:
        # Message protocol 1, all in the body.
        _vet(payload, [payload.get("args"), payload.get("kwargs"), {}])
        reduced = _reduced(payload) | {"args": payload["args"], "kwargs": payload["kwargs"]}
        payload.clear()
        payload.update(reduced)
    else:
        raise _UndeliverableError("not a Celery task message: it names no task")


def _vet(facts: dict[str, Any], body: object) -> None:
    if not isinstance(facts["task"], str) or facts["task"] not in _OURS:
        raise _UndeliverableError(f"unknown task {str(facts['task'])[:200]!r}")
    task_id = facts.get("id")
    if not isinstance(task_id, str) or not 1 <= len(task_id) <= _LONGEST_ID:
        raise _UndeliverableError(f"the task id must be text of 1 to {_LONGEST_ID} characters")
    match body:
        case [list(), dict(), dict() | None]:
            return
    raise _UndeliverableError("the body must be a list of arguments, keyword arguments and embedded signatures")


def _reduced(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "lang": "py",
        "task": facts["task"],
        "id": facts["id"],
        "root_id": facts["id"],
        "retries": facts.get("retries") if facts.get("retries") in range(100) else 0,
        "timelimit": [None, None],
        "argsrepr": str(facts.get("argsrepr", ""))[:200],
        "kwargsrepr": str(facts.get("kwargsrepr", ""))[:200],
        "origin": str(facts.get("origin", ""))[:200],
        "ignore_result": True,
        "traceparent": facts.get("traceparent"),
        NOT_BEFORE: facts.get("eta"),
        EXPIRES: facts.get("expires"),
    }
