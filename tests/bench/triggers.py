"""Site-analysis triggers against a Discovery Service that takes 0, 50 and 200 ms: the seed's task, and ours.

    python -m tests.bench.triggers [--processes 2] [--threads 32] [--seconds 10] [--rounds 3] [--latency 200]

All with equal numbers of worker processes: the seed's task, word for word (tests/support/clients/seed.py, in a
throw-away environment), on a Celery worker with that many children; ours on one like it; ours on that many workers
with ``--pool threads``. The queue is filled first, then the workers start; a rate is calls a second from the first one
received to the last one answered, by the Discovery server's own moments, the same for all. Interleaved. Compare the
ratios. What a run took then by the ledger's moments, less what the server took, is mostly waiting in line. Own overhead
is measured alone: on one worker process, with pauses, what Celery says that our task took, less what the same HTTP
request takes by itself on a connection that is kept.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

from celery import Celery

from tests.bench.dispatch import ROUNDS, show_targets, spread
from tests.bench.schedules import SERVER, machine, say, table
from tests.support.brisk_discovery import BriskDiscovery, Call
from tests.support.environments import CLIENTS, make_environment
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, cpu_seconds, eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import ANALYSIS_TASK, Stack, amqp_connection

LATENCIES: Final = (0, 50, 200)  # milliseconds
PROCESSES: Final = 2
THREADS: Final = 32
SECONDS: Final = 10.0
ALONE: Final = 50
SEEDS_TASK: Final = "seed.trigger_site_analysis"
QUEUES: Final = {ANALYSIS_TASK: "orchestrator.analysis", SEEDS_TASK: "celery"}
_SHORTEST: Final = 0.02  # seconds that a trigger takes at least, to choose how many there are
_FEWEST: Final = 50
_WARM: Final = 10  # first calls of a slot whose CPU does not count: its process imports and connects
_FASTEST: Final = 60  # triggers a second of a process, to choose the same
_PATIENCE: Final = 300.0  # seconds
_PAUSE: Final = 0.1  # seconds between triggers that are to find their worker idle
_TOOK: Final = re.compile(r"trigger_site_analysis\[[^]]+\] succeeded in ([0-9.]+)s")


@dataclass
class Measured:
    """What one way did at one latency, over all rounds: rates, and milliseconds of CPU and of own overhead."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Where all of it happens."""

    stack: Stack
    discovery: BriskDiscovery
    seeds_python: Path
    processes: int
    threads: int

    # --- The ways ---------------------------------------------------------------------------------------------

    @contextmanager
    def seeds(self, latency: float) -> Iterator[list[Process]]:
        """Run the seed's task on a prefork worker."""
        env = {"BROKER_URL": self.stack.broker or "", "DISCOVERY_SERVICE_URL": self.discovery.url(latency)}
        command: list[str | Path] = [
            self.seeds_python,
            "-m",
            "celery",
            "-A",
            "seed",
            "worker",
            "-c",
            str(self.processes),
            "-l",
            "info",
        ]
        with Process(command, output=self.stack.directory / "seed.log", env=env, cwd=CLIENTS) as worker:
            yield [worker]
            worker.terminate(within=60)

    def prefork(self, latency: float) -> AbstractContextManager[list[Process]]:
        """Run ours on a prefork worker."""
        return self._ours(latency, 1, self.processes)

    def with_threads(self, latency: float) -> AbstractContextManager[list[Process]]:
        """Run ours on workers with threads."""
        return self._ours(latency, self.processes, self.threads, "--pool", "threads")

    @contextmanager
    def _ours(self, latency: float, workers: int, slots: int, *arguments: str) -> Iterator[list[Process]]:
        settings = {
            "DISCOVERY_URL": self.discovery.url(latency),
            "DISCOVERY_CONCURRENCY": str(workers * slots),
        }
        queue = QUEUES[ANALYSIS_TASK]
        running = [
            self.stack.worker(*arguments, "-Q", queue, concurrency=slots, settings=settings) for _ in range(workers)
        ]
        yield running
        for worker in running:
            worker.terminate(within=60)

    # --- Measuring --------------------------------------------------------------------------------------------

    def rate(self, way: "Way", latency: float, seconds: float, into: Measured) -> None:
        """Fill the queue, start the workers, and note how fast it empties."""
        expected = min(way.slots / (latency + _SHORTEST), self.processes * _FASTEST)
        count = max(round(seconds * expected), _FEWEST)
        self._clear()
        client = Celery("client", broker=self.stack.broker)
        for number in range(count):
            client.send_task(way.task, args=[number + 1, "news"], queue=QUEUES[way.task])
        client.close()
        with way.run(latency) as workers:
            into.cpu.append(self._cpu_each(workers, min(_WARM * way.slots, count // 2), count))
            if way.task == ANALYSIS_TASK:
                eventually(lambda: self._ended() == count, within=_PATIENCE, what="all runs have ended", every=0.2)
        calls = self.discovery.calls()
        assert len(calls) == count, f"{len(calls)} calls for {count} triggers"
        into.rates.append(count / (max(c.answered_at for c in calls) - min(c.received_at for c in calls)))
        if way.task == ANALYSIS_TASK:
            into.overheads.extend(self._overheads(calls))

    def alone(self, latency: float) -> Sequence[float]:
        """Return the milliseconds of own overhead of triggers that find their worker idle."""
        self._clear()
        client = Celery("client", broker=self.stack.broker)
        with self._ours(latency, 1, 1) as (worker,):
            # The first ones import and connect.
            for number in range(_WARM + ALONE):
                client.send_task(ANALYSIS_TASK, args=[number + 1, "news"], queue=QUEUES[ANALYSIS_TASK])
                time.sleep(latency + _PAUSE)
            eventually(lambda: self._ended() == _WARM + ALONE, within=_PATIENCE, what="all runs have ended", every=0.5)
        client.close()
        took = [float(seconds) for seconds in _TOOK.findall(worker.text())]
        assert len(took) == _WARM + ALONE, f"{len(took)} tasks for {_WARM + ALONE} triggers"
        bare = statistics.median(self._bare(latency))
        return [1e3 * (seconds - bare) for seconds in took[_WARM:]]

    def _bare(self, latency: float) -> list[float]:
        """Return the seconds that some requests like ours take, by nothing but the standard library."""
        url = urlsplit(self.discovery.url(latency))
        body, headers = json.dumps({"data_source_id": 1, "theme_name": "news"}), {"Content-Type": "application/json"}
        connection = HTTPConnection(url.netloc)
        took = []
        for _ in range(ALONE):
            began_at = time.perf_counter()
            connection.request("POST", url.path, body, headers)
            connection.getresponse().read()
            took.append(time.perf_counter() - began_at)
            time.sleep(_PAUSE)
        connection.close()
        return took

    def _cpu_each(self, workers: Sequence[Process], warm: int, count: int) -> float:
        """Wait until all was called; return the milliseconds of CPU each took, the first ones excepted."""

        def taken(least: int) -> tuple[float, int]:
            eventually(lambda: self.discovery.count() >= least, within=_PATIENCE, what=f"{least} calls", every=0.1)
            called = self.discovery.count()
            return sum(cpu_seconds(worker.pid) for worker in workers), called

        before, first = taken(warm)
        after, _ = taken(count)
        return 1e3 * (after - before) / (count - first) if first < count else 0.0

    def _overheads(self, calls: Sequence[Call]) -> list[float]:
        """Return the milliseconds from acceptance to end of each trigger's run, less what the server took."""
        took = {
            row["id"]: float(row["took"])
            for row in self.stack.query(
                "SELECT id, extract(epoch FROM finished_at - created_at) AS took FROM orchestrator.runs"
                " WHERE state = 'succeeded' AND attempts = 1"
            )
        }
        return [1e3 * (took[UUID(call.key)] - (call.answered_at - call.received_at)) for call in calls]

    def _ended(self) -> int:
        row = self.stack.query("SELECT count(*) FROM orchestrator.runs WHERE state = 'succeeded'")[0]
        return int(row["count"])

    def _clear(self) -> None:
        self.stack.execute("TRUNCATE orchestrator.runs, orchestrator.attempts, orchestrator.run_events")
        self.discovery.calls()
        with amqp_connection(self.stack.broker or "") as connection:
            channel = connection.channel()
            for queue in QUEUES.values():
                channel.queue_declare(queue, durable=True, auto_delete=False)
                channel.queue_purge(queue)


@dataclass(frozen=True)
class Way:
    """One way to work on triggers: so many slots, in as many processes as the others have."""

    name: str
    task: str
    slots: int
    run: Callable[[float], AbstractContextManager[list[Process]]]


def measure(bench: Bench, latencies: Sequence[int], seconds: float, rounds: int) -> None:
    """Interleave all ways, and print rates, ratios and overheads."""
    processes, threads = bench.processes, bench.threads
    ways = [
        Way("the seed's task, prefork", SEEDS_TASK, processes, bench.seeds),
        Way("ours, prefork", ANALYSIS_TASK, processes, bench.prefork),
        Way(f"ours, {threads} threads in each", ANALYSIS_TASK, processes * threads, bench.with_threads),
    ]
    found = {(latency, way.name): Measured() for latency in latencies for way in ways}
    for number in range(rounds):
        for latency in latencies:
            for way in ways:
                measured = found[latency, way.name]
                bench.rate(way, latency / 1e3, seconds, measured)
                say(f"  round {number + 1}, {latency} ms, {way.name}: {measured.rates[-1]:,.1f}/s")
    rows = []
    for (latency, name), measured in found.items():
        rate, seeds = (statistics.median(found[latency, each].rates) for each in (name, ways[0].name))
        cpu = f"{statistics.median(measured.cpu):.1f} ms"
        overhead = f"{statistics.median(measured.overheads):.1f} ms" if measured.overheads else "–"
        spread_of = spread(measured.rates, ",.1f")
        rows.append([f"{latency} ms", name, f"{rate:,.1f}", spread_of, f"{rate / seeds:.1f}", cpu, overhead])
    say(f"\n{processes} worker processes each, medians of {rounds}, interleaved\n")
    heads = (
        "Discovery takes",
        "who",
        "triggers/s",
        "range",
        "to the seed's",
        "workers' CPU each",
        "in line and own overhead under this load",
    )
    say(table(heads, rows))
    overheads = {latency: bench.alone(latency / 1e3) for latency in latencies}
    say(
        f"\n{ALONE} triggers one by one, ours, one worker process: what the task took less the same request by itself\n"
    )
    rows = [[f"{each} ms", f"{statistics.median(ms):.1f} ms", spread(ms, ".1f")] for each, ms in overheads.items()]
    say(table(("Discovery takes", "own overhead, median", "range"), rows))
    slow = max(latencies)
    best = max(statistics.median(found[slow, way.name].rates) for way in ways[1:])
    show_targets(
        (f"ours / the seed's task at {slow} ms", best / statistics.median(found[slow, ways[0].name].rates), "5"),
        (f"own overhead at {slow} ms, ms", statistics.median(overheads[slow]), "at most 5"),
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.triggers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--processes", type=int, default=PROCESSES, help=f"worker processes; default {PROCESSES}")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"threads in each of ours; default {THREADS}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"about so long each; default {SECONDS:g}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of which rates are medians; default {ROUNDS}")
    parser.add_argument("--latency", action="append", type=int, help=f"milliseconds; default {LATENCIES}")
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
        discovery = opened.enter_context(BriskDiscovery(directory))
        python = make_environment(directory / "peers", "peers")
        say(machine(stack, rabbitmq))
        bench = Bench(stack, discovery, python, given.processes, given.threads)
        measure(bench, given.latency or LATENCIES, given.seconds, given.rounds)


if __name__ == "__main__":
    main()
