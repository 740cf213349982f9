"""Set-ups for tests that break things: each test has its own, for it may be left in pieces."""

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from random import Random
from typing import Final
from uuid import UUID

import pytest

from tests.support.beats import find_faketime
from tests.support.evidence import Evidence
from tests.support.kafka import KafkaServer
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import SEED
from tests.support.stack import Stack

StackFactory = Callable[..., Stack]

SOURCES = 20_000
ALL = range(1, SOURCES + 1)
LONGEST: Final = {"test_soak.py", "test_crash_points.py", "test_beats.py"}
"""Files to begin with: the rest is shared out while they run, and nobody waits for one of them at the end."""


def a_big_task(stack: Stack) -> int:
    stack.application.add_sources(SOURCES)
    stack.application.add_task(1, ALL)
    return 1


def await_published(stack: Stack, run_id: UUID, count: int) -> None:
    """Wait until a run has published so many, or is over."""

    def enough() -> bool:
        run = stack.run(run_id)
        return run is not None and (run["published"] >= count or run["finished_at"] is not None)

    eventually(enough, within=60, what=f"{count} published")


@pytest.fixture
def random() -> Random:
    """Chance that can be repeated: the seed is printed, and FAULT_SEED sets it."""
    print(f"FAULT_SEED={SEED}")  # noqa: T201 -- pytest shows it with a failure
    return Random(SEED)


_EVIDENCE: Final = pytest.StashKey[Evidence]()


def _record(item: pytest.Item) -> Evidence:
    if (record := item.stash.get(_EVIDENCE, None)) is None:
        marker = item.get_closest_marker("fault")
        assert marker is not None, "a fault test names its fault: @pytest.mark.fault('what is done to what')"
        variant = f" ({item.callspec.id})" if hasattr(item, "callspec") else ""
        record = item.stash[_EVIDENCE] = Evidence(marker.args[0] + variant, item.nodeid, SEED)
    return record


@pytest.fixture(autouse=True)
def evidence(request: pytest.FixtureRequest) -> Evidence:
    """The record of this test's fault, for docs/reliability.md; its name is the marker's."""
    return _record(request.node)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the longest files run first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave a record of every test that is to run, so that one that is not run can be told."""
    for item in session.items:
        if item.get_closest_marker("fault"):
            _record(item).announce()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Check what can only be told at a test's end."""
    result = yield
    _record(item).assert_few_duplicates()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Save the record once its outcome is known."""
    report = yield
    if call.when == "call" or not report.passed:
        record = _record(item)
        record.outcome, record.seconds = report.outcome, record.seconds + report.duration
        if isinstance(report.longrepr, tuple):
            record.notes.append(report.longrepr[2])  # why it was skipped
        elif call.when == "call":
            record.trials = record.trials or 1
        record.save()
    return report


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that a file's tests may hurt; each leaves it whole."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def rabbitmq(rabbitmq_installed: None) -> Iterator[RabbitMQServer]:  # noqa: ARG001 -- it skips
    """A RabbitMQ that a file's tests may hurt; each leaves it whole."""
    with RabbitMQServer() as server:
        yield server


@pytest.fixture(scope="module")
def kafka(kafka_installed: None) -> Iterator[KafkaServer]:  # noqa: ARG001 -- it skips
    """A Kafka that a file's tests may hurt; each leaves it whole."""
    with KafkaServer() as server:
        yield server


@pytest.fixture
def faketime() -> None:
    """Skip where there is no libfaketime, but not in CI."""
    if find_faketime() is None:
        how = "libfaketime is not installed: apt-get install libfaketime"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(how)


@pytest.fixture
def make_rabbitmq(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[StackFactory]:
    """Make set-up 2 with given settings."""
    yield from _factory(lambda settings: Stack.on_rabbitmq(database_url, broker_url, tmp_path, **settings))


@pytest.fixture
def make_embedded(tmp_path: Path) -> Iterator[StackFactory]:
    """Make set-up 1 with given settings."""
    yield from _factory(lambda settings: Stack.embedded(tmp_path, **settings))


@pytest.fixture(params=["rabbitmq", "postgresql"])
def make_kafka(
    request: pytest.FixtureRequest, database_url: str, kafka_server: KafkaServer, topic: str, tmp_path: Path
) -> Iterator[StackFactory]:
    """Make set-ups 3 and 4: extraction on Kafka, with Celery on RabbitMQ or over PostgreSQL."""
    broker = request.getfixturevalue("broker_url") if request.param == "rabbitmq" else None
    yield from _factory(
        lambda settings: Stack.on_kafka(database_url, broker, kafka_server, topic, tmp_path, **settings)
    )


@pytest.fixture(params=["rabbitmq", "embedded"])
def make_stack(request: pytest.FixtureRequest) -> StackFactory:
    """Make each of the set-ups in turn."""
    factory: StackFactory = request.getfixturevalue(f"make_{request.param}")
    return factory


def _factory(make: Callable[[dict[str, str]], Stack]) -> Iterator[StackFactory]:
    made: list[Stack] = []

    def prepared(**settings: str) -> Stack:
        stack = make(settings)
        made.append(stack)
        stack.prepare()
        return stack

    yield prepared
    for stack in made:
        stack.close()
