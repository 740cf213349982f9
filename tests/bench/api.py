"""The HTTP API over much history: how long its answers take, and how many runs it takes a second.

    python -m tests.bench.api [--size 1000000] [--seconds 20]

One API process, PostgreSQL, RabbitMQ and eight callers, each with one connection, all on this machine: what the
callers cost is in the figures. The history is that of tests.bench.reads.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from time import monotonic, perf_counter
from typing import Final
from urllib.parse import urlsplit

from orchestrator.domain import Role
from tests.bench.reads import SERVER, SIZE, Reader
from tests.bench.schedules import host
from tests.support.api import Api
from tests.support.ledgers import Workbench
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack

CALLERS: Final = 8
SECONDS: Final = 20.0
TARGET: Final = 50.0  # milliseconds
RATE: Final = 250.0  # triggers a second

Ask = tuple[str, str, bytes | None]
"""Method, path and body."""


def load(api: Api, ask: Callable[[], Ask], seconds: float) -> tuple[list[float], list[int]]:
    """Have all callers ask one after the other for a while; return milliseconds and statuses of every answer."""
    took: list[float] = []
    statuses: list[int] = []
    ends_at = monotonic() + seconds
    headers = {"Authorization": f"Bearer {api.keys[Role.ADMIN]}", "Content-Type": "application/json"}

    def caller() -> None:
        parts = urlsplit(api.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        while monotonic() < ends_at:
            method, path, body = ask()
            began_at = perf_counter()
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            answer.read()
            took.append((perf_counter() - began_at) * 1_000)
            statuses.append(answer.status)
        connection.close()

    callers = [threading.Thread(target=caller) for _ in range(CALLERS)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    return took, statuses


def report(what: str, took: list[float], statuses: list[int], seconds: float, *, wanted: float = 0.0) -> None:
    """Print one row."""
    p95 = statistics.quantiles(took, n=20)[-1]
    wrong = sorted({status for status in statuses if status >= 300})
    rate = len(took) / seconds
    remarks = "" if p95 <= TARGET and rate >= wanted else "   over the target"
    remarks += f"   statuses {wrong}" if wrong else ""
    say(f"{what:52}{rate:10.0f}{statistics.median(took):10.1f}{p95:10.1f}{remarks}")


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def history(size: int) -> Iterator[Api]:
    """Serve a ledger with much history."""
    with PostgresServer(SERVER) as postgres, RabbitMQServer() as rabbitmq, tempfile.TemporaryDirectory() as directory:
        stack = Stack.on_rabbitmq(postgres.create_database("api"), rabbitmq.url, Path(directory))
        stack.prepare()
        stack.application.add_task(1, [1])
        Reader(Workbench(stack.database), size, 1).make()
        api = Api.start(stack)
        yield api
        api.close()
        stack.close()


def measure(size: int, seconds: float) -> None:
    """Measure and print."""
    numbers = count(1)
    say(host())
    with history(size) as api:
        (run,) = api.stack.query(
            "SELECT id FROM orchestrator.runs WHERE kind = 'crawl' ORDER BY created_at DESC LIMIT 1"
        )
        reads = {
            "newest runs": "/v1/runs",
            "failed runs": "/v1/runs?state=failed",
            "runs of a crawl task": "/v1/runs?task_id=7",
            "runs by a rare error": "/v1/runs?error_code=rare&since=2000-01-01T00:00:00Z",
            "runs by a data source in one of 20": "/v1/runs?data_source_id=1&since=2000-01-01T00:00:00Z",
            "runs by a rare data source": "/v1/runs?data_source_id=2&since=2000-01-01T00:00:00Z",
            "a run's page": f"/v1/runs/{run['id']}",
            "a run's data sources": f"/v1/runs/{run['id']}/dispatches",
            "what became of slots": "/v1/firings?task_id=7",
        }
        say(f"\n{'question, ' + str(CALLERS) + ' callers':52}{'a second':>10}{'median ms':>10}{'p95 ms':>10}")
        for what, path in reads.items():
            report(what, *load(api, lambda path=path: ("GET", path, None), seconds / 2), seconds / 2)  # type: ignore[misc] # mypy knows no defaults of lambdas
        crawl = json.dumps({"task_id": 1}).encode()
        report("POST /v1/runs", *load(api, lambda: ("POST", "/v1/runs", crawl), seconds), seconds, wanted=RATE)

        def analysis() -> Ask:
            wish = {"data_source_ids": [next(numbers)], "theme_name": "bench"}
            return "POST", "/v1/analyses", json.dumps(wish).encode()

        report("POST /v1/analyses", *load(api, analysis, seconds), seconds, wanted=RATE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE, help="runs of the history")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each measurement of triggers")
    given = parser.parse_args()
    measure(given.size, given.seconds)
