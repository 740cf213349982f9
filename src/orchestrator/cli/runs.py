"""Commands about runs: run, analyze, plan, runs, show, retry, cancel."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from operator import attrgetter
from typing import Annotated, Final, Self, TypeVar
from uuid import UUID, uuid4

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from orchestrator import explain
from orchestrator.bootstrap import Services
from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE
from orchestrator.cli.output import STYLES, console, print_document, print_table, printable, say, stamp
from orchestrator.cli.session import (
    FAILED,
    INTERRUPTED,
    SHOWN,
    AsJson,
    Limit,
    Reason,
    Task,
    TaskId,
    Wait,
    actor,
    session,
)
from orchestrator.domain import (
    TERMINAL,
    AnalysisArguments,
    Arguments,
    CrawlArguments,
    DispatchState,
    NewRun,
    RunKind,
    RunState,
    SkipReason,
    Trigger,
    WakeUp,
    traceparent_of,
)
from orchestrator.errors import (
    DatabaseUnavailableError,
    InvalidArgumentsError,
    PublishError,
    RunNotFoundError,
    TransientError,
)
from orchestrator.insights import RunFilter, RunView

app: Final = typer.Typer()

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="A run's id, or at least its first 4 hex digits.")]

Answer = TypeVar("Answer")

_POLL: Final = 0.3  # seconds
_MOST: Final = 200  # calls, and events, of a run that are shown
_ID: Final = re.compile(r"[0-9a-f]{4,32}")


# --- Starting work -----------------------------------------------------------------------------------------------


@app.command(epilog="Examples: [bold]orchestrator run 7[/], [bold]orchestrator run 7 --wait[/]")
def run(
    task_id: TaskId,
    *,
    wait: Wait = False,
    run_id: Annotated[
        UUID | None, typer.Option("--id", help="The run's id; asking twice with one id is one run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a crawl task now: one message to the Extractor for each of its data sources."""
    run_now(task_id, run_id, wait=wait, as_json=as_json)


@app.command(epilog="Example: [bold]orchestrator analyze 12 13 14 --theme news --wait[/]")
def analyze(
    data_source_ids: Annotated[list[int], typer.Argument(metavar="DATA_SOURCE_ID…", help="The sites to analyse.")],
    *,
    theme: Annotated[str, typer.Option("--theme", help="The theme to analyse them for.")],
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Have the Discovery Service analyse data sources for a theme."""
    new = [_new_run(AnalysisArguments(each, theme)) for each in dict.fromkeys(data_source_ids)]
    with session() as ours:
        _start(ours, new, wait=wait, render=_render_runs if as_json else None)


def run_now(task_id: int, run_id: UUID | None = None, *, wait: bool, as_json: bool) -> None:
    """Start a run of a crawl task, and watch it if wanted."""
    new = _new_run(CrawlArguments(task_id), run_id)
    with session() as ours:
        _start(ours, [new], wait=wait, render=_render_run if as_json else None)


def _new_run(arguments: Arguments, run_id: UUID | None = None) -> NewRun:
    run_id = run_id or uuid4()
    return NewRun(run_id, arguments, Trigger.CLI, traceparent_of(run_id))


Render = Callable[[Sequence[RunView], bool], None]
"""Prints runs, and whether their wake-ups were enqueued, as one JSON document."""


def _render_run(views: Sequence[RunView], enqueued: bool) -> None:  # noqa: FBT001 -- a plain callback
    print_document({"run": _run_document(views[0]), "enqueued": enqueued})


def _render_runs(views: Sequence[RunView], enqueued: bool) -> None:  # noqa: FBT001 -- a plain callback
    print_document({"runs": [_run_document(view) for view in views], "enqueued": enqueued})


def _start(ours: Services, new: Sequence[NewRun], *, wait: bool, render: Render | None) -> None:
    """Commit runs, wake workers, and, if wanted, watch to the end."""
    run_ids = [each.run_id for each in new]
    # The reply to a commit may be lost, so the ledger is asked again by the same ids, which makes no second run.
    _insist(lambda: _accept(ours, new), run_ids[0])
    wake_ups = [WakeUp(each.run_id, each.arguments, each.traceparent) for each in new]
    enqueued = enqueue(ours, wake_ups)
    if render is None:
        for each in new:
            typer.echo(f"run {each.run_id} is {'enqueued' if enqueued else 'recorded'}: {each.arguments.what}")
    warn_if_unattended(ours, new[0].arguments)
    if wait:
        _watch(ours, run_ids)
    if not wait and render is None:
        return
    views = _insist(lambda: [ours.insights.run(run_id) for run_id in run_ids], run_ids[0])
    if render is not None:
        render(views, enqueued)
    else:
        for view in views:
            _tell_outcome(view)
    if wait and any(view.state is not RunState.SUCCEEDED for view in views):
        raise typer.Exit(FAILED)


def _insist(ask: Callable[[], Answer], run_id: UUID) -> Answer:
    """Ask the ledger something, up to three times.

    Raises:
        DatabaseUnavailableError: it stayed away; the run may have been recorded all the same.
    """
    for pause in (1.0, 2.0):
        with suppress(DatabaseUnavailableError):
            return ask()
        time.sleep(pause)
    try:
        return ask()
    except DatabaseUnavailableError as error:
        way_out = f"`orchestrator show {run_id}` tells whether it was recorded, and what became of it"
        raise DatabaseUnavailableError(f"{error}; {way_out}") from error


def _accept(ours: Services, new: Sequence[NewRun]) -> None:
    """Commit runs, all or none."""
    for each, created in zip(new, ours.ledger.runs.accept_all(new), strict=True):
        if not created:
            _require_equal(each, ours.insights.run(each.run_id))


def _require_equal(new: NewRun, kept: RunView) -> None:
    if kept.arguments != new.arguments:
        raise InvalidArgumentsError(f"--id {new.run_id} belongs to another run already: {kept.what}")


def enqueue(ours: Services, wake_ups: Sequence[WakeUp], batch: int | None = None) -> bool:
    """Wake workers for committed runs, maybe of one batch; if the broker does not take it, say that the pulse will."""
    try:
        ours.sender.wake(wake_ups)
    except PublishError as error:
        say(
            f"recorded, not enqueued yet ({error}); the pulse of any worker or beat enqueues it once the broker is back"
        )
        return False
    # The broker has them: what is not noted here is woken a second time, which does no harm.
    with suppress(TransientError):
        if batch is None:
            ours.ledger.runs.mark_enqueued([wake_up.run_id for wake_up in wake_ups])
        else:
            ours.ledger.runs.mark_sent(batch)
    return True


def warn_if_unattended(ours: Services, arguments: Arguments) -> None:
    """Say so where runs with such arguments wait for a worker that is not there."""
    queue = CRAWL_QUEUE if isinstance(arguments, CrawlArguments) else ANALYSIS_QUEUE
    # A hint: what was asked for is done, whether it can be given or not.
    with suppress(DatabaseUnavailableError):
        if explain.attended(ours.insights.nodes(), queue):
            return
        say(f"warning: no living worker consumes {queue}; start one: `orchestrator worker`, or `orchestrator up`")


# --- Watching ------------------------------------------------------------------------------------------------------


class _Watch:
    """Progress on standard error: a bar on a terminal, else a line for each change."""

    def __init__(self) -> None:
        stderr = Console(stderr=True, markup=False, highlight=False)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeElapsedColumn(), console=stderr) if stderr.is_terminal else None
        self._task = self._bar.add_task("", total=None) if self._bar else None
        self._said = ""

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def tell(self, words: str, done: int = 0, total: int | None = None) -> None:
        """Show how far it is; ``words`` change with the state, not with every step."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=printable(words), completed=done, total=total)
        elif words != self._said:
            say(words)
        self._said = words


def _watch(ours: Services, run_ids: Sequence[UUID]) -> None:
    """Wait until all runs are over. Ctrl-C ends the watching, not the runs."""
    try:
        with _Watch() as progress:
            while not _look(ours, run_ids, progress):
                time.sleep(_POLL)
    except KeyboardInterrupt:
        watched = f"`orchestrator show {run_ids[0]}`" if len(run_ids) == 1 else "`orchestrator runs`"
        say(f"left running; see how it goes: {watched}")
        raise typer.Exit(INTERRUPTED) from None


def _look(ours: Services, run_ids: Sequence[UUID], progress: _Watch) -> bool:
    """Show how far the runs are; return whether all are over."""
    try:
        if len(run_ids) == 1:
            view = ours.insights.run(run_ids[0])
            progress.tell(_standing(view), view.published + view.skipped, view.total or None)
            return view.state in TERMINAL
        left = ours.insights.unfinished(run_ids)
    except DatabaseUnavailableError as error:
        # The runs go on without us; so does the watching, as soon as it can.
        progress.tell(f"waiting: {error}")
        return False
    done = len(run_ids) - left
    progress.tell(f"{done} of {len(run_ids)} runs are over", done, len(run_ids))
    return not left


def _standing(view: RunView) -> str:
    parts: list[str] = [view.state]
    if view.kind is RunKind.SITE_ANALYSIS and view.attempts:
        parts.append(f"call {view.attempts}")
    if view.state is RunState.RETRYING:
        parts.append(f"{view.error_code}; next try {stamp(view.next_attempt_at)}")
    return ", ".join(parts)


def _tell_outcome(view: RunView) -> None:
    reason = f": {view.error_message} ({view.error_code})" if view.error_code else ""
    console().print(Text(printable(f"run {view.id} {view.state}, {_counts(view)}{reason}"), STYLES[view.state]))


# --- Reading -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: [bold]orchestrator plan 7[/]. Sends nothing.")
def plan(
    task_id: TaskId,
    *,
    limit: Limit = SHOWN,
    as_json: AsJson = False,
) -> None:
    """Say what a run of a crawl task would dispatch now, and what it would skip and why."""
    with session() as ours, ours.database.transaction() as connection:
        rows = ours.catalog.read_plan(connection, task_id)
    dispatched = [row for row in rows if row[1] is not None]
    skipped = [source for source, config in rows if config is None]
    if as_json:
        print_document(
            {
                "task_id": task_id,
                "total": len(rows),
                "dispatched": len(dispatched),
                "skipped": len(skipped),
                "limit": limit,
                "dispatches": [{"data_source_id": each[0], "crawl_config_id": each[1]} for each in dispatched[:limit]],
                "skips": [{"data_source_id": each, "reason": SkipReason.NO_ACTIVE_CONFIG} for each in skipped[:limit]],
            }
        )
        return
    typer.echo(f"crawl task {task_id}: {len(rows)} data sources, {len(dispatched)} to dispatch, {len(skipped)} to skip")
    if dispatched:
        print_table(["data source", "crawl config"], dispatched[:limit], more=len(dispatched) - limit)
    if skipped:
        rows_skipped = [(each, SkipReason.NO_ACTIVE_CONFIG) for each in skipped[:limit]]
        print_table(["data source", "skipped because"], rows_skipped, more=len(skipped) - limit)


@app.command(epilog="Examples: [bold]orchestrator runs --state failed[/], [bold]orchestrator runs --task 7 --json[/]")
def runs(
    *,
    kind: Annotated[RunKind | None, typer.Option("--kind", help="Only runs of this kind.")] = None,
    state: Annotated[RunState | None, typer.Option("--state", help="Only runs in this state.")] = None,
    task_id: Task = None,
    limit: Limit = SHOWN,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    with session() as ours:
        views = ours.insights.search_runs(RunFilter(kind, state, task_id), limit=limit).runs
    if as_json:
        print_document({"runs": [_run_document(view) for view in views]})
        return
    rows = [(view.id, view.state, view.what, _counts(view), stamp(view.created_at), view.error_code) for view in views]
    print_table(["run", "state", "what", "progress", "created", "error"], rows)


@app.command(epilog="Example: [bold]orchestrator show 3f2a[/]. The first hex digits of the id are enough.")
def show(run_id: RunId, *, limit: Limit = SHOWN, as_json: AsJson = False) -> None:
    """Tell everything about a run: what it waits for, its calls, what happened and what was skipped."""
    with session() as ours:
        view = ours.insights.run(_resolve(ours, run_id))
        wait = explain.waits_for(ours.insights, view)
        attempts = ours.insights.page_attempts(view.id, limit=_MOST)
        events = ours.insights.page_events(view.id, limit=_MOST)
        reasons = ours.insights.skip_reasons(view.id)
        skips = ours.insights.page_dispatches(view.id, limit=limit, state=DispatchState.SKIPPED)
    if as_json:
        shown = {
            "waits_for": wait.sentence,
            "waits_for_code": wait.code,
            "attempts": attempts,
            "events": events,
            "skip_reasons": reasons,
        }
        print_document({"run": _run_document(view)} | shown | {"skips": skips})
        return
    skipped = [("skipped because", f"{reason}: {count}") for reason, count in reasons.items()]
    print_table(["run", str(view.id)], [*_facts(view), *skipped, ("waits for", wait.sentence)])
    if attempts:
        columns = ["number", "started_at", "outcome", "status", "seconds", "code", "message", "next_attempt_at"]
        print_table(columns, [attrgetter(*columns)(each) for each in attempts], title="calls to Discovery")
    columns = ["at", "event", "state", "code", "message"]
    print_table(columns, [attrgetter(*columns)(each) for each in events], title="what happened")
    if skips:
        rows = [(each.data_source_id, each.reason) for each in skips]
        print_table(["data source", "skipped because"], rows, more=sum(reasons.values()) - len(skips))


def _facts(view: RunView) -> Iterator[tuple[str, object]]:
    yield "what", view.what
    yield "state", view.state
    yield "progress", _counts(view)
    if view.error_code:
        yield "error", f"{view.error_message} ({view.error_code})"
    yield "started by", view.trigger
    if view.scheduled_for is not None:
        yield "slot", view.scheduled_for
    for name in ("retry_of", "created_at", "started_at", "next_attempt_at", "finished_at"):
        if (value := getattr(view, name)) is not None:
            yield name.removesuffix("_at").replace("_", " "), value
    yield "traceparent", view.traceparent


# --- Operating -----------------------------------------------------------------------------------------------------


@app.command(epilog="Example: [bold]orchestrator retry 3f2a --reason 'Discovery is back'[/]")
def retry(run_id: RunId, *, reason: Reason = None, as_json: AsJson = False) -> None:
    """Put a failed run back in the queue; repeat a succeeded or canceled one as a new run."""
    with session() as ours:
        view = ours.insights.run(_resolve(ours, run_id))
        wake_up = ours.ledger.runs.retry(view.id, Trigger.CLI, actor=actor(), reason=reason)
        enqueued = enqueue(ours, [wake_up])
        if as_json:
            _render_run([ours.insights.run(wake_up.run_id)], enqueued)
        elif wake_up.run_id == view.id:
            typer.echo(f"run {view.id} is back in the queue: {view.what}")
        else:
            typer.echo(f"run {view.id} is {view.state}, which is final: the same again is run {wake_up.run_id}")
        warn_if_unattended(ours, wake_up.arguments)


@app.command(epilog="Example: [bold]orchestrator cancel 3f2a --reason 'wrong task'[/]")
def cancel(run_id: RunId, *, reason: Reason = None, as_json: AsJson = False) -> None:
    """Cancel a run: what is not published yet is skipped."""
    with session() as ours:
        resolved = _resolve(ours, run_id)
        ours.ledger.runs.cancel(resolved, actor=actor(), reason=reason)
        view = ours.insights.run(resolved)
    if as_json:
        print_document({"run": _run_document(view)})
    else:
        typer.echo(f"run {view.id} is canceled: {view.what}, {_counts(view)}")


# --- Ids and words -------------------------------------------------------------------------------------------------


def _resolve(ours: Services, text: str) -> UUID:
    """Return the id of the one run that begins like this.

    Raises:
        InvalidArgumentsError: it is no beginning of an id, or that of several runs.
        RunNotFoundError: no run begins so.
    """
    digits = text.replace("-", "").lower()
    if not _ID.fullmatch(digits):
        raise InvalidArgumentsError(f"{text!r} is no run id: give all of it, or at least its first 4 hex digits")
    matches = ours.insights.matching(digits)
    if not matches:
        raise RunNotFoundError(f"there is no run {text}")
    if len(matches) > 1:
        raise InvalidArgumentsError(f"several runs begin with {text}, for instance {matches[0]} and {matches[1]}")
    return matches[0]


def _counts(view: RunView) -> str:
    if view.kind is RunKind.SITE_ANALYSIS:
        return f"{view.attempts} call{'' if view.attempts == 1 else 's'}"
    return f"{view.published} published, {view.skipped} skipped of {view.total}"


def _run_document(view: RunView) -> dict[str, object]:
    return asdict(view) | {"pending": view.pending}
