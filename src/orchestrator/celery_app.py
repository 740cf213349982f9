"""The Celery application: its queues, the settings that hold up under faults, and how wake-ups are sent.

``celery -A orchestrator.celery_app worker|beat|inspect`` works with the stock command line. Importing this
module reads no settings and opens nothing: configuration happens on first use, connections after that.
Deliberately unknown here: the ledger, and what the tasks do.
"""

import json
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import astuple
from functools import cache, cached_property, partial
from time import monotonic
from typing import Any, Final

import amqp.exceptions
import kombu.exceptions
import psycopg
from celery import Celery
from kombu import Connection, Exchange, Queue, serialization
from kombu.transport import pyamqp
from pamqp import commands
from pydantic import SecretStr

from orchestrator import embedded
from orchestrator.domain import APP_ID, AnalysisArguments, Arguments, CrawlArguments, WakeUp, traceparent_of
from orchestrator.errors import (
    BrokerUnreachableError,
    ConfigurationError,
    ConfirmTimeoutError,
    MessageRefusedError,
    PublishError,
    QueueMissingError,
)
from orchestrator.rabbitmq import FrameTemplate, Line, Patience, frame_handler
from orchestrator.settings import Settings, current
from orchestrator.telemetry import Event, logger

ANALYSIS_QUEUE: Final = "orchestrator.analysis"
CRAWL_QUEUE: Final = "orchestrator.crawl"
DEAD_QUEUE: Final = "orchestrator.dead"
ANALYSIS_TASK: Final = "orchestrator.tasks.trigger_site_analysis"
CRAWL_TASK: Final = "orchestrator.tasks.execute_crawl_task"

WAKE_NUMBER: Final = "orchestrator_wake_number"
HELPS: Final = "orchestrator_helps"
"""Headers of our own wake-ups; see :class:`orchestrator.domain.WakeUp`."""

CONFIRM_TIMEOUT: Final = 5.0  # seconds
IO_TIMEOUT: Final = 10.0  # seconds
_IDLE_LIMIT: Final = 20.0  # seconds; heartbeats are off on sending connections, nobody services them

_ROUTES: Final[dict[type[Arguments], tuple[str, str]]] = {
    AnalysisArguments: (ANALYSIS_TASK, ANALYSIS_QUEUE),
    CrawlArguments: (CRAWL_TASK, CRAWL_QUEUE),
}
_ANY_ID: Final = "?" * 36
_ANY_TRACEPARENT: Final = "!" * 55
_ANY_NUMBER: Final = b"########"

_log = logger(__name__)
_exchange: Final = Exchange("orchestrator", type="topic", durable=True)
# Without arguments: a plain client redeclares the queue by name alone, and RabbitMQ compares (406).
_declared: Final = tuple(
    Queue(name, _exchange, routing_key=name, durable=True) for name in (ANALYSIS_QUEUE, CRAWL_QUEUE)
)
_dead: Final = Queue(DEAD_QUEUE, durable=True)


def _configuration() -> dict[str, Any]:
    try:
        settings = current()
    except ConfigurationError as error:
        # Celery's command line would print a traceback for a user's mistake.
        sys.stderr.write(f"orchestrator: {error}\n")
        raise SystemExit(2) from None
    return _common() | _transport(settings)


def _common() -> dict[str, Any]:
    return {
        # Declared by declare_topology, which explains a mismatch instead of dying of it.
        "task_queues": [
            Queue(queue.name, _exchange, routing_key=queue.name, durable=True, no_declare=True) for queue in _declared
        ],
        "task_default_queue": CRAWL_QUEUE,
        "task_default_exchange": _exchange.name,
        "task_default_exchange_type": "topic",
        "task_default_routing_key": CRAWL_QUEUE,
        "task_routes": {task: {"queue": queue} for task, queue in _ROUTES.values()},
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        # Acknowledged once the effect is in the ledger; a lost child is retried a bounded number of times.
        "task_acks_late": True,
        "task_retry_on_worker_lost": True,
        "task_reject_on_worker_lost": False,
        "task_time_limit": 900,  # well under RabbitMQ's consumer_timeout of 30 minutes
        "task_soft_time_limit": 840,
        "worker_prefetch_multiplier": 1,
        # The work waits for PostgreSQL, the broker and HTTP: four share even one core well.
        "worker_concurrency": 4,
        "worker_max_tasks_per_child": 500,
        "worker_max_memory_per_child": 300_000,  # KiB
        # A delivery outlives its broker connection: it notes in the ledger why it stops, and a second one is harmless.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": 25,
        "worker_consumer": "orchestrator.worker:Consumer",
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        # Celery 5.7's exclusive control queue ends a worker that reconnects while the broker still holds
        # the old connection (405 RESOURCE_LOCKED).
        "control_queue_exclusive": False,
        "control_queue_durable": True,
        "broker_connection_timeout": 5,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A broker that says no (403, 404) is one whose password, rights or queues are being changed.
        "broker_channel_error_retry": True,
        "broker_heartbeat": 10,  # a connection that nobody serves is noticed within 25 s
        "broker_pool_acquire_timeout": 10,  # the default waits for ever
        "task_publish_retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.5, "interval_max": 1},
        "beat_scheduler": "orchestrator.beat:Scheduler",
        "beat_max_loop_interval": 1,
        # The beats of a host would share one mailbox; the ledger has their heartbeats.
        "beat_enable_remote_control": False,
        "enable_utc": True,
        "timezone": "UTC",
    }


def _transport(settings: Settings) -> dict[str, Any]:
    if settings.broker_transport == "amqp":
        return {
            "broker_url": settings.broker_url.get_secret_value(),
            "broker_transport_options": {
                "confirm_publish": True,
                # Without these a blocked broker hangs the caller even with a confirm time-out.
                "read_timeout": IO_TIMEOUT,
                "write_timeout": IO_TIMEOUT,
                "frame_handler": frame_handler,
            },
        }
    return {
        "broker_url": "pgmq://database",  # a name for the logs; conn_string is what counts
        "broker_transport_options": {
            "conn_string": _Masked(conninfo(settings)),
            "init_extension": False,  # `orchestrator migrate` installs the SQL
            "visibility_timeout": 60,  # not renewed: well above the longest delivery, below our patience
            "wait_time_seconds": 0,  # a long poll of one queue would hold up the other
            "polling_interval": 0.2,
            "pool_size": 4,
            "pool_timeout": IO_TIMEOUT,
        },
        # Broadcast queues by node name: names over 47 characters would end the worker.
        "worker_enable_remote_control": False,
    }


class _Masked(str):
    """A secret among Celery's settings: `celery report` prints them all."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'********'"


def conninfo(settings: Settings) -> str:
    """Return how to reach the database: the configured URL, or the embedded server's socket."""
    if settings.database_url is None:
        return embedded.conninfo(settings)
    return settings.database_url.get_secret_value()


app: Final = Celery("orchestrator", include=["orchestrator.tasks", "orchestrator.worker"])
app.add_defaults(_configuration)


def declare_topology(connection: Connection | pyamqp.Connection) -> None:
    """Declare exchange and queues, whoever comes first; explain what exists otherwise than plain clients declare it.

    It is used as it is: consuming works all the same.
    """
    _declare(connection, f"exchange {_exchange.name}", lambda channel: _exchange.bind(channel).declare())
    for queue in (*_declared, _dead):
        _declare(connection, f"queue {queue.name}", partial(_declare_queue, queue))
    for queue in _declared:
        _declare(connection, f"binding of {queue.name}", partial(_bind_queue, queue))


def _declare_queue(queue: Queue, channel: Any) -> None:
    queue.bind(channel).queue_declare()


def _bind_queue(queue: Queue, channel: Any) -> None:
    queue.bind(channel).queue_bind()


def _declare(connection: Connection | pyamqp.Connection, what: str, declare: Callable[[Any], object]) -> None:
    try:
        channel: Any = connection.channel()  # each library's stubs lack something
        with closing(channel):
            declare(channel)
    except amqp.exceptions.AccessRefused as error:
        sentence = f"we may not declare the {what}, so it must exist: grant our broker user the right to configure it"
        _warn_once(what, f"{sentence}. Broker: {error.reply_text}")
    except amqp.exceptions.PreconditionFailed as error:
        sentence = f"the {what} cannot be declared"
        if exists_otherwise(error):
            sentence = (
                f"the {what} exists with another type or other arguments than plain Celery clients declare, so the"
                " broker will refuse those that do (406): delete it while it is unused and let a worker declare it;"
                " queue type, limits and dead-lettering belong in a policy or the vhost's default queue type"
            )
        _warn_once(what, f"{sentence}. Broker: {error.reply_text}")


def exists_otherwise(error: amqp.exceptions.PreconditionFailed) -> bool:
    """Tell whether that is why it was not declared: a limit of the vhost, say, is a 406, too."""
    return "inequivalent" in str(error.reply_text)


@cache
def _warn_once(what: str, error: str) -> None:
    # A process declares every half minute.
    _log.warning(Event.QUEUE_ARGUMENTS_DIFFER, what=what, error=error)


class Sender:
    """Sends messages to our own queues, each confirmed. Thread-safe; not to be carried across a fork."""

    def __init__(self, celery: Celery = app) -> None:
        self._celery = celery
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._used_at = 0.0

    def wake(self, wake_ups: Sequence[WakeUp]) -> None:
        """Enqueue a Celery message for each run; on RabbitMQ any number of them, pipelined.

        Raises:
            PublishError: at least one was not confirmed. Others may have been; a repeat is harmless.
        """
        with self._lock:
            if self._line is not None:
                self._wake_pipelined(self._line, wake_ups)
                return
            with self._errors_explained():
                producer = self._celery.amqp.Producer(self._connected(), auto_declare=False)
                for wake_up in wake_ups:
                    self._send(producer, wake_up)

    def bury(self, body: bytes | str | None, headers: dict[str, Any], content_type: str, content_encoding: str) -> None:
        """Put a message that no task can take on the dead-letter queue, as it came.

        Raises:
            PublishError: it was not confirmed.
        """
        with self._lock, self._errors_explained():
            self._celery.amqp.Producer(self._connected(), auto_declare=False).publish(
                body,
                exchange="",
                routing_key=DEAD_QUEUE,
                headers=headers,
                content_type=content_type,
                content_encoding=content_encoding,
                delivery_mode=2,
                mandatory=True,
                confirm_timeout=CONFIRM_TIMEOUT,
                retry=False,
            )

    def check(self) -> None:
        """Connect and declare the topology.

        Raises:
            PublishError: the broker cannot be reached.
        """
        with self._lock, self._errors_explained():
            if self._line is not None:
                self._line.open()
            else:
                self._connected()

    def probe(self, anew: bool = False) -> None:  # noqa: FBT001, FBT002 -- a callback's one argument
        """Have RabbitMQ confirm a message that goes nowhere; in PostgreSQL there is no broker to ask.

        Args:
            anew: on a new connection, if that can be had, which declares the topology where it is missing.

        Raises:
            PublishError: the broker takes no messages.
        """
        with self._lock:
            if self._line is None:
                return
            if anew:
                self._line.reopen()
            fate = self._line.send(_PROBE, [(_ANY_ID.encode(), b"{}")])
        if fate.error is not None:
            raise fate.error

    def close(self) -> None:
        """Let go of the connections."""
        with self._lock:
            self._drop()
            if self._line is not None:
                self._line.close()

    @cached_property
    def _line(self) -> Line | None:
        """RabbitMQ's own protocol, where that is the broker: kombu awaits each confirm before the next message."""
        url = str(self._celery.conf.broker_write_url)
        if not url.startswith("amqp"):
            return None
        return Line(SecretStr(url), declare_topology, Patience(confirm=CONFIRM_TIMEOUT))

    def _wake_pipelined(self, line: Line, wake_ups: Sequence[WakeUp]) -> None:
        errors: list[PublishError] = []
        for kind, (task, queue) in _ROUTES.items():
            for helps in (False, True):
                chosen = [each for each in wake_ups if isinstance(each.arguments, kind) and each.helps is helps]
                if chosen:
                    envelope = _Envelope(self._celery, task, queue, helps=helps)
                    fate = line.send(envelope.template, envelope.messages(chosen))
                    if fate.error is not None:
                        errors.append(fate.error)
        # Not sooner: a full queue must not hold up the other.
        if errors:
            raise errors[0]

    def _send(self, producer: Any, wake_up: WakeUp) -> None:
        task, queue = _ROUTES[type(wake_up.arguments)]
        self._celery.send_task(
            task,
            args=astuple(wake_up.arguments),
            task_id=str(wake_up.run_id),
            producer=producer,
            # The default exchange: pgmq 1.1.4's send_topic lacks the form with headers and without a delay.
            exchange="",
            routing_key=queue,
            headers={"traceparent": wake_up.traceparent, WAKE_NUMBER: wake_up.number, HELPS: wake_up.helps},
            mandatory=True,
            confirm_timeout=CONFIRM_TIMEOUT,
            retry=False,
            ignore_result=True,
        )

    def _connected(self) -> Connection:
        if self._connection is not None and monotonic() - self._used_at > _IDLE_LIMIT:
            self._drop()
        if self._connection is None:
            connection = self._celery.connection_for_write(heartbeat=0)
            connection.connect()
            self._connection = connection
            declare_topology(connection)
        self._used_at = monotonic()
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Hard, without the closing handshake: that would wait for a broker that does not answer.
            with suppress(Exception):
                connection.collect(socket_timeout=0.1)

    def _errors_explained(self) -> "_ErrorsExplained":
        return _ErrorsExplained(self._drop)


# To the default exchange and no queue: confirmed and dropped. Only who publishes is told of an alarm.
_PROBE: Final = FrameTemplate(
    "orchestrator.probe",
    commands.Basic.Properties(app_id=APP_ID, delivery_mode=1, message_id=_ANY_ID),
    _ANY_ID.encode(),
    mandatory=False,
)


class _Envelope:
    """What Celery sends to call a task, as a template: a worker cannot tell such a message from ``send_task``'s."""

    def __init__(self, celery: Celery, task: str, queue: str, *, helps: bool) -> None:
        message = celery.amqp.as_task_v2(
            _ANY_ID, task, (_ANY_ID,), argsrepr="(...)", ignore_result=True, reply_to=celery.thread_oid
        )
        content_type, content_encoding, body = serialization.dumps(message.body, celery.conf.task_serializer)
        self._before, self._after = body.encode().split(json.dumps([_ANY_ID]).encode())
        properties = commands.Basic.Properties(
            content_type=content_type,
            content_encoding=content_encoding,
            headers=message.headers
            | {"traceparent": _ANY_TRACEPARENT, WAKE_NUMBER: int.from_bytes(_ANY_NUMBER, byteorder="big")}
            | {HELPS: helps},
            delivery_mode=2,
            priority=0,
            **message.properties,
        )
        self.template = FrameTemplate(queue, properties, _ANY_ID.encode(), _ANY_TRACEPARENT.encode(), _ANY_NUMBER)

    def messages(self, wake_ups: Iterable[WakeUp]) -> Iterator[tuple[bytes, ...]]:
        """Yield run id, traceparent, number and body of each."""
        for wake_up in wake_ups:
            # Of another length than any valid one it would garble all frames after it.
            traceparent = traceparent_of(wake_up.run_id, wake_up.traceparent)
            body = self._before + json.dumps(astuple(wake_up.arguments)).encode() + self._after
            yield str(wake_up.run_id).encode(), traceparent.encode(), wake_up.number.to_bytes(8, byteorder="big"), body


class _ErrorsExplained:
    """Turn transport errors into ours, and drop the connection: a stale confirm must not meet a new message."""

    def __init__(self, drop: Any) -> None:
        self._drop = drop

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        self._drop()
        translated = _publish_error(error)
        if translated is not None:
            raise translated from error


def _publish_error(error: BaseException) -> PublishError | None:
    match error:
        case amqp.exceptions.MessageNacked():
            return MessageRefusedError("the broker refused a wake-up; is a task queue full?")
        case TimeoutError():
            return ConfirmTimeoutError("the broker did not confirm a wake-up in time")
        case amqp.exceptions.NoConsumers() | amqp.exceptions.NotFound():
            return QueueMissingError("a task queue is missing; it is declared again on the next try")
        case amqp.exceptions.ChannelError() if error.reply_code == 312:  # noqa: PLR2004 -- AMQP's NO_ROUTE
            return QueueMissingError("a task queue is missing; it is declared again on the next try")
        # struct.error and its like: py-amqp met bytes that are no AMQP.
        case (
            amqp.exceptions.AMQPError()
            | kombu.exceptions.KombuError()
            | OSError()
            | psycopg.Error()
            | struct.error()
            | ValueError()
            | IndexError()
        ):
            return BrokerUnreachableError(f"the broker cannot be reached: {type(error).__name__}: {error}")
        case _:
            return None
