"""The Python client, the examples for BFF developers, and every command of docs/api.md, on a served API."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import httpx2
import pytest

from orchestrator.client import ApiError, Client
from orchestrator.domain import Role
from tests.support.api import Api, address_of, serve
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack

DOCS: Final = Path(__file__).parents[2] / "docs"
TASK: Final = 7


@pytest.fixture(scope="module")
def api(
    postgres_server: PostgresServer, rabbitmq_server: RabbitMQServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    """An API with a worker and a beat."""
    directory = tmp_path_factory.mktemp("client")
    broker = rabbitmq_server.vhost_url(rabbitmq_server.fresh_vhost())
    stack = Stack.on_rabbitmq(postgres_server.create_database(directory.name), broker, directory)
    stack.prepare()
    stack.application.add_sources(3)
    stack.application.add_task(TASK, [1, 2, 3, 4], "daily at 03:00")
    stack.worker()
    stack.start("celery", "-A", "orchestrator.celery_app", "beat")
    api = Api.start(stack)
    eventually(
        lambda: api.get(f"/v1/schedules/{TASK}").status_code == 200, within=60, what="a beat has read it", every=0.5
    )
    yield api
    api.close()
    stack.close()


@pytest.fixture
def client(api: Api) -> Iterator[Client]:
    """An operator's client."""
    with Client(api.url, api.keys[Role.OPERATOR]) as client:
        yield client


def test_a_run_is_started_watched_and_listed(client: Client) -> None:
    accepted = client.run(TASK, reason="for the test")
    assert (accepted.kind, accepted.created) == ("crawl", True)
    run = client.wait(accepted.id, within=60, every=0.1)
    assert (run.state, run.published, run.skipped, run.total) == ("succeeded", 3, 1, 4)
    assert accepted.id in {each.id for each in client.runs(task_id=TASK, limit=1)}

    again = client.retry(accepted.id)
    assert client.wait(again.id, within=60, every=0.1).document["retry_of"] == str(accepted.id)
    with pytest.raises(ApiError, match="illegal_transition") as refused:
        client.cancel(accepted.id)
    assert (refused.value.status, refused.value.problem["allowed"]) == (409, ["retry"])
    with pytest.raises(ApiError, match="run_not_found"):
        client.get(uuid4())
    assert len(client.analyze([1, 2], "news")) == 2


def test_a_schedule_is_paused_resumed_made_up_for_and_explained(api: Api) -> None:
    at = f"/v1/schedules/{TASK}"
    assert api.post(f"{at}/pause", {"reason": "site moves"}).json() == {"task_id": TASK, "paused": True, "href": at}
    assert api.get(at).json()["pause_reason"] == "site moves"
    refused = api.post(f"{at}/pause")
    assert (refused.status_code, refused.json()["allowed"]) == (409, ["resume"])
    assert api.post(f"{at}/resume").json()["paused"] is False
    resumed, paused = api.get(f"/v1/audit-events?task_id={TASK}&limit=2", Role.ADMIN).json()["items"]
    assert (paused["action"], paused["before"], paused["after"]) == ("pause", {"paused": False}, {"paused": True})
    assert (resumed["action"], resumed["before"]["reason"]) == ("resume", "site moves")

    fires = api.get(f"{at}/fire-times?from=2026-07-01T00:00:00Z&to=2026-07-03T00:00:00Z").json()
    assert fires["fires"] == ["2026-07-01T03:00:00Z", "2026-07-02T03:00:00Z"]
    wish = {"since": "2026-07-01T00:00:00Z", "until": "2026-07-03T00:00:00Z"}
    dry = api.post(f"{at}/backfill", wish | {"dry_run": True})
    assert (dry.status_code, dry.json()["to_start"], len(dry.json()["slots"])) == (200, 2, 2)
    done = api.post(f"{at}/backfill", wish | {"reason": "outage"}, headers={"Idempotency-Key": "make-up"})
    assert (done.status_code, done.json()["to_start"]) == (202, 2)
    assert (
        api.post(f"{at}/backfill", wish | {"reason": "outage"}, headers={"Idempotency-Key": "make-up"}).json()
        == done.json()
    )
    for run in done.json()["runs"]:
        assert api.stack.await_run(run["id"])["state"] == "succeeded"
    why = api.get(f"/v1/why?task_id={TASK}&at=2026-07-01T03:00:00Z").json()
    assert (why["verdict"], why["run_id"] in {run["id"] for run in done.json()["runs"]}) == ("backfill", True)
    firings = api.get(f"/v1/firings?task_id={TASK}&since=2026-07-01T00:00:00Z&limit=1").json()
    assert len(firings["items"]) == 1
    (last,) = api.get(f"/v1/audit-events?task_id={TASK}&limit=1", Role.ADMIN).json()["items"]
    assert (last["action"], last["after"]["slots"], last["after"]["runs"]) == ("backfill", 2, 2)


def test_who_pauses_and_resumes_at_once_is_answered(api: Api) -> None:
    def change(number: int) -> int:
        return api.post(f"/v1/schedules/{TASK}/{('pause', 'resume')[number % 2]}").status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(change, range(80))) == {200, 409}
    api.post(f"/v1/schedules/{TASK}/resume")


def test_an_api_that_is_told_to_stop_ends_well(api: Api) -> None:
    another = serve(api.stack)
    address_of(another)
    assert another.terminate(within=20) == 0
    assert "Traceback" not in another.text()


class Cut(httpx2.BaseTransport):
    """Loses the answer to every first try of a request, after the API has worked on it."""

    def __init__(self) -> None:
        self._inner = httpx2.HTTPTransport()
        self.lost = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """See httpx2."""
        response = self._inner.handle_request(request)
        if self.lost % 2 == 0:
            self.lost += 1
            response.close()
            raise httpx2.ReadError("the connection was cut")
        self.lost += 1
        return response


def test_a_lost_answer_starts_no_second_run(api: Api) -> None:
    transport = Cut()
    with Client(api.url, api.keys[Role.OPERATOR], transport=transport) as client:
        accepted = client.run(TASK, reason=(reason := str(uuid4())))
    assert transport.lost == 2
    events = api.get("/v1/audit-events?limit=200", Role.ADMIN).json()["items"]
    assert [each["run_id"] for each in events if each["reason"] == reason] == [str(accepted.id)]


def test_who_cannot_be_reached_is_given_up_on() -> None:
    with Client("http://127.0.0.1:9", "ork_none", tries=2) as client, pytest.raises(ApiError, match="unreachable"):
        client.run(1)


@pytest.mark.parametrize("key", ["", "ork_geheim\nzwei", "ork_ключ", "ork geheim"])
def test_what_is_no_key_is_refused_without_being_told(key: str) -> None:
    with pytest.raises(ValueError, match="API key must be printable") as refused:
        Client("http://127.0.0.1:9", key)
    assert "geheim" not in str(refused.value)


def test_wrong_uses_are_told_at_once(api: Api) -> None:
    with pytest.raises(ValueError, match="http://"):
        Client("orchestrator.example", "ork_key")
    with pytest.raises(ValueError, match="tries"):
        Client(api.url, "ork_key", tries=0)
    # A key that was read from a file ends in a newline.
    with Client(api.url, api.keys[Role.OPERATOR] + "\n") as client:
        list(client.runs(limit=1, task_id=999))
        for ask in (client.get, client.cancel, client.retry):
            # Else whoever names a run could have anything asked for with this key.
            with pytest.raises(ValueError, match="UUID"):
                ask(f"../schedules/{TASK}/pause?")
        with pytest.raises(ValueError, match="idempotency key"):
            client.run(TASK, idempotency_key="two\nlines")


class Foreign(httpx2.BaseTransport):
    """Answers as something does that is not this API."""

    def __init__(self, body: str) -> None:
        self._body = body

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """See httpx2."""
        return httpx2.Response(200, text=self._body, request=request)


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"run": {"id": 1}}'])
def test_an_answer_that_is_none_of_ours_is_an_error_of_the_api(body: str) -> None:
    with Client("http://api.example", "ork_key", transport=Foreign(body)) as client:
        with pytest.raises(ApiError) as refused:
            client.get(uuid4())
        assert refused.value.code == "not_understood"
        with pytest.raises(ApiError, match="not_understood"):
            client.run(1)


def test_the_client_needs_nothing_else_of_this_package() -> None:
    probe = "import sys, orchestrator.client; print(*sorted(m for m in sys.modules if m.startswith('orchestrator')))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["orchestrator", "orchestrator.client"]


def environment(api: Api) -> dict[str, str]:
    """Return what the examples read."""
    assert api.stack.broker is not None
    return {**os.environ, "API": api.url, "KEY": api.keys[Role.OPERATOR], "BROKER": api.stack.broker}


@pytest.mark.parametrize("name", ["bff_http", "bff_celery"])
def test_the_examples_run(api: Api, name: str) -> None:
    command: list[str | Path] = [sys.executable, DOCS / f"examples/{name}.py", str(TASK)]
    done = subprocess.run(command, env=environment(api), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    run_id = UUID(re.search(r"[0-9a-f-]{36}", done.stdout)[0])  # type: ignore[index] # none fails the test
    assert api.stack.await_run(run_id)["state"] == "succeeded"


def test_the_readmes_client_runs(api: Api) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```", (DOCS.parent / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert api.stack.broker is not None
    script = script.replace("amqp://user:password@mq.example:5672/vhost", api.stack.broker) + "print(run_id)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert api.stack.await_run(UUID(done.stdout.strip()))["kind"] == "crawl"


SCRIPTS: Final = re.findall(r"^```sh\n(.*?)^```", (DOCS / "api.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_the_page_run(api: Api, script: str) -> None:
    # --fail: an answer that is a problem fails the command.
    script = "set -e\n" + script.replace("curl -sS", "curl -sS --fail-with-body")
    done = subprocess.run(["bash", "-c", script], env=environment(api), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
