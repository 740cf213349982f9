"""The scheduler at a million schedules: import, ticks, claims, enqueues, lateness, edits.

    python -m tests.bench.schedules [--size 1000000] [--only claim --only edit]

On a private PostgreSQL and RabbitMQ. Schedules are 1,000 distinct pairs of text and time zone which fire in half a
year; whatever is to be due is made so by SQL. Engines run in processes of their own and do what a beat does, on
command; lateness and edits are those of real ``celery beat`` processes. Rates are medians of rounds, interleaved.
Compare the ratios, which hold elsewhere too; the rates are this machine's.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any, Final, LiteralString, Self
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.support.postgres import PostgresServer
from tests.support.processes import Process, eventually, peak_memory
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack, amqp_connection, queue_depth

SIZE: Final = 1_000_000
SMALL: Final = 10_000
TEXTS: Final = 100
ZONES: Final = (
    *("UTC", "Asia/Shanghai", "Asia/Tokyo", "Asia/Kolkata", "Australia/Sydney"),
    *("Europe/Berlin", "Europe/London", "America/New_York", "America/Los_Angeles", "America/Sao_Paulo"),
)
ROUNDS: Final = 3
TICKS: Final = 300
LOOKS: Final = 20
CLAIMED: Final = 200_000
ENQUEUED: Final = 60_000
A_SECOND: Final = 1_000
SECONDS: Final = 60
EDITS: Final = 5
PARTS: Final = ("tick", "claim", "enqueue", "lateness", "edit")

QUEUE: Final = "orchestrator.crawl"
SERVER: Final = {"fsync": "on", "full_page_writes": "on", "shared_buffers": "256MB"}
SETTINGS: Final = {"SCHEDULER__MAX_QUEUED": "10000000", "LOG__LEVEL": "WARNING"}
_PATIENCE: Final = 120.0  # seconds


# --- What is printed ---------------------------------------------------------------------------------------


@dataclass
class Figures:
    """The rows of the table, said as they come and printed as a whole at the end."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    _began_at: float = field(default_factory=monotonic)

    def add(self, what: str, measured: str, target: str = "", *, reached: bool | None = None) -> None:
        """Note one row."""
        verdict = "" if reached is None else "yes" if reached else "**no**"
        self.rows.append((what, measured, target, verdict))
        passed = monotonic() - self._began_at
        say(f"{passed:5.0f} s  {what}: {measured}{f'   (target {target}: {verdict})' if target else ''}")

    def show(self) -> None:
        """Print the table."""
        say("\n" + table(("what", "measured", "target", "reached"), self.rows))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def machine(stack: Stack, rabbitmq: RabbitMQServer) -> str:
    """Say what the figures were taken on."""
    version = stack.query("SHOW server_version")[0]["server_version"]
    return f"{host()}; RabbitMQ {rabbitmq.version}, PostgreSQL {version} with fsync=on, loopback, all on the same cores"


def host() -> str:
    """Say what machine this is, and how busy it is."""
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores of {models[0] if models else 'unknown make'}, {memory:.0f} GiB"
        f" ({platform.machine()} {platform.system()}, Python {platform.python_version()}),"
        f" load average {os.getloadavg()[0]:.1f} before"
    )


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


# --- An engine in a process of its own -----------------------------------------------------------------------


class Engine:
    """A process that does what a beat does, on command."""

    def __init__(self, stack: Stack) -> None:
        with (stack.directory / "engines.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.schedules", "--engine"],
                env=stack.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def tell(self, order: str, number: int = 0) -> None:
        """Give an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([order, number]) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Mapping[str, float]:
        """Wait for the answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the engine has ended; its log says why"
        answer: dict[str, float] = json.loads(line)
        return answer

    def do(self, order: str, number: int = 0) -> Mapping[str, float]:
        """Give an order and wait for the answer."""
        self.tell(order, number)
        return self.hear()


class Orders:
    """What an engine can do; each order takes a number, which most have no use for."""

    def __init__(self) -> None:
        # Read the environment that the parent made; celery.beat is what a beat has in memory, too.
        import orchestrator.beat  # noqa: F401, PLC0415
        from orchestrator.bootstrap import services  # noqa: PLC0415
        from orchestrator.domain import Node  # noqa: PLC0415
        from orchestrator.firing import FiringEngine  # noqa: PLC0415
        from orchestrator.telemetry import configure_logging  # noqa: PLC0415

        self._ours = services()
        configure_logging(self._ours.settings.log)
        self._schedules = self._ours.ledger.schedules
        self._node = Node(f"bench:{os.getpid()}", "beat")
        self._firing, self._pulse, _ = self._ours.beat(self._node)
        limit = self._ours.settings.scheduler.max_queued
        self._silent = FiringEngine(
            self._ours.ledger, self._ours.timetable, lambda _: None, self._node.name, max_queued=limit
        )

    def start(self, _: int) -> None:
        """Nothing but what there was to import."""

    def look_round(self, _: int) -> None:
        """Rounds until a sweep is complete: the first one is the import."""
        while not self._swept():
            sleep(min(self._firing.once(), 1.0))
            assert self._firing.problem is None, self._firing.problem

    def look_round_again(self, _: int) -> None:
        """The same for either engine: each looks round once before it takes its time."""
        for engine in (self._firing, self._silent):
            with self._ours.database.transaction() as connection:
                connection.exec_driver_sql("UPDATE orchestrator.catalog_watch SET swept_at = NULL")
            while not self._swept():
                engine.once()

    def tick(self, times: int) -> None:
        """Rounds of the engine and of the pulse, a heartbeat in each."""
        for _ in range(times):
            self._firing.once()
            self._pulse.once()
            assert self._firing.problem is None, self._firing.problem

    def look(self, times: int) -> None:
        """Looks by updated_at."""
        for _ in range(times):
            self._schedules.look(self._ours.timetable, every=0.0, sweep_every=1e9, by=self._node.name)

    def sweep(self, _: int) -> None:
        """A whole sweep."""
        while self._schedules.look(self._ours.timetable, every=1e9, sweep_every=0.0, by=self._node.name).more:
            pass

    def claim(self, _: int) -> None:
        """Rounds until nothing is due; nothing is sent."""
        self._until_nothing_is_due(self._silent)

    def claim_and_send(self, _: int) -> None:
        """The same with wake-ups sent."""
        self._until_nothing_is_due(self._firing)

    def close(self) -> None:
        """End the sessions: the server counts a session's time when it ends."""
        self._ours.database.close()

    def _until_nothing_is_due(self, engine: Any) -> None:  # noqa: ANN401 -- imported late
        while (due_in := self._schedules.next_due_in()) is not None and due_in <= 0:
            sleep(min(engine.once(), 0.05))
            assert engine.problem is None, engine.problem

    def _swept(self) -> bool:
        with self._ours.database.transaction() as connection:
            watched = connection.exec_driver_sql("SELECT swept_at FROM orchestrator.catalog_watch").scalar_one()
            return watched is not None


def obey() -> None:
    """Be an engine: an order a line comes in, an answer a line goes out."""
    orders = Orders()
    for line in sys.stdin:
        order, number = json.loads(line)
        # This clock is the machine's: other processes' moments compare.
        began_at = monotonic()
        getattr(orders, order)(number)
        ended_at = monotonic()
        if order in {"tick", "look"}:
            orders.close()
        say(json.dumps({"began_at": began_at, "ended_at": ended_at, "peak": peak_memory()}))


def seconds(answer: Mapping[str, float]) -> float:
    return answer["ended_at"] - answer["began_at"]


# --- The application's table ---------------------------------------------------------------------------------


def texts() -> list[str]:
    """Return distinct texts, none of which fires for months."""
    month = datetime.now(UTC).month
    months = [(month + ahead - 1) % 12 + 1 for ahead in (5, 6, 7)]
    return [f"{n * 7 % 60} {n % 24} {1 + n % 28} {months[n % 3]} *" for n in range(TEXTS)]


def prepare(stack: Stack, size: int) -> None:
    """Fill the application's table."""
    stack.prepare()
    stack.execute("ALTER TABLE crawl_tasks ADD COLUMN timezone text")
    stack.execute(
        "INSERT INTO crawl_tasks (id, data_source_ids, schedule, timezone, is_active, updated_at)"
        " SELECT n, '{1}', (%s::text[])[1 + n %% %s], (%s::text[])[1 + n / %s %% %s], true, now() - interval '1 hour'"
        " FROM generate_series(1, %s) AS n",
        *(texts(), TEXTS, list(ZONES), TEXTS, len(ZONES), size),
    )
    stack.execute("CREATE INDEX crawl_tasks_updated_at_idx ON crawl_tasks (updated_at)")
    vacuum(stack, "crawl_tasks")


def vacuum(stack: Stack, *tables: str) -> None:
    """Do at once what autovacuum does within a minute, lest it do so in the middle of a measurement."""
    with psycopg.connect(stack.database, autocommit=True) as connection:
        for name in tables:
            connection.execute(sql.SQL("VACUUM (ANALYZE) {}").format(sql.Identifier(*name.split("."))))
        connection.execute("CHECKPOINT")


def make_due(stack: Stack, count: int) -> None:
    """Have so many slots come at once, none of them ever claimed before."""
    stack.execute("TRUNCATE orchestrator.runs, orchestrator.attempts, orchestrator.run_events")
    stack.execute("TRUNCATE orchestrator.firings, orchestrator.outbox")
    stack.execute(
        "UPDATE orchestrator.schedules SET next_fire_at = date_trunc('second', now()) - interval '3 seconds'"
        " WHERE task_id <= %s",
        count,
    )
    vacuum(stack, "orchestrator.schedules")
    no_sweep_now(stack)


def no_sweep_now(stack: Stack) -> None:
    """A sweep, due once a minute, is measured by itself."""
    stack.execute("UPDATE orchestrator.catalog_watch SET swept_at = clock_timestamp(), looked_at = clock_timestamp()")


def firings(stack: Stack) -> dict[str, int]:
    rows = stack.query("SELECT outcome, count(*) FROM orchestrator.firings GROUP BY outcome")
    return {row["outcome"]: row["count"] for row in rows}


# --- The parts -----------------------------------------------------------------------------------------------


def first_import(engine: Engine, stack: Stack, size: int) -> float:
    """Return the seconds of the first import."""
    took = seconds(engine.do("look_round"))
    known = stack.query("SELECT count(*) FROM orchestrator.schedules WHERE next_fire_at IS NOT NULL")[0]["count"]
    assert known == size, f"{known:,} of {size:,} schedules were read"
    vacuum(stack, "orchestrator.schedules")
    return took


def ticks(sides: dict[int, tuple[Engine, Stack]], rounds: int, figures: Figures) -> None:
    """Ticks with nothing due, and what comes beside them: looks and sweeps."""
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for order, times in (("tick", TICKS), ("look", LOOKS)):
            for size, (engine, stack) in sides.items():
                measured.setdefault((order, size), []).append(costs(engine, stack, order, times))
    medians = {key: [statistics.median(each) for each in zip(*values, strict=True)] for key, values in measured.items()}
    names = {
        "tick": "a tick with nothing due (engine, heartbeat, pulse)",
        "look": "beside it each second: a look by updated_at, with an index",
    }
    for (order, size), (cost, wall) in medians.items():
        reached = cost <= 1 if order == "tick" else None
        figures.add(
            f"{names[order]}, {size:,} schedules: database time",
            f"{cost:.2f} ms",
            "1 ms" if reached is not None else "",
            reached=reached,
        )
        figures.add(f"{names[order]}, {size:,} schedules: wall time", f"{wall:.2f} ms")
    ratio = medians["tick", max(sides)][0] / medians["tick", min(sides)][0]
    figures.add(
        f"a tick with nothing due, {max(sides):,} / {min(sides):,}: database time",
        f"{ratio:.2f}",
        "2",
        reached=ratio <= 2,
    )
    engine, stack = sides[max(sides)]
    stack.execute("DROP INDEX crawl_tasks_updated_at_idx")
    cost, wall = costs(engine, stack, "look", LOOKS)
    figures.add(f"a look by updated_at without an index, {max(sides):,} schedules: database time", f"{cost:.2f} ms")
    stack.execute("CREATE INDEX crawl_tasks_updated_at_idx ON crawl_tasks (updated_at)")
    figures.add(
        f"beside it each minute: a sweep, nothing changed, {max(sides):,} schedules",
        f"{seconds(engine.do('sweep')):.1f} s",
    )


def costs(engine: Engine, stack: Stack, order: str, times: int) -> tuple[float, float]:
    """Return the milliseconds of database time and of wall time that an order takes each time."""
    engine.do(order, 1)
    no_sweep_now(stack)
    before = active_time(stack)
    wall = seconds(engine.do(order, times)) * 1e3
    return (active_time(stack) - before) / times, wall / times


def active_time(stack: Stack) -> float:
    """Return the milliseconds that ended sessions in a stack's database spent on statements, by pg_stat_database."""
    name = conninfo_to_dict(stack.database)["dbname"]
    # Asked elsewhere, so that the questions do not count.
    with psycopg.connect(stack.database, dbname="postgres", autocommit=True) as connection:

        def ended() -> bool:
            found = connection.execute("SELECT 1 FROM pg_stat_activity WHERE datname = %s", [name]).fetchone()
            return found is None

        eventually(ended, within=60, what="every session has ended")
        row = connection.execute("SELECT active_time FROM pg_stat_database WHERE datname = %s", [name]).fetchone()
        assert row is not None
        return float(row[0])


def claims(stack: Stack, engines: Sequence[Engine], count: int, rounds: int, figures: Figures) -> None:
    rates: dict[int, list[float]] = {number: [] for number in range(1, len(engines) + 1)}
    for _ in range(rounds):
        for number, measured in rates.items():
            measured.append(claim_rate(stack, engines[:number], count, "claim"))
    show_rates(f"slots claimed, {count:,} due at once, nothing sent", rates, 30_000, figures)


def enqueues(stack: Stack, engines: Sequence[Engine], count: int, rounds: int, figures: Figures) -> None:
    rates: dict[int, list[float]] = {number: [] for number in range(1, len(engines) + 1)}
    for _ in range(rounds):
        for number, measured in rates.items():
            purge(stack)
            measured.append(claim_rate(stack, engines[:number], count, "claim_and_send"))
            sent = queue_depth(stack.broker or "", QUEUE)
            assert sent == count, f"{sent:,} of {count:,} wake-ups are in the queue"
    purge(stack)
    show_rates(f"slots claimed and enqueued with confirms, {count:,} due at once", rates, 10_000, figures)


def claim_rate(stack: Stack, engines: Sequence[Engine], count: int, order: str) -> float:
    make_due(stack, count)
    for engine in engines:
        engine.tell(order)
    answers = [engine.hear() for engine in engines]
    assert firings(stack) == {"started": count}, firings(stack)
    return count / (max(each["ended_at"] for each in answers) - min(each["began_at"] for each in answers))


def show_rates(what: str, rates: dict[int, list[float]], target: int, figures: Figures) -> None:
    medians = {number: statistics.median(values) for number, values in rates.items()}
    best = max(medians, key=lambda number: medians[number])
    for number, values in rates.items():
        figures.add(
            f"{what}: {number} process{'es' if number > 1 else ''}",
            f"{medians[number]:,.0f}/s ({min(values):,.0f} to {max(values):,.0f})",
            f"{target:,}/s" if number == best else "",
            reached=medians[number] >= target if number == best else None,
        )


def purge(stack: Stack) -> None:
    with amqp_connection(stack.broker or "") as connection:
        channel = connection.channel()
        channel.queue_declare(QUEUE, durable=True, auto_delete=False)
        channel.queue_purge(QUEUE)


@contextmanager
def beats(stack: Stack, number: int) -> Iterator[list[Process]]:
    """Run real beats, which have had their first look round."""
    began_at = stack.query("SELECT clock_timestamp() AS now")[0]["now"]
    running = [stack.start("celery", "-A", "orchestrator.celery_app", "beat") for _ in range(number)]
    try:
        eventually(
            lambda: stack.query(
                "SELECT 1 FROM orchestrator.catalog_watch WHERE swept_at > %s AND sweep_began_at IS NULL"
                " AND (SELECT count(*) FROM orchestrator.nodes WHERE kind = 'beat' AND started_at > %s) = %s",
                *(began_at, began_at, number),
            ),
            within=_PATIENCE,
            what="the beats have looked round",
        )
        yield running
    finally:
        for process in running:
            process.terminate(within=30)


class Consumer:
    """Stands in for the workers, and is independent of what it judges: notes when each message arrived.

    Ends the runs by plain SQL, as workers would: runs that nobody begins are woken again and again.
    """

    def __init__(self, stack: Stack) -> None:
        self.arrivals: dict[UUID, float] = {}
        self._stack = stack
        self._unfinished: list[UUID] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._consume), threading.Thread(target=self._finish)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _consume(self) -> None:
        with amqp_connection(self._stack.broker or "") as connection:
            channel = connection.channel()
            channel.basic_consume(QUEUE, no_ack=True, callback=self._take)
            while not self._stop.is_set():
                try:
                    connection.drain_events(timeout=0.1)
                except TimeoutError:
                    continue

    def _take(self, message: Any) -> None:  # noqa: ANN401 -- py-amqp's, untyped
        run_id = UUID(message.headers["id"])
        if run_id not in self.arrivals:
            self.arrivals[run_id] = time()
            self._unfinished.append(run_id)

    def _finish(self) -> None:
        with psycopg.connect(self._stack.database, autocommit=True) as connection:
            while not self._stop.wait(0.5):
                ended, self._unfinished = self._unfinished, []
                connection.execute(
                    "UPDATE orchestrator.runs SET state = 'succeeded', finished_at = clock_timestamp(), wake_at = NULL"
                    " WHERE id = ANY(%s)",
                    [ended],
                )


def lateness(stack: Stack, numbers: Sequence[int], a_second: int, length: int, figures: Figures) -> None:
    count = a_second * length
    for number in numbers:
        purge(stack)
        make_due(stack, 0)
        with beats(stack, number) as running, Consumer(stack) as consumer:
            stack.execute(
                "UPDATE orchestrator.schedules"
                " SET next_fire_at = date_trunc('second', now()) + make_interval(secs => 10 + task_id %% %s)"
                " WHERE task_id <= %s",
                *(length, count),
            )
            eventually(
                lambda seen=consumer.arrivals: len(seen) >= count,  # type: ignore[misc] # a default has no type
                within=length + _PATIENCE,
                what=f"{count:,} messages arrive",
            )
            peak = max(peak_memory(process.pid) for process in running)
        fired = stack.query(
            "SELECT run_id, outcome, extract(epoch FROM scheduled_for)::float AS slot,"
            " extract(epoch FROM claimed_at - scheduled_for)::float AS late FROM orchestrator.firings"
        )
        assert len(fired) == count
        assert {row["outcome"] for row in fired} == {"started"}
        claimed = [row["late"] for row in fired]
        arrived = [consumer.arrivals[row["run_id"]] - row["slot"] for row in fired]
        name = f"{a_second:,} due a second for {length} s, {number} beat{'s' if number > 1 else ''}"
        p99 = quantile(claimed, 0.99)
        figures.add(
            f"{name}: from slot to claim, p50 / p99 / max",
            f"{quantile(claimed, 0.5):.3f} / {p99:.3f} / {max(claimed):.3f} s",
            "p99 1 s",
            reached=p99 < 1,
        )
        figures.add(
            f"{name}: from slot to the wake-up's arrival, p50 / p99 / max",
            f"{quantile(arrived, 0.5):.3f} / {quantile(arrived, 0.99):.3f} / {max(arrived):.3f} s",
        )
        show_memory(f"{name}: peak memory of a beat", peak, figures)


def show_memory(what: str, peak: float, figures: Figures) -> None:
    figures.add(what, f"{peak:.0f} MiB", "200 MiB", reached=peak <= 200)


def edits(stack: Stack, size: int, trials: int, figures: Figures) -> None:
    with beats(stack, 1):
        took = [
            noticed_after(stack, size // (trial + 1), f"{trial} 4 29 2 *", ", updated_at = now()")
            for trial in range(trials)
        ]
        figures.add(
            f"an edit noticed among {size:,}, slowest of {trials}", f"{max(took):.2f} s", "2 s", reached=max(took) <= 2
        )
        stack.execute("ALTER TABLE crawl_tasks DROP COLUMN updated_at")
        # The worst moment: right after a sweep.
        before = stack.query("SELECT swept_at FROM orchestrator.catalog_watch")
        eventually(
            lambda: stack.query("SELECT swept_at FROM orchestrator.catalog_watch") != before,
            within=_PATIENCE,
            what="a sweep is complete",
        )
        late = noticed_after(stack, size, "4 4 29 2 *", "")
        figures.add("the same without updated_at, right after a sweep", f"{late:.1f} s", "60 s", reached=late <= 60)


def noticed_after(stack: Stack, task_id: int, text: str, also: LiteralString) -> float:
    """Edit a row; return the seconds until the ledger has the new text."""
    with psycopg.connect(stack.database, autocommit=True) as connection:
        query = sql.SQL("UPDATE crawl_tasks SET schedule = %s" + also + " WHERE id = %s")
        connection.execute(query, [text, task_id])
        began_at = monotonic()
        eventually(
            lambda: (
                connection.execute("SELECT text FROM orchestrator.schedules WHERE task_id = %s", [task_id]).fetchone()
                == (text,)
            ),
            within=_PATIENCE,
            what="the edit is noticed",
        )
        return monotonic() - began_at


# --- All of it -----------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.schedules", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=SIZE, help=f"schedules; default {SIZE:,}")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; the import is always done")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of which rates are medians; default {ROUNDS}")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"of the lateness part; default {SECONDS}")
    given = parser.parse_args()
    given.only = given.only or PARTS
    return given


def main() -> None:
    given = options()
    if given.engine:
        obey()
        return
    figures = Figures()
    with ExitStack() as opened:
        postgres = opened.enter_context(PostgresServer(SERVER))
        rabbitmq = opened.enter_context(RabbitMQServer())
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        sides: dict[int, tuple[Engine, Stack]] = {}
        for size in dict.fromkeys((SMALL, given.size) if "tick" in given.only else (given.size,)):
            stack = Stack.on_rabbitmq(postgres.create_database(f"bench_{size}"), rabbitmq.url, directory, **SETTINGS)
            opened.callback(stack.close)
            prepare(stack, size)
            engine = opened.enter_context(Engine(stack))
            engine.do("start")
            sides[size] = engine, stack
        say(machine(sides[given.size][1], rabbitmq))
        took = [first_import(*sides[size], size) for size in sides]
        figures.add(f"first import of {given.size:,} schedules", f"{took[-1]:.1f} s", "15 s", reached=took[-1] <= 15)
        if "tick" in given.only:
            ticks(sides, given.rounds, figures)
        measure(given, opened, *sides[given.size], figures)
        figures.show()


def measure(given: argparse.Namespace, opened: ExitStack, engine: Engine, stack: Stack, figures: Figures) -> None:
    """Do the parts that take one size."""
    engines = [engine]
    if {"claim", "enqueue"} & set(given.only):
        engines += [opened.enter_context(Engine(stack)) for _ in range(2)]
        for each in engines:
            each.do("look_round_again")
    if "claim" in given.only:
        claims(stack, engines, min(CLAIMED, given.size), given.rounds, figures)
    if "enqueue" in given.only:
        enqueues(stack, engines[:2], min(ENQUEUED, given.size), given.rounds, figures)
    show_memory(
        "peak memory of the process that imported, ticked, swept and claimed", engine.do("start")["peak"], figures
    )
    for each in engines:
        each.end()
    if "lateness" in given.only:
        lateness(stack, (1, 2), min(A_SECOND, given.size // given.seconds), given.seconds, figures)
    if "edit" in given.only:
        edits(stack, given.size, EDITS, figures)


if __name__ == "__main__":
    main()
