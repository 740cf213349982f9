"""Schedules and their slots: list, try out, pause, resume, trigger, backfill; and why something did (not) run."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from itertools import islice
from typing import Annotated, Final

from fastapi import Query
from fastapi.responses import JSONResponse
from sqlalchemy import Connection

from orchestrator import explain
from orchestrator.api import pages, schemas
from orchestrator.api.problems import problems
from orchestrator.api.requests import Once, Outcome
from orchestrator.api.runs import accepted, start_crawl
from orchestrator.api.security import Ours, Routes
from orchestrator.domain import Role
from orchestrator.errors import InvalidArgumentsError
from orchestrator.insights import FiringFilter
from orchestrator.schedule import parse, read_zone

routes: Final = Routes("schedules")

_MOST_FIRES: Final = 500
_LONGEST_LOOK: Final = timedelta(days=366)
_NEVER: Final = datetime(schemas.LAST_YEAR + 1, 12, 31, tzinfo=UTC)


# --- Reading -----------------------------------------------------------------------------------------------------


@routes.get("/schedules", response_model=schemas.Page[schemas.Schedule], responses=problems())
def list_schedules(ours: Ours, query: Annotated[schemas.ScheduleQuery, Query()]) -> schemas.Page[schemas.Schedule]:
    """List schedules as they were last read, those that fire next first."""
    position = pages.decode(query.cursor, query.filters, pages.maybe_moment, pages.number)
    found = ours.insights.page_schedules(state=query.state, limit=query.limit + 1, after=position)
    items, following = pages.paged(found, query.limit, lambda view: (view.next_fire_at, view.task_id), query.filters)
    return schemas.Page[schemas.Schedule](
        items=list(map(schemas.Schedule.model_validate, items)), next_cursor=following
    )


@routes.get("/schedules/{task_id}", response_model=schemas.Schedule, responses=problems(404))
def show_schedule(ours: Ours, task_id: schemas.PathId) -> schemas.Schedule:
    """Tell how the schedule of a crawl task was last read."""
    return schemas.Schedule.model_validate(ours.insights.schedule(task_id))


@routes.get("/schedules/{task_id}/fire-times", response_model=schemas.FireTimes, responses=problems(404, 409))
def fire_times(
    ours: Ours,
    task_id: schemas.PathId,
    begin: Annotated[schemas.Moment | None, Query(alias="from", description="unset: now")] = None,
    end: Annotated[schemas.Moment | None, Query(alias="to", description="unset: a day later; a year at most")] = None,
) -> schemas.FireTimes:
    """Say when a schedule fires, as things stand."""
    view = ours.insights.schedule(task_id)
    canonical = view.meaning()
    first = begin or ours.insights.now()
    last = end or min(first, _NEVER - timedelta(days=1)) + timedelta(days=1)
    if not timedelta() <= last - first <= _LONGEST_LOOK:
        raise InvalidArgumentsError("to must lie after from, by a year at most")
    fires = list(islice(parse(canonical).fires(first, last, read_zone(view.zone)), _MOST_FIRES + 1))
    return schemas.FireTimes(
        task_id=task_id,
        canonical=canonical,
        zone=view.zone,
        fires=fires[:_MOST_FIRES],
        truncated=len(fires) > _MOST_FIRES,
    )


@routes.get("/firings", response_model=schemas.Page[schemas.Firing], responses=problems())
def list_firings(ours: Ours, query: Annotated[schemas.FiringQuery, Query()]) -> schemas.Page[schemas.Firing]:
    """List what became of slots, newest slot first; a range of slots has its place where it begins."""
    wanted = query.filters
    position = pages.decode(query.cursor, wanted, pages.moment, pages.moment, pages.number)
    since = query.since or (position[0] if position else pages.window_of(ours))
    after = position[1:] if position else None
    found = ours.insights.page_firings(FiringFilter(**wanted | {"since": since}), limit=query.limit + 1, after=after)
    items, following = pages.paged(found, query.limit, lambda each: (since, each.scheduled_for, each.task_id), wanted)
    return schemas.Page[schemas.Firing](items=list(map(schemas.Firing.model_validate, items)), next_cursor=following)


@routes.get("/why", response_model=schemas.Why, responses=problems())
def why(
    ours: Ours,
    task_id: Annotated[int, Query(ge=1, le=schemas.MAX_BIGINT)],
    at: Annotated[schemas.Moment, Query(description="the moment")],
) -> schemas.Why:
    """Say why a crawl task did, or did not, run by its schedule at a moment."""
    most = ours.settings.scheduler.max_queued
    return schemas.Why.model_validate(explain.why(ours.insights, ours.timetable, task_id, at, max_queued=most))


# --- Trying out --------------------------------------------------------------------------------------------------


@routes.post("/schedules/preview", Role.VIEWER, response_model=schemas.Preview, responses=problems())
def preview(ours: Ours, wish: schemas.PreviewRequest) -> schemas.Preview:
    """Say what a schedule's text means, and when it fires next; changes nothing."""
    read, zone = parse(wish.text), read_zone(wish.zone or ours.settings.timezone)
    fires = list(islice(read.fires(wish.after or datetime.now(UTC), _NEVER, zone), wish.count))
    return schemas.Preview(text=wish.text, canonical=read.canonical, zone=zone.key, fires=fires)


# --- Operating ---------------------------------------------------------------------------------------------------


@routes.post("/schedules/{task_id}/pause", Role.OPERATOR, response_model=schemas.Paused, responses=problems(404, 409))
def pause(task_id: schemas.PathId, once: Once, change: schemas.Change | None = None) -> JSONResponse:
    """Have every slot skipped, and recorded so, until it is resumed; runs that exist go on."""
    reason = change.reason if change else None

    def act(connection: Connection) -> Outcome:
        once.ours.ledger.schedules.pause(task_id, actor=once.actor, reason=reason, within=connection)
        return _is_paused(task_id, paused=True)

    return once.once(change, act)


@routes.post("/schedules/{task_id}/resume", Role.OPERATOR, response_model=schemas.Paused, responses=problems(404, 409))
def resume(task_id: schemas.PathId, once: Once, change: schemas.Change | None = None) -> JSONResponse:
    """Have slots fire again from now on."""
    reason = change.reason if change else None

    def act(connection: Connection) -> Outcome:
        once.ours.ledger.schedules.resume(task_id, actor=once.actor, reason=reason, within=connection)
        return _is_paused(task_id, paused=False)

    return once.once(change, act)


def _is_paused(task_id: int, *, paused: bool) -> Outcome:
    return Outcome(HTTPStatus.OK, schemas.Paused(task_id=task_id, paused=paused, href=f"/v1/schedules/{task_id}"))


@routes.post(
    "/schedules/{task_id}/trigger",
    Role.OPERATOR,
    status_code=HTTPStatus.ACCEPTED,
    response_model=schemas.AcceptedRun,
    responses={200: {"model": schemas.AcceptedRun, "description": "return_existing: the run that is not over"}}
    | problems(404, 409),
)
def trigger(task_id: schemas.PathId, once: Once, wish: schemas.TriggerWish | None = None) -> JSONResponse:
    """Run a crawl task now, whatever its schedule; the same as POST /v1/runs."""
    wish = wish or schemas.TriggerWish()
    return start_crawl(schemas.NewCrawlRun(task_id=task_id, on_conflict=wish.on_conflict, reason=wish.reason), once)


@routes.post(
    "/schedules/{task_id}/backfill",
    Role.OPERATOR,
    status_code=HTTPStatus.ACCEPTED,
    response_model=schemas.BackfillResult,
    responses={200: {"model": schemas.BackfillResult, "description": "dry_run: what would start"}} | problems(404, 409),
)
def backfill(task_id: schemas.PathId, wish: schemas.Backfill, once: Once) -> JSONResponse:
    """Run the past slots of a schedule, as it is now, that started no run."""
    ours = once.ours

    def act(connection: Connection) -> Outcome:
        # All on this one connection: with another for each of them forty such requests would want eighty.
        view, now = ours.insights.schedule(task_id, connection), ours.insights.now(connection)
        slots = ours.timetable.past_slots(view.meaning(), view.zone, wish.since, wish.until, now=now)
        if wish.dry_run:
            return _backfill_preview(connection, once, task_id, slots)
        ledger = ours.ledger.schedules
        unsent = ledger.backfill(task_id, slots, actor=once.actor, reason=wish.reason, within=connection)
        runs = [accepted(wake_up) for wake_up in unsent.wake_ups]
        result = schemas.BackfillResult(task_id=task_id, dry_run=False, to_start=len(runs), slots=[], runs=runs)
        return Outcome(
            HTTPStatus.ACCEPTED, result, location=f"/v1/runs?task_id={task_id}&trigger=backfill", unsent=unsent
        )

    return once.once(wish, act)


def _backfill_preview(connection: Connection, once: Once, task_id: int, slots: Sequence[datetime]) -> Outcome:
    so_far = once.ours.insights.became_of(task_id, slots, connection)
    lacking = sum(slot not in so_far or so_far[slot].run_id is None for slot in slots)
    listed = [
        schemas.BackfillSlot.model_validate({"slot": slot, "firing": so_far.get(slot)}, from_attributes=True)
        for slot in slots
    ]
    result = schemas.BackfillResult(task_id=task_id, dry_run=True, to_start=lacking, slots=listed, runs=[])
    return Outcome(HTTPStatus.OK, result)
