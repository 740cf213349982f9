"""The Publisher port: one suite for all implementations on real servers, then what only RabbitMQ can do wrong."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

import amqp
import pgmq
import psycopg
import pytest
from kombu.utils.url import url_to_parts
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, create_engine, text

from orchestrator.domain import ExtractionBatch
from orchestrator.errors import (
    BrokerBlockedError,
    BrokerUnreachableError,
    ConfirmTimeoutError,
    MessageRefusedError,
    QueueMissingError,
)
from orchestrator.queues import Publisher, Receipt
from orchestrator.queues.postgres import PostgresPublisher
from orchestrator.queues.rabbitmq import RabbitMQPublisher
from orchestrator.rabbitmq import Patience
from tests.support.kafka import HOW_TO_INSTALL, KafkaServer, MockKafka, is_installed
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually
from tests.support.publishing import (
    TASK,
    TRACEPARENT,
    InterruptedByTestError,
    KafkaPlace,
    Place,
    Received,
    batch_of,
    ids_of,
    publish_around_a_fork,
    publishing_on,
)
from tests.support.rabbitmq import RabbitMQServer

pytestmark = pytest.mark.timeout(120)

HASTY = Patience(connect=2, answer=2, confirm=2, batch=10)
WITHIN = 10.0
"""Seconds in which hasty publishers must have met a broker that is silent twice."""
GIVEN_UP = (ConfirmTimeoutError, BrokerUnreachableError)
"""What a broker is that fell silent in mid-batch: clients may notice before the confirm's time is up."""


class Rabbit:
    """A vhost of RabbitMQ, and a plain client of its own to look into it."""

    queue = "extraction_queue"

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def vhost(self) -> str:
        return url_to_parts(self.url).path or "/"

    def publisher(self, patience: Patience = HASTY) -> RabbitMQPublisher:
        return RabbitMQPublisher(SecretStr(self.url), self.queue, patience=patience)

    def publish(self, publisher: Publisher, batch: ExtractionBatch) -> Receipt:
        # RabbitMQ has no use for the ledger's transaction.
        return publisher.publish(batch, None)  # type: ignore[arg-type]

    @contextmanager
    def channel(self) -> Iterator[amqp.Channel]:
        parts = url_to_parts(self.url)
        host = f"{parts.hostname}:{parts.port}"
        with amqp.Connection(
            host, login_method="PLAIN", virtual_host=parts.path or "/", connect_timeout=5
        ) as connection:
            yield connection.channel()

    def read(self) -> list[Received]:
        received = []
        with self.channel() as channel:
            while (message := channel.basic_get(self.queue, no_ack=True)) is not None:
                facts = {**message.properties, **message.properties["application_headers"]}
                del facts["application_headers"]
                received.append(Received(json.loads(message.body), facts))
        return received

    def count(self) -> int:
        with self.channel() as channel:
            declared = channel.queue_declare(self.queue, passive=True)
            assert declared is not None
            return int(declared[1])

    def declare_otherwise(self) -> None:
        with self.channel() as channel:
            channel.queue_declare(
                self.queue, durable=True, auto_delete=False, arguments={"x-max-length": 9, "x-overflow": "drop-head"}
            )

    def is_still_otherwise(self) -> bool:
        return self.count() == 9

    def delete(self) -> None:
        with self.channel() as channel:
            channel.queue_delete(self.queue)


class Pgmq:
    """A database with PGMQ in it."""

    queue = "extraction_queue"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def publisher(self) -> PostgresPublisher:
        return PostgresPublisher(self.queue, self.engine.begin)

    def publish(self, publisher: Publisher, batch: ExtractionBatch) -> Receipt:
        with self.engine.begin() as transaction:
            return publisher.publish(batch, transaction)

    def rows(self, statement: str) -> Sequence[Any]:
        with self.engine.connect() as connection:
            return connection.execute(text(statement)).all()

    def read(self) -> list[Received]:
        rows = self.rows(f"SELECT message, headers FROM pgmq.q_{self.queue} ORDER BY msg_id")
        return [Received(message, headers) for message, headers in rows]

    def declare_otherwise(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(f"SELECT pgmq.create_unlogged('{self.queue}')"))

    def is_still_otherwise(self) -> bool:
        [[persistence]] = self.rows(f"SELECT relpersistence FROM pg_class WHERE oid = 'pgmq.q_{self.queue}'::regclass")
        return bool(persistence == "u")


@pytest.fixture
def rabbit(broker_url: str) -> Rabbit:
    return Rabbit(broker_url)


@pytest.fixture
def pgmq_place(database_url: str) -> Iterator[Pgmq]:
    with psycopg.connect(database_url) as connection:
        pgmq.install_pgmq_from_sql(conn=connection)
    engine = create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
    yield Pgmq(engine)
    engine.dispose()


@pytest.fixture
def kafka_place(request: pytest.FixtureRequest, topic: str) -> Iterator[KafkaPlace]:
    """A real Kafka; where none can run, librdkafka's imitation, but not in CI."""
    if is_installed() or os.environ.get("CI") == "true":
        yield KafkaPlace(request.getfixturevalue("kafka_server"), topic)
    else:
        warnings.warn(f"{HOW_TO_INSTALL}; this ran on librdkafka's mock cluster", stacklevel=1)
        yield KafkaPlace(MockKafka(), topic)


@pytest.fixture(params=["rabbit", "pgmq_place", "kafka_place"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


Broker: TypeAlias = RabbitMQServer | KafkaServer


@pytest.fixture(params=["fragile_server", "fragile_kafka"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A broker to hurt."""
    server: Broker = request.getfixturevalue(request.param)
    yield server
    server.start()


@pytest.fixture
def fragile(broker: Broker, topic: str) -> Place:
    """A place on it."""
    return KafkaPlace(broker, topic) if isinstance(broker, KafkaServer) else rabbit_on(broker)


def rabbit_on(server: RabbitMQServer) -> Rabbit:
    return Rabbit(server.vhost_url(server.fresh_vhost()))


class TestEveryPublisher:
    """What the engine may rely on, whichever queue is configured."""

    def test_everything_arrives_and_is_confirmed(self, place: Place) -> None:
        batch = batch_of(1_234)
        receipt = place.publish(place.publisher(), batch)
        assert receipt.error is None
        assert sorted(receipt.confirmed) == list(range(1, 1_235))
        assert sorted(message.id for message in place.read()) == sorted(ids_of(batch))

    def test_body_and_facts_are_exactly_the_contract(self, place: Place) -> None:
        batch = batch_of(1, first=2**63 - 1)
        place.publish(place.publisher(), batch)
        [message] = place.read()
        assert message.body == {
            "crawl_config_id": 2**63 + 499_999,
            "data_source_id": 2**63 - 1,
            "task_id": TASK,
            "run_id": str(batch.run_id),
        }
        delivery = {"delivery_mode": 2} if isinstance(place, Rabbit) else {}
        assert message.facts == delivery | {
            "content_type": "application/json",
            "type": "extraction.requested",
            "app_id": "orchestrator",
            "message_id": ids_of(batch)[0],
            "traceparent": TRACEPARENT,
        }

    def test_a_resend_has_equal_message_ids(self, place: Place) -> None:
        publisher, batch = place.publisher(), batch_of(20)
        for _ in range(2):
            assert place.publish(publisher, batch).error is None
        assert sorted(message.id for message in place.read()) == sorted(ids_of(batch) * 2)

    def test_an_existing_queue_is_used_as_it_is(self, place: Place) -> None:
        place.declare_otherwise()
        assert place.publish(place.publisher(), batch_of(20)).error is None
        assert place.is_still_otherwise()

    def test_check_declares_a_missing_queue_and_tells_where_it_is(self, place: Place) -> None:
        publisher = place.publisher()
        assert place.queue in publisher.check()
        assert place.read() == []
        assert place.queue in publisher.check()

    def test_an_empty_batch_is_nothing(self, place: Place) -> None:
        assert place.publish(place.publisher(), batch_of(0)) == Receipt(())

    def test_a_batch_of_the_largest_size(self, place: Place) -> None:
        receipt = place.publish(place.publisher(), batch_of(10_000))
        assert receipt.error is None
        assert len(receipt.confirmed) == 10_000
        assert len({message.id for message in place.read()}) == 10_000

    def test_publishing_goes_on_after_close(self, place: Place) -> None:
        publisher = place.publisher()
        publisher.close()
        for first in (1, 100):
            assert place.publish(publisher, batch_of(10, first=first)).error is None
            publisher.close()
        assert len(place.read()) == 20


class TestPgmq:
    """What it means to live in the ledger's transaction."""

    def test_a_rollback_takes_the_messages_back(self, pgmq_place: Pgmq) -> None:
        publisher = pgmq_place.publisher()
        publisher.check()
        with pgmq_place.engine.connect() as transaction:
            assert len(publisher.publish(batch_of(10), transaction).confirmed) == 10
            transaction.rollback()
        assert pgmq_place.read() == []

    @pytest.mark.parametrize("prepare", ["DROP SCHEMA pgmq CASCADE", "CREATE ROLE stranger NOLOGIN"])
    def test_a_queue_out_of_reach_leaves_the_transaction_usable(
        self, pgmq_place: Pgmq, prepare: str, postgres_server: PostgresServer
    ) -> None:
        stranger = "ROLE" in prepare
        with pgmq_place.engine.begin() as connection:
            connection.execute(text(prepare))
        try:
            with pgmq_place.engine.connect() as transaction:
                if stranger:
                    transaction.execute(text("SET LOCAL ROLE stranger"))
                receipt = pgmq_place.publisher().publish(batch_of(3), transaction)
                assert isinstance(receipt.error, QueueMissingError)
                assert not receipt.confirmed
                assert transaction.execute(text("SELECT 1")).scalar() == 1
        finally:
            postgres_server.drop_role("stranger")

    def test_a_queue_without_the_right_to_insert_is_no_queue(
        self, pgmq_place: Pgmq, postgres_server: PostgresServer
    ) -> None:
        pgmq_place.publisher().check()
        postgres_server.create_role("reader")
        try:
            with pgmq_place.engine.connect() as transaction:
                transaction.execute(text("GRANT USAGE ON SCHEMA pgmq TO reader"))
                transaction.execute(text("SET LOCAL ROLE reader"))
                receipt = pgmq_place.publisher().publish(batch_of(3), transaction)
                assert isinstance(receipt.error, QueueMissingError)
                assert "no right to insert" in str(receipt.error)
        finally:
            postgres_server.drop_role("reader")

    def test_two_transactions_that_miss_the_queue_at_once_both_publish(self, pgmq_place: Pgmq) -> None:
        receipts: list[Receipt] = []

        def publish(transaction: Connection) -> None:
            receipts.append(pgmq_place.publisher().publish(batch_of(5), transaction))
            transaction.commit()

        with pgmq_place.engine.connect() as one:
            receipts.append(pgmq_place.publisher().publish(batch_of(5), one))
            with pgmq_place.engine.connect() as other:
                pid = other.execute(text("SELECT pg_backend_pid()")).scalar()
                thread = threading.Thread(target=publish, args=(other,))
                thread.start()
                waiting = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'"
                eventually(lambda: pgmq_place.rows(waiting), within=10, what="the second waits for the first")
                one.commit()
                thread.join(10)
        assert [receipt.error for receipt in receipts] == [None, None]
        assert len(pgmq_place.read()) == 10


class TestRabbitMQ:
    """Answers that are not an ack."""

    def test_a_deleted_queue_returns_everything_and_the_next_batch_declares_it(self, rabbit: Rabbit) -> None:
        publisher = rabbit.publisher()
        assert rabbit.publish(publisher, batch_of(10)).error is None
        rabbit.delete()
        receipt = rabbit.publish(publisher, batch_of(1_000))
        assert isinstance(receipt.error, QueueMissingError)
        assert not receipt.confirmed
        assert rabbit.publish(publisher, batch_of(1_000)).error is None
        assert rabbit.count() == 1_000

    def test_a_full_queue_confirms_exactly_what_it_took(self, rabbit: Rabbit, rabbitmq_server: RabbitMQServer) -> None:
        definition = json.dumps({"max-length": 700, "overflow": "reject-publish"})
        rabbitmq_server.ctl("set_policy", "-p", rabbit.vhost, "--apply-to", "queues", "small", ".*", definition)
        batch = batch_of(2_000)
        receipt = rabbit.publish(rabbit.publisher(), batch)
        assert isinstance(receipt.error, MessageRefusedError)
        arrived = {message.id for message in rabbit.read()}
        assert set(ids_of(batch, receipt.confirmed)) == arrived
        assert 700 <= len(arrived) < 2_000

    def test_a_queue_of_someone_elses_connection_cannot_be_used(self, rabbit: Rabbit) -> None:
        with rabbit.channel() as channel:
            channel.queue_declare(rabbit.queue, exclusive=True)
            receipt = rabbit.publish(rabbit.publisher(), batch_of(3))
        assert isinstance(receipt.error, QueueMissingError)
        assert "RESOURCE_LOCKED" in str(receipt.error)

    def test_the_password_appears_nowhere(self, rabbit: Rabbit) -> None:
        publisher = RabbitMQPublisher(
            SecretStr(rabbit.url.replace(":guest@", ":canary@")), rabbit.queue, patience=HASTY
        )
        with pytest.raises(BrokerUnreachableError, match="ACCESS_REFUSED") as caught:
            publisher.check()
        assert "canary" not in "".join(traceback.format_exception(caught.value)) + repr(vars(publisher))

    def test_vhosts_with_any_name_are_reached(self, rabbitmq_server: RabbitMQServer) -> None:
        place = Rabbit(rabbitmq_server.create_vhost("a/b c%+"))
        assert place.publish(place.publisher(), batch_of(3)).error is None
        assert place.count() == 3

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("amqp://user:canary@127.0.0.1:1", "amqp://127.0.0.1:1/ cannot be reached: Connection refused"),
            ("amqp://user:canary@[::1]:1//", "amqp://[::1]:1/ cannot be reached: "),
            ("amqps://user:canary@127.0.0.1:1/%2Fa", "amqps://127.0.0.1:1//a cannot be reached: Connection refused"),
            ("amqp://user:canary@no-such-host.invalid", "amqp://no-such-host.invalid:5672/ cannot be reached: "),
        ],
    )
    def test_an_unreachable_broker_is_named_without_credentials(self, url: str, shown: str) -> None:
        receipt = RabbitMQPublisher(SecretStr(url), "queue").publish(batch_of(1), None)  # type: ignore[arg-type]
        assert isinstance(receipt.error, BrokerUnreachableError)
        assert shown in str(receipt.error)
        assert "canary" not in str(receipt.error)

    def test_something_that_is_no_broker_is_unreachable(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                peer, _ = server.accept()
                with peer, suppress(ConnectionError):
                    peer.sendall(b"\1\0\5\0\0\0\4nonsense")
                    peer.recv(1_000)

            thread = threading.Thread(target=answer)
            thread.start()
            url = SecretStr(f"amqp://127.0.0.1:{server.getsockname()[1]}")
            receipt = RabbitMQPublisher(url, "queue", patience=HASTY).publish(batch_of(1), None)  # type: ignore[arg-type]
            thread.join(10)
        assert isinstance(receipt.error, BrokerUnreachableError)


class TestConnection:
    """When a connection is kept, and when it is replaced."""

    @pytest.fixture
    def opened(self, rabbit: Rabbit, rabbitmq_server: RabbitMQServer) -> Callable[[int], int]:
        """Return how many connections were opened, once that many have been closed."""
        who = r"orchestrator publisher"
        closing = re.compile(rf"closing AMQP connection .* - {who}, vhost: '{rabbit.vhost}'")
        granted = re.compile(rf" - {who}\)?: user 'guest' .* granted access to vhost '{rabbit.vhost}'")

        def count(closed: int) -> int:
            log = eventually(
                lambda: log if len(closing.findall(log := rabbitmq_server.log)) >= closed else None,
                within=10,
                what=f"{closed} connections are closed",
            )
            return len(granted.findall(log or ""))

        return count

    @pytest.mark.parametrize(("idle", "expected"), [(20.0, 1), (0.0, 3)])
    def test_a_connection_is_kept_unless_it_was_idle(
        self, rabbit: Rabbit, opened: Callable[[int], int], idle: float, expected: int
    ) -> None:
        publisher = rabbit.publisher(Patience(idle=idle))
        for _ in range(3):
            assert rabbit.publish(publisher, batch_of(10)).error is None
        publisher.close()
        assert opened(expected) == expected

    def test_a_forked_child_opens_its_own_and_leaves_its_parents_alone(
        self, rabbit: Rabbit, opened: Callable[[int], int]
    ) -> None:
        publish_around_a_fork(rabbit)
        assert rabbit.count() == 30
        assert opened(2) == 2

    def test_closing_is_no_fault_in_the_brokers_log(self, rabbit: Rabbit, rabbitmq_server: RabbitMQServer) -> None:
        publisher = rabbit.publisher()
        publisher.check()
        logged = len(rabbitmq_server.log)
        publisher.close()
        said = eventually(
            lambda: log if "closing AMQP connection" in (log := rabbitmq_server.log[logged:]) else None,
            within=10,
            what="the broker notices",
        )
        assert "unexpectedly" not in (said or "")

    @pytest.mark.parametrize("name", ["localhost", "elsewhere"])
    def test_tls_verifies_the_brokers_name(
        self, rabbit: Rabbit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        with tls_in_front_of(rabbit.url, tmp_path, name) as (url, certificate):
            monkeypatch.setenv("SSL_CERT_FILE", os.fspath(certificate))
            publisher = RabbitMQPublisher(SecretStr(url), rabbit.queue)
            receipt = rabbit.publish(publisher, batch_of(10_000))
            publisher.close()
        if name == "localhost":
            assert receipt.error is None
            assert rabbit.count() == 10_000
        else:
            assert isinstance(receipt.error, BrokerUnreachableError)
            assert "certificate" in str(receipt.error)


class TestAlarms:
    """RabbitMQ takes no messages for a while, and says so."""

    @pytest.fixture
    def alarmed(self, fragile_server: RabbitMQServer) -> Rabbit:
        return rabbit_on(fragile_server)

    def test_an_alarm_is_reported_soon_and_passes(self, alarmed: Rabbit, fragile_server: RabbitMQServer) -> None:
        known, fresh = alarmed.publisher(), alarmed.publisher()
        assert alarmed.publish(known, batch_of(10)).error is None
        with fragile_server.alarm():
            for publisher in (known, fresh, known):
                started = monotonic()
                receipt = alarmed.publish(publisher, batch_of(5_000))
                assert monotonic() - started < 3
                assert isinstance(receipt.error, BrokerBlockedError)
                assert "memory" in str(receipt.error)
                assert not receipt.confirmed
        for publisher in (known, fresh):
            eventually(
                lambda publisher=publisher: alarmed.publish(publisher, batch_of(10)).error is None,  # type: ignore[misc]
                within=10,
                what="publishing works again",
            )

    def test_a_broker_in_alarm_is_not_burdened_with_connections(
        self, alarmed: Rabbit, fragile_server: RabbitMQServer
    ) -> None:
        """It keeps those that blocked clients drop until the alarm is over (rabbitmq-server#4626)."""
        publisher = alarmed.publisher()

        def connections() -> int:
            return len(fragile_server.ctl("list_connections", "pid").split())

        with fragile_server.alarm():
            assert isinstance(alarmed.publish(publisher, batch_of(10)).error, BrokerBlockedError)
            before = connections()
            for _ in range(20):
                assert isinstance(alarmed.publish(publisher, batch_of(10)).error, BrokerBlockedError)
            assert connections() <= before
        eventually(lambda: alarmed.publish(publisher, batch_of(10)).error is None, within=10, what="publishing works")

    def test_an_alarm_in_the_middle_of_a_batch(self, alarmed: Rabbit, fragile_server: RabbitMQServer) -> None:
        with publishing_on(alarmed) as flow, fragile_server.alarm():
            flow.await_error(BrokerBlockedError)
        flow.assert_confirmed_arrived()


class TestBrokerInTrouble:
    """Stops, kills and restarts: nothing blocks, and nothing is confirmed that did not arrive."""

    def test_a_stopped_broker_times_out_and_confirms_nothing_later(self, fragile: Place, broker: Broker) -> None:
        publisher, batch = fragile.publisher(), batch_of(10_000)
        assert fragile.publish(publisher, batch_of(10)).error is None
        broker.pause()
        try:
            started = monotonic()
            receipt = fragile.publish(publisher, batch)
            assert isinstance(receipt.error, GIVEN_UP)
            assert not receipt.confirmed
            assert isinstance(fragile.publish(publisher, batch).error, BrokerUnreachableError)
            publisher.close()
            assert monotonic() - started < WITHIN
        finally:
            broker.resume()
        # Were the late acks of the first batch taken for these, some of them would be missing.
        resend = batch_of(3_000, first=50_000)
        eventually(lambda: fragile.publish(publisher, resend).error is None, within=20, what="publishing works again")
        assert set(ids_of(resend)) <= {message.id for message in fragile.read()}

    def test_a_stop_in_the_middle_of_a_batch(self, fragile: Place, broker: Broker) -> None:
        with publishing_on(fragile) as flow:
            broker.pause()
            try:
                flow.await_error(*GIVEN_UP)
            finally:
                broker.resume()
        flow.assert_confirmed_arrived()

    def test_kill_and_restart(self, fragile: Place, broker: Broker) -> None:
        with publishing_on(fragile) as flow:
            if isinstance(broker, RabbitMQServer):
                broker.settle()
            broker.kill()
            flow.await_error(BrokerUnreachableError)
            assert isinstance(fragile.publish(flow.publisher, batch_of(1)).error, BrokerUnreachableError)
            broker.start()
            assert fragile.publish(flow.publisher, batch_of(10)).error is None
        flow.assert_confirmed_arrived()

    def test_a_restart_between_batches_is_not_even_noticed(self, fragile: Place, broker: Broker) -> None:
        publisher = fragile.publisher()
        assert fragile.publish(publisher, batch_of(10)).error is None
        broker.stop()
        broker.start()
        assert fragile.publish(publisher, batch_of(10)).error is None
        assert len(fragile.read()) == 20

    def test_an_interrupted_batch_leaves_nothing_that_goes_on_sending(self, fragile: Place, broker: Broker) -> None:
        publisher = fragile.publisher()
        assert fragile.publish(publisher, batch_of(10)).error is None

        def interrupt(*_: object) -> None:
            raise InterruptedByTestError

        previous = signal.signal(signal.SIGALRM, interrupt)
        broker.pause()
        began_at = monotonic()
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(InterruptedByTestError):
                fragile.publish(publisher, batch_of(10_000))
            assert monotonic() - began_at < HASTY.confirm, "it was interrupted, and did not give up by itself"
        finally:
            broker.resume()
            signal.signal(signal.SIGALRM, previous)
        batch = batch_of(1_000, first=50_000)
        assert fragile.publish(publisher, batch).error is None
        assert set(ids_of(batch)) <= {message.id for message in fragile.read()}


@contextmanager
def tls_in_front_of(url: str, directory: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Terminate TLS for one connection to a broker, with a certificate for a name."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    parts = url_to_parts(url)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError), context.wrap_socket(server.accept()[0], server_side=True) as front:
                back = socket.create_connection((parts.hostname, parts.port))
                answers = threading.Thread(target=pipe, args=(back, front))
                answers.start()
                pipe(front, back)
                back.close()
                answers.join(10)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"amqps://guest:guest@localhost:{server.getsockname()[1]}/{parts.path}", certificate
        thread.join(10)


def pipe(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
