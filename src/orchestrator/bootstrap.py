"""The composition root: the only place that picks concrete classes and wires them to the settings.

One set of services a process, made on first use. A forked child makes its own: sockets are not shared.
"""

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from typing import Final

from pydantic import SecretStr

from orchestrator import measures, migrations, tracing
from orchestrator.analysis import Caps, SiteAnalyser
from orchestrator.catalog import Catalog
from orchestrator.celery_app import ANALYSIS_QUEUE, CRAWL_QUEUE, DEAD_QUEUE, Sender, conninfo
from orchestrator.db import Database
from orchestrator.discovery import DiscoveryClient, RetryPolicy
from orchestrator.dispatch import FanOut, Help
from orchestrator.domain import Health, MisfirePolicy, Node, OverlapPolicy, QueueStanding
from orchestrator.embedded import EmbeddedPostgres, ServerConfig
from orchestrator.errors import ConfigurationError, TransientError
from orchestrator.firing import FiringEngine
from orchestrator.health import Attendance, BrokerWatch
from orchestrator.insights import Insights
from orchestrator.ledger import Ledger
from orchestrator.pulse import Pulse
from orchestrator.queues import Observed, PerThread, Publisher, Survey, postgres
from orchestrator.queues.postgres import PostgresPublisher
from orchestrator.queues.rabbitmq import RabbitMQPublisher
from orchestrator.rabbitmq import survey
from orchestrator.settings import PREFIX, SchedulerSettings, Settings, current
from orchestrator.telemetry import Event, logger
from orchestrator.timetable import Timetable

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a process works with."""

    settings: Settings
    database: Database
    catalog: Catalog
    ledger: Ledger
    insights: Insights
    timetable: Timetable
    publisher: Publisher
    sender: Sender
    queues: Survey
    fan_out: FanOut
    analyser: SiteAnalyser

    def pulse(self, node: Callable[[], Node], attendance: Attendance) -> tuple[Pulse, BrokerWatch]:
        """Make the pulse of a worker, whose heartbeats say whether it takes messages."""
        watch = _broker_watch()

        def health() -> Health:
            idle = None if node().queues else "it was told to take messages from no queue"
            return Health("it is stopping" if stopping() else attendance.problem or idle, watch.degraded)

        kept = self.settings.retention
        # Neither is for beats, whose ticks would wait for it.
        skip = self.ledger.runs.skip_canceled
        forget = partial(self.ledger.retention.forget, kept.days, kept.batch)
        return Pulse(self.ledger, self.sender.wake, node, health=health, skip=skip, forget=forget), watch

    def beat(self, node: Node) -> tuple[FiringEngine, Pulse, BrokerWatch]:
        """Make what a beat does each tick; its heartbeats say what keeps schedules from firing."""
        watch = _broker_watch()
        limit = self.settings.scheduler.max_queued
        wake = self.sender.wake
        firing = FiringEngine(self.ledger, self.timetable, wake, node.name, max_queued=limit, stopping=stopping)

        def health() -> Health:
            return Health(firing.problem, watch.degraded)

        pulse = Pulse(self.ledger, wake, lambda: node, health=health, heartbeat=0.0, stopping=stopping)
        return firing, pulse, watch

    def caps(self, node: Node | None) -> Caps:
        """Return how many Discovery calls may be under way.

        A worker that serves both queues keeps one slot of its pool for crawl runs: slow discovery must not
        hold up dispatch.
        """
        cap = self.settings.discovery_concurrency
        if node is None or node.concurrency is None:
            return Caps(cap, cap)
        serves_both = len(node.queues) > 1
        return Caps(cap, max(1, node.concurrency - (1 if serves_both else 0)))


class Links:
    """Makes what reaches out of this process: every fault comes by one of these.

    Fault tests derive theirs, to crash before or after a call or to time it, and have their processes :func:`use` it.
    """

    def database(self, settings: Settings) -> Database:
        """Return the way to the database."""
        return Database(conninfo(settings), settings.schema_name)

    def sender(self) -> Sender:
        """Return the way to our own queues."""
        return Sender()

    def publisher(self, settings: Settings, database: Database) -> Publisher:
        """Return the way to the extraction queue.

        Raises:
            ConfigurationError: what it needs is not installed.
        """
        if settings.extraction_transport == "pgmq":
            return PostgresPublisher(settings.extraction_queue, database.transaction)
        url = settings.extraction_url or settings.broker_url
        if settings.extraction_transport == "kafka":
            if find_spec("confluent_kafka") is None:
                how = "pip install 'task-orchestrator[kafka]'"
                raise ConfigurationError(f"{PREFIX}EXTRACTION_URL: for Kafka, confluent-kafka must be installed: {how}")
            from orchestrator.queues.kafka import KafkaPublisher  # noqa: PLC0415 -- an extra

            return PerThread(lambda: KafkaPublisher(url, settings.extraction_queue, settings.kafka))
        return PerThread(lambda: RabbitMQPublisher(url, settings.extraction_queue))

    def discovery(self, settings: Settings) -> DiscoveryClient:
        """Return the way to the Discovery Service."""
        return DiscoveryClient(settings.discovery_url, settings.discovery_timeout)


_links = Links()


def use(links: Links) -> None:
    """Have services made from now on reach out by these."""
    global _links  # noqa: PLW0603 -- a process has one composition root
    _links = links
    services.cache_clear()


@cache
def services() -> Services:
    """Return this process's services. Opens nothing yet.

    Raises:
        ConfigurationError: a setting is unknown or malformed.
    """
    settings = current()
    database = _links.database(settings)
    catalog = Catalog(settings.catalog, settings.timezone)
    ledger = Ledger(database, catalog)
    publisher = _observed(_links.publisher(settings, database), settings)
    sender = _links.sender()
    return Services(
        settings=settings,
        database=database,
        catalog=catalog,
        ledger=ledger,
        insights=Insights(database),
        timetable=_timetable(settings.scheduler),
        publisher=publisher,
        sender=sender,
        queues=Survey(
            partial(_survey, settings, database),
            [ANALYSIS_QUEUE, CRAWL_QUEUE, DEAD_QUEUE, settings.extraction_queue],
        ),
        fan_out=FanOut(
            ledger,
            catalog,
            publisher,
            batch_size=settings.dispatch.batch_size,
            slice_seconds=settings.dispatch.slice_seconds,
            help_=Help(settings.dispatch.help_above, settings.dispatch.helpers, sender.wake),
            stopping=stopping,
        ),
        analyser=SiteAnalyser(
            ledger.analyses,
            _links.discovery(settings),
            RetryPolicy(settings.discovery_max_retries, settings.discovery_retry_delay, settings.discovery_max_delay),
            timeout=settings.discovery_timeout,
            slice_seconds=settings.dispatch.slice_seconds,
            stopping=stopping,
        ),
    )


def _survey(settings: Settings, database: Database) -> list[QueueStanding]:
    def ask(transport: str, url: SecretStr, names: Sequence[str]) -> list[QueueStanding]:
        if transport == "kafka":
            from orchestrator.queues import kafka  # noqa: PLC0415 -- an extra

            return [kafka.survey(url, settings.kafka, name) for name in names]
        return postgres.survey(database.transaction, names) if transport == "pgmq" else survey(url, names)

    extraction = settings.extraction_url or settings.broker_url
    return [
        *ask(settings.broker_transport, settings.broker_url, [ANALYSIS_QUEUE, CRAWL_QUEUE, DEAD_QUEUE]),
        *ask(settings.extraction_transport, extraction, [settings.extraction_queue]),
    ]


def _observed(publisher: Publisher, settings: Settings) -> Publisher:
    systems = {"amqp": "rabbitmq", "kafka": "kafka", "pgmq": "postgresql"}
    return Observed(publisher, system=systems[settings.extraction_transport], queue=settings.extraction_queue)


def _broker_watch() -> BrokerWatch:
    # A sender of its own: the other's turn may take as long as the broker hangs.
    return BrokerWatch(_links.sender().probe)


def _timetable(settings: SchedulerSettings) -> Timetable:
    return Timetable(
        MisfirePolicy(settings.misfire_policy),
        OverlapPolicy(settings.overlap_policy),
        timedelta(seconds=settings.catch_up_window),
        settings.spread,
    )


def observe(port: int | None) -> None:
    """Count, serve the counts if there is a port, and make spans if they are asked for; before a pool forks."""
    measures.begin()
    tracing.enable()
    if port is not None:
        from orchestrator import metrics  # noqa: PLC0415 -- its imports take longer than most commands

        metrics.serve(current().metrics.host, port)


# One byte of memory shared with the children of a prefork pool, whom no signal tells of a warm shutdown.
_stop_flag: Final = mmap.mmap(-1, 1)


def stop_soon() -> None:
    """Have deliveries under way in this process and its children end at the next opportunity."""
    _stop_flag[0] = 1


def stopping() -> bool:
    """Tell whether :func:`stop_soon` was called."""
    return bool(_stop_flag[0])


# The parent's services are kept alive, never used: their destructors would shut sockets that it still uses.
_inherited: Final[list[Services]] = []


def _after_fork() -> None:
    if services.cache_info().currsize:
        _inherited.append(services())
        services.cache_clear()


os.register_at_fork(after_in_child=_after_fork)


class Home:
    """What a process stands on: the embedded server where no database is configured, and its ledger."""

    def __init__(self) -> None:
        self._server: EmbeddedPostgres | None = None

    def open(self) -> None:
        """Join the embedded server, where that is the database, and migrate it; it is ours alone.

        Raises:
            ConfigurationError: something about the set-up must be corrected first.
            DatabaseUnavailableError: the server did not start.
        """
        settings = current()
        if settings.database_url is not None or self._server is not None:
            return
        server = EmbeddedPostgres(ServerConfig.of(settings))
        server.join()
        self._server = server
        migrate()

    def close(self) -> None:
        """Leave the embedded server; the last one to leave stops it."""
        if self._server is not None:
            services().database.close()
            self._server.leave()
            self._server = None


home: Final = Home()


def migrate() -> bool:
    """Bring the database up to date; return whether there was anything to do.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
    """
    settings = current()
    in_database = "pgmq" in {settings.broker_transport, settings.extraction_transport}
    return migrations.upgrade(services().database, with_queues=in_database)


def await_migrated(stop: threading.Event | None = None) -> None:
    """Wait until the ledger is there and up to date, saying once what is being waited for."""
    stop = stop or threading.Event()
    said = ""
    while not stop.is_set():
        try:
            home.open()
            migrations.verify(services().database)
        except TransientError as error:
            if str(error) != said:
                said = str(error)
                _log.warning(Event.DATABASE_WAITING, code=error.code, error=said)
            stop.wait(1)
        else:
            if said:
                _log.info(Event.DATABASE_READY)
            return
