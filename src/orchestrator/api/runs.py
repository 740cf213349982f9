"""Runs: start, list, look into, retry, cancel."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Final
from uuid import UUID, uuid4

from fastapi import Path, Query
from fastapi.responses import JSONResponse
from sqlalchemy import Connection

from orchestrator import explain
from orchestrator.api import pages, schemas
from orchestrator.api.pages import Item
from orchestrator.api.problems import problems
from orchestrator.api.requests import Once, Outcome
from orchestrator.api.security import Ours, Routes
from orchestrator.bootstrap import Services
from orchestrator.domain import (
    AnalysisArguments,
    CrawlArguments,
    NewRun,
    Role,
    RunKind,
    RunState,
    SkipReason,
    Trigger,
    WakeUp,
    traceparent_of,
)
from orchestrator.domain import Arguments as TaskArguments
from orchestrator.insights import RunFilter

routes: Final = Routes("runs")

_COUNTED: Final = 1_000
_SHOWN: Final = 100

RunId = Annotated[UUID, Path(description="the run's id, which is the Celery task id")]


# --- Starting work -----------------------------------------------------------------------------------------------


@routes.post(
    "/runs",
    Role.OPERATOR,
    status_code=HTTPStatus.ACCEPTED,
    response_model=schemas.AcceptedRun,
    responses={200: {"model": schemas.AcceptedRun, "description": "return_existing: the run that is not over"}}
    | problems(404, 409),
)
def start_crawl(wish: schemas.NewCrawlRun, once: Once) -> JSONResponse:
    """Run a crawl task now: one message to the Extractor for each of its data sources."""
    by = {"actor": once.actor, "reason": wish.reason}

    def act(connection: Connection) -> Outcome:
        new = _new_run(CrawlArguments(wish.task_id), once)
        once.ours.catalog.require(connection, wish.task_id)
        run_id = once.ours.ledger.runs.accept_crawl(new, wish.on_conflict, **by, within=connection)
        return accepted_one(new.wake_up) if run_id == new.run_id else accepted_one(None, run_id)

    return once.once(wish, act)


@routes.post(
    "/analyses",
    Role.OPERATOR,
    status_code=HTTPStatus.ACCEPTED,
    response_model=schemas.AcceptedRuns,
    responses=problems(409),
)
def start_analyses(wish: schemas.NewAnalyses, once: Once) -> JSONResponse:
    """Have the Discovery Service analyse data sources for a theme, each by a run of its own."""
    sources = dict.fromkeys(wish.data_source_ids)

    def act(connection: Connection) -> Outcome:
        news = [_new_run(AnalysisArguments(each, wish.theme_name), once) for each in sources]
        once.ours.ledger.runs.accept_all(news, actor=once.actor, reason=wish.reason, within=connection)
        return accepted_all([new.wake_up for new in news])

    return once.once(wish, act)


def accepted_one(wake_up: WakeUp | None, existing: UUID | None = None) -> Outcome:
    """Return the answer to who wanted one run: the one to be woken, or else a crawl run that there is."""
    if wake_up is None:
        found = schemas.Accepted(id=existing, kind=RunKind.CRAWL, created=False, href=href(existing))
        return Outcome(HTTPStatus.OK, schemas.AcceptedRun(run=found), location=found.href)
    run = accepted(wake_up)
    return Outcome(HTTPStatus.ACCEPTED, schemas.AcceptedRun(run=run), location=run.href, wake_ups=[wake_up])


def accepted_all(wake_ups: Sequence[WakeUp]) -> Outcome:
    """Return the answer to who wanted some runs."""
    body = schemas.AcceptedRuns(runs=[accepted(wake_up) for wake_up in wake_ups])
    location = body.runs[0].href if len(wake_ups) == 1 else "/v1/runs"
    return Outcome(HTTPStatus.ACCEPTED, body, location=location, wake_ups=wake_ups)


def accepted(wake_up: WakeUp) -> schemas.Accepted:
    """Return how a run that was asked for is told of."""
    kind = RunKind.CRAWL if isinstance(wake_up.arguments, CrawlArguments) else RunKind.SITE_ANALYSIS
    return schemas.Accepted(id=wake_up.run_id, kind=kind, created=True, href=href(wake_up.run_id))


def href(run_id: UUID | None) -> str:
    """Return where a run is."""
    return f"/v1/runs/{run_id}"


def _new_run(arguments: TaskArguments, once: Once) -> NewRun:
    run_id = uuid4()
    return NewRun(run_id, arguments, Trigger.API, traceparent_of(run_id, once.traceparent))


# --- Reading -----------------------------------------------------------------------------------------------------


@routes.get("/runs", response_model=schemas.RunPage, responses=problems())
def list_runs(ours: Ours, query: Annotated[schemas.RunQuery, Query()]) -> schemas.RunPage:
    """List runs, newest first."""
    wanted = query.filters
    position = pages.decode(query.cursor, wanted, pages.moment, pages.moment, pages.run_id)
    # Fixed by the first page, else the list would lose its end while it is read.
    since = position[0] if position else query.since or pages.window_of(ours)
    found = ours.insights.search_runs(
        RunFilter(**wanted | {"since": since}),
        limit=query.limit,
        after=(position[1], position[2]) if position else None,
        most=_COUNTED,
    )
    return schemas.RunPage(
        items=[schemas.Run.model_validate(each) for each in found.runs],
        next_cursor=pages.encode((since, *found.following), wanted) if found.following else None,
        total=schemas.Total(value=found.counted, relation="eq" if found.exact else "gte"),
        since=since,
    )


@routes.get("/runs/{run_id}", response_model=schemas.RunDetail, responses=problems(404))
def show_run(ours: Ours, run_id: RunId) -> schemas.RunDetail:
    """Tell all about a run: what it waits for, its calls, what happened, what was skipped."""
    view = ours.insights.run(run_id)
    return schemas.RunDetail.model_validate(
        {
            "run": view,
            "waits_for": explain.waits_for(ours.insights, view),
            # Most runs have none of one or the other.
            "skip_reasons": ours.insights.skip_reasons(run_id) if view.skipped else {},
            "attempts": ours.insights.page_attempts(run_id, limit=_SHOWN) if view.attempts else [],
            "timeline": ours.insights.page_events(run_id, limit=_SHOWN),
        },
        from_attributes=True,
    )


@routes.get("/runs/{run_id}/attempts", response_model=schemas.Page[schemas.Attempt], responses=problems(404))
def list_attempts(
    ours: Ours, run_id: RunId, query: Annotated[schemas.PageQuery, Query()]
) -> schemas.Page[schemas.Attempt]:
    """List the calls that a site analysis made to the Discovery Service, oldest first."""
    of = {"attempts": run_id}
    after = pages.after_number(query.cursor, of, pages.small_number)
    found = ours.insights.page_attempts(run_id, limit=query.limit + 1, after=after)
    items, following = pages.paged(_of(ours, run_id, found), query.limit, lambda attempt: (attempt.number,), of)
    return schemas.Page[schemas.Attempt](items=list(map(schemas.Attempt.model_validate, items)), next_cursor=following)


@routes.get("/runs/{run_id}/events", response_model=schemas.Page[schemas.Event], responses=problems(404))
def list_events(ours: Ours, run_id: RunId, query: Annotated[schemas.PageQuery, Query()]) -> schemas.Page[schemas.Event]:
    """List what happened to a run, oldest first."""
    of = {"events": run_id}
    after = pages.after_number(query.cursor, of)
    found = ours.insights.page_events(run_id, limit=query.limit + 1, after=after)
    items, following = pages.paged(_of(ours, run_id, found), query.limit, lambda event: (event.id,), of)
    return schemas.Page[schemas.Event](items=list(map(schemas.Event.model_validate, items)), next_cursor=following)


@routes.get("/runs/{run_id}/dispatches", response_model=schemas.Page[schemas.Dispatch], responses=problems(404))
def list_dispatches(
    ours: Ours, run_id: RunId, query: Annotated[schemas.DispatchQuery, Query()]
) -> schemas.Page[schemas.Dispatch]:
    """List the data sources of a crawl run, by their ids."""
    of = {"dispatches": run_id, "state": query.state}
    after = pages.after_number(query.cursor, of)
    found = ours.insights.page_dispatches(run_id, limit=query.limit + 1, after=after, state=query.state)
    items, following = pages.paged(
        _of(ours, run_id, found), query.limit, lambda dispatch: (dispatch.data_source_id,), of
    )
    return schemas.Page[schemas.Dispatch](
        items=list(map(schemas.Dispatch.model_validate, items)), next_cursor=following
    )


def _of(ours: Services, run_id: UUID, found: Sequence[Item]) -> Sequence[Item]:
    """Return what was found about a run.

    Raises:
        RunNotFoundError: nothing was, for there is no such run.
    """
    if not found:
        ours.insights.run(run_id)
    return found


@routes.get("/crawl-tasks/{task_id}/plan", response_model=schemas.Plan, responses=problems(404))
def plan(ours: Ours, task_id: schemas.PathId) -> schemas.Plan:
    """Say what a run of a crawl task would dispatch now, and what it would skip and why; sends nothing."""
    with ours.database.transaction() as connection:
        sample = ours.catalog.sample_plan(connection, task_id, _SHOWN)
    return schemas.Plan(
        task_id=task_id,
        total=sample.total,
        dispatched=sample.dispatched,
        skipped=sample.total - sample.dispatched,
        dispatches=[
            schemas.PlannedDispatch(data_source_id=each[0], crawl_config_id=each[1]) for each in sample.dispatches
        ],
        skips=[schemas.PlannedSkip(data_source_id=each, reason=SkipReason.NO_ACTIVE_CONFIG) for each in sample.skips],
    )


# --- Operating ---------------------------------------------------------------------------------------------------


@routes.post(
    "/runs/{run_id}/retry",
    Role.OPERATOR,
    status_code=HTTPStatus.ACCEPTED,
    response_model=schemas.AcceptedRun,
    responses=problems(404, 409),
)
def retry(run_id: RunId, once: Once, change: schemas.Change | None = None) -> JSONResponse:
    """Put a failed run back in the queue; repeat a succeeded or canceled one as a new run."""
    reason = change.reason if change else None

    def act(connection: Connection) -> Outcome:
        return accepted_one(
            once.ours.ledger.runs.retry(
                run_id,
                Trigger.API,
                actor=once.actor,
                reason=reason,
                traceparent=once.traceparent,
                within=connection,
            )
        )

    return once.once(change, act)


@routes.post("/runs/{run_id}/cancel", Role.OPERATOR, response_model=schemas.Canceled, responses=problems(404, 409))
def cancel(run_id: RunId, once: Once, change: schemas.Change | None = None) -> JSONResponse:
    """Cancel a run: no further batch is begun; workers skip the rest, a million in half a minute."""
    reason = change.reason if change else None

    def act(connection: Connection) -> Outcome:
        once.ours.ledger.runs.cancel(run_id, actor=once.actor, reason=reason, within=connection)
        return Outcome(HTTPStatus.OK, schemas.Canceled(id=run_id, state=RunState.CANCELED, href=href(run_id)))

    return once.once(change, act)
