"""Connections to PostgreSQL that nobody serves any more are noticed; those that are merely busy are waited for."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DataError

from orchestrator import db
from orchestrator.db import Database
from orchestrator.errors import DatabaseUnavailableError
from orchestrator.schema import SCHEMA
from tests.support.postgres import PostgresServer
from tests.support.proxy import Drop, Proxy, Toward, Upon


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the server after less silence than in production."""
    monkeypatch.setattr(db, "SILENCE", 0.3)


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[Proxy]:
    """The way to the server, to be interrupted."""
    with Proxy(("127.0.0.1", postgres_server.port)) as proxy:
        yield proxy


@pytest.fixture
def database(proxy: Proxy, database_url: str) -> Iterator[Database]:
    """A database behind the proxy."""
    database = Database(proxy.url(database_url), SCHEMA)
    yield database
    database.close()


def answer(database: Database, statement: str = "SELECT 1") -> object:
    with database.transaction() as connection:
        return connection.execute(text(statement)).scalar()


@pytest.mark.parametrize("toward", Toward)
@pytest.mark.timeout(60)
def test_an_answer_that_never_comes_is_an_error_and_the_connection_is_gone(
    database: Database, proxy: Proxy, toward: Toward
) -> None:
    assert answer(database) == 1

    proxy.impose(Drop(), toward=[toward])
    with pytest.raises(DatabaseUnavailableError):
        answer(database)

    proxy.heal()
    assert answer(database) == 1


def test_only_the_dead_connection_is_given_up(database: Database, proxy: Proxy) -> None:
    def interrupted() -> None:
        with database.transaction() as connection:
            connection.execute(text("SELECT 1"))
            proxy.impose(Drop(), upon=Upon.EXISTING)
            connection.execute(text("SELECT 1"))

    with pytest.raises(DatabaseUnavailableError, match="connection lost"):
        interrupted()

    assert answer(database) == 1


def test_a_long_statement_is_waited_for(database: Database) -> None:
    assert answer(database, "SELECT 7 FROM pg_sleep(2)") == 7


def test_an_answer_that_comes_while_the_server_is_asked_counts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = db._Session  # noqa: SLF001 -- there is no other way to have its question take a second
    ask = session._is_served  # noqa: SLF001 -- see above

    def ask_slowly(self: object, *, give_up: bool) -> bool:
        time.sleep(1)
        served: bool = ask(self, give_up=give_up)
        return served

    monkeypatch.setattr(session, "_is_served", ask_slowly)

    assert answer(database, "SELECT 7 FROM pg_sleep(0.6)") == 7


def test_a_server_that_refuses_the_question_is_alive(postgres_server: PostgresServer, database_url: str) -> None:
    postgres_server.create_role("lonely")
    postgres_server.execute(sql.SQL("ALTER ROLE lonely CONNECTION LIMIT 1"))
    database = Database(database_url.replace("//orchestrator:", "//lonely:"), SCHEMA)

    assert answer(database, "SELECT 7 FROM pg_sleep(2)") == 7

    database.close()


def test_one_that_does_not_tell_is_waited_for(database_url: str) -> None:
    database = Database(database_url + "?options=-ctrack_activities%3Doff", SCHEMA)

    assert answer(database, "SELECT 7 FROM pg_sleep(2)") == 7

    database.close()


def test_so_is_a_lock(database: Database, database_url: str) -> None:
    holder = Database(database_url, SCHEMA)
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with holder.transaction() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(7)"))
            locked.set()
            done.wait(1.5)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(10)
    assert answer(database, "SELECT 1 FROM pg_advisory_xact_lock(7)") == 1
    done.set()
    thread.join()
    holder.close()


# --- Connections that are used again -------------------------------------------------------------------------------


def backend(database: Database) -> object:
    with database.autocommit() as connection:
        return connection.scalar(text("SELECT pg_backend_pid()"))


def end(database_url: str, *backends: object) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for each in backends:
            assert connection.execute("SELECT pg_terminate_backend(%s, 10000)", [each]).fetchone() == (True,)


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("statement", ["SELECT 1", "SELECT 1 / 0", None])
def test_a_transaction_on_a_connection_that_was_lent_in_autocommit_is_one(
    database: Database, statement: str | None
) -> None:
    with suppress(DataError, ZeroDivisionError), database.autocommit() as connection:
        lent = connection.scalar(text("SELECT pg_backend_pid()"))
        connection.execute(text(statement)) if statement else fail()

    with suppress(ZeroDivisionError), database.transaction() as connection:
        assert connection.scalar(text("SELECT pg_backend_pid()")) == lent
        connection.execute(text("CREATE TABLE one (number integer)"))
        connection.execute(text("INSERT INTO one VALUES (1)"))
        fail()

    assert answer(database, "SELECT to_regclass('one')") is None


def test_autocommit_keeps_no_transaction_open(database: Database, database_url: str) -> None:
    with database.autocommit() as connection:
        lent = connection.scalar(text("SELECT pg_backend_pid()"))
        with psycopg.connect(database_url) as other:
            row = other.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", [lent]).fetchone()
    assert row == ("idle",)


@pytest.mark.parametrize("fresh", [db.FRESH, 0.0])
def test_a_session_that_was_ended_is_not_lent_again(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, fresh: float
) -> None:
    monkeypatch.setattr(db, "FRESH", fresh)
    ended = backend(database)
    end(database_url, ended)

    assert backend(database) != ended
    assert answer(database) == 1


def test_of_many_sessions_that_were_ended_none_is_lent_again(database: Database, database_url: str) -> None:
    with database.transaction() as one, database.transaction() as two, database.transaction() as three:
        ended = [each.scalar(text("SELECT pg_backend_pid()")) for each in (one, two, three)]
    end(database_url, *ended)

    with database.transaction() as one, database.transaction() as two, database.transaction() as three:
        assert all(each.scalar(text("SELECT pg_backend_pid()")) not in ended for each in (one, two, three))


def test_a_server_that_ends_each_session_as_it_begins_is_unavailable(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.db._Session.has_answer", lambda _: True)
    monkeypatch.setattr("orchestrator.db._Session.answers", lambda _: False)

    with pytest.raises(DatabaseUnavailableError):
        answer(database)
