"""How a request that cannot be answered is answered: RFC 9457 problem details with stable codes.

``code`` is the error's own (:mod:`orchestrator.errors`), ``type`` the same as a URN. ``errors`` says of each wrong
member of a request where it is and what is wrong. Nothing of a request is repeated but names: secrets may be in it.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from orchestrator.errors import (
    CrawlTaskNotFoundError,
    DatabaseRightsError,
    DatabaseUnavailableError,
    ForbiddenError,
    IllegalTransitionError,
    InvalidArgumentsError,
    InvalidCursorError,
    InvalidDataSourceIdsError,
    OrchestratorError,
    RequestInProgressError,
    RequestReusedError,
    RunInProgressError,
    RunNotFoundError,
    ScheduleNotFoundError,
    TooManyFailuresError,
    TransientError,
    UnauthenticatedError,
    UnreadableScheduleError,
)
from orchestrator.telemetry import Event, logger

MEDIA_TYPE: Final = "application/problem+json"

_STATUSES: Final[Sequence[tuple[type[OrchestratorError], HTTPStatus]]] = (
    (UnauthenticatedError, HTTPStatus.UNAUTHORIZED),
    (ForbiddenError, HTTPStatus.FORBIDDEN),
    (TooManyFailuresError, HTTPStatus.TOO_MANY_REQUESTS),
    (RunNotFoundError, HTTPStatus.NOT_FOUND),
    (ScheduleNotFoundError, HTTPStatus.NOT_FOUND),
    (CrawlTaskNotFoundError, HTTPStatus.NOT_FOUND),
    (IllegalTransitionError, HTTPStatus.CONFLICT),
    (RunInProgressError, HTTPStatus.CONFLICT),
    (InvalidDataSourceIdsError, HTTPStatus.CONFLICT),
    (RequestInProgressError, HTTPStatus.CONFLICT),
    (RequestReusedError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (InvalidArgumentsError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (UnreadableScheduleError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (InvalidCursorError, HTTPStatus.BAD_REQUEST),
    (TransientError, HTTPStatus.SERVICE_UNAVAILABLE),
)
CODES: Final = {
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.BAD_REQUEST: "malformed_request",
    HTTPStatus.REQUEST_TIMEOUT: "request_too_slow",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
}
"""Of problems that the web framework finds."""
_RETRY_AFTER: Final = 2  # seconds
_MOST_ERRORS: Final = 50

_log = logger(__name__)


class FieldProblem(BaseModel):
    """What is wrong with one member of a request."""

    where: str = Field(description="its place, for instance `body.task_id` or `query.limit`")
    problem: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="`urn:task-orchestrator:problem:` and the code")
    title: str = Field(description="the status in words")
    status: int
    detail: str = Field(description="one sentence for people")
    code: str = Field(description="stable, for programs")
    instance: str = Field(description="the path that was asked for")
    trace_id: str | None = Field(None, description="the trace id of the request's `traceparent`")
    allowed: list[str] | None = Field(None, description="409 illegal_transition: the actions that are allowed")
    run_id: str | None = Field(None, description="409 run_in_progress: the run that is not over")
    errors: list[FieldProblem] | None = Field(None, description="422 invalid_request: what is wrong, and where")


def problem(
    request: Request,
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    **members: Any,  # noqa: ANN401 -- checked by the model
) -> JSONResponse:
    """Return the answer that says what is wrong."""
    body = Problem(
        type=f"urn:task-orchestrator:problem:{code}",
        title=status.phrase,
        status=status,
        detail=detail,
        code=code,
        instance=request.url.path,
        trace_id=_trace_id(request),
        **members,
    )
    return JSONResponse(body.model_dump(exclude_none=True), status, headers, MEDIA_TYPE)


def of_error(request: Request, error: OrchestratorError) -> JSONResponse:
    """Return the answer to a request that ended in an error of ours."""
    status = next((status for kind, status in _STATUSES if isinstance(error, kind)), None)
    if status is None:
        # A setting or a table that does not fit: an operator's to mend, not the caller's.
        _log.error(Event.REQUEST_FAILED, code=error.code, error=str(error), path=request.url.path)
        status = HTTPStatus.SERVICE_UNAVAILABLE
    sentence = str(error)
    if isinstance(error, DatabaseUnavailableError | DatabaseRightsError):
        # Whose words these are: PostgreSQL's, of addresses and tables, and nobody has said yet who asks.
        _log.warning(Event.REQUEST_FAILED, code=error.code, error=sentence, path=request.url.path)
        sentence = "the database cannot be reached, or cannot serve right now; ask again"
    headers: dict[str, str] = {}
    members: dict[str, Any] = {}
    if status is HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="task-orchestrator"'
    if error.retryable:
        headers["Retry-After"] = str(_RETRY_AFTER)
    if isinstance(error, TooManyFailuresError):
        headers["Retry-After"] = str(ceil(error.seconds))
    if isinstance(error, IllegalTransitionError):
        members["allowed"] = list(error.allowed)
    if isinstance(error, RunInProgressError):
        members["run_id"] = str(error.run_id)
    return problem(request, status, error.code, sentence, headers=headers, **members)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return how a route documents the problems that it has besides those of every route."""
    everywhere = (400, 401, 403, 408, 413, 415, 422, 429, 500, 503)
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in sorted({*everywhere, *statuses})
    }


def install(app: FastAPI) -> None:
    """Have every error become a problem."""

    @app.exception_handler(OrchestratorError)
    def ours(request: Request, error: OrchestratorError) -> JSONResponse:
        return of_error(request, error)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = [
            FieldProblem(where=".".join(map(str, each["loc"])), problem=each["msg"])
            for each in error.errors()[:_MOST_ERRORS]
        ]
        unreadable = any(each["type"] == "json_invalid" for each in error.errors())
        status = HTTPStatus.BAD_REQUEST if unreadable else HTTPStatus.UNPROCESSABLE_ENTITY
        code = "malformed_request" if unreadable else "invalid_request"
        sentence = "; ".join(f"{each.where}: {each.problem}" for each in found[:3])
        return problem(request, status, code, sentence, errors=found)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        code = CODES.get(status, "http_error")
        return problem(request, status, code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    def unforeseen(request: Request, error: Exception) -> JSONResponse:
        _log.error(Event.REQUEST_FAILED, code="internal_error", error=type(error).__name__, path=request.url.path)
        sentence = "a fault of ours; it is in the log of the API process"
        return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", sentence)


def document(app: FastAPI) -> None:
    """Have the OpenAPI document say what a problem is; FastAPI itself knows models of plain JSON only."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        whole = generate()
        schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        whole["components"]["schemas"] |= schema.pop("$defs") | {Problem.__name__: schema}
        return whole

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way


def _trace_id(request: Request) -> str | None:
    parts = request.headers.get("traceparent", "").split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 and parts[1].isalnum() else None  # noqa: PLR2004 -- W3C's
