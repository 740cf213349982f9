"""A whole ``execute_crawl_task``, ledger included, beside other ways to send as much, and how it grows to a million.

    python -m tests.bench.dispatch [--size 100000] [--rounds 3] [--only speed|growth]

Speed: a Celery message to a stock worker, measured from the run's acceptance to its end by the ledger's own moments,
with a child for each of two cores, which is Celery's default, and with one child; beside the seed's loop (a query and
a confirmed publish for each source), Celery's ``send_task``, taskiq, procrastinate (tests/support/clients/dispatch.py,
in a throw-away environment; all three read the configs in one statement), and frames built by hand, the limit of the
wire. All send one message for each source, interleaved, to durable classic queues that nobody reads. Growth: 1,000 to
1,000,000 sources, each in a fresh process that does what a worker's child does, while the queue is emptied twice a
second: a million messages that nobody reads slow RabbitMQ down, whoever sent them. Compare the ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Final
from uuid import uuid4

import kombu
import psycopg

from tests.bench import publish
from tests.bench.schedules import SERVER, machine, say, table
from tests.support.environments import CLIENTS, make_environment
from tests.support.postgres import PostgresServer
from tests.support.processes import peak_memory
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import QUEUE, Stack, amqp_connection, queue_depth

ROUNDS: Final = 3
SOURCES: Final = 100_000
SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
PARTS: Final = ("speed", "growth")
PEER_QUEUES: Final = {"celery": "peer.celery", "celery-confirmed": "peer.celery", "taskiq": "peer.taskiq"}
_PATIENCE: Final = 900.0  # seconds for one way, once

_OURS: Final = "confirmed; ledger; goes on after a crash, what comes twice has an equal id"
WHOLE: Final = "whole run (ours), 2 processes"
ALONE: Final = "whole run (ours), 1 process"
GUARANTEES: Final = {
    WHOLE: _OURS,
    ALONE: _OURS,
    "the seed's loop": "confirmed one by one; begins anew after a crash, duplicates unmarked",
    "Celery send_task, its defaults": "**not confirmed**; begins anew after a crash, new ids",
    "Celery send_task, confirm_publish": "confirmed one by one; begins anew after a crash, new ids",
    "taskiq + aio-pika, kiq by the 1,000": "confirmed; begins anew after a crash, new ids",
    "procrastinate, batch_defer by the 1,000": "committed to PostgreSQL, no broker; begins anew after a crash, new ids",
    "frames built by hand": "confirmed; no database, no ledger: the limit",
}
"""The ways, and what each guarantees. All messages are persistent."""


# --- The ways, each of which returns messages a second -------------------------------------------------------


def ours(stack: Stack, size: int, processes: int, clear: Callable[[Stack], None]) -> float:
    """One whole run by a stock worker with so many children, which has done one before."""

    def once() -> float:
        clear(stack)
        run = stack.await_run(stack.crawl(size), within=_PATIENCE)
        assert (run["state"], run["published"]) == ("succeeded", size)
        return size / float((run["finished_at"] - run["created_at"]).total_seconds())

    worker = stack.worker(concurrency=processes)
    once()
    rate = once()
    worker.terminate(within=60)
    return rate


def seeds_loop(stack: Stack, size: int) -> float:
    """The seed's loop: per source a query for its config, then one publish that is confirmed."""
    started = perf_counter()
    with (
        psycopg.connect(stack.database, autocommit=True) as database,
        kombu.Connection(stack.broker or "", transport_options={"confirm_publish": True}) as connection,
    ):
        producer = connection.Producer()
        row = database.execute("SELECT data_source_ids FROM crawl_tasks WHERE id = %s", [size]).fetchone()
        assert row is not None
        for source in row[0]:
            config = database.execute(
                "SELECT id FROM crawl_configs WHERE data_source_id = %s AND status = 'active'"
                " ORDER BY created_at DESC, id DESC LIMIT 1",
                [source],
            ).fetchone()
            assert config is not None
            producer.publish({"crawl_config_id": config[0]}, routing_key=QUEUE, delivery_mode=2, mandatory=True)
    return size / (perf_counter() - started)


def frames_by_hand(stack: Stack, size: int) -> float:
    """The limit: frames marshalled one by one and written by the 500, acks counted, no database."""
    return publish.measure(stack.broker or "", lambda url: publish.by_hand(url, size))


def peer(python: Path, name: str) -> Callable[[Stack, int], float]:
    """Another tool, which must have sent as many messages as we do."""

    def way(stack: Stack, size: int) -> float:
        broker = stack.broker or ""
        command: list[str | Path] = [python, "-I", CLIENTS / "dispatch.py", name, str(size), stack.database, broker]
        done = subprocess.run(command, env={}, capture_output=True, text=True, check=False, timeout=_PATIENCE)
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout.splitlines()[-1])
        queue = PEER_QUEUES.get(name)
        arrived = queue_depth(broker, queue) if queue else _jobs(stack)
        assert (figures["sent"], arrived) == (size, size), f"{name} sent {figures['sent']:,}, {arrived:,} arrived"
        return size / float(figures["seconds"])

    return way


def _jobs(stack: Stack) -> int:
    return int(stack.query("SELECT count(*) FROM public.procrastinate_jobs")[0]["count"])


def purge(stack: Stack) -> None:
    """Empty the queue of ours, and delete the others': each declares its own as it likes."""
    stack.declare_extraction_queue()
    with amqp_connection(stack.broker or "") as connection:
        channel = connection.channel()
        channel.queue_purge(QUEUE)
        for queue in {publish.QUEUE, *PEER_QUEUES.values()}:
            channel.queue_delete(queue)


# --- The parts -----------------------------------------------------------------------------------------------


def speed(stack: Stack, directory: Path, size: int, rounds: int) -> None:
    """Interleave all ways, and print their medians and ratios."""
    python = make_environment(directory / "peers", "peers")
    peers = [peer(python, name) for name in ("celery", "celery-confirmed", "taskiq", "procrastinate")]
    by_two, alone = (partial(ours, processes=processes, clear=purge) for processes in (2, 1))
    ways: dict[str, Callable[[Stack, int], float]] = dict(
        zip(GUARANTEES, (by_two, alone, seeds_loop, *peers, frames_by_hand), strict=True)
    )
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            purge(stack)
            rates[name].append(way(stack, size))
            say(f"  round {number + 1}: {name}: {rates[name][-1]:,.0f}/s")
    purge(stack)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        [
            name,
            f"{medians[name]:,.0f}",
            spread(values),
            *(f"{medians[way] / medians[name]:.2f}" for way in (WHOLE, ALONE)),
            GUARANTEES[name],
        ]
        for name, values in rates.items()
    ]
    say(f"\n{size:,} data sources, medians of {rounds}, interleaved\n")
    say(table(("what", "messages/s", "range", "2 processes / this", "1 process / this", "guarantees"), rows))
    show_targets(
        *((f"{way} / the seed's loop", medians[way] / medians["the seed's loop"], "10") for way in (WHOLE, ALONE)),
        *(
            (f"{way} / frames built by hand", medians[way] / medians["frames built by hand"], "0.3")
            for way in (WHOLE, ALONE)
        ),
    )


def growth(stack: Stack, sizes: Sequence[int], rounds: int) -> None:
    """Run every size in a process of its own, by turns, and print how time and memory grow."""
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    peaks: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            purge(stack)
            # Each meets the ledger that the first one met.
            stack.execute("TRUNCATE orchestrator.runs, orchestrator.attempts, orchestrator.dispatches")
            command = [sys.executable, "-m", "tests.bench.dispatch", "--one-run", str(size)]
            with ThreadPoolExecutor(1) as pool:
                over = Event()
                read = pool.submit(read_until, over, stack.broker or "")
                try:
                    done = subprocess.run(command, env=stack.env, capture_output=True, text=True, check=True)
                finally:
                    over.set()
            figures = json.loads(done.stdout)
            assert read.result() == size
            seconds[size].append(figures["seconds"])
            peaks[size].append(figures["peak"])
            say(f"  {size:,} sources: {figures['seconds']:.2f} s, {figures['peak']:.1f} MiB")
    purge(stack)
    each = {size: statistics.median(values) / size * 1e6 for size, values in seconds.items()}
    rows = [
        [
            f"{size:,}",
            f"{statistics.median(values):.2f} ({spread(values, '.2f')})",
            f"{each[size]:.1f}",
            f"{max(peaks[size]):.1f} MiB",
        ]
        for size, values in seconds.items()
    ]
    say("\n" + table(("data sources", "seconds", "µs each", "peak memory"), rows))
    small, large = sizes[-3], sizes[-1]
    show_targets(
        (f"time per source, {large:,} / {small:,}", each[large] / each[small], "at most 1.15"),
        (f"memory, {large:,} less {sizes[0]:,}, MiB", max(peaks[large]) - max(peaks[sizes[0]]), "at most 60"),
    )


def read_until(over: Event, broker: str) -> int:
    """Empty the queue again and again until a run is over, as consumers would; return of how many messages."""
    with amqp_connection(broker) as connection:
        channel = connection.channel()
        read = 0
        while not over.wait(0.5):
            read += channel.queue_purge(QUEUE) or 0
        return read + (channel.queue_purge(QUEUE) or 0)


def spread(values: Sequence[float], pattern: str = ",.0f") -> str:
    """Say from what to what they go."""
    return f"{min(values):{pattern}} to {max(values):{pattern}}"


def show_targets(*found: tuple[str, float, str]) -> None:
    """Print ratios beside their targets."""
    rows = []
    for what, value, target in found:
        most = target.removeprefix("at most ")
        reached = value <= float(most) if most != target else value >= float(target)
        rows.append((what, f"{value:.2f}", target, "yes" if reached else "**no**"))
    say("\n" + table(("ratio", "measured", "target", "reached"), rows) + "\n")


def one_run(size: int) -> None:
    """Do one run as a worker's child would, and print its seconds and peak memory (MiB)."""
    from orchestrator.bootstrap import services  # noqa: PLC0415 -- reads the environment that the parent made
    from orchestrator.domain import CrawlArguments, NewRun, Trigger, traceparent_of  # noqa: PLC0415 -- the same
    from orchestrator.telemetry import configure_logging  # noqa: PLC0415 -- the same

    configure_logging(services().settings.log)
    ours, run_id = services(), uuid4()
    started = perf_counter()
    ours.ledger.runs.accept(
        NewRun(run_id, CrawlArguments(size), Trigger.CELERY, traceparent_of(run_id)), delivered=True
    )
    while ours.fan_out.deliver(run_id):
        pass
    seconds = perf_counter() - started
    assert ours.insights.run(run_id).published == size
    say(json.dumps({"seconds": seconds, "peak": peak_memory()}))


# --- All of it -----------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.dispatch", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--one-run", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=SOURCES, help=f"data sources of one run; default {SOURCES:,}")
    parser.add_argument(
        "--up-to", type=int, default=SIZES[-1], help=f"data sources up to which runs grow; default {SIZES[-1]:,}"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of which figures are medians; default {ROUNDS}")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part")
    given = parser.parse_args()
    given.only = given.only or PARTS
    return given


def main() -> None:
    given = options()
    if given.one_run:
        one_run(given.one_run)
        return
    sizes = [size * given.up_to // SIZES[-1] for size in SIZES] if "growth" in given.only else []
    with (
        PostgresServer(SERVER) as postgres,
        RabbitMQServer() as rabbitmq,
        tempfile.TemporaryDirectory() as directory,
    ):
        stack = Stack.on_rabbitmq(postgres.create_database("bench"), rabbitmq.url, Path(directory))
        stack.prepare()
        stack.application.add_sources(max([given.size, *sizes]))
        for size in {given.size, *sizes}:
            stack.application.add_task(size, range(1, size + 1))
        stack.execute("ANALYZE crawl_tasks, crawl_configs")
        say(machine(stack, rabbitmq))
        try:
            if "speed" in given.only:
                speed(stack, Path(directory), given.size, given.rounds)
            if "growth" in given.only:
                growth(stack, sizes, given.rounds)
        finally:
            stack.close()


if __name__ == "__main__":
    main()
