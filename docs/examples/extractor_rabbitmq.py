"""An Extractor over RabbitMQ, complete and made to be copied. It imports nothing of the Task Orchestrator.

    BROKER_URL=amqp://… DATABASE_URL=postgresql://… python extractor_rabbitmq.py     (pip install kombu psycopg)

What it relies on is the message on ``extraction_queue``:

    body         {"crawl_config_id": int, "data_source_id": int, "task_id": int, "run_id": "uuid"}
    properties   message_id "uuid", type "extraction.requested", content_type "application/json",
                 headers {"traceparent": "…"}

A message may come more than once, always with the same message id: after a lost confirm the orchestrator sends it
again, after a lost acknowledgement the broker does. So the id goes into an inbox, in the same transaction as the
work; what is in the inbox already is not worked on again; and the message is acknowledged after the commit. Should
this process be killed in between, the message comes again and is recognised.

The same over PostgreSQL (PGMQ): src/orchestrator/demo/extractor_stub.py.
"""
# ruff: noqa: INP001 -- a script to be copied, part of no package

import logging
import os
from typing import Any
from uuid import UUID

import psycopg
from kombu import Connection, Message, Queue
from kombu.mixins import ConsumerMixin

QUEUE = os.environ.get("EXTRACTION_QUEUE", "extraction_queue")
PREFETCH = 100

INBOX = """
CREATE TABLE IF NOT EXISTS extractor_inbox (
    message_id uuid PRIMARY KEY,
    run_id uuid NOT NULL,
    task_id bigint NOT NULL,
    data_source_id bigint NOT NULL,
    crawl_config_id bigint NOT NULL,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
REMEMBER = """
INSERT INTO extractor_inbox (message_id, run_id, task_id, data_source_id, crawl_config_id)
VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (message_id) DO NOTHING
"""

log = logging.getLogger("extractor")


def main() -> None:
    """Take messages for ever. A database that is away ends the process; its messages come again after a restart."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with (
        psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as database,
        Connection(os.environ["BROKER_URL"], heartbeat=30) as broker,
    ):
        database.execute(INBOX)
        Extractor(broker, database).run()


class Extractor(ConsumerMixin):
    """Kombu's consumer loop, which connects again by itself after the broker was away."""

    def __init__(self, broker: Connection, database: psycopg.Connection) -> None:
        self.connection = broker
        self.database = database

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:  # noqa: ANN401, ARG002, N803 -- kombu's signature
        """Consume the queue. Declared durable and without arguments, exactly as the orchestrator declares it."""
        queue = Queue(QUEUE, durable=True)
        return [Consumer(queues=[queue], on_message=self.take, prefetch_count=PREFETCH)]

    def on_consume_ready(self, *_: object, **__: object) -> None:
        """Say that messages are taken from now on."""
        log.info("waiting for messages on %s", QUEUE)

    def take(self, message: Message) -> None:
        """Work on one message unless it came before; acknowledge it after the commit."""
        try:
            body = message.payload
            message_id, run_id = UUID(message.properties["message_id"]), UUID(body["run_id"])
            task, source, config = (int(body[name]) for name in ("task_id", "data_source_id", "crawl_config_id"))
        except Exception as error:  # noqa: BLE001 -- decoding fails in many ways, and in none of them a retry helps
            # Do not let it stop the others. A dead-letter policy on the queue keeps it.
            log.error("unreadable message %r: %r", message.properties, error)  # noqa: TRY400 -- its text says it all
            message.reject()
            return
        with self.database.transaction():
            if self.database.execute(REMEMBER, [message_id, run_id, task, source, config]).rowcount:
                self.extract(source, config)
            else:
                log.info("duplicate of message %s recognised", message_id)
        message.ack()

    def extract(self, data_source_id: int, crawl_config_id: int) -> None:
        """Your work, in the transaction of the inbox. What takes long happens later: the inbox row is the order."""
        log.info("data source %d is to be extracted by crawl config %d", data_source_id, crawl_config_id)


if __name__ == "__main__":
    main()
