"""What becomes of wake-ups for which the API has no room."""

from typing import cast
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from orchestrator.api import waker
from orchestrator.celery_app import Sender
from orchestrator.domain import CrawlArguments, WakeUp
from orchestrator.ledger import Ledger
from orchestrator.ledger.schedules import Unsent


def wake_ups(count: int) -> list[WakeUp]:
    return [WakeUp(uuid4(), CrawlArguments(1), "x", 1) for _ in range(count)]


def test_of_the_wake_ups_of_a_request_without_room_one_line_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waker, "_MOST", 3)
    full = waker.Waker(cast("Ledger", None), cast("Sender", None))

    with capture_logs() as logs:
        full.wake(wake_ups(2))
        full.wake(wake_ups(1_000))
        full.wake_together(Unsent(1, wake_ups(7)))
        full.wake([])

    assert [(line["event"], line["code"], line["count"]) for line in logs] == [
        ("wake_up.failed", "waker_full", 999),
        ("wake_up.failed", "waker_full", 7),
    ]
