"""Fixtures shared by all tests: real servers, started once a session and only if a test asks for one."""

import os
import signal
from collections.abc import Iterator
from itertools import count
from typing import Final

import pytest

from tests.support import kafka
from tests.support.kafka import KafkaServer
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import HOW_TO_INSTALL, RabbitMQServer, find_program

_NUMBERS: Final = count(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in the background by a shell (`make test &`): what tests start would inherit that, and outlive Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for the whole session. Tests that stop or kill a server start their own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_installed() -> None:
    """Skip where there is no RabbitMQ, but not in CI: there a missing broker would hide half of the tests."""
    if find_program("rabbitmq-server") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_INSTALL)


@pytest.fixture(scope="session")
def rabbitmq_server(rabbitmq_installed: None) -> Iterator[RabbitMQServer]:  # noqa: ARG001 -- it skips
    """One RabbitMQ for the whole session. Tests that stop or kill a broker start their own."""
    with RabbitMQServer() as server:
        yield server


@pytest.fixture(scope="session")
def kafka_installed() -> None:
    """Skip where no Kafka can run, but not in CI."""
    if not kafka.is_installed():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(kafka.HOW_TO_INSTALL)


@pytest.fixture(scope="session")
def kafka_server(kafka_installed: None) -> Iterator[KafkaServer]:  # noqa: ARG001 -- it skips
    """One Kafka for the whole session. Tests that stop or kill a broker start their own."""
    with KafkaServer() as server:
        yield server


@pytest.fixture
def topic() -> str:
    """The name of a topic of the test's own."""
    return f"extraction-{next(_NUMBERS)}"


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database of the test's own."""
    name = f"test_{next(_NUMBERS)}"
    yield postgres_server.create_database(name)
    postgres_server.drop_database(name)


@pytest.fixture
def broker_url(rabbitmq_server: RabbitMQServer) -> str:
    """A vhost of the test's own."""
    return rabbitmq_server.vhost_url(rabbitmq_server.fresh_vhost())
