"""What stands in a topic, read by kafka-python: a client that shares no code with the product, nor with librdkafka."""

from typing import NamedTuple

from kafka import KafkaConsumer, TopicPartition


class Record(NamedTuple):
    """A message as a stranger reads it."""

    partition: int
    key: str
    value: bytes
    headers: dict[str, str]


def records(servers: str, topic: str, positions: dict[int, int] | None = None) -> list[Record]:
    """Return what a topic has, partition by partition in order; nothing where there is no topic.

    Args:
        servers: ``host:port,host:port``.
        topic: its name.
        positions: by partition, where to begin; afterwards, where what was read ends. None: read all.
    """
    positions = {} if positions is None else positions
    consumer = KafkaConsumer(
        bootstrap_servers=servers.split(","), enable_auto_commit=False, auto_offset_reset="earliest"
    )
    try:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        found = []
        for partition in partitions:
            consumer.assign([partition])
            consumer.seek(partition, positions.get(partition.partition, 0))
            while consumer.position(partition) < ends[partition]:
                for batch in consumer.poll(timeout_ms=1_000).values():
                    found += [
                        Record(
                            each.partition,
                            each.key.decode(),
                            each.value,
                            {name: value.decode() for name, value in each.headers},
                        )
                        for each in batch
                    ]
            positions[partition.partition] = consumer.position(partition)
        return found
    finally:
        consumer.close()
