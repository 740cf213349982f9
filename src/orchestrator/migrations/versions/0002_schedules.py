"""Schedules, their history, pauses, the firing of each slot, and an outbox.

Revision 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # The schema's own name: ALTER does not heed the translate map.
    schema = op.get_context().version_table_schema
    op.create_table(
        "catalog_watch",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column(
            "looked_at",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="edits by updated_at were noticed up to here",
        ),
        sa.Column(
            "swept_at", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="when the last complete sweep began"
        ),
        sa.Column(
            "sweep_began_at",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="when the sweep under way began; null: none is",
        ),
        sa.Column("sweep_after", sa.BigInteger(), server_default="0", nullable=False, comment="how far it has come"),
        sa.CheckConstraint("id = 1", name=op.f("catalog_watch_one_row_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("catalog_watch_pkey")),
        schema=schema,
    )
    op.create_table(
        "firings",
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("scheduled_for", postgresql.TIMESTAMP(timezone=True), nullable=False, comment="the slot"),
        sa.Column(
            "through",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="not one slot but all of them up to here",
        ),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("run_id", sa.Uuid(), nullable=True, comment="uuid5 of (task, slot)"),
        sa.Column(
            "claimed_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("claimed_by", sa.Text(), nullable=False, comment="the node, or who asked for a backfill"),
        sa.CheckConstraint("(outcome = 'started') = (run_id IS NOT NULL)", name=op.f("firings_run_check")),
        sa.CheckConstraint("outcome = 'started' OR reason IS NOT NULL", name=op.f("firings_reason_check")),
        sa.CheckConstraint("outcome IN ('started', 'missed', 'skipped')", name=op.f("firings_outcome_check")),
        sa.CheckConstraint(
            "through IS NULL OR (outcome <> 'started' AND through >= scheduled_for)", name=op.f("firings_through_check")
        ),
        sa.PrimaryKeyConstraint("task_id", "scheduled_for", name=op.f("firings_pkey")),
        schema=schema,
    )
    op.create_index(
        "firings_scheduled_for_task_id_idx",
        "firings",
        ["scheduled_for", "task_id"],
        unique=False,
        schema=schema,
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "due_at", postgresql.TIMESTAMP(timezone=True), nullable=False, comment="after this the pulse sends them"
        ),
        sa.Column("run_ids", sa.ARRAY(sa.Uuid()), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("outbox_pkey")),
        schema=schema,
    )
    op.create_table(
        "pauses",
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column(
            "paused_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("actor", sa.Text(), nullable=False, comment="who paused it"),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column(
            "resumed_at",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="slots before this one stay skipped; null: it is paused",
        ),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pauses_pkey")),
        schema=schema,
    )
    op.create_table(
        "schedule_history",
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column(
            "valid_from",
            postgresql.TIMESTAMP(timezone=True),
            nullable=False,
            comment="read_at of the reading that is past",
        ),
        sa.Column(
            "valid_until", postgresql.TIMESTAMP(timezone=True), nullable=False, comment="when an edit was noticed"
        ),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("zone", sa.Text(), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("canonical", sa.Text(), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("task_id", "valid_from", name=op.f("schedule_history_pkey")),
        schema=schema,
    )
    op.create_table(
        "schedules",
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("text", sa.Text(), nullable=True, comment="as people wrote it; null: no schedule"),
        sa.Column("zone", sa.Text(), nullable=False, comment="time zone, the default one where the task names none"),
        sa.Column("active", sa.Boolean(), nullable=False, comment="the application's is_active"),
        sa.Column("misfire_policy", sa.Text(), nullable=True, comment="as written; null: the default"),
        sa.Column("overlap_policy", sa.Text(), nullable=True, comment="as written; null: the default"),
        sa.Column(
            "rules", sa.Text(), nullable=False, comment="version and settings of the reading; others are read again"
        ),
        sa.Column("canonical", sa.Text(), nullable=True, comment="what the text means"),
        sa.Column("problem", sa.Text(), nullable=True, comment="why it cannot be read"),
        sa.Column(
            "next_fire_at",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="the next slot to be claimed; null: none, ever, as things stand",
        ),
        sa.Column(
            "first_seen_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "read_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="since when this reading stands; it never fires for earlier slots",
        ),
        sa.CheckConstraint(
            "next_fire_at IS NULL OR (active AND problem IS NULL AND canonical IS NOT NULL)",
            name=op.f("schedules_fires_check"),
        ),
        sa.CheckConstraint(
            "text IS NULL OR (canonical IS NULL) = (problem IS NOT NULL)", name=op.f("schedules_reading_check")
        ),
        sa.PrimaryKeyConstraint("task_id", name=op.f("schedules_pkey")),
        schema=schema,
        postgresql_with={"autovacuum_vacuum_scale_factor": 0.02, "fillfactor": 80},
    )
    op.create_index(
        "schedules_next_fire_at_task_id_idx",
        "schedules",
        ["next_fire_at", "task_id"],
        unique=False,
        schema=schema,
        postgresql_where=sa.text("next_fire_at IS NOT NULL"),
    )
    op.create_index(
        "schedules_problem_idx",
        "schedules",
        ["task_id"],
        unique=False,
        schema=schema,
        postgresql_where=sa.text("problem IS NOT NULL"),
    )
    op.add_column(
        "audit_events",
        sa.Column("task_id", sa.BigInteger(), nullable=True, comment="the crawl task whose schedule it is about"),
        schema=schema,
    )
    op.create_index(
        "audit_events_task_id_idx",
        "audit_events",
        ["task_id"],
        unique=False,
        schema=schema,
        postgresql_where=sa.text("task_id IS NOT NULL"),
    )
    op.add_column(
        "nodes",
        sa.Column("problem", sa.Text(), nullable=True, comment="what keeps it from its work"),
        schema=schema,
    )
    op.drop_constraint(op.f("run_events_run_id_fkey"), "run_events", schema=schema, type_="foreignkey")
    op.add_column(
        "runs",
        sa.Column(
            "scheduled_for", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="the slot that started it"
        ),
        schema=schema,
    )
    op.create_index(
        "runs_unfinished_task_id_idx",
        "runs",
        ["task_id"],
        unique=False,
        schema=schema,
        postgresql_where=sa.text("task_id IS NOT NULL AND finished_at IS NULL"),
    )
    # The one row that whoever looks at the application's table holds.
    op.bulk_insert(sa.table("catalog_watch", sa.column("id", sa.SmallInteger()), schema=schema), [{"id": 1}])
