"""What this service says about itself: a catalogue of events, logged as structured lines.

Event names are static and part of the interface: operators alert on them. Identifiers (run id, task id) are
bound once per delivery with :func:`bound` and appear on every line below. Celery's, SQLAlchemy's and our own
lines leave through one handler, as console text on a terminal and as one JSON object a line elsewhere.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

import structlog

from orchestrator.settings import LogSettings


class Event(StrEnum):
    """Every event that is logged, with the fields that come along."""

    RUN_ACCEPTED = "run.accepted"
    """A run was committed to the ledger: kind, trigger."""
    RUN_ARGUMENTS_INVALID = "run.arguments_invalid"
    """A message carried wrong arguments; a failed run says which: error."""
    RUN_ID_CONFLICT = "run.id_conflict"
    """The same run id came with other arguments; the first ones stand: kept, ignored."""
    RUN_STARTED = "run.started"
    """A run began, or went on after a wait; in the ledger's record only."""
    RUN_MATERIALIZED = "run.materialized"
    """The plan of a crawl run is fixed: total, skipped, seconds."""
    BATCH_PUBLISHED = "batch.published"
    """A batch was published, marked and committed (debug): taken, confirmed."""
    RUN_HELP_ASKED = "run.help_asked"
    RUN_HELP_GIVEN_UP = "run.help_given_up"
    RUN_SLICE_ENDED = "run.slice_ended"
    """A delivery used up its slice; a continuation goes on."""
    RUN_RETRYING = "run.retrying"
    """A run waits before it goes on: code, error, next_attempt_at."""
    RUN_SUCCEEDED = "run.succeeded"
    """A run is done: total, published, skipped."""
    RUN_FAILED = "run.failed"
    """A run failed: code, error."""
    RUN_CANCELED = "run.canceled"
    """A run was canceled: skipped, actor."""
    RUN_REVIVED = "run.revived"
    """An operator retried a failed run: actor."""
    DISPATCH_SKIPPED = "dispatch.skipped"
    """A data source has no active crawl config: data_source_id, reason. At most 20 a run, then a summary."""
    DISPATCH_SKIPPED_SUMMARY = "dispatch.skipped_summary"
    """How many data sources of a run were skipped: skipped, shown."""
    ATTEMPT_STARTED = "attempt.started"
    """A call to the Discovery Service begins: number."""
    ATTEMPT_FINISHED = "attempt.finished"
    """A call to the Discovery Service ended: number, outcome, status, milliseconds, error."""
    ATTEMPT_LOST = "attempt.lost"
    """A call's lease ran out without an answer recorded: number."""
    DELIVERY_FAILED = "delivery.failed"
    """An unforeseen error ended a delivery; with its traceback."""
    DEAD_LETTER_FAILED = "message.dead_letter_failed"
    """The dead-letter queue did not take a message; it stays where it was and is tried again: code, error."""
    MESSAGE_DEAD_LETTERED = "message.dead_lettered"
    """A message that no task can take was moved to the dead-letter queue: reason, task, message_id."""
    QUEUE_ARGUMENTS_DIFFER = "queue.arguments_differ"
    """A queue or exchange exists otherwise than plain clients declare it, or may not be declared: what, error."""
    WAKE_UP_FAILED = "wake_up.failed"
    """A wake-up could not be enqueued; the pulse will: code, error."""
    API_STARTED = "api.started"
    API_WITHOUT_KEYS = "api.without_keys"
    """The HTTP API listens: host, port."""
    REQUEST_FAILED = "request.failed"
    """The HTTP API could not answer, by no fault of the caller's: code, error, path."""
    WAKE_UP_FOREIGN = "wake_up.foreign"
    """A wake-up for a run that this ledger does not have was dropped: another deployment uses our vhost."""
    PULSE_WOKE = "pulse.woke"
    """The pulse enqueued wake-ups: count."""
    HISTORY_FORGOTTEN = "history.forgotten"
    """Rows of what is over and older than the retention were deleted: what, count."""
    FORGETTING_FAILED = "history.forgetting_failed"
    """They could not be deleted; it is tried again in a minute: code, error."""
    PULSE_FAILED = "pulse.failed"
    """The pulse could not do its round and tries again: code, error, delay."""
    SCHEDULES_READ = "schedules.read"
    """Schedules that are new or were edited were read (debug): new, changed."""
    SCHEDULE_INVALID = "schedule.invalid"
    """A schedule's text cannot be read, so that it never fires: task_id, error. At most 20 a look."""
    SCHEDULE_PAUSED = "schedule.paused"
    """An operator paused a schedule: task_id, actor."""
    SCHEDULE_RESUMED = "schedule.resumed"
    """An operator resumed a schedule: task_id, actor."""
    SCHEDULE_BACKFILLED = "schedule.backfilled"
    """An operator had slots of the past run: task_id, actor, count."""
    SLOTS_CLAIMED = "slots.claimed"
    """Slots were claimed: started, missed, skipped, latest (by how many seconds the latest of them was late)."""
    SLOTS_HELD_BACK = "slots.held_back"
    """So many runs wait for a worker that no slot is claimed: queued."""
    FIRING_FAILED = "firing.failed"
    """Schedules could not be looked at or claimed, which is tried again: code, error, delay."""
    BROKER_DEGRADED = "broker.degraded"
    """The broker takes no messages now; the node goes on with what it has: error."""
    BROKER_RECOVERED = "broker.recovered"
    """It takes them again."""
    CONSUMER_STUCK = "consumer.stuck"
    """A worker's connection to the broker stalled in the middle of a frame and is broken, to make a new one: error."""
    DATABASE_WAITING = "database.waiting"
    """A process waits for the database or its migration: error."""
    DATABASE_BUSY = "database.busy"
    """PostgreSQL has been at one statement for seconds and says that it still is: seconds, wait_event."""
    DATABASE_READY = "database.ready"
    """The wait is over."""
    METRICS_SERVED = "metrics.served"
    """A worker or a beat serves its metrics: host, port."""
    METRICS_UNSERVED = "metrics.unserved"
    """It cannot, and works without: host, port, error."""
    METRICS_INCOMPLETE = "metrics.incomplete"
    """The ledger did not answer a scrape, which lacks its gauges: code, error."""
    TRACING_UNAVAILABLE = "tracing.unavailable"
    """Spans are asked for, and the extra that makes them is not installed: error."""


_SHARED: Final[list[structlog.typing.Processor]] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure_logging(settings: LogSettings) -> None:
    """Send every log line of this process to standard error, in the format the settings ask for."""
    console = sys.stderr.isatty() if settings.format == "auto" else settings.format == "console"
    # Tracebacks without local variables, in both formats: locals hold addresses and passwords.
    plain = structlog.dev.plain_traceback
    renderer: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level)
    # One line a call would tell the Discovery Service's address and nothing that the ledger does not.
    for chatty in ("httpx2", "httpcore2", "amqp", "pgmq", "psycopg.pool", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(settings.level)))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of one module."""
    bound_logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return bound_logger


@contextmanager
def bound(**identifiers: object) -> Iterator[None]:
    """Put identifiers on every line logged inside the block by this thread."""
    with structlog.contextvars.bound_contextvars(**identifiers):
        yield
