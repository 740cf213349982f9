"""The examples for Extractor developers, run as they stand: duplicates on the wire, one row in the inbox each."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, LiteralString
from uuid import uuid4

import psycopg
import pytest
from pydantic import SecretStr

from orchestrator.db import Database
from orchestrator.demo import extractor_kafka_stub, extractor_stub
from orchestrator.domain import ExtractionBatch, message_id, traceparent_of
from orchestrator.queues import Publisher
from orchestrator.queues.kafka import KafkaPublisher
from orchestrator.queues.postgres import PostgresPublisher
from orchestrator.queues.rabbitmq import RabbitMQPublisher
from orchestrator.schema import SCHEMA
from orchestrator.settings import KafkaSettings
from tests.support.application import migrated
from tests.support.kafka import KafkaServer
from tests.support.processes import Process, eventually

QUEUE: Final = "extraction_queue"
RABBITMQ_EXAMPLE: Final = Path(__file__).parents[2] / "docs/examples/extractor_rabbitmq.py"
PGMQ_EXAMPLE: Final = Path(extractor_stub.__file__)
KAFKA_EXAMPLE: Final = Path(extractor_kafka_stub.__file__)
SOURCES: Final = 230  # more than two of the examples' batches


def a_batch() -> ExtractionBatch:
    """Return a batch of a run of its own."""
    run_id = uuid4()
    sources = [(source, 10 * source) for source in range(1, SOURCES + 1)]
    return ExtractionBatch(run_id, 7, traceparent_of(run_id), sources)


def example(script: Path, directory: Path, **environment: str) -> Process:
    """Start an example as its reader would; -P and no PYTHONPATH of ours: it stands alone."""
    theirs = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    return Process([sys.executable, "-P", script], output=directory / f"{uuid4()}.log", env=theirs, cwd=directory)


def publish(publisher: Publisher, batch: ExtractionBatch, database: Database) -> None:
    """Publish a batch as the fan-out engine does."""
    with database.transaction() as connection:
        assert publisher.publish(batch, connection).error is None


def inbox(url: str) -> list[tuple[Any, ...]]:
    """Return what an Extractor has taken, in the order of the data sources."""
    statement: LiteralString = (
        "SELECT message_id, run_id, task_id, data_source_id, crawl_config_id FROM extractor_inbox"
        " ORDER BY data_source_id"
    )
    with psycopg.connect(url) as connection:
        return connection.execute(statement).fetchall()


def expected(batch: ExtractionBatch) -> list[tuple[Any, ...]]:
    """Return the inbox that a batch should make, however often it was on the wire."""
    run_id, task_id = batch.run_id, batch.task_id
    return [(message_id(run_id, source), run_id, task_id, source, config) for source, config in batch.sources]


def assert_duplicates_are_recognised(
    url: str, publisher: Publisher, start: Callable[[], Process], queue: str = QUEUE
) -> None:
    """Publish a batch twice, have it taken, and again to an Extractor that was killed and started anew."""
    batch = a_batch()
    with closing(Database(url, SCHEMA)) as database, closing(publisher):
        with start() as extractor:
            extractor.await_line(f"waiting for messages on {queue}", within=30)
            publish(publisher, batch, database)
            publish(publisher, batch, database)
            extractor.await_ready(lambda: duplicates(extractor) >= SOURCES, within=30, what="all came twice")
            eventually(lambda: inbox(url) == expected(batch), within=10, what="all are in the inbox")
        publish(publisher, batch, database)
        with start() as extractor:
            # A consumer group of Kafka's gives a killed member some time to come back.
            extractor.await_ready(lambda: duplicates(extractor) >= SOURCES, within=60, what="all came again")
            assert "unreadable" not in extractor.text()
    assert inbox(url) == expected(batch)


def duplicates(extractor: Process) -> int:
    """Return how many messages an Extractor says it has recognised."""
    return extractor.text().count("duplicate of message")


@pytest.fixture
def application_url(database_url: str) -> str:
    """A database with the ledger and PGMQ."""
    return migrated(database_url)


def test_the_pgmq_example_recognises_duplicates(application_url: str, tmp_path: Path) -> None:
    with closing(Database(application_url, SCHEMA)) as database:
        publisher = PostgresPublisher(QUEUE, database.transaction)
        places = {"DATABASE_URL": application_url}
        assert_duplicates_are_recognised(application_url, publisher, lambda: example(PGMQ_EXAMPLE, tmp_path, **places))


def test_the_rabbitmq_example_recognises_duplicates(application_url: str, broker_url: str, tmp_path: Path) -> None:
    publisher = RabbitMQPublisher(SecretStr(broker_url), QUEUE)
    places = {"DATABASE_URL": application_url, "BROKER_URL": broker_url}
    assert_duplicates_are_recognised(application_url, publisher, lambda: example(RABBITMQ_EXAMPLE, tmp_path, **places))


def test_the_kafka_example_recognises_duplicates(
    application_url: str, kafka_server: KafkaServer, topic: str, tmp_path: Path
) -> None:
    publisher = KafkaPublisher(SecretStr(kafka_server.url), topic, KafkaSettings())
    places = {
        "DATABASE_URL": application_url,
        "KAFKA_CONFIG": json.dumps({"bootstrap.servers": kafka_server.servers}),
        "EXTRACTION_QUEUE": topic,
        "EXTRACTION_GROUP": topic,
    }
    assert_duplicates_are_recognised(
        application_url, publisher, lambda: example(KAFKA_EXAMPLE, tmp_path, **places), queue=topic
    )
