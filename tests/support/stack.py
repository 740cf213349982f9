"""A whole set-up of the design's list, on real servers: database, broker, workers, and an independent witness.

The witness reads ``extraction_queue`` as the Extractor would, without a line of our own code, and the ledger
by plain SQL: what the tests believe is not our own word.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final, Self
from uuid import UUID, uuid4

import amqp
import psycopg
from celery import Celery
from kombu.utils.url import parse_url
from psycopg.rows import dict_row

from orchestrator.embedded import EmbeddedPostgres, ServerConfig
from tests.support.application import Application, migrated
from tests.support.kafka import KafkaServer
from tests.support.processes import Process, eventually

QUEUE: Final = "extraction_queue"
CRAWL_TASK: Final = "orchestrator.tasks.execute_crawl_task"
ANALYSIS_TASK: Final = "orchestrator.tasks.trigger_site_analysis"
TERMINAL: Final = {"succeeded", "failed", "canceled"}


@dataclass(frozen=True)
class Extraction:
    """One message as it stood in ``extraction_queue``."""

    message_id: str
    body: Mapping[str, Any]
    properties: Mapping[str, Any]
    raw: bytes | None = None

    @property
    def source(self) -> int:
        """The data source it is about."""
        source: int = self.body["data_source_id"]
        return source


@dataclass
class Stack:
    """One set-up: where things are, and the processes that a test started in it.

    ``database`` is a libpq connection string; ``broker`` is none where PostgreSQL carries Celery's queues; ``kafka`` is
    where extraction messages go to a topic, read up to ``positions``, by partition.
    """

    database: str
    broker: str | None
    env: dict[str, str]
    directory: Path
    kafka: KafkaServer | None = None
    topic: str = QUEUE
    positions: dict[int, int] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    _server: EmbeddedPostgres | None = None

    @classmethod
    def on_rabbitmq(cls, database: str, broker: str, directory: Path, **settings: str) -> Self:
        """Set-up 2: PostgreSQL and RabbitMQ."""
        return cls(database, broker, _environment(settings, DATABASE_URL=database, BROKER_URL=broker), directory)

    @classmethod
    def on_kafka(
        cls, database: str, broker: str | None, kafka: KafkaServer, topic: str, directory: Path, **settings: str
    ) -> Self:
        """Set-ups 3 and 4: extraction on Kafka; Celery on RabbitMQ or, where there is no broker, over PostgreSQL."""
        places = {"DATABASE_URL": database, "EXTRACTION_URL": kafka.url, "EXTRACTION_QUEUE": topic}
        if broker is not None:
            places["BROKER_URL"] = broker
        return cls(database, broker, _environment(settings, **places), directory, kafka=kafka, topic=topic)

    @classmethod
    def embedded(cls, directory: Path, **settings: str) -> Self:
        """Set-up 1: nothing configured but where the embedded server keeps its data."""
        # Not below pytest's own folder: as root the server's account may not pass through that.
        state = Path(mkdtemp(prefix="orchestrator-"))
        state.chmod(0o711)
        stack = cls(ServerConfig(state).conninfo(), None, _environment(settings, STATE_DIR=str(state)), directory)
        stack._server = EmbeddedPostgres(ServerConfig(state))
        return stack

    @property
    def application(self) -> Application:
        """The main application's tables."""
        return Application(self.database)

    def start(self, *arguments: str, settings: Mapping[str, str] | None = None) -> Process:
        """Start a command of ours; it ends with the test."""
        name = f"{len(self.processes)}-{arguments[0]}"
        env = self.env | {f"ORCHESTRATOR_{key}": value for key, value in (settings or {}).items()}
        command = [sys.executable, "-m", *arguments]
        process = Process(command, output=self.directory / f"{name}.log", env=env, cwd=self.directory)
        self.processes.append(process)
        return process

    def worker(self, *arguments: str, concurrency: int = 2, settings: Mapping[str, str] | None = None) -> Process:
        """Start a stock Celery worker and wait until it takes messages."""
        node = f"w{len(self.processes)}-{uuid4().hex[:6]}@test"
        process = self.start(
            "celery",
            *("-A", "orchestrator.celery_app", "worker", "-n", node, "-c", str(concurrency), *arguments),
            settings=settings,
        )
        process.await_line(f"{node} ready.", within=60)
        return process

    def prepare(self) -> None:
        """Migrate, and create the application's tables; in the embedded set-up, take part in the server."""
        if self._server is not None:
            self._server.join()
        migrated(self.database)
        self.application.create_tables()

    def close(self) -> None:
        """End every process, gently first: the last one to leave stops the embedded server."""
        for process in self.processes:
            if process.running:
                process.thaw()
                process.send(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(within=40)
            finally:
                process.close()
        if self._server is not None:
            self._server.leave()
            shutil.rmtree(self._server.config.state_dir, ignore_errors=True)

    def client(self) -> Celery:
        """Return a plain Celery client: a broker address, and nothing of ours."""
        if self.broker is not None:
            return Celery("client", broker=self.broker)
        client = Celery("client", broker="pgmq://")
        client.conf.broker_transport_options = {"conn_string": self.database, "init_extension": False}
        return client

    def crawl(self, task_id: object, *, celery_id: str | None = None, **options: Any) -> UUID:  # noqa: ANN401 -- send_task's
        """Send ``execute_crawl_task`` by queue name; return the run id."""
        sent = self.client().send_task(
            CRAWL_TASK, args=[task_id], task_id=celery_id, queue="orchestrator.crawl", **options
        )
        return UUID(sent.id)

    def analyse(self, data_source_id: object, theme: object, **options: Any) -> UUID:  # noqa: ANN401 -- the same
        """Send ``trigger_site_analysis`` by queue name; return the run id."""
        sent = self.client().send_task(
            ANALYSIS_TASK, args=[data_source_id, theme], queue="orchestrator.analysis", **options
        )
        return UUID(sent.id)

    # --- The ledger, by plain SQL ---------------------------------------------------------------------------

    def query(self, statement: str, *parameters: object) -> list[dict[str, Any]]:
        """Return the rows of a statement."""
        with psycopg.connect(self.database, row_factory=dict_row) as connection:
            return connection.execute(statement, parameters or None).fetchall()

    def execute(self, statement: str, *parameters: object) -> None:
        """Run a statement that returns nothing."""
        with psycopg.connect(self.database) as connection:
            connection.execute(statement, parameters or None)

    def run(self, run_id: UUID | str) -> dict[str, Any] | None:
        """Return a run's row, if it is there."""
        rows = self.query("SELECT * FROM orchestrator.runs WHERE id = %s", run_id)
        return rows[0] if rows else None

    def await_run(self, run_id: UUID | str, *states: str, within: float = 60) -> dict[str, Any]:
        """Return a run's row once it is in one of the states; by default, once it is over."""
        wanted = set(states) or TERMINAL

        def row() -> dict[str, Any] | None:
            run = self.run(run_id)
            return run if run is not None and run["state"] in wanted else None

        try:
            found = eventually(row, within=within, what=f"run {run_id} is {' or '.join(sorted(wanted))}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.run(run_id)}") from None
        assert found is not None
        return found

    def attempts(self, run_id: UUID | str) -> list[dict[str, Any]]:
        """Return a run's attempts in order."""
        return self.query("SELECT * FROM orchestrator.attempts WHERE run_id = %s ORDER BY number", run_id)

    def dispatches(self, run_id: UUID | str) -> dict[str, int]:
        """Return how many dispatches of a run are in each state."""
        rows = self.query(
            "SELECT state, count(*) FROM orchestrator.dispatches WHERE run_id = %s GROUP BY state", run_id
        )
        return {row["state"]: row["count"] for row in rows}

    # --- The wire -------------------------------------------------------------------------------------------

    def declare_extraction_queue(self) -> None:
        """Declare ``extraction_queue`` as an Extractor would that is there first, or create the topic."""
        if self.kafka is not None:
            self.kafka.create_topic(self.topic, 3)
            return
        assert self.broker is not None
        with amqp_connection(self.broker) as connection:
            connection.channel().queue_declare(QUEUE, durable=True, auto_delete=False)

    def extractions(self) -> list[Extraction]:
        """Return every message in ``extraction_queue``, in order. Those of RabbitMQ and Kafka are consumed by this."""
        if self.kafka is not None:
            return [
                Extraction(record.headers["message_id"], json.loads(record.value), record._asdict(), record.value)
                for record in self.kafka.records(self.topic, self.positions)
            ]
        return self._from_postgres() if self.broker is None else drain(self.broker, QUEUE)

    def _from_postgres(self) -> list[Extraction]:
        rows = self.query(f"SELECT message, headers FROM pgmq.q_{QUEUE} ORDER BY msg_id")
        return [Extraction(row["headers"]["message_id"], row["message"], row["headers"]) for row in rows]

    def assert_exactly_once_in_effect(self, run_id: UUID | str, expected: Sequence[int]) -> int:
        """Check the oracle of the fault list for one succeeded run; return the duplicates on the wire.

        Ledger − wire = ∅, wire − ledger = ∅, every duplicate has an equal message id, the counts add up.
        """
        run = self.run(run_id)
        assert run is not None
        assert run["state"] == "succeeded", run
        published = self.query(
            "SELECT data_source_id FROM orchestrator.dispatches WHERE run_id = %s AND state = 'published'", run_id
        )
        ledger = {row["data_source_id"] for row in published}
        wire = [message for message in self.extractions() if message.body["run_id"] == str(run_id)]
        assert ledger == set(expected), "the ledger has other sources than expected"
        assert {message.source for message in wire} == ledger, "the wire has other sources than the ledger"
        ids = {(message.source, message.message_id) for message in wire}
        assert len(ids) == len(ledger), "a duplicate came with another message id"
        counts = self.dispatches(run_id)
        assert (run["published"], run["skipped"]) == (counts.get("published", 0), counts.get("skipped", 0))
        assert run["total"] == run["published"] + run["skipped"]
        assert counts.get("pending", 0) == 0
        return sum(count - 1 for count in Counter(message.source for message in wire).values())


def drain(url: str, queue: str) -> list[Extraction]:
    """Consume all that is in a RabbitMQ queue, by a plain AMQP client."""
    messages: list[Extraction] = []
    with amqp_connection(url) as connection:
        channel = connection.channel()
        while (message := channel.basic_get(queue, no_ack=True)) is not None:
            raw = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
            body = json.loads(raw) if message.properties.get("content_type") == "application/json" else {}
            messages.append(Extraction(message.properties.get("message_id", ""), body, message.properties, raw))
    return messages


def queue_depth(url: str, queue: str) -> int:
    """Return how many messages are ready in a RabbitMQ queue."""
    with amqp_connection(url) as connection:
        declared = connection.channel().queue_declare(queue, passive=True)
        assert declared is not None
        return int(declared[1])


def amqp_connection(url: str) -> amqp.Connection:
    """Return a plain AMQP connection, to be entered."""
    parts = parse_url(url)
    return amqp.Connection(
        host=f"{parts['hostname']}:{parts['port']}",
        userid=parts["userid"],
        password=parts["password"],
        virtual_host=parts["virtual_host"],
    )


def _environment(settings: Mapping[str, str], **defaults: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ORCHESTRATOR_")}
    ours = {"LOG__FORMAT": "json", **defaults, **settings}
    return (
        inherited
        | {f"ORCHESTRATOR_{key}": value for key, value in ours.items()}
        | {
            "PYTHONPATH": os.pathsep.join([*sys.path]),
            "PYTHONUNBUFFERED": "1",
        }
    )
