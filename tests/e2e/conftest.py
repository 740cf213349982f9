"""The set-ups of the design's list, each with one worker, that run the same acceptance suite."""

from collections.abc import Iterator

import pytest

from tests.support.discovery_server import DiscoveryServer, answer
from tests.support.kafka import KafkaServer
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack


@pytest.fixture(scope="session")
def discovery() -> Iterator[DiscoveryServer]:
    """A Discovery Service; each test gives it a script."""
    with DiscoveryServer(answer()) as server:
        yield server


@pytest.fixture(scope="session")
def on_rabbitmq(
    postgres_server: PostgresServer,
    rabbitmq_server: RabbitMQServer,
    discovery: DiscoveryServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    """Set-up 2: PostgreSQL and RabbitMQ."""
    database = postgres_server.create_database("acceptance")
    broker = rabbitmq_server.vhost_url(rabbitmq_server.fresh_vhost())
    directory = tmp_path_factory.mktemp("rabbitmq")
    yield from _ready(Stack.on_rabbitmq(database, broker, directory, **_settings(discovery)))
    postgres_server.drop_database("acceptance")


@pytest.fixture(scope="session")
def on_embedded(discovery: DiscoveryServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Set-up 1: nothing configured."""
    yield from _ready(Stack.embedded(tmp_path_factory.mktemp("embedded"), **_settings(discovery)))


@pytest.fixture(scope="session")
def on_kafka(
    postgres_server: PostgresServer,
    rabbitmq_server: RabbitMQServer,
    kafka_server: KafkaServer,
    discovery: DiscoveryServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    """Set-up 3: PostgreSQL and RabbitMQ, extraction on Kafka."""
    database = postgres_server.create_database("kafka")
    broker = rabbitmq_server.vhost_url(rabbitmq_server.fresh_vhost())
    directory = tmp_path_factory.mktemp("kafka")
    yield from _ready(Stack.on_kafka(database, broker, kafka_server, "kafka", directory, **_settings(discovery)))
    postgres_server.drop_database("kafka")


@pytest.fixture(scope="session")
def on_kafka_alone(
    postgres_server: PostgresServer,
    kafka_server: KafkaServer,
    discovery: DiscoveryServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    """Set-up 4: PostgreSQL and Kafka, no RabbitMQ."""
    database = postgres_server.create_database("kafka_alone")
    directory = tmp_path_factory.mktemp("kafka_alone")
    yield from _ready(Stack.on_kafka(database, None, kafka_server, "alone", directory, **_settings(discovery)))
    postgres_server.drop_database("kafka_alone")


@pytest.fixture(params=["rabbitmq", "embedded", "kafka", "kafka_alone"])
def stack(request: pytest.FixtureRequest) -> Stack:
    """Each of the set-ups in turn."""
    chosen: Stack = request.getfixturevalue(f"on_{request.param}")
    return chosen


def _settings(discovery: DiscoveryServer) -> dict[str, str]:
    return {
        "DISCOVERY_URL": discovery.url,
        "DISCOVERY_RETRY_DELAY": "0.2",
        "DISCOVERY_MAX_RETRIES": "2",
        "DISCOVERY_TIMEOUT": "2",
        "DISPATCH__SLICE_SECONDS": "0.2",
        "DISPATCH__BATCH_SIZE": "50",
    }


def _ready(stack: Stack) -> Iterator[Stack]:
    try:
        stack.prepare()
        stack.worker()
        yield stack
    finally:
        stack.close()
