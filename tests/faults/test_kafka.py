"""Kafka killed, frozen, its topic deleted or too narrow, its leader changed: nothing is lost, and work goes on soon."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Final
from uuid import UUID

import pytest

from tests.support.callers import pending
from tests.support.evidence import Evidence
from tests.support.kafka import KafkaServer
from tests.support.operators import NOTICED, await_told
from tests.support.oracle import RESUMED
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import LONG, rounds
from tests.support.scenes import Scene, Scenes
from tests.support.stack import Stack

SOURCES: Final = 4_000
BATCH: Final = "25"


class KafkaScene(Scene):
    """Workers that publish so few at a time that a fan-out can be met in the middle."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack, sources=SOURCES, workers=2)

    @contextmanager
    def standstill(self) -> Iterator[KafkaServer]:
        """Have the workers stand still, and all that they sent be read: who deletes the topic deletes nothing else."""
        for worker in self.workers:
            worker.freeze()
        try:
            # What they have written, the broker takes in first.
            eventually(self._is_read, within=20, what="the topic is read")
            assert self.stack.kafka is not None
            yield self.stack.kafka
        finally:
            for worker in self.workers:
                worker.thaw()

    def _is_read(self) -> bool:
        before = dict(self.stack.positions)
        self.oracle.read_wire()
        return self.stack.positions == before


@contextmanager
def scenes_on(
    kafka: KafkaServer, postgres: PostgresServer, rabbitmq: RabbitMQServer, directories: pytest.TempPathFactory
) -> Iterator[Scenes[KafkaScene]]:
    """Scenes of set-up 3, each with a topic of its own."""

    def set_up(database: str, broker: str, directory: Path, **settings: str) -> Stack:
        return Stack.on_kafka(database, broker, kafka, f"faults-{directory.name}", directory, **settings)

    with Scenes(postgres, rabbitmq, directories, KafkaScene, set_up, DISPATCH__BATCH_SIZE=BATCH) as scenes:
        yield scenes


@pytest.fixture(scope="module")
def scenes(
    kafka: KafkaServer,
    postgres_server: PostgresServer,
    rabbitmq_server: RabbitMQServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scenes[KafkaScene]]:
    """Scenes on one broker, which tests hurt."""
    with scenes_on(kafka, postgres_server, rabbitmq_server, tmp_path_factory) as scenes:
        yield scenes


@pytest.fixture
def scene(scenes: Scenes[KafkaScene], kafka: KafkaServer) -> KafkaScene:
    """A scene that is whole."""
    kafka.start()
    return scenes.take()


def restarted(kafka: KafkaServer) -> None:
    kafka.stop()
    kafka.start()


def killed(kafka: KafkaServer) -> None:
    kafka.kill()
    kafka.start()


@pytest.mark.fault("Kafka killed -9 and started again, restarted in good order, in the middle of fan-outs")
def test_restarts(scene: KafkaScene, kafka: KafkaServer, random: Random, evidence: Evidence) -> None:
    faults = [killed for _ in rounds(1, 20)]
    faults[1:1] = [restarted] if LONG else []
    in_the_middle = 0

    for fault in faults:
        run_id = scene.traffic.fan_out()
        time.sleep(random.uniform(0, 0.3))
        fault(kafka)
        evidence.trials += 1
        in_the_middle += pending(scene.stack) > 0
        with evidence.recovery():
            scene.await_resumed()
        scene.stack.await_run(run_id, "succeeded")
    scene.conclude(evidence)

    assert in_the_middle >= len(faults) / 2
    evidence.note(f"{in_the_middle} times in mid-fan-out")


@pytest.mark.fault("Kafka frozen (SIGSTOP) for longer than a batch waits, in the middle of a fan-out")
def test_frozen(scene: KafkaScene, kafka: KafkaServer, evidence: Evidence) -> None:
    told = ""
    for _ in rounds(1, 5):
        run_id = scene.traffic.fan_out()
        kafka.pause()
        try:
            began_at = time.monotonic()
            # Not by a look of the command line's now and then: it goes on trying, and is running for seconds each time.
            run = scene.stack.await_run(run_id, "retrying", within=NOTICED)
            assert run["error_code"] in {"confirm_timeout", "broker_unreachable"}
            told = f"after {time.monotonic() - began_at:.0f} s the run said: “{run['error_message']}”"
            eventually(partial(tried_again, scene.stack, run_id), within=RESUMED, what="it is tried again and again")
        finally:
            kafka.resume()
        evidence.trials += 1
        with evidence.recovery():
            scene.await_resumed()
            scene.stack.await_run(run_id, "succeeded", within=RESUMED)
    scene.conclude(evidence)
    evidence.note(told)


def tried_again(stack: Stack, run_id: UUID) -> bool:
    run = stack.run(run_id)
    return run is not None and bool(run["postponements"] >= (3 if LONG else 1))


@pytest.mark.fault("Kafka's topic deleted in mid-fan-out")
def test_the_topic_is_deleted(scene: KafkaScene, evidence: Evidence) -> None:
    for _ in rounds(1, 5):
        run_id = scene.traffic.fan_out()
        with scene.standstill() as kafka:
            kafka.delete_topic(scene.stack.topic)
            scene.stack.positions.clear()
            assert pending(scene.stack) > 0
        evidence.trials += 1
        with evidence.recovery():
            scene.stack.await_run(run_id, "succeeded", within=RESUMED)
    scene.conclude(evidence)


@pytest.mark.fault("Kafka's topic takes no message that is as large as ours, until it does again")
def test_messages_are_too_large(scene: KafkaScene, evidence: Evidence) -> None:
    run_id = scene.traffic.fan_out()
    with scene.standstill() as kafka:
        kafka.change(scene.stack.topic, max_message_bytes=100)
        assert pending(scene.stack) > 0
    evidence.trials += 1
    try:
        sentence = await_told(scene.stack, run_id, "message_refused")
    finally:
        kafka.change(scene.stack.topic, max_message_bytes=None)
    assert "max.message.bytes" in sentence
    evidence.note(f"told: “{sentence}”")
    with evidence.recovery():
        scene.stack.await_run(run_id, "succeeded", within=RESUMED)
    scene.conclude(evidence)


@pytest.mark.skipif(not LONG, reason="three brokers take a minute to themselves: `make faults`")
@pytest.mark.fault("kill -9 of the leader among three Kafka brokers in mid-fan-out")
def test_the_leader_changes(
    kafka_installed: None,  # noqa: ARG001 -- it skips
    postgres_server: PostgresServer,
    rabbitmq_server: RabbitMQServer,
    tmp_path_factory: pytest.TempPathFactory,
    evidence: Evidence,
) -> None:
    with KafkaServer(3) as kafka, scenes_on(kafka, postgres_server, rabbitmq_server, tmp_path_factory) as scenes:
        scene = scenes.take()
        for _ in rounds(1, 10):
            run_id = scene.traffic.fan_out()
            leader = kafka.leader(scene.stack.topic)
            kafka.kill(leader)
            evidence.trials += 1
            with evidence.recovery():
                scene.await_resumed()
            scene.stack.await_run(run_id, "succeeded", within=RESUMED)
            assert kafka.leader(scene.stack.topic) != leader
            kafka.start()
            eventually(partial(kafka.is_in_sync, scene.stack.topic), within=RESUMED, what="all replicas are in sync")
        scene.conclude(evidence)
