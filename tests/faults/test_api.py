"""The HTTP API while it, its database or its broker is hurt: what it accepted is done, once; what not left no trace."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import httpx2
import pytest

from orchestrator.domain import Role
from tests.faults.conftest import StackFactory
from tests.support.api import Api, address_of, make_keys
from tests.support.crashes import CrashPoints
from tests.support.evidence import Evidence
from tests.support.oracle import RESUMED, Oracle
from tests.support.postgres import PostgresServer, StopMode
from tests.support.processes import Process, eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import rounds
from tests.support.stack import Stack

SOURCES: Final = range(1, 21)
BETWEEN: Final = "Sender.wake: before"


def start(api: Api, key: str) -> httpx2.Response | None:
    """Ask for a run once; return the answer, if there was one."""
    try:
        return api.post("/v1/runs", {"task_id": 1}, headers={"Idempotency-Key": key})
    except httpx2.TransportError:
        return None


def accepted(answer: httpx2.Response) -> UUID:
    """Check that a run was accepted, and return its id."""
    assert answer.status_code == 202, answer.text
    return UUID(answer.json()["run"]["id"])


def crashing_api(stack: Stack) -> Process:
    """Serve, with crash points."""
    return stack.start("tests.support.crashes", "api", "--port", "0")


@pytest.mark.fault("kill -9 of the API between the commit of a run and its wake-up")
def test_kill_9_between_the_row_and_the_wake_up(
    make_rabbitmq: StackFactory, tmp_path: Path, evidence: Evidence
) -> None:
    stack = make_rabbitmq()
    stack.application.add_sources(len(SOURCES))
    stack.application.add_task(1, SOURCES)
    stack.worker()
    points = CrashPoints(tmp_path / "points")
    stack.env |= points.env
    api = Api(stack, crashing_api(stack), make_keys(stack.database))
    api.url = address_of(api.process)
    runs: set[UUID] = set()
    unanswered = 0

    for _ in rounds(4, 50):
        evidence.trials += 1
        points.arm(BETWEEN)
        key = str(uuid4())
        answer = start(api, key)
        assert api.process.wait(within=20) == -9, "it was to be killed"
        api.process.close()
        api.process = crashing_api(stack)
        api.url = address_of(api.process)
        if answer is None:
            # Its caller cannot know, and asks again.
            unanswered += 1
            answer = start(api, key)
            assert answer is not None
        run_id = accepted(answer)
        with evidence.recovery():
            stack.await_run(run_id, "succeeded", within=RESUMED)
        runs.add(run_id)

    evidence.saw(Oracle(stack).assert_holds(dict.fromkeys(runs, SOURCES)))
    (row,) = stack.query("SELECT count(*) FROM orchestrator.runs")
    assert row["count"] == len(runs) == evidence.trials
    evidence.note(f"{unanswered} callers had no answer and asked again")
    api.close()


@pytest.fixture
def hurt(postgres: PostgresServer, rabbitmq: RabbitMQServer, tmp_path: Path) -> Iterator[Api]:
    """An API with a worker on servers that may be hurt."""
    broker = rabbitmq.vhost_url(rabbitmq.fresh_vhost())
    stack = Stack.on_rabbitmq(postgres.create_database(f"api_{uuid4().hex[:8]}"), broker, tmp_path)
    stack.prepare()
    stack.application.add_sources(len(SOURCES))
    stack.application.add_task(1, SOURCES)
    stack.declare_extraction_queue()
    stack.worker()
    rabbitmq.settle()
    api = Api.start(stack)
    yield api
    postgres.start()
    rabbitmq.start()
    api.close()
    stack.close()


@pytest.mark.fault("RabbitMQ away while the API is asked for runs")
def test_a_broker_that_is_away_refuses_nobody(hurt: Api, rabbitmq: RabbitMQServer, evidence: Evidence) -> None:
    rabbitmq.kill()
    runs = [accepted(hurt.post("/v1/runs", {"task_id": 1})) for _ in rounds(5, 50)]
    assert hurt.get("/readyz", None).status_code == 200
    assert all(queue["problem"] for queue in hurt.get("/v1/queues").json()["items"])
    evidence.trials = len(runs)

    rabbitmq.start()
    with evidence.recovery():
        for run_id in runs:
            hurt.stack.await_run(run_id, "succeeded", within=RESUMED)
    evidence.saw(Oracle(hurt.stack).assert_holds(dict.fromkeys(runs, SOURCES)))


@pytest.mark.fault("RabbitMQ frozen (SIGSTOP) while the API is asked for runs and queues")
def test_a_broker_that_is_silent_holds_up_nobody(hurt: Api, rabbitmq: RabbitMQServer, evidence: Evidence) -> None:
    rabbitmq.pause()
    try:
        with ThreadPoolExecutor(60) as pool:
            looks = [pool.submit(hurt.get, "/v1/queues") for _ in range(60)]
            began_at = time.monotonic()
            runs = [accepted(hurt.post("/v1/runs", {"task_id": 1})) for _ in rounds(5, 50)]
            took = (time.monotonic() - began_at) / len(runs)
            assert {look.result().status_code for look in looks} == {200}
        assert took < 5, "a silent broker takes 12 s to be given up on"
    finally:
        rabbitmq.resume()
    evidence.trials = len(runs)
    evidence.note(f"{took * 1_000:.0f} ms a request, beside 60 that ask how queues stand")
    with evidence.recovery():
        for run_id in runs:
            hurt.stack.await_run(run_id, "succeeded", within=RESUMED)
    evidence.saw(Oracle(hurt.stack).assert_holds(dict.fromkeys(runs, SOURCES)))


@pytest.mark.fault("PostgreSQL away while the API is asked for runs")
def test_without_a_database_nothing_is_promised(hurt: Api, postgres: PostgresServer, evidence: Evidence) -> None:
    for mode in (StopMode.FAST, StopMode.IMMEDIATE):
        evidence.trials += 1
        postgres.stop(mode)
        for answer in (hurt.post("/v1/runs", {"task_id": 1}), hurt.get("/v1/runs", Role.ADMIN)):
            assert answer.status_code == 503, answer.text
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["code"] == "database_unavailable"
            assert answer.headers["retry-after"]
            assert str(postgres.port) not in answer.text, "it tells where the database is"
        assert (hurt.get("/healthz", None).status_code, hurt.get("/readyz", None).status_code) == (200, 503)

        postgres.start()
        with evidence.recovery():
            eventually(
                lambda: hurt.get("/readyz", None).status_code == 200, within=RESUMED, what="it is ready", every=0.2
            )
        assert hurt.stack.query("SELECT count(*) FROM orchestrator.runs")[0]["count"] == evidence.trials - 1
        run_id = accepted(hurt.post("/v1/runs", {"task_id": 1}))
        hurt.stack.await_run(run_id, "succeeded", within=RESUMED)


@pytest.mark.fault("PostgreSQL frozen (SIGSTOP) while many ask the API, more than it has threads")
def test_a_frozen_database_holds_up_nobody_for_long(hurt: Api, postgres: PostgresServer, evidence: Evidence) -> None:
    assert hurt.get("/v1/runs").status_code == 200
    postgres.freeze()
    try:
        headers = {"Authorization": f"Bearer {hurt.keys[Role.VIEWER]}"}
        with (
            httpx2.Client(timeout=120, limits=httpx2.Limits(max_connections=None), headers=headers) as client,
            ThreadPoolExecutor(160) as pool,
        ):
            answers = list(pool.map(lambda _: client.get(f"{hurt.url}/v1/runs"), range(160)))
        evidence.trials += len(answers)
        assert hurt.get("/healthz", None).status_code == 200
    finally:
        postgres.thaw()
    for answer in answers:
        assert answer.status_code == 503, answer.text
        assert answer.json()["code"] in {"database_unavailable", "api_busy"}
        assert answer.headers["retry-after"]
    assert any(answer.json()["code"] == "api_busy" for answer in answers), "everybody waited for everybody"
    with evidence.recovery():
        eventually(lambda: hurt.get("/readyz", None).status_code == 200, within=RESUMED, what="it is ready", every=0.2)
    hurt.stack.await_run(accepted(hurt.post("/v1/runs", {"task_id": 1})), "succeeded", within=RESUMED)
