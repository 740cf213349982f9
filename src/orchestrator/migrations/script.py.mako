"""${message}.

Revision ${up_revision}, after ${down_revision | comma,n}.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # The schema's own name: ALTER does not heed the translate map.
    schema = op.get_context().version_table_schema
    ${upgrades if upgrades else "pass"}
