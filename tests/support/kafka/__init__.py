"""A private Apache Kafka on free loopback ports: KRaft brokers as ordinary processes of the test's own account.

Each broker has two listeners: plain text, where everybody may do everything, and TLS with SASL, where users may do
what they were granted. Where there is no Java, librdkafka's mock cluster stands in for what it can do.
"""

import atexit
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from tests.support.kafka.jars import HOW_TO_INSTALL, class_path, is_installed
from tests.support.kafka.wire import Record, records
from tests.support.processes import Process, eventually, free_port

__all__ = ["HOW_TO_INSTALL", "USERS", "KafkaServer", "MockKafka", "Record", "is_installed"]

USERS: Final = {"admin": "admin-secret", "writer": "writer-secret"}
"""Those who may come by TLS and SASL, with their passwords; the admin may do everything."""

_START_LIMIT: Final = 60.0
_ANSWER_LIMIT: Final = 20.0
_READY: Final = "Kafka Server started"
# Small, and ready after 2.7 s of CPU instead of 5.1: tests measure nothing of it. An archive of Kafka's own classes
# (AppCDS) would save another second of each start, of which a test run has ten, but takes 7 s to make and a broker's
# orderly stop: not worth it.
_QUICK: Final = ("java", "-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
# As Kafka's own scripts start it.
_LASTING: Final = ("java", "-server", "-Xms1g", "-Xmx1g", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20")
_CONFIGURATION: Final = """
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{plain},SECURE://localhost:{secure},CONTROLLER://127.0.0.1:{controller}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL
listener.name.secure.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256
listener.name.secure.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required {users};
listener.name.secure.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secure.ssl.keystore.type=PEM
listener.name.secure.ssl.keystore.location={keystore}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:admin
log.dirs={data}
auto.create.topics.enable=false
default.replication.factor={replicas}
min.insync.replicas={in_sync}
num.partitions=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
group.initial.rebalance.delay.ms=0
log.cleaner.enable=false
# A broker that was killed is back only when its old session is over.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
"""


class KafkaServer:
    """A running cluster, of one broker unless more are asked for. Nothing outside the loopback interface listens.

    Args:
        brokers: how many; a topic has as many replicas, and takes messages as long as one of them may be missing.
        measured: run as in production; otherwise they start quickly and are slow.
    """

    def __init__(self, brokers: int = 1, *, measured: bool = False) -> None:
        self._java = _LASTING if measured else _QUICK
        self._directory = Path(tempfile.mkdtemp(prefix="orchestrator-kafka-"))
        self._starts = 0
        self.certificate, keystore = _certificate(self._directory)
        ports = [(free_port(), free_port(), free_port()) for _ in range(brokers)]
        self._plain = {node: plain for node, (plain, _, _) in enumerate(ports, 1)}
        self._secure = {node: secure for node, (_, secure, _) in enumerate(ports, 1)}
        voters = ",".join(f"{node}@127.0.0.1:{controller}" for node, (_, _, controller) in enumerate(ports, 1))
        for node, (plain, secure, controller) in enumerate(ports, 1):
            (self._directory / f"{node}.properties").write_text(
                _CONFIGURATION.format(
                    node=node,
                    voters=voters,
                    plain=plain,
                    secure=secure,
                    controller=controller,
                    users=" ".join(f'user_{name}="{password}"' for name, password in USERS.items()),
                    keystore=keystore,
                    data=self._directory / f"data-{node}",
                    replicas=brokers,
                    in_sync=max(1, brokers - 1),
                )
            )
        self._brokers: dict[int, Process] = {}
        atexit.register(self.close)
        self._format()
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def servers(self) -> str:
        """Where everybody may do everything, as ``host:port,host:port``."""
        return ",".join(f"127.0.0.1:{port}" for port in self._plain.values())

    @property
    def secure_servers(self) -> str:
        """Where TLS and a user of :data:`USERS` are wanted; the certificate is for ``localhost``."""
        return ",".join(f"localhost:{port}" for port in self._secure.values())

    @property
    def url(self) -> str:
        """The URL of :attr:`servers`."""
        return f"kafka://{self.servers}"

    @property
    def version(self) -> str:
        """What the first broker says that it is."""
        return self._brokers[self.nodes[0]].output.read_text().partition("Kafka version: ")[2].split()[0]

    @property
    def nodes(self) -> list[int]:
        """The ids of the brokers."""
        return list(self._plain)

    def records(self, topic: str, positions: dict[int, int] | None = None) -> list[Record]:
        """Return what a topic has, read by a stranger; see :func:`tests.support.kafka.wire.records`."""
        return records(self.servers, topic, positions)

    def secure_url(self, user: str) -> str:
        """Return the URL of :attr:`secure_servers` for a user."""
        return f"kafkas://{user}:{USERS[user]}@{self.secure_servers}"

    def start(self) -> None:
        """Start the brokers that do not run, and wait until they take messages."""
        starting = [self._start(node) for node in self.nodes if node not in self._brokers]
        for process in starting:
            process.await_line(_READY, within=_START_LIMIT)

    def stop(self) -> None:
        """Stop all in good order and wait until they are gone."""
        for process in self._brokers.values():
            process.send(signal.SIGTERM)
        for process in self._brokers.values():
            process.wait(within=_START_LIMIT)
            process.close()
        self._brokers.clear()

    def kill(self, *nodes: int) -> None:
        """Kill -9 brokers, all unless some are named."""
        for node in nodes or self.nodes:
            self._brokers.pop(node).close()

    def pause(self) -> None:
        """SIGSTOP all: connections stay open and nobody answers."""
        for process in self._brokers.values():
            process.freeze()

    def resume(self) -> None:
        """SIGCONT all."""
        for process in self._brokers.values():
            process.thaw()

    def close(self) -> None:
        """Kill everything and remove its data."""
        atexit.unregister(self.close)
        for process in self._brokers.values():
            process.close()
        self._brokers.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- Topics and rights, by the administrator's client -----------------------------------------------------

    def create_topic(self, name: str, partitions: int = 1, **settings: object) -> None:
        """Create a topic; max_message_bytes is max.message.bytes."""
        config = {key.replace("_", "."): str(value) for key, value in settings.items()}
        self._done(self._admin.create_topics([NewTopic(name, partitions, config=config)]))

    def delete_topic(self, name: str) -> None:
        """Delete a topic, and wait until nobody sees it any more."""
        self._done(self._admin.delete_topics([name]))
        eventually(lambda: name not in self.topics(), within=_ANSWER_LIMIT, what=f"topic {name} is gone")

    def topics(self) -> dict[str, int]:
        """Return how many partitions each topic has."""
        found = self._admin.list_topics(timeout=_ANSWER_LIMIT).topics
        return {name: len(topic.partitions) for name, topic in found.items() if not name.startswith("__")}

    def leader(self, topic: str) -> int:
        """Return which broker leads the first partition of a topic."""
        return int(self._admin.list_topics(topic, timeout=_ANSWER_LIMIT).topics[topic].partitions[0].leader)

    def is_in_sync(self, topic: str) -> bool:
        """Tell whether every replica of a topic has all of it."""
        partitions = self._admin.list_topics(topic, timeout=_ANSWER_LIMIT).topics[topic].partitions.values()
        return all(len(partition.isrs) == len(self.nodes) for partition in partitions)

    def setting(self, topic: str, name: str) -> str:
        """Return the value of a setting of a topic."""
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        entries = self._admin.describe_configs([resource])[resource].result(_ANSWER_LIMIT)
        return str(entries[name].value)

    def change(self, topic: str, **settings: object) -> None:
        """Change settings of a topic; max_message_bytes is max.message.bytes, None puts back its default."""
        entries = [
            ConfigEntry(
                key.replace("_", "."),
                None if value is None else str(value),
                incremental_operation=AlterConfigOpType.DELETE if value is None else AlterConfigOpType.SET,
            )
            for key, value in settings.items()
        ]
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
        self._done(self._admin.incremental_alter_configs([resource]))

    def grant(self, user: str, topic: str, operation: AclOperation) -> None:
        """Grant a user of :data:`USERS` a right on a topic."""
        binding = AclBinding(
            ResourceType.TOPIC,
            topic,
            ResourcePatternType.LITERAL,
            f"User:{user}",
            "*",
            operation,
            AclPermissionType.ALLOW,
        )
        self._done(self._admin.create_acls([binding]))

    @cached_property
    def _admin(self) -> AdminClient:
        # Kept: it forgets what it was asked when it is collected.
        return AdminClient({"bootstrap.servers": self.servers, "log_level": 0})

    @staticmethod
    def _done(futures: Mapping[Any, Any]) -> None:
        for future in futures.values():
            future.result(_ANSWER_LIMIT)

    def _format(self) -> None:
        cluster = secrets.token_urlsafe(16)
        for node in self.nodes:
            command = [*_QUICK, "-cp", class_path(), "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}"]
            command += ["--config", str(self._directory / f"{node}.properties")]
            for user, password in USERS.items():
                command += ["--add-scram", f"SCRAM-SHA-256=[name={user},password={password}]"]
            said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_START_LIMIT)
            assert said.returncode == 0, f"Kafka's storage could not be formatted: {said.stdout}{said.stderr}"

    def _start(self, node: int) -> Process:
        # A log of its own, for the last start's says that it is ready.
        self._starts += 1
        process = Process(
            [*self._java, "-cp", class_path(), "kafka.Kafka", str(self._directory / f"{node}.properties")],
            output=self._directory / f"{node}-{self._starts}.log",
            cwd=self._directory,
        )
        self._brokers[node] = process
        return process


class MockKafka:
    """librdkafka's own imitation of a cluster, inside this process: it takes and gives messages, and creates topics."""

    def __init__(self) -> None:
        self._owner = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused", "log_level": 0})
        brokers = self._owner.list_topics(timeout=_ANSWER_LIMIT).brokers.values()
        self.servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        self.url = f"kafka://{self.servers}"

    def records(self, topic: str) -> list[Record]:
        """Return all that a topic has, read by librdkafka: the imitation's answers are good enough for no other."""
        consumer = Consumer({"bootstrap.servers": self.servers, "group.id": "tests", "log_level": 0})
        found = []
        for number in consumer.list_topics(topic, timeout=_ANSWER_LIMIT).topics[topic].partitions:
            partition = TopicPartition(topic, number, OFFSET_BEGINNING)
            _, end = consumer.get_watermark_offsets(partition, timeout=_ANSWER_LIMIT)
            consumer.assign([partition])
            for _ in range(end):
                message: Any  # the stubs allow for messages without anything
                (message,) = consumer.consume(1, timeout=_ANSWER_LIMIT)
                facts = {name: value.decode() for name, value in message.headers()}
                found.append(Record(number, message.key().decode(), message.value(), facts))
        consumer.close()
        return found


def _certificate(directory: Path) -> tuple[Path, Path]:
    """Make a certificate for ``localhost``; return it alone, and with its key as Kafka wants both."""
    key, certificate, both = (directory / name for name in ("key.pem", "certificate.pem", "both.pem"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return certificate, both
