"""How workers and beats are, and where.

Revision 0003, after 0002.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # The schema's own name: ALTER does not heed the translate map.
    schema = op.get_context().version_table_schema
    op.add_column(
        "nodes", sa.Column("host", sa.Text(), nullable=True, comment="its machine, or container"), schema=schema
    )
    op.add_column(
        "nodes",
        sa.Column("degraded", sa.Text(), nullable=True, comment="what keeps its work from having its full effect"),
        schema=schema,
    )
    op.alter_column(
        "nodes",
        "problem",
        existing_type=sa.Text(),
        existing_comment="what keeps it from its work",
        comment="what keeps it from its work: not ready",
        schema=schema,
    )
