"""Publishers at work on places that are looked at from outside: batches, what arrives of them, and a flow of them."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr

from orchestrator.domain import ExtractionBatch, message_id
from orchestrator.errors import PublishError
from orchestrator.queues import Publisher, Receipt
from orchestrator.queues.kafka import KafkaPublisher, Patience
from orchestrator.settings import KafkaSettings
from tests.support.kafka import KafkaServer, MockKafka
from tests.support.processes import eventually

HASTY: Final = Patience(open=2, create=2, confirm=3, batch=5)
TRACEPARENT = "00-0b6f1c9e3f534d0e9a516a3d7d0c8e11-00f067aa0ba902b7-01"
TASK = 7


def batch_of(size: int, *, run_id: UUID | None = None, first: int = 1) -> ExtractionBatch:
    sources = [(number, number + 500_000) for number in range(first, first + size)]
    return ExtractionBatch(run_id or uuid4(), TASK, TRACEPARENT, sources)


def ids_of(batch: ExtractionBatch, sources: Sequence[int] | None = None) -> list[str]:
    chosen = [source for source, _ in batch.sources] if sources is None else sources
    return [str(message_id(batch.run_id, source)) for source in chosen]


@dataclass(frozen=True)
class Received:
    """A message as a stranger to this package reads it."""

    body: dict[str, Any]
    facts: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.facts["message_id"])


class Place(Protocol):
    """Where a publisher publishes to, looked at from outside."""

    queue: str

    def publisher(self) -> Publisher: ...
    def publish(self, publisher: Publisher, batch: ExtractionBatch) -> Receipt: ...
    def read(self) -> list[Received]: ...
    def declare_otherwise(self) -> None: ...
    def is_still_otherwise(self) -> bool: ...


class KafkaPlace:
    """A topic of its own, looked at by another library."""

    def __init__(self, server: KafkaServer | MockKafka, topic: str) -> None:
        self.server = server
        self.queue = topic

    def publisher(self, patience: Patience = HASTY) -> KafkaPublisher:
        return KafkaPublisher(SecretStr(self.server.url), self.queue, KafkaSettings(), patience=patience)

    def publish(self, publisher: Publisher, batch: ExtractionBatch) -> Receipt:
        return publisher.publish(batch, None)  # type: ignore[arg-type] # Kafka has no use for the ledger's transaction

    def read(self) -> list[Received]:
        found = self.server.records(self.queue)
        assert all(record.key == str(json.loads(record.value)["data_source_id"]) for record in found)
        return [Received(json.loads(record.value), dict(record.headers)) for record in found]

    def declare_otherwise(self) -> None:
        if isinstance(self.server, MockKafka):
            pytest.skip("librdkafka's mock cluster has topics of one kind only")
        self.server.create_topic(self.queue, 3, cleanup_policy="compact")

    def is_still_otherwise(self) -> bool:
        assert isinstance(self.server, KafkaServer)
        return (self.server.topics()[self.queue], self.server.setting(self.queue, "cleanup.policy")) == (3, "compact")


class InterruptedByTestError(Exception):
    """What Celery's time limits look like from inside a task."""


class Flow:
    """A thread that publishes one batch after another until one fails."""

    def __init__(self, place: Place) -> None:
        self.publisher = place.publisher()
        self.confirmed: set[str] = set()
        self.error: PublishError | None = None
        self.batches = 0
        self._place = place
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self.error is None and self.batches < 200:
            batch = batch_of(5_000)
            receipt = self._place.publish(self.publisher, batch)
            self.confirmed.update(ids_of(batch, receipt.confirmed))
            self.error = receipt.error
            self.batches += 1

    def await_error(self, *kinds: type[PublishError]) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert isinstance(self.error, kinds)

    def join(self) -> None:
        self._thread.join(60)

    def assert_confirmed_arrived(self) -> None:
        arrived = {message.id for message in self._place.read()}
        assert self.confirmed
        assert self.confirmed <= arrived


def publish_around_a_fork(place: Place) -> None:
    """Publish ten messages, ten in a forked child of what was made before, and ten once the child has ended."""
    publisher = place.publisher()
    assert place.publish(publisher, batch_of(10)).error is None
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            status = 0 if place.publish(publisher, batch_of(10)).error is None else 2
            publisher.close()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert place.publish(publisher, batch_of(10)).error is None
    publisher.close()


@contextmanager
def publishing_on(place: Place) -> Iterator[Flow]:
    flow = Flow(place)
    try:
        eventually(lambda: flow.batches, within=10, what="the first batch is through")
        yield flow
    finally:
        flow.join()
