"""Connections to PostgreSQL: one lazily opened pool a process, transactions, and errors by remedy.

Knows nothing of tables. Every session carries the time-outs that the promises rest on: a frozen worker's
locks free themselves after ``idle_in_transaction_session_timeout``, or in the middle of an answer by the server's
``tcp_user_timeout``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
from psycopg import errors as pg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from orchestrator.errors import (
    DatabaseRightsError,
    DatabaseUnavailableError,
    NotMigratedError,
    OrchestratorError,
)
from orchestrator.schema import SCHEMA

CONNECT_TIMEOUT: Final = 5  # seconds
_SESSION: Final = {
    "idle_in_transaction_session_timeout": "30s",
    "lock_timeout": "10s",
    "statement_timeout": "120s",
    # The server's side: a frozen process that is being sent rows is "active", and no other time-out ends that. Over a
    # Unix socket it has no effect.
    "tcp_user_timeout": "30s",
    "timezone": "UTC",
}
# The statement was fine and the server is not: down, starting, full, read-only, or it asked us to try again.
_TRANSIENT: Final = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    pg.ReadOnlySqlTransaction,
    pg.IdleInTransactionSessionTimeout,
)


class Database:
    """A lazily opened connection pool. Thread-safe; not to be carried across a fork.

    Args:
        conninfo: a libpq connection string, a URL or key=value words.
        schema: the ledger's schema.
    """

    def __init__(self, conninfo: str, schema: str) -> None:
        self.conninfo = conninfo
        self.schema = schema
        self._engine = self._create_engine()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction; commit at the end of the block, roll back on an exception.

        Raises:
            DatabaseUnavailableError: the server cannot be reached or cannot serve right now. The commit may
                have happened all the same: callers repeat, and every statement of ours may be repeated.
            NotMigratedError: a table of the ledger is missing or older than this code.
            DatabaseRightsError: our role may not do what it has to.
        """
        with translated_errors(), self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()

    def _create_engine(self) -> Engine:
        engine = create_engine(
            "postgresql+psycopg://",
            creator=self._connect,
            pool_size=5,
            max_overflow=60,  # a worker of threads holds one connection a thread
            pool_timeout=10,
            pool_pre_ping=True,
            execution_options={"schema_translate_map": {SCHEMA: self.schema}},
        )
        event.listen(engine, "handle_error", _forget_broken_connection)
        return engine

    def _connect(self) -> psycopg.Connection:
        connection = psycopg.connect(
            self.conninfo,
            connect_timeout=CONNECT_TIMEOUT,
            application_name="task-orchestrator",
            autocommit=True,
            keepalives=1,
            # A peer that vanished without a word is noticed within half a minute in either direction.
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=20_000,  # milliseconds
        )
        # Not by the startup packet's options: poolers such as PgBouncer refuse those.
        connection.execute(
            f"SELECT {', '.join('set_config(%s, %s, false)' for _ in _SESSION)}",
            [word for pair in _SESSION.items() for word in pair],
        )
        connection.autocommit = False
        # Arrays of thousands in binary: as text, quoting them takes longer than what PostgreSQL does with them.
        connection.adapters.register_dumper(list, ListBinaryDumper)
        return connection


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn the driver's errors inside the block into ours, classified by remedy."""
    try:
        yield
    except PoolTimeoutError as error:
        raise DatabaseUnavailableError("no database connection came free within 10 s") from error
    except (DBAPIError, psycopg.Error) as error:
        translated = _translate(error.orig if isinstance(error, DBAPIError) else error)
        if translated is None:
            raise
        raise translated from error


def _translate(error: BaseException | None) -> OrchestratorError | None:
    if isinstance(error, pg.UndefinedTable | pg.UndefinedColumn | pg.InvalidSchemaName):
        return NotMigratedError(f"{_first_line(error)}; run `orchestrator migrate`")
    if isinstance(error, pg.InsufficientPrivilege):
        return DatabaseRightsError(f"{_first_line(error)}; deploy/postgresql/grants.sql has the rights that are needed")
    if isinstance(error, _TRANSIENT):
        return DatabaseUnavailableError(f"PostgreSQL: {_first_line(error)}")
    return None


def _first_line(error: psycopg.Error) -> str:
    return str(error.diag.message_primary or error).strip().partition("\n")[0] or type(error).__name__


def _forget_broken_connection(context: object) -> None:
    """Let SQLAlchemy drop a connection that a time-out of ours ended on the server's side."""
    orig = getattr(context, "original_exception", None)
    if isinstance(orig, pg.IdleInTransactionSessionTimeout | pg.AdminShutdown | pg.CrashShutdown):
        context.is_disconnect = True  # type: ignore[attr-defined] # SQLAlchemy's ExceptionContext, untyped for listeners
