"""The seed's ``trigger_site_analysis``, word for word but for where it posts to, in a bare Celery app.

    celery -A seed worker --concurrency 2
    celery -A seed beat

The broker and the address come from the environment: BROKER_URL, DISCOVERY_SERVICE_URL.
"""

import os
from typing import Any

import httpx  # type: ignore[import-not-found] # in an environment of its own
from celery import Celery

app = Celery("seed", broker=os.environ.get("BROKER_URL"))
app.conf.worker_hijack_root_logger = True
app.conf.beat_schedule = {"crawl-1": {"task": "seed.execute_crawl_task", "args": [1], "schedule": 86_400.0}}

DISCOVERY_SERVICE_URL = os.environ.get("DISCOVERY_SERVICE_URL", "http://discovery-svc/discover")


@app.task(bind=True, max_retries=3, default_retry_delay=60)
def trigger_site_analysis(self: Any, data_source_id: int, theme_name: str) -> None:  # noqa: ANN401 -- a Celery task
    """Post to the Discovery Service."""
    try:
        with httpx.Client() as client:
            response = client.post(
                DISCOVERY_SERVICE_URL,
                json={"data_source_id": data_source_id, "theme_name": theme_name},
                timeout=10.0,
            )
            response.raise_for_status()
    except httpx.RequestError as exc:
        raise self.retry(exc=exc) from None


@app.task(bind=True)
def execute_crawl_task(self: Any, task_id: int) -> None:  # noqa: ANN401 -- a Celery task
    """Do nothing; beat sends it."""
