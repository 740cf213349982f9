"""How long importing and starting takes: ours beside a bare Celery app, in fresh processes, interleaved.

    python -m tests.bench.startup [--rounds 5]

The bare app (tests/support/clients/seed.py, the same Celery in a throw-away environment) has two tasks and one
schedule, and no database. Commands are timed from start to end, servers from start until they are ready: a worker when
it says so, a beat when it has had its first tick, `orchestrator up` when its API answers ready and its worker and its
beat have signed on; beside it stand a bare worker and a bare beat started at once. CPU is that of the process and its
children until then. Modules are compiled. Compare the ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Final

from tests.bench.dispatch import spread
from tests.bench.schedules import SERVER, machine, say, table
from tests.support.environments import CLIENTS, make_environment
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, cpu_seconds, eventually, free_port
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack

ROUNDS: Final = 5
RUNS: Final = 1_000
_PATIENCE: Final = 120.0  # seconds

_Taken = tuple[float, float]  # seconds, seconds of CPU
_Way = Callable[[], _Taken]


@dataclass(frozen=True)
class Side:
    """Whose processes: an interpreter, an app, an environment."""

    python: Path
    app: str
    env: Mapping[str, str]
    stack: Stack

    def command(self, *arguments: str) -> _Taken:
        """Run a command to its end."""
        began_at = monotonic()
        child = subprocess.Popen(
            [self.python, *arguments],
            env=self.env,
            cwd=self.stack.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert child.stderr is not None
        errors = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0, errors.decode()
        return monotonic() - began_at, used.ru_utime + used.ru_stime

    def servers(self, *programs: str) -> _Taken:
        """Start Celery's programs at once, and wait until all are ready."""
        began_at = monotonic()
        running = [self._start(program) for program in programs]
        for program, process in zip(programs, running, strict=True):
            process.await_line("ready." if program == "worker" else "beat: Waking up in", within=_PATIENCE)
        taken = monotonic() - began_at, sum(cpu_seconds(process.pid) for process in running)
        for process in running:
            process.terminate(within=60)
        return taken

    def _start(self, program: str) -> Process:
        # Celery's own debug log says when a beat has had a tick.
        options = ["-c", "2", "-l", "info"] if program == "worker" else ["-l", "debug"]
        env = {**self.env, "ORCHESTRATOR_LOG__LEVEL": "DEBUG" if program == "beat" else "INFO"}
        return self.start("-m", "celery", "-A", self.app, program, *options, env=env)

    def start(self, *arguments: str, env: Mapping[str, str]) -> Process:
        """Start a server."""
        number = len(self.stack.processes)
        process = Process(
            [self.python, *arguments], output=self.stack.directory / f"{number}.log", env=env, cwd=self.stack.directory
        )
        self.stack.processes.append(process)
        return process


def up(ours: Side) -> _Taken:
    """Start `orchestrator up`, and wait until it is ready."""
    ours.stack.execute("DELETE FROM orchestrator.nodes")
    port = free_port()
    began_at = monotonic()
    process = ours.start("-m", "orchestrator", "up", env={**ours.env, "ORCHESTRATOR_API__PORT": str(port)})
    process.await_ready(lambda: answers(port), within=_PATIENCE, what="the API answers ready")
    eventually(lambda: signed_on(ours.stack), within=_PATIENCE, what="a worker and a beat have signed on")
    taken = monotonic() - began_at, cpu_seconds(process.pid)
    process.terminate(within=60)
    return taken


def answers(port: int) -> bool:
    """Whether an API is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def signed_on(stack: Stack) -> bool:
    """Whether a worker and a beat have signed on in the ledger."""
    rows = stack.query("SELECT DISTINCT kind FROM orchestrator.nodes")
    return {row["kind"] for row in rows} >= {"worker", "beat"}


def ways(ours: Side, bare: Side) -> dict[str, tuple[_Way, _Way | None]]:
    """Return what is measured: ours and its peer."""
    return {
        "python -c pass": (lambda: ours.command("-c", "pass"), lambda: bare.command("-c", "pass")),
        "import the Celery app": (
            lambda: ours.command("-c", "import orchestrator.celery_app"),
            lambda: bare.command("-c", "import seed"),
        ),
        "import the tasks, and what they need": (
            lambda: ours.command("-c", "import orchestrator.tasks, orchestrator.worker"),
            lambda: bare.command("-c", "import seed, celery.bin.worker, celery.worker"),
        ),
        "--help": (
            lambda: ours.command("-m", "orchestrator", "--help"),
            lambda: bare.command("-m", "celery", "-A", "seed", "--help"),
        ),
        f"orchestrator runs, {RUNS:,} runs": (lambda: ours.command("-m", "orchestrator", "runs"), None),
        "a worker until it is ready": (lambda: ours.servers("worker"), lambda: bare.servers("worker")),
        "a beat until its first tick": (lambda: ours.servers("beat"), lambda: bare.servers("beat")),
        "orchestrator up; bare worker and beat": (lambda: up(ours), lambda: bare.servers("worker", "beat")),
    }


def measure(ours: Side, bare: Side, rounds: int) -> None:
    """Interleave everything, and print it."""
    found: dict[str, tuple[list[_Taken], list[_Taken]]] = {}
    for number in range(rounds):
        for name, (way, peer) in ways(ours, bare).items():
            taken = found.setdefault(name, ([], []))
            taken[0].append(way())
            if peer is not None:
                taken[1].append(peer())
            say(f"  round {number + 1}: {name}: {taken[0][-1][0]:.2f} s")
    rows = []
    for name, (mine, theirs) in found.items():
        ratio = f"{medians(mine)[0] / medians(theirs)[0]:.2f}" if theirs else "–"
        rows.append([name, *shown(mine), *(shown(theirs) if theirs else ("–", "–")), ratio])
    say(f"\nmedians of {rounds}, interleaved\n")
    say(table(("what", "ours", "CPU", "bare Celery", "CPU", "ours / bare"), rows))


def medians(taken: Sequence[_Taken]) -> _Taken:
    return statistics.median(wall for wall, _ in taken), statistics.median(cpu for _, cpu in taken)


def shown(taken: Sequence[_Taken]) -> tuple[str, str]:
    wall, cpu = medians(taken)
    return f"{wall:.2f} s ({spread([each for each, _ in taken], '.2f')})", f"{cpu:.2f} s"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.startup", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of which figures are medians; default {ROUNDS}")
    return parser.parse_args()


def main() -> None:
    given = options()
    with ExitStack() as opened:
        postgres = opened.enter_context(PostgresServer(SERVER))
        rabbitmq = opened.enter_context(RabbitMQServer())
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        stack = Stack.on_rabbitmq(postgres.create_database("bench"), rabbitmq.url, directory)
        opened.callback(stack.close)
        stack.prepare()
        stack.execute(
            "INSERT INTO orchestrator.runs (id, kind, state, trigger, task_id, traceparent, finished_at)"
            " SELECT gen_random_uuid(), 'crawl', 'succeeded', 'celery', n, '', now() FROM generate_series(1, %s) AS n",
            RUNS,
        )
        # A vhost of its own: workers of both are called as their host.
        broker = rabbitmq.vhost_url(rabbitmq.fresh_vhost())
        env = {"BROKER_URL": broker, "PYTHONPATH": str(CLIENTS), "PYTHONUNBUFFERED": "1"}
        bare = Side(make_environment(directory / "peers", "peers"), "seed", env, stack)
        ours = Side(Path(sys.executable), "orchestrator.celery_app", stack.env, stack)
        say(machine(stack, rabbitmq))
        measure(ours, bare, given.rounds)


if __name__ == "__main__":
    main()
