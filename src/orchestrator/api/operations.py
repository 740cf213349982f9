"""What operators look at: queues, workers and beats, the audit log, and whether this process can do its work."""

from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse

from orchestrator import __version__, metrics, migrations
from orchestrator.api import pages, schemas
from orchestrator.api.limits import check_turn
from orchestrator.api.problems import problems
from orchestrator.api.security import Ours, Routes
from orchestrator.domain import Role
from orchestrator.errors import TransientError
from orchestrator.insights import AuditFilter

routes: Final = Routes("operations")
unversioned: Final = Routes("operations", prefix="")
open_metrics: Final = APIRouter(tags=["operations"])
open_to_all: Final = APIRouter(tags=["health"])


@routes.get("/queues", response_model=schemas.Queues, responses=problems())
def list_queues(ours: Ours) -> schemas.Queues:
    """Say how many messages stand in each queue, and how many consume it; asked at most once in some seconds."""
    return schemas.Queues(items=list(map(schemas.Queue.model_validate, ours.queues.standing())))


@routes.get("/workers", response_model=schemas.Nodes, responses=problems())
def list_workers(ours: Ours) -> schemas.Nodes:
    """List workers and beats by their last sign of life."""
    return schemas.Nodes(items=list(map(schemas.Node.model_validate, ours.insights.nodes())))


@routes.get("/audit-events", Role.ADMIN, response_model=schemas.Page[schemas.AuditEvent], responses=problems())
def list_audit_events(ours: Ours, query: Annotated[schemas.AuditQuery, Query()]) -> schemas.Page[schemas.AuditEvent]:
    """List who did what, newest first."""
    wanted = query.filters
    position = pages.decode(query.cursor, wanted, pages.moment, pages.number)
    since = query.since or (position[0] if position else pages.window_of(ours))
    after = position[1] if position else None
    found = ours.insights.page_audit(AuditFilter(**wanted | {"since": since}), limit=query.limit + 1, after=after)
    items, following = pages.paged(found, query.limit, lambda each: (since, each.id), wanted)
    shown = list(map(schemas.AuditEvent.model_validate, items))
    return schemas.Page[schemas.AuditEvent](items=shown, next_cursor=following)


# --- Without a version -------------------------------------------------------------------------------------------


def metrics_text(ours: Ours) -> Response:
    """Return what Prometheus scrapes: gauges of the ledger, and what this process counted."""
    return Response(metrics.exposition(ours.database), media_type=metrics.CONTENT_TYPE)


unversioned.get("/metrics", response_class=PlainTextResponse, responses=problems())(metrics_text)
open_metrics.get("/metrics", response_class=PlainTextResponse)(metrics_text)


# --- For everybody -----------------------------------------------------------------------------------------------


@open_to_all.head("/healthz", include_in_schema=False)
@open_to_all.get("/healthz", response_model=schemas.Health)
async def healthz() -> schemas.Health:
    """Say that this process answers."""
    return schemas.Health(status="ok", version=__version__)


@open_to_all.head("/readyz", include_in_schema=False)
@open_to_all.get("/readyz", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
def readyz(request: Request, ours: Ours, response: Response) -> schemas.Health:
    """Say whether requests can be answered: whether the ledger is there. A broker that is away does not matter."""
    try:
        check_turn(request)
        migrations.verify(ours.database)
    except TransientError as error:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return schemas.Health(status="unavailable", because=error.code, version=__version__)
    return schemas.Health(status="ok", version=__version__)
