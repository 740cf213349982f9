"""Commands that set up, run, list and probe processes: migrate, doctor, worker, beat, up, workers, ready."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from pydantic import SecretStr

from orchestrator import bootstrap, doctor
from orchestrator.cli.output import print_document, print_table, say
from orchestrator.cli.session import FAILED, AsJson, leave, quieten, session
from orchestrator.insights import NodeView
from orchestrator.settings import CONFIG_VARIABLE, DEFAULT_CONFIG_FILE, current, variables
from orchestrator.telemetry import configure_logging

app: Final = typer.Typer()

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


@app.command(epilog="Example: [bold]orchestrator migrate[/]. Safe to repeat, and by several processes at once.")
def migrate() -> None:
    """Create the ledger's tables, or bring them up to date."""
    quieten()
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
    quieten("ERROR")  # what the checks notice is in their findings
    try:
        ours = bootstrap.services()
        findings = [doctor.beats(ours)] if beat else doctor.diagnose(ours)
    finally:
        leave()
    ok = all(finding.status is not doctor.Status.FAIL for finding in findings)
    if as_json:
        print_document({"ok": ok, "findings": findings})
    else:
        rows = [(each.status, each.check, _advice(each)) for each in findings]
        print_table(["", "check", "finding"], rows)
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
        print_document({"settings": listed})
    else:
        print_table(["variable", "default", "meaning"], [tuple(each.values()) for each in listed])


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


@app.command(
    epilog="Example: [bold]orchestrator up[/]. Ctrl-C stops all in good order, a second one at once. Who asks the API "
    "needs a key: [bold]orchestrator keys create me --role operator[/] in another terminal."
)
def up() -> None:
    """Run a worker, a beat and the HTTP API together, and start again whichever dies."""
    configure_logging(current().log)
    try:
        # We outlive them: the embedded server is stopped once, after them.
        bootstrap.home.open()
        api = [sys.executable, "-m", "orchestrator", "api"]
        stopped = _Crew({"worker": _celery("worker"), "beat": _celery("beat"), "api": api}).run()
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
        say(f"orchestrator: the {name} ended with {code}; it starts again in {pause:.0f} s")


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


@app.command(epilog="Example: [bold]orchestrator workers[/]. A node is silent after 15 s without a heartbeat.")
def workers(*, as_json: AsJson = False) -> None:
    """List workers and beats by their last sign of life."""
    with session() as ours:
        nodes = ours.insights.nodes()
    if as_json:
        print_document({"nodes": [asdict(node) | {"status": node.status} for node in nodes]})
        return
    rows = [
        (
            node.name,
            node.kind,
            node.status,
            " ".join(node.queues),
            node.concurrency,
            node.version,
            node.seen_at,
            node.because,
        )
        for node in nodes
    ]
    print_table(["node", "kind", "", "queues", "concurrency", "version", "last seen", "because"], rows)


_LATELY: Final = timedelta(minutes=10)


class _Kind(StrEnum):
    WORKER = "worker"
    BEAT = "beat"


@app.command(
    epilog="Examples: [bold]orchestrator ready worker[/] as a container's readiness probe, "
    "[bold]orchestrator ready --node w1@host[/] where several run on one host. Exit 1: it does not consume, or tick, "
    "or cannot reach the database. Degraded, as under a broker's alarm, is ready: it says so, and exits 0."
)
def ready(
    kind: Annotated[_Kind | None, typer.Argument(help="Only workers, or only beats.")] = None,
    *,
    node: Annotated[str | None, typer.Option("--node", help="Only this one, on whatever host.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask whether the workers and beats of this host do their work; exit 1 if one does not."""
    with session() as ours:
        asked = [each for each in ours.insights.nodes() if _is_asked(each, kind, node)]
        speaking = _speaking(asked, ours.insights.now())
    is_ready = bool(speaking) and all(each.ready for each in speaking)
    if as_json:
        print_document({"ready": is_ready, "nodes": [{"name": each.name, "status": each.status} for each in speaking]})
    for each in () if as_json else speaking:
        typer.echo(f"{each.name}: {each.status}" + (f": {each.because}" if each.alive and each.because else ""))
    if not speaking:
        say(
            f"orchestrator: no {kind or 'worker or beat'} {f'called {node}' if node else 'of this host'} has shown life"
        )
    if not is_ready:
        raise typer.Exit(FAILED)


def _speaking(nodes: Sequence[NodeView], now: datetime) -> Sequence[NodeView]:
    """Return those whose state is the answer: of each kind the living, or where none lives, who was there lately.

    Those that were killed are listed for a day, and most have a successor.
    """
    chosen: list[NodeView] = []
    for kind in _Kind:
        known = [each for each in nodes if each.kind == kind]
        lately = [each for each in known if now - each.seen_at < _LATELY]
        chosen += [each for each in known if each.alive] or lately
    return chosen or nodes


def _is_asked(view: NodeView, kind: _Kind | None, name: str | None) -> bool:
    if kind is not None and view.kind != kind:
        return False
    if name is None:
        return view.host == socket.gethostname()
    # A node's process id is part of its name; people know what they called it.
    return view.name == name or view.name.startswith(f"{name}:")
