"""Puts the application together: routes, problems, limits, headers, and what lives as long as it does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from orchestrator import __version__
from orchestrator.api import operations, problems, runs, schedules
from orchestrator.api.security import FailureLimit
from orchestrator.api.waker import Waker
from orchestrator.bootstrap import Services
from orchestrator.errors import UnauthenticatedError

SLOWEST_BODY: Final = 30.0
"""Seconds within which the body of a request has to be there."""
_DESCRIPTION: Final = (
    "Triggers site analyses and crawl tasks, and answers what became of them. Every request needs an API key as bearer "
    "token; problems are RFC 9457 documents with a stable `code`; times are RFC 3339."
)
_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Application = Callable[[_Message, _Receive, _Send], Awaitable[None]]


def create_app(services: Services) -> FastAPI:
    """Return the application over some services."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        waker: Waker = app.state.waker
        waker.start()
        yield
        waker.stop()

    app = FastAPI(
        title="Task Orchestrator",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # both pages load their scripts from elsewhere
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.failures = FailureLimit()
    app.state.waker = Waker(services.ledger, services.sender)
    problems.install(app)
    for routes in (runs.routes, schedules.routes, operations.routes):
        routes.serve_in(app, "/v1")
    app.include_router(operations.open_to_all)
    settings = services.settings.api
    if settings.open_metrics:
        app.include_router(operations.open_metrics)
    else:
        operations.unversioned.serve_in(app)
    app.add_middleware(_Limits, most=settings.max_body)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "traceparent"],
            expose_headers=["Location", "Idempotency-Replayed", "Retry-After"],
        )
    problems.document(app)
    return app


class Protected:
    """An application with what keeps browsers from harm on every answer, those to faults of ours included.

    Args:
        app: the application.
    """

    def __init__(self, app: _Application) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """See ASGI."""

        async def with_headers(message: _Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


class _Limits:
    """Refuses bodies of nobody's unread, and those that are too long, or too slow, as soon as that is known."""

    def __init__(self, app: _Application, most: int) -> None:
        self._app = app
        self._most = most
        self._too_long = f"a request body has {most:,} bytes at most"

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST" and not any(name == b"authorization" for name, _ in scope["headers"]):
            # Nobody's bodies are not even read.
            error = UnauthenticatedError("this needs an API key: Authorization: Bearer …")
            await problems.of_error(Request(scope), error)(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._most:
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            await problems.problem(Request(scope), status, problems.CODES[status], self._too_long)(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: _Receive) -> _Receive:
        read = 0
        deadline: float | None = asyncio.get_running_loop().time() + SLOWEST_BODY

        async def limited() -> _Message:
            nonlocal read, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                too_slow = f"a request body has to be there within {SLOWEST_BODY:g} seconds"
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, too_slow) from error
            if not message.get("more_body"):
                deadline = None  # from then on this waits for the caller to hang up
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_long)
            return message

        return limited
