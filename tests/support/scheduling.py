"""Schedules on a workbench: engines driven by hand, a clock that moves when a test says so, and what they recorded."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

from psycopg import sql
from sqlalchemy import Connection

from orchestrator.catalog import Catalog
from orchestrator.domain import WakeUp
from orchestrator.firing import FiringEngine
from orchestrator.ledger import Ledger
from orchestrator.timetable import Timetable
from tests.support.ledgers import Workbench


def at(text: str) -> datetime:
    """Read a moment, by default of a summer's day in UTC: ``12:00``, ``12:00:30.5`` or a whole one."""
    moment = datetime.fromisoformat(text if "-" in text else f"2026-07-01 {text}")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Hands:
    """A clock that stands still until it is moved; the ledger's, so that every engine goes by it."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self, _: Connection) -> datetime:
        return self.now

    def move(self, seconds: float) -> None:
        """Let time pass, or step the clock back."""
        self.now += timedelta(seconds=seconds)


class Rota:
    """Beats at work on a workbench, by a clock of the test's.

    Args:
        bench: where the ledger and the application's tables are.
        now: what time it is at first.
        timetable: what schedules mean.
        catalog: the application's tables, if not as the workbench has them.
    """

    def __init__(
        self, bench: Workbench, now: datetime, timetable: Timetable | None = None, catalog: Catalog | None = None
    ) -> None:
        self.bench = bench
        self.hands = Hands(now)
        self.timetable = timetable or Timetable()
        self.ledger = Ledger(bench.database, catalog or bench.catalog, self.hands)
        self.sent: list[WakeUp] = []
        self.engine = self.beat()

    def beat(
        self,
        enqueue: Callable[[Sequence[WakeUp]], None] | None = None,
        *,
        node: str = "beat@test",
        max_queued: int = 50_000,
        timetable: Timetable | None = None,
    ) -> FiringEngine:
        """Start another engine."""
        return FiringEngine(
            self.ledger, timetable or self.timetable, enqueue or self.sent.extend, node, max_queued=max_queued
        )

    def go(self, to: str | datetime | None = None, *, engine: FiringEngine | None = None) -> None:
        """Move the clock and do rounds until one finds nothing to do; each must go well."""
        if to is not None:
            self.hands.now = at(to) if isinstance(to, str) else to
        engine = engine or self.engine
        wait = 0.0
        while wait == 0:
            wait = engine.once()
            assert engine.problem is None

    def add(self, task_id: int, schedule: str | None, **columns: object) -> None:
        """Add a crawl task as the application would."""
        self.bench.application.execute("INSERT INTO crawl_tasks (id, schedule) VALUES (%s, %s)", task_id, schedule)
        self._update(task_id, {"updated_at": self.hands.now} | columns)

    def edit(self, task_id: int, *, touch: bool = True, **columns: object) -> None:
        """Change columns of a crawl task; ``touch`` moves updated_at, to the test's clock."""
        self._update(task_id, ({"updated_at": self.hands.now} if touch else {}) | columns)

    def _update(self, task_id: int, columns: dict[str, object]) -> None:
        assigned = [sql.SQL("{} = %s").format(sql.Identifier(name)) for name in columns]
        self.bench.application.execute(
            sql.SQL("UPDATE crawl_tasks SET {} WHERE id = %s").format(sql.SQL(", ").join(assigned)),
            *columns.values(),
            task_id,
        )

    def delete(self, task_id: int) -> None:
        """Delete a crawl task as the application would."""
        self.bench.application.execute("DELETE FROM crawl_tasks WHERE id = %s", task_id)

    def firings(self, task_id: int = 1) -> list[tuple[str, str, str | None]]:
        """What became of slots: the slot, or the first and last of a range, in UTC; the outcome; the reason."""
        return [
            (span(row["scheduled_for"], row["through"]), row["outcome"], row["reason"])
            for row in self.rows("SELECT * FROM firings WHERE task_id = %s ORDER BY scheduled_for", task_id)
        ]

    def schedule(self, task_id: int = 1) -> dict[str, Any] | None:
        """Return the reading of a crawl task's schedule, if there is any."""
        rows = self.rows("SELECT * FROM schedules WHERE task_id = %s", task_id)
        return rows[0] if rows else None

    def due(self, task_id: int = 1) -> str | None:
        """When a crawl task fires next."""
        reading = self.schedule(task_id)
        return None if reading is None or reading["next_fire_at"] is None else span(reading["next_fire_at"])

    def rows(self, statement: LiteralString, *parameters: object) -> list[dict[str, Any]]:
        """Return rows of the ledger's tables."""
        return self.bench.query(statement, *parameters)


def span(first: datetime, last: datetime | None = None) -> str:
    """Write a slot, or a range of them: the time in UTC, with the date where it is not the summer's day."""
    words = []
    for moment in (first, *([last] if last else [])):
        moment = moment.astimezone(UTC)  # noqa: PLW2901 -- the same one
        day = "" if moment.date() == at("00:00").date() else f"{moment:%Y-%m-%d }"
        words.append(f"{day}{moment:%H:%M}" + (f":{moment:%S}" if moment.second else ""))
    return "–".join(words)
