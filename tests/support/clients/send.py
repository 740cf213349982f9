"""What a BFF developer writes: a plain Celery client that imports nothing of the orchestrator.

    python send.py BROKER_URL WAY TASK JSON_ARGUMENTS

Sends one task in one of the four supported ways and prints its id.
"""

import json
import sys
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

broker, way, task, arguments = sys.argv[1:]
queue = "orchestrator.crawl" if task.endswith("execute_crawl_task") else "orchestrator.analysis"
app = Celery("bff", broker=broker)
app.conf.broker_transport_options = {"confirm_publish": True}

options: dict[str, Any]
if way == "queue":
    options = {"queue": queue}
elif way == "object":
    options = {"queue": Queue(queue, Exchange("orchestrator", "topic"), routing_key=queue, no_declare=True)}
elif way == "exchange":
    options = {"exchange": "orchestrator", "routing_key": queue}
elif way == "routes":
    app.conf.task_queues = [Queue(queue, Exchange("orchestrator", "topic"), routing_key=queue, no_declare=True)]
    app.conf.task_routes = {task: {"queue": queue}}
    options = {}
else:
    raise SystemExit(f"unknown way {way!r}")

kwargs = json.loads(arguments)
# Positional and by keyword: both are part of the contract.
by_name: dict[str, Any] = {"kwargs": kwargs} if way in {"queue", "routes"} else {"args": list(kwargs.values())}
print(app.send_task(task, **by_name, **options).id)  # noqa: T201 -- the test reads it
