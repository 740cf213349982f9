"""Sole writer of the ledger: runs, dispatches, attempts, heartbeats, and the record of what happened.

State changes only here, by compare-and-set along the edges of ``domain.TRANSITIONS``, on the database's
clock. The concurrency contract, for every caller:

- Any number of processes may call any method at the same time, and any call may be repeated.
- Lock order: a run's dispatches before the run's row, and dispatches only with SKIP LOCKED; the run's row before
  its attempts; a run's row, one just inserted too, before the advisory lock ``discovery``, whose holder waits for no
  other row. Who deletes a run takes its row first, with SKIP LOCKED: nobody works on its dispatches any more.
- No lock outlives its transaction; a frozen process loses its session, and so its locks, after 30 s.
- Every run that is not over has ``wake_at`` in the future, or the pulse is about to wake it.

Deliberately unknown here: brokers, HTTP, Celery. What to publish or call, and when to give up, is decided by
the engines above.

One module a story; no story knows another:

- ``runs``: what happens to a run of either kind, from being accepted to being woken, canceled or revived.
- ``crawls``: the plan of a crawl run, and its rows, batch by batch.
- ``analyses``: the calls of site analyses, and the wait for a free one.
- ``schedules``: readings of the application's schedules, pauses, and the firing of each slot.
- ``nodes``: signs of life.
- ``keys``: who may use the HTTP API.
- ``requests``: answers that are kept, so that a request may be repeated.
- ``retention``: what is over and old is deleted.
- ``transitions``: the steps of a transaction that several of them share.
"""

from orchestrator.catalog import Catalog
from orchestrator.db import Database
from orchestrator.ledger.analyses import AnalysisLedger
from orchestrator.ledger.crawls import CrawlLedger
from orchestrator.ledger.keys import KeyLedger
from orchestrator.ledger.nodes import NodeLedger
from orchestrator.ledger.requests import RequestLedger
from orchestrator.ledger.retention import RetentionLedger
from orchestrator.ledger.runs import RunLedger
from orchestrator.ledger.schedules import Clock, ScheduleLedger, database_clock


class Ledger:
    """The one place where state changes.

    Every method of its parts opens its own transaction and raises DatabaseUnavailableError when it cannot; the
    caller then repeats the call.

    Args:
        database: where the ledger's tables are.
        catalog: the application's tables.
        clock: tells when slots are claimed; simulations have one of their own.

    Attributes:
        runs: runs of either kind.
        crawls: what only crawl runs do.
        analyses: what only site analyses do.
        schedules: crawl tasks' schedules and their slots.
        nodes: workers and beats.
        keys: API keys.
        requests: what was answered to requests that may be repeated.
        retention: deletes what is old.
    """

    def __init__(self, database: Database, catalog: Catalog, clock: Clock = database_clock) -> None:
        self.runs = RunLedger(database)
        self.crawls = CrawlLedger(database)
        self.analyses = AnalysisLedger(database)
        self.schedules = ScheduleLedger(database, catalog, clock)
        self.nodes = NodeLedger(database)
        self.keys = KeyLedger(database)
        self.requests = RequestLedger(database)
        self.retention = RetentionLedger(database)
