"""The command line: thin over the services, tables and bars for people, ``--json`` for scripts.

Results go to standard output; warnings, progress and logs to standard error. Exit codes: 0, 1 failed,
2 usage or configuration, 130 interrupted. An error of ours is one line, never a traceback. Times are UTC.
"""

import ctypes
import getpass
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, NoReturn, Self
from uuid import UUID, uuid4

import typer
from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from orchestrator import __version__, bootstrap, doctor, migrations
from orchestrator.bootstrap import Services
from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE
from orchestrator.domain import (
    TERMINAL,
    AnalysisArguments,
    Arguments,
    CrawlArguments,
    NewRun,
    RunKind,
    RunState,
    SkipReason,
    Trigger,
    WakeUp,
    traceparent_of,
)
from orchestrator.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidArgumentsError,
    OrchestratorError,
    PublishError,
    RunNotFoundError,
    TransientError,
)
from orchestrator.insights import NodeView, RunView
from orchestrator.settings import CONFIG_VARIABLE, DEFAULT_CONFIG_FILE, current, variables
from orchestrator.telemetry import configure_logging

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

_POLL: Final = 0.3  # seconds
_SHOWN: Final = 20
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_ID: Final = re.compile(r"[0-9a-f]{4,32}")
_STYLES: Final[dict[str, str]] = {
    RunState.QUEUED: "cyan",
    RunState.RUNNING: "blue",
    RunState.RETRYING: "yellow",
    RunState.SUCCEEDED: "green",
    RunState.FAILED: "bold red",
    RunState.CANCELED: "magenta",
    doctor.Status.OK: "green",
    doctor.Status.WARN: "yellow",
    doctor.Status.FAIL: "bold red",
}

app: Final = typer.Typer(
    name="orchestrator",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start here: [bold]orchestrator doctor[/] says whether everything fits, "
    "[bold]orchestrator up[/] starts a worker and a beat, [bold]orchestrator run 7 --wait[/] runs crawl task 7.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Wait = Annotated[bool, typer.Option("--wait", help="Watch until it is over; exit 1 unless it succeeded.")]
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="A run's id, or at least its first 4 hex digits.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why, for the audit log.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="Rows to show at most.")]


def main() -> None:
    """Run the command line and exit."""
    try:
        app(prog_name="orchestrator")
    except OrchestratorError as error:
        _fail(str(error), USAGE if isinstance(error, ConfigurationError | InvalidArgumentsError) else FAILED)
    except DBAPIError as error:
        # The server's sentence only: the driver's own quotes the address, and that holds the password.
        complaint = getattr(getattr(error.orig, "diag", None), "message_primary", None)
        _fail(f"PostgreSQL: {complaint or type(error.orig).__name__}; `orchestrator doctor` says what to do", FAILED)


def _fail(sentence: str, code: int) -> NoReturn:
    _say(f"orchestrator: {sentence}")
    sys.exit(code)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 -- typer's callbacks take the value
    if wanted:
        typer.echo(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """The work engine behind a web-crawling platform."""


# --- Setting up and running processes ------------------------------------------------------------------------


@app.command(epilog="Example: [bold]orchestrator migrate[/]. Safe to repeat, and by several processes at once.")
def migrate() -> None:
    """Create the ledger's tables, or bring them up to date."""
    _quieten()
    try:
        bootstrap.home.open()
        changed = bootstrap.migrate()
        typer.echo("the ledger is migrated" if changed else "the ledger is up to date")
    finally:
        bootstrap.home.close()


@app.command("doctor", epilog="Examples: [bold]orchestrator doctor[/], [bold]orchestrator doctor --settings[/]")
def examine(
    *,
    settings: Annotated[bool, typer.Option("--settings", help="List every setting instead.")] = False,
    beat: Annotated[bool, typer.Option("--beat", help="Only ask whether a beat ticked lately.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what does not fit, and how to put it right; exit 1 if anything fails."""
    if settings:
        _show_settings(as_json=as_json)
        return
    _quieten("ERROR")  # what the checks notice is in their findings
    try:
        ours = bootstrap.services()
        findings = [doctor.beats(ours)] if beat else doctor.diagnose(ours)
    finally:
        _leave()
    ok = all(finding.status is not doctor.Status.FAIL for finding in findings)
    if as_json:
        _document({"ok": ok, "findings": findings})
    else:
        rows = [(each.status, each.check, _advice(each)) for each in findings]
        _table(["", "check", "finding"], rows)
    if not ok:
        raise typer.Exit(FAILED)


def _advice(finding: doctor.Finding) -> str:
    return finding.detail + (f"\n→ {finding.remedy}" if finding.remedy else "")


def _show_settings(*, as_json: bool) -> None:
    # Not by way of current(): someone whose settings are refused wants to read this.
    listed: list[dict[str, object]] = [
        {"variable": CONFIG_VARIABLE, "default": DEFAULT_CONFIG_FILE, "description": "the settings file"},
        *(
            {"variable": name, "default": _default(field.get_default()), "description": field.description}
            for name, field in variables().items()
        ),
    ]
    if as_json:
        _document({"settings": listed})
    else:
        _table(["variable", "default", "meaning"], [tuple(each.values()) for each in listed])


def _default(value: object) -> object:
    # A default is public, whatever its type.
    return value.get_secret_value() if isinstance(value, SecretStr) else value


_PASSING: Final = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(
    context_settings=_PASSING,
    epilog="Example: [bold]orchestrator worker -Q orchestrator.crawl -c 2[/]. Every option of "
    "[bold]celery -A orchestrator.celery_app worker --help[/] is taken.",
)
def worker(context: typer.Context) -> None:
    """Become a Celery worker."""
    _become("worker", context.args)


@app.command(
    context_settings=_PASSING,
    epilog="Example: [bold]orchestrator beat[/]. Run as many as you like: none is leader, no slot fires twice. "
    "Every option of [bold]celery -A orchestrator.celery_app beat --help[/] is taken.",
)
def beat(context: typer.Context) -> None:
    """Become a Celery beat."""
    _become("beat", context.args)


def _become(program: str, arguments: Sequence[str]) -> NoReturn:
    current()  # a malformed setting is told by one line, before Celery's banner
    os.execv(sys.executable, _celery(program, arguments))  # noqa: S606 -- our own interpreter, no shell


def _celery(program: str, arguments: Sequence[str] = ()) -> list[str]:
    return [sys.executable, "-m", "celery", "--app", "orchestrator.celery_app", program, *arguments]


@app.command(epilog="Example: [bold]orchestrator up[/]. Ctrl-C stops both in good order, a second one at once.")
def up() -> None:
    """Run a worker and a beat together, and start again whichever dies."""
    configure_logging(current().log)
    try:
        # We outlive both: the embedded server is stopped once, after them.
        bootstrap.home.open()
        stopped = _Crew({"worker": _celery("worker"), "beat": _celery("beat")}).run()
    finally:
        bootstrap.home.close()
    raise typer.Exit(0 if stopped else FAILED)


class _Crew:
    """Child processes of our own process group, started again when they die, ended together.

    Args:
        commands: a command by the name to call it by.
    """

    STEADY: Final = 60.0
    """Seconds after which a child's next death counts as its first."""
    LONGEST_PAUSE: Final = 30.0
    GRACE: Final = 40.0
    """Seconds to end in: a worker finishes the deliveries that it has, at most 20 s each."""

    _TICK: Final = 0.1
    # Ctrl-C and a closed terminal tell the whole group. The children hear it from us, once: Celery takes a
    # second signal for impatience.
    _OURS_ALONE: Final = frozenset({signal.SIGINT, signal.SIGHUP})

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self._commands = commands
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._started_at: dict[str, float] = {}
        self._deaths = dict.fromkeys(commands, 0)
        self._due_at = dict.fromkeys(commands, 0.0)
        self._signals = 0

    def run(self) -> bool:
        """Keep the children running until told to stop; return whether all of them ended in time."""
        for number in (*self._OURS_ALONE, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        while not self._signals:
            self._tend()
            time.sleep(self._TICK)
        for child in self._children.values():
            child.terminate()
        deadline = time.monotonic() + self.GRACE
        while self._alive() and time.monotonic() < deadline and self._signals == 1:
            time.sleep(self._TICK)
        stubborn = self._alive()
        for child in stubborn:
            _kill(child)
        return not stubborn

    def _on_signal(self, *_: object) -> None:
        self._signals += 1

    def _alive(self) -> list[subprocess.Popen[bytes]]:
        return [child for child in self._children.values() if child.poll() is None]

    def _tend(self) -> None:
        for name in self._commands:
            child = self._children.get(name)
            if child is None:
                if time.monotonic() >= self._due_at[name] and not self._signals:
                    self._start(name)
            elif (code := child.poll()) is not None:
                self._note_death(name, code)

    def _start(self, name: str) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._OURS_ALONE)  # a child inherits the mask
        try:
            self._children[name] = subprocess.Popen(  # noqa: S603 -- ours
                self._commands[name],
                stdin=subprocess.DEVNULL,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 -- no other thread is running
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._started_at[name] = time.monotonic()

    def _note_death(self, name: str, code: int) -> None:
        del self._children[name]
        now = time.monotonic()
        self._deaths[name] = 1 if now - self._started_at[name] > self.STEADY else self._deaths[name] + 1
        pause = min(2.0 ** (self._deaths[name] - 1), self.LONGEST_PAUSE)
        self._due_at[name] = now + pause
        _say(f"orchestrator: the {name} ended with {code}; it starts again in {pause:.0f} s")


def _end_with_parent() -> None:
    """Have the kernel end this child, in an orderly way, should its parent be killed -9 (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill -9 a process with all its descendants, and reap it."""
    for pid in list(_family(child.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def _family(pid: int) -> Iterator[int]:
    yield pid
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in listing.read_text().split():
                yield from _family(int(child))


# --- Starting work -----------------------------------------------------------------------------------------------


@app.command(epilog="Examples: [bold]orchestrator run 7[/], [bold]orchestrator run 7 --wait[/]")
def run(
    task_id: Annotated[int, typer.Argument(metavar="TASK_ID", help="The crawl task's id.")],
    *,
    wait: Wait = False,
    run_id: Annotated[
        UUID | None, typer.Option("--id", help="The run's id; asking twice with one id is one run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a crawl task now: one message to the Extractor for each of its data sources."""
    new = _new_run(CrawlArguments(task_id), run_id)
    with _session() as ours:
        _start(ours, [new], wait=wait, render=_render_run if as_json else None)


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
    with _session() as ours:
        _start(ours, new, wait=wait, render=_render_runs if as_json else None)


def _new_run(arguments: Arguments, run_id: UUID | None = None, retry_of: UUID | None = None) -> NewRun:
    run_id = run_id or uuid4()
    return NewRun(run_id, arguments, Trigger.CLI, traceparent_of(run_id), retry_of=retry_of)


Render = Callable[[Sequence[RunView], bool], None]
"""Prints runs, and whether their wake-ups were enqueued, as one JSON document."""


def _render_run(views: Sequence[RunView], enqueued: bool) -> None:  # noqa: FBT001 -- a plain callback
    _document({"run": _run_document(views[0]), "enqueued": enqueued})


def _render_runs(views: Sequence[RunView], enqueued: bool) -> None:  # noqa: FBT001 -- a plain callback
    _document({"runs": [_run_document(view) for view in views], "enqueued": enqueued})


def _start(ours: Services, new: Sequence[NewRun], *, wait: bool, render: Render | None) -> None:
    """Commit runs, wake workers, and, if wanted, watch to the end."""
    for each in new:
        if not ours.ledger.runs.accept(each, delivered=False):
            _require_equal(each, ours.insights.run(each.run_id))
    wake_ups = [WakeUp(each.run_id, each.arguments, each.traceparent) for each in new]
    enqueued = _enqueue(ours, wake_ups)
    run_ids = [each.run_id for each in new]
    if render is None:
        for each in new:
            typer.echo(f"run {each.run_id} is {'enqueued' if enqueued else 'recorded'}: {_name(each.arguments)}")
    _warn_if_unattended(ours, new[0].arguments)
    views = _watch(ours, run_ids) if wait else [ours.insights.run(run_id) for run_id in run_ids]
    if render is not None:
        render(views, enqueued)
    elif wait:
        for view in views:
            _tell_outcome(view)
    if wait and any(view.state is not RunState.SUCCEEDED for view in views):
        raise typer.Exit(FAILED)


def _require_equal(new: NewRun, kept: RunView) -> None:
    if _arguments(kept) != new.arguments:
        raise InvalidArgumentsError(f"--id {new.run_id} belongs to another run already: {_what(kept)}")


def _enqueue(ours: Services, wake_ups: Sequence[WakeUp]) -> bool:
    """Wake workers for committed runs; if the broker does not take it, say that the pulse will."""
    try:
        ours.sender.wake(wake_ups)
    except PublishError as error:
        _say(
            f"recorded, not enqueued yet ({error}); the pulse of any worker or beat enqueues it once the broker is back"
        )
        return False
    # The broker has them: what is not noted here is woken a second time, which does no harm.
    with suppress(TransientError):
        ours.ledger.runs.mark_enqueued([wake_up.run_id for wake_up in wake_ups])
    return True


def _warn_if_unattended(ours: Services, arguments: Arguments) -> None:
    queue = CRAWL_QUEUE if isinstance(arguments, CrawlArguments) else ANALYSIS_QUEUE
    if not _attended(ours.insights.nodes(), queue):
        _say(f"warning: no living worker consumes {queue}; start one: `orchestrator worker`, or `orchestrator up`")


def _attended(nodes: Iterable[NodeView], queue: str) -> bool:
    return any(node.alive and queue in node.queues for node in nodes)


# --- Watching ------------------------------------------------------------------------------------------------------


class _Watch:
    """Progress on standard error: a bar on a terminal, else a line for each change."""

    def __init__(self) -> None:
        console = Console(stderr=True, markup=False, highlight=False)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console) if console.is_terminal else None
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
            self._bar.update(self._task, description=_printable(words), completed=done, total=total)
        elif words != self._said:
            _say(words)
        self._said = words


def _watch(ours: Services, run_ids: Sequence[UUID]) -> list[RunView]:
    """Return the runs once all are over. Ctrl-C ends the watching, not the runs."""
    try:
        with _Watch() as progress:
            while not _look(ours, run_ids, progress):
                time.sleep(_POLL)
        return [ours.insights.run(run_id) for run_id in run_ids]
    except KeyboardInterrupt:
        watched = f"`orchestrator show {run_ids[0]}`" if len(run_ids) == 1 else "`orchestrator runs`"
        _say(f"left running; see how it goes: {watched}")
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
        parts.append(f"{view.error_code}; next try {_stamp(view.next_attempt_at)}")
    return ", ".join(parts)


def _tell_outcome(view: RunView) -> None:
    reason = f": {view.error_message} ({view.error_code})" if view.error_code else ""
    _out().print(Text(_printable(f"run {view.id} {view.state}, {_counts(view)}{reason}"), _STYLES[view.state]))


# --- Reading -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: [bold]orchestrator plan 7[/]. Sends nothing.")
def plan(
    task_id: Annotated[int, typer.Argument(metavar="TASK_ID", help="The crawl task's id.")],
    *,
    limit: Limit = _SHOWN,
    as_json: AsJson = False,
) -> None:
    """Say what a run of a crawl task would dispatch now, and what it would skip and why."""
    CrawlArguments(task_id)  # refuses what can be no id
    with _session() as ours, ours.database.transaction() as connection:
        rows = ours.catalog.read_plan(connection, task_id)
    dispatched = [row for row in rows if row[1] is not None]
    skipped = [source for source, config in rows if config is None]
    if as_json:
        _document(
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
        _table(["data source", "crawl config"], dispatched[:limit], more=len(dispatched) - limit)
    if skipped:
        rows_skipped = [(each, SkipReason.NO_ACTIVE_CONFIG) for each in skipped[:limit]]
        _table(["data source", "skipped because"], rows_skipped, more=len(skipped) - limit)


@app.command(epilog="Examples: [bold]orchestrator runs --state failed[/], [bold]orchestrator runs --task 7 --json[/]")
def runs(
    *,
    kind: Annotated[RunKind | None, typer.Option("--kind", help="Only runs of this kind.")] = None,
    state: Annotated[RunState | None, typer.Option("--state", help="Only runs in this state.")] = None,
    task_id: Annotated[int | None, typer.Option("--task", help="Only runs of this crawl task.")] = None,
    limit: Limit = _SHOWN,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    with _session() as ours:
        views = ours.insights.runs(limit=limit, kind=kind, state=state, task_id=task_id)
    if as_json:
        _document({"runs": [_run_document(view) for view in views]})
        return
    rows = [
        (view.id, view.state, _what(view), _counts(view), _stamp(view.created_at), view.error_code) for view in views
    ]
    _table(["run", "state", "what", "progress", "created", "error"], rows)


@app.command(epilog="Example: [bold]orchestrator show 3f2a[/]. The first hex digits of the id are enough.")
def show(run_id: RunId, *, limit: Limit = _SHOWN, as_json: AsJson = False) -> None:
    """Tell everything about a run: what it waits for, its calls, what happened and what was skipped."""
    with _session() as ours:
        view = ours.insights.run(_resolve(ours, run_id))
        waits_for = _waits_for(view, ours.insights.nodes())
        attempts, events = ours.insights.attempts(view.id), ours.insights.events(view.id)
        reasons, skips = ours.insights.skip_reasons(view.id), ours.insights.skipped(view.id, limit)
    if as_json:
        shown = {"waits_for": waits_for, "attempts": attempts, "events": events, "skip_reasons": reasons}
        _document({"run": _run_document(view)} | shown | {"skips": skips})
        return
    skipped = [("skipped because", f"{reason}: {count}") for reason, count in reasons.items()]
    _table(["run", str(view.id)], [*_facts(view), *skipped, ("waits for", waits_for)])
    if attempts:
        columns = ["number", "started_at", "outcome", "status", "seconds", "code", "message", "next_attempt_at"]
        _table(columns, [tuple(each[name] for name in columns) for each in attempts], title="calls to Discovery")
    columns = ["at", "event", "state", "code", "message"]
    _table(columns, [tuple(each[name] for name in columns) for each in events], title="what happened")
    if skips:
        rows = [(each["data_source_id"], each["reason"]) for each in skips]
        _table(["data source", "skipped because"], rows, more=sum(reasons.values()) - len(skips))


def _facts(view: RunView) -> Iterator[tuple[str, object]]:
    yield "what", _what(view)
    yield "state", view.state
    yield "progress", _counts(view)
    if view.error_code:
        yield "error", f"{view.error_message} ({view.error_code})"
    yield "started by", view.trigger
    for name in ("retry_of", "created_at", "started_at", "next_attempt_at", "finished_at"):
        if (value := getattr(view, name)) is not None:
            yield name.removesuffix("_at").replace("_", " "), value
    yield "traceparent", view.traceparent


def _waits_for(view: RunView, nodes: Sequence[NodeView]) -> str:
    """Say in words what has to happen next."""
    crawl = view.kind is RunKind.CRAWL
    queue = CRAWL_QUEUE if crawl else ANALYSIS_QUEUE
    match view.state:
        case RunState.FAILED if (view.task_id if crawl else view.theme_name) is None:
            return "nothing: its arguments were unusable; start a new run"
        case RunState.FAILED:
            return f"you: `orchestrator retry {view.id}` puts it back in the queue"
        case RunState.SUCCEEDED | RunState.CANCELED:
            return "nothing: it is over"
        case RunState.RETRYING:
            what = "the next try to publish" if crawl else f"call {view.attempts + 1} to the Discovery Service"
            waits_for = f"{what}, at {_stamp(view.next_attempt_at)}"
        case RunState.RUNNING if crawl:
            waits_for = f"{view.pending} messages to be published" if view.total else "its plan to be made"
        case RunState.RUNNING:
            waits_for = f"the answer of the Discovery Service to call {view.attempts}"
        case _ if view.awaits_slot is not None:
            waits_for = "a free call to the Discovery Service: as many as may be are under way"
        case _ if view.next_attempt_at is not None:
            waits_for = f"the time that its caller asked for, {_stamp(view.next_attempt_at)}"
        case _:
            waits_for = f"a worker to take it from {queue}"
    unattended = "" if _attended(nodes, queue) else f"; no living worker consumes {queue}: `orchestrator worker`"
    return waits_for + unattended


@app.command(epilog="Example: [bold]orchestrator workers[/]. A node is silent after 15 s without a heartbeat.")
def workers(*, as_json: AsJson = False) -> None:
    """List workers and beats by their last sign of life."""
    with _session() as ours:
        nodes = ours.insights.nodes()
    if as_json:
        _document({"nodes": nodes})
        return
    rows = [
        (
            node.name,
            node.kind,
            "alive" if node.alive else "silent",
            " ".join(node.queues),
            node.concurrency,
            node.version,
            node.seen_at,
        )
        for node in nodes
    ]
    _table(["node", "kind", "", "queues", "concurrency", "version", "last seen"], rows)


# --- Operating -----------------------------------------------------------------------------------------------------


@app.command(epilog="Example: [bold]orchestrator retry 3f2a --reason 'Discovery is back'[/]")
def retry(run_id: RunId, *, reason: Reason = None, as_json: AsJson = False) -> None:
    """Put a failed run back in the queue; repeat a succeeded or canceled one as a new run."""
    with _session() as ours:
        view = ours.insights.run(_resolve(ours, run_id))
        arguments = _arguments(view)
        if view.state in {RunState.SUCCEEDED, RunState.CANCELED} and arguments is not None:
            new = _new_run(arguments, retry_of=view.id)
            if not as_json:
                typer.echo(f"run {view.id} is {view.state}, which is final: the same again is a new run")
            _start(ours, [new], wait=False, render=_render_run if as_json else None)
            return
        wake_up = ours.ledger.runs.revive(view.id, actor=_actor(), reason=reason)
        enqueued = _enqueue(ours, [wake_up])
        if as_json:
            _render_run([ours.insights.run(view.id)], enqueued)
        else:
            typer.echo(f"run {view.id} is back in the queue: {_what(view)}")
        _warn_if_unattended(ours, wake_up.arguments)


@app.command(epilog="Example: [bold]orchestrator cancel 3f2a --reason 'wrong task'[/]")
def cancel(run_id: RunId, *, reason: Reason = None, as_json: AsJson = False) -> None:
    """Cancel a run: what is not published yet is skipped."""
    with _session() as ours:
        resolved = _resolve(ours, run_id)
        ours.ledger.runs.cancel(resolved, actor=_actor(), reason=reason)
        view = ours.insights.run(resolved)
    if as_json:
        _document({"run": _run_document(view)})
    else:
        typer.echo(f"run {view.id} is canceled: {_what(view)}, {_counts(view)}")


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # an account without a name, as containers have them
        return f"cli:{os.getuid()}"


# --- Sessions and ids ----------------------------------------------------------------------------------------------


@contextmanager
def _session() -> Iterator[Services]:
    """Give the services to a short command, over a database that is there and migrated."""
    _quieten()
    try:
        bootstrap.home.open()
        ours = bootstrap.services()
        migrations.verify(ours.database)
        yield ours
    finally:
        _leave()


def _leave() -> None:
    bootstrap.services().sender.close()
    bootstrap.home.close()


def _quieten(level: str = "WARNING") -> None:
    """Log from this level up, unless the settings name another."""
    log = current().log
    configure_logging(log if "level" in log.model_fields_set else log.model_copy(update={"level": level}))


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


# --- Words and tables ----------------------------------------------------------------------------------------------


def _arguments(view: RunView) -> Arguments | None:
    if view.task_id is not None:
        return CrawlArguments(view.task_id)
    if view.data_source_id is not None and view.theme_name is not None:
        return AnalysisArguments(view.data_source_id, view.theme_name)
    return None


def _what(view: RunView) -> str:
    arguments = _arguments(view)
    return f"{view.kind} without usable arguments" if arguments is None else _name(arguments)


def _name(arguments: Arguments) -> str:
    match arguments:
        case CrawlArguments(task_id):
            return f"crawl task {task_id}"
        case AnalysisArguments(data_source_id, theme_name):
            return f"analysis of data source {data_source_id}, theme {theme_name}"


def _counts(view: RunView) -> str:
    if view.kind is RunKind.SITE_ANALYSIS:
        return f"{view.attempts} call{'' if view.attempts == 1 else 's'}"
    return f"{view.published} published, {view.skipped} skipped of {view.total}"


def _run_document(view: RunView) -> dict[str, object]:
    return asdict(view) | {"pending": view.pending}


def _document(document: object) -> None:
    typer.echo(json.dumps(document, default=_plain, ensure_ascii=False, indent=2))


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None, more: int = 0
) -> None:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = _out()
    console.print(table)
    if more > 0:
        console.print(f"… and {more} more; --limit shows more of them")


def _cell(value: object) -> Text:
    if value is None:
        return Text("")
    text = _stamp(value) if isinstance(value, datetime) else str(round(value, 3) if isinstance(value, float) else value)
    return Text(_printable(text), _STYLES.get(text, ""))


def _out() -> Console:
    # A pipe has no width; wrapped at 80 columns no line of a table could be searched for.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 240)


def _stamp(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def _printable(text: str) -> str:
    # What others sent must not steer the terminal.
    return "".join(each if each.isprintable() or each == "\n" else "�" for each in text)


def _say(sentence: str) -> None:
    """Tell people something beside the result."""
    sys.stderr.write(f"{_printable(sentence)}\n")
    sys.stderr.flush()
