"""The ledger's tables, as the migrations make them (a test proves the two equal).

All live in one schema of our own. Only :mod:`orchestrator.ledger` writes to them; read models may read.
Constraints restate the promises, so that a wrong writer is refused by PostgreSQL rather than believed.
"""

from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
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


def _moment(name: str, *, required: bool = False, comment: str | None = None) -> Column[object]:
    default = func.clock_timestamp() if required else None
    return Column(name, TIMESTAMP(timezone=True), nullable=not required, server_default=default, comment=comment)


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
    _moment("scheduled_for", comment="the slot that started it"),
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
    _moment("forgotten_at", comment="since when its rows are being deleted, batch by batch; it cannot be revived"),
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
    # Does a run of this task overlap with the next one? Small, however long the history.
    Index(
        "runs_unfinished_task_id_idx",
        "task_id",
        postgresql_where=text("task_id IS NOT NULL AND finished_at IS NULL"),
    ),
    Index(
        "runs_data_source_id_created_at_idx",
        "data_source_id",
        "created_at",
        postgresql_where=text("data_source_id IS NOT NULL"),
    ),
    # To search by what is rare. A run that a schedule starts is in none of them: claims insert thousands a second.
    Index(
        "runs_error_code_created_at_id_idx",
        "error_code",
        "created_at",
        "id",
        postgresql_where=text("error_code IS NOT NULL"),
    ),
    Index(
        "runs_theme_name_created_at_id_idx",
        "theme_name",
        "created_at",
        "id",
        postgresql_where=text("theme_name IS NOT NULL"),
    ),
    Index(
        "runs_trigger_created_at_id_idx",
        "trigger",
        "created_at",
        "id",
        postgresql_where=text("trigger <> 'schedule'"),
    ),
    Index(
        "runs_site_analysis_created_at_id_idx",
        "created_at",
        "id",
        postgresql_where=text("kind = 'site_analysis'"),
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
    # None of the columns that marking a batch changes may be in an index, nor in an index's condition.
    # By a sum that only searches ask for: of a new run, which statistics do not know, PostgreSQL would take an index on
    # the column itself for the better one to mark by, and look at the same data sources in all other runs.
    Index("dispatches_source_idx", text("(data_source_id + 0)")),
    Index("dispatches_skipped_idx", "run_id", "data_source_id", postgresql_where=text("reason IS NOT NULL")),
    # Each row is marked once. With room for that on its own page no index hears of it: see docs/benchmarks.md.
    postgresql_with={"fillfactor": 45},
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

# No foreign key either: a claim inserts thousands, and checking each costs as much as writing it.
run_events: Final = Table(
    "run_events",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("run_id", Uuid, nullable=False),
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
    Column("task_id", BigInteger, comment="the crawl task whose schedule it is about"),
    Column("reason", Text),
    Column("before", JSONB),
    Column("after", JSONB),
    Index("audit_events_actor_id_idx", "actor", "id"),
    Index("audit_events_action_id_idx", "action", "id"),
    Index("audit_events_at_idx", "at"),
    Index("audit_events_run_id_idx", "run_id"),
    Index("audit_events_task_id_idx", "task_id", postgresql_where=text("task_id IS NOT NULL")),
)

# The key itself is shown once and kept nowhere; a digest of 256 random bits needs neither salt nor stretching.
api_keys: Final = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True, comment="the public part of the key, by which people call it"),
    Column("name", Text, nullable=False, comment="whose it is"),
    Column("role", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False, comment="SHA-256 of the whole key"),
    _moment("created_at", required=True),
    Column("created_by", Text, nullable=False),
    _moment("expires_at"),
    _moment("revoked_at"),
    _moment("used_at", comment="last use, to a minute"),
    CheckConstraint("role IN ('viewer', 'operator', 'admin')", name="role"),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
)

# What was answered to a request with an idempotency key, written in the transaction of its effect.
api_requests: Final = Table(
    "api_requests",
    metadata,
    Column("actor", Text, primary_key=True, comment="keys of different callers do not meet"),
    Column("key", Text, primary_key=True, comment="the header Idempotency-Key"),
    Column("fingerprint", LargeBinary, nullable=False, comment="SHA-256 of method, path and body"),
    Column("status", SmallInteger, nullable=False),
    Column("body", JSONB, nullable=False),
    Column("location", Text),
    _moment("created_at", required=True),
    Index("api_requests_created_at_idx", "created_at"),
)

nodes: Final = Table(
    "nodes",
    metadata,
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False, comment="worker or beat"),
    Column("version", Text, nullable=False),
    Column("queues", ARRAY(Text), nullable=False, server_default="{}"),
    Column("concurrency", Integer),
    Column("host", Text, comment="its machine, or container"),
    Column("problem", Text, comment="what keeps it from its work: not ready"),
    Column("degraded", Text, comment="what keeps its work from having its full effect"),
    _moment("started_at", required=True),
    _moment("seen_at", required=True),
    CheckConstraint("kind IN ('worker', 'beat')", name="kind"),
)

# What crawl_tasks says of a schedule, as it was last read, and what we make of it. The first columns are compared
# with the application's own to notice edits: there is no fingerprint that could collide.
schedules: Final = Table(
    "schedules",
    metadata,
    Column("task_id", BigInteger, primary_key=True, autoincrement=False),
    Column("text", Text, comment="as people wrote it; null: no schedule"),
    Column("zone", Text, nullable=False, comment="time zone, the default one where the task names none"),
    Column("active", Boolean, nullable=False, comment="the application's is_active"),
    Column("misfire_policy", Text, comment="as written; null: the default"),
    Column("overlap_policy", Text, comment="as written; null: the default"),
    Column("rules", Text, nullable=False, comment="version and settings of the reading; others are read again"),
    Column("canonical", Text, comment="what the text means"),
    Column("problem", Text, comment="why it cannot be read"),
    _moment("next_fire_at", comment="the next slot to be claimed; null: none, ever, as things stand"),
    _moment("first_seen_at", required=True),
    _moment("read_at", required=True, comment="since when this reading stands; it never fires for earlier slots"),
    CheckConstraint("next_fire_at IS NULL OR (active AND problem IS NULL AND canonical IS NOT NULL)", name="fires"),
    CheckConstraint("text IS NULL OR (canonical IS NULL) = (problem IS NOT NULL)", name="reading"),
    Index(
        "schedules_next_fire_at_task_id_idx",
        "next_fire_at",
        "task_id",
        postgresql_where=text("next_fire_at IS NOT NULL"),
    ),
    Index("schedules_quiet_idx", "task_id", postgresql_where=text("next_fire_at IS NULL")),
    Index("schedules_problem_idx", "task_id", postgresql_where=text("problem IS NOT NULL")),
    # Each claim leaves its dead rows in front of the index that tells what is due next.
    postgresql_with={"autovacuum_vacuum_scale_factor": 0.02, "fillfactor": 80},
)

schedule_history: Final = Table(
    "schedule_history",
    metadata,
    Column("task_id", BigInteger, primary_key=True, autoincrement=False),
    Column("valid_from", TIMESTAMP(timezone=True), primary_key=True, comment="read_at of the reading that is past"),
    Column("valid_until", TIMESTAMP(timezone=True), nullable=False, comment="when an edit was noticed"),
    Column("text", Text),
    Column("zone", Text, nullable=False),
    Column("active", Boolean, nullable=False),
    Column("canonical", Text),
    Column("problem", Text),
    Index("schedule_history_valid_until_idx", "valid_until"),
)

# Ours, beside the application's is_active; survives whatever the application does with its row.
pauses: Final = Table(
    "pauses",
    metadata,
    Column("task_id", BigInteger, primary_key=True, autoincrement=False),
    _moment("paused_at", required=True),
    Column("actor", Text, nullable=False, comment="who paused it"),
    Column("reason", Text),
    _moment("resumed_at", comment="slots before this one stay skipped; null: it is paused"),
)

# The primary key is the judge: a slot is claimed once.
firings: Final = Table(
    "firings",
    metadata,
    Column("task_id", BigInteger, primary_key=True, autoincrement=False),
    Column("scheduled_for", TIMESTAMP(timezone=True), primary_key=True, comment="the slot"),
    _moment("through", comment="not one slot but all of them up to here"),
    Column("outcome", Text, nullable=False),
    Column("reason", Text),
    Column("run_id", Uuid, comment="uuid5 of (task, slot)"),
    _moment("claimed_at", required=True),
    Column("claimed_by", Text, nullable=False, comment="the node, or who asked for a backfill"),
    CheckConstraint("outcome IN ('started', 'missed', 'skipped')", name="outcome"),
    CheckConstraint("(outcome = 'started') = (run_id IS NOT NULL)", name="run"),
    CheckConstraint("outcome = 'started' OR reason IS NOT NULL", name="reason"),
    CheckConstraint("through IS NULL OR (outcome <> 'started' AND through >= scheduled_for)", name="through"),
    Index("firings_scheduled_for_task_id_idx", "scheduled_for", "task_id"),
    Index(
        "firings_outcome_scheduled_for_task_id_idx",
        "outcome",
        "scheduled_for",
        "task_id",
        postgresql_where=text("outcome <> 'started'"),
    ),
)

# Runs that were committed together and whose wake-ups are being sent. One row for thousands of runs: marking each of
# them would cost more than claiming it did.
outbox: Final = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("due_at", TIMESTAMP(timezone=True), nullable=False, comment="after this the pulse sends them"),
    Column("run_ids", ARRAY(Uuid), nullable=False),
)

# One row: how far the application's table has been looked through, whichever process did it.
catalog_watch: Final = Table(
    "catalog_watch",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    _moment("looked_at", comment="edits by updated_at were noticed up to here"),
    _moment("swept_at", comment="when the last complete sweep began"),
    _moment("sweep_began_at", comment="when the sweep under way began; null: none is"),
    Column("sweep_after", BigInteger, nullable=False, server_default="0", comment="how far it has come"),
    CheckConstraint("id = 1", name="one_row"),
)
