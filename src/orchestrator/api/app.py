"""Puts the application together: routes, problems, limits, headers, and what lives as long as it does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from orchestrator import __version__
from orchestrator.api import operations, problems, runs, schedules
from orchestrator.api.limits import Application, Limits, Message, Receive, Send
from orchestrator.api.security import FailureLimit
from orchestrator.api.waker import Waker
from orchestrator.bootstrap import Services

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
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours know what a run is
    )
    app.state.services = services
    app.state.failures = FailureLimit()
    app.state.waker = Waker(services.ledger, services.sender)
    problems.install(app)
    for routes in (runs.routes, schedules.routes, operations.routes):
        routes.serve_in(app)
    app.include_router(operations.open_to_all)
    settings = services.settings.api
    if settings.open_metrics:
        app.include_router(operations.open_metrics)
    else:
        operations.unversioned.serve_in(app)
    app.add_middleware(Limits, most=settings.max_body)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "traceparent"],
            expose_headers=["Location", "Idempotency-Replayed", "Retry-After"],
        )
    problems.document(app)
    app.state.parameters = _parameters(app)
    return app


def _parameters(app: FastAPI) -> dict[tuple[str, str], frozenset[str]]:
    """Return what may stand in the query, by method and path."""
    return {
        (method.upper(), path): frozenset(
            each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"
        )
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    }


class Protected:
    """An application with what keeps browsers from harm on every answer, those to faults of ours included.

    Args:
        app: the application.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
