"""The HTTP API as its callers see it: a served process on real PostgreSQL and RabbitMQ."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Final
from uuid import UUID, uuid4

import httpx2
import psycopg
import pytest

from orchestrator.api.security import FAILURES
from orchestrator.domain import Role
from tests.support.api import ROLES, Api, address_of, serve
from tests.support.operators import command
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack

OPEN: Final = {"/healthz", "/readyz"}
_TASKS: Final = count(1)


@pytest.fixture(scope="module")
def api(
    postgres_server: PostgresServer, rabbitmq_server: RabbitMQServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    """An API without workers: what it accepts stays queued."""
    directory = tmp_path_factory.mktemp("api")
    broker = rabbitmq_server.vhost_url(rabbitmq_server.fresh_vhost())
    stack = Stack.on_rabbitmq(postgres_server.create_database(directory.name), broker, directory)
    stack.prepare()
    api = Api.start(stack)
    yield api
    api.close()
    stack.close()
    # Whatever the tests asked: no key of theirs, nor the password of a server, is in the log.
    log = api.process.text()
    assert not [secret for secret in (*api.keys.values(), "orchestrator:secret", "guest:guest") if secret in log], log


@pytest.fixture
def task(api: Api) -> int:
    """A crawl task of the test's own, with three data sources, of which the last has no config."""
    number = next(_TASKS)
    first = number * 10
    api.stack.application.add_configs([(first, first), (first + 1, first + 1)])
    api.stack.application.add_task(number, [first, first + 1, first + 2])
    return number


def problem_of(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Check that an answer is a problem, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["code"] == code, document
    assert document["type"] == f"urn:task-orchestrator:problem:{code}"
    assert document["status"] == status
    assert document["detail"]
    return document


def started(response: httpx2.Response, status: int = 202) -> str:
    """Check that a run was accepted, and return its id."""
    assert response.status_code == status, response.text
    run = response.json()["run"]
    assert response.headers["location"] == run["href"] == f"/v1/runs/{run['id']}"
    run_id: str = run["id"]
    return run_id


# --- Who may ask -------------------------------------------------------------------------------------------------


def routes(api: Api) -> list[tuple[str, str, str | None]]:
    """Return method, path and role of every route that the API documents."""
    document = api.get("/v1/openapi.json").json()
    return [
        (method.upper(), path, operation.get("x-role"))
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def test_every_route_wants_a_key_of_its_role_and_no_other(api: Api) -> None:
    found = routes(api)
    assert len(found) > 20
    assert {path for _, path, role in found if role is None} == OPEN
    for method, path, role in found:
        if role is None:
            continue
        concrete = path.replace("{run_id}", str(uuid4())).replace("{task_id}", "999999")
        problem_of(api.request(method, concrete, None), 401, "unauthenticated")
        for asks in ROLES:
            answer = api.request(method, concrete, asks)
            if asks.covers(Role(role)):
                assert answer.status_code not in {401, 403, 500}, (method, path, asks, answer.text)
            else:
                problem_of(answer, 403, "forbidden")


def test_what_is_not_documented_is_not_there(api: Api) -> None:
    problem_of(api.get("/v1/nothing"), 404, "not_found")
    problem_of(api.request("DELETE", "/v1/runs", Role.ADMIN), 405, "method_not_allowed")
    assert api.get("/docs").status_code == api.get("/").status_code == 404


def test_only_the_whole_key_opens(api: Api) -> None:
    key = api.keys[Role.ADMIN]
    for wrong in (key[:-1], key + "x", key.upper(), "ork_", "ork_" + "0" * 12 + "_" + "x" * 43, "x" * 5_000):
        answer = api.get("/v1/runs", None, headers={"Authorization": f"Bearer {wrong}"})
        problem = problem_of(answer, 401, "unauthenticated")
        assert wrong not in str(problem)
        assert answer.headers["www-authenticate"].startswith("Bearer")
    problem_of(api.get("/v1/runs", None, headers={"Authorization": f"Basic {key}"}), 401, "unauthenticated")


def test_a_key_is_good_while_its_use_cannot_be_noted(api: Api) -> None:
    made = command(api.stack, "keys", "create", "unnoted", "--role", "viewer", "--json").document
    bearer = {"Authorization": f"Bearer {made['key']}"}
    with psycopg.connect(api.stack.database) as somebody:
        somebody.execute("SELECT FROM orchestrator.api_keys WHERE id = %s FOR UPDATE", [made["id"]])
        assert api.get("/v1/runs", None, headers=bearer).status_code == 200
    note = "SELECT used_at FROM orchestrator.api_keys WHERE id = %s"
    assert api.stack.query(note, made["id"]) == [{"used_at": None}]
    assert api.get("/v1/runs", None, headers=bearer).status_code == 200
    assert api.stack.query(note, made["id"])[0]["used_at"] is not None


def test_keys_are_made_listed_and_revoked_at_the_command_line(api: Api) -> None:
    made = command(api.stack, "keys", "create", "the BFF", "--role", "operator", "--days", "1", "--json").document
    bearer = {"Authorization": f"Bearer {made['key']}"}
    assert api.get("/v1/runs", None, headers=bearer).status_code == 200

    listed = command(api.stack, "keys", "list")
    assert made["id"] in listed.out
    assert "the BFF" in listed.out
    assert made["key"] not in listed.out
    assert command(api.stack, "keys", "revoke", made["id"], "--reason", "lost").code == 0
    problem_of(api.get("/v1/runs", None, headers=bearer), 401, "unauthenticated")

    for name in ("", "x" * 101, "red \x1b[31m", b"\xff\xfe".decode(errors="surrogateescape")):
        refused = command(api.stack, "keys", "create", name)
        assert (refused.code, "printable characters" in refused.err) == (2, True), refused.err
    again = command(api.stack, "keys", "revoke", made["id"])
    assert (again.code, "revoked already" in again.err) == (1, True)
    assert command(api.stack, "keys", "revoke", "nobody").code == 1
    (event,) = api.get("/v1/audit-events?action=revoke_key&limit=1", Role.ADMIN).json()["items"]
    assert (event["reason"], event["before"]["name"]) == ("lost", "the BFF")
    kept = api.stack.query("SELECT * FROM orchestrator.api_keys")
    assert made["key"] not in str(kept)


# --- Starting work -----------------------------------------------------------------------------------------------


def test_a_run_is_there_the_moment_it_is_accepted(api: Api, task: int) -> None:
    run_id = started(api.post("/v1/runs", {"task_id": task, "reason": "try it"}))

    shown = api.get(f"/v1/runs/{run_id}").json()
    assert shown["run"]["state"] == "queued"
    assert (shown["run"]["task_id"], shown["run"]["trigger"], shown["run"]["kind"]) == (task, "api", "crawl")
    assert [event["event"] for event in shown["timeline"]] == ["run.accepted"]
    assert "worker" in shown["waits_for"]["sentence"]
    listed = api.get(f"/v1/runs?task_id={task}").json()
    assert [run["id"] for run in listed["items"]] == [run_id]
    assert listed["total"] == {"value": 1, "relation": "eq"}
    (event,) = api.get(f"/v1/audit-events?run_id={run_id}", Role.ADMIN).json()["items"]
    assert (event["action"], event["reason"]) == ("start", "try it")
    assert "test operator" in event["actor"]
    eventually(lambda: (api.stack.run(run_id) or {})["enqueued_at"], within=20, what="its wake-up is sent")


def test_analyses_of_many_data_sources(api: Api) -> None:
    theme = f"theme {uuid4()}"
    answer = api.post("/v1/analyses", {"data_source_ids": [5, 6, 5], "theme_name": theme})
    assert answer.status_code == 202
    runs = answer.json()["runs"]
    assert len(runs) == 2
    page = api.get("/v1/runs", params={"theme_name": theme}).json()
    assert {run["id"] for run in page["items"]} == {run["id"] for run in runs}
    assert {run["data_source_id"] for run in page["items"]} == {5, 6}


def test_the_callers_trace_goes_on(api: Api, task: int) -> None:
    trace = uuid4().hex
    run_id = started(api.post("/v1/runs", {"task_id": task}, headers={"traceparent": f"00-{trace}-{'1' * 16}-01"}))
    assert trace in api.get(f"/v1/runs/{run_id}").json()["run"]["traceparent"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "body.task_id"),
        ({"task_id": "7"}, "body.task_id"),
        ({"task_id": True}, "body.task_id"),
        ({"task_id": 0}, "body.task_id"),
        ({"task_id": 2**63}, "body.task_id"),
        ({"task_id": 1, "task": 1}, "body.task"),
        ({"task_id": 1, "on_conflict": "maybe"}, "body.on_conflict"),
        ({"task_id": 1, "reason": "x" * 501}, "body.reason"),
        ({"task_id": 1, "reason": "\x00"}, "body.reason"),
        ([], "body"),
    ],
)
def test_wrong_wishes_are_explained(api: Api, body: object, where: str) -> None:
    problem = problem_of(api.post("/v1/runs", body), 422, "invalid_request")
    assert where in {each["where"] for each in problem["errors"]}


def test_what_is_no_json_or_too_much_of_it_is_refused(api: Api) -> None:
    wrong = api.post("/v1/runs", content=b"{", headers={"Content-Type": "application/json"})
    problem_of(wrong, 400, "malformed_request")
    large = api.post("/v1/runs", content=b" " * 2_000_000, headers={"Content-Type": "application/json"})
    problem_of(large, 413, "request_too_large")
    chunks = api.post("/v1/runs", content=iter([b" " * 700_000] * 2), headers={"Content-Type": "application/json"})
    problem_of(chunks, 413, "request_too_large")
    problem_of(api.get("/v1/runs?stat=failed"), 422, "invalid_request")


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"Content-Type": ""}, "Content-Type: application/json"),
        ({"Content-Type": "text/plain"}, "Content-Type: application/json"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "compressed"),
    ],
)
def test_a_body_says_that_it_is_json(api: Api, task: int, headers: dict[str, str], sentence: str) -> None:
    body = json.dumps({"task_id": task}).encode()
    answer = api.request("POST", "/v1/runs", Role.OPERATOR, content=body, headers=headers)
    assert sentence in problem_of(answer, 415, "unsupported_media_type")["detail"]
    also = {"Content-Type": "Application/JSON; charset=utf-8"}
    started(api.request("POST", "/v1/runs", Role.OPERATOR, content=body, headers=also))


@pytest.mark.parametrize(
    ("method", "path", "wrong"),
    [
        ("POST", "/v1/schedules/1/backfill?dry_run=true", "dry_run"),
        ("GET", "/v1/workers?colour=red", "colour"),
        ("GET", "/v1/runs?state=failed&state=succeeded", "state"),
        ("GET", f"/v1/runs/{UUID(int=1)}?limit=3", "limit"),
    ],
)
def test_parameters_without_effect_are_refused(api: Api, method: str, path: str, wrong: str) -> None:
    body = {"since": "2026-01-01T00:00:00Z", "until": "2026-01-02T00:00:00Z"} if method == "POST" else None
    answer = api.request(method, path, Role.OPERATOR, **({"json": body} if body else {}))
    problem = problem_of(answer, 422, "invalid_request")
    assert [error["where"] for error in problem["errors"]] == [f"query.{wrong}"]


def test_cursors_belong_to_their_list(api: Api, task: int) -> None:
    for _ in range(2):
        started(api.post("/v1/runs", {"task_id": task}))
    cursor = api.get("/v1/runs?limit=1").json()["next_cursor"]
    audit = api.get("/v1/audit-events?limit=1", Role.ADMIN).json()["next_cursor"]
    for path, other in (("/v1/audit-events", cursor), ("/v1/firings", audit), ("/v1/schedules", audit)):
        problem_of(api.get(f"{path}?cursor={other}", Role.ADMIN), 400, "invalid_cursor")


def test_an_unknown_crawl_task_is_told_at_once(api: Api) -> None:
    problem_of(api.post("/v1/runs", {"task_id": 424242}), 404, "crawl_task_not_found")


def test_a_second_run_of_a_task_by_wish(api: Api, task: int) -> None:
    first = started(api.post("/v1/runs", {"task_id": task, "on_conflict": "reject"}))
    refused = problem_of(api.post("/v1/runs", {"task_id": task, "on_conflict": "reject"}), 409, "run_in_progress")
    assert refused["run_id"] == first
    same = api.post("/v1/runs", {"task_id": task, "on_conflict": "return_existing"})
    assert (started(same, 200), same.json()["run"]["created"]) == (first, False)
    assert started(api.post(f"/v1/schedules/{task}/trigger")) != first


def test_who_wants_no_second_run_gets_none_however_many_ask_at_once(api: Api, task: int) -> None:
    wish = {"task_id": task, "on_conflict": "return_existing"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.post("/v1/runs", wish), range(24)))
    assert Counter(answer.status_code for answer in answers) == {202: 1, 200: 23}
    assert len({answer.json()["run"]["id"] for answer in answers}) == 1


# --- The same request again --------------------------------------------------------------------------------------


def test_a_repeated_request_is_done_once_and_answered_alike(api: Api, task: int) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    first = api.post("/v1/runs", {"task_id": task}, headers=key)
    again = api.post("/v1/runs", {"task_id": task}, headers=key)
    assert (again.status_code, again.json(), again.headers["location"]) == (
        first.status_code,
        first.json(),
        first.headers["location"],
    )
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(api.get(f"/v1/runs?task_id={task}").json()["items"]) == 1

    other = api.post("/v1/runs", {"task_id": task, "reason": "other"}, headers=key)
    problem_of(other, 422, "idempotency_key_reused")
    problem_of(
        api.post("/v1/analyses", {"data_source_ids": [1], "theme_name": "x"}, headers=key),
        422,
        "idempotency_key_reused",
    )
    # Another caller's key of the same name is another key.
    started(api.post("/v1/runs", {"task_id": task}, Role.ADMIN, headers=key))


def test_two_identical_requests_at_once_are_one_run(api: Api, task: int) -> None:
    def pair(number: int) -> set[str]:
        headers = {"Idempotency-Key": f"pair-{task}-{number}"}
        with ThreadPoolExecutor(2) as both:
            answers = list(both.map(lambda _: api.post("/v1/runs", {"task_id": task}, headers=headers), range(2)))
        for answer in answers:
            if answer.status_code != 202:
                problem_of(answer, 409, "request_in_progress")
                assert answer.headers["retry-after"]
        ids = {answer.json()["run"]["id"] for answer in answers if answer.status_code == 202}
        ids.add(started(api.post("/v1/runs", {"task_id": task}, headers=headers)))
        return ids

    with ThreadPoolExecutor(4) as pool:
        assert all(len(ids) == 1 for ids in pool.map(pair, range(200)))
    (row,) = api.stack.query("SELECT count(*) AS runs FROM orchestrator.runs WHERE task_id = %s", task)
    assert row["runs"] == 200


def test_a_refused_request_is_tried_again(api: Api, task: int) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    problem_of(api.post(f"/v1/runs/{uuid4()}/cancel", headers=key), 404, "run_not_found")
    run_id = started(api.post("/v1/runs", {"task_id": task}))
    assert api.post(f"/v1/runs/{run_id}/cancel", headers=key).status_code == 200
    problem_of(
        api.post("/v1/runs", {"task_id": task}, headers={"Idempotency-Key": "with space"}), 422, "invalid_request"
    )


# --- Control -----------------------------------------------------------------------------------------------------


def test_cancel_and_retry_say_what_is_allowed(api: Api, task: int) -> None:
    run_id = started(api.post("/v1/runs", {"task_id": task}))
    assert problem_of(api.post(f"/v1/runs/{run_id}/retry"), 409, "illegal_transition")["allowed"] == ["cancel"]
    canceled = api.post(f"/v1/runs/{run_id}/cancel", {"reason": "wrong list"})
    assert (canceled.status_code, canceled.json()["state"]) == (200, "canceled")
    assert problem_of(api.post(f"/v1/runs/{run_id}/cancel"), 409, "illegal_transition")["allowed"] == ["retry"]
    again = started(api.post(f"/v1/runs/{run_id}/retry", {"reason": "right after all"}))
    assert api.get(f"/v1/runs/{again}").json()["run"]["retry_of"] == run_id
    actions = api.get(f"/v1/audit-events?run_id={run_id}", Role.ADMIN).json()["items"]
    assert [(each["action"], each["reason"]) for each in actions] == [
        ("retry", "right after all"),
        ("cancel", "wrong list"),
        ("start", None),
    ]
    assert actions[1]["before"]["state"] == "queued"
    assert actions[1]["after"]["state"] == "canceled"


def test_a_plan_says_what_would_be_sent(api: Api, task: int) -> None:
    plan = api.get(f"/v1/crawl-tasks/{task}/plan").json()
    assert (plan["total"], plan["dispatched"], plan["skipped"]) == (3, 2, 1)
    assert plan["skips"] == [{"data_source_id": task * 10 + 2, "reason": "no_active_config"}]
    problem_of(api.get("/v1/crawl-tasks/424242/plan"), 404, "crawl_task_not_found")


def test_schedules_are_tried_out(api: Api) -> None:
    wish = {"text": "每天 03:00", "zone": "Asia/Shanghai", "after": "2026-07-01T00:00:00Z", "count": 2}
    preview = api.post("/v1/schedules/preview", wish, Role.VIEWER).json()
    assert preview["canonical"] == "0 3 * * *"
    assert preview["fires"] == ["2026-07-01T19:00:00Z", "2026-07-02T19:00:00Z"]
    problem_of(api.post("/v1/schedules/preview", {"text": "whenever"}), 422, "invalid_schedule")
    problem_of(api.post("/v1/schedules/preview", {"text": "x" * 10_000}), 422, "invalid_request")


# --- Reading -----------------------------------------------------------------------------------------------------


def test_lists_are_read_page_by_page(api: Api, task: int) -> None:
    made = [started(api.post("/v1/runs", {"task_id": task})) for _ in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        params = {"task_id": task, "limit": 2} | ({"cursor": cursor} if cursor else {})
        page = api.get("/v1/runs", params=params).json()
        seen += [run["id"] for run in page["items"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert seen == made[::-1]

    first = api.get(f"/v1/runs?task_id={task}&limit=2").json()["next_cursor"]
    problem_of(api.get(f"/v1/runs?task_id={task + 1}&limit=2&cursor={first}"), 400, "invalid_cursor")
    for wrong in ("x", "e30", first[:-3], "%F0%9F%92%A9"):
        problem_of(api.get(f"/v1/runs?task_id={task}&cursor={wrong}"), 400, "invalid_cursor")
    problem_of(api.get("/v1/runs?limit=1000"), 422, "invalid_request")


def test_queues_and_workers_are_shown(api: Api, task: int) -> None:
    run_id = started(api.post("/v1/runs", {"task_id": task}))
    eventually(lambda: (api.stack.run(run_id) or {})["enqueued_at"], within=20, what="its wake-up is sent")

    def waiting() -> int:
        found = {queue["name"]: queue for queue in api.get("/v1/queues").json()["items"]}
        assert found.keys() >= {"orchestrator.crawl", "orchestrator.analysis", "orchestrator.dead", "extraction_queue"}
        return found["orchestrator.crawl"]["messages"] or 0

    eventually(lambda: waiting() > 0, within=20, what="the queue has messages", every=0.5)
    assert api.get("/v1/workers").json() == {"items": []}


def test_health_is_for_everybody(api: Api) -> None:
    assert api.get("/healthz", None).json()["status"] == "ok"
    assert api.get("/readyz", None).json()["status"] == "ok"
    for path in OPEN:
        assert api.request("HEAD", path, None).status_code == 200


def test_prometheus_reads_with_a_viewers_key(api: Api, task: int) -> None:
    started(api.post("/v1/runs", {"task_id": task}))
    answer = api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'orchestrator_runs_active{state="queued"}' in answer.text
    problem_of(api.get("/metrics", None), 401, "unauthenticated")


def test_an_api_that_is_set_up_otherwise(api: Api) -> None:
    console = "https://console.example"
    asked = {"API__CORS_ORIGINS": f'["{console}"]', "API__OPEN_METRICS": "true", "API__TRUSTED_PROXIES": "[]"}
    other = Api(api.stack, serve(api.stack, **asked), api.keys)
    other.url = address_of(other.process)
    try:
        assert "orchestrator_runs_active" in other.get("/metrics", None).text
        preflight = {"Origin": console, "Access-Control-Request-Method": "POST"}
        allowed = other.request("OPTIONS", "/v1/runs", None, headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == console
        assert other.get("/v1/runs", headers={"Origin": console}).headers["access-control-allow-origin"] == console
        foreign = other.get("/v1/runs", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers
        # Who guesses keys is told to wait, whoever it says it is; who has one is not.
        for guess in range(FAILURES):
            pretended = {"Authorization": "Bearer guessed", "X-Forwarded-For": f"10.0.0.{guess}"}
            problem_of(other.get("/v1/runs", None, headers=pretended), 401, "unauthenticated")
        refused = other.get("/v1/runs", None, headers={"Authorization": "Bearer guessed"})
        problem_of(refused, 429, "too_many_authentication_failures")
        assert int(refused.headers["retry-after"]) >= 1
        assert other.get("/v1/runs").status_code == 200
    finally:
        other.close()
        other.process.close()


def test_every_answer_has_the_headers_that_keep_browsers_from_harm(api: Api) -> None:
    for path in ("/healthz", "/v1/runs", "/v1/nothing"):
        headers = api.get(path, None).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["cache-control"] == "no-store"
        assert (
            "access-control-allow-origin" not in api.get(path, None, headers={"Origin": "https://evil.example"}).headers
        )
        assert "server" not in headers
