"""What ``orchestrator doctor`` finds on real servers, and that it names the remedy and no secret."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from uuid import uuid4

import amqp
import pytest
from kombu.utils.url import url_to_parts

from orchestrator.domain import Health, Node
from tests.support.application import Application, migrated
from tests.support.kafka import KafkaServer
from tests.support.ledgers import Workbench
from tests.support.postgres import PostgresServer
from tests.support.processes import free_port
from tests.support.rabbitmq import RabbitMQServer
from tests.support.scheduling import Rota, at

CANARY: Final = "canary-5ecret"


class Findings:
    """The findings of one examination."""

    def __init__(self, code: int, document: dict[str, list[dict[str, str]]]) -> None:
        self.code = code
        self._all = document["findings"]

    def statuses(self, check: str) -> set[str]:
        """How serious the findings of one check are."""
        return {each["status"] for each in self._all if each["check"] == check}

    def text(self, check: str) -> str:
        """What one check says, remedies included."""
        return "\n".join(f"{each['detail']} → {each['remedy']}" for each in self._all if each["check"] == check)

    def assert_helpful(self) -> None:
        """Whatever is not well comes with a remedy."""
        assert all(each["remedy"] for each in self._all if each["status"] != "ok"), self._all


@pytest.fixture
def discovery() -> Iterator[str]:
    """Something that accepts connections and must not be asked anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield f"http://user:{CANARY}@127.0.0.1:{server.getsockname()[1]}/discover?key={CANARY}"
        try:
            connection, _ = server.accept()
        except BlockingIOError:
            return
        with connection:
            assert connection.recv(100) == b""


def _examine(directory: Path, **settings: str) -> Findings:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
    ours = {f"ORCHESTRATOR_{name}": value for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "doctor", "--json"],
        env=inherited | ours | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert CANARY not in done.stdout + done.stderr
    assert done.stderr == ""
    findings = Findings(done.returncode, json.loads(done.stdout))
    findings.assert_helpful()
    return findings


@pytest.fixture
def application(database_url: str) -> Application:
    """A migrated database, without the application's tables."""
    return Application(migrated(database_url))


@pytest.fixture
def role(postgres_server: PostgresServer, application: Application) -> Iterator[str]:
    """The role the documentation asks for: it uses the ledger and reads the application's tables."""
    name = f"orchestrator_{uuid4().hex[:8]}"
    postgres_server.create_role(name)
    application.create_tables()
    for statement in (
        f'GRANT USAGE ON SCHEMA orchestrator TO "{name}"',
        f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA orchestrator TO "{name}"',
        f'GRANT SELECT ON crawl_tasks, crawl_configs TO "{name}"',
    ):
        application.execute(statement)
    yield name
    application.execute(f'DROP OWNED BY "{name}"')
    postgres_server.drop_role(name)


def _as(role: str, application: Application) -> str:
    return application.url.replace("orchestrator:secret@", f"{role}:{CANARY}@")


def test_all_is_well(application: Application, role: str, broker_url: str, discovery: str, tmp_path: Path) -> None:
    found = _examine(tmp_path, DATABASE_URL=_as(role, application), BROKER_URL=broker_url, DISCOVERY_URL=discovery)
    assert found.code == 0
    for check in (
        "settings",
        "database",
        "clock",
        "ledger",
        "rights",
        "crawl_tasks",
        "crawl_configs",
        "plan",
        "schedules",
    ):
        assert found.statuses(check) == {"ok"}, found.text(check)
    for check in ("broker", "extraction", "discovery"):
        assert found.statuses(check) == {"ok"}, found.text(check)
    assert "optional columns absent: misfire_policy, name, overlap_policy, timezone" in found.text("crawl_tasks")
    assert found.statuses("workers") == found.statuses("beats") == {"warn"}
    assert "orchestrator worker" in found.text("workers")
    assert found.statuses("pgmq") == set()


def test_nothing_answers_and_still_every_check_runs_in_bounded_time(tmp_path: Path) -> None:
    begin = time.monotonic()
    found = _examine(
        tmp_path,
        DATABASE_URL=f"postgresql://u:{CANARY}@127.0.0.1:{free_port()}/x?application_name={CANARY}",
        BROKER_URL=f"amqp://u:{CANARY}@127.0.0.1:{free_port()}//",
        EXTRACTION_URL=f"amqp://v:{CANARY}@127.0.0.1:{free_port()}//",
        DISCOVERY_URL=f"http://127.0.0.1:{free_port()}/discover",
    )
    assert found.code == 1
    for check in ("database", "broker", "extraction", "discovery"):
        assert found.statuses(check) == {"fail"}
    assert "ORCHESTRATOR_DATABASE_URL" in found.text("database")
    assert "u@127.0.0.1" in found.text("settings")
    assert time.monotonic() - begin < 25


def test_a_broker_that_accepts_and_is_silent_is_given_up_on(application: Application, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://u:{CANARY}@127.0.0.1:{silent.getsockname()[1]}//"
        begin = time.monotonic()
        found = _examine(tmp_path, DATABASE_URL=application.url, BROKER_URL=url)
    assert found.statuses("broker") == found.statuses("extraction") == {"fail"}
    assert found.statuses("database") == {"ok"}
    assert time.monotonic() - begin < 35


def test_extraction_on_kafka(
    application: Application, role: str, broker_url: str, kafka_server: KafkaServer, topic: str, tmp_path: Path
) -> None:
    settings = {"DATABASE_URL": _as(role, application), "BROKER_URL": broker_url, "EXTRACTION_QUEUE": topic}
    url = kafka_server.url.replace("://", f"://user:{CANARY}@")
    found = _examine(tmp_path, **settings, EXTRACTION_URL=kafka_server.url)
    assert found.statuses("extraction") == {"ok"}, found.text("extraction")
    assert f"topic {topic} on {kafka_server.url}, 1 partition" in found.text("extraction")
    assert f"{topic} on {kafka_server.url}" in found.text("settings")

    # A listener without SASL, a certificate that nobody trusts, and nobody at all.
    for wrong in (url, kafka_server.secure_url("writer"), f"kafka://u:{CANARY}@127.0.0.1:{free_port()}"):
        found = _examine(tmp_path, **settings, EXTRACTION_URL=wrong)
        assert found.statuses("extraction") == {"fail"}
        assert "ORCHESTRATOR_EXTRACTION_URL" in found.text("extraction")
        assert "writer-secret" not in found.text("extraction") + found.text("settings")


def test_a_fresh_database_needs_migration_and_tables(database_url: str, tmp_path: Path) -> None:
    found = _examine(tmp_path, DATABASE_URL=database_url)
    assert found.code == 1
    for check in ("ledger", "pgmq"):
        assert found.statuses(check) == {"fail"}
        assert "orchestrator migrate" in found.text(check)
    assert "there is no table crawl_tasks" in found.text("crawl_tasks")
    assert "ORCHESTRATOR_CATALOG__CRAWL_CONFIGS__TABLE" in found.text("crawl_configs")


def test_differing_tables_are_mapped_column_by_column(application: Application, tmp_path: Path) -> None:
    application.execute("""
        CREATE SCHEMA app;
        CREATE TYPE app.status AS ENUM ('active', 'off');
        CREATE TABLE app.crawl_task (
            id uuid PRIMARY KEY, source_ids bigint[], cron text, active boolean, "time_zone" text, timezone integer
        );
        CREATE TABLE public.crawl_configs (id bigint, datasource_id bigint, status app.status, created timestamptz);
    """)
    found = _examine(tmp_path, DATABASE_URL=application.url)
    assert found.code == 1
    assert (
        "set ORCHESTRATOR_CATALOG__CRAWL_TASKS__SCHEMA=app ORCHESTRATOR_CATALOG__CRAWL_TASKS__TABLE=crawl_task"
        in found.text("crawl_tasks")
    )
    configs = found.text("crawl_configs")
    assert "set ORCHESTRATOR_CATALOG__CRAWL_CONFIGS__DATA_SOURCE_ID=datasource_id" in configs
    assert "set ORCHESTRATOR_CATALOG__CRAWL_CONFIGS__CREATED_AT=created" in configs
    assert "CRAWL_CONFIGS__ACTIVE to a condition of your own, such as: status::text = 'active'" in configs

    found = _examine(
        tmp_path,
        DATABASE_URL=application.url,
        CATALOG__CRAWL_TASKS__SCHEMA="app",
        CATALOG__CRAWL_TASKS__TABLE="crawl_task",
        CATALOG__CRAWL_CONFIGS__DATA_SOURCE_ID="datasource_id",
        CATALOG__CRAWL_CONFIGS__CREATED_AT="created",
        CATALOG__CRAWL_CONFIGS__ACTIVE="status::text = 'active'",
    )
    tasks = found.text("crawl_tasks")
    assert "column id is of type uuid; what fits: bigint, integer, smallint" in tasks
    assert "set ORCHESTRATOR_CATALOG__CRAWL_TASKS__DATA_SOURCE_IDS=source_ids" in tasks
    assert "set ORCHESTRATOR_CATALOG__CRAWL_TASKS__IS_ACTIVE=active" in tasks
    assert "column timezone is of type integer" in tasks
    assert found.statuses("crawl_tasks") == {"fail", "warn"}
    assert found.statuses("crawl_configs") == {"ok", "warn"}
    assert "CREATE INDEX CONCURRENTLY ON crawl_configs (datasource_id)" in found.text("crawl_configs")
    assert found.statuses("plan") == set()


def test_edits_that_are_noticed_late(application: Application, tmp_path: Path) -> None:
    application.create_tables()
    application.execute("UPDATE pg_class SET reltuples = 250000 WHERE relname = 'crawl_tasks'")
    slow = _examine(tmp_path, DATABASE_URL=application.url)
    assert slow.statuses("crawl_tasks") == {"ok", "warn"}
    assert "crawl_tasks has about 250000 rows and no index on updated_at: edits are noticed less" in slow.text(
        "crawl_tasks"
    )
    assert "CREATE INDEX CONCURRENTLY ON crawl_tasks (updated_at)" in slow.text("crawl_tasks")

    application.execute("CREATE INDEX ON crawl_tasks (updated_at)")
    assert _examine(tmp_path, DATABASE_URL=application.url).statuses("crawl_tasks") == {"ok"}

    application.execute("ALTER TABLE crawl_tasks DROP updated_at")
    without = _examine(tmp_path, DATABASE_URL=application.url)
    assert without.statuses("crawl_tasks") == {"ok", "warn"}
    assert "no column updated_at: an edit of a schedule is noticed within a minute" in without.text("crawl_tasks")
    assert "ORCHESTRATOR_CATALOG__CRAWL_TASKS__UPDATED_AT" in without.text("crawl_tasks")


def test_schedules_that_cannot_be_read_and_beats_that_cannot_work(application: Application, tmp_path: Path) -> None:
    application.create_tables()
    bench = Workbench(application.url)
    rota = Rota(bench, at("12:00:30"))
    for task_id in range(1, 6):
        rota.add(task_id, "whenever" if task_id > 1 else "hourly")
    rota.go()
    bench.ledger.nodes.heartbeat(Node("beat@one", "beat"), "1", health=Health("there is no table crawl_tasks"))
    bench.ledger.nodes.heartbeat(Node("beat@two", "beat"), "1")
    bench.close()

    found = _examine(tmp_path, DATABASE_URL=application.url)

    assert found.statuses("schedules") == {"warn"}
    assert (
        '4 schedules cannot be read and will not fire, the first 3 of them: crawl task 2: cannot read "whenever"'
        in (found.text("schedules"))
    )
    assert "crawl task 4" in found.text("schedules")
    assert "crawl task 5" not in found.text("schedules")
    assert found.statuses("beats") == {"ok", "warn"}
    assert "beat@one is not ready: there is no table crawl_tasks" in found.text("beats")


@pytest.mark.parametrize("array", ["integer[]", "json", "jsonb"])
def test_the_settings_own_sql_is_tried(application: Application, tmp_path: Path, array: str) -> None:
    application.create_tables(array)
    settings = {"DATABASE_URL": application.url, "CATALOG__CRAWL_CONFIGS__LATEST": "id DESC"}
    assert _examine(tmp_path, **settings, CATALOG__CRAWL_CONFIGS__ACTIVE="status <> 'off'").statuses("plan") == {"ok"}
    found = _examine(tmp_path, **settings, CATALOG__CRAWL_CONFIGS__ACTIVE="is_enabled AND")
    assert (found.code, found.statuses("plan")) == (1, {"fail"})
    assert "ORCHESTRATOR_CATALOG__CRAWL_CONFIGS__ACTIVE" in found.text("plan")


def test_rights_that_lack_and_rights_that_are_too_many(application: Application, role: str, tmp_path: Path) -> None:
    application.execute(f'REVOKE DELETE ON orchestrator.nodes FROM "{role}"')
    application.execute(f'REVOKE SELECT ON crawl_configs FROM "{role}"')
    application.execute(f'GRANT UPDATE ON crawl_tasks TO "{role}"')
    found = _examine(tmp_path, DATABASE_URL=_as(role, application))
    assert found.code == 1
    assert found.statuses("rights") == found.statuses("pgmq") == {"fail"}
    assert "lacks DELETE on nodes → GRANT" in found.text("rights")
    assert "may not read column data_source_id" in found.text("crawl_configs")
    assert found.statuses("crawl_tasks") == {"ok", "warn"}
    assert "the role could write to crawl_tasks" in found.text("crawl_tasks")

    superuser = _examine(tmp_path, DATABASE_URL=application.url)
    assert superuser.statuses("rights") == {"warn"}
    assert "superuser" in superuser.text("rights")


def test_a_queue_with_other_arguments_and_dead_letters_are_warnings(
    application: Application, rabbitmq_server: RabbitMQServer, broker_url: str, tmp_path: Path
) -> None:
    parts = url_to_parts(broker_url)
    address = f"127.0.0.1:{rabbitmq_server.port}"
    with amqp.Connection(address, virtual_host=parts.path or "/") as connection:
        channel = connection.channel()
        channel.queue_declare(
            "orchestrator.crawl", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"}
        )
        channel.queue_declare("orchestrator.dead", durable=True, auto_delete=False)
        channel.confirm_select()
        channel.basic_publish_confirm(amqp.Message("?"), routing_key="orchestrator.dead")
    found = _examine(tmp_path, DATABASE_URL=application.url, BROKER_URL=broker_url)
    assert found.statuses("broker") == {"ok", "warn"}
    assert "orchestrator.crawl exists with other arguments" in found.text("broker")
    assert "put limits into a policy" in found.text("broker")
    assert "orchestrator.dead holds 1 message" in found.text("broker")
