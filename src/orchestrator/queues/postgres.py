"""Extraction messages to a PGMQ queue in the ledger's own database and transaction.

Message and mark commit together: exactly once *into* the queue. PGMQ here is plain SQL in schema ``pgmq``; the
message is the JSON body, the headers carry what AMQP carries as properties.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from psycopg import errors as postgres
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from orchestrator.domain import APP_ID, EXTRACTION_TYPE, ExtractionBatch, QueueStanding
from orchestrator.errors import QueueMissingError
from orchestrator.queues import Receipt

# Arrays go in binary (%b): psycopg quotes a text array of a thousand JSON documents five times slower than
# PostgreSQL inserts them (29 ms against 6 ms a batch, all in).
_SEND: Final = """
SELECT count(*) FROM pgmq.send_batch(%(queue)s, %(messages)b::text[]::jsonb[], %(headers)b::text[]::jsonb[])
"""
_MAY_INSERT: Final = "SELECT has_table_privilege(to_regclass(%(table)s), 'INSERT')"
_CREATE: Final = "SELECT pgmq.create(%(queue)s)"
# What the caller cannot cure by trying at once: no PGMQ, no such queue, no right to it.
_UNUSABLE: Final = (
    postgres.InsufficientPrivilege,
    postgres.InvalidSchemaName,
    postgres.UndefinedFunction,
    postgres.UndefinedTable,
)


class PostgresPublisher:
    """Publishes extraction requests to one PGMQ queue; see :class:`orchestrator.queues.Publisher`.

    Args:
        queue: at most 47 characters; used as it is, created where it is missing.
        begin: opens a transaction that commits on leaving, such as ``Engine.begin``; for :meth:`check`.
    """

    def __init__(self, queue: str, begin: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._queue = queue
        # PGMQ lowers names.
        self._table = 'pgmq."q_{}"'.format(queue.lower().replace('"', '""'))
        self._begin = begin

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:
        """Publish a batch inside the transaction, which stays usable whatever becomes of the queue.

        Raises:
            sqlalchemy.exc.DBAPIError: the database failed, and the transaction with it.
        """
        common = json.dumps(
            {
                "traceparent": batch.traceparent,
                "type": EXTRACTION_TYPE,
                "app_id": APP_ID,
                "content_type": "application/json",
            }
        )
        tail = common.removeprefix("{")
        sources: list[int] = []
        messages: list[str] = []
        headers: list[str] = []
        for source, message_id, body in batch.messages():
            sources.append(source)
            messages.append(body.decode())
            headers.append(f'{{"message_id": "{message_id}", {tail}')
        if not sources:
            return Receipt(())
        try:
            with self._guarded(transaction):
                self._declare(transaction)
                parameters = {"queue": self._queue, "messages": messages, "headers": headers}
                transaction.exec_driver_sql(_SEND, parameters)
        except QueueMissingError as error:
            return Receipt((), error)
        return Receipt(sources)

    def prepare(self) -> None:
        """Do nothing: the connection is the caller's."""

    def check(self) -> str:
        """Make sure of the queue and of the right to insert into it; return where it is.

        Raises:
            QueueMissingError: it cannot be used.
            sqlalchemy.exc.DBAPIError: the database failed.
        """
        with self._begin() as transaction, self._guarded(transaction):
            self._declare(transaction)
        return f"queue {self._queue} in PostgreSQL (PGMQ)"

    def close(self) -> None:
        """Do nothing: the connection is the caller's."""

    def _declare(self, transaction: Connection) -> None:
        may_insert = transaction.exec_driver_sql(_MAY_INSERT, {"table": self._table}).scalar()
        if may_insert is None:
            transaction.exec_driver_sql(_CREATE, {"queue": self._queue})
        elif not may_insert:
            raise QueueMissingError(f"queue {self._queue} cannot be used: no right to insert into {self._table}")

    @contextmanager
    def _guarded(self, transaction: Connection) -> Iterator[None]:
        # A savepoint, for a statement that fails would take the ledger's whole transaction along.
        try:
            with transaction.begin_nested():
                yield
        except DBAPIError as error:
            if isinstance(error.orig, _UNUSABLE):
                raise QueueMissingError(
                    f"queue {self._queue} cannot be used: {error.orig.diag.message_primary}"
                ) from None
            raise


def survey(begin: Callable[[], AbstractContextManager[Connection]], names: Sequence[str]) -> list[QueueStanding]:
    """Count what waits in PostgreSQL's queues, by the names that Celery knows; who consumes is not known there."""
    with begin() as connection:
        return [_standing(connection, name) for name in names]


def _standing(connection: Connection, name: str) -> QueueStanding:
    queue = re.sub(r"\W", "_", name).lower()  # as kombu's transport names it
    if connection.exec_driver_sql("SELECT to_regclass(%s)", (f'pgmq."q_{queue}"',)).scalar() is None:
        return QueueStanding(name, problem="there is no such queue")
    length = connection.exec_driver_sql("SELECT queue_length FROM pgmq.metrics(%s)", (queue,)).scalar()
    return QueueStanding(name, length)
