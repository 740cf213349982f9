"""The wire of a demo that is given a Kafka: a topic of its own there."""

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from orchestrator.demo import extractor_kafka_stub

_TIMEOUT: Final = 10.0  # seconds for each answer of Kafka


class KafkaWire:
    """A topic of the demo's own on a Kafka that it is given.

    Args:
        configuration: librdkafka's properties of the cluster.
        topic: which must exist; deleted in the end.
    """

    extractor = Path(extractor_kafka_stub.__file__)

    def __init__(self, configuration: dict[str, Any], topic: str) -> None:
        self._configuration = configuration | {"log_level": 0}
        self._topic = topic
        group = f"{topic}-extractor"
        self.environment = {
            "KAFKA_CONFIG": json.dumps(configuration),
            "EXTRACTION_QUEUE": topic,
            "EXTRACTION_GROUP": group,
        }
        # Of the Extractor's group only to ask how far that is: it never subscribes.
        self._consumer = Consumer(self._configuration | {"enable.auto.commit": False, "group.id": group})

    def __str__(self) -> str:
        return f"topic {self._topic} on Kafka at {self._configuration['bootstrap.servers']}"

    def arrived(self) -> Counter[UUID]:
        """See :class:`orchestrator.demo.wire.Wire`."""
        return Counter(UUID(json.loads(message.value())["run_id"]) for message in self._messages())

    def drained(self) -> bool:
        """See :class:`orchestrator.demo.wire.Wire`."""
        committed = self._consumer.committed(list(self._ends()), timeout=_TIMEOUT)
        return sum(max(0, each.offset) for each in committed) == sum(self._ends().values())

    def send_again(self, count: int) -> None:
        """See :class:`orchestrator.demo.wire.Wire`."""
        producer = Producer(self._configuration)
        for message in self._messages()[:count]:
            producer.produce(self._topic, message.value(), message.key(), headers=message.headers())
        producer.flush(_TIMEOUT)

    def close(self) -> None:
        """Delete the topic, if it can be deleted now."""
        admin = AdminClient(self._configuration)
        with suppress(KafkaException, TimeoutError):
            admin.delete_topics([self._topic])[self._topic].result(_TIMEOUT)

    def _ends(self) -> dict[TopicPartition, int]:
        found = self._consumer.list_topics(self._topic, timeout=_TIMEOUT).topics[self._topic].partitions
        partitions = [TopicPartition(self._topic, number, OFFSET_BEGINNING) for number in found]
        return {each: self._consumer.get_watermark_offsets(each, timeout=_TIMEOUT)[1] for each in partitions}

    def _messages(self) -> list[Any]:
        """Return all that the topic has, partition by partition; the stubs allow for messages without anything.

        Raises:
            TimeoutError: it does not come.
        """
        messages: list[Any] = []
        for partition, end in self._ends().items():
            self._consumer.assign([partition])
            read = 0
            while read < end:
                taken = self._consumer.consume(1_000, _TIMEOUT)
                if not taken:
                    raise TimeoutError(f"topic {self._topic} could not be read to its end")
                messages += [message for message in taken if message.error() is None]
                read = int(messages[-1].offset()) + 1 if messages else 0
        self._consumer.unassign()
        return messages
