"""Connections to PostgreSQL: one lazily opened pool a process, transactions, and errors by remedy.

Knows nothing of tables. Every session carries the time-outs that the promises rest on: a frozen worker's
locks free themselves after ``idle_in_transaction_session_timeout``, or in the middle of an answer by the server's
``tcp_user_timeout``.
"""

import select
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from orchestrator.errors import (
    DatabaseLockedError,
    DatabaseRightsError,
    DatabaseUnavailableError,
    NotMigratedError,
    OrchestratorError,
)
from orchestrator.schema import SCHEMA
from orchestrator.telemetry import Event, logger

CONNECT_TIMEOUT: Final = 5  # seconds
SILENCE: Final = 5.0
"""Seconds without a byte from the server after which it is asked whether it is still at it."""
FRESH: Final = 5.0
"""Seconds for which a connection that was of use is taken for one that is, unless its end has been heard of."""
_ASKING: Final = 3  # seconds to connect within; with those before and the next connection 13 in all
_LONGEST: Final = 130.0  # seconds; a statement's own time-out, and a little
_STATE: Final = "SELECT state, wait_event FROM pg_stat_activity WHERE pid = %s"
_BUSY: Final = frozenset({"active", "fastpath function call"})
_UNKNOWN: Final = "disabled"  # track_activities is off
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
    pg.TransactionTimeout,
)

_AFTER_COMMIT: Final = "orchestrator.after_commit"
_USED_AT: Final = "orchestrator.used_at"

Answer = TypeVar("Answer")

_log = logger(__name__)


class Database:
    """A lazily opened connection pool. Thread-safe; not to be carried across a fork.

    Args:
        conninfo: a libpq connection string, a URL or key=value words.
        schema: the ledger's schema.
    """

    def __init__(self, conninfo: str, schema: str) -> None:
        self.conninfo = conninfo
        self.schema = schema
        self._connections = 5
        self._settings = _SESSION
        self._open()

    def serve(self, callers: int, *, within: float) -> None:
        """Keep a connection for each of many callers from now on, and end statements that take longer than seconds."""
        self._connections = callers
        self._settings = _SESSION | {"statement_timeout": f"{within * 1_000:.0f}"}
        self._engine.dispose()
        self._open()

    @contextmanager
    def transaction(self, within: Connection | None = None) -> Iterator[Connection]:
        """Open a transaction; commit at the end of the block, roll back on an exception.

        Args:
            within: a transaction of the caller's to take part in instead; the caller commits it.

        Raises:
            DatabaseUnavailableError: the server cannot be reached or cannot serve right now. The commit may
                have happened all the same: callers repeat, and every statement of ours may be repeated.
            NotMigratedError: a table of the ledger is missing or older than this code.
            DatabaseRightsError: our role may not do what it has to.
        """
        if within is not None:
            with translated_errors():
                yield within
            return
        with translated_errors(), _connected(self._engine) as connection, connection.begin():
            acts: list[Callable[[], object]] = []
            connection.info[_AFTER_COMMIT] = acts
            yield connection
        for act in acts:
            act()

    @contextmanager
    def autocommit(self, within: Connection | None = None) -> Iterator[Connection]:
        """Lend a connection on which each statement is a transaction by itself, and one exchange with the server.

        Args:
            within: a transaction of the caller's to take part in instead.

        Raises:
            see :meth:`transaction`.
        """
        if within is not None:
            with translated_errors():
                yield within
            return
        with translated_errors(), _connected(self._autocommit) as connection:
            yield connection

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()

    def _open(self) -> None:
        self._engine = self._create_engine()
        # The same pool.
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    def _create_engine(self) -> Engine:
        engine = create_engine(
            "postgresql+psycopg://",
            creator=self._connect,
            pool_size=self._connections,
            max_overflow=60,  # a worker of threads holds one connection a thread
            pool_timeout=10,
            hide_parameters=True,  # a traceback is for everybody, what callers write is not
            # With a map each statement's text is gone through whenever it is executed.
            execution_options={} if self.schema == SCHEMA else {"schema_translate_map": {SCHEMA: self.schema}},
        )
        event.listen(engine, "handle_error", _forget_broken_connection)
        event.listen(engine, "connect", _note_use)
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", _check_use)
        return engine

    def _connect(self) -> psycopg.Connection:
        connection = _Session.connect(
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
        row = connection.execute(
            f"SELECT pg_backend_pid(){', set_config(%s, %s, false)' * len(self._settings)}",
            [word for pair in self._settings.items() for word in pair],
        ).fetchone()
        assert row is not None  # noqa: S101 -- for the type checker
        connection.backend, connection.conninfo = row[0], self.conninfo
        connection.autocommit = False
        # Arrays of thousands in binary: as text, quoting them takes longer than what PostgreSQL does with them.
        connection.adapters.register_dumper(list, ListBinaryDumper)
        return connection


def after_commit(connection: Connection, act: Callable[[], object]) -> None:
    """Have something done once a transaction is committed, whoever opened it: what is told or counted is then true."""
    connection.info[_AFTER_COMMIT].append(act)


class _Question(psycopg.Connection[Any]):
    """A connection for a moment, on which no exchange lasts longer than that."""

    def wait(self, gen: Generator[Any, Any, Answer], interval: float = 0.1, timeout: float | None = _ASKING) -> Answer:
        """See psycopg; a time-out is an error of psycopg's."""
        return super().wait(gen, interval, timeout)


class _Session(psycopg.Connection[Any]):
    """A session that notices when nobody is at the other end any more.

    Whatever stands between (a pooler, a frozen server, a middlebox) may take our bytes and never answer; then no
    time-out of the server's or of TCP's helps. Some statements of ours rightly take a minute, so after a while of
    silence the server is asked, by another connection, whether it is still busy for this one.
    """

    backend: int | None = None
    """Process id of our backend; not what the protocol's start said, which a pooler may have made up."""
    conninfo: str = ""
    """How the server is reached."""
    waits_for: str | None = None
    """What our backend waited for when the server was last asked, by PostgreSQL's name: ``SyncRep``, a standby."""

    def wait(self, gen: Generator[Any, Any, Answer], interval: float = 0.1, timeout: float | None = None) -> Answer:
        """See psycopg; every exchange with the server comes by here."""
        return super().wait(self._watched(gen), interval, timeout)

    def _watched(self, exchange: Generator[Any, Any, Answer]) -> Generator[Any, Any, Answer]:
        began_at = heard_at = monotonic()
        told = False
        try:
            wanted = next(exchange)
            while True:
                ready = yield wanted
                if ready:
                    heard_at = monotonic()
                elif monotonic() - heard_at > SILENCE:
                    served = self._is_served(give_up=monotonic() - began_at > _LONGEST)
                    # A backend may be idle for having answered meanwhile.
                    if not served and not self.has_answer():
                        # What either side says from now on would be taken for the answer to something else.
                        self.pgconn.finish()
                        raise psycopg.OperationalError(f"no answer for {monotonic() - heard_at:.0f} s: connection lost")
                    heard_at = monotonic()
                    if served and not told:
                        told = True
                        _log.warning(Event.DATABASE_BUSY, seconds=round(heard_at - began_at), wait_event=self.waits_for)
                wanted = exchange.send(ready)
        except StopIteration as end:
            answer: Answer = end.value
            return answer

    def _is_served(self, *, give_up: bool) -> bool:
        # Of several servers the one that this session is on.
        info = self.info
        where = {"host": info.host, "hostaddr": info.hostaddr, "port": info.port}
        given: dict[str, Any] = {word: value for word, value in where.items() if value}
        try:
            with _Question.connect(self.conninfo, connect_timeout=_ASKING, autocommit=True, **given) as other:
                found = other.execute(_STATE, [self.backend]).fetchone()
        except psycopg.Error as error:
            # A server that has a reason to refuse is alive; whether our connection is, cannot be told. Of a refused
            # connection psycopg has no SQLSTATE, only the text.
            return "FATAL" in str(error) and not give_up
        if found is None:
            return False
        self.waits_for = found[1]
        return found[0] in _BUSY or (found[0] == _UNKNOWN and not give_up)

    def answers(self) -> bool:
        """Return whether the server answers; between two transactions."""
        try:
            self.autocommit = True
            self.execute("")
            self.autocommit = False
        except psycopg.Error:
            return False
        return True

    def has_answer(self) -> bool:
        """Return whether the server has sent what nobody has read yet."""
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        return any(event & select.POLLIN for _, event in poll.poll(0))


@contextmanager
def _connected(engine: Engine) -> Iterator[Connection]:
    try:
        connection = engine.connect()
    except InvalidRequestError as error:
        # The pool's word for two connections in a row that were of no use.
        raise DatabaseUnavailableError("PostgreSQL ends connections as soon as they are made") from error
    with connection:
        yield connection


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
    if isinstance(error, pg.DeadlockDetected | pg.LockNotAvailable):
        return DatabaseLockedError(f"PostgreSQL: {_first_line(error)}")
    # A prepared statement met an ALTER TABLE of the application's; it is prepared anew on the next try.
    if isinstance(error, _TRANSIENT) or (isinstance(error, pg.FeatureNotSupported) and "cached plan" in str(error)):
        return DatabaseUnavailableError(f"PostgreSQL: {_first_line(error)}")
    return None


def _first_line(error: psycopg.Error) -> str:
    return str(error.diag.message_primary or error).strip().partition("\n")[0] or type(error).__name__


def _forget_broken_connection(context: object) -> None:
    """Let SQLAlchemy drop a connection that ended on the server's side, or that is of no more use."""
    orig = getattr(context, "original_exception", None)
    # A session is read-only by a default that it got at its start: a new one may not be.
    if isinstance(
        orig,
        pg.IdleInTransactionSessionTimeout
        | pg.TransactionTimeout
        | pg.AdminShutdown
        | pg.CrashShutdown
        | pg.ReadOnlySqlTransaction,
    ):
        context.is_disconnect = True  # type: ignore[attr-defined] # SQLAlchemy's ExceptionContext, untyped for listeners


def _note_use(_: object, entry: ConnectionPoolEntry) -> None:
    entry.info[_USED_AT] = monotonic()


def _check_use(session: _Session, entry: ConnectionPoolEntry, _: object) -> None:
    """Make sure that a connection is of use before anybody gets it.

    Raises:
        InvalidatePoolError: it is not; the pool opens new ones then.
    """
    # A server that ends a session says so, also one that is killed: there is something to read.
    fresh = monotonic() - entry.info[_USED_AT] < FRESH
    if (not fresh or session.has_answer()) and not session.answers():
        raise InvalidatePoolError
