"""RabbitMQ's queues deleted, declared otherwise, full, under running workers: rows wait, the operator sees why."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import amqp
import pytest

from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE, DEAD_QUEUE
from tests.faults.conftest import StackFactory
from tests.support.callers import BIG, SMALL, consumers, pending
from tests.support.evidence import Evidence
from tests.support.operators import await_told, command
from tests.support.oracle import RESUMED
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import rounds
from tests.support.scenes import Scene, Scenes
from tests.support.stack import QUEUE, Stack, amqp_connection, drain, queue_depth

EXCHANGE: Final = "orchestrator"
TASK_QUEUES: Final = (CRAWL_QUEUE, ANALYSIS_QUEUE)
SOURCES: Final = 2_000


class QueueScene(Scene):
    """One worker, which publishes so few at a time that a fan-out can be met in the middle."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack, sources=SOURCES, workers=1)

    @contextmanager
    def standstill(self) -> Iterator[amqp.Channel]:
        """Have the worker stand still, and the extraction queue be empty: deleting it deletes nothing else."""
        (worker,) = self.workers
        worker.freeze()
        try:
            # What it has written, the broker takes in first.
            eventually(self._empty, within=10, what="the extraction queue is empty")
            with amqp_connection(self.broker) as connection:
                yield connection.channel()
        finally:
            worker.thaw()

    def replace_queue(self, channel: amqp.Channel, **arguments: Any) -> None:  # noqa: ANN401 -- AMQP's
        """Delete the extraction queue and declare it with arguments, as its owner may; x_max_length is x-max-length."""
        channel.queue_delete(QUEUE)
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments=named)

    def _empty(self) -> bool:
        self.oracle.read_wire()
        return queue_depth(self.broker, QUEUE) == 0


@pytest.fixture(scope="module")
def scenes(
    postgres_server: PostgresServer, rabbitmq_server: RabbitMQServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scenes[QueueScene]]:
    """Scenes on servers that stay whole."""
    with Scenes(postgres_server, rabbitmq_server, tmp_path_factory, QueueScene, DISPATCH__BATCH_SIZE="5") as scenes:
        yield scenes


@pytest.fixture
def scene(scenes: Scenes[QueueScene]) -> QueueScene:
    """A scene that is whole."""
    return scenes.take()


# --- The queue to the Extractor -------------------------------------------------------------------------------------


@pytest.mark.fault("extraction_queue deleted in mid-fan-out")
def test_the_extraction_queue_is_deleted(scene: QueueScene, evidence: Evidence) -> None:
    for _ in rounds(1, 5):
        run_id = scene.traffic.fan_out()
        with scene.standstill() as channel:
            channel.queue_delete(QUEUE, if_empty=True)
            assert pending(scene.stack) > 0
        evidence.trials += 1
        with evidence.recovery():
            scene.stack.await_run(run_id, "succeeded", within=RESUMED)
        assert "queue_missing" in told_afterwards(scene.stack, run_id)

    scene.conclude(evidence)


def told_afterwards(stack: Stack, run_id: UUID) -> list[str]:
    """Return the codes of what happened to a run, as an operator sees them."""
    return [event["code"] for event in command(stack, "show", str(run_id), "--json").document["events"]]


@pytest.mark.fault("extraction_queue deleted where we may not declare it, until the Extractor does")
def test_the_extraction_queue_is_missing_until_its_owner_declares_it(
    make_rabbitmq: StackFactory, rabbitmq_server: RabbitMQServer, broker_url: str, evidence: Evidence
) -> None:
    vhost = broker_url.rpartition("/")[2]
    user = f"writer-{vhost}"
    rabbitmq_server.ctl("add_user", user, "secret")
    rabbitmq_server.ctl("set_permissions", "--vhost", vhost, user, "^$", ".*", ".*")
    url = broker_url.replace("guest:guest", f"{user}:secret")
    with amqp_connection(broker_url) as connection:
        connection.channel().queue_declare(QUEUE, durable=True, auto_delete=False)
    scene = QueueScene(make_rabbitmq(DISPATCH__BATCH_SIZE="5", EXTRACTION_URL=url))
    run_id = scene.traffic.fan_out()

    with scene.standstill() as channel:
        channel.queue_delete(QUEUE, if_empty=True)
    evidence.trials += 1
    evidence.note(f"told: “{await_told(scene.stack, run_id, 'queue_missing')}”")
    with amqp_connection(broker_url) as connection:
        connection.channel().queue_declare(QUEUE, durable=True, auto_delete=False)
    with evidence.recovery():
        scene.stack.await_run(run_id, "succeeded", within=RESUMED)

    scene.conclude(evidence)


@pytest.mark.fault("extraction_queue deleted and declared otherwise by the Extractor, in mid-fan-out")
@pytest.mark.parametrize(
    "arguments",
    [{"x_queue_type": "quorum"}, {"x_max_length": 1_000_000, "x_queue_mode": "lazy"}],
    ids=["quorum", "limits"],
)
def test_the_extraction_queue_is_declared_otherwise(
    scene: QueueScene, evidence: Evidence, arguments: dict[str, Any]
) -> None:
    run_id = scene.traffic.fan_out()

    with scene.standstill() as channel:
        scene.replace_queue(channel, **arguments)
        assert pending(scene.stack) > 0
    evidence.trials += 1
    with evidence.recovery():
        scene.stack.await_run(run_id, "succeeded", within=RESUMED)

    with scene.standstill() as channel:
        scene.replace_queue(channel)
    scene.conclude(evidence)


@pytest.mark.fault("extraction_queue full (reject-publish), until it is consumed")
def test_the_extraction_queue_is_full(scene: QueueScene, evidence: Evidence) -> None:
    full = SOURCES // 2
    scene.await_resumed()
    with scene.standstill() as channel:
        scene.replace_queue(channel, x_max_length=full, x_overflow="reject-publish")
    run_id = scene.traffic.ask(BIG)
    evidence.trials += 1

    sentence = await_told(scene.stack, run_id, "message_refused")
    assert "full" in sentence
    evidence.note(f"told: “{sentence}”")
    # RabbitMQ takes in what was on its way when it was full.
    assert full <= queue_depth(scene.broker, QUEUE) < SOURCES

    def consumed() -> bool:
        scene.oracle.read_wire()
        run = scene.stack.run(run_id)
        return run is not None and run["state"] == "succeeded"

    with evidence.recovery():
        eventually(consumed, within=RESUMED, what="the run is over, as its queue is consumed")
    with scene.standstill() as channel:
        scene.replace_queue(channel)
    scene.conclude(evidence)


@pytest.mark.fault("a policy makes extraction_queue full (reject-publish) in mid-fan-out, until it is lifted")
def test_a_policy_makes_the_extraction_queue_full(
    scene: QueueScene, rabbitmq_server: RabbitMQServer, evidence: Evidence
) -> None:
    vhost = scene.broker.rpartition("/")[2]
    definition = '{"max-length": 1, "overflow": "reject-publish"}'
    run_id = scene.traffic.fan_out()

    # Empty, for a policy drops what is above its limit.
    with scene.standstill():
        rabbitmq_server.ctl("set_policy", "--vhost", vhost, "--apply-to", "queues", "full", "^extraction", definition)
    evidence.trials += 1
    evidence.note(f"told: “{await_told(scene.stack, run_id, 'message_refused')}”")
    rabbitmq_server.ctl("clear_policy", "--vhost", vhost, "full")
    with evidence.recovery():
        scene.stack.await_run(run_id, "succeeded", within=RESUMED)

    scene.conclude(evidence)


# --- Our own queues -------------------------------------------------------------------------------------------------


@pytest.mark.fault("orchestrator.crawl and orchestrator.analysis deleted under a running worker")
def test_the_task_queues_are_deleted(scene: QueueScene, evidence: Evidence) -> None:
    for _ in rounds(1, 3):
        run_id = scene.traffic.fan_out()
        promised = command(scene.stack, "run", str(SMALL), "--json").document["run"]["id"]
        with amqp_connection(scene.broker) as connection:
            for queue in TASK_QUEUES:
                connection.channel().queue_delete(queue)
        evidence.trials += 1
        with evidence.recovery():
            scene.await_resumed()
        for each in (run_id, promised):
            scene.stack.await_run(each, "succeeded")

    scene.conclude(evidence)


@pytest.mark.fault("orchestrator.crawl and orchestrator.analysis declared as quorum queues under a running worker")
def test_the_task_queues_are_declared_otherwise(scene: QueueScene, evidence: Evidence) -> None:
    run_id = scene.traffic.fan_out()

    # Frozen, or the worker would be faster.
    with scene.standstill() as channel:
        for queue in TASK_QUEUES:
            channel.queue_delete(queue)
            channel.queue_declare(queue, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
            channel.queue_bind(queue, EXCHANGE, queue)
    evidence.trials += 1
    with evidence.recovery():
        # Plain clients that declare the queue by name alone are refused by RabbitMQ (406); these do not declare it.
        small = scene.traffic.ask(SMALL, by_exchange=True)
        started = command(scene.stack, "run", str(SMALL), "--json").document
        for each in (small, started["run"]["id"]):
            scene.stack.await_run(each, "succeeded")
        eventually(lambda: consumers(scene.stack) == 1, within=RESUMED, what="the worker consumes")
    assert started["enqueued"]
    scene.stack.await_run(run_id, "succeeded")

    # The way back is the one that the warning in the log recommends.
    with amqp_connection(scene.broker) as connection:
        for queue in TASK_QUEUES:
            connection.channel().queue_delete(queue)
    scene.conclude(evidence)


@pytest.mark.fault("exchange orchestrator deleted, to which plain clients publish by routing key")
def test_the_exchange_is_deleted(scene: QueueScene, evidence: Evidence) -> None:
    scene.stack.await_run(scene.traffic.ask(SMALL, by_exchange=True), "succeeded")

    with amqp_connection(scene.broker) as connection:
        connection.channel().exchange_delete(EXCHANGE)
    evidence.trials += 1
    with evidence.recovery():
        run_id = scene.traffic.ask(SMALL, by_exchange=True)
        scene.stack.await_run(run_id, "succeeded", within=RESUMED)

    scene.conclude(evidence)


@pytest.mark.fault("orchestrator.dead deleted, and then a message that no task can take")
def test_the_dead_letter_queue_is_deleted(scene: QueueScene, evidence: Evidence) -> None:
    for number in rounds(2, 3):
        poison = f"poison {number}".encode()
        with amqp_connection(scene.broker) as connection:
            channel = connection.channel()
            channel.queue_delete(DEAD_QUEUE)
            channel.basic_publish(amqp.Message(poison), routing_key=CRAWL_QUEUE)
        evidence.trials += 1
        with evidence.recovery():
            eventually(lambda: depth(scene.broker, DEAD_QUEUE), within=RESUMED, what="it is a dead letter")
        (letter,) = drain(scene.broker, DEAD_QUEUE)
        assert letter.raw == poison

    scene.conclude(evidence)


def depth(broker: str, queue: str) -> int:
    """Return how many messages are ready in a queue; none where there is no such queue."""
    try:
        return queue_depth(broker, queue)
    except amqp.NotFound:
        return 0
