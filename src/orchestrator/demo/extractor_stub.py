"""An Extractor over PGMQ, complete and made to be copied. It imports nothing of the Task Orchestrator.

    DATABASE_URL=postgresql://… python extractor_stub.py

What it relies on is the message on ``extraction_queue``:

    message   {"crawl_config_id": int, "data_source_id": int, "task_id": int, "run_id": "uuid"}
    headers   {"message_id": "uuid", "type": "extraction.requested", "traceparent": "…", …}

A message may come more than once, always with the same message id. So the id goes into an inbox, in the same
transaction as the work, and what is in the inbox already is not worked on again. The queue forgets the message
in that transaction too: whatever kills this process, either all three happened or none.

The same over RabbitMQ: docs/examples/extractor_rabbitmq.py.
"""

import logging
import os
import time
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import DictRow, dict_row

QUEUE = os.environ.get("EXTRACTION_QUEUE", "extraction_queue")
BATCH = 100
# While a transaction holds a message nobody else sees it; this only matters should somebody read without one.
INVISIBLE_SECONDS = 60
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
    """Take messages for ever."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True, row_factory=dict_row) as connection:
        connection.execute(INBOX)
        connection.execute("SELECT pgmq.create(%s)", [QUEUE])  # the Extractor may start before the orchestrator
        log.info("waiting for messages on %s", QUEUE)
        while True:
            if not take_batch(connection):
                time.sleep(PAUSE_SECONDS)


def take_batch(connection: psycopg.Connection[DictRow]) -> int:
    """Take up to a batch of messages in one transaction; return how many there were."""
    with connection.transaction():
        messages = connection.execute(
            "SELECT msg_id, message, headers FROM pgmq.read(%s, %s, %s)", [QUEUE, INVISIBLE_SECONDS, BATCH]
        ).fetchall()
        for message in messages:
            take(connection, message["headers"], message["message"])
        # The acknowledgement. The archive keeps a record of what came; pgmq.delete keeps none.
        numbers = [message["msg_id"] for message in messages]
        connection.execute("SELECT pgmq.archive(%s, %s::bigint[])", [QUEUE, numbers])
    return len(messages)


def take(connection: psycopg.Connection[DictRow], headers: Any, body: Any) -> None:  # noqa: ANN401 -- JSON is anything
    """Work on one message unless it came before."""
    try:
        message_id, run_id = UUID(headers["message_id"]), UUID(body["run_id"])
        task, source, config = (int(body[name]) for name in ("task_id", "data_source_id", "crawl_config_id"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # It will never be readable: do not let it stop the others. It stays in the archive.
        log.error("unreadable message %r %r: %r", headers, body, error)  # noqa: TRY400 -- its text says it all
        return
    if connection.execute(REMEMBER, [message_id, run_id, task, source, config]).rowcount:
        extract(connection, source, config)
    else:
        log.info("duplicate of message %s recognised", message_id)


def extract(connection: psycopg.Connection[DictRow], data_source_id: int, crawl_config_id: int) -> None:
    """Your work, in the transaction of the inbox. What takes long happens later: the inbox row is the order for it."""
    del connection
    log.info("data source %d is to be extracted by crawl config %d", data_source_id, crawl_config_id)


if __name__ == "__main__":
    main()
