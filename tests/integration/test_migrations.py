"""Migrations: from nothing, twice, by many at once, and equal to the tables that the code believes in."""

import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, LiteralString

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect
from sqlalchemy.schema import CreateSchema

from orchestrator import migrations
from orchestrator.db import Database
from orchestrator.errors import DatabaseLockedError, NotMigratedError
from orchestrator.schema import SCHEMA, metadata
from tests.support.ledgers import Workbench
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually

pytestmark = pytest.mark.timeout(120)

AWKWARD: Final = 'Order "of" 100% things'
# What PostgreSQL says of our tables, names and positions included; comparing it needs no faith in Alembic.
_CATALOG: Final[LiteralString] = """
SELECT relname, attname, format_type(atttypid, atttypmod), attnotnull, attidentity, col_description(attrelid, attnum)
FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE nspname = %(schema)s AND relkind = 'r' AND attnum > 0 AND NOT attisdropped AND relname <> 'alembic_version'
UNION ALL
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(pg_constraint.oid), convalidated, '', NULL
FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace
WHERE nspname = %(schema)s AND conname NOT LIKE 'alembic%%'
UNION ALL
SELECT tablename, indexname, indexdef, false, '', NULL
FROM pg_indexes WHERE schemaname = %(schema)s AND tablename <> 'alembic_version'
ORDER BY 1, 2, 3
"""


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, SCHEMA)
    yield database
    database.close()


def execute(database: Database, statement: LiteralString) -> None:
    with psycopg.connect(database.conninfo, autocommit=True) as connection:
        connection.execute(statement)


def tables(database: Database) -> set[str]:
    with database.transaction() as connection:
        return set(inspect(connection).get_table_names(schema=database.schema))


def waiting_for(database: Database, name: LiteralString) -> bool:
    with psycopg.connect(database.conninfo, autocommit=True) as connection:
        asked = "SELECT FROM pg_locks WHERE NOT granted AND relation = to_regclass(%s)"
        return connection.execute(asked, [f"orchestrator.{name}"]).fetchone() is not None


def described(url: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(_CATALOG, {"schema": SCHEMA}).fetchall()


def test_an_empty_database_is_brought_up_to_date_and_then_left_alone(database: Database) -> None:
    with pytest.raises(NotMigratedError, match=r"'orchestrator' does not exist; run `orchestrator migrate`"):
        migrations.verify(database)

    assert migrations.upgrade(database, with_queues=False) is True
    assert migrations.upgrade(database, with_queues=False) is False

    migrations.verify(database)
    assert tables(database) == {table.name for table in metadata.tables.values()} | {migrations.VERSION_TABLE}


def test_of_many_that_migrate_at_once_one_does_and_none_fails(database_url: str) -> None:
    start = threading.Barrier(4)

    def migrate(_: int) -> bool:
        database = Database(database_url, SCHEMA)
        start.wait(20)
        try:
            return migrations.upgrade(database, with_queues=True)
        finally:
            database.close()

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(migrate, range(4)))

    assert sorted(done) == [False, False, False, True]


def test_the_migrations_make_the_tables_that_the_code_believes_in(
    postgres_server: PostgresServer, database: Database
) -> None:
    migrations.upgrade(database, with_queues=False)
    with database.transaction() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": lambda name, kind, _: kind != "schema" or name == SCHEMA,
                "version_table_schema": SCHEMA,
                "compare_type": True,
                "compare_server_default": True,
            },
        )
        assert compare_metadata(context, metadata) == []

    # Alembic compares neither checks nor the conditions of indexes; PostgreSQL's own description has them.
    believed = "migrations_believed"
    url = postgres_server.create_database(believed)
    try:
        other = Database(url, SCHEMA)
        execute(other, "CREATE SCHEMA orchestrator")
        with other.transaction() as connection:
            metadata.create_all(connection)
        other.close()
        assert described(database.conninfo) == described(url)
    finally:
        postgres_server.drop_database(believed)


@pytest.mark.parametrize("schema", ["ledger", AWKWARD])
def test_the_schema_may_have_another_name(database_url: str, schema: str) -> None:
    bench = Workbench(database_url, schema=schema)
    try:
        migrations.upgrade(bench.database, with_queues=True)
        assert migrations.upgrade(bench.database, with_queues=True) is False
        migrations.verify(bench.database)
        bench.application.create_tables()
        bench.application.add_sources(2)
        bench.application.add_task(1, [1, 2, 3])
        run_id = bench.accept()

        bench.fan_out().deliver(run_id)

        with bench.database.transaction() as connection:
            assert SCHEMA not in inspect(connection).get_schema_names()
            assert len(inspect(connection).get_table_names(schema=schema)) == len(metadata.tables) + 1
    finally:
        bench.close()


def test_two_ledgers_live_in_one_database(database: Database) -> None:
    other = Database(database.conninfo, "other")
    assert migrations.upgrade(database, with_queues=False) is True
    with pytest.raises(NotMigratedError, match="'other' does not exist"):
        migrations.verify(other)

    assert migrations.upgrade(other, with_queues=False) is True

    migrations.verify(other)
    other.close()


def test_a_newer_revision_is_left_to_the_newer_code(database: Database) -> None:
    migrations.upgrade(database, with_queues=False)
    execute(database, "UPDATE orchestrator.alembic_version SET version_num = '9999'")

    migrations.verify(database)

    assert migrations.upgrade(database, with_queues=False) is False


def test_a_schema_that_somebody_else_made_is_used(database: Database) -> None:
    execute(database, "CREATE SCHEMA orchestrator")
    with pytest.raises(NotMigratedError):
        migrations.verify(database)

    assert migrations.upgrade(database, with_queues=False) is True

    migrations.verify(database)


def test_a_migration_that_fails_leaves_nothing_behind(database: Database) -> None:
    execute(database, "CREATE SCHEMA orchestrator; CREATE TABLE orchestrator.runs ()")

    with pytest.raises(Exception, match='relation "runs" already exists'):
        migrations.upgrade(database, with_queues=True)

    assert tables(database) == {"runs"}
    with database.transaction() as connection:
        assert "pgmq" not in inspect(connection).get_schema_names()


def test_a_migration_that_meets_others_at_work_is_tried_again(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with database.transaction() as connection:
        connection.execute(CreateSchema(SCHEMA))
        command.upgrade(migrations._config(connection, SCHEMA), "0003")  # noqa: SLF001 -- an older code's
    with ThreadPoolExecutor(1) as pool, psycopg.connect(database.conninfo) as worker:
        worker.execute("SET deadlock_timeout = '1h'")  # it is not the one that has to give in
        # In the order of a worker that fixes a plan; the migration has the dispatches by then.
        worker.execute("LOCK TABLE orchestrator.runs IN ROW EXCLUSIVE MODE")
        migrating = pool.submit(migrations.upgrade, database, with_queues=False)
        eventually(lambda: waiting_for(database, "runs"), within=30, what="the migration waits for the worker")
        worker.execute("LOCK TABLE orchestrator.dispatches IN ROW EXCLUSIVE MODE")
        worker.commit()
        assert migrating.result(60) is True

    migrations.verify(database)
    assert "deadlock detected" in "".join(capsys.readouterr())


def test_a_migration_that_others_never_let_in_says_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "_TRIES", 2)
    monkeypatch.setattr(migrations, "_LONGEST_WAIT", "100ms")
    execute(database, "CREATE SCHEMA orchestrator; CREATE TABLE orchestrator.alembic_version (version_num text)")
    with psycopg.connect(database.conninfo) as other:
        other.execute("LOCK TABLE orchestrator.alembic_version IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseLockedError, match=r"in use all the time .*lock timeout"):
            migrations.upgrade(database, with_queues=False)


def test_queues_are_installed_once_and_may_be_added_later(database: Database) -> None:
    assert migrations.upgrade(database, with_queues=False) is True

    assert migrations.upgrade(database, with_queues=True) is True
    assert migrations.upgrade(database, with_queues=True) is False

    execute(database, "SELECT pgmq.create('extraction_queue')")


def test_using_a_ledger_that_is_not_there_says_what_to_run(database_url: str) -> None:
    bench = Workbench(database_url)
    try:
        with pytest.raises(NotMigratedError, match="run `orchestrator migrate`"):
            bench.accept()
    finally:
        bench.close()


def test_a_revision_is_called_what_its_file_is_and_follows_the_one_before() -> None:
    previous = None
    for path in sorted(Path(migrations.__file__).parent.glob("versions/[0-9]*.py")):
        script = importlib.import_module(f"orchestrator.migrations.versions.{path.stem}")
        assert script.revision == path.stem.partition("_")[0]
        assert script.down_revision == previous
        previous = script.revision
    assert previous is not None
