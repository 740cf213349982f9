"""A ledger to try things on: a migrated database, the engines on it, and time that moves when a test says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, Final, LiteralString, Self
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from orchestrator.catalog import Catalog
from orchestrator.db import Database
from orchestrator.dispatch import NO_HELP, FanOut, Help
from orchestrator.domain import (
    AnalysisArguments,
    Arguments,
    Attempt,
    CrawlArguments,
    NewRun,
    Trigger,
    WakeUp,
    traceparent_of,
)
from orchestrator.ledger import Ledger
from orchestrator.ledger.crawls import PendingBatch
from orchestrator.queues import Publisher
from orchestrator.queues.postgres import PostgresPublisher
from orchestrator.schema import SCHEMA
from orchestrator.settings import CatalogSettings
from tests.support.application import Application, migrated
from tests.support.postgres import PostgresServer

QUEUE: Final = "extraction_queue"
NODE: Final = "w1@test"
LEASE: Final = 15.0
_NUMBERS: Final = count(1)


@contextmanager
def template(server: PostgresServer) -> Iterator[str]:
    """Make a migrated database with the application's empty tables, to be copied: a copy is far faster to make."""
    name = f"ledger_template_{next(_NUMBERS)}"
    url = server.create_database(name)
    # Before there is a schema of the user's own name, which would come first in the search path.
    Application(url).create_tables()
    migrated(url)
    yield name
    server.drop_database(name)


class Workbench:
    """A database of a test's own, with the ledger, the catalog and a real publisher on it.

    Args:
        url: a migrated database with the application's tables.
        schema: where its ledger is.
        catalog: how the application's tables are called.
    """

    def __init__(self, url: str, *, schema: str = SCHEMA, catalog: CatalogSettings | None = None) -> None:
        self.url = url
        self.schema = schema
        self.database = Database(url, schema)
        self.catalog = Catalog(catalog or CatalogSettings())
        self.ledger = Ledger(self.database, self.catalog)
        self.publisher: Publisher = PostgresPublisher(QUEUE, self.database.transaction)
        self.application = Application(url)
        self.woken: list[WakeUp] = []

    @classmethod
    @contextmanager
    def copy_of(cls, server: PostgresServer, name: str) -> Iterator[Self]:
        """Open a workbench on a copy of a template, and drop the copy afterwards."""
        copy = f"ledger_{next(_NUMBERS)}"
        bench = cls(server.create_database(copy, template=name))
        try:
            yield bench
        finally:
            bench.close()
            server.drop_database(copy)

    def close(self) -> None:
        """Close every connection."""
        self.database.close()

    # --- Runs ----------------------------------------------------------------------------------------------

    def accept(self, arguments: Arguments | None = None, *, delivered: bool = True, run_id: UUID | None = None) -> UUID:
        """Accept a run, by default of crawl task 1."""
        run_id = run_id or uuid4()
        new = NewRun(run_id, arguments or CrawlArguments(1), Trigger.CELERY, traceparent_of(run_id))
        self.ledger.runs.accept(new, delivered=delivered)
        return run_id

    def accept_analysis(self, source: int = 7, *, delivered: bool = True) -> UUID:
        """Accept a site analysis."""
        return self.accept(AnalysisArguments(source, "news"), delivered=delivered)

    def planned(self, sources: int, *, skipped: int = 0) -> UUID:
        """Accept and begin a crawl run and fix its plan: ``sources`` to publish, then ``skipped`` without a config."""
        task_id = next(_NUMBERS)
        self.application.execute("DELETE FROM crawl_configs")
        self.application.add_sources(sources)
        self.application.add_task(task_id, list(range(1, sources + skipped + 1)))
        run_id = self.accept(CrawlArguments(task_id))
        assert self.ledger.crawls.begin(run_id) is not None
        assert self.materialize(run_id, task_id) == (sources + skipped, skipped)
        return run_id

    def materialize(self, run_id: UUID, task_id: int = 1) -> tuple[int, int] | None:
        """Fix the plan of a run."""
        return self.ledger.crawls.materialize(run_id, task_id, self.catalog.plan(task_id))

    def publish(self, run_id: UUID, limit: int = 1_000, after: int = 0) -> list[int]:
        """Take a batch, mark all of it, and return it; nothing reaches a queue."""
        with self.ledger.crawls.pending_batch(run_id, limit=limit, after=after) as batch:
            sources = sources_of(batch)
            batch.mark(sources)
        return sources

    def fan_out(
        self,
        publisher: Publisher | None = None,
        *,
        batch_size: int = 10,
        batches: int | None = None,
        help_: Help = NO_HELP,
    ) -> FanOut:
        """Make a fan-out engine, whose slices end after so many batches, or after 20 s."""
        chosen = publisher or self.publisher
        # One second for each look at the clock, of which the first sets the end.
        clock, seconds = (monotonic, 20.0) if batches is None else (partial(next, count()), batches + 0.5)
        return FanOut(
            self.ledger,
            self.catalog,
            chosen,
            batch_size=batch_size,
            slice_seconds=seconds,
            help_=help_ if batches is None else replace(help_, seconds=seconds),
            clock=clock,
        )

    def begin_attempt(
        self, run: UUID | NewRun, *, node: str = NODE, max_retries: int = 3, cap: int = 100, node_cap: int = 100
    ) -> Attempt | None:
        """Record one call to the Discovery Service; return none when none may be made."""
        attempt = self.ledger.analyses.begin_attempt(
            run, node=node, lease=LEASE, max_retries=max_retries, cap=cap, node_cap=node_cap
        )
        return attempt if isinstance(attempt, Attempt) else None

    def wake(self, limit: int = 1_000) -> list[UUID]:
        """Do one round of the pulse, and as long as there are rows to skip; return which runs it woke."""
        self.woken.clear()
        assert self.ledger.runs.wake_due(self.woken.extend, limit) is not None
        while self.ledger.runs.skip_canceled():
            pass
        return [wake_up.run_id for wake_up in self.woken]

    # --- Time ----------------------------------------------------------------------------------------------

    def rewind(self, run_id: UUID, seconds: float) -> None:
        """Shift the moments of a run into the past, as if so many seconds had gone by."""
        # Not the dispatches': a batch in flight has them locked, and nothing is decided by them.
        for table, key in (("runs", "id"), ("attempts", "run_id"), ("run_events", "run_id")):
            moments = self.query(
                "SELECT column_name FROM information_schema.columns"
                " WHERE table_schema = %s AND table_name = %s AND data_type LIKE 'timestamp%%'",
                self.schema,
                table,
            )
            shifts = [
                sql.SQL("{0} = {0} - make_interval(secs => {1})").format(
                    sql.Identifier(row["column_name"]), sql.Literal(seconds)
                )
                for row in moments
            ]
            with psycopg.connect(self.url) as connection:
                connection.execute(
                    sql.SQL("UPDATE {} SET {} WHERE {} = {}").format(
                        sql.Identifier(self.schema, table), sql.SQL(", ").join(shifts), sql.Identifier(key), run_id
                    )
                )

    # --- The ledger, by plain SQL --------------------------------------------------------------------------

    def query(self, statement: LiteralString, *parameters: object) -> list[dict[str, Any]]:
        """Return the rows of a statement; unqualified names are the ledger's."""
        options = f"-c search_path={self.schema},public"
        with psycopg.connect(self.url, options=options, row_factory=dict_row) as connection:
            cursor = connection.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def run(self, run_id: UUID) -> dict[str, Any]:
        """Return a run's row."""
        (row,) = self.query("SELECT * FROM runs WHERE id = %s", run_id)
        return row

    def state(self, run_id: UUID) -> str:
        """Return a run's state."""
        state: str = self.run(run_id)["state"]
        return state

    def events(self, run_id: UUID) -> list[dict[str, Any]]:
        """Return what happened to a run."""
        return self.query("SELECT * FROM run_events WHERE run_id = %s ORDER BY id", run_id)

    def attempts(self, run_id: UUID) -> list[dict[str, Any]]:
        """Return a run's calls in order."""
        return self.query("SELECT * FROM attempts WHERE run_id = %s ORDER BY number", run_id)

    def plan(self, run_id: UUID) -> list[tuple[int, int | None, str]]:
        """Return (data source id, crawl config id, state) of each dispatch in order."""
        rows = self.query("SELECT * FROM dispatches WHERE run_id = %s ORDER BY data_source_id", run_id)
        return [(row["data_source_id"], row["crawl_config_id"], row["state"]) for row in rows]

    def assert_adds_up(self, run_id: UUID) -> dict[str, int]:
        """Check a run's counts against its rows; return the rows by state."""
        rows = self.query(
            "SELECT count(*) FILTER (WHERE state = 'pending') AS pending,"
            " count(*) FILTER (WHERE state = 'published') AS published,"
            " count(*) FILTER (WHERE state = 'skipped') AS skipped, count(*) AS total"
            " FROM dispatches WHERE run_id = %s",
            run_id,
        )
        counts: dict[str, int] = rows[0]
        run = self.run(run_id)
        assert {name: run[name] for name in ("published", "skipped", "total")} == {
            name: counts[name] for name in ("published", "skipped", "total")
        }
        return {name: counts[name] for name in ("pending", "published", "skipped")}


def sources_of(batch: PendingBatch) -> list[int]:
    """Return the data source ids of a batch."""
    return [source for source, _ in batch.sources]
