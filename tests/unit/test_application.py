"""The application as it is put together: no way in without a role, and no answer without its headers."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator, MutableMapping, Sequence
from typing import Any

import httpx2
import pytest
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from orchestrator import bootstrap
from orchestrator.api import create_app
from orchestrator.api.app import Protected
from orchestrator.api.server import _listen

OPEN = {"/healthz", "/readyz", "/v1/openapi.json"}


def walk(routes: Sequence[BaseRoute]) -> Iterator[BaseRoute]:
    """Yield routes, those of included routers too."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from walk(router.routes)


def test_every_route_that_is_served_has_a_role_documented_or_not() -> None:
    app = create_app(bootstrap.services())
    served = [route for route in walk(app.routes) if getattr(route, "path", None) not in OPEN]
    documented = {path: operations for path, operations in app.openapi()["paths"].items() if path not in OPEN}
    assert len(served) == sum(map(len, documented.values())) > 20
    for route in served:
        assert isinstance(route, APIRoute), route
        assert (route.openapi_extra or {}).get("x-role"), route.path
        assert route.dependencies, route.path


def test_a_body_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.api.limits.SLOWEST_BODY", 0.05)
    app = create_app(bootstrap.services())

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def ask() -> list[MutableMapping[str, Any]]:
        parts, sent = aiter(body()), []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": await anext(parts), "more_body": True}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/runs",
            "raw_path": b"/v1/runs",
            "query_string": b"",
            "headers": [(b"authorization", b"Bearer none"), (b"content-type", b"application/json")],
        }
        await asyncio.wait_for(app(scope, receive, send), timeout=20)
        return sent

    begin, rest = asyncio.run(ask())
    assert begin["status"] == 408
    assert json.loads(rest["body"])["code"] == "request_too_slow"


def test_a_fault_of_ours_is_a_problem_with_all_headers_and_tells_nothing() -> None:
    app = create_app(bootstrap.services())

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("the secret of the house")

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(Protected(app), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://api.example") as client:
            return await client.get("/broken")

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "application/problem+json"


def test_no_answer_waits_until_its_head_is_acknowledged() -> None:
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
