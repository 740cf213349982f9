"""Extraction messages to RabbitMQ, over :mod:`orchestrator.rabbitmq`."""

from contextlib import closing
from itertools import compress
from typing import Final

from amqp.exceptions import NotFound
from kombu.transport import pyamqp
from pamqp import commands
from pydantic import SecretStr
from sqlalchemy import Connection

from orchestrator.domain import APP_ID, EXTRACTION_TYPE, ExtractionBatch
from orchestrator.queues import Receipt
from orchestrator.rabbitmq import FrameTemplate, Line, Patience

_PATIENCE: Final = Patience(batch=15.0)  # below the ledger's idle_in_transaction_session_timeout of 30 s
_ANY_MESSAGE_ID: Final = "?" * 36


class RabbitMQPublisher:
    """Publishes extraction requests to one queue of RabbitMQ; see :class:`orchestrator.queues.Publisher`.

    Args:
        url: see :class:`orchestrator.rabbitmq.Line`.
        queue: used as it is; declared durable and without arguments where it is missing.
        patience: how long to wait.

    Raises:
        ConfigurationError: the address cannot be read.
    """

    def __init__(self, url: SecretStr, queue: str, *, patience: Patience = _PATIENCE) -> None:
        self._queue = queue
        self._line = Line(url, self._declare, patience)

    def prepare(self) -> None:
        """Connect, unless there is a good connection.

        Raises:
            PublishError: it cannot.
        """
        self._line.open()

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:  # noqa: ARG002 -- the port's signature
        """Publish a batch; return within :attr:`Patience.batch` and the time to connect."""
        sources = [source for source, _ in batch.sources]
        if not sources:
            return Receipt(())
        messages = ((message_id.encode(), body) for _, message_id, body in batch.messages())
        fate = self._line.send(extraction_template(self._queue, batch.traceparent), messages)
        if fate.error is None:
            return Receipt(sources)
        ids = (message_id.encode() for _, message_id, _ in batch.messages())
        return Receipt(list(compress(sources, fate.confirmed(ids))), fate.error)

    def check(self) -> str:
        """Connect anew, make sure of the queue, and return where it is, without credentials.

        A broker in alarm goes unnoticed: it tells a connection only when that publishes.

        Raises:
            PublishError: the queue cannot be used now.
        """
        self._line.reopen()
        return f"queue {self._queue} on {self._line}"

    def close(self) -> None:
        """Let go of the connection, within :attr:`Patience.goodbye`. Publishing again opens a new one."""
        self._line.close()

    def _declare(self, connection: pyamqp.Connection) -> None:
        with closing(connection.channel()) as channel:
            try:
                channel.queue_declare(self._queue, passive=True)
            except NotFound:
                # The broker closed the channel, and py-amqp has opened it again.
                channel.queue_declare(self._queue, durable=True, auto_delete=False)


def extraction_template(queue: str, traceparent: str) -> FrameTemplate:
    """Return the frames of an extraction message, in which only message id and body vary."""
    properties = commands.Basic.Properties(
        content_type="application/json",
        delivery_mode=2,
        message_type=EXTRACTION_TYPE,
        app_id=APP_ID,
        headers={"traceparent": traceparent},
        message_id=_ANY_MESSAGE_ID,
    )
    return FrameTemplate(queue, properties, _ANY_MESSAGE_ID.encode())
