"""Commands about schedules and their slots: schedules, schedule …, firings, why."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Annotated, Final
from uuid import UUID
from zoneinfo import ZoneInfo

import typer

from orchestrator import explain
from orchestrator.bootstrap import Services
from orchestrator.cli.moments import HOW_TO_WRITE, read_moment
from orchestrator.cli.output import print_document, print_table, printable, say, stamp
from orchestrator.cli.runs import enqueue, run_now, warn_if_unattended
from orchestrator.cli.session import SHOWN, AsJson, Limit, Reason, Task, TaskId, Wait, actor, session
from orchestrator.domain import CrawlArguments, FiringOutcome, ScheduleState
from orchestrator.errors import UnreadableScheduleError
from orchestrator.insights import FiringFilter, FiringView, ScheduleView
from orchestrator.schedule import parse, read_zone
from orchestrator.settings import current

app: Final = typer.Typer()
schedule: Final = typer.Typer(no_args_is_help=True, help="Try a schedule out; pause, resume, trigger and backfill one.")
app.add_typer(schedule, name="schedule")

_NEVER: Final = datetime.max.replace(tzinfo=UTC)


# --- Reading -------------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: [bold]orchestrator schedules[/], [bold]orchestrator schedules --state invalid[/], "
    "[bold]orchestrator schedules --task 7 --json[/]"
)
def schedules(
    *,
    state: Annotated[ScheduleState | None, typer.Option("--state", help="Only schedules in this state.")] = None,
    task_id: Task = None,
    limit: Limit = SHOWN,
    as_json: AsJson = False,
) -> None:
    """List schedules as they were last read, those that fire next first."""
    with session() as ours:
        views = ours.insights.page_schedules(limit=limit, state=state, task_id=task_id)
    if as_json:
        print_document({"schedules": views})
        return
    rows = [
        (view.task_id, view.state, view.text, view.canonical, view.zone, view.next_fire_at, *_last(view), _note(view))
        for view in views
    ]
    print_table(["task", "state", "schedule", "means", "zone", "next fire", "last slot", "", "note"], rows)


def _last(view: ScheduleView) -> tuple[datetime | None, str]:
    last = view.last_firing
    return (None, "") if last is None else (last.through or last.scheduled_for, _outcome(last))


def _outcome(firing: FiringView) -> str:
    return firing.outcome + (f" ({firing.reason})" if firing.reason else "")


def _note(view: ScheduleView) -> str | None:
    if view.paused_at is None:
        return view.problem
    return f"paused by {view.paused_by}" + (f": {view.pause_reason}" if view.pause_reason else "")


@app.command(
    epilog="Examples: [bold]orchestrator firings --outcome missed[/], "
    "[bold]orchestrator firings --task 7 --since 2026-11-23T00:00Z[/]"
)
def firings(
    *,
    task_id: Task = None,
    outcome: Annotated[FiringOutcome | None, typer.Option("--outcome", help="Only slots with this outcome.")] = None,
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help=f"First slot: {HOW_TO_WRITE}.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Last slot, written alike.")] = None,
    limit: Limit = SHOWN,
    as_json: AsJson = False,
) -> None:
    """List what became of slots, newest slot first; a range of slots has its place where it begins."""
    with session() as ours:
        read = _reader(ours, task_id)
        first, last = (None if text is None else read(text) for text in (since, until))
        views = ours.insights.page_firings(FiringFilter(task_id, outcome, first, last), limit=limit)
    if as_json:
        print_document({"firings": views})
        return
    rows = [
        (each.scheduled_for, each.through, each.task_id, each.outcome, each.reason, each.run_id, each.claimed_at)
        for each in views
    ]
    print_table(["slot", "through", "task", "outcome", "reason", "run", "claimed"], rows)


@app.command(
    epilog="Examples: [bold]orchestrator why 7 --at 03:00[/], [bold]orchestrator why 7 --at '2026-11-23 03:00'[/]"
)
def why(
    task_id: TaskId,
    *,
    at: Annotated[str, typer.Option("--at", metavar="TIME", help=f"The moment: {HOW_TO_WRITE}.")],
    as_json: AsJson = False,
) -> None:
    """Say why a crawl task did, or did not, run by its schedule at some moment."""
    with session() as ours:
        moment, most = _reader(ours, task_id)(at), ours.settings.scheduler.max_queued
        explanation = explain.why(ours.insights, ours.timetable, task_id, moment, max_queued=most)
    if as_json:
        print_document(explanation)
        return
    for sentence in explanation.sentences:
        typer.echo(printable(sentence))


def _reader(ours: Services, task_id: int | None) -> Callable[[str], datetime]:
    """Return what reads moments, in the zone of a schedule or in the default one."""
    known = [] if task_id is None else ours.insights.page_schedules(limit=1, task_id=task_id)
    try:
        zone = read_zone(known[0].zone if known else ours.settings.timezone)
    except UnreadableScheduleError:  # which is why the schedule is invalid
        zone = read_zone(ours.settings.timezone)
    return partial(read_moment, zone=zone, now=ours.insights.now())


# --- Trying out ----------------------------------------------------------------------------------------------------


@schedule.command(
    epilog="Examples: [bold]orchestrator schedule preview '每天 03:00' --zone Asia/Shanghai[/], "
    "[bold]orchestrator schedule preview '*/15 9-17 * * mon-fri' --count 20[/]. Needs no database."
)
def preview(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A schedule: words, or five cron fields.")],
    *,
    zone: Annotated[str | None, typer.Option("--zone", help="IANA time zone; default: the setting's.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=1000, help="Fires to show.")] = 5,
    after: Annotated[str | None, typer.Option("--after", metavar="TIME", help="Show those after this moment.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a schedule's text means, and when it fires next."""
    read, where, now = parse(text), read_zone(zone or current().timezone), datetime.now(UTC)
    moment = now if after is None else read_moment(after, where, now)
    fires = list(islice(read.fires(moment, _NEVER, where), count))
    if as_json:
        pairs = [{"at": fire, "local": fire.astimezone(where)} for fire in fires]
        print_document({"text": text, "canonical": read.canonical, "zone": where.key, "fires": pairs})
        return
    typer.echo(printable(f"“{text}” means {read.canonical}, in {where.key}"))
    print_table([where.key, "UTC"], [(_local(fire, where), fire) for fire in fires])
    if read.timeless and current().scheduler.spread:
        say("it names no time of day: each crawl task moves it by some minutes of its own (SCHEDULER__SPREAD)")


# --- Operating -----------------------------------------------------------------------------------------------------


@schedule.command(epilog="Example: [bold]orchestrator schedule pause 7 --reason 'site is down'[/]")
def pause(task_id: TaskId, *, reason: Reason = None) -> None:
    """Have every slot skipped until it is resumed; runs that exist go on."""
    with session() as ours:
        ours.ledger.schedules.pause(task_id, actor=actor(), reason=reason)
    typer.echo(f"the schedule of crawl task {task_id} is paused")


@schedule.command(epilog="Example: [bold]orchestrator schedule resume 7[/]. Slots before now stay skipped.")
def resume(task_id: TaskId, *, reason: Reason = None) -> None:
    """Have slots fire again from now on."""
    with session() as ours:
        ours.ledger.schedules.resume(task_id, actor=actor(), reason=reason)
        view = ours.insights.schedule(task_id)
    ahead = f"; it fires next at {stamp(view.next_fire_at)}" if view.next_fire_at else ""
    typer.echo(f"the schedule of crawl task {task_id} is resumed{ahead}")


@schedule.command(epilog="Example: [bold]orchestrator schedule trigger 7 --wait[/]. The same as orchestrator run 7.")
def trigger(task_id: TaskId, *, wait: Wait = False, as_json: AsJson = False) -> None:
    """Run a crawl task now, whatever its schedule."""
    run_now(task_id, wait=wait, as_json=as_json)


@schedule.command(
    epilog="Example: [bold]orchestrator schedule backfill 7 --from 2026-11-20 --to '2026-11-22 23:59'[/] lists the "
    "slots; the same with [bold]--yes[/] starts them."
)
def backfill(
    task_id: TaskId,
    *,
    since: Annotated[str, typer.Option("--from", metavar="TIME", help=f"The first slot: {HOW_TO_WRITE}.")],
    until: Annotated[str, typer.Option("--to", metavar="TIME", help="The last slot, written alike.")],
    limit: Limit = SHOWN,
    reason: Reason = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start the runs; without it, only list the slots.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the past slots of a schedule, as it is now, that started no run; list them first."""
    with session() as ours:
        view = ours.insights.schedule(task_id)
        slots = _slots(ours, view, since, until)
        if yes:
            _start(ours, task_id, slots, reason, as_json=as_json)
        else:
            _list(view, slots, ours.insights.became_of(task_id, slots), limit, as_json=as_json)


def _slots(ours: Services, view: ScheduleView, since: str, until: str) -> list[datetime]:
    """Return the slots of a schedule from one moment to another, both included.

    Raises:
        InvalidArgumentsError: there are none, or too many, or some are to come.
        IllegalTransitionError: the schedule has no slots at all.
    """
    read = _reader(ours, view.task_id)
    return ours.timetable.past_slots(view.meaning(), view.zone, read(since), read(until), now=ours.insights.now())


def _list(
    view: ScheduleView, slots: Sequence[datetime], so_far: Mapping[datetime, FiringView], limit: int, *, as_json: bool
) -> None:
    """Print what a backfill would start."""
    lacking = sum(slot not in so_far or so_far[slot].run_id is None for slot in slots)
    if as_json:
        listed = [{"slot": slot, "firing": so_far.get(slot)} for slot in slots]
        print_document({"task_id": view.task_id, "dry_run": True, "to_start": lacking, "slots": listed})
        return
    zone = read_zone(view.zone)
    rows = [
        (slot, _local(slot, zone), _outcome(so_far[slot]) if slot in so_far else "no record", _run_id(so_far.get(slot)))
        for slot in slots[:limit]
    ]
    print_table(["slot", view.zone, "so far", "run"], rows, more=len(slots) - limit)
    typer.echo(f"{lacking} of {len(slots)} slots would start a run; nothing happens without --yes")


def _run_id(firing: FiringView | None) -> UUID | None:
    return None if firing is None else firing.run_id


def _start(ours: Services, task_id: int, slots: Sequence[datetime], reason: str | None, *, as_json: bool) -> None:
    """Backfill slots, and wake workers for the runs."""
    unsent = ours.ledger.schedules.backfill(task_id, slots, actor=actor(), reason=reason)
    enqueued = unsent.batch is None or enqueue(ours, unsent.wake_ups, unsent.batch)
    run_ids = [wake_up.run_id for wake_up in unsent.wake_ups]
    if as_json:
        print_document({"task_id": task_id, "dry_run": False, "runs": run_ids, "enqueued": enqueued})
    else:
        how = "enqueued" if enqueued else "recorded"
        typer.echo(f"{len(run_ids)} runs of crawl task {task_id} are {how}, for {len(slots)} slots")
    warn_if_unattended(ours, CrawlArguments(task_id))


def _local(moment: datetime, zone: ZoneInfo) -> str:
    return f"{moment.astimezone(zone):%a %Y-%m-%d %H:%M:%S %z}"
