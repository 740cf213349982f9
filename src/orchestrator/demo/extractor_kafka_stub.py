"""An Extractor over Kafka, complete and made to be copied. It imports nothing of the Task Orchestrator.

    KAFKA_CONFIG='{"bootstrap.servers": "…"}' DATABASE_URL=postgresql://… python extractor_kafka_stub.py
    (pip install confluent-kafka psycopg)

What it relies on is the message on topic ``extraction_queue``:

    value     {"crawl_config_id": int, "data_source_id": int, "task_id": int, "run_id": "uuid"}
    key       the data source id as decimal text
    headers   message_id "uuid", type "extraction.requested", content_type "application/json", traceparent "…"

A message may come more than once, always with the same message id: after a lost confirm the orchestrator sends it
again, and whoever dies before it has committed its offsets reads again. So the id goes into an inbox, in the same
transaction as the work; what is in the inbox already is not worked on again; and offsets are committed after that.

The same over RabbitMQ: docs/examples/extractor_rabbitmq.py. Over PostgreSQL (PGMQ): extractor_stub.py beside this.
"""

import json
import logging
import os
from uuid import UUID

import psycopg
from confluent_kafka import Consumer, Message

TOPIC = os.environ.get("EXTRACTION_QUEUE", "extraction_queue")
GROUP = os.environ.get("EXTRACTION_GROUP", "extractor")
BATCH = 100
PAUSE_SECONDS = 0.2

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
    consumer = Consumer(
        json.loads(os.environ["KAFKA_CONFIG"])
        | {
            "group.id": GROUP,
            "auto.offset.reset": "earliest",  # what was sent before our first start counts
            "enable.auto.commit": False,
            "session.timeout.ms": 10_000,  # after which another takes over from one that was killed
            "topic.metadata.refresh.interval.ms": 10_000,  # the Extractor may start before there is a topic
        }
    )
    consumer.subscribe([TOPIC])
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as database:
        database.execute(INBOX)
        log.info("waiting for messages on %s", TOPIC)
        while True:
            take_batch(consumer, database)


def take_batch(consumer: Consumer, database: psycopg.Connection) -> None:
    """Take up to a batch of messages in one transaction, and tell Kafka so after its commit."""
    messages = [message for message in consumer.consume(BATCH, PAUSE_SECONDS) if message.error() is None]
    if not messages:
        return
    with database.transaction():
        for message in messages:
            take(database, message)
    consumer.commit(asynchronous=False)


def take(database: psycopg.Connection, message: Message) -> None:
    """Work on one message unless it came before."""
    try:
        headers, body = dict(message.headers() or []), json.loads(message.value() or b"")
        message_id, run_id = UUID(bytes(headers["message_id"]).decode()), UUID(body["run_id"])  # type: ignore[arg-type]
        task, source, config = (int(body[name]) for name in ("task_id", "data_source_id", "crawl_config_id"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # It will never be readable: do not let it stop the others. The topic keeps it.
        log.error("unreadable message at offset %s: %r", message.offset(), error)  # noqa: TRY400 -- its text says it all
        return
    if database.execute(REMEMBER, [message_id, run_id, task, source, config]).rowcount:
        extract(source, config)
    else:
        log.info("duplicate of message %s recognised", message_id)


def extract(data_source_id: int, crawl_config_id: int) -> None:
    """Your work, in the transaction of the inbox. What takes long happens later: the inbox row is the order for it."""
    log.info("data source %d is to be extracted by crawl config %d", data_source_id, crawl_config_id)


if __name__ == "__main__":
    main()
