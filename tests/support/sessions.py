"""The product's sessions with PostgreSQL: ended, caught in the act, or held at their commits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, LiteralString

import psycopg
from psycopg import sql

from tests.support.postgres import PostgresServer
from tests.support.stack import Stack

PUBLISHING: Final = "state = 'idle in transaction' AND query LIKE '%dispatches%FOR UPDATE%'"
"""A session whose batch is being published."""
MARKED: Final = "state = 'idle in transaction' AND query LIKE 'UPDATE %runs SET published%'"
"""A session whose batch was published and marked, just before its commit."""
PULSE: Final = "state <> 'idle' AND (query LIKE '%pg_try_advisory%' OR query LIKE 'DELETE FROM %outbox%')"
"""A session in which a pulse looks for what is due."""
AT_COMMIT: Final = "wait_event = 'SyncRep'"
"""A session whose commit is on disk and not yet known to its client: see :func:`commits_held`."""

_TERMINATE: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'task-orchestrator' AND {which}
"""


def terminate(stack: Stack, which: LiteralString = "true") -> int:
    """End the sessions of the product's processes that are like this, in SQL on pg_stat_activity; return how many."""
    return len(stack.query(_TERMINATE.format(which=which)))


def catch(stack: Stack, which: LiteralString, *, within: float = 30) -> int:
    """End the first sessions that are caught like this; return how many."""
    statement = sql.SQL(_TERMINATE).format(which=sql.SQL(which))
    ends_at = time.monotonic() + within
    with psycopg.connect(stack.database, autocommit=True) as connection:
        # As fast as it goes: a batch takes milliseconds.
        while time.monotonic() < ends_at:
            if caught := connection.execute(statement).fetchall():
                return len(caught)
    raise AssertionError(f"not within {within} s: a session where {which}")


@contextmanager
def commits_held(postgres: PostgresServer) -> Iterator[None]:
    """Have every commit stay without an answer once it is on disk, as it does for want of a standby."""
    configure(postgres, "SET synchronous_standby_names = 'nobody'")
    try:
        yield
    finally:
        configure(postgres, "RESET synchronous_standby_names")


def configure(postgres: PostgresServer, change: LiteralString) -> None:
    """Change a setting of the whole server."""
    postgres.execute(sql.SQL("ALTER SYSTEM ") + sql.SQL(change))
    postgres.execute(sql.SQL("SELECT pg_reload_conf()"))
