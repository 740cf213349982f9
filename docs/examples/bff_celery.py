"""A BFF's way to the orchestrator by Celery messages. To copy: needs celery and nothing of task-orchestrator.

BROKER=amqp://user:password@mq.example:5672/vhost python bff_celery.py 7
"""
# ruff: noqa: INP001, T201 -- a script to be copied, part of no package

import os
import sys
import uuid

from celery import Celery

CRAWL = "orchestrator.tasks.execute_crawl_task"
ANALYSE = "orchestrator.tasks.trigger_site_analysis"

app = Celery("bff", broker=os.environ["BROKER"])
# Without confirms a broker that is full or in alarm swallows messages; without time-outs it makes send_task hang.
app.conf.broker_transport_options = {"confirm_publish": True, "read_timeout": 10, "write_timeout": 10}


def run_now(task_id: int, run_id: uuid.UUID) -> None:
    """Ask for a run under an id of our own: commit it with our data first, then send as often as we like."""
    app.send_task(CRAWL, args=[task_id], task_id=str(run_id), queue="orchestrator.crawl")


def analyse(data_source_id: int, theme_name: str) -> str:
    """Have a site analysed; the id of the message is the id of the run."""
    options = {"data_source_id": data_source_id, "theme_name": theme_name}
    return app.send_task(ANALYSE, kwargs=options, queue="orchestrator.analysis").id


if __name__ == "__main__":
    click = uuid.uuid4()
    run_now(int(sys.argv[1]), click)
    run_now(int(sys.argv[1]), click)  # a double click is one run
    print(f"asked for run {click}, and for analysis {analyse(12, 'news')}")
