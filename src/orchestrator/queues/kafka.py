"""Extraction messages to a Kafka topic, by an idempotent producer of librdkafka; needs the extra ``kafka``.

A message is confirmed when its delivery callback says so: all replicas that are in sync have it (``acks=all``).
librdkafka tries again by itself, without doubling or reordering anything, until a message's time is up. After
anything but a complete success the producer is thrown away with all that it still holds: a fatal error has ended it,
its waits before the next connection have grown, and a message that it sends later would be a late duplicate.
"""

import logging
import os
import re
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Self
from urllib.parse import unquote, urlsplit

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AclOperation, AdminClient, NewTopic, OffsetSpec
from pydantic import SecretStr
from sqlalchemy import Connection

from orchestrator.domain import APP_ID, EXTRACTION_TYPE, ExtractionBatch, QueueStanding
from orchestrator.errors import (
    BrokerUnreachableError,
    ConfirmTimeoutError,
    MessageRefusedError,
    PublishError,
    QueueMissingError,
)
from orchestrator.queues import Receipt
from orchestrator.settings import KafkaSettings

# What goes wrong is told by our own errors; librdkafka would log each of its tries.
_QUIETLY: Final = {"log_level": 0, "logger": logging.getLogger("librdkafka")}

WINDOW: Final = 5_000
"""At most this many messages are unconfirmed at a time."""

_LARGEST_BATCH: Final = 1_000_000
"""Bytes of one request; librdkafka's default, and what brokers take unless told otherwise."""
_TURN: Final = 0.25  # seconds after which signals get a chance
_GLANCE: Final = 0.05
_NO_TOPIC: Final = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.UNKNOWN_TOPIC_ID,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001 -- how librdkafka's own errors are called
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
    }
)
_UNUSABLE: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_EXCEPTION,
    }
)
_LATE: Final = frozenset(
    {
        KafkaError._MSG_TIMED_OUT,  # noqa: SLF001
        KafkaError._PURGE_QUEUE,  # noqa: SLF001
        KafkaError._PURGE_INFLIGHT,  # noqa: SLF001
    }
)
# After these nobody is there to wait for.
_HOPELESS: Final = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
        KafkaError._AUTHENTICATION,  # noqa: SLF001
        KafkaError._SSL,  # noqa: SLF001
        KafkaError._FATAL,  # noqa: SLF001
    }
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds.

    Attributes:
        open: connections, and what the cluster says of the topic.
        create: a topic that is missing.
        confirm: one message, tries that failed included.
        batch: one batch in all.
    """

    open: float = 4.0
    create: float = 6.0
    confirm: float = 10.0
    batch: float = 15.0  # below the ledger's idle_in_transaction_session_timeout of 30 s


class KafkaPublisher:
    """Publishes extraction requests to one topic; see :class:`orchestrator.queues.Publisher`.

    Args:
        url: ``kafka://user:password@host:port,host:port``; ``kafkas://`` is TLS, and verifies certificate and name.
        topic: used as it is; created with the cluster's defaults where it is missing.
        security: what the address does not say of TLS and SASL.
        patience: how long to wait.
    """

    def __init__(self, url: SecretStr, topic: str, security: KafkaSettings, *, patience: Patience = Patience()) -> None:
        self._cluster = Cluster.of(url, security)
        self._topic = topic
        self._patience = patience
        self._largest_batch = _LARGEST_BATCH
        self._session: _Session | None = None

    def prepare(self) -> None:
        """Connect, and make sure of the topic, unless there is a good producer.

        Raises:
            PublishError: it cannot.
        """
        self._ready()

    def publish(self, batch: ExtractionBatch, transaction: Connection) -> Receipt:  # noqa: ARG002 -- the port's signature
        """Publish a batch; return within :attr:`Patience.batch` and the time to connect."""
        if not batch.sources:
            return Receipt(())
        try:
            session = self._ready()
        except PublishError as error:
            return Receipt((), error)
        # Whatever interrupts us (a Celery time limit is an exception from a signal handler) must not leave a
        # producer behind that goes on sending.
        self._session = None
        try:
            fate = session.publish(batch)
            if fate.complete:
                self._session = session
        finally:
            if self._session is None:
                session.drop()
        if fate.too_large:
            # A topic may take less at a time than we send, without saying so; it may take it in smaller pieces.
            self._largest_batch = max(1, self._largest_batch // 10)
        return Receipt(fate.confirmed, session.verdict(fate))

    def check(self) -> str:
        """Connect anew, make sure of the topic and of the right to write to it, and return where it is.

        Raises:
            PublishError: the topic cannot be used now.
        """
        self.close()
        session = self._ready()
        session.require_right()
        partitions = session.partitions
        return f"topic {self._topic} on {self._cluster}, {partitions} partition{'' if partitions == 1 else 's'}"

    def close(self) -> None:
        """Let go of the producer. Publishing again makes a new one."""
        if self._session is not None:
            session, self._session = self._session, None
            session.drop()

    def _ready(self) -> "_Session":
        if self._session is not None and not self._session.is_good():
            self.close()
        if self._session is None:
            self._session = _Session(self._cluster, self._topic, self._largest_batch, self._patience)
        return self._session


def survey(url: SecretStr, security: KafkaSettings, topic: str, patience: Patience = Patience()) -> QueueStanding:
    """Ask how many messages a topic keeps, consumed or not; who consumes them is the consumers' business."""
    admin = AdminClient(Cluster.of(url, security).configuration | _QUIETLY)
    try:
        found = admin.list_topics(topic, timeout=patience.open).topics[topic]
        if found.error is not None:
            return QueueStanding(topic, problem=found.error.str())
        partitions = [TopicPartition(topic, number) for number in found.partitions]

        def offsets(spec: OffsetSpec) -> int:
            asked = admin.list_offsets(dict.fromkeys(partitions, spec), request_timeout=patience.open)
            return sum(future.result(patience.open).offset for future in asked.values())

        # The stubs of OffsetSpec are empty.
        latest, earliest = OffsetSpec.latest(), OffsetSpec.earliest()  # type: ignore[no-untyped-call]
        return QueueStanding(topic, offsets(latest) - offsets(earliest))
    except (KafkaException, TimeoutError) as error:
        return QueueStanding(topic, problem=_reason(error))


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a cluster is and how to log in; as text it has no credentials.

    Attributes:
        servers: ``host:port,host:port``.
        tls: whether that is how to talk to them.
        configuration: all of it as librdkafka's properties, passwords included.
    """

    servers: str
    tls: bool
    configuration: dict[str, Any]

    @classmethod
    def of(cls, url: SecretStr, security: KafkaSettings) -> Self:
        """Read an address, which the settings have checked."""
        parts = urlsplit(url.get_secret_value())
        credentials, _, servers = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        tls = parts.scheme == "kafkas"
        configuration: dict[str, Any] = {
            "bootstrap.servers": servers,
            "client.id": APP_ID,
            "security.protocol": f"{'sasl_' if user else ''}{'ssl' if tls else 'plaintext'}",
            "socket.keepalive.enable": True,
        }
        if user:
            configuration |= {
                "sasl.mechanism": security.sasl_mechanism,
                "sasl.username": unquote(user),
                "sasl.password": unquote(password),
            }
        if tls:
            configuration |= _tls(security)
        return cls(servers, tls, configuration)

    def __str__(self) -> str:
        return f"{'kafkas' if self.tls else 'kafka'}://{self.servers}"

    def __repr__(self) -> str:
        return str(self)


def _tls(security: KafkaSettings) -> dict[str, Any]:
    # As for AMQP: the system's authorities, of which Python knows where they are, or those of SSL_CERT_FILE.
    paths = ssl.get_default_verify_paths()
    own = {
        "ssl.ca.location": security.ca_file or paths.cafile or paths.capath or "probe",
        "ssl.certificate.location": security.certificate_file,
        "ssl.key.location": security.key_file,
        "ssl.key.password": security.key_password and security.key_password.get_secret_value(),
    }
    return {name: str(value) for name, value in own.items() if value}


class _Fate:
    """What became of the messages of one batch."""

    def __init__(self, sources: int) -> None:
        self.confirmed: list[int] = []
        self._sources = sources
        self._failures: list[KafkaError] = []

    def settle(self, error: KafkaError | None, message: Message) -> None:
        """Note what librdkafka says of one message in the end."""
        if error is None:
            self.confirmed.append(int(message.key() or 0))
        else:
            self._failures.append(error)

    def refuse(self, error: KafkaError) -> None:
        """Note that librdkafka does not even take a message."""
        self._failures.append(error)

    @property
    def complete(self) -> bool:
        """Whether all are confirmed."""
        return len(self.confirmed) == self._sources

    @property
    def unconfirmed(self) -> int:
        """How many are not."""
        return self._sources - len(self.confirmed)

    @property
    def failure(self) -> KafkaError | None:
        """What went wrong, if anything did; an answer of the broker rather than one that did not come."""
        answers = (error for error in self._failures if error.code() not in _LATE)
        return next(answers, self._failures[0] if self._failures else None)

    @property
    def too_large(self) -> bool:
        """Whether the broker finds what came in one request, or a message, too large."""
        return any(error.code() == KafkaError.MSG_SIZE_TOO_LARGE for error in self._failures)


# Producers of a parent process: never used, and kept, for their destructors would wait for threads that are not here.
_inherited: Final[list[Producer]] = []


class _Session:
    """One producer that is connected and whose topic is there.

    Raises:
        PublishError: from the constructor, it could not be made so.
    """

    def __init__(self, cluster: Cluster, topic: str, largest_batch: int, patience: Patience) -> None:
        self._cluster = cluster
        self._topic = topic
        self._patience = patience
        self._process = os.getpid()
        self._complaint: KafkaError | None = None
        self._hopeless = False
        self._producer = Producer(
            {
                **cluster.configuration,
                **_QUIETLY,
                "enable.idempotence": True,
                "acks": "all",
                "message.timeout.ms": round(patience.confirm * 1_000),
                "socket.timeout.ms": round(patience.confirm * 1_000),
                "queue.buffering.max.messages": WINDOW,
                "batch.size": largest_batch,
                # Each batch waits this long for what does not come after its last message; less makes small requests.
                "linger.ms": 1,
                # The same partition for a data source as Java's clients choose.
                "partitioner": "murmur2_random",
                # What was deleted while we were connected is gone, not new.
                "topic.metadata.propagation.max.ms": round(patience.create * 1_000),
                "error_cb": self._complain,
            }
        )
        try:
            self.partitions = self._await_topic()
        except BaseException:
            self.drop()
            raise

    def is_good(self) -> bool:
        """Whether it may be used again; takes in what happened meanwhile, without waiting."""
        if self._process != os.getpid():
            return False
        self._serve(0)
        return not self._hopeless

    def publish(self, batch: ExtractionBatch) -> _Fate:
        """Publish messages and await their confirms, for at most :attr:`Patience.batch`."""
        fate = _Fate(len(batch.sources))
        give_up_at = monotonic() + self._patience.batch

        def is_worth_waiting() -> bool:
            return not (fate.complete or fate.failure is not None or self._hopeless or monotonic() > give_up_at)

        self._produce(batch, fate, is_worth_waiting)
        while is_worth_waiting():
            self._serve(_TURN)
        if not fate.complete:
            # What was confirmed just now counts.
            self._producer.purge()
            self._serve(0)
        return fate

    def _produce(self, batch: ExtractionBatch, fate: _Fate, is_worth_waiting: Callable[[], bool]) -> None:
        common = [
            ("traceparent", batch.traceparent.encode()),
            ("type", EXTRACTION_TYPE.encode()),
            ("app_id", APP_ID.encode()),
            ("content_type", b"application/json"),
        ]
        topic, produce, settle = self._topic, self._producer.produce, fate.settle
        for source, message_id, body in batch.messages():
            headers: list[tuple[str, str | bytes | None]] = [("message_id", message_id.encode()), *common]
            while True:
                try:
                    produce(topic, body, b"%d" % source, on_delivery=settle, headers=headers)
                    break
                except BufferError:
                    self._serve(_TURN)
                    if not is_worth_waiting():
                        return
                except KafkaException as error:
                    fate.refuse(error.args[0])
                    return

    def require_right(self) -> None:
        """Make sure of the right to write to the topic, where the cluster says which rights we have.

        Raises:
            QueueMissingError: it is lacking.
        """
        admin = AdminClient(self._cluster.configuration | _QUIETLY)
        asked = admin.describe_topics(
            TopicCollection([self._topic]), include_authorized_operations=True, request_timeout=self._patience.open
        )
        try:
            allowed = asked[self._topic].result(self._patience.open).authorized_operations
        except (KafkaException, TimeoutError):
            return
        if allowed and not {AclOperation.WRITE, AclOperation.ALL}.intersection(allowed):
            raise QueueMissingError(f"topic {self._topic} on {self._cluster} cannot be used: no right to write to it")

    def verdict(self, fate: _Fate) -> PublishError | None:
        """Return what there is to say against a batch."""
        if fate.complete:
            return None
        # Of a fatal error, what is called next says only that there was one.
        if self._complaint is not None and self._complaint.fatal():
            return self._explain(self._complaint)
        if fate.failure is not None and fate.failure.code() not in _LATE:
            return self._explain(fate.failure)
        if self._hopeless:
            return self._unreachable()
        return ConfirmTimeoutError(f"{self._cluster} left {fate.unconfirmed} messages unconfirmed for too long")

    def drop(self) -> None:
        """Let go of the producer and of all that it still holds; a forked child just forgets it."""
        if self._process != os.getpid():
            _inherited.append(self._producer)
            return
        self._serve(0)
        # Either may raise a fatal error, as SystemError when called back meanwhile; nobody needs to know any more.
        with suppress(KafkaException, SystemError):
            self._producer.purge()
        with suppress(KafkaException, SystemError):
            self._producer.close()

    def _serve(self, seconds: float) -> None:
        """Have librdkafka call us back, for so long or until it has; raise what a signal handler raises."""
        try:
            # Not by flush, which would go on calling back after a signal handler has raised.
            self._producer.poll(seconds)
        except (KafkaException, SystemError) as error:
            # Fatal errors are not told to error_cb, but raised here; old clients go on calling back with one pending,
            # which Python wraps. It may wrap what a signal handler raises, too.
            told = error.__cause__ if isinstance(error, SystemError) and error.__cause__ else error
            if not isinstance(told, KafkaException):
                raise told from None
            self._complain(told.args[0])

    def _complain(self, error: KafkaError) -> None:
        self._hopeless = self._hopeless or error.code() in _HOPELESS or error.fatal()
        if self._complaint is not None and self._complaint.fatal():
            return  # whatever follows, follows from that
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001 -- it says of how many, not why
            self._complaint = error

    def _await_topic(self) -> int:
        """Return how many partitions the topic has, once it is there; create it where it is missing.

        Raises:
            PublishError: the cluster cannot be reached, or the topic cannot be used.
        """
        give_up_at = monotonic() + self._patience.open
        created = False
        while True:
            found = self._metadata(give_up_at)
            if found.error is None:
                return len(found.partitions)
            if found.error.code() in _UNUSABLE:
                raise self._explain(found.error)
            if found.error.code() in _NO_TOPIC and not created:
                self._create_topic()
                created, give_up_at = True, monotonic() + self._patience.open
            elif monotonic() > give_up_at:
                raise self._explain(found.error)
            self._serve(_GLANCE)

    def _metadata(self, give_up_at: float) -> Any:  # noqa: ANN401 -- confluent-kafka's TopicMetadata
        """Return what the cluster says of the topic; give up as soon as nobody is there.

        Raises:
            BrokerUnreachableError: it does not answer.
        """
        turn = _TURN
        while True:
            try:
                return self._producer.list_topics(self._topic, timeout=turn).topics[self._topic]
            except KafkaException:
                self._serve(0)
                if self._hopeless or monotonic() > give_up_at:
                    raise self._unreachable() from None
                turn = min(2 * turn, max(_GLANCE, give_up_at - monotonic()))

    def _create_topic(self) -> None:
        admin = AdminClient(self._cluster.configuration | _QUIETLY)
        # Partitions and replicas: as many as the cluster's settings say.
        future = admin.create_topics([NewTopic(self._topic, -1, -1)], request_timeout=self._patience.create)[
            self._topic
        ]
        try:
            future.result(self._patience.create)
        except (KafkaException, TimeoutError) as error:
            if isinstance(error, KafkaException) and error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                return
            raise QueueMissingError(
                f"there is no topic {self._topic} on {self._cluster}, and it cannot be created: {_reason(error)}"
            ) from None

    def _unreachable(self) -> PublishError:
        reason = _reason(self._complaint) if self._complaint is not None else "no answer in time"
        return BrokerUnreachableError(f"{self._cluster} cannot be reached: {reason}")

    def _explain(self, error: KafkaError) -> PublishError:
        where = f"topic {self._topic} on {self._cluster}"
        if error.code() in _NO_TOPIC:
            return QueueMissingError(f"there is no {where}")
        if error.code() in _UNUSABLE:
            return QueueMissingError(f"{where} cannot be used: {_reason(error)}")
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            return MessageRefusedError(f"{where} refused messages as too large; see its max.message.bytes")
        if error.fatal() or error.code() < 0:
            return PublishError(f"the producer for {where} failed: {_reason(error)}")
        return MessageRefusedError(f"{where} refused messages: {_reason(error)}")


def _reason(error: KafkaError | BaseException) -> str:
    """Return what an error says, without what changes from try to try."""
    if isinstance(error, KafkaException):
        error = error.args[0]
    text = error.str() if isinstance(error, KafkaError) else "no answer in time"
    return re.sub(r" \(after \d+ms in state \w+.*?\)", "", text)
