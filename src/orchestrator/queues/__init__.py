"""The Publisher port: put extraction requests on ``extraction_queue``, and say which are safely there.

Three real implementations: :mod:`orchestrator.queues.rabbitmq` (pipelined publisher confirms),
:mod:`orchestrator.queues.kafka` (an idempotent producer's delivery callbacks) and
:mod:`orchestrator.queues.postgres` (PGMQ, inside the ledger's own transaction). One behavioural suite runs
against all. A publisher knows nothing of runs' states, of the ledger or of retries.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol

from sqlalchemy import Connection

from orchestrator.domain import ExtractionBatch, QueueStanding
from orchestrator.errors import PublishError, QueueMissingError
from orchestrator.measures import PUBLISH_DURATION, PUBLISH_RETURNED
from orchestrator.tracing import SpanKind, span


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a batch.

    Attributes:
        confirmed: data source ids whose message the queue has durably, in no particular order.
        error: why the others are not confirmed; none when all are. They may still have arrived: the wire is
            at-least-once, and a resend carries the same message id.
    """

    confirmed: Sequence[int]
    error: PublishError | None = None


class Publisher(Protocol):
    """Publishes extraction requests. Used by one thread at a time."""

    def prepare(self) -> None:
        """Open what publishing needs, so that publishing itself is quick.

        Raises:
            PublishError: it cannot be opened.
        """
        ...

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:
        """Publish a batch; return within seconds, whatever the broker does.

        Args:
            batch: what to publish.
            transaction: the open ledger transaction that will mark the batch. A publisher that lives in the
                same database joins it, others leave it alone.
        """
        ...

    def check(self) -> str:
        """Make sure that the queue is reachable, declaring it where it is missing; return where it is.

        Raises:
            PublishError: it is not.
        """
        ...

    def close(self) -> None:
        """Let go of the connection. Publishing again opens a new one."""
        ...


class PerThread:
    """A publisher that gives each thread one of its own, for workers whose pool is threads.

    Args:
        make: makes one publisher; opens nothing.
    """

    def __init__(self, make: Callable[[], Publisher]) -> None:
        self._make = make
        self._local = threading.local()

    def prepare(self) -> None:
        """See :class:`Publisher`."""
        self._mine().prepare()

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:
        """See :class:`Publisher`."""
        return self._mine().publish(batch, transaction)

    def check(self) -> str:
        """See :class:`Publisher`."""
        return self._mine().check()

    def close(self) -> None:
        """Let go of this thread's connection."""
        self._mine().close()

    def _mine(self) -> Publisher:
        if not hasattr(self._local, "publisher"):
            self._local.publisher = self._make()
        publisher: Publisher = self._local.publisher
        return publisher


class Survey:
    """How queues stand, asked of whoever carries them at most once in a while, however many want to know. Thread-safe.

    Args:
        ask: asks for all of them.
        names: what they are called, as long as nobody has been asked.
        lasts: seconds for which an answer is good enough.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        ask: Callable[[], Sequence[QueueStanding]],
        names: Sequence[str],
        *,
        lasts: float = 3.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._ask = ask
        self._lasts = lasts
        self._clock = clock
        self._lock = threading.Lock()
        self._answer: Sequence[QueueStanding] = [QueueStanding(name, problem="being asked") for name in names]
        self._good_until = 0.0

    def standing(self) -> Sequence[QueueStanding]:
        """Return how they stand; while somebody is asking, how they stood before, for that may take seconds."""
        if self._clock() < self._good_until or not self._lock.acquire(blocking=False):
            return self._answer
        try:
            self._answer = self._ask()
        finally:
            self._good_until = self._clock() + self._lasts
            self._lock.release()
        return self._answer


class Observed:
    """A publisher that is watched at work: how long a batch takes, what is returned, and a span for each batch.

    Args:
        publisher: does the work.
        system: the broker's kind, as OpenTelemetry calls it.
        queue: where the messages go.
    """

    def __init__(self, publisher: Publisher, *, system: str, queue: str) -> None:
        self._publisher = publisher
        self._system = system
        self._queue = queue

    def prepare(self) -> None:
        """See :class:`Publisher`."""
        self._publisher.prepare()

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:
        """See :class:`Publisher`."""
        attributes: dict[str, str | int] = {
            "messaging.system": self._system,
            "messaging.destination.name": self._queue,
            "messaging.operation.type": "send",
            "messaging.batch.message_count": len(batch.sources),
            "messaging.message.conversation_id": str(batch.run_id),
        }
        began_at = monotonic()
        with span(f"publish {self._queue}", SpanKind.PRODUCER, batch.traceparent, attributes) as publishing:
            sent = replace(batch, traceparent=publishing.traceparent)
            receipt = self._publisher.publish(sent, transaction)
            if receipt.error is not None:
                publishing.fail(receipt.error.code)
        PUBLISH_DURATION.observe(monotonic() - began_at)
        if isinstance(receipt.error, QueueMissingError):
            PUBLISH_RETURNED.add(times=len(batch.sources) - len(receipt.confirmed))
        return receipt

    def check(self) -> str:
        """See :class:`Publisher`."""
        return self._publisher.check()

    def close(self) -> None:
        """See :class:`Publisher`."""
        self._publisher.close()
