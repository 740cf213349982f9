"""Drives a scheduler by Celery's interface, as ``celery beat`` does, and measures it: ours, Celery's or Django's.

    python beat.py ours|celery|django-celery-beat idle|fire COUNT DATABASE_URL BROKER_URL DIRECTORY

Prints its figures as one line of JSON. Django's runs in an environment of its own, which has nothing of ours; the
schedules name no hour, for it loads only those whose hour is near.
"""

import json
import logging
import statistics
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any

import amqp
import psycopg
from celery import Celery
from celery.beat import PersistentScheduler, Scheduler
from celery.schedules import crontab
from kombu.utils.url import parse_url

TICKS = 10
TRIALS = 3
PATIENCE = 60.0  # seconds for all trials
FIRING = 20.0  # seconds
LONG_AGO = datetime.now(UTC) - timedelta(days=800)
EDITED = "7 * 7 7 *"


def texts(count: int) -> Iterator[str]:
    """Yield schedules, 1,000 of them distinct, none of which fires for months."""
    month = (datetime.now(UTC).month + 5) % 12 + 1
    for number in range(count):
        yield f"{number % 60} * {1 + number % 1_000 // 60} {month} *"


class Celerys:
    """Stock Celery: the schedules are in its configuration, which is read when it starts."""

    queue = "celery"
    is_editable = False

    def __init__(self, database: str, broker: str, directory: Path) -> None:
        self.database = database
        self.directory = directory
        self.app = Celery("bench", broker=broker)

    def fill(self, count: int, *, due: bool) -> None:
        """Write the schedules where they are read from."""
        last_run_at = {"last_run_at": LONG_AGO} if due else {}
        self.app.conf.beat_schedule = {
            f"crawl-{number}": {"task": "crawl", "args": [number], "schedule": crontab.from_string(text), **last_run_at}
            for number, text in enumerate(texts(count))
        }

    def scheduler(self) -> Scheduler:
        """Make the scheduler."""
        return PersistentScheduler(app=self.app, schedule_filename=str(self.directory / f"schedule-{monotonic()}"))

    def is_ready(self) -> bool:
        """Whether all schedules were read, after a tick."""
        return True

    def make_due(self) -> None:
        """Have every slot come, where it has not yet."""

    def edit(self) -> None:
        """Edit one schedule; Celery's can be edited only while it does not run."""
        raise NotImplementedError

    def noticed(self, scheduler: Scheduler) -> bool:
        """Whether the scheduler goes by the edited text."""
        raise NotImplementedError


class Djangos(Celerys):
    """django-celery-beat: the schedules are in its own tables, edited by its own models."""

    is_editable = True

    def fill(self, count: int, *, due: bool) -> None:
        """Create its tables and write the schedules."""
        import django  # type: ignore[import-not-found] # noqa: PLC0415 -- in its own environment only
        from django.conf import settings  # type: ignore[import-not-found] # noqa: PLC0415
        from django.core.management import call_command  # type: ignore[import-not-found] # noqa: PLC0415

        words = psycopg.conninfo.conninfo_to_dict(self.database)
        names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
        settings.configure(
            DATABASES={
                "default": {"ENGINE": "django.db.backends.postgresql"} | {names[key]: words[key] for key in names}
            },
            INSTALLED_APPS=["django_celery_beat"],
            USE_TZ=True,
            TIME_ZONE="UTC",
        )
        django.setup()
        call_command("migrate", verbosity=0)
        from django_celery_beat.models import (  # type: ignore[import-not-found] # noqa: PLC0415 -- after the set-up
            CrontabSchedule,
            PeriodicTask,
            PeriodicTasks,
        )

        self.crontabs, self.tasks = CrontabSchedule, PeriodicTask
        crontabs = {text: self._crontab(text) for text in {*texts(count)}}
        self.tasks.objects.bulk_create(
            (
                self.tasks(
                    name=f"crawl-{number}",
                    task="crawl",
                    args=json.dumps([number]),
                    crontab=crontabs[text],
                    last_run_at=LONG_AGO if due else datetime.now(UTC),
                )
                for number, text in enumerate(texts(count))
            ),
            batch_size=5_000,
        )
        PeriodicTasks.update_changed()

    def _crontab(self, text: str) -> Any:  # noqa: ANN401 -- Django's, not installed here
        minute, hour, day, month, weekday = text.split()
        return self.crontabs.objects.create(
            minute=minute, hour=hour, day_of_month=day, month_of_year=month, day_of_week=weekday
        )

    def scheduler(self) -> Scheduler:
        """Make the scheduler."""
        from django_celery_beat.schedulers import (  # type: ignore[import-not-found] # noqa: PLC0415 -- see above
            DatabaseScheduler,
        )

        made: Scheduler = DatabaseScheduler(app=self.app)
        return made

    def edit(self) -> None:
        """Edit one schedule."""
        task = self.tasks.objects.get(name="crawl-1")
        task.crontab = self._crontab(EDITED)
        task.save()
        self._wanted = task.crontab.schedule

    def noticed(self, scheduler: Scheduler) -> bool:
        """Whether the scheduler goes by the edited text."""
        # Not by the property, which would look for edits itself.
        return bool(scheduler._schedule["crawl-1"].schedule == self._wanted)  # type: ignore[attr-defined] # noqa: SLF001


class Ours(Celerys):
    """Ours: the schedules are in the application's table."""

    queue = "orchestrator.crawl"
    is_editable = True

    def __init__(self, database: str, broker: str, directory: Path) -> None:
        super().__init__(database, broker, directory)
        from orchestrator.celery_app import app  # noqa: PLC0415 -- elsewhere it is not there

        self.app = app
        self._connection = psycopg.connect(database, autocommit=True)

    def fill(self, count: int, *, due: bool) -> None:  # noqa: ARG002 -- a slot that came before it was read is none
        """Fill the application's table."""
        with self._connection.cursor() as cursor:
            with cursor.copy("COPY crawl_tasks (id, data_source_ids, schedule, updated_at) FROM STDIN") as copy:
                for number, text in enumerate(texts(count), 1):
                    copy.write_row((number, "{1}", text, LONG_AGO))
            cursor.execute("CREATE INDEX ON crawl_tasks (updated_at)")
            cursor.execute("VACUUM (ANALYZE) crawl_tasks")

    def scheduler(self) -> Scheduler:
        """Make the scheduler."""
        from orchestrator.beat import Scheduler as OurScheduler  # noqa: PLC0415 -- elsewhere it is not there

        return OurScheduler(app=self.app)

    def is_ready(self) -> bool:
        """Whether all schedules were read."""
        return self._value("SELECT swept_at IS NOT NULL FROM orchestrator.catalog_watch") is True

    def make_due(self) -> None:
        """Have every slot come."""
        self._connection.execute(
            "UPDATE orchestrator.schedules SET next_fire_at = date_trunc('second', now()) - interval '3 seconds'"
        )
        self._connection.execute("VACUUM (ANALYZE) orchestrator.schedules")

    def edit(self) -> None:
        """Edit one schedule: differently each time."""
        text = self._value("SELECT schedule FROM crawl_tasks WHERE id = 1")
        self._wanted = "8 * 8 8 *" if text == EDITED else EDITED
        self._connection.execute(
            "UPDATE crawl_tasks SET schedule = %s, updated_at = now() WHERE id = 1", [self._wanted]
        )

    def noticed(self, scheduler: Scheduler) -> bool:  # noqa: ARG002 -- it has it in the ledger
        """Whether the ledger has the edited text."""
        return bool(self._value("SELECT text FROM orchestrator.schedules WHERE task_id = 1") == self._wanted)

    def _value(self, query: Any) -> Any:  # noqa: ANN401 -- any statement, any value
        row = self._connection.execute(query).fetchone()
        return row and row[0]


def idle(side: Celerys, count: int) -> dict[str, float | None]:
    """Measure start, ticks with nothing due, edits and memory."""
    side.fill(count, due=False)
    scheduler, took = start(side)
    ticks: list[float] = []
    for _ in range(TICKS):
        began_at = monotonic()
        wait = scheduler.tick() or 0.0
        ticks.append(monotonic() - began_at)
        sleep(min(max(wait, 0.0), 1.0))
    noticed, stall = edits(side, scheduler) if side.is_editable else (None, None)
    return {
        "start": took,
        "tick": statistics.median(ticks),
        "noticed": noticed,
        "stall": stall,
        "peak": int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024,
    }


def start(side: Celerys) -> tuple[Scheduler, float]:
    """Return a scheduler that has read all schedules and had a tick, and the seconds that it took."""
    began_at = monotonic()
    scheduler = side.scheduler()
    scheduler.tick()
    while not side.is_ready():
        scheduler.tick()
    return scheduler, monotonic() - began_at


def edits(side: Celerys, scheduler: Scheduler) -> tuple[float, float]:
    """Edit a schedule at some moment between two ticks; return the most seconds until it is noticed, and of a tick."""
    random = Random(7)
    give_up_at = monotonic() + PATIENCE
    slowest = stall = 0.0
    for _ in range(TRIALS):
        wait = max(scheduler.tick() or 0.0, 0.0)
        before = random.uniform(0.0, wait)
        sleep(before)
        side.edit()
        edited_at = monotonic()
        sleep(max(wait - before, 0.0))
        while True:
            began_at = monotonic()
            wait = max(scheduler.tick() or 0.0, 0.0)
            stall = max(stall, monotonic() - began_at)
            if side.noticed(scheduler):
                break
            sleep(wait)
        slowest = max(slowest, monotonic() - edited_at)
        if monotonic() > give_up_at:
            break
    return slowest, stall


def fire(side: Celerys, count: int, broker: str) -> dict[str, float | None]:
    """Measure how many tasks reach the queue a second while all are due."""
    side.fill(count, due=True)
    scheduler, _ = start(side)
    side.make_due()
    before = depth(broker, side.queue)
    began_at = monotonic()
    while True:
        for _ in range(1 if isinstance(side, Ours) else 20):
            sleep(min(max(scheduler.tick() or 0.0, 0.0), 0.05))
        took = monotonic() - began_at
        fired = depth(broker, side.queue)
        if fired >= count or took > FIRING:
            return {"rate": (fired - before) / took, "fired": fired}


def depth(broker: str, queue: str) -> int:
    """Return how many messages are in a queue."""
    parts = parse_url(broker)
    with amqp.Connection(
        host=f"{parts['hostname']}:{parts['port']}",
        userid=parts["userid"],
        password=parts["password"],
        virtual_host=parts["virtual_host"],
    ) as connection:
        declared = connection.channel().queue_declare(queue, durable=True, auto_delete=False)
        assert declared is not None
        return int(declared[1])


def main() -> None:
    """Measure one side once."""
    logging.disable(logging.WARNING)
    whose, what, count, database, broker, directory = sys.argv[1:]
    kinds = {"ours": Ours, "celery": Celerys, "django-celery-beat": Djangos}
    side = kinds[whose](database, broker, Path(directory))
    figures = idle(side, int(count)) if what == "idle" else fire(side, int(count), broker)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
