"""A whole ``execute_crawl_task`` for 100,000 data sources, ledger included, and how it grows to a million.

    python -m tests.bench.dispatch

Speed: a Celery message to a stock worker, measured from the run's acceptance to its end by the ledger's own
moments, beside the seed's loop (a query and a confirmed publish for each source) and frames built by hand
(the limit of the wire, without any ledger); three times each, interleaved. Growth: 1,000, 100,000 and 1,000,000
sources, each in a fresh process that does what a worker's child does. Compare the ratios.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from uuid import uuid4

import kombu
import psycopg

from tests.bench import publish
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import QUEUE, Stack, queue_depth

ROUNDS = 3
SOURCES = 100_000
SEED_SOURCES = 3_000
SIZES = (1_000, 100_000, 1_000_000)


def ours(stack: Stack) -> float:
    """Messages a second of one whole run by a stock worker."""
    run_id = stack.crawl(SOURCES)
    run = stack.await_run(run_id, within=300)
    assert (run["state"], run["published"]) == ("succeeded", SOURCES)
    return SOURCES / float((run["finished_at"] - run["created_at"]).total_seconds())


def seeds_loop(stack: Stack) -> float:
    """The seed's loop: per source a query for its config, then one publish that is confirmed."""
    started = perf_counter()
    with (
        psycopg.connect(stack.database, autocommit=True) as database,
        kombu.Connection(stack.broker or "", transport_options={"confirm_publish": True}) as connection,
    ):
        producer = connection.Producer()
        row = database.execute("SELECT data_source_ids FROM crawl_tasks WHERE id = %s", [SEED_SOURCES]).fetchone()
        assert row is not None
        for source in row[0]:
            config = database.execute(
                "SELECT id FROM crawl_configs WHERE data_source_id = %s AND status = 'active'"
                " ORDER BY created_at DESC, id DESC LIMIT 1",
                [source],
            ).fetchone()
            assert config is not None
            producer.publish({"crawl_config_id": config[0]}, routing_key=QUEUE, delivery_mode=2, mandatory=True)
    return SEED_SOURCES / (perf_counter() - started)


def frames_by_hand(stack: Stack) -> float:
    """The limit: frames marshalled one by one and written by the 500, acks counted, no database."""
    assert stack.broker is not None
    return publish.measure(stack.broker, publish.by_hand)


def purge(stack: Stack) -> None:
    assert stack.broker is not None
    with publish.connect(stack.broker) as connection:
        connection.channel().queue_declare(QUEUE, durable=True, auto_delete=False)
        connection.channel().queue_purge(QUEUE)


def speed(stack: Stack) -> None:
    stack.worker(concurrency=1)
    ways = {"whole run": ours, "seed's loop": seeds_loop, "frames by hand": frames_by_hand}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            purge(stack)
            rates[name].append(way(stack))
    for name, values in rates.items():
        say(f"{name:16}{statistics.median(values):10,.0f}/s   ({min(values):,.0f} to {max(values):,.0f})")
    whole, loop, limit = (statistics.median(values) for values in rates.values())
    say(f"whole run / seed's loop {whole / loop:.1f} (target 10)")
    say(f"whole run / frames by hand {whole / limit:.2f} (target 0.3)")


def growth(stack: Stack) -> None:
    figures = {}
    for size in SIZES:
        purge(stack)
        command = [sys.executable, "-m", "tests.bench.dispatch", "--one-run", str(size)]
        done = subprocess.run(command, env=stack.env, capture_output=True, text=True, check=True)
        figures[size] = json.loads(done.stdout)
        assert stack.broker is not None
        assert queue_depth(stack.broker, QUEUE) == size
        seconds, peak = figures[size]["seconds"], figures[size]["peak"]
        each, mebibytes = seconds / size * 1e6, peak / 1024
        say(f"{size:>9,} sources{seconds:8.2f} s   {each:6.1f} µs each   peak memory {mebibytes:6.1f} MiB")
    small, middle, large = (figures[size] for size in SIZES)
    say(
        f"memory growth {SIZES[0]:,} to {SIZES[2]:,}: {(large['peak'] - small['peak']) / 1024:.1f} MiB (target 60)   "
        f"time per source {SIZES[2]:,} / {SIZES[1]:,}: "
        f"{large['seconds'] / SIZES[2] / (middle['seconds'] / SIZES[1]):.2f} (target within 15 %)"
    )


def one_run(size: int) -> None:
    """Do one run as a worker's child would, and print its seconds and peak memory (KiB)."""
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
    # Not ru_maxrss: that one remembers the process which we were forked from.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    say(json.dumps({"seconds": seconds, "peak": peak}))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    options = {"fsync": "on", "full_page_writes": "on", "shared_buffers": "256MB"}
    with (
        PostgresServer(options) as postgres,
        RabbitMQServer() as rabbitmq,
        tempfile.TemporaryDirectory() as directory,
    ):
        stack = Stack.on_rabbitmq(postgres.create_database("bench"), rabbitmq.url, Path(directory))
        stack.prepare()
        stack.application.add_sources(max(SIZES))
        for size in {SOURCES, SEED_SOURCES, *SIZES}:
            stack.application.add_task(size, range(1, size + 1))
        stack.execute("ANALYZE crawl_tasks, crawl_configs")
        try:
            speed(stack)
            growth(stack)
        finally:
            stack.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-run"]:
        one_run(int(sys.argv[2]))
    else:
        main()
