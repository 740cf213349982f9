"""A whole day, as fast as it goes: 1,000,000 data sources on 10,000 schedules, each of which fires once.

    python -m tests.bench.day [--size 10000] [--sources 100] [--hours 24] [--processes 2] [--beats 1]

Real beats, a stock worker, a private RabbitMQ and PostgreSQL. The day is pressed together: the schedules of an hour are
made due by SQL, all in one second, and the next hour comes as soon as every run of the one before is over. An hour
takes from there to the end of its last run, by the database's clock. Between two hours, outside the time that is
measured, a plain AMQP consumer takes every message off the queue, as the Extractor would all day, and ticks it off:
each source once, with the run that its schedule's slot started.
"""

import argparse
import json
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID

from tests.bench.schedules import SERVER, beats, firings, machine, say, table, texts, vacuum
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import QUEUE, Stack, amqp_connection, queue_depth

SIZE: Final = 10_000
SOURCES: Final = 100
HOURS: Final = 24
DAY: Final = 86_400.0
_SAMPLE: Final = 2.0  # seconds between two looks at the memory
_PATIENCE: Final = 1_800.0  # seconds for an hour


@dataclass(frozen=True)
class Day:
    """What the application has: schedules with so many data sources each, no two of which share one."""

    stack: Stack
    schedules: int
    sources: int
    hours: int

    @property
    def total(self) -> int:
        """How many data sources there are."""
        return self.schedules * self.sources

    def prepare(self) -> None:
        """Fill the application's tables. The texts fire in half a year, lest one does so today."""
        self.stack.prepare()
        self.stack.application.add_sources(self.total)
        self.stack.execute(
            "INSERT INTO crawl_tasks (id, data_source_ids, schedule, is_active, updated_at)"
            " SELECT n, ARRAY(SELECT generate_series((n - 1) * %s + 1, n * %s)), (%s::text[])[1 + n %% %s], true,"
            " now() - interval '1 hour' FROM generate_series(1, %s) AS n",
            *(self.sources, self.sources, texts(), len(texts()), self.schedules),
        )
        self.stack.execute("CREATE INDEX crawl_tasks_updated_at_idx ON crawl_tasks (updated_at)")
        vacuum(self.stack, "crawl_tasks", "crawl_configs")

    def live_through(self, hour: int) -> float:
        """Have an hour's slots come; return the seconds until the last of their runs is over."""
        began_at = self.stack.query("SELECT clock_timestamp() AS now")[0]["now"]
        self.stack.execute(
            "UPDATE orchestrator.schedules SET next_fire_at = date_trunc('second', clock_timestamp())"
            " WHERE task_id %% %s = %s",
            *(self.hours, hour),
        )
        due = self.slots(hour)
        eventually(lambda: self._ended_since(began_at) == due, within=_PATIENCE, what=f"{due:,} runs end", every=0.1)
        row = self.stack.query("SELECT max(finished_at) AS at FROM orchestrator.runs")[0]
        return float((row["at"] - began_at).total_seconds())

    def slots(self, hour: int) -> int:
        """Return how many slots an hour has."""
        return len(range(hour or self.hours, self.schedules + 1, self.hours))

    def runs(self) -> Mapping[int, UUID]:
        """Return the run that each crawl task's slot started."""
        rows = self.stack.query("SELECT task_id, run_id FROM orchestrator.firings WHERE outcome = 'started'")
        return {row["task_id"]: row["run_id"] for row in rows}

    def states(self) -> dict[str, int]:
        """Return how many runs are in each state."""
        rows = self.stack.query("SELECT state, count(*) FROM orchestrator.runs GROUP BY state")
        return {row["state"]: row["count"] for row in rows}

    def database_size(self) -> int:
        """Return the database's size in bytes."""
        return int(self.stack.query("SELECT pg_database_size(current_database()) AS bytes")[0]["bytes"])

    def _ended_since(self, moment: object) -> int:
        row = self.stack.query("SELECT count(*) FROM orchestrator.runs WHERE finished_at > %s", moment)[0]
        return int(row["count"])


class Extractor:
    """A plain AMQP consumer, which ticks off every message."""

    def __init__(self, day: Day) -> None:
        self._day = day
        self._seen = bytearray(day.total + 1)
        self.messages = self.duplicates = self.strangers = 0

    def empty_queue(self) -> None:
        """Take what is in the queue."""
        broker = self._day.stack.broker or ""
        runs = self._day.runs()
        with amqp_connection(broker) as connection:
            left = queue_depth(broker, QUEUE)

            def take(message: Any) -> None:  # noqa: ANN401 -- py-amqp's, untyped
                nonlocal left
                left -= 1
                self._tick_off(json.loads(message.body), runs)

            connection.channel().basic_consume(QUEUE, no_ack=True, callback=take)
            while left > 0:
                connection.drain_events(timeout=30)

    @property
    def lost(self) -> int:
        """How many data sources no message was about."""
        return self._seen.count(0) - 1

    def _tick_off(self, body: Mapping[str, Any], runs: Mapping[int, UUID]) -> None:
        self.messages += 1
        source, task = body["data_source_id"], body["task_id"]
        if (source - 1) // self._day.sources + 1 != task or body["run_id"] != str(runs[task]):
            self.strangers += 1
        self.duplicates += self._seen[source]
        self._seen[source] = 1


@dataclass
class Memory:
    """The most memory that families of processes had at once, in MiB; what they share counts once (PSS)."""

    heads: Mapping[str, int]
    peaks: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE):
            parents = dict(_processes())
            for name, head in self.heads.items():
                mebibytes = sum(_memory(pid) for pid in parents if _descends(pid, head, parents))
                self.peaks[name] = max(self.peaks.get(name, 0.0), mebibytes)


def _processes() -> Iterator[tuple[int, int]]:
    """Yield all processes, each with its parent."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield int(directory.name), int((directory / "stat").read_text().rpartition(")")[2].split()[1])


def _descends(pid: int, head: int, parents: Mapping[int, int]) -> bool:
    while pid != head and pid in parents:
        pid = parents[pid]
    return pid == head


def _memory(pid: int) -> float:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0]) / 1024
    return 0.0  # it has ended, or is another account's


def show(day: Day, took: list[float], extractor: Extractor, memory: Memory, grown: int) -> None:
    """Print the day, and fail if it was not as it should be."""
    fired, ended, total = firings(day.stack), day.states(), sum(took)
    rows = [
        ("slots fired", f"{fired.get('started', 0):,} of {day.schedules:,}"),
        ("runs succeeded", f"{ended.get('succeeded', 0):,} of {day.schedules:,}"),
        ("messages on the wire", f"{extractor.messages:,} for {day.total:,} data sources"),
        ("lost / duplicate / with a wrong run", f"{extractor.lost} / {extractor.duplicates} / {extractor.strangers}"),
        ("seconds for the day", f"{total:.1f}"),
        ("an hour: median, slowest", f"{statistics.median(took):.2f} s, {max(took):.2f} s"),
        ("data sources a second", f"{day.total / total:,.0f}"),
        ("a day / its seconds", f"{DAY / total:,.0f}"),
        *((f"peak memory, {name}", f"{mebibytes:,.0f} MiB") for name, mebibytes in memory.peaks.items()),
        ("the database", f"{day.database_size() / 2**20:,.0f} MiB, of which the day {grown / 2**20:,.0f} MiB"),
        ("ledger a data source", f"{grown / day.total:,.0f} bytes"),
    ]
    say("\n" + table(("a whole day", "measured"), rows))
    assert fired == {"started": day.schedules}, fired
    assert ended == {"succeeded": day.schedules}, ended
    assert (extractor.lost, extractor.duplicates, extractor.strangers) == (0, 0, 0)


@contextmanager
def a_worker(stack: Stack, processes: int) -> Iterator[Process]:
    """Run a stock worker."""
    worker = stack.worker(concurrency=processes)
    try:
        yield worker
    finally:
        worker.terminate(within=60)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.day", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=SIZE, help=f"schedules; default {SIZE:,}")
    parser.add_argument("--sources", type=int, default=SOURCES, help=f"data sources of each; default {SOURCES}")
    parser.add_argument("--hours", type=int, default=HOURS, help=f"that the day has; default {HOURS}")
    parser.add_argument("--processes", type=int, default=2, help="of the worker; default 2")
    parser.add_argument("--beats", type=int, default=1, help="default 1")
    return parser.parse_args()


def main() -> None:
    given = options()
    with ExitStack() as opened:
        postgres = opened.enter_context(PostgresServer(SERVER))
        rabbitmq = opened.enter_context(RabbitMQServer())
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        url = postgres.create_database("bench")
        stack = Stack.on_rabbitmq(url, rabbitmq.url, directory)
        opened.callback(stack.close)
        day = Day(stack, given.size, given.sources, given.hours)
        day.prepare()
        stack.declare_extraction_queue()
        say(machine(stack, rabbitmq))
        worker = opened.enter_context(a_worker(stack, given.processes))
        running = opened.enter_context(beats(stack, given.beats))
        heads = {"worker and its children": worker.pid, "a beat": running[0].pid, "PostgreSQL": postgres.pid}
        memory = opened.enter_context(Memory({**heads, "RabbitMQ": rabbitmq.node_pid}))
        extractor, took = Extractor(day), []
        before = day.database_size()
        for hour in range(day.hours):
            took.append(day.live_through(hour))
            extractor.empty_queue()
            say(f"  hour {hour + 1}: {day.slots(hour):,} slots, {took[-1]:.2f} s")
        show(day, took, extractor, memory, day.database_size() - before)


if __name__ == "__main__":
    main()
