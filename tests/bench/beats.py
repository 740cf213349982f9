"""Our scheduler beside stock Celery beat and django-celery-beat, on sizes that they can bear.

    python -m tests.bench.beats [--size 1000 --size 10000]

Each is driven by the same functions through Celery's scheduler interface (tests/support/clients/beat.py), in a process
of its own, with the same cron texts, on the same private PostgreSQL and RabbitMQ. django-celery-beat lives in a
throw-away environment.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.bench.schedules import SERVER, SETTINGS, machine, say, table
from tests.support.environments import CLIENTS, make_environment
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer
from tests.support.stack import Stack

SIZES: Final = (1_000, 10_000, 100_000)
SIDES: Final = ("ours", "celery", "django-celery-beat")
HEADS: Final = ("ours", "Celery beat", "django-celery-beat")
LIMIT: Final = 180  # seconds for one process

_Figures = Mapping[str, float | None]


def measure(python: Path, whose: str, what: str, size: int, stack: Stack) -> _Figures:
    """Return the figures of one side; none if it takes too long."""
    isolated = [] if whose == "ours" else ["-I"]
    script = [
        str(CLIENTS / "beat.py"),
        whose,
        what,
        str(size),
        stack.database,
        stack.broker or "",
        str(stack.directory),
    ]
    try:
        done = subprocess.run(
            [python, *isolated, *script],
            env=stack.env if whose == "ours" else {},
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {}
    assert done.returncode == 0, done.stderr
    figures: _Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def rows(figures: Mapping[str, _Figures]) -> list[list[str]]:
    """Return the table's rows for one size."""

    def row(what: str, key: str, pattern: str) -> list[str]:
        values = [figures[whose].get(key) for whose in SIDES]
        return [what, *("–" if value is None else pattern.format(value) for value in values)]

    table = [
        row("start to the first tick, schedules read", "start", "{:.2f} s"),
        row("tick with nothing due", "tick", "{:.4f} s"),
        row("peak memory", "peak", "{:.0f} MiB"),
        row("an edit noticed, slowest of 3", "noticed", "{:.2f} s"),
        row("the longest tick meanwhile", "stall", "{:.3f} s"),
        row("tasks sent a second while all are due", "rate", "{:,.4g}/s"),
    ]
    celery = 1 + SIDES.index("celery")
    if (start := figures["celery"].get("start")) is not None:
        table[3][celery] = f"needs a restart: {start:.2f} s"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.beats", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", action="append", type=int, help=f"schedules; default {SIZES}")
    sizes = parser.parse_args().size or SIZES
    with (
        PostgresServer(SERVER) as postgres,
        RabbitMQServer() as rabbitmq,
        tempfile.TemporaryDirectory() as directory,
    ):
        throw_away = make_environment(Path(directory) / "django-celery-beat", "django-celery-beat")
        pythons = {whose: throw_away if whose == "django-celery-beat" else Path(sys.executable) for whose in SIDES}
        for size in sizes:
            figures: dict[str, _Figures] = {}
            for whose in SIDES:
                for what in ("idle", "fire"):
                    name = f"bench_{size}_{SIDES.index(whose)}_{what}"
                    stack = Stack.on_rabbitmq(
                        postgres.create_database(name),
                        rabbitmq.vhost_url(rabbitmq.fresh_vhost()),
                        Path(directory),
                        **SETTINGS,
                    )
                    if not figures and size == sizes[0]:
                        say(machine(stack, rabbitmq))
                    if whose == "ours":
                        stack.prepare()
                    found = measure(pythons[whose], whose, what, size, stack)
                    figures[whose] = {**figures.get(whose, {}), **found}
                    postgres.drop_database(name)
            say("\n" + table((f"{size:,} schedules", *HEADS), rows(figures)))


if __name__ == "__main__":
    main()
