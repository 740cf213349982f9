"""Fixtures of the tests that work on a ledger, each with a copy of one migrated database, or that hurt a broker."""

from collections.abc import Iterator

import pytest

from tests.support.kafka import KafkaServer
from tests.support.ledgers import Workbench, template
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer


@pytest.fixture(scope="module")
def empty(postgres_server: PostgresServer) -> Iterator[str]:
    """A migrated database, to be copied."""
    with template(postgres_server) as name:
        yield name


@pytest.fixture
def bench(postgres_server: PostgresServer, empty: str) -> Iterator[Workbench]:
    """A ledger of the test's own."""
    with Workbench.copy_of(postgres_server, empty) as workbench:
        yield workbench


@pytest.fixture(scope="module")
def fragile_server(rabbitmq_installed: None) -> Iterator[RabbitMQServer]:  # noqa: ARG001 -- it skips
    """A broker for the tests that hurt it."""
    with RabbitMQServer() as server:
        yield server


@pytest.fixture(scope="module")
def fragile_kafka(kafka_installed: None) -> Iterator[KafkaServer]:  # noqa: ARG001 -- it skips
    """A Kafka for the tests that hurt it."""
    with KafkaServer() as server:
        yield server
