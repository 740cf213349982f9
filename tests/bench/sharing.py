"""One big run on 1, 2 and 4 worker processes, and how long a small run waits behind a big one.

    python -m tests.bench.sharing [--size 100000] [--big 1000000] [--rounds 3] [--only scale|fairness]

Scale: the same run on a stock worker with 1, 2 and 4 children, from acceptance to end by the ledger's moments,
interleaved; a run with more than DISPATCH__HELP_ABOVE data sources left invites the others (docs/adr/0012). Fairness:
while a run of a million is under way, runs of 10 data sources are sent one after the other, each as soon as the one
before it has ended: that is the worst moment, for a slice of the big run has just begun. Compare the ratios.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from tests.bench.dispatch import ROUNDS, SOURCES, purge, show_targets, spread
from tests.bench.schedules import SERVER, machine, quantile, say, table
from tests.support.postgres import PostgresServer
from tests.support.processes import eventually
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import QUEUE, TERMINAL, Stack, queue_depth

BIG: Final = 1_000_000
SMALL: Final = 10
SLICE: Final = 20.0
HELP_ABOVE: Final = 50_000
PROCESSES: Final = (1, 2, 4)
PARTS: Final = ("scale", "fairness")
_BEGUN: Final = 20  # of the big run a part of so many is published when the first small one is sent
_PATIENCE: Final = 1_800.0  # seconds for a big run


def scale(stack: Stack, size: int, rounds: int) -> None:
    """Do the same run on more and more processes, and print how it gains."""
    rates: dict[int, list[float]] = {processes: [] for processes in PROCESSES}
    for _ in range(rounds):
        for processes, measured in rates.items():
            purge(stack)
            worker = stack.worker(concurrency=processes)
            run = stack.await_run(stack.crawl(size), within=_PATIENCE)
            assert (run["state"], run["published"]) == ("succeeded", size)
            worker.terminate(within=60)
            assert queue_depth(stack.broker or "", QUEUE) == size
            measured.append(size / float((run["finished_at"] - run["created_at"]).total_seconds()))
            say(f"  {processes} worker processes: {measured[-1]:,.0f}/s")
    one = statistics.median(rates[1])
    rows = [
        [str(processes), f"{statistics.median(values):,.0f}", spread(values), f"{statistics.median(values) / one:.2f}"]
        for processes, values in rates.items()
    ]
    say(f"\none run of {size:,} data sources on {os.cpu_count()} cores, medians of {rounds}, interleaved\n")
    say(table(("worker processes", "messages/s", "range", "to one process"), rows))


def fairness(stack: Stack, size: int, slice_seconds: float) -> None:
    """Send small runs behind a big one, on one process and on two, and print how long they took."""
    rows, slowest = [], {}
    for processes in (1, 2):
        purge(stack)
        worker = stack.worker(concurrency=processes)
        big, waits = small_runs_behind(stack, size)
        worker.terminate(within=60)
        slowest[processes] = max(waits)
        taken = float((big["finished_at"] - big["created_at"]).total_seconds())
        rows.append(
            [
                str(processes),
                f"{taken:.1f} s",
                str(len(waits)),
                f"{quantile(waits, 0.5):.2f} s",
                f"{max(waits):.2f} s",
                f"{slice_seconds:g} s",
            ]
        )
        say(f"  {processes} worker processes: {', '.join(f'{wait:.2f}' for wait in waits)} s")
    heads = ("worker processes", f"the run of {size:,}", "runs of 10 meanwhile", "median", "slowest", "a slice")
    say("\n" + table(heads, rows))
    show_targets(
        *(
            (f"slowest run of 10 less a slice, worker processes: {processes}, s", wait - slice_seconds, "at most 1")
            for processes, wait in slowest.items()
        )
    )


def small_runs_behind(stack: Stack, size: int) -> tuple[dict[str, Any], Sequence[float]]:
    """Do a big run; return it, and the seconds from sending to end of each small run that was sent meanwhile."""
    run_id = stack.crawl(size)
    eventually(lambda: published(stack, run_id) >= size // _BEGUN, within=_PATIENCE, what="the big run is under way")
    waits: list[float] = []
    while published(stack, run_id) < size - size // _BEGUN:
        sent_at = stack.query("SELECT clock_timestamp() AS now")[0]["now"]
        small = stack.await_run(stack.crawl(SMALL), within=_PATIENCE)
        assert (small["state"], small["published"]) == ("succeeded", SMALL)
        waits.append(float((small["finished_at"] - sent_at).total_seconds()))
    big = stack.await_run(run_id, within=_PATIENCE)
    assert big["state"] == "succeeded"
    assert waits, "the big run was over before a small one could be sent"
    assert queue_depth(stack.broker or "", QUEUE) == size + SMALL * len(waits)
    return big, waits


def published(stack: Stack, run_id: UUID) -> int:
    """Return how far a run has come."""
    run = stack.run(run_id)
    if run is None or run["materialized_at"] is None:
        return 0
    return int(run["total"]) if run["state"] in TERMINAL else int(run["published"])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.sharing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--size", type=int, default=SOURCES, help=f"data sources of the shared run; default {SOURCES:,}"
    )
    parser.add_argument(
        "--big", type=int, default=BIG, help=f"data sources that a small run is behind; default {BIG:,}"
    )
    parser.add_argument("--slice", type=float, default=SLICE, help=f"DISPATCH__SLICE_SECONDS; default {SLICE:g}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of which rates are medians; default {ROUNDS}")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part")
    given = parser.parse_args()
    given.only = given.only or PARTS
    return given


def main() -> None:
    given = options()
    sizes = {SMALL} | ({given.size} if "scale" in given.only else set())
    sizes |= {given.big} if "fairness" in given.only else set()
    settings = {
        "DISPATCH__SLICE_SECONDS": str(given.slice),
        # The default, but for runs so small that nobody would help with them.
        "DISPATCH__HELP_ABOVE": str(min([HELP_ABOVE, *(size // 2 for size in sizes - {SMALL})])),
    }
    with (
        PostgresServer(SERVER) as postgres,
        RabbitMQServer() as rabbitmq,
        tempfile.TemporaryDirectory() as directory,
    ):
        stack = Stack.on_rabbitmq(postgres.create_database("bench"), rabbitmq.url, Path(directory), **settings)
        stack.prepare()
        stack.application.add_sources(max(sizes))
        for size in sizes:
            stack.application.add_task(size, range(1, size + 1))
        stack.execute("ANALYZE crawl_tasks, crawl_configs")
        say(machine(stack, rabbitmq))
        try:
            if "scale" in given.only:
                scale(stack, given.size, given.rounds)
            if "fairness" in given.only:
                fairness(stack, given.big, given.slice)
        finally:
            stack.close()


if __name__ == "__main__":
    main()
