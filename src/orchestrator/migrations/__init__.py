"""Bring the ledger's schema up to date, safely twice and by two processes at once (Alembic).

``upgrade`` needs the migration owner's rights; ``verify`` only looks, and is what every process waits on.
"""

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, literal, select
from sqlalchemy.schema import CreateSchema

from orchestrator.db import Database
from orchestrator.errors import ConfigurationError, NotMigratedError

VERSION_TABLE: Final = "alembic_version"
_HOME: Final = Path(__file__).parent


def upgrade(database: Database, *, with_queues: bool) -> bool:
    """Migrate to the newest revision; return whether there was anything to do. A newer one stays as it is.

    Args:
        database: connected as the owner of the ledger's schema, or as one who may create it.
        with_queues: install PGMQ's SQL too, for set-ups whose queues live in PostgreSQL.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
    """
    with database.transaction() as connection:
        # Our sessions' time-outs are for work: an index on a large table takes as long as it takes.
        for name in ("lock_timeout", "statement_timeout"):
            connection.execute(select(func.set_config(name, "0", literal(value=True))))
        # Held to the end of the transaction: a second process waits here and then finds nothing to do.
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("orchestrator:migrate", 0))))
        installed = with_queues and _install_queues(connection)
        revision = _revision(connection, database.schema)
        if revision == _head() or not (revision is None or revision in _known()):
            return installed
        # Not IF NOT EXISTS: that asks for the right to create schemas even where there is nothing to create.
        if not connection.scalar(select(func.to_regnamespace(_quoted(connection, database.schema)).is_not(None))):
            connection.execute(CreateSchema(database.schema))
        command.upgrade(_config(connection, database.schema), "head")
        return True


def verify(database: Database) -> None:
    """Make sure that the schema is this code's.

    Raises:
        NotMigratedError: it is missing or older; the sentence says what to run.
        DatabaseUnavailableError: the database cannot be reached.
    """
    with database.transaction() as connection:
        revision = _revision(connection, database.schema)
    # A revision that we do not know is newer: the old code goes on during a rolling upgrade.
    if revision is None or (revision in _known() and revision != _head()):
        found = f"is at revision {revision}, this code needs {_head()}" if revision else "does not exist"
        raise NotMigratedError(f"the ledger's schema {database.schema!r} {found}; run `orchestrator migrate`")


def _revision(connection: Connection, schema: str) -> str | None:
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "version_table_schema": schema}
    )
    return context.get_current_revision()


def _known() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _quoted(connection: Connection, name: str) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(name)


def _head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def _config(connection: Connection | None = None, schema: str | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_HOME).replace("%", "%%"))
    config.attributes.update(connection=connection, schema=schema)
    return config


def _install_queues(connection: Connection) -> bool:
    if connection.scalar(select(func.to_regclass("pgmq.meta"))) is not None:
        return False
    try:
        from pgmq import get_embedded_install_sql  # noqa: PLC0415 -- an extra, needed by these set-ups only
    except ImportError:
        raise ConfigurationError(
            "queues in PostgreSQL need the extra: pip install 'task-orchestrator[embedded]'"
        ) from None
    # Many statements at once, which the driver takes only without parameters.
    connection.connection.cursor().execute(get_embedded_install_sql())
    return True
