"""The ledger's tables, as the migrations make them (a test proves the two equal).

All live in one schema of our own. Only :mod:`orchestrator.ledger` writes to them; read models may read.
Constraints restate the promises, so that a wrong writer is refused by PostgreSQL rather than believed.
"""

from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

SCHEMA: Final = "orchestrator"
"""The name in the metadata; the setting ``schema`` renames it by a translate map."""

metadata: Final = MetaData(
    schema=SCHEMA,
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    },
)


def _moment(name: str, *, required: bool = False) -> Column[object]:
    default = func.clock_timestamp() if required else None
    return Column(name, TIMESTAMP(timezone=True), nullable=not required, server_default=default)


runs: Final = Table(
    "runs",
    metadata,
    Column("id", Uuid, primary_key=True, comment="the Celery task id"),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("trigger", Text, nullable=False, comment="who started it"),
    Column("task_id", BigInteger, comment="crawl: the crawl task"),
    Column("data_source_id", BigInteger, comment="site_analysis: the data source"),
    Column("theme_name", Text, comment="site_analysis: the theme"),
    Column("celery_id", Text, comment="the caller's id where it is no UUID"),
    Column("retry_of", Uuid, comment="the finished run that this one repeats"),
    Column("traceparent", Text, nullable=False, comment="W3C trace context"),
    Column("total", Integer, nullable=False, server_default="0", comment="dispatches in the plan"),
    Column("published", Integer, nullable=False, server_default="0"),
    Column("skipped", Integer, nullable=False, server_default="0"),
    Column("attempts", Integer, nullable=False, server_default="0", comment="calls to the Discovery Service"),
    Column(
        "attempts_forgiven", Integer, nullable=False, server_default="0", comment="attempts before the last revival"
    ),
    Column("stalls", Integer, nullable=False, server_default="0", comment="deliveries since the last progress"),
    Column("postponements", Integer, nullable=False, server_default="0", comment="failed publishes in a row"),
    Column("wakes", Integer, nullable=False, server_default="0", comment="wake-ups since the last delivery"),
    Column("wake_number", Integer, nullable=False, server_default="0", comment="of the newest wake-up sent"),
    Column("begun_by", Integer, comment="number of the wake-up whose delivery began last"),
    Column("stale_below", Integer, nullable=False, server_default="0", comment="wake-ups below were sent before that"),
    Column("awaits_slot", Text, comment="why no call could start: the cap that was reached"),
    Column("error_code", Text),
    Column("error_message", Text),
    _moment("created_at", required=True),
    _moment("enqueued_at"),
    _moment("started_at"),
    _moment("materialized_at"),
    _moment("progress_at", required=True),
    _moment("stalled_at"),
    _moment("next_attempt_at"),
    _moment("wake_at"),
    _moment("finished_at"),
    CheckConstraint("kind IN ('site_analysis', 'crawl')", name="kind"),
    CheckConstraint("state IN ('queued', 'running', 'retrying', 'succeeded', 'failed', 'canceled')", name="state"),
    CheckConstraint("published >= 0 AND skipped >= 0 AND published + skipped <= total", name="counts"),
    # Every run that is not over has a wake-up ahead; a canceled one may keep it until its rows are skipped.
    CheckConstraint(
        "CASE WHEN state IN ('queued', 'running', 'retrying') THEN wake_at IS NOT NULL"
        " WHEN state IN ('succeeded', 'failed') THEN wake_at IS NULL ELSE true END",
        name="wake_up_ahead",
    ),
    CheckConstraint("(state IN ('succeeded', 'failed', 'canceled')) = (finished_at IS NOT NULL)", name="finished"),
    CheckConstraint("state <> 'succeeded' OR kind <> 'crawl' OR published + skipped = total", name="complete"),
    CheckConstraint("state NOT IN ('failed', 'retrying') OR error_code IS NOT NULL", name="reason"),
    Index("runs_wake_at_idx", "wake_at", postgresql_where=text("wake_at IS NOT NULL")),
    Index("runs_awaits_slot_idx", "created_at", postgresql_where=text("awaits_slot IS NOT NULL")),
    Index("runs_created_at_id_idx", "created_at", "id"),
    Index("runs_state_created_at_id_idx", "state", "created_at", "id"),
    Index("runs_task_id_created_at_idx", "task_id", "created_at", postgresql_where=text("task_id IS NOT NULL")),
    Index(
        "runs_data_source_id_created_at_idx",
        "data_source_id",
        "created_at",
        postgresql_where=text("data_source_id IS NOT NULL"),
    ),
)

# No foreign key: 100,000 rows are inserted at a time, by one statement that holds the run's row locked.
dispatches: Final = Table(
    "dispatches",
    metadata,
    Column("run_id", Uuid, primary_key=True),
    Column("data_source_id", BigInteger, primary_key=True, autoincrement=False),
    Column("crawl_config_id", BigInteger, comment="the latest active one when the plan was made"),
    Column("state", Text, nullable=False),
    Column("reason", Text, comment="why it was skipped"),
    _moment("published_at"),
    CheckConstraint("state IN ('pending', 'published', 'skipped')", name="state"),
    CheckConstraint("(state = 'skipped') = (reason IS NOT NULL)", name="reason"),
    CheckConstraint("state = 'skipped' OR crawl_config_id IS NOT NULL", name="config"),
)

attempts: Final = Table(
    "attempts",
    metadata,
    Column("run_id", Uuid, ForeignKey("orchestrator.runs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("node", Text, nullable=False, comment="the worker that made the call"),
    _moment("started_at", required=True),
    Column("lease_until", TIMESTAMP(timezone=True), nullable=False, comment="after this it counts as lost"),
    _moment("finished_at"),
    Column("outcome", Text),
    Column("status", Integer, comment="HTTP status of the answer"),
    Column("code", Text),
    Column("message", Text),
    Column("seconds", Double),
    Column("retry_after", Double, comment="what the Discovery Service asked for, in seconds"),
    _moment("next_attempt_at"),
    CheckConstraint("outcome IN ('succeeded', 'retryable', 'refused', 'lost')", name="outcome"),
    CheckConstraint("(finished_at IS NULL) = (outcome IS NULL)", name="finished"),
    Index("attempts_open_idx", "lease_until", postgresql_where=text("finished_at IS NULL")),
)

run_events: Final = Table(
    "run_events",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("run_id", Uuid, ForeignKey("orchestrator.runs.id", ondelete="CASCADE"), nullable=False),
    _moment("at", required=True),
    Column("event", Text, nullable=False),
    Column("state", Text, nullable=False, comment="the run's state after it"),
    Column("code", Text),
    Column("message", Text),
    Index("run_events_run_id_id_idx", "run_id", "id"),
)

audit_events: Final = Table(
    "audit_events",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _moment("at", required=True),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("run_id", Uuid),
    Column("reason", Text),
    Column("before", JSONB),
    Column("after", JSONB),
    Index("audit_events_run_id_idx", "run_id"),
)

nodes: Final = Table(
    "nodes",
    metadata,
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False, comment="worker or beat"),
    Column("version", Text, nullable=False),
    Column("queues", ARRAY(Text), nullable=False, server_default="{}"),
    Column("concurrency", Integer),
    _moment("started_at", required=True),
    _moment("seen_at", required=True),
    CheckConstraint("kind IN ('worker', 'beat')", name="kind"),
)
