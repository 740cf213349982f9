"""How fast messages get onto a topic of Kafka: our publisher and a whole run beside a bare producer.

    python -m tests.bench.kafka [--size 100000] [--rounds 5]

All send to a topic of three partitions of their own on one private broker. The bare producer is confluent-kafka's,
idempotent, with ``acks=all``, our linger and partitioner, and librdkafka's other defaults: it makes the very same
messages and counts delivery callbacks. It and our publisher are connected beforehand, and send five times as many
messages as the run, which a stock worker does, with a child for each of two cores, which is Celery's default, and with
one child, measured from the run's acceptance to its end by the ledger's own moments. All interleaved, after a round
that does not count, in which the broker's code is compiled. Compare the ratios.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final
from uuid import uuid4

from confluent_kafka import KafkaError, Message, Producer, libversion, version
from pydantic import SecretStr

from orchestrator.domain import APP_ID, EXTRACTION_TYPE
from orchestrator.queues.kafka import KafkaPublisher, survey
from orchestrator.settings import KafkaSettings
from tests.bench.dispatch import ALONE, SOURCES, WHOLE, ours, show_targets, spread
from tests.bench.publish import ROUNDS, batch
from tests.bench.schedules import SERVER, machine, say, table
from tests.support.kafka import KafkaServer
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack

PARTITIONS: Final = 3
MORE: Final = 5  # messages of a publisher for each one of a run, which takes that much longer
WAITING: Final = 90_000  # messages and callbacks; librdkafka's queue takes 100,000
LARGE: Final = "ours, batches of 10,000"
SMALL: Final = "ours, batches of 2,000"
BARE: Final = "a bare producer"
TARGETS: Final = {LARGE: "0.75", SMALL: "0.75", WHOLE: "0.3", ALONE: "0.3"}
_PATIENCE: Final = 900.0  # seconds for one way, once


# --- The ways, each of which returns messages a second -------------------------------------------------------


def publish(kafka: KafkaServer, topic: str, many: int, batch_size: int) -> float:
    """Our publisher through the port, in batches of one size."""
    publisher = KafkaPublisher(SecretStr(kafka.url), topic, KafkaSettings())
    publisher.prepare()
    run_id = uuid4()
    started = perf_counter()
    for start in range(1, many + 1, batch_size):
        size = min(batch_size, many + 1 - start)
        receipt = publisher.publish(batch(run_id, start, size), None)  # type: ignore[arg-type] # no ledger here
        if receipt.error is not None:
            raise receipt.error
    seconds = perf_counter() - started
    publisher.close()
    return many / seconds


def bare(kafka: KafkaServer, topic: str, many: int) -> float:
    """A producer as confluent-kafka's documentation uses one; nothing is kept but a count of confirms."""
    producer = Producer(
        {
            "bootstrap.servers": kafka.servers,
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": 1,
            "partitioner": "murmur2_random",
            "log_level": 0,
        }
    )
    producer.list_topics(topic, timeout=_PATIENCE)
    confirmed = 0

    def on_delivery(error: KafkaError | None, message: Message) -> None:  # noqa: ARG001 -- confluent-kafka's callback
        nonlocal confirmed
        confirmed += error is None

    started = perf_counter()
    whole = batch(uuid4(), 1, many)
    common = [
        ("traceparent", whole.traceparent.encode()),
        ("type", EXTRACTION_TYPE.encode()),
        ("app_id", APP_ID.encode()),
        ("content_type", b"application/json"),
    ]
    for source, message_id, body in whole.messages():
        headers: Any = [("message_id", message_id.encode()), *common]
        while len(producer) >= WAITING:
            producer.poll(0.1)
        producer.produce(topic, body, b"%d" % source, headers=headers, on_delivery=on_delivery)
        producer.poll(0)
    producer.flush(_PATIENCE)
    seconds = perf_counter() - started
    producer.close()
    assert confirmed == many
    return many / seconds


def whole_run(stack: Stack, size: int, processes: int) -> float:
    """One whole run by a stock worker with so many children, after one that does not count."""
    assert stack.kafka is not None
    before = arrived(stack.kafka, stack.topic)
    rate = ours(stack, size, processes, clear=lambda _: None)
    assert arrived(stack.kafka, stack.topic) == before + 2 * size
    return rate


def on_a_new_topic(kafka: KafkaServer, many: int, way: Callable[[KafkaServer, str, int], float]) -> float:
    """Have so many messages sent to a topic that is not there before and after."""
    topic = f"bench-{uuid4()}"
    kafka.create_topic(topic, PARTITIONS)
    rate = way(kafka, topic, many)
    assert arrived(kafka, topic) == many
    kafka.delete_topic(topic)
    return rate


def arrived(kafka: KafkaServer, topic: str) -> int:
    """Return how many messages a topic has."""
    standing = survey(SecretStr(kafka.url), KafkaSettings(), topic)
    assert standing.messages is not None, standing.problem
    return standing.messages


# --- All of it -----------------------------------------------------------------------------------------------


def compare(stack: Stack, kafka: KafkaServer, size: int, rounds: int) -> None:
    """Interleave all ways, and print their medians and ratios."""
    many = size * MORE
    ways: dict[str, Callable[[], float]] = {
        LARGE: lambda: on_a_new_topic(kafka, many, partial(publish, batch_size=10_000)),
        SMALL: lambda: on_a_new_topic(kafka, many, partial(publish, batch_size=2_000)),
        WHOLE: lambda: whole_run(stack, size, 2),
        ALONE: lambda: whole_run(stack, size, 1),
        BARE: lambda: on_a_new_topic(kafka, many, bare),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            rate = way()
            if number > 0:
                rates[name].append(rate)
            say(f"  round {number}: {name}: {rate:,.0f}/s")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        [name, f"{medians[name]:,.0f}", spread(values), f"{medians[name] / medians[BARE]:.2f}"]
        for name, values in rates.items()
    ]
    say(f"\na run of {size:,} data sources, else {many:,} messages; medians of {rounds}, interleaved\n")
    say(table(("what", "messages/s", "range", "to the bare producer"), rows))
    show_targets(*((f"{name} / bare producer", medians[name] / medians[BARE], bar) for name, bar in TARGETS.items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kafka", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=SOURCES, help=f"data sources of one run; default {SOURCES:,}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of which figures are medians; default {ROUNDS}")
    given = parser.parse_args()
    with (
        PostgresServer(SERVER) as postgres,
        RabbitMQServer() as rabbitmq,
        KafkaServer(measured=True) as kafka,
        tempfile.TemporaryDirectory() as directory,
    ):
        stack = Stack.on_kafka(postgres.create_database("bench"), rabbitmq.url, kafka, "bench", Path(directory))
        stack.prepare()
        stack.declare_extraction_queue()
        stack.application.add_sources(given.size)
        stack.application.add_task(given.size, range(1, given.size + 1))
        stack.execute("ANALYZE crawl_tasks, crawl_configs")
        clients = f"confluent-kafka {version()} on librdkafka {libversion()[0]}"
        say(f"{machine(stack, rabbitmq)}; Kafka {kafka.version}, {clients}")
        try:
            compare(stack, kafka, given.size, given.rounds)
        finally:
            stack.close()


if __name__ == "__main__":
    main()
