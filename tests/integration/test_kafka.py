"""What only Kafka can do wrong: rights, sizes, topics that vanish, and logging in; more is in test_publishers.py."""

import os
import subprocess
import sys
import traceback
from pathlib import Path
from time import monotonic

import pytest
from confluent_kafka.admin import AclOperation
from pydantic import SecretStr

from orchestrator.errors import (
    BrokerUnreachableError,
    MessageRefusedError,
    PublishError,
    QueueMissingError,
)
from orchestrator.queues.kafka import KafkaPublisher, survey
from orchestrator.settings import KafkaSettings
from tests.support.kafka import KafkaServer
from tests.support.processes import eventually
from tests.support.publishing import (
    HASTY,
    KafkaPlace,
    batch_of,
    ids_of,
    publish_around_a_fork,
    publishing_on,
)

pytestmark = pytest.mark.timeout(120)

WITHIN = HASTY.open + HASTY.batch + 1
"""Seconds in which a hasty publisher must return, whatever the broker does."""


@pytest.fixture
def place(kafka_server: KafkaServer, topic: str) -> KafkaPlace:
    return KafkaPlace(kafka_server, topic)


class TestAnswers:
    """Answers that are not a confirm."""

    def test_larger_requests_than_a_topic_takes_become_smaller(
        self, place: KafkaPlace, kafka_server: KafkaServer
    ) -> None:
        kafka_server.create_topic(place.queue, max_message_bytes=20_000)
        publisher, batch = place.publisher(), batch_of(1_000)
        first = place.publish(publisher, batch)
        assert isinstance(first.error, MessageRefusedError)
        assert "max.message.bytes" in str(first.error)
        eventually(lambda: place.publish(publisher, batch).error is None, within=20, what="it fits")
        assert {message.id for message in place.read()} == set(ids_of(batch))

    def test_a_message_larger_than_a_topic_takes_is_refused_each_time(
        self, place: KafkaPlace, kafka_server: KafkaServer
    ) -> None:
        kafka_server.create_topic(place.queue, max_message_bytes=100)
        publisher = place.publisher()
        for _ in range(8):
            receipt = place.publish(publisher, batch_of(3))
            assert isinstance(receipt.error, MessageRefusedError)
            assert not receipt.confirmed
        assert place.read() == []

    def test_a_topic_deleted_between_batches_is_created_again(
        self, place: KafkaPlace, kafka_server: KafkaServer
    ) -> None:
        publisher, batch = place.publisher(), batch_of(10)
        assert place.publish(publisher, batch_of(10)).error is None
        kafka_server.delete_topic(place.queue)
        started = monotonic()
        receipt = place.publish(publisher, batch)
        assert monotonic() - started < WITHIN
        assert isinstance(receipt.error, PublishError)
        assert not receipt.confirmed
        assert place.publish(publisher, batch).error is None
        assert {message.id for message in place.read()} == set(ids_of(batch))

    def test_a_topic_deleted_in_the_middle_of_a_flow(self, place: KafkaPlace, kafka_server: KafkaServer) -> None:
        with publishing_on(place) as flow:
            kafka_server.delete_topic(place.queue)
            flow.await_error(PublishError)
            batch = batch_of(10)
            assert place.publish(flow.publisher, batch).error is None
        assert set(ids_of(batch)) <= {message.id for message in place.read()}

    def test_a_topic_that_no_kafka_can_have_cannot_be_used(self, kafka_server: KafkaServer) -> None:
        place = KafkaPlace(kafka_server, "no topic")
        assert isinstance(place.publish(place.publisher(), batch_of(1)).error, QueueMissingError)

    def test_how_a_topic_stands(self, place: KafkaPlace, kafka_server: KafkaServer) -> None:
        url = SecretStr(kafka_server.url)
        missing = survey(url, KafkaSettings(), place.queue)
        assert (missing.messages, bool(missing.problem)) == (None, True)
        kafka_server.create_topic(place.queue, 3)
        assert place.publish(place.publisher(), batch_of(10)).error is None
        standing = survey(url, KafkaSettings(), place.queue)
        assert (standing.name, standing.messages, standing.consumers, standing.problem) == (place.queue, 10, None, None)
        unreachable = survey(SecretStr("kafka://127.0.0.1:1"), KafkaSettings(), place.queue, HASTY)
        assert unreachable.problem


class TestLoggingIn:
    """TLS, SASL and rights."""

    def publisher(self, server: KafkaServer, topic: str, user: str = "writer", **security: object) -> KafkaPublisher:
        security = {"ca_file": server.certificate} | security
        return KafkaPublisher(
            SecretStr(server.secure_url(user)), topic, KafkaSettings.model_validate(security), patience=HASTY
        )

    @pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
    def test_tls_and_a_password(self, place: KafkaPlace, kafka_server: KafkaServer, mechanism: str) -> None:
        publisher = self.publisher(kafka_server, place.queue, "admin", sasl_mechanism=mechanism)
        assert place.publish(publisher, batch_of(10)).error is None
        assert f"topic {place.queue} on kafkas://localhost:" in publisher.check()
        assert len(place.read()) == 10

    def test_the_systems_authorities_are_those_of_ssl_cert_file(
        self, place: KafkaPlace, kafka_server: KafkaServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publisher = self.publisher(kafka_server, place.queue, "admin", ca_file=None)
        with pytest.raises(BrokerUnreachableError, match="certificate"):
            publisher.check()
        monkeypatch.setenv("SSL_CERT_FILE", os.fspath(kafka_server.certificate))
        assert self.publisher(kafka_server, place.queue, "admin", ca_file=None).check()

    def test_tls_verifies_the_brokers_name(self, place: KafkaPlace, kafka_server: KafkaServer) -> None:
        url = SecretStr(kafka_server.secure_url("admin").replace("localhost", "127.0.0.1"))
        security = KafkaSettings(ca_file=kafka_server.certificate)
        with pytest.raises(BrokerUnreachableError, match="certificate"):
            KafkaPublisher(url, place.queue, security, patience=HASTY).check()

    def test_what_is_lacking_is_said_and_goes_on_once_it_is_granted(
        self, place: KafkaPlace, kafka_server: KafkaServer
    ) -> None:
        publisher, writer = self.publisher(kafka_server, place.queue), "writer"
        assert isinstance(place.publish(publisher, batch_of(3)).error, QueueMissingError)
        kafka_server.grant(writer, place.queue, AclOperation.DESCRIBE)
        receipt = eventually(
            lambda: None if "Topic auth" in str((got := place.publish(publisher, batch_of(3))).error) else got,
            within=20,
            what="the topic may be described",
        )
        assert receipt is not None
        assert isinstance(receipt.error, QueueMissingError)
        assert f"there is no topic {place.queue}" in str(receipt.error)
        assert "it cannot be created" in str(receipt.error)
        kafka_server.create_topic(place.queue)
        receipt = place.publish(publisher, batch_of(3))
        assert isinstance(receipt.error, QueueMissingError)
        assert "uthorization failed" in str(receipt.error)
        with pytest.raises(QueueMissingError, match="no right to write"):
            publisher.check()
        kafka_server.grant(writer, place.queue, AclOperation.WRITE)
        eventually(lambda: place.publish(publisher, batch_of(3)).error is None, within=20, what="it may be written")
        assert publisher.check()

    def test_the_password_appears_nowhere(self, place: KafkaPlace, kafka_server: KafkaServer) -> None:
        url = SecretStr(kafka_server.secure_url("writer").replace("writer-secret", "canary"))
        publisher = KafkaPublisher(url, place.queue, KafkaSettings(ca_file=kafka_server.certificate), patience=HASTY)
        with pytest.raises(BrokerUnreachableError, match="Authentication failed") as caught:
            publisher.check()
        assert "canary" not in "".join(traceback.format_exception(caught.value)) + repr(vars(publisher))

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("kafka://user:canary@127.0.0.1:1", "kafka://127.0.0.1:1 cannot be reached: "),
            ("kafka://127.0.0.1:1,127.0.0.1:2", "kafka://127.0.0.1:1,127.0.0.1:2 cannot be reached: "),
            ("kafkas://user:canary@[::1]:1", "kafkas://[::1]:1 cannot be reached: "),
            ("kafka://no-such-host.invalid", "kafka://no-such-host.invalid cannot be reached: "),
        ],
    )
    def test_an_unreachable_cluster_is_named_without_credentials(self, url: str, shown: str) -> None:
        publisher = KafkaPublisher(SecretStr(url), "topic", KafkaSettings(), patience=HASTY)
        started = monotonic()
        receipt = publisher.publish(batch_of(1), None)  # type: ignore[arg-type] # it never comes to that
        assert monotonic() - started < WITHIN
        assert isinstance(receipt.error, BrokerUnreachableError)
        assert shown in str(receipt.error)
        assert "canary" not in str(receipt.error)


def test_without_its_client_kafka_is_one_clear_sentence(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['confluent_kafka'] = None; from orchestrator.__main__ import main; main()"
    env = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
    places = {"ORCHESTRATOR_DATABASE_URL": "postgresql://127.0.0.1:1/x", "ORCHESTRATOR_EXTRACTION_URL": "kafka://h"}
    env |= places | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", hidden, "plan", "1"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done
    assert "pip install 'task-orchestrator[kafka]'" in done.stderr


def test_a_forked_child_makes_its_own_and_leaves_its_parents_alone(place: KafkaPlace) -> None:
    publish_around_a_fork(place)
    assert len(place.read()) == 30
