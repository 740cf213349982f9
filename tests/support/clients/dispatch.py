"""Sends one message for each data source of a crawl task, as users of other tools would: nothing here is ours.

    python dispatch.py celery|celery-confirmed|taskiq|procrastinate TASK_ID DATABASE_URL BROKER_URL

All read the latest active config of every source in one statement, which none of them does by itself, and send the
facts that our messages have. Prints one line of JSON: how many were sent, and the seconds from the question to the last
answer; connecting counts, importing does not.
"""

import asyncio
import json
import sys
from time import perf_counter
from typing import Any
from uuid import uuid4

import psycopg
from celery import Celery
from procrastinate import App, SyncPsycopgConnector  # type: ignore[import-not-found] # in an environment of its own
from taskiq_aio_pika import AioPikaBroker, Queue, QueueType  # type: ignore[import-not-found] # the same

TASK = "extract"
TOGETHER = 1_000
QUEUES = {"celery": "peer.celery", "celery-confirmed": "peer.celery", "taskiq": "peer.taskiq"}
LATEST = """
SELECT DISTINCT ON (data_source_id) id, data_source_id FROM crawl_configs
WHERE status = 'active' AND data_source_id = ANY ((SELECT data_source_ids FROM crawl_tasks WHERE id = %s)::bigint[])
ORDER BY data_source_id, created_at DESC, id DESC
"""

Facts = dict[str, Any]


def read(database: str, task_id: int) -> list[Facts]:
    """Return the facts of each message."""
    run_id = str(uuid4())
    with psycopg.connect(database) as connection:
        rows = connection.execute(LATEST, [task_id]).fetchall()
    return [
        {"crawl_config_id": config, "data_source_id": source, "task_id": task_id, "run_id": run_id}
        for config, source in rows
    ]


def by_celery(facts: list[Facts], broker: str, queue: str, *, confirmed: bool) -> None:
    """Do Celery's ``send_task``, one after the other, as its producers do it."""
    app = Celery("peer", broker=broker)
    if confirmed:
        app.conf.broker_transport_options = {"confirm_publish": True}
    for each in facts:
        app.send_task(TASK, kwargs=each, queue=queue)
    app.close()


async def by_taskiq(facts: list[Facts], broker: str, queue: str) -> None:
    """Await taskiq's ``kiq``, so many at once; aio-pika's channels await publisher confirms."""
    # The kind of queue that the others have; its own default is a quorum queue.
    tasks = AioPikaBroker(broker, task_queues=[Queue(name=queue, type=QueueType.CLASSIC)])

    @tasks.task(task_name=TASK)  # type: ignore[untyped-decorator] # see above
    async def extract(**_: object) -> None:
        """Do nothing: no worker runs."""

    await tasks.startup()
    for start in range(0, len(facts), TOGETHER):
        await asyncio.gather(*(extract.kiq(**each) for each in facts[start : start + TOGETHER]))
    await tasks.shutdown()


def by_procrastinate(facts: list[Facts], app: App) -> None:
    """Do procrastinate's ``batch_defer``: a statement, and a transaction, for so many jobs."""
    for start in range(0, len(facts), TOGETHER):
        app.configure_task(TASK, queue=TASK).batch_defer(*facts[start : start + TOGETHER])


def tables_of_procrastinate(database: str) -> App:
    """Return an app whose tables are there."""
    # Not in the schema that is called as the role: that is the orchestrator's.
    connector = SyncPsycopgConnector(conninfo=database, kwargs={"options": "-c search_path=public"})
    app = App(connector=connector)
    app.open()
    (there,) = connector.execute_query_all("SELECT to_regclass('procrastinate_jobs') IS NOT NULL AS made")
    if not there["made"]:
        app.schema_manager.apply_schema()
    connector.execute_query("TRUNCATE procrastinate_jobs CASCADE")
    return app


def main() -> None:
    """Send all of them once."""
    peer, task_id, database, broker = sys.argv[1:]
    app = tables_of_procrastinate(database) if peer == "procrastinate" else None
    began_at = perf_counter()
    facts = read(database, int(task_id))
    if app is not None:
        by_procrastinate(facts, app)
    elif peer == "taskiq":
        asyncio.run(by_taskiq(facts, broker, QUEUES[peer]))
    else:
        by_celery(facts, broker, QUEUES[peer], confirmed=peer == "celery-confirmed")
    seconds = perf_counter() - began_at
    if app is not None:
        app.close()
    sys.stdout.write(json.dumps({"sent": len(facts), "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
