"""What a Celery worker of ours does besides running tasks: wait for the ledger, beat, and vet messages.

Works with the stock ``celery worker`` command line and every pool. Messages that no task can take go to
``orchestrator.dead``, confirmed before they are acknowledged; what is left of the others is exactly what a
wake-up needs, so that no header of a client can expire, revoke, delay or kill anything inside Celery.
"""

import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from time import sleep
from typing import Any, Final

import amqp.exceptions
from celery import bootsteps, signals
from celery.worker import control
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu import Connection, Message
from kombu.utils.json import dumps

from orchestrator import bootstrap, tracing
from orchestrator.celery_app import ANALYSIS_TASK, CRAWL_TASK, HELPS, WAKE_NUMBER, Sender, app, declare_topology
from orchestrator.domain import Node, storable
from orchestrator.errors import ConfigurationError, PublishError
from orchestrator.health import ABSENT_AFTER, Attendance, BrokerWatch
from orchestrator.measures import DEAD_LETTERS
from orchestrator.pulse import Pulse
from orchestrator.rabbitmq import UNREADABLE, break_off, socket_of
from orchestrator.settings import current
from orchestrator.telemetry import Event, configure_logging, logger

NOT_BEFORE: Final = "orchestrator_not_before"
EXPIRES: Final = "orchestrator_expires"
_OURS: Final = frozenset({ANALYSIS_TASK, CRAWL_TASK})
_LONGEST_ID: Final = 500
_DEEPEST: Final = 50

_BURY_AGAIN: Final = 10.0  # seconds
_SIGN_OF_LIFE: Final = 1.0  # seconds
_ASK_AGAIN: Final = 2.0  # seconds
_SOLO_HEARTBEAT: Final = 60.0  # seconds

_log = logger(__name__)
# The consumer's own connection: the pulse may be in the middle of many confirms on the other.
_undertaker: Final = Sender()
_node: Node = Node("unnamed", "worker")
_attendance: Final = Attendance()


def this_node() -> Node:
    """Return the worker that this process, or its parent, is."""
    return _node


def _node_now() -> Node:
    # `celery control add_consumer` and `cancel_consumer` change the queues.
    return replace(_node, queues=tuple(app.amqp.queues.consume_from))


@signals.setup_logging.connect
def _configure_logging(**_: object) -> None:
    configure_logging(current().log)


@signals.worker_init.connect
def _prepare(sender: Any, **_: object) -> None:
    global _node  # noqa: PLW0603 -- set once, before the pool forks: children inherit it
    configure_logging(current().log)
    try:
        bootstrap.await_migrated()
    except ConfigurationError as error:
        # Celery logs what a signal's receiver raises and goes on; this is nothing to go on with.
        sys.stderr.write(f"orchestrator: {error}\n")
        raise SystemExit(2) from None
    # Celery's name is the same for every default worker of a host; a heartbeat is one process's.
    name = f"{sender.hostname}:{os.getpid()}"
    bootstrap.observe(current().metrics.worker_port)
    solo = "solo" in str(sender.pool_cls)
    concurrency = 1 if solo else sender.concurrency
    _node = Node(name, "worker", tuple(app.amqp.queues.consume_from), concurrency, socket.gethostname())
    if solo:
        # It looks for messages, and serves its connection, between two deliveries, and one may last a slice and what
        # follows it.
        _attendance.limit = 3 * ABSENT_AFTER
        sender.app.conf.broker_heartbeat = _SOLO_HEARTBEAT


@signals.worker_shutting_down.connect
def _end_slices(**_: object) -> None:
    bootstrap.stop_soon()


@signals.worker_process_shutdown.connect
def _end_child(**_: object) -> None:
    tracing.flush()


@signals.worker_shutdown.connect
def _leave(**_: object) -> None:
    tracing.flush()
    bootstrap.home.close()


class PulseStep(bootsteps.StartStopStep):
    """Runs the pulse in a thread of the worker's main process, and has it revive a consumer that is stuck."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._watch: BrokerWatch | None = None
        self._orderly = True

    def start(self, parent: Any) -> None:
        """Begin to beat."""
        del parent
        pulse, self._watch = bootstrap.services().pulse(_node_now, _attendance)
        self._watch.start()
        self._thread = threading.Thread(target=self._beat, args=(pulse,), name="pulse", daemon=True)
        self._thread.start()
        threading.Thread(target=self._revive_consumer, name="consumer watch", daemon=True).start()

    def stop(self, parent: Any) -> None:
        """Stop beating, and sign off unless something is wrong: who merely vanishes is missed, and shown as silent."""
        self._orderly = not parent.exitcode
        self._stop.set()
        if self._watch is not None:
            self._watch.stop()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _beat(self, pulse: Pulse) -> None:
        pulse.run(self._stop)
        if self._orderly:
            pulse.sign_off()

    def _revive_consumer(self) -> None:
        """Break the connection of a consumer that is stuck, so that it makes a new one.

        py-amqp reads on until a frame is complete. Where the rest of it never comes, a worker would neither consume
        nor hear SIGTERM any more.
        """
        while not self._stop.wait(_SIGN_OF_LIFE):
            if _attendance.stuck and _consumer is not None and socket_of(_consumer.wire) is not None:
                _log.error(Event.CONSUMER_STUCK, error=_attendance.problem)
                _attendance.absent("its connection to the broker was stuck")
                break_off(_consumer.wire)


app.steps["worker"].add(PulseStep)


def _refuse(command: str, sentence: str) -> None:
    meta = control.Panel.meta[command]

    @control.control_command(name=command, args=meta.args, signature=meta.signature, variadic=meta.variadic)
    def refuse(state: object, **_: object) -> dict[str, str]:
        """Refuse, for the reason that the answer gives."""
        del state
        return {"error": sentence}


# A worker drops what was revoked unseen, and holds back what is too fast: also whatever would heal the run.
for _command in ("revoke", "terminate", "revoke_by_stamped_headers"):
    _refuse(_command, "runs are canceled in the ledger: orchestrator cancel RUN_ID")
_refuse("rate_limit", "runs have no rate limit; DISCOVERY_CONCURRENCY caps the calls that are under way")


class _UndeliverableError(Exception):
    """A message that no task can take; says why."""


_consumer: "Consumer | None" = None


class Consumer(CeleryConsumer):
    """Celery's consumer, with our topology declared on every connection, every message vetted, and a sign of life."""

    connection_errors: tuple[type[Exception], ...]  # celery-types omits it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Celery's events, heartbeats of its own and gossip, are published from the loop that consumes, and each would
        # wait for its confirm: as long as a broker is in alarm nothing would be consumed, and SIGTERM not be heard.
        silent = {"task_events": False, "without_heartbeat": True, "without_gossip": True, "without_mingle": True}
        super().__init__(*args, **{**kwargs, **silent})

    def stop(self) -> None:
        """Stop; a broker is told goodbye a dozen times, so one that does not answer gets a second for each."""
        if (sock := socket_of(self.wire)) is not None:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 1, 0))
        super().stop()

    @property
    def wire(self) -> object:
        """The transport's own connection, if there is one; kombu's public name for it connects where there is none."""
        return getattr(self.connection, "_connection", None)

    def connect(self) -> Connection:
        """Connect, and declare what is missing: whoever comes first, and again after a broker lost it."""
        connection: Connection = super().connect()
        # Prefetch per consumer: quorum queues refuse the global kind (540), and Celery looks for them among the
        # arguments that a queue was declared with, of which ours have none.
        connection.transport.qos_semantics_matches_spec = lambda _: True  # type: ignore[method-assign, assignment] # no setting
        try:
            declare_topology(connection)
        except Exception:
            connection.collect()
            raise
        return connection

    def register_with_event_loop(self, hub: Any) -> None:
        """Show life from within the event loop for as long as this connection lasts."""
        global _consumer  # noqa: PLW0603 -- a worker has one
        super().register_with_event_loop(hub)
        _consumer = self
        _attendance.present()
        hub.call_repeatedly(_SIGN_OF_LIFE, _attendance.present)

    def perform_pending_operations(self) -> None:
        """Show life in each round of the blocking loop, which other pools and transports have."""
        _attendance.present()
        super().perform_pending_operations()

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Note that there is no connection."""
        _attendance.absent(f"it cannot connect to its broker: {exc}")
        super().on_connection_error_before_connected(exc)
        _pause_if_refused(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Note that the connection is gone."""
        _attendance.absent(f"its connection to the broker broke: {exc}")
        super().on_connection_error_after_connected(exc)
        _pause_if_refused(exc)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], None]:
        """Return the callback for messages: dead-letter what no task can take, reduce the rest."""
        handle: Callable[[Message], None] = super().create_task_handler(*args, **kwargs)

        def on_message(message: Message) -> None:
            try:
                reduce_to_wake_up(message)
            except _UndeliverableError as error:
                self._bury(message, str(error))
            except Exception as error:  # noqa: BLE001 -- of the message's making; it would end this worker and the next
                self._bury(message, f"{type(error).__name__}: {error}")
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
        reason = storable(reason)
        headers = {
            "x-orchestrator-reason": reason,
            "x-orchestrator-queue": str(message.delivery_info.get("routing_key")),
            "x-original-headers": _shown(message.headers)[:10_000],
        }
        try:
            _undertaker.bury(message.body, headers, message.content_type or "", message.content_encoding or "")
        except PublishError as error:
            _log.warning(Event.DEAD_LETTER_FAILED, code=error.code, error=str(error), delay=_BURY_AGAIN)
            self._requeue_later(message)
            return
        message.ack_log_error(_log, self.connection_errors)
        DEAD_LETTERS.add()
        task = str(message.headers.get("task", ""))[:200]
        _log.error(
            Event.MESSAGE_DEAD_LETTERED, reason=reason, task=task, message_id=message.properties.get("message_id")
        )

    def _requeue_later(self, message: Message) -> None:
        """Give a message back after a pause: at once would be a loop as fast as the broker."""
        hub = getattr(self, "hub", None)
        if hub is not None:
            hub.call_later(_BURY_AGAIN, message.reject_log_error, _log, self.connection_errors, True)  # noqa: FBT003 -- kombu's positional requeue
        else:
            # Without an event loop this is the thread that consumes; a short pause is all it can afford.
            sleep(1)
            message.requeue()


def _shown(headers: object) -> str:
    try:
        return json.dumps(headers, default=repr).replace("\\u0000", "")
    except TypeError:
        return ascii(headers)  # keys that are no text
    except RecursionError:
        return "nested too deeply to be shown"


def _pause_if_refused(error: Exception) -> None:
    # Celery connects anew at once, and whoever changes passwords, rights or queues needs a moment.
    if isinstance(error, amqp.exceptions.ChannelError | amqp.exceptions.IrrecoverableConnectionError):
        sleep(_ASK_AGAIN)


def reduce_to_wake_up(message: Message) -> None:
    """Vet a message and keep of its headers only what a wake-up needs.

    Celery would hold an ETA in memory, remember an expired id as revoked, or let a client's time limit kill a
    child; ETA and expiry are handed to the task instead, which puts them into the ledger.

    Raises:
        _UndeliverableError: no task can take it.
    """
    if UNREADABLE in (message.headers or {}):
        raise _UndeliverableError("its properties or headers cannot be decoded")
    try:
        payload = message.payload
    except Exception as error:
        raise _UndeliverableError(f"undecodable: {type(error).__name__}: {error}") from error
    headers: dict[str, Any] = message.headers or {}
    if "task" in headers:
        args, kwargs = _vet(headers, payload)
        message.headers = _reduced(headers)
        message.body = dumps([args, kwargs, {}]).encode()  # type: ignore[assignment] # bytes, whatever the stubs say
        message.content_type, message.content_encoding = "application/json", "utf-8"
    elif isinstance(payload, dict) and "task" in payload:
        # Message protocol 1, all in the body.
        args, kwargs = _vet(payload, [payload.get("args"), payload.get("kwargs"), {}])
        reduced = _reduced(payload) | {"args": args, "kwargs": kwargs}
        payload.clear()
        payload.update(reduced)
    else:
        raise _UndeliverableError("not a Celery task message: it names no task")


def _vet(facts: dict[str, Any], body: object) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments; what else the body has (callbacks, chains) would follow a delivery, not a run: dropped.

    Raises:
        _UndeliverableError: no task can take it.
    """
    if not isinstance(facts["task"], str) or facts["task"] not in _OURS:
        raise _UndeliverableError(f"unknown task {str(facts['task'])[:200]!r}")
    task_id = facts.get("id")
    if not isinstance(task_id, str) or not 1 <= len(task_id) <= _LONGEST_ID:
        raise _UndeliverableError(f"the task id must be text of 1 to {_LONGEST_ID} characters")
    match body:
        case [list() as args, dict() as kwargs, dict() | None]:
            if _nested(args, kwargs):
                raise _UndeliverableError(f"its arguments are nested more than {_DEEPEST} levels deep")
            # Celery's own wrapper would trip over a keyword argument of that name, before any code of ours runs.
            return args, {f"{name}_" if name == "self" else str(name): value for name, value in kwargs.items()}
    raise _UndeliverableError("the body must be a list of arguments, keyword arguments and embedded signatures")


def _nested(*values: object) -> bool:
    # A decoder copes with more than what hands it on to a child.
    for _ in range(_DEEPEST):
        values = tuple(
            item
            for value in values
            if isinstance(value, list | dict)
            for item in (value.values() if isinstance(value, dict) else value)
        )
    return bool(values)


def _wake_number(value: object) -> int | None:
    # Anybody can send one that the ledger's column cannot hold.
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


def _reduced(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "lang": "py",
        "task": facts["task"],
        "id": facts["id"],
        "root_id": facts["id"],
        # Celery counts here how often it retried after losing a child; a caller's own number means nothing.
        "retries": facts["retries"] if NOT_BEFORE in facts and facts.get("retries") in range(100) else 0,
        "timelimit": [None, None],
        "argsrepr": str(facts.get("argsrepr", ""))[:200],
        "kwargsrepr": str(facts.get("kwargsrepr", ""))[:200],
        "origin": str(facts.get("origin", ""))[:200],
        "ignore_result": True,
        "traceparent": facts.get("traceparent"),
        WAKE_NUMBER: _wake_number(facts.get(WAKE_NUMBER)),
        HELPS: facts.get(HELPS) is True,
        # After losing a child Celery sends the message again, with an ETA of its own.
        NOT_BEFORE: facts[NOT_BEFORE] if NOT_BEFORE in facts else facts.get("eta"),
        EXPIRES: facts.get(EXPIRES) if NOT_BEFORE in facts else facts.get("expires"),
    }
