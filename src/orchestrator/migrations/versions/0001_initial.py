"""The ledger: runs, dispatches, attempts, events, audit, nodes.

The first revision.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "audit_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("before", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("after", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("audit_events_pkey")),
        schema="orchestrator",
    )
    op.create_index("audit_events_run_id_idx", "audit_events", ["run_id"], unique=False, schema="orchestrator")
    op.create_table(
        "dispatches",
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("data_source_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column(
            "crawl_config_id", sa.BigInteger(), nullable=True, comment="the latest active one when the plan was made"
        ),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True, comment="why it was skipped"),
        sa.Column("published_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("(state = 'skipped') = (reason IS NOT NULL)", name=op.f("dispatches_reason_check")),
        sa.CheckConstraint("state = 'skipped' OR crawl_config_id IS NOT NULL", name=op.f("dispatches_config_check")),
        sa.CheckConstraint("state IN ('pending', 'published', 'skipped')", name=op.f("dispatches_state_check")),
        sa.PrimaryKeyConstraint("run_id", "data_source_id", name=op.f("dispatches_pkey")),
        schema="orchestrator",
    )
    op.create_table(
        "nodes",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False, comment="worker or beat"),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("queues", sa.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("concurrency", sa.Integer(), nullable=True),
        sa.Column(
            "started_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "seen_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("kind IN ('worker', 'beat')", name=op.f("nodes_kind_check")),
        sa.PrimaryKeyConstraint("name", name=op.f("nodes_pkey")),
        schema="orchestrator",
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Uuid(), nullable=False, comment="the Celery task id"),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("trigger", sa.Text(), nullable=False, comment="who started it"),
        sa.Column("task_id", sa.BigInteger(), nullable=True, comment="crawl: the crawl task"),
        sa.Column("data_source_id", sa.BigInteger(), nullable=True, comment="site_analysis: the data source"),
        sa.Column("theme_name", sa.Text(), nullable=True, comment="site_analysis: the theme"),
        sa.Column("celery_id", sa.Text(), nullable=True, comment="the caller's id where it is no UUID"),
        sa.Column("retry_of", sa.Uuid(), nullable=True, comment="the finished run that this one repeats"),
        sa.Column("traceparent", sa.Text(), nullable=False, comment="W3C trace context"),
        sa.Column("total", sa.Integer(), server_default="0", nullable=False, comment="dispatches in the plan"),
        sa.Column("published", sa.Integer(), server_default="0", nullable=False),
        sa.Column("skipped", sa.Integer(), server_default="0", nullable=False),
        sa.Column(
            "attempts", sa.Integer(), server_default="0", nullable=False, comment="calls to the Discovery Service"
        ),
        sa.Column(
            "attempts_forgiven",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="attempts before the last revival",
        ),
        sa.Column(
            "stalls", sa.Integer(), server_default="0", nullable=False, comment="deliveries since the last progress"
        ),
        sa.Column(
            "postponements", sa.Integer(), server_default="0", nullable=False, comment="failed publishes in a row"
        ),
        sa.Column(
            "wakes", sa.Integer(), server_default="0", nullable=False, comment="wake-ups since the last delivery"
        ),
        sa.Column(
            "wake_number", sa.Integer(), server_default="0", nullable=False, comment="of the newest wake-up sent"
        ),
        sa.Column("begun_by", sa.Integer(), nullable=True, comment="number of the wake-up whose delivery began last"),
        sa.Column(
            "stale_below",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="wake-ups below were sent before that",
        ),
        sa.Column("awaits_slot", sa.Text(), nullable=True, comment="why no call could start: the cap that was reached"),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("enqueued_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("started_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("materialized_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "progress_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("stalled_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("next_attempt_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("wake_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'failed', 'canceled')) = (finished_at IS NOT NULL)",
            name=op.f("runs_finished_check"),
        ),
        sa.CheckConstraint(
            "CASE WHEN state IN ('queued', 'running', 'retrying') THEN wake_at IS NOT NULL WHEN state IN ('succeeded', 'failed') THEN wake_at IS NULL ELSE true END",
            name=op.f("runs_wake_up_ahead_check"),
        ),
        sa.CheckConstraint("kind IN ('site_analysis', 'crawl')", name=op.f("runs_kind_check")),
        sa.CheckConstraint(
            "state <> 'succeeded' OR kind <> 'crawl' OR published + skipped = total", name=op.f("runs_complete_check")
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'retrying', 'succeeded', 'failed', 'canceled')",
            name=op.f("runs_state_check"),
        ),
        sa.CheckConstraint(
            "state NOT IN ('failed', 'retrying') OR error_code IS NOT NULL", name=op.f("runs_reason_check")
        ),
        sa.CheckConstraint(
            "published >= 0 AND skipped >= 0 AND published + skipped <= total", name=op.f("runs_counts_check")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("runs_pkey")),
        schema="orchestrator",
    )
    op.create_index(
        "runs_awaits_slot_idx",
        "runs",
        ["created_at"],
        unique=False,
        schema="orchestrator",
        postgresql_where=sa.text("awaits_slot IS NOT NULL"),
    )
    op.create_index("runs_created_at_id_idx", "runs", ["created_at", "id"], unique=False, schema="orchestrator")
    op.create_index(
        "runs_data_source_id_created_at_idx",
        "runs",
        ["data_source_id", "created_at"],
        unique=False,
        schema="orchestrator",
        postgresql_where=sa.text("data_source_id IS NOT NULL"),
    )
    op.create_index(
        "runs_state_created_at_id_idx", "runs", ["state", "created_at", "id"], unique=False, schema="orchestrator"
    )
    op.create_index(
        "runs_task_id_created_at_idx",
        "runs",
        ["task_id", "created_at"],
        unique=False,
        schema="orchestrator",
        postgresql_where=sa.text("task_id IS NOT NULL"),
    )
    op.create_index(
        "runs_wake_at_idx",
        "runs",
        ["wake_at"],
        unique=False,
        schema="orchestrator",
        postgresql_where=sa.text("wake_at IS NOT NULL"),
    )
    op.create_table(
        "attempts",
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("node", sa.Text(), nullable=False, comment="the worker that made the call"),
        sa.Column(
            "started_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "lease_until", postgresql.TIMESTAMP(timezone=True), nullable=False, comment="after this it counts as lost"
        ),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True, comment="HTTP status of the answer"),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column(
            "retry_after", sa.Double(), nullable=True, comment="what the Discovery Service asked for, in seconds"
        ),
        sa.Column("next_attempt_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('succeeded', 'retryable', 'refused', 'lost')", name=op.f("attempts_outcome_check")
        ),
        sa.CheckConstraint("(finished_at IS NULL) = (outcome IS NULL)", name=op.f("attempts_finished_check")),
        sa.ForeignKeyConstraint(
            ["run_id"], ["orchestrator.runs.id"], name=op.f("attempts_run_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "number", name=op.f("attempts_pkey")),
        schema="orchestrator",
    )
    op.create_index(
        "attempts_open_idx",
        "attempts",
        ["lease_until"],
        unique=False,
        schema="orchestrator",
        postgresql_where=sa.text("finished_at IS NULL"),
    )
    op.create_table(
        "run_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column(
            "at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, comment="the run's state after it"),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run_id"], ["orchestrator.runs.id"], name=op.f("run_events_run_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("run_events_pkey")),
        schema="orchestrator",
    )
    op.create_index("run_events_run_id_id_idx", "run_events", ["run_id", "id"], unique=False, schema="orchestrator")
