"""Bring the ledger's schema up to date, safely twice and by two processes at once (Alembic).

``upgrade`` needs the migration owner's rights; ``verify`` only looks, and is what every process waits on. Only the
former imports Alembic, which would take a fifth of every command's start.
"""

from functools import cache
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, column, func, literal, select, table
from sqlalchemy.schema import CreateSchema

from orchestrator.db import Database
from orchestrator.errors import ConfigurationError, DatabaseLockedError, NotMigratedError
from orchestrator.telemetry import Event, logger

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE: Final = "alembic_version"
_HOME: Final = Path(__file__).parent
_LONGEST_WAIT: Final = "4s"
"""For a lock on a table."""
_TRIES: Final = 30
"""How often it is tried, because others lock the tables."""

_log = logger(__name__)


def upgrade(database: Database, *, with_queues: bool) -> bool:
    """Migrate to the newest revision; return whether there was anything to do. A newer one stays as it is.

    Args:
        database: connected as the owner of the ledger's schema, or as one who may create it.
        with_queues: install PGMQ's SQL too, for set-ups whose queues live in PostgreSQL.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
        DatabaseLockedError: others are using the tables all the time.
    """
    for number in range(1, _TRIES + 1):
        try:
            return _upgrade(database, with_queues=with_queues)
        except DatabaseLockedError as error:
            # Nothing of it was done. Who is at work locks the same tables in another order: a deadlock is no surprise.
            if number == _TRIES:
                raise DatabaseLockedError(
                    f"the ledger's tables are in use all the time ({error}); try again when there is less work"
                ) from error
            _log.warning(Event.DATABASE_WAITING, code=error.code, error=str(error))
            sleep(1)
    raise AssertionError("unreachable: the last try returns or raises")


def _upgrade(database: Database, *, with_queues: bool) -> bool:
    from alembic import command  # noqa: PLC0415 -- see above

    with database.transaction() as connection:
        # Our sessions' time-outs are for work: an index on a large table takes as long as it takes.
        for name in ("lock_timeout", "statement_timeout"):
            connection.execute(select(func.set_config(name, "0", literal(value=True))))
        # Held to the end of the transaction: a second process waits here and then finds nothing to do.
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("orchestrator:migrate", 0))))
        # Behind who waits for a table everybody else waits, too.
        connection.execute(select(func.set_config("lock_timeout", _LONGEST_WAIT, literal(value=True))))
        installed = with_queues and _install_queues(connection)
        revision = _revision(connection, database.schema)
        if revision == _known()[-1] or not (revision is None or revision in _known()):
            return installed
        # Not IF NOT EXISTS: that asks for the right to create schemas even where there is nothing to create.
        if not connection.scalar(select(func.to_regnamespace(func.quote_ident(database.schema)).is_not(None))):
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
    if revision is None or revision in _known()[:-1]:
        found = f"is at revision {revision}, this code needs {_known()[-1]}" if revision else "does not exist"
        raise NotMigratedError(f"the ledger's schema {database.schema!r} {found}; run `orchestrator migrate`")


def _revision(connection: Connection, schema: str) -> str | None:
    if connection.scalar(select(func.to_regclass(func.format("%I.%I", schema, VERSION_TABLE)))) is None:
        return None
    versions = table(VERSION_TABLE, column("version_num"), schema=schema)
    revision: str | None = connection.scalar(select(versions.c.version_num))
    return revision


@cache
def _known() -> list[str]:
    """Return this code's revisions in order; `make migration` begins each script's name with its own."""
    return sorted(path.name.partition("_")[0] for path in _HOME.glob("versions/[0-9]*.py"))


def _config(connection: Connection, schema: str) -> "Config":
    from alembic.config import Config  # noqa: PLC0415 -- see above

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
